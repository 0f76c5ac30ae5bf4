"""The self-attention layers of a pipeline's networks, one after the other, for methods of tokens.

What a layer is given is read by structure (`accel.seams.token_stream`), whose rows they are is
said by whoever runs them (`Denoiser.rows`), and what was done with each layer goes to the report.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from accel.errors import UnsupportedModel
from accel.seams.denoisers import Call, Inner, Result, Row
from accel.seams.modules import Module, find_modules
from accel.seams.token_stream import (
    Stream,
    downsampling,
    entries_of,
    parameters_of,
    stream_of,
    wrap_inside,
)
from accel.seams.tokens import Layouts, refuse_row_by_row, refuse_unknown

if TYPE_CHECKING:
    from accel.attach import Site, Undo
    from accel.report import Tally

SEAM = "tokens"
"""Seam that all hold who change which tokens an attention sees."""


@dataclass(frozen=True, eq=False)
class Visit:
    """One call of a self-attention within a call of its network.

    Attributes:
        call: The call of the network.
        rows: What is computed.
        entries: Entries of each row: the frames that a UNet for video folds into them.
        stream: What the layer is given.
        rank: Place among the self-attentions of the network.
        path: Where the layer is.
    """

    call: Call
    rows: tuple[Row, ...]
    entries: int
    stream: Stream
    rank: int
    path: str


Run = Callable[..., Any]


class Serve(Protocol):
    """What is done with a layer.

    Attributes:
        nothing: Why, where all image tokens are left.
    """

    nothing: str

    def serve(self, visit: Visit, inner: Run) -> tuple[Any, int]:
        """Run the layer; its answer, and how many image tokens were left of a row's.

        Raises:
            Left: If the layer is to run as it is.
        """
        ...


class Left(Exception):
    """A layer is left as it is; says why."""


@dataclass
class Seen:
    """What was done with the layers in a run.

    Attributes:
        served: By layer, image tokens before and after.
        left: By layer, why it was left as it was.
    """

    served: dict[tuple[str, str], tuple[int, int]] = field(default_factory=dict)
    left: dict[tuple[str, str], str] = field(default_factory=dict)

    def reset(self) -> None:
        """Forget the run before."""
        self.served.clear()
        self.left.clear()

    def said(self) -> str | None:
        """Tokens before and after, and what was left; ``None`` where nothing was done."""
        if not self.served:
            return None
        counts = sorted(Counter(self.served.values()).items(), reverse=True)
        parts = [f"{before} → {after} tokens in {n} layers" for (before, after), n in counts]
        return ", ".join(parts) + (f"; {self._left()}" if self.left else "")

    def why_idle(self) -> str:
        """Why no layer was served."""
        return self._left() if self.left else "no self-attention of the network ran"

    def _left(self) -> str:
        reasons = Counter(self.left.values()).items()
        return f"{len(self.left)} layers left: " + ", ".join(f"{n} {why}" for why, n in reasons)


class Layers:
    """Puts a method around the self-attention of every network of a pipeline.

    Args:
        tally: Where it says what it did.
        served: What is done with a layer.
        max_downsample: The coarsest level of a UNet that is served.
        observe: Told of every call of a network and its answer.
        note: What is to be said beside the tokens; empty for nothing.
    """

    def __init__(
        self,
        tally: Tally,
        served: Serve,
        max_downsample: int,
        observe: Callable[[Call, Result], None] | None = None,
        note: Callable[[], str] = str,
    ) -> None:
        self._tally = tally
        self._served = served
        self._most = max_downsample
        self._observe = observe
        self._note = note
        self._seen = Seen()
        self._layouts = Layouts()
        self._call: Call | None = None

    def attach(self, site: Site) -> Iterator[Undo]:
        """Put it around every network and every self-attention in it.

        Raises:
            UnsupportedModel: For a network without self-attention, or with compiled blocks.
        """
        yield site.claim(SEAM)
        yield site.claim("size of the picture")
        site.tally.reason = self._seen.why_idle
        yield site.on_start(self._reset)
        for denoiser in site.denoisers:
            refuse_unknown(denoiser, self._tally.method)
            refuse_row_by_row(denoiser, self._tally.method)
            yield site.around(denoiser, self)
            layers = [module for module in find_modules(denoiser) if module.kind == "self"]
            if not layers:
                raise UnsupportedModel(
                    f"{type(denoiser.core).__name__} has no self-attention: methods of tokens do "
                    "not fit."
                )
            for rank, module in enumerate(layers):
                names = parameters_of(module.module)
                yield wrap_inside(module.module, partial(self._layer, module, rank, names))

    def _reset(self) -> None:
        self._seen.reset()
        self._layouts = Layouts()
        self._call, self._tally.change = None, None

    def __call__(self, call: Call, inner: Inner) -> Result:
        """Run the network."""
        before, self._call = self._call, call
        try:
            result = inner(call)
        finally:
            self._call = before
        if self._observe is not None:
            self._observe(call, result)
        said = self._seen.said()
        self._tally.change = said and said + self._note()
        return result

    def _layer(
        self,
        module: Module,
        rank: int,
        names: tuple[str, ...],
        inner: Run,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        call, rows = self._call, module.denoiser.rows
        if call is None or call.denoiser is not module.denoiser:
            return inner(*args, **kwargs)
        stream = stream_of(call, self._layouts, names, args, kwargs)
        entries = entries_of(call)
        if len(stream.hidden) != len(rows) * entries:
            raise UnsupportedModel(
                f"{module.denoiser.name}.{module.path} is given {len(stream.hidden)} entries where "
                f"{len(rows)} rows of {entries} are: they cannot be told apart, so methods of "
                "tokens do not fit. Leave them out of the plan, or do not split the inference "
                "(enable_free_noise_split_inference)."
            )
        key = (module.denoiser.name, module.path)
        try:
            self._check_level(call, stream)
            visit = Visit(call, rows, entries, stream, rank, module.path)
            answer, after = self._served.serve(visit, inner)
        except Left as why:
            if key not in self._seen.served:
                self._seen.left[key] = str(why)
            return inner(*args, **kwargs)
        if after == stream.own.image:
            self._seen.left[key] = self._served.nothing
            return answer
        self._seen.left.pop(key, None)
        self._seen.served[key] = (stream.own.image, after)
        return answer

    def _check_level(self, call: Call, stream: Stream) -> None:
        factor = downsampling(call, stream.own)
        if factor > self._most:
            raise Left(f"downsampled {factor}× (max_downsample is {self._most})")
