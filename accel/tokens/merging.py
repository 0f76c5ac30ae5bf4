"""Attention on merged tokens: merge what the layer is given, run it, unmerge what it answers.

A pattern is made from the content of a sample's leading row – ``cond`` where a call has one – and
all branches of the sample share it: guidance then compares answers that were merged alike. It is
kept for the second call of the same step, and for as many layers and steps as it is to serve.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from accel.errors import UnsupportedModel
from accel.seams.attention import Asked, Interception
from accel.seams.denoisers import Call, Result, Row
from accel.seams.layout import Layout
from accel.seams.memory import bytes_of
from accel.seams.rows import index_rows, scatter
from accel.seams.token_stream import with_bias
from accel.tokens.joint import beside_text
from accel.tokens.layers import Left, Run, Visit
from accel.tokens.reduction import Identity, Reduction

if TYPE_CHECKING:
    from accel.report import Tally
    from accel.trajectory import Step

LEADER = "cond"


@dataclass(frozen=True)
class Wanted:
    """What a pattern is made for.

    Attributes:
        step: The evaluation.
        denoiser: Name of the network.
        layout: The image tokens.
        layer: Number of the group of layers that share it.
        samples: Whose patterns are made, each with ``entries`` rows.
        entries: Rows of a sample: 1, or the frames of a UNet for video.
        device: Where the layers are.
    """

    step: Step
    denoiser: str
    layout: Layout
    layer: int
    samples: tuple[int, ...]
    entries: int
    device: torch.device

    def generator(self, seed: int) -> torch.Generator:
        """Draws for this step and layer; alike for all samples, branches and runs."""
        drawn = (seed * 1_000_003 + self.step.index) * 1_009 + self.layer
        return torch.Generator().manual_seed(drawn % 2**63)


class Reducer(Protocol):
    """Makes the patterns of one run."""

    @property
    def bytes(self) -> int:
        """Memory that it keeps between steps."""
        ...

    @property
    def note(self) -> str:
        """What is to be said of the run beside the tokens; empty for nothing."""
        ...

    def reset(self) -> None:
        """Forget the run before."""
        ...

    def state(self, wanted: Wanted) -> Hashable:
        """Of one sample: samples of different states are reduced apart."""
        ...

    def reduce(self, x: Tensor, wanted: Wanted) -> Reduction:
        """The reduction of image tokens ``x[samples · entries, N, C]``, a row for each of them."""
        ...

    def observe(self, call: Call, result: Result) -> None:
        """Look at what a network answered."""
        ...


class Stateless:
    """A reducer that keeps nothing: a function of content and step."""

    bytes = 0
    note = ""

    def __init__(self, reduce: Callable[[Tensor, Wanted], Reduction]) -> None:
        self.reduce = reduce

    def reset(self) -> None:
        """Nothing to forget."""

    def state(self, wanted: Wanted) -> None:
        """All samples are alike."""

    def observe(self, call: Call, result: Result) -> None:
        """Nothing to see."""


class Made(NamedTuple):
    """The pattern of one sample.

    Attributes:
        reduction: Of this sample and those it was made together with.
        place: Of the sample among them.
        step: When it was made.
        branch: From whose content.
    """

    reduction: Reduction
    place: int
    step: int
    branch: str


Make = Callable[[list[int]], Iterable[tuple[list[int], Reduction]]]
"""From samples to reductions, each of some of them."""


class Patterns:
    """Patterns by place in the network and sample.

    Args:
        steps: Steps that a pattern serves.
    """

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._kept: dict[Any, dict[int, Made]] = {}

    @property
    def bytes(self) -> int:
        """Memory of all patterns."""
        made = (pattern for kept in self._kept.values() for pattern in kept.values())
        found = {id(pattern.reduction): pattern.reduction for pattern in made}
        return bytes_of(found)

    def reset(self) -> None:
        """Forget them."""
        self._kept.clear()

    def of(self, key: Any, step: int, leaders: dict[int, str], make: Make) -> dict[int, Made]:
        """The patterns of some samples; those that are too old are made anew.

        Args:
            key: The place in the network.
            step: Index of the step.
            leaders: By sample, the branch that leads in this call.
            make: Makes them.
        """
        kept = self._kept.setdefault(key, {})
        due = [n for n, branch in leaders.items() if not self._serves(kept.get(n), step, branch)]
        for samples, reduction in make(due) if due else ():
            for place, sample in enumerate(samples):
                kept[sample] = Made(reduction, place, step, leaders[sample])
        return {sample: kept[sample] for sample in leaders}

    def _serves(self, made: Made | None, step: int, branch: str) -> bool:
        if made is None or step - made.step >= self._steps:
            return False
        return branch != LEADER or made.branch == LEADER


class Merger:
    """Runs layers on merged tokens.

    Args:
        tally: Gets the memory of what is kept.
        reducer: Makes the patterns.
        steps: Steps that a pattern serves.
        layers: Successive layers that share one; 0 for all of a level.
        proportional: Whether merged keys count as often as what they stand for.
    """

    nothing = "with nothing to merge at this ratio"

    def __init__(
        self, tally: Tally, reducer: Reducer, steps: int, layers: int, proportional: bool
    ) -> None:
        self._reducer = reducer
        self._patterns = Patterns(steps)
        self._layers = layers
        self._proportional = proportional
        tally.memory = lambda: self._patterns.bytes + reducer.bytes

    def reset(self) -> None:
        """Forget the run before."""
        self._patterns.reset()
        self._reducer.reset()

    def serve(self, visit: Visit, inner: Run) -> tuple[Any, int]:
        """Merge, run, unmerge."""
        made = self._made(visit)
        first = next(iter(made.values())).reduction
        if isinstance(first, Identity):
            raise Left(self.nothing)
        parts = list(_parts(visit, made))
        answers = [
            (_entries(visit, rows), self._run(visit, rows, reduction, inner))
            for rows, reduction in parts
        ]
        return _joined(answers, len(visit.stream.hidden)), first.length

    def _made(self, visit: Visit) -> dict[int, Made]:
        leaders = _leaders(visit.rows)
        layout, step, network = visit.stream.own, visit.call.step, visit.call.denoiser.name
        group = visit.rank // self._layers if self._layers else 0
        device = visit.stream.hidden.device
        image = replace(layout, text=0, text_first=True)

        def wanted(*samples: int) -> Wanted:
            return Wanted(step, network, image, group, samples, visit.entries, device)

        def make(samples: list[int]) -> Iterator[tuple[list[int], Reduction]]:
            alike: dict[Hashable, list[int]] = {}
            for sample in samples:
                alike.setdefault(self._reducer.state(wanted(sample)), []).append(sample)
            for some in alike.values():
                rows = [leaders[sample] for sample in some]
                x = index_rows(visit.stream.hidden, _entries(visit, rows))[:, layout.image_span]
                yield some, self._reducer.reduce(x, wanted(*some))

        branches = {sample: visit.rows[row].branch for sample, row in leaders.items()}
        key = (network, group, image, visit.entries, device)
        return self._patterns.of(key, step.index, branches, make)

    def _run(self, visit: Visit, rows: list[int], image: Reduction, inner: Run) -> Any:
        stream, whole = visit.stream, len(rows) == len(visit.rows)
        own, joint = beside_text(stream.own, image), beside_text(stream.joint, image)
        if not whole:
            stream = stream.rows(rows, len(visit.rows), visit.entries)
        args, kwargs = stream.reduced(own, image, joint)
        if self._proportional:
            answer = Counted(joint, visit).run(inner, *args, **kwargs)
        else:
            answer = inner(*args, **kwargs)
        return _unmerged(own, answer)


class Counted:
    """Attention whose keys count as often as the tokens that they stand for."""

    def __init__(self, joint: Reduction, visit: Visit) -> None:
        self._joint = joint
        self._visit = visit
        self._asked = 0

    def run(self, inner: Run, *args: Any, **kwargs: Any) -> Any:
        """Run a layer whose attention this is.

        Raises:
            UnsupportedModel: If it has none: linear attention counts no keys.
        """
        with Interception(self):
            answer = inner(*args, **kwargs)
        if not self._asked:
            raise self._refused("no keys that go through torch's attention")
        return answer

    def __call__(self, asked: Asked) -> Tensor:
        """Compute one attention, ``[B, H, M, D]``.

        Raises:
            UnsupportedModel: If the keys are not the tokens that the layer was given.
        """
        self._asked += 1
        if asked.key.shape[2] != self._joint.length:
            raise self._refused(f"{asked.key.shape[2]} keys where {self._joint.length} tokens are")
        bias = self._joint.key_bias(asked.query.dtype)
        return replace(asked, attn_mask=with_bias(asked.attn_mask, bias)).dense()

    def _refused(self, found: str) -> UnsupportedModel:
        return UnsupportedModel(
            f"{self._visit.stream.network}.{self._visit.path} attends to {found}: set "
            "proportional = false."
        )


def _leaders(rows: Sequence[Row]) -> dict[int, int]:
    """By sample, the row that leads it: ``cond`` where it is among them."""
    found: dict[int, int] = {}
    for index, row in enumerate(rows):
        if row.sample not in found or row.branch == LEADER:
            found[row.sample] = index
    return found


def _entries(visit: Visit, rows: Iterable[int]) -> list[int]:
    """The entries of some rows."""
    return [row * visit.entries + entry for row in rows for entry in range(visit.entries)]


def _parts(visit: Visit, made: dict[int, Made]) -> Iterator[tuple[list[int], Reduction]]:
    """Rows that run together, with the reduction of each of them.

    All do where their patterns were made together and positions can differ by row, or all keep
    the same tokens; else sample by sample.
    """
    together = len({id(pattern.reduction) for pattern in made.values()}) == 1
    alike = len(made) == 1 or all(len(p.reduction.anchor) == 1 for p in made.values())
    if together and (alike or not visit.stream.shared):
        yield list(range(len(visit.rows))), _taken(visit, visit.rows, made)
        return
    for sample in made:
        rows = [index for index, row in enumerate(visit.rows) if row.sample == sample]
        yield rows, _taken(visit, [visit.rows[index] for index in rows], made)


def _taken(visit: Visit, rows: Sequence[Row], made: dict[int, Made]) -> Reduction:
    """The reduction of some rows, whose patterns were made together."""
    reduction = made[rows[0].sample].reduction
    samples = [row.sample for row in rows]
    if visit.entries == 1 and len(set(samples)) == 1:
        samples = samples[:1]  # one pattern for all rows, however many
    return reduction.take(_entries(visit, [made[sample].place for sample in samples]))


def _unmerged(own: Reduction, answer: Any) -> Any:
    """An answer at all tokens; of several, the second is the text's.

    What an IP-Adapter adds to the image (Flux) is the third.
    """
    if not isinstance(answer, tuple):
        return own.unmerge(answer)
    return tuple(part if place == 1 else own.unmerge(part) for place, part in enumerate(answer))


def _joined(parts: list[tuple[list[int], Any]], count: int) -> Any:
    if len(parts) == 1:
        return parts[0][1]
    if not isinstance(parts[0][1], tuple):
        return scatter(parts, count)
    width = len(parts[0][1])
    return tuple(
        scatter([(rows, answer[place]) for rows, answer in parts], count) for place in range(width)
    )
