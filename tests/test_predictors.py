"""Predictors: exact where theory says so, and nobody else's tensors."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from accel import cache
from accel.cache.predictors import DMD, Forecast, History
from accel.cache.solver_coupled import CleanNodes
from accel.cache.zeus import Pattern

MAKES = {kind: Forecast(kind).make for kind in ("reuse", "foca", "dmd")} | {
    f"{kind}{order}": Forecast(kind, order).make
    for kind in ("newton", "taylor", "hicache")
    for order in (1, 2, 3)
}


def newton_of(order, damping=0.0):
    return Forecast("newton", order, damping).make()


def taught(predictor, values):
    """A predictor that has learnt ``{position: number}``."""
    for position, value in values.items():
        predictor.update(position, torch.tensor([float(value)], dtype=torch.float64))
    return predictor


def polynomial(coefficients, at):
    """Each column of ``coefficients`` is a polynomial of its own."""
    powers = torch.tensor([float(at) ** k for k in range(len(coefficients))], dtype=torch.float64)
    return powers @ coefficients


@st.composite
def polynomials(draw):
    order = draw(st.integers(1, 3))
    degree = draw(st.integers(0, order))
    seed = draw(st.integers(0, 1000))
    gaps = draw(st.lists(st.integers(1, 9), min_size=order + 1, max_size=order + 4))
    ahead = draw(st.integers(1, 9))
    coefficients = torch.randn(
        degree + 1, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    positions = torch.tensor(gaps).cumsum(0).tolist()
    return order, coefficients, positions, positions[-1] + ahead


@settings(max_examples=150)
@given(polynomials())
def test_newton_is_exact_for_polynomials_up_to_its_order(case):
    order, coefficients, positions, at = case
    newton = newton_of(order)
    for position in positions:
        newton.update(position, polynomial(coefficients, position))
    expected = polynomial(coefficients, at)
    assert torch.allclose(newton.predict(at), expected, rtol=1e-7, atol=1e-6)


@settings(max_examples=50)
@given(polynomials())
def test_newton_is_wrong_above_its_order(case):
    """The law above can fail: one degree more is not met."""
    order, _, positions, at = case
    newton = newton_of(order)
    for position in positions:
        newton.update(position, torch.tensor([float(position) ** (order + 1)]))
    assert abs(newton.predict(at) - float(at) ** (order + 1)) > 0.5


@pytest.mark.parametrize("order", [1, 2, 3])
def test_newton_with_few_nodes_is_of_the_degree_that_they_allow(order):
    newton = newton_of(order)
    newton.update(3, torch.tensor([5.0]))
    assert newton.predict(9).item() == 5.0
    newton.update(4, torch.tensor([7.0]))
    assert newton.predict(6).item() == 11.0


def test_newton_forgets_what_is_older_than_its_order():
    newton, fresh = newton_of(1), newton_of(1)
    newton.update(0, torch.tensor([1000.0]))
    for predictor in (newton, fresh):
        predictor.update(5, torch.tensor([1.0]))
        predictor.update(7, torch.tensor([2.0]))
    assert torch.equal(newton.predict(9), fresh.predict(9))


def test_reuse_is_the_last_value():
    reuse = Forecast("reuse").make()
    reuse.update(0, torch.tensor([1.0]))
    reuse.update(3, torch.tensor([2.0]))
    assert reuse.predict(7).item() == 2.0


@pytest.mark.parametrize("build", MAKES.values(), ids=MAKES)
def test_no_tensor_is_shared(build):
    predictor = build()
    given_ = [torch.full((3,), float(k)) for k in range(4)]
    for position, value in enumerate(given_):
        predictor.update(position, value)
    expected = predictor.predict(6)
    for value in given_:
        value.fill_(99.0)
    predictor.predict(6).fill_(-99.0)
    assert torch.equal(predictor.predict(6), expected)


@pytest.mark.parametrize("build", MAKES.values(), ids=MAKES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_dtype_stays(build, dtype):
    predictor = build()
    for position in range(3):
        predictor.update(position, torch.ones(2, dtype=dtype))
    assert predictor.predict(5).dtype == dtype
    assert torch.equal(predictor.predict(5), torch.ones(2, dtype=dtype))


@given(st.floats(0, 0.99), st.integers(1, 9))
def test_damping_leaves_out_its_share_of_the_change(damping, ahead):
    plain, damped = newton_of(1), newton_of(1, damping)
    for position, value in ((0.0, 1.0), (1.0, 3.0)):
        plain.update(position, torch.tensor([value]))
        damped.update(position, torch.tensor([value]))
    change = plain.predict(1.0 + ahead) - 3.0
    assert torch.allclose(damped.predict(1.0 + ahead), 3.0 + (1 - damping) * change)


def test_a_second_value_at_the_newest_position_replaces_it():
    newton = newton_of(1)
    for position, value in ((0.0, 1.0), (1.0, 9.0), (1.0, 3.0)):
        newton.update(position, torch.tensor([value]))
    assert newton.predict(2.0).item() == pytest.approx(5.0)


# The other families: what each is exact for, and the closed forms of their papers.


@given(st.integers(1, 3), st.integers(1, 7), st.integers(1, 9), st.floats(-3, 3), st.floats(-3, 3))
def test_taylor_is_exact_for_lines(order, gap, ahead, slope, offset):
    nodes = [gap * k for k in range(order + 2)]
    taylor = taught(Forecast("taylor", order).make(), {t: slope * t + offset for t in nodes})
    at = nodes[-1] + ahead
    assert taylor.predict(at).item() == pytest.approx(slope * at + offset, abs=1e-6)


def test_a_taylor_sum_misses_a_parabola_that_newton_meets():
    parabola = {t: t * t for t in (0, 4, 8, 12)}
    assert taught(Forecast("taylor", 2).make(), parabola).predict(15).item() == pytest.approx(213)
    assert taught(newton_of(2), parabola).predict(15).item() == pytest.approx(225)


@given(st.lists(st.floats(-5, 5), min_size=4, max_size=7), st.integers(1, 6), st.integers(1, 9))
def test_taylor_follows_the_recursion_of_the_paper_over_even_gaps(values, gap, ahead):
    """D_{j+1} = (D_j − D_j of the compute before) / gap."""
    before = []
    for value in values:
        row = [value]
        for old in before[:2]:
            row.append((row[-1] - old) / gap)
        before = row
    expected = sum(d * ahead**j / math.factorial(j) for j, d in enumerate(before))
    nodes = {gap * k: value for k, value in enumerate(values)}
    found = taught(Forecast("taylor", 2).make(), nodes).predict(gap * (len(values) - 1) + ahead)
    assert found.item() == pytest.approx(expected, abs=1e-9)


@st.composite
def uneven(draw):
    """Computed steps with any gaps, newest first, and steps ahead of the newest."""
    gaps = draw(st.lists(st.integers(1, 9), min_size=4, max_size=6))
    return [sum(gaps[:k]) for k in range(len(gaps), 0, -1)], draw(st.integers(1, 9))


@given(uneven(), st.integers(1, 3), st.integers(0, 1000))
def test_over_uneven_gaps_the_differences_are_divided_ones(case, order, seed):
    """f[t_0, …, t_j] = Σ_i f(t_i) / Π_{m≠i} (t_i − t_m), for both series."""
    nodes, ahead = case
    numbers = torch.randn(len(nodes), generator=torch.Generator().manual_seed(seed)).tolist()
    values = dict(zip(reversed(nodes), reversed(numbers), strict=True))
    bases = {
        "taylor": lambda j: ahead**j,
        "hicache": lambda j: 0.5**j * [1, x := 2 * 0.5 * ahead, x**2 - 2, x**3 - 6 * x][j],
    }
    for kind, basis in bases.items():
        expected = 0.0
        for j in range(order + 1):
            newest = nodes[: j + 1]
            for here in newest:
                others = math.prod(here - node for node in newest if node != here)
                expected += basis(j) * values[here] / others
        found = taught(Forecast(kind, order, scale=0.5).make(), values).predict(nodes[0] + ahead)
        assert found.item() == pytest.approx(expected, rel=1e-6, abs=1e-6)


@given(uneven(), st.integers(1, 2), st.sampled_from(["taylor", "hicache"]), st.integers(0, 1000))
def test_no_order_grows_from_uneven_gaps(case, degree, kind, seed):
    """Of a polynomial the differences above its degree vanish, and its own is its derivative."""
    nodes, ahead = case
    generator = torch.Generator().manual_seed(seed)
    *lower, top = torch.randn(degree + 1, generator=generator, dtype=torch.float64).tolist()
    values = {
        t: sum(c * t**k for k, c in enumerate(lower)) + top * t**degree for t in reversed(nodes)
    }

    def at(order):
        return taught(Forecast(kind, order).make(), values).predict(nodes[0] + ahead).item()

    for higher in range(degree + 1, 4):
        assert at(higher) == pytest.approx(at(degree), rel=1e-6, abs=1e-5)
    x = ahead  # 2σk at σ = 0.5
    basis = ahead**degree if kind == "taylor" else 0.5**degree * (x if degree == 1 else x**2 - 2)
    before = values[nodes[0]] if degree == 1 else at(degree - 1)
    assert at(degree) - before == pytest.approx(top * basis, rel=1e-6, abs=1e-5)


@given(st.integers(1, 5), st.integers(1, 9), st.floats(0.1, 1.0))
def test_the_slope_of_hicache_counts_twice_the_square_of_its_scale(gap, ahead, scale):
    line = {0: 0.0, gap: float(gap)}
    found = taught(Forecast("hicache", 1, scale=scale).make(), line).predict(gap + ahead).item()
    assert found == pytest.approx(gap + 2 * scale**2 * ahead)


def test_hicache_of_degree_two_adds_the_second_hermite_polynomial():
    values, scale, k = {0: 1.0, 1: 2.0, 2: 5.0}, 0.5, 3
    x = scale * k
    expected = 5.0 + 3.0 * scale * 2 * x + 2.0 / 2 * scale**2 * (4 * x**2 - 2)
    found = taught(Forecast("hicache", 2, scale=scale).make(), values).predict(2 + k).item()
    assert found == pytest.approx(expected)


def test_foca_mixes_the_last_full_difference_with_the_latest():
    foca = taught(Forecast("foca").make(), {0: 1.0, 4: 3.0})
    first = 3.0 + 1 / 2 * (2.0 + 2.0)
    second = 3.0 + 2 / 2 * (2.0 + (first - 3.0))
    assert foca.predict(5).item() == pytest.approx(first)
    assert foca.predict(6).item() == pytest.approx(second)
    assert foca.predict(6).item() == pytest.approx(second), "asking twice changes nothing"
    foca.predict(7)
    third = foca.predict(7).item()
    assert foca.predict(8).item() == pytest.approx(3.0 + 9 / 4 / 2 * (2.0 + (third - second)))


@settings(max_examples=50)
@given(st.lists(st.floats(0.5, 1.1), min_size=1, max_size=2, unique=True), st.integers(1, 4))
def test_dmd_is_exact_for_sums_of_exponentials(roots, ahead):
    amplitudes = torch.randn(7, len(roots), dtype=torch.float64)
    gap, dmd = 2, DMD()

    def value(position):
        return amplitudes @ torch.tensor([r ** (position / gap) for r in roots]).double()

    for k in range(DMD.LENGTH):
        dmd.update(gap * k, value(gap * k))
    at = gap * (DMD.LENGTH - 1) + ahead
    close_roots = len(roots) == 2 and abs(roots[0] - roots[1]) < 0.05
    tolerance = 0.05 if close_roots else 2e-3
    assert torch.allclose(dmd.predict(at), value(at), rtol=tolerance, atol=tolerance)


@given(st.integers(1, 3), st.integers(1, 9))
def test_dmd_answers_a_line_until_it_has_four_even_values(count, ahead):
    values = {t: 2.0 * t + 1.0 for t in range(count)}
    expected = 2.0 * (count - 1 + ahead) + 1.0 if count > 1 else 1.0
    assert taught(DMD(), values).predict(count - 1 + ahead).item() == pytest.approx(expected)


def stored(predictor):
    """The tensors that a predictor keeps."""
    histories = [one for one in vars(predictor).values() if isinstance(one, History)]
    return [value for history in histories for _, value in history._nodes]


@pytest.mark.parametrize("kind", ["reuse", "newton", "taylor", "hicache", "foca", "dmd"])
def test_what_is_kept_on_the_cpu_lies_there_and_comes_back(kind):
    """On tensors of a device that need not be here: they have all but values."""
    with FakeTensorMode():
        predictor = Forecast(kind, 2, keep="cpu").make()
        for position in range(3):
            predictor.update(position, torch.ones(4, device="cuda"))
        assert {value.device.type for value in stored(predictor)} == {"cpu"}
        assert predictor.predict(4).device.type == "cuda"
        native = Forecast(kind, 2).make()
        native.update(0, torch.ones(4, device="cuda"))
        assert {value.device.type for value in stored(native)} == {"cuda"}


@pytest.mark.parametrize("keep", ["bfloat16", "cpu"])
def test_solver_coupled_caches_keep_nodes_and_outputs_so(keep):
    """What SADA and ZEUS fill in from; SADA's slopes stay as they are."""
    with FakeTensorMode():
        nodes = CleanNodes(1, 2, keep)
        pattern = Pattern(cache.ZEUS(keep=keep), None)
        for clear in (False, True):
            if clear:
                nodes.clear()
                pattern.forget()
            nodes.learn(SimpleNamespace(index=1, time=0.5), torch.ones(3, device="cuda"))
            pattern._outputs.add(0.0, torch.ones(3, device="cuda"))
            for holder in (nodes, pattern):
                (value,) = stored(holder)
                assert value.dtype == (torch.bfloat16 if keep == "bfloat16" else torch.float32)
                assert value.device.type == ("cpu" if keep == "cpu" else "cuda")
        assert pattern._outputs.value(0).device.type == "cuda"


@pytest.mark.parametrize("kind", ["reuse", "newton", "taylor", "hicache", "foca", "dmd"])
def test_bytes_are_those_of_the_values_kept_and_halve_in_bfloat16(kind):
    sizes = {}
    for keep in ("native", "bfloat16"):
        forecast = Forecast(kind, 2, keep=keep)
        predictor = forecast.make()
        for position in range(8):
            predictor.update(position, torch.ones(10))
        predictor.predict(8)
        sizes[keep] = predictor.bytes
    assert sizes["native"] == 40 * forecast.depth
    assert sizes["bfloat16"] == sizes["native"] / 2
    assert predictor.predict(9).dtype == torch.float32
