"""Edit a region: record the original once, then compute of every edit the region that changes.

    with accel.edit.sparse(pipe) as edits:
        edits.record("a red house", generator=torch.Generator().manual_seed(0), **call)
        edit = edits.edit("a blue house", region=(0.25, 0.3, 0.2, 0.2))
    edit.images, edit.share, edit.seconds

The method is `region.SIGE`; this holds its recording, and repeats the arguments and the noise of
the original in every edit.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from accel.errors import BadInput, Conflict
from accel.plan import Plan
from accel.region.sige import SIGE

if TYPE_CHECKING:
    from torch import Tensor

    from accel.attach import Run
    from accel.region.desk import Desk
    from accel.report import Report

SOURCES = ("generator", "latents")
"""Arguments of a pipeline's call that tell its noise."""

MASK = "mask_image"
"""The argument of inpainting pipelines for what is to change."""


@dataclass(frozen=True)
class Edited:
    """One edit, or the original.

    Attributes:
        output: What the pipeline returned.
        share: Of the picture that was computed, over all evaluations; 1 for the original.
        seconds: Of the pipeline's whole call: text, denoising and decoding.
        report: What the plan did, as JSON types.
        text: The same as text.
    """

    output: Any
    share: float
    seconds: float
    report: dict[str, Any]
    text: str

    @property
    def images(self) -> Any:
        """The pictures, in the form of ``output_type``."""
        return self.output[0]


class Edits:
    """A recorded original and its edits. A context manager; or call ``close``.

    Attributes:
        plan: What is attached, `region.SIGE` among it.
        run: The attached plan.
    """

    run: Run

    def __init__(self, pipe: Any, plan: Plan) -> None:
        from accel.region.desk import Desk

        self.plan = plan
        self.run = plan.attach(pipe)
        self._desk: Desk = self.run.shared[Desk]
        self._call: dict[str, Any] = {}
        self._states: tuple[Any, ...] = ()

    @property
    def report(self) -> Report:
        """What the latest run did."""
        return self.run.report

    @property
    def bytes(self) -> int:
        """What the recording takes in memory; 0 while there is none."""
        return 0 if self._desk.recording is None else self._desk.recording.bytes

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the original in pixels.

        Raises:
            BadInput: If nothing is recorded.
        """
        if self._desk.recording is None:
            raise BadInput("Nothing is recorded that could be edited: record the original first.")
        return self._desk.recording.size

    def record(self, prompt: Any = None, **call: Any) -> Edited:
        """Make the original in full, and keep what its edits need.

        If it fails, the original that was recorded before stays.

        Args:
            prompt: What it shows; ``None`` for a pipeline without one.
            **call: More arguments of the pipeline's call, ``generator`` or ``latents`` among them:
                edits start from the same noise.

        Raises:
            BadInput: Without a ``generator`` or ``latents``.
        """
        given = call if prompt is None else {"prompt": prompt, **call}
        if all(given.get(name) is None for name in SOURCES):
            raise BadInput(
                "An edit starts from the noise of its original, and this call draws it from the "
                "global generator: give generator=torch.Generator().manual_seed(0), or latents."
            )
        states = _states(given.get("generator"))
        with self._desk.recorded():
            output, seconds = self._timed(given)
        self._call, self._states = given, states
        return Edited(output, 1.0, seconds, self.report.to_dict(), str(self.report))

    def edit(
        self,
        prompt: Any = None,
        *,
        region: Sequence[float] | None = None,
        mask: Any = None,
        onward: bool = False,
        **call: Any,
    ) -> Edited:
        """Make the picture anew where it changes.

        Without a region or mask, an inpainting pipeline's own ``mask_image`` is taken, and else
        what differs between the inputs of the networks. If it fails, the recording stays as it
        was.

        Args:
            prompt: What it is to show; ``None``: as recorded.
            region: Left, top, width, height: shares of the sides where all are at most 1, else
                pixels.
            mask: A PIL picture, array or tensor of the original's size, white where it is to
                change.
            onward: Whether the edits that follow start from this one instead of the original.
            **call: Arguments that differ from the original's call.

        Raises:
            BadInput: If nothing is recorded; for a region outside of the picture, a mask of
                another size, or both; for other steps or another size than the recording's.
        """
        given = {**self._call, **({} if prompt is None else {"prompt": prompt}), **call}
        if "generator" not in call:
            given |= _renewed(self._call.get("generator"), self._states)
        drawn = self._drawn(region, mask, given.get(MASK))
        with self._desk.edited(drawn, onward) as edit:
            output, seconds = self._timed(given)
        if onward:
            self._call = {**given, **_kept(self._call)}
        return Edited(output, edit.share, seconds, self.report.to_dict(), str(self.report))

    def _drawn(self, region: Sequence[float] | None, mask: Any, own: Any) -> Tensor | None:
        from accel.region.masks import boxed, drawn

        height, width = self.size
        if region is not None and mask is not None:
            raise BadInput("An edit takes a region or a mask: found both. Leave one of them out.")
        if region is not None:
            return boxed(region, height, width)
        if mask is None and own is None:
            return None
        return drawn(own if mask is None else mask, height, width)

    def _timed(self, call: Mapping[str, Any]) -> tuple[Any, float]:
        start = time.perf_counter()
        output = self.run.pipe(**call)
        return output, time.perf_counter() - start

    def close(self) -> None:
        """Take the plan off, and let go of the recording."""
        self.run.detach()
        self._desk.recording = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def sparse(pipe: Any, plan: Plan | None = None, **fields: Any) -> Edits:
    """Edits of what a pipeline makes that compute the region that changes alone.

    Args:
        pipe: The pipeline: text to picture, picture to picture, or inpainting.
        plan: What else is to be attached; ``None``: nothing.
        **fields: Of `region.SIGE`, unless the plan has it.

    Raises:
        Conflict: If a method of the plan does not go with it.
        UnsupportedModel: For a pipeline that it cannot serve.
    """
    plan = Plan() if plan is None else plan
    if any(isinstance(method, SIGE) for method in plan):
        if fields:
            raise Conflict(
                f"The plan has region.SIGE, and its fields {', '.join(fields)} are given beside: "
                "give them in one of the two places."
            )
        return Edits(pipe, plan)
    return Edits(pipe, Plan(*plan, SIGE(**fields), guard=plan.guard))


def _states(generator: Any) -> tuple[Any, ...]:
    """Where generators of noise are."""
    if generator is None:
        return ()
    each = generator if isinstance(generator, list | tuple) else (generator,)
    return tuple(one.get_state() for one in each)


def _renewed(generator: Any, states: tuple[Any, ...]) -> dict[str, Any]:
    """The argument for generators at the places where the original's were."""
    import torch

    if generator is None:
        return {}
    listed = isinstance(generator, list | tuple)
    each = generator if listed else (generator,)
    fresh = []
    for one, state in zip(each, states, strict=True):
        again = torch.Generator(device=one.device)
        again.set_state(state)
        fresh.append(again)
    return {"generator": fresh if listed else fresh[0]}


def _kept(call: Mapping[str, Any]) -> dict[str, Any]:
    """The source of noise of a call."""
    return {name: call[name] for name in SOURCES if name in call}
