"""Draws prompts with plans beside the stock pipeline, and keeps what was found.

A picture's figures are lines of a file, written at once, so that a search that was cut off draws
nothing twice. What the stock pipeline draws is kept as well, in memory: it is drawn anew by the
next process, and is the same.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from accel.errors import AccelError, BadInput
from accel.plan import Plan
from accel.report import INACTIVE
from accel.tuning.work import Work, counting

if TYPE_CHECKING:
    from PIL import Image

    from accel.scenes import Scene

MOST = 100.0
"""PSNR in dB that equal pictures count as."""


@dataclass(frozen=True)
class Case:
    """One prompt with its noise.

    Attributes:
        call: The arguments of the pipeline's call, the prompt among them, without a generator.
        seed: Of the noise.
        scene: What the picture is to show, if the prompt is a caption of the scenes.
    """

    call: Mapping[str, Any]
    seed: int
    scene: Scene | None = None

    @property
    def key(self) -> str:
        """A digest of it, for the lines of a file."""
        plain = {name: str(value) for name, value in self.call.items()}
        return sha256(json.dumps([plain, self.seed], sort_keys=True).encode()).hexdigest()[:12]

    def arguments(self) -> dict[str, Any]:
        """The call for pictures, with its noise, which starts anew each time."""
        import torch

        generator = torch.Generator("cpu").manual_seed(self.seed)
        return {**self.call, "output_type": "pil", "generator": generator}


@dataclass(frozen=True)
class Drawn:
    """What came of one call.

    Attributes:
        pictures: One picture, or the frames of a clip.
        seconds: From the prompt to the pictures.
        work: What the denoisers computed, if it was counted.
        idle: Methods that did nothing.
    """

    pictures: list[Image.Image]
    seconds: float
    work: Work = field(default_factory=Work)
    idle: tuple[str, ...] = ()


@dataclass(frozen=True)
class Line:
    """What a plan did to one prompt.

    Attributes:
        mark: Of pipeline and machine, which these are figures of.
        plan: The plan as JSON.
        case: Key of the case.
        figures: By measure (``ssim``, ``psnr``, ``perceptual``, ``accuracy``) its value.
        products: Multiplications of the denoisers over those of the stock run.
        ratio: Seconds of the whole call over those of the stock run of the case.
        idle: Methods that did nothing.
    """

    mark: str
    plan: str
    case: str
    figures: dict[str, float]
    products: float
    ratio: float
    idle: tuple[str, ...] = ()


class Ledger:
    """The lines so far, kept in a file if there is one; a torn line, and others' are left out.

    Args:
        path: Of the file.
        mark: Of pipeline and machine: lines with another one are of somewhere else.
    """

    def __init__(self, path: Path | None = None, mark: str = "") -> None:
        self._path = path
        self.mark = mark
        self._lines: dict[tuple[str, str], Line] = {}
        for text in self._texts():
            try:
                line = Line(**json.loads(text))
                line = replace(line, idle=tuple(line.idle))
            except (ValueError, TypeError):
                continue
            if line.mark == mark:
                self._lines[line.plan, line.case] = line

    def _texts(self) -> Iterable[str]:
        if self._path is None or not self._path.exists():
            return ()
        return self._path.read_text(encoding="utf-8").splitlines()

    def __len__(self) -> int:
        return len(self._lines)

    def get(self, plan: str, case: str) -> Line | None:
        """What is known of a plan and a case."""
        return self._lines.get((plan, case))

    def add(self, line: Line) -> Line:
        """Keep a line."""
        self._lines[line.plan, line.case] = line
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write("\n" * self._torn() + json.dumps(asdict(line)) + "\n")
        return line

    def _torn(self) -> bool:
        assert self._path is not None
        return self._path.stat().st_size > 0 and not self._path.read_bytes().endswith(b"\n")


class Drawing(Protocol):
    """What draws for a search or a choice: `Bench`, or several of them."""

    @property
    def mark(self) -> str:
        """Of pipeline and machine."""
        ...

    def figures(self, plan: Plan, case: Case) -> Line:
        """What a plan does to a case; raises `AccelError` if it does not serve."""
        ...


class Bench:
    """A pipeline, and everything that was drawn with it.

    Args:
        pipe: The stock pipeline.
        measures: Which figures of fidelity to take.
        ledger: Where they are kept.
        clock: Tells seconds.
    """

    def __init__(
        self,
        pipe: Any,
        measures: Sequence[str],
        ledger: Ledger,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.pipe = pipe
        self.clock = clock
        self.drawn = 0
        self._measures = tuple(measures)
        self._ledger = ledger
        self._stock: dict[str, Drawn] = {}

    @property
    def mark(self) -> str:
        """Of pipeline and machine."""
        return self._ledger.mark

    def stock(self, case: Case) -> Drawn:
        """What the stock pipeline draws of a case: drawn once."""
        if case.key not in self._stock:
            self._stock[case.key] = self._draw(Plan(), case, count=True)
        return self._stock[case.key]

    def forget(self, case: Case) -> None:
        """Let go of the stock pictures of a case."""
        self._stock.pop(case.key, None)

    def figures(self, plan: Plan, case: Case) -> Line:
        """What a plan does to a case: drawn once, in all processes that share the ledger.

        Raises:
            AccelError: If the plan does not serve the pipeline or the call.
        """
        written = plan.to_json()
        known = self._ledger.get(written, case.key)
        if known is not None and set(self._measures) <= known.figures.keys():
            return known
        stock = self.stock(case)
        drawn = self._draw(plan, case, count=True)
        line = Line(
            self._ledger.mark,
            written,
            case.key,
            fidelity(self._measures, stock.pictures, drawn.pictures, case.scene),
            drawn.work.products / max(stock.work.products, 1),
            drawn.seconds / stock.seconds,
            drawn.idle,
        )
        return self._ledger.add(line)

    def time(self, plan: Plan, case: Case) -> Drawn:
        """Draw a case with nothing counted, as a user would."""
        return self._draw(plan, case, count=False)

    def _draw(self, plan: Plan, case: Case, *, count: bool) -> Drawn:
        self.drawn += 1
        if not count:
            return self._called(plan, case)
        with counting(self.pipe, self.clock) as work:
            drawn = self._called(plan, case)
        return replace(drawn, work=work)

    def _called(self, plan: Plan, case: Case) -> Drawn:
        arguments = case.arguments()
        if not len(plan):
            return self._timed(arguments)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # what did nothing is noted
            with plan.attach(self.pipe) as run:
                drawn = self._timed(arguments)
        verdicts = run.report.verdicts.items()
        idle = (name for name, one in verdicts if one.state == INACTIVE and not one.chosen)
        return replace(drawn, idle=tuple(idle))

    def _timed(self, arguments: Mapping[str, Any]) -> Drawn:
        start = self.clock()
        try:
            made = self.pipe(**arguments)[0][0]
        except AccelError:
            raise
        except (ValueError, TypeError) as error:
            raise BadInput(f"{type(self.pipe).__name__} refuses the call: {error}") from error
        seconds = self.clock() - start
        return Drawn(list(made) if isinstance(made, list | tuple) else [made], seconds)


def fidelity(
    measures: Iterable[str], stock: list[Any], drawn: list[Any], scene: Scene | None = None
) -> dict[str, float]:
    """Figures of one picture or clip against the stock one; accuracy of captions of scenes only."""
    import numpy as np

    from accel import quality

    ours, theirs = (np.stack([np.asarray(one.convert("RGB")) for one in x]) for x in (stock, drawn))
    kinds: dict[str, Callable[[], float]] = {
        "ssim": lambda: quality.ssim(ours, theirs),
        "psnr": lambda: min(quality.psnr(ours, theirs), MOST),
        "perceptual": lambda: quality.perceptual(ours, theirs),
        "accuracy": lambda: _accuracy(drawn, scene),
    }
    return {measure: float(kinds[measure]()) for measure in measures}


def _accuracy(drawn: list[Any], scene: Scene | None) -> float:
    from accel.scenes import motion, oracle

    assert scene is not None
    if len(drawn) > 1:
        return float(motion.caption_accuracy([drawn], [scene]).mean)
    return float(oracle.caption_accuracy(drawn, [scene]).mean)
