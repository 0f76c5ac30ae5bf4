"""What a calibrator is: from some calls of a pipeline to a method with measured numbers in it.

A calibrator runs a pipeline's calls with observers in place, and gives the method with the numbers
that it measured. One that measures more than a plan should carry gives files too, which are
written beside the plan: the method has a field of type `pathlib.Path` for each, and a plan that is
read from a file takes such a path relative to its own folder.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accel.attach import Accelerator, Run, Site, Undo
from accel.errors import BadInput, UnsupportedModel
from accel.guard import Guard


@dataclass(frozen=True)
class Calibrated:
    """What a calibration gave.

    Attributes:
        method: The method with the measured numbers, or the guard.
        note: What they rest on, in a line.
        files: Content of files that the method needs, by the name of the method's field that is
            to hold the path; whoever writes them sets the fields.
        beside: Methods that belong in the same plan: what the numbers were measured with.
    """

    method: Accelerator | Guard
    note: str
    files: Mapping[str, bytes] = field(default_factory=dict)
    beside: tuple[Accelerator, ...] = ()


def one_evaluation_a_step(pipe: Any, owner: str, way_out: str) -> None:
    """Refuse to measure from each evaluation to the next where a solver makes two a step.

    Raises:
        UnsupportedModel: For such a scheduler; ``way_out`` ends "Calibrate with another scheduler".
    """
    if getattr(pipe.scheduler, "order", 1) != 1:
        raise UnsupportedModel(
            f"{owner}: what is measured are steps of one evaluation, and "
            f"{type(pipe.scheduler).__name__} makes {pipe.scheduler.order} a step. Calibrate with "
            f"another scheduler, or use {way_out}."
        )


Calibrator = Callable[[Any, Iterable[Mapping[str, Any]], Mapping[str, Any]], Calibrated]
"""From a pipeline, the arguments of its calls (made as they are asked for), and options: fields of
the method to set, or what else the calibrator says that it takes."""


class Recorder(Accelerator):
    """Looks at a run and changes nothing; in no list of methods."""

    @classmethod
    def off(cls) -> None:
        """It changes nothing as it is."""

    def why_off(self) -> None:
        """It always looks."""

    def attach(self, site: Site) -> Iterator[Undo]:
        """Look at every denoiser."""
        yield site.claim(self.seam)
        yield from self._look(site)

    @abstractmethod
    def _look(self, site: Site) -> Iterator[Undo]:
        """Put the observers in place."""

    def watch(self, pipe: Any, calls: Iterable[Mapping[str, Any]]) -> None:
        """Run the calls.

        Raises:
            BadInput: If there is none.
        """
        run, count = Run((self,), pipe), 0
        try:
            for call in calls:
                pipe(**call)
                count += 1
        finally:
            run.detach()
        if not count:
            raise BadInput("A calibration rests on what prompts do: give at least one prompt.")


def content_of(path: Path, sha256: str, *, what: str, again: str) -> bytes:
    """What was measured, from its file.

    Args:
        path: Of the file.
        sha256: What it must hash to; empty: not checked.
        what: What it is called in an error.
        again: How to measure it anew, as a sentence.

    Raises:
        BadInput: If it cannot be read, or is another file than was meant.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BadInput(
            f"The {what} {path} cannot be read ({error.strerror}). A path in a plan file is "
            f"relative to that file. {again}"
        ) from error
    found = hashlib.sha256(content).hexdigest()
    if sha256 and found != sha256:
        raise BadInput(
            f"The {what} {path} are not those that were meant: SHA-256 {found[:16]}…, needed "
            f"{sha256[:16]}…. Put the right file there, or drop sha256."
        )
    return content
