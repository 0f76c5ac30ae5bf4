"""Predictors: exact where theory says so, and nobody else's tensors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accel.cache.predictors import Forecast, Newton, Reuse

MAKES = {"reuse": Forecast("reuse").make} | {
    f"newton{order}": Forecast("newton", order).make for order in (1, 2, 3)
}


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


@settings(max_examples=150, deadline=None)
@given(polynomials())
def test_newton_is_exact_for_polynomials_up_to_its_order(case):
    order, coefficients, positions, at = case
    newton = Newton(order)
    for position in positions:
        newton.update(position, polynomial(coefficients, position))
    expected = polynomial(coefficients, at)
    assert torch.allclose(newton.predict(at), expected, rtol=1e-7, atol=1e-6)


@settings(max_examples=50, deadline=None)
@given(polynomials())
def test_newton_is_wrong_above_its_order(case):
    """The law above can fail: one degree more is not met."""
    order, _, positions, at = case
    newton = Newton(order)
    for position in positions:
        newton.update(position, torch.tensor([float(position) ** (order + 1)]))
    assert abs(newton.predict(at) - float(at) ** (order + 1)) > 0.5


@pytest.mark.parametrize("order", [1, 2, 3])
def test_newton_with_few_nodes_is_of_the_degree_that_they_allow(order):
    newton = Newton(order)
    newton.update(3, torch.tensor([5.0]))
    assert newton.predict(9).item() == 5.0
    newton.update(4, torch.tensor([7.0]))
    assert newton.predict(6).item() == 11.0


def test_newton_forgets_what_is_older_than_its_order():
    newton, fresh = Newton(1), Newton(1)
    newton.update(0, torch.tensor([1000.0]))
    for predictor in (newton, fresh):
        predictor.update(5, torch.tensor([1.0]))
        predictor.update(7, torch.tensor([2.0]))
    assert torch.equal(newton.predict(9), fresh.predict(9))


def test_reuse_is_the_last_value():
    reuse = Reuse()
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
    plain, damped = Newton(1), Newton(1, damping)
    for position, value in ((0.0, 1.0), (1.0, 3.0)):
        plain.update(position, torch.tensor([value]))
        damped.update(position, torch.tensor([value]))
    change = plain.predict(1.0 + ahead) - 3.0
    assert torch.allclose(damped.predict(1.0 + ahead), 3.0 + (1 - damping) * change)


def test_a_second_value_at_the_newest_position_replaces_it():
    newton = Newton(1)
    for position, value in ((0.0, 1.0), (1.0, 9.0), (1.0, 3.0)):
        newton.update(position, torch.tensor([value]))
    assert newton.predict(2.0).item() == pytest.approx(5.0)
