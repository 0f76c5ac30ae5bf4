"""Searches of schedules, as theorems: costs, optima, and what each must never do."""

import math
from functools import cache
from itertools import combinations, pairwise

import numpy as np
import pytest
import toy
from hypothesis import given, settings
from hypothesis import strategies as st

from accel.errors import BadInput
from samplers.dpmsolverpp import update
from samplers.prediction import Level, flow_level, vp_level
from samplers.schedules import aligned, ramps
from samplers.schedules.evolution import Evolution, Search
from samplers.schedules.gits import Chord, jump_costs, straight
from samplers.schedules.oss import median_schedule, student_schedule
from samplers.schedules.shortest import path_cost, shortest

matrices = st.integers(2, 7).flatmap(
    lambda n: st.lists(
        st.floats(0.0, 10.0, width=32), min_size=(n + 1) ** 2, max_size=(n + 1) ** 2
    ).map(lambda values: np.array(values).reshape(n + 1, n + 1))
)


def subsets(last, count):
    """Every path of ``count`` jumps from 0 to ``last``."""
    for inner in combinations(range(1, last), count - 1):
        yield np.array([0, *inner, last])


def uniform(last, count):
    return np.linspace(0, last, count + 1).round().astype(int)


# The shortest path.


@given(matrices, st.data(), st.sampled_from([1.0, 1.15, 0.8]))
def test_the_path_is_the_best_of_all(cost, data, gamma):
    last = len(cost) - 1
    count = data.draw(st.integers(1, last))
    nodes = shortest(cost, count, gamma)
    best = min(path_cost(cost, other, gamma) for other in subsets(last, count))
    assert path_cost(cost, nodes, gamma) == pytest.approx(best)
    assert path_cost(cost, nodes, gamma) <= path_cost(cost, uniform(last, count), gamma) + 1e-12
    assert (np.diff(nodes) > 0).all()
    assert (nodes[0], nodes[-1], len(nodes)) == (0, last, count + 1)


def test_as_many_steps_as_the_grid_are_the_grid():
    cost = np.random.default_rng(0).random((9, 9))
    assert shortest(cost, 8).tolist() == list(range(9))
    assert shortest(cost, 1).tolist() == [0, 8]


def test_a_path_that_is_not_allowed_is_not_taken():
    cost = np.zeros((6, 6))
    cost[:-2, -1] = np.inf
    assert shortest(cost, 3)[-2:].tolist() == [4, 5]
    with pytest.raises(BadInput, match="No schedule of 1 steps"):
        shortest(cost, 1)
    for count in (0, 6):
        with pytest.raises(BadInput, match="from a grid of 5"):
            shortest(cost, count)


# GITS.


@cache
def teacher(process="vp", nodes=60):
    """Exact states of the mixture on a polynomial grid, and the x0-predictions there."""
    level = toy.PROCESSES[process]
    grid = -np.log(ramps.polynomial(nodes + 1, math.exp(-toy.START), math.exp(-toy.END)))

    def slope(lam, y):
        return math.exp(lam) * toy.mixture_data(level(lam).sigma * y, level(lam))

    y, states = np.linspace(-3, 3, 64) / level(grid[0]).sigma, []
    for a, b in zip(grid, [*grid[1:], grid[-1]], strict=True):
        states.append(level(a).sigma * y)
        h = (b - a) / 20
        for lam in a + h * np.arange(20):
            k1 = slope(lam, y)
            k2 = slope(lam + h / 2, y + h / 2 * k1)
            k3 = slope(lam + h / 2, y + h / 2 * k2)
            k4 = slope(lam + h, y + h * k3)
            y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    levels = [level(lam) for lam in grid]
    states = np.stack(states)
    data = np.stack([toy.mixture_data(x, at) for x, at in zip(states[:-1], levels, strict=False)])
    return grid, levels, states, data


def two_m(process, lams, x):
    """DPM-Solver++ 2M with its ordinary start."""
    levels = [toy.PROCESSES[process](lam) for lam in lams]
    history = []
    for i in range(len(levels) - 1):
        history.insert(0, toy.mixture_data(x, levels[i]))
        nodes = levels[max(i - 1, 0) : i + 1][::-1]
        x = toy.take(update(levels[i + 1], nodes), x, history)
    return x


@cache
def costs(process, metric="l2", scale="ratio"):
    _, levels, states, data = teacher(process)
    each = [
        jump_costs(levels, states[:, k : k + 1], data[:, k : k + 1], metric, scale)
        for k in range(states.shape[1])
    ]
    return np.mean(each, 0)


@pytest.mark.parametrize(
    ("process", "count"),
    [*(("vp", count) for count in range(5, 11)), *(("flow", count) for count in range(5, 10))],
)
def test_gits_beats_even_steps_on_the_mixture(process, count):
    """At ten steps on the flow even λ are 6 % better; so they are from other starts of the VP."""
    grid, _, states, _ = teacher(process)
    chosen = grid[shortest(costs(process), count, 1.15)]
    even = np.linspace(grid[0], grid[-1], count + 1)
    errors = [
        np.sqrt(np.mean((two_m(process, lams, states[0]) - states[-1]) ** 2))
        for lams in (chosen, even)
    ]
    assert errors[0] < errors[1]


def test_a_straight_trajectory_costs_nothing():
    levels = [flow_level(s) for s in (1.0, 0.7, 0.4, 0.1, 0.0)]
    data, noise = np.random.default_rng(0).standard_normal((2, 5))
    states = np.stack([level.alpha * data + level.sigma * noise for level in levels])
    for metric in ("l2", "dev"):
        for scale in ("ratio", "sample"):
            cost = jump_costs(levels, states, np.tile(data, (4, 1)), metric, scale)
            assert np.abs(np.triu(cost)).max() < 1e-12


def test_the_step_of_first_order_is_ddim_and_euler():
    rng = np.random.default_rng(1)
    x, noise = rng.standard_normal((2, 4))
    here, there = vp_level(3.0), vp_level(1.2)
    data = (x - here.sigma * noise) / here.alpha
    (ddim,) = straight(x, data, here, [there])
    assert ddim == pytest.approx(there.alpha * data + there.sigma * noise)
    here, there = flow_level(0.8), flow_level(0.3)
    velocity = (x - data) / here.sigma
    (euler,) = straight(x, data, here, [there])
    assert euler == pytest.approx(x + (0.3 - 0.8) * velocity)


def test_the_distance_to_a_chord():
    states = np.array([[4.0, 0.0], [9.0, 9.0], [0.0, 0.0]])
    points = np.array([[2.0, 3.0], [-1.0, 0.0]])
    for alphas in ([1.0, 1.0, 1.0], [0.0, 0.5, 1.0]):
        assert Chord(states, np.array(alphas)).distances(points) == pytest.approx([3.0, 0.0])


def test_a_start_at_pure_noise_has_a_finite_cost():
    levels = [flow_level(s) for s in (1.0, 0.6, 0.2, 0.0)]
    rng = np.random.default_rng(2)
    cost = jump_costs(levels, rng.standard_normal((4, 3)), rng.standard_normal((3, 3)), "dev")
    assert np.isfinite(cost).all()


# Align Your Steps.


@given(st.lists(st.floats(0.01, 100.0), min_size=2, max_size=8, unique=True))
def test_a_noising_is_one_brownian_path(values):
    """The map from fresh noise to the path is linear: its covariance is min(σ_i², σ_j²)."""
    levels = np.array(sorted(values, reverse=True))
    path = aligned.brownian(levels, np.eye(len(levels)))
    expected = np.minimum.outer(levels, levels) ** 2
    assert path @ path.T == pytest.approx(expected, rel=1e-6)


def test_a_noising_continues_from_a_given_start_or_from_infinity():
    noises = np.random.default_rng(0).standard_normal((3, 5))
    first = np.full(5, 7.0)
    led = aligned.brownian(np.array([10.0, 1.0, 0.5]), noises, first)
    assert led[0].tolist() == first.tolist()
    assert led[1] == pytest.approx(0.01 * 7.0 + math.sqrt(0.99) * noises[1])
    free = aligned.brownian(np.array([np.inf, 1.0, 0.5]), noises)
    assert np.isnan(free[0]).all()
    assert free[1] == pytest.approx(noises[1])


def test_step_costs_are_the_integral():
    """A denoiser that is linear in p = 1/σ² has ``½ ∫ (p − p_b)² dp = (p_a − p_b)³/6``."""
    p = np.linspace(0.0, 4.0, 401)
    with np.errstate(divide="ignore"):
        costs = aligned.step_costs(p**-0.5, p[:, None])
    for b, a in ((0, 400), (100, 300), (7, 8)):
        assert costs[b, a] == pytest.approx((p[a] - p[b]) ** 3 / 6, rel=1e-3, abs=1e-6)
    assert np.isfinite(costs).all()


@pytest.fixture(scope="module")
def noised():
    """The objective on data N(0, 1), whose denoiser is known: D = x/(1 + σ²)."""
    rng, levels = np.random.default_rng(0), np.geomspace(20.0, 0.05, 41)
    pictures = rng.standard_normal(400)
    path = pictures + aligned.brownian(levels, rng.standard_normal((41, 400)))
    return levels, aligned.step_costs(levels, path / (1.0 + levels**2)[:, None])


@pytest.mark.parametrize("count", [4, 8, 13])
def test_descent_improves_its_start_and_the_shortest_path_more(noised, count):
    """Descent stops at a local optimum, here up to 1.6 times the global one."""
    _, cost = noised
    start = uniform(40, count).tolist()
    found = aligned.descend(cost, start)
    best = path_cost(cost, shortest(cost, count))
    assert best <= path_cost(cost, found) < path_cost(cost, np.array(start))
    assert (found[0], found[-1], len(found)) == (0, 40, count + 1)
    assert (np.diff(found) > 0).all()


def test_descent_stops_where_nothing_moves(noised):
    _, cost = noised
    start = uniform(40, 6).tolist()
    assert aligned.descend(cost, start, iterations=0).tolist() == start
    assert aligned.descend(cost, [0, 40]).tolist() == [0, 40]
    settled = aligned.descend(cost, start, reach=40)
    assert aligned.descend(cost, settled.tolist()).tolist() == settled.tolist()
    with pytest.raises(BadInput, match="must ascend"):
        aligned.descend(cost, [0, 5, 5, 40])


def test_a_schedule_is_subdivided_to_twice_its_steps(noised):
    levels, _ = noised
    nodes = aligned.subdivided([0, 10, 24, 40], 6)
    assert nodes == [0, 5, 10, 17, 24, 32, 40]
    assert levels[5] == pytest.approx(math.sqrt(levels[0] * levels[10]))
    assert aligned.subdivided([0, 10, 24, 40], 4) == [0, 10, 24, 32, 40]  # the widest gap
    assert aligned.subdivided([0, 1, 2, 8], 6) == [0, 1, 2, 3, 5, 6, 8]  # no room in the first two


@given(st.integers(1, 30), st.data())
def test_a_finer_schedule_has_its_length_whatever_the_gaps(last, data):
    inner = data.draw(st.sets(st.integers(1, last - 1))) if last > 1 else set()
    nodes = sorted({0, last, *inner})
    jumps = data.draw(st.integers(len(nodes) - 1, last))
    found = aligned.subdivided(nodes, jumps)
    assert len(found) == jumps + 1 and set(nodes) <= set(found)
    assert found == sorted(set(found)) and found[-1] == last


def test_the_authors_search_descends_from_few_knots_to_many(noised, monkeypatch):
    """10 to 20, as theirs; and the finer start is nearer to the optimum than even steps are."""
    _, cost = noised
    whole, asked = aligned.descend, []

    def watched(cost, start):
        asked.append(len(start) - 1)
        return whole(cost, start)

    monkeypatch.setattr(aligned, "descend", watched)
    found = aligned.descend_finer(cost, 20)
    assert asked == [10, 20]
    coarse = whole(cost, uniform(40, 10).tolist()).tolist()
    start = path_cost(cost, np.array(aligned.subdivided(coarse, 20)))
    best = path_cost(cost, shortest(cost, 20))
    assert best <= path_cost(cost, found) <= start < path_cost(cost, uniform(40, 20))
    asked.clear()
    assert len(aligned.descend_finer(cost, 13)) == 14 and asked == [7, 13]
    with pytest.raises(BadInput, match="41 jumps do not fit"):
        aligned.descend_finer(cost, 41)


# OSS.


def student(levels, states, count, **options):
    """The schedule of one sample, and how often the network was asked."""
    asked = []

    def predict(given):
        asked.append(sorted(given))
        return {i: toy.mixture_data(x, levels[i]) for i, x in given.items()}

    return student_schedule(levels, states, predict, count, **options), asked


def end_of(levels, nodes, x):
    for here, there in pairwise(nodes):
        (x,) = straight(x, toy.mixture_data(x, levels[here]), levels[here], [levels[there]])
    return x


@pytest.mark.parametrize("process", toy.PROCESSES)
def test_a_student_starts_at_the_noisiest_node_and_ends_at_the_last(process):
    _, levels, states, _ = teacher(process, 24)
    for k in (3, 31, 60):
        for count in (1, 2, 5, 24):
            nodes, asked = student(levels, states[:, k : k + 1], count)
            assert (nodes[0], nodes[-1], len(nodes)) == (0, 24, count + 1)
            assert (np.diff(nodes) > 0).all()
            assert asked[0] == [0]
            assert len(asked) == count
            assert sum(map(len, asked)) <= count * 24
    assert nodes.tolist() == list(range(25))


def test_two_steps_are_the_best_two():
    _, levels, states, _ = teacher("vp", 24)
    for k in (5, 20, 50):
        own = states[:, k : k + 1]
        nodes, _ = student(levels, own, 2)
        errors = {
            middle: abs(end_of(levels, [0, middle, 24], own[0]) - own[-1]).item()
            for middle in range(1, 24)
        }
        assert errors[nodes[1]] == min(errors.values())


def test_students_do_better_than_even_steps():
    _, levels, states, _ = teacher("vp", 24)
    found = [student(levels, states[:, k : k + 1], 6)[0] for k in range(0, 64, 4)]
    nodes = median_schedule(np.stack(found))
    errors = [
        np.sqrt(np.mean((end_of(levels, n, states[0]) - states[-1]) ** 2))
        for n in (nodes, uniform(24, 6))
    ]
    assert errors[0] < errors[1]


def test_a_last_step_can_be_fixed():
    _, levels, states, _ = teacher("vp", 24)
    for count in (2, 3, 6, 24):
        nodes, _ = student(levels, states[:, :1], count, before_end=23)
        assert nodes[-2:].tolist() == [23, 24]
        assert (np.diff(nodes) > 0).all()
        assert len(nodes) == count + 1


def test_a_grid_that_is_too_short_is_refused():
    levels = [Level(1.0, s) for s in (1.0, 0.5, 0.0)]
    with pytest.raises(BadInput, match="from a grid of 2"):
        student_schedule(levels, np.zeros((3, 1)), lambda _: {}, 3)


@given(st.lists(st.sets(st.integers(1, 9), min_size=4, max_size=4), min_size=1, max_size=6))
def test_a_median_is_a_schedule(rows):
    nodes = median_schedule(np.array([[0, *sorted(row), 10] for row in rows]))
    assert (np.diff(nodes) > 0).all()
    assert (nodes[0], nodes[-1]) == (0, 10)


# AutoDiffusion.


@settings(max_examples=10)
@given(st.integers(1, 5), st.integers(6, 14), st.integers(0, 5), st.booleans())
def test_evolution_never_doubles_a_node_and_never_gets_worse(size, nodes, chance, ends):
    size = max(size, 2) if ends else size
    fixed = frozenset({0, nodes - 1} if ends else {0})
    goal = np.random.default_rng(chance).random(nodes)
    asked = []

    def fitness(gene):
        asked.append(gene)
        return float(sum(goal[list(gene)]))

    search = Search(
        size, nodes, fitness,
        Evolution(population=12, epochs=4, mutations=6, crossovers=4, parents=3, chance=0.4),
        np.random.default_rng(7), fixed,
    )  # fmt: skip
    seed = (0, *range(nodes - size + 1, nodes))
    best = search.run(seed)
    assert len(set(asked)) == len(asked)
    assert all(len(set(gene)) == size and list(gene) == sorted(gene) for gene in asked)
    assert all(fixed <= set(gene) and max(gene) < nodes for gene in asked)
    assert search.best == sorted(search.best, reverse=True)
    assert search.known[best] == min(search.known.values()) <= search.known[seed]


def test_evolution_finds_a_hidden_set():
    hidden = {0, 3, 11, 17, 26}
    search = Search(
        5, 30, lambda gene: -len(hidden & set(gene)), Evolution(), np.random.default_rng(0)
    )
    assert set(search.run((0, 7, 14, 21, 28))) == hidden
    assert len(search.known) <= 11 * 50


def test_evolution_repeats_itself_with_its_seed():
    runs = [
        Search(4, 20, lambda gene: float(sum(gene) % 7), Evolution(epochs=2), rng).run(
            (0, 5, 9, 14)
        )
        for rng in (np.random.default_rng(3), np.random.default_rng(3))
    ]
    assert runs[0] == runs[1]


def test_offspring_with_a_double_node_is_rejected():
    search = Search(3, 9, lambda _: 0.0, Evolution(chance=1.0), np.random.default_rng(0))
    made = [search.mutate((0, 4, 8)) for _ in range(200)]
    made += [search.cross((0, 2, 4), (0, 4, 5)) for _ in range(200)]
    assert None in made
    assert all(search.valid(gene) for gene in made if gene)


def test_a_first_gene_that_is_none_is_refused():
    search = Search(3, 9, lambda _: 0.0, Evolution(), np.random.default_rng(0))
    for gene in ((1, 2, 3), (0, 4, 4), (0, 4), (0, 4, 9)):
        with pytest.raises(BadInput, match="3 ascending nodes below 9"):
            search.run(gene)
