"""Which guidance branch each row of a call is: the layouts of diffusers' pipelines.

Four signs are read, the surest first: the name of a ``cache_context``, a keyword that only one
branch has (skip-layer guidance), the rows of a batched call, and – where a pipeline makes two
plain calls – the identity of the conditioning tensor, with the ordinal since the last
``scheduler.step`` for tensors that were not seen before.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from accel import hooks
from accel.errors import UnsupportedModel
from accel.seams.denoisers import Call, Denoiser, Result, Row
from accel.trajectory import Trajectory

Style = Literal["batched", "calls", "embedded"]


@dataclass(frozen=True)
class Layout:
    """How a pipeline lays out guidance.

    Attributes:
        style: ``batched`` rows of one call, separate ``calls``, or ``embedded`` (one branch).
        order: Names of the branches in the order of rows or calls.
    """

    style: Style
    order: tuple[str, ...] = ("uncond", "cond")


BATCHED = Layout("batched")
COND_FIRST = Layout("batched", ("cond", "uncond"))
CALLS = Layout("calls", ("cond", "uncond"))
EMBEDDED = Layout("embedded", ("cond",))

LAYOUTS: dict[str, Layout] = {
    "StableDiffusion3": BATCHED,
    "StableDiffusionXL": BATCHED,
    "StableDiffusion": BATCHED,
    "StableVideoDiffusion": BATCHED,
    "LatentConsistencyModel": EMBEDDED,
    "AnimateDiff": BATCHED,
    "TextToVideoSD": BATCHED,
    "PixArt": BATCHED,
    "Sana": BATCHED,
    "HiDream": BATCHED,
    "LTX": BATCHED,
    "CogVideoX": BATCHED,
    "Mochi": BATCHED,
    "Latte": BATCHED,
    "Allegro": BATCHED,
    "HunyuanDiT": BATCHED,
    "AuraFlow": BATCHED,
    "DiT": COND_FIRST,
    "ZImage": COND_FIRST,
    "Flux2Klein": CALLS,
    "Flux2": EMBEDDED,
    "FluxControlNet": CALLS,
    "Flux": CALLS,
    "QwenImage": CALLS,
    "Chroma": CALLS,
    "Lumina2": CALLS,
    "Kandinsky5": CALLS,
    "Wan": CALLS,
    "SkyReelsV2": CALLS,
    "HunyuanVideo": CALLS,
    "HunyuanImage": CALLS,
    "CogView4": CALLS,
    "Cosmos": CALLS,
}
"""By the beginning of the pipeline's class name; the longest match counts."""

REFUSED = (
    "StableDiffusionInstructPix2Pix",
    "StableDiffusionXLInstructPix2Pix",
    "StableDiffusionPAG",
    "StableDiffusionXLPAG",
    "StableDiffusion3PAG",
    "LEditsPP",
    "LTX2",
)
"""More than two branches, or branches that edit each other."""


def layout_of(pipe: Any) -> Layout:
    """The layout of a pipeline.

    Raises:
        UnsupportedModel: If its class is not known.
    """
    name = type(pipe).__name__
    matches = [prefix for prefix in LAYOUTS if name.startswith(prefix)]
    if not matches or name.startswith(REFUSED) or "Modular" in name:
        raise UnsupportedModel(
            f"{name}: the order of its guidance branches is not known, and guessing it would mix "
            "them up. Add its layout to accel/seams/branches.py (docs/adding-a-method.md)."
        )
    return LAYOUTS[max(matches, key=len)]


EMBEDS_SCALE = ("guidance", "timestep_cond")
"""Arguments by which networks are told the guidance scale that they were distilled for."""


def embedded_scale(call: Call) -> str:
    """The argument by which a call tells its network the guidance scale; empty where none does."""
    given = (name for name in EMBEDS_SCALE if call.arguments.get(name) is not None)
    return next(given, "")


@dataclass
class Reader:
    """Reads calls of one pipeline's denoisers: step, branch and sample of each row."""

    pipe: Any
    layout: Layout
    trajectory: Trajectory
    samples: int | None = None
    _context: str | None = None
    _ordinals: dict[str, int] = field(default_factory=dict)
    _at: int = -1
    _seen: int = 1
    _known: dict[int, tuple[Tensor, str]] = field(default_factory=dict)

    def attach(self, denoisers: tuple[Denoiser, ...]) -> list[Callable[[], None]]:
        """Follow the pipeline's public calls; returns the undos."""
        undos = []
        if hasattr(self.pipe, "prepare_latents"):
            undos.append(hooks.wrap(self.pipe, "prepare_latents", self._on_latents))
        for denoiser in denoisers:
            if hasattr(denoiser.core, "cache_context"):
                undos.append(hooks.wrap(denoiser.module, "cache_context", self._on_context))
        return undos

    def reset(self) -> None:
        """Forget the run before."""
        self._context, self._at = None, -1
        self._ordinals.clear()
        self._known.clear()

    @property
    def batch(self) -> int:
        """Samples of the run, as prepared or else as last seen in a call."""
        return self.samples or self._seen

    @property
    def running(self) -> bool:
        """Whether a run is under way."""
        return self.trajectory.running

    def note(self, denoiser: Denoiser, arguments: dict[str, Any]) -> None:
        """Learn the number of samples from a call, where the pipeline prepares latents unseen."""
        if self.samples is None:
            self._seen = self._samples(arguments, len(arguments[denoiser.sample_name]))

    def read(self, denoiser: Denoiser, arguments: dict[str, Any]) -> Call:
        """One call, its rows named."""
        step = self.trajectory.now
        count = len(arguments[denoiser.sample_name])
        branches = self._branches(denoiser, arguments, count, step.index)
        samples = self._seen = count // len(branches)
        rows = tuple(Row(branch, sample) for branch in branches for sample in range(samples))
        return Call(denoiser, step, rows, arguments)

    def answered(self, call: Call, result: Result) -> None:
        """Tell the trajectory which samples were computed."""
        for row, fresh in zip(call.rows, result.fresh, strict=False):
            self.trajectory.answered(row.sample, row.branch, fresh)

    def _branches(
        self, denoiser: Denoiser, arguments: dict[str, Any], count: int, index: int
    ) -> tuple[str, ...]:
        ordinal = self._next_ordinal(denoiser, index)
        if self._context is not None and "_" not in self._context.removeprefix("pred_"):
            return (self._context.removeprefix("pred_"),)
        if arguments.get("skip_layers") is not None:
            return ("skip_layers",)
        if self.layout.style == "batched":
            return self._rows(arguments, count)
        if self.layout.style == "calls":
            return (self._call(arguments, ordinal),)
        return self.layout.order

    def _next_ordinal(self, denoiser: Denoiser, index: int) -> int:
        if index != self._at:
            self._at = index
            self._ordinals.clear()
        ordinal = self._ordinals.get(denoiser.name, 0)
        self._ordinals[denoiser.name] = ordinal + 1
        return ordinal

    def _rows(self, arguments: dict[str, Any], count: int) -> tuple[str, ...]:
        samples = self._samples(arguments, count)
        if count == samples:
            return ("cond",)
        if count == samples * len(self.layout.order):
            return self.layout.order
        raise UnsupportedModel(
            f"{type(self.pipe).__name__}: a call of {count} rows for {samples} samples is neither "
            f"1 nor {len(self.layout.order)} branches. Turn the extra guidance off."
        )

    def _samples(self, arguments: dict[str, Any], count: int) -> int:
        if self.samples is not None:
            return self.samples
        labels = arguments.get("class_labels")  # DiT prepares its latents inline
        classes = self.pipe.transformer.config.num_embeds_ada_norm
        guided = isinstance(labels, Tensor) and bool((labels[count // 2 :] == classes).all())
        return count // 2 if guided else count

    def _call(self, arguments: dict[str, Any], ordinal: int) -> str:
        condition = arguments.get("encoder_hidden_states")
        if isinstance(condition, Tensor) and id(condition) in self._known:
            return self._known[id(condition)][1]
        order = self.layout.order
        if ordinal >= len(order):
            raise UnsupportedModel(
                f"{type(self.pipe).__name__} makes more than {len(order)} calls a step: the extra "
                "branches have no names. Turn the extra guidance off."
            )
        if isinstance(condition, Tensor):
            self._known[id(condition)] = (condition, order[ordinal])
        return order[ordinal]

    def _on_latents(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        prepared = inner(*args, **kwargs)
        latents = prepared[0] if isinstance(prepared, tuple) else prepared
        self.samples = len(latents)
        return prepared

    def _on_context(
        self, inner: Callable[..., AbstractContextManager[Any]], name: str, **kwargs: Any
    ) -> AbstractContextManager[None]:
        @contextmanager
        def named() -> Any:
            before, self._context = self._context, name
            try:
                with inner(name, **kwargs):
                    yield
            finally:
                self._context = before

        return named()
