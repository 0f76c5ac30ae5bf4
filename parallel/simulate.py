"""How long each way of sharing the work takes on a cluster, and what memory: a model of costs.

A call takes what its operations take on one device, plus a while for each operator that is run,
plus what is sent and waited for. What is sent for the next step costs nothing as long as it takes
no longer than the operations. Sending takes a latency for each message, and bytes over bandwidth.
No device is slower than another, nobody else uses the links, and what a device copies in its own
memory is free: of real clusters it says what is possible. A process and a link can be measured
(`accel explain --devices N`), and clusters described (`parallel.clusters`).

Memory is what a process holds of the pipeline's weights, of what a call makes, and of what a method
keeps for the next step.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from accel.errors import BadInput
from parallel.asyncdiff import AsyncDiff
from parallel.bands import Bands
from parallel.clusters import Cluster, Traffic
from parallel.components import cut
from parallel.distrifusion import DistriFusion
from parallel.mail import LIMIT
from parallel.pcpp import PCPP
from parallel.pipefusion import PipeFusion
from parallel.work import Work

ALONE = "one device"

CFG, VAE = "parallel.CFG", "parallel.VAE"

NEARLY = 1e-9
"""Of a token: what a share of whole numbers is off by."""


@dataclass(frozen=True)
class Prediction:
    """What one way of sharing the work takes.

    Attributes:
        method: Its name.
        seconds: Of one picture.
        faster: Than one device.
        bytes: That a process sends for it, at most.
        memory: Bytes that a process holds, at most.
        kept: Those of them that are kept from step to step.
        reason: Why it does not serve; empty if it does.
    """

    method: str
    seconds: float
    faster: float = 0.0
    bytes: float = 0.0
    memory: float = 0.0
    kept: float = 0.0
    reason: str = ""


@dataclass(frozen=True)
class Cost:
    """A step, in the busiest of several processes.

    Attributes:
        operations: That it makes.
        launches: Operators that it runs.
        waited: What it sends, and waits for.
        hidden: What is under way while it computes.
        sent: Bytes that it sends.
        weights: Bytes of the networks' that it holds.
        activations: Bytes that a call makes and holds at the most.
        kept: Bytes that are kept for the next step.
    """

    operations: float
    launches: float
    waited: tuple[Traffic, ...] = ()
    hidden: tuple[Traffic, ...] = ()
    sent: float = 0.0
    weights: float = 0.0
    activations: float = 0.0
    kept: float = 0.0


class Unfit(Exception):
    """A way of sharing that does not serve; the message says why."""


def alone(work: Work) -> Cost:
    """Everything in one process."""
    return Cost(work.operations, work.launches, weights=work.weights, activations=work.activations)


def cfg(work: Work, devices: int) -> Cost:
    """A branch each; one exchange of the answer."""
    if work.branches != 2:
        raise Unfit(f"it takes two guidance branches, and there is {work.branches}")
    if devices != 2:
        raise Unfit("it takes two devices; with more, beside another method")
    sent = work.output / 2
    return replace(alone(work.branch()), waited=(Traffic(sent, 1, 2),), sent=sent)


def bands(work: Work, devices: int, fraction: float | None, stale: bool) -> Cost:
    """A band of rows each; ``fraction``: of a band that neighbours see, ``None``: all of it."""
    if not work.rows:
        raise Unfit("it is no UNet over pictures")
    try:
        found = Bands.of(work.rows, 1, work.unit, devices)
    except BadInput:
        raise Unfit(f"a latent of {work.rows} rows has no band for each") from None
    lengths = found.lengths(1)
    largest, others = max(lengths) / work.rows, devices - 1
    neighbours = min(2, others)
    borders, moments, tokens = sum(work.borders), sum(work.moments), largest * work.tokens
    if fraction is not None:
        smallest = fraction * min(lengths) / work.rows
        tokens = sum(
            max(1, int(smallest * one.length + NEARLY)) * one.bytes / one.length
            for one in work.attentions
        )
    seen = 1.0 if fraction is None else min(1.0, largest * (1 + neighbours * fraction))
    beside, to_all = borders, moments
    layers, gathers = len(work.borders), len(work.moments)
    if fraction is None:
        to_all, gathers = to_all + tokens, gathers + len(work.attentions)
    else:
        beside, layers = beside + tokens, layers + len(work.attentions)
    if stale:  # letters of many layers go together
        layers, gathers = -(-int(beside) // LIMIT), -(-int(to_all) // LIMIT)
    inner = (
        Traffic(neighbours * beside, layers, 2),
        Traffic(others * to_all, others * gathers, devices),
    )
    answer = Traffic(others * largest * work.output, others, devices)
    kept = 2 * neighbours * beside + 2 * (devices + 1) * to_all  # one is read, one filled
    gathered = max((one.bytes for one in work.attentions), default=0.0)
    return Cost(
        largest * (work.operations - (1 - seen) * work.attention),
        work.launches,
        waited=(answer,) if stale else (*inner, answer),
        hidden=inner if stale else (),
        sent=sum(one.bytes for one in inner) + answer.bytes,
        weights=work.weights,
        activations=largest * work.activations + (0.0 if stale else gathered),
        kept=kept if stale else 0.0,
    )


def components(work: Work, devices: int) -> Cost:
    """A part of the network each, on what is a step old."""
    ends = _cut(work, devices)
    parts = [work.units[a:b] for a, b in itertools.pairwise((0, *ends))]
    own = [sum(unit.operations for unit in part) for part in parts]
    launched = [sum(unit.launches for unit in part) for part in parts]
    answers = [sum(unit.answer for unit in (part if work.whole else part[-1:])) for part in parts]
    sent = (devices - 1) * max(answers)
    heard = Traffic((devices - 1) / devices * sum(answers), work.calls * (devices - 1), devices)
    return Cost(
        max(own) + work.operations - sum(own),
        max(launched) + work.launches - sum(launched),
        waited=(heard,),
        sent=sent,
        weights=work.weights,
        activations=work.activations,
        kept=sum(answers),
    )


def tokens(work: Work, devices: int, ulysses: int) -> Cost:
    """A part of the tokens each: exchanged for heads, or keys and values go round, or both."""
    if not work.sequence or not work.attentions:
        raise Unfit("it is not known where its tokens could be shared out")
    ring = devices // ulysses
    left = [one.heads % ulysses / one.heads for one in work.attentions]  # whose keys go to all
    gathered = sum(share * one.bytes for share, one in zip(left, work.attentions, strict=True))
    whole = sum(one.bytes for one in work.attentions)
    swapped = 2 * (whole - gathered) / ulysses  # q, k, v there, the answer back
    swapped = (swapped + gathered) / devices * (ulysses - 1)
    messages = sum(2 * (share < 1) + (share > 0) for share in left) * (ulysses - 1)
    round_ = (whole + (ulysses - 1) * gathered) / devices * (ring - 1)
    answer = Traffic((devices - 1) * work.output / devices, ulysses + ring - 2, devices)
    waited = [Traffic(swapped, messages, ulysses)] if ulysses > 1 else []
    rounds = sum((share < 1) + (share > 0) for share in left) * (ring - 1)
    hidden = (Traffic(round_, rounds, 2, ulysses),) if ring > 1 else ()
    return Cost(
        work.operations / devices,
        work.launches,
        waited=(*waited, answer),
        hidden=hidden,
        sent=swapped + round_ + answer.bytes,
        weights=work.weights,
        activations=work.activations / devices,
    )


def stages(work: Work, devices: int, patches: int, split: bool) -> Cost:
    """Consecutive blocks each, through which patches flow."""
    if work.whole or not work.sequence:
        raise Unfit("it is not known where its tokens could be shared out")
    ends = _cut(work, devices)
    parts = [work.units[a:b] for a, b in itertools.pairwise((0, *ends))]
    turns = patches + devices - 1
    busiest = max(sum(unit.operations for unit in part) for part in parts)
    inside = sum(unit.operations for unit in work.units)
    passed = max((part[-1].answer for part in parts[:-1]), default=0.0)
    to_all = (devices - 1) * work.output
    share = busiest / inside
    own = max(sum(unit.weights for unit in part) for part in parts)
    away = sum(unit.weights for unit in work.units) - own if split else 0.0
    launches = max(sum(unit.launches for unit in part) for part in parts)
    between = work.launches - sum(unit.launches for unit in work.units)
    return Cost(
        busiest * turns / patches + work.operations - inside,
        (launches * turns / patches + between) * patches,
        waited=(
            Traffic((devices - 1) / patches * passed, work.calls * (devices - 1), 2),
            Traffic(to_all, work.calls * (devices - 1), devices),
        ),
        hidden=(Traffic(passed, work.calls * patches, 2),),
        sent=max(passed, to_all),
        weights=work.weights - away,
        activations=work.activations,
        kept=share * work.tokens,
    )


def _cut(work: Work, devices: int) -> tuple[int, ...]:
    if len(work.units) < devices:
        raise Unfit(f"the network has {len(work.units)} blocks that could be shared out")
    return cut([unit.operations for unit in work.units], devices)


Step = Callable[[Work, int], Cost]
"""What a step costs on so many devices."""


@dataclass(frozen=True)
class Way:
    """How work is shared out.

    Attributes:
        step: What a step costs.
        begin: Steps at the beginning that cost something else: so many of each kind.
    """

    step: Step
    begin: tuple[tuple[int, Step], ...] = ()

    def costs(self, work: Work, devices: int, steps: int) -> list[tuple[int, Cost]]:
        """What the steps of a picture cost: so many of each kind."""
        found, left = [], steps
        for count, step in (*self.begin, (steps, self.step)):
            if taken := min(left, count):
                found.append((taken, step(work, devices)))
                left -= taken
        return found

    def beside_cfg(self) -> Way:
        """The same for each of two guidance branches, in half of the processes each."""
        (count, first), *rest = (*self.begin, (1, self.step))
        kinds = [(1, partial(_both_begun, first)), (count - 1, partial(_both, first))]
        kinds += [(count, partial(_both, step)) for count, step in rest[:-1]]
        return Way(partial(_both, self.step), tuple(kinds))


def _components_begun(work: Work, devices: int) -> Cost:
    """Every process computes everything, keeps what the next step asks for, and one tells all."""
    told = (devices - 1) * work.output
    return replace(
        alone(work),
        kept=components(work, devices).kept,
        waited=(Traffic(told, work.calls * (devices - 1), devices),),
        sent=told,
    )


def _cfg_begun(work: Work, devices: int) -> Cost:
    """The first step: where branches are called in turn, the second call is not foreseen yet."""
    shared = cfg(work, devices)
    if work.calls == 1:
        return shared
    return replace(alone(work), waited=shared.waited, sent=shared.sent)


def _both_begun(step: Step, work: Work, devices: int) -> Cost:
    """Likewise, where another method shares out each call."""
    shared, answer = _both(step, work, devices), cfg(work, 2)
    if work.calls == 1:
        return shared
    inner = step(work, devices // 2)
    return replace(inner, waited=(*inner.waited, *answer.waited), sent=inner.sent + answer.sent)


def _stages_begun(work: Work, devices: int) -> Cost:
    """The first call is computed in full everywhere, and the others flow."""
    whole, flowing, share = alone(work), stages(work, devices, 1, False), 1 / work.calls
    passed, to_all = flowing.waited
    return replace(
        flowing,
        operations=share * whole.operations + (1 - share) * flowing.operations,
        launches=share * whole.launches + (1 - share) * flowing.launches,
        waited=(replace(passed, bytes=(1 - share) * passed.bytes), to_all),
        sent=max((1 - share) * passed.bytes / (devices - 1), to_all.bytes),
    )


def _both(step: Step, work: Work, devices: int) -> Cost:
    if devices % 2 or devices < 4:
        raise Unfit("it takes an even number of devices, from four on")
    branch = cfg(work, 2)
    inner = step(work.branch(), devices // 2)
    [answer] = branch.waited
    answer = replace(answer, stride=devices // 2)
    return replace(inner, waited=(*inner.waited, answer), sent=inner.sent + branch.sent)


def _usp(work: Work, devices: int) -> Cost:
    if devices % 2 or devices < 4:
        raise Unfit("it takes an even number of devices, from four on")
    return tokens(work, devices, 2)


def _default(method: Any, name: str) -> Any:
    return method.model_fields[name].default


PATCHES: int = _default(PipeFusion, "patches")


def _stale_bands(method: Any, fraction: float | None) -> Way:
    def step(work: Work, devices: int) -> Cost:
        return bands(work, devices, fraction, True)

    def fresh(work: Work, devices: int) -> Cost:
        return replace(bands(work, devices, fraction, False), kept=step(work, devices).kept)

    return Way(step, ((1 + _default(method, "warmup"), fresh),))


def _stages(split: bool) -> Way:
    def step(work: Work, devices: int, patches: int = PATCHES) -> Cost:
        return stages(work, devices, patches, split)

    whole = partial(step, patches=1)
    return Way(step, ((1, _stages_begun), (_default(PipeFusion, "warmup"), whole)))


BANDS = {
    "parallel.DistriFusion (sync)": Way(lambda work, n: bands(work, n, None, False)),
    "parallel.DistriFusion": _stale_bands(DistriFusion, None),
    "parallel.PCPP": _stale_bands(PCPP, _default(PCPP, "fraction")),
}
PIPES = {
    "parallel.AsyncDiff": Way(
        components, ((1 + _default(AsyncDiff, "warmup"), _components_begun),)
    ),
    "parallel.PipeFusion": _stages(False),
    "parallel.PipeFusion (split)": _stages(True),
}
TOKENS = {
    "parallel.Ulysses": Way(lambda work, n: tokens(work, n, n)),
    "parallel.Ring": Way(lambda work, n: tokens(work, n, 1)),
    "parallel.USP": Way(_usp),
}
SHARED = BANDS | PIPES | TOKENS
WAYS: dict[str, Way] = {
    CFG: Way(cfg, ((1, _cfg_begun),)),
    **SHARED,
    **{f"{CFG} + {name}": way.beside_cfg() for name, way in SHARED.items()},
}
"""By method: those that stand alone, and all of them beside CFG."""


def predict(
    work: Work, cluster: Cluster, steps: int, decoding: Work | None = None
) -> list[Prediction]:
    """What every way of sharing takes, the fastest first; those that do not serve are last.

    Args:
        work: Of a step.
        cluster: Where.
        steps: Of a picture.
        decoding: Work of the decoder, which every process does in full, but for parallel.VAE.
    """
    decoder = decoding or Work()
    decoded = _step(cluster, alone(decoder))
    found = [_prediction(ALONE, work, cluster, [(steps, alone(work))], decoder, decoded)]
    for method, way in WAYS.items():
        try:
            costs = way.costs(work, cluster.devices, steps)
        except Unfit as reason:
            found.append(_unfit(method, reason))
        else:
            found.append(_prediction(method, work, cluster, costs, decoder, decoded))
    if decoding is not None:
        found.append(_decoded_together(work, cluster, steps, decoder))
    base = found[0].seconds
    found = [replace(one, faster=base / one.seconds) for one in found]
    return sorted(found, key=lambda one: one.seconds)


def _prediction(
    method: str,
    work: Work,
    cluster: Cluster,
    costs: list[tuple[int, Cost]],
    decoder: Work,
    decoded: float,
) -> Prediction:
    seconds = decoded + sum(count * _step(cluster, cost) for count, cost in costs)
    sent = sum(count * cost.sent for count, cost in costs)
    kept = max(cost.kept for _, cost in costs)
    activations = max(cost.activations for _, cost in costs)
    weights = costs[-1][1].weights
    memory = weights + work.beside + kept + max(activations, decoder.activations)
    return Prediction(method, seconds, 1.0, sent, memory, kept)


def _decoded_together(work: Work, cluster: Cluster, steps: int, decoder: Work) -> Prediction:
    try:
        shared = bands(decoder, cluster.devices, None, stale=False)
    except Unfit:
        return _unfit(VAE, Unfit("the decoder is none of pictures, or has too few rows"))
    seconds = _step(cluster, shared)
    costs = [(steps, alone(work))]
    found = _prediction(VAE, work, cluster, costs, replace(decoder, activations=0.0), seconds)
    spare = max(0.0, shared.activations - work.activations)
    return replace(found, bytes=shared.sent, memory=found.memory + spare)


def _unfit(method: str, reason: Unfit) -> Prediction:
    return Prediction(method, math.inf, reason=str(reason))


def _step(cluster: Cluster, cost: Cost) -> float:
    computed = cost.operations / cluster.operations
    hidden = sum(map(cluster.seconds, cost.hidden))
    waited = sum(map(cluster.seconds, cost.waited))
    return cluster.fixed * cost.launches + max(computed, hidden) + waited
