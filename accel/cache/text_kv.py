"""Text K/V: what depends on the text alone is computed once a run. Lossless.

Source: the exact text key/value cache of diffusers (`TextKVCache`), for every network; keyed on
the identity and version of the input tensor, not on its address.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

from pydantic import Field

from accel.attach import Accelerator, Site, Undo
from accel.seams.memory import bytes_of

if TYPE_CHECKING:
    from torch import Tensor

    from accel.report import Tally
    from accel.seams.denoisers import Call, Inner, Result
    from accel.trajectory import Step


class TextKV(Accelerator):
    """Hand out cross-attention keys, values and text embeddings while their input is the same.

    Bit-identical: an output is handed out only for the very tensor, unchanged, that it was
    computed from, while it is unchanged itself. In networks of joint attention (Flux, SD3) the
    text changes from block to block and step to step, so that only its embedders are saved. It
    never reads the device.
    """

    name: ClassVar[str] = "cache.TextKV"
    layer: ClassVar[str] = "attention"
    seam: ClassVar[str] = "text"
    supports: ClassVar[str] = "every denoiser; saves most with cross-attention to the text"
    source: ClassVar[str] = "TextKVCache of https://github.com/huggingface/diffusers, on other keys"
    approximates: ClassVar[bool] = False

    entries: int = Field(
        default=4,
        ge=0,
        description="inputs that each projection remembers; guidance in two calls needs 2; "
        "0 is off",
    )

    @classmethod
    def off(cls) -> Self:
        """Remember nothing."""
        return cls(entries=0)

    def why_off(self) -> str | None:
        """Without entries nothing is remembered."""
        return "entries is 0" if self.entries == 0 else None

    def attach(self, site: Site) -> Iterator[Undo]:
        """Put a memory around every projection of the text.

        Raises:
            Conflict: Beside what makes projections another function at another step.
        """
        yield site.claim("text projections")
        yield from TextCache(site.tally, self.entries).attach(site)


class TextCache:
    """The memories of all text modules of a pipeline."""

    def __init__(self, tally: Tally, entries: int) -> None:
        self._tally = tally
        self._entries = entries
        self._memories: list[Memory] = []
        self._running = False
        self._hits = 0

    def attach(self, site: Site) -> Iterator[Undo]:
        """Put them around the modules."""
        from accel.seams.text import find_text_modules

        site.tally.memory = self._bytes
        site.tally.reason = self._why_idle
        yield site.on_start(self._forget)
        yield site.on_step(self._end)
        for denoiser in site.denoisers:
            yield site.around(denoiser, self)
            for module in find_text_modules(denoiser):
                memory = Memory(module.module, self._entries)
                self._memories.append(memory)
                yield module.wrap(partial(self._module, memory))

    def __call__(self, call: Call, inner: Inner) -> Result:
        """Run the network and write down whether anything was saved in it."""
        self._running, self._hits = True, 0
        try:
            result = inner(call)
        finally:
            self._running = False
        self._tally.record(call.step.index, call.rows, "reused" if self._hits else "computed")
        return result

    def _module(self, memory: Memory, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self._running:
            return inner(*args, **kwargs)
        output, hit = memory(inner, args, kwargs)
        self._hits += hit
        return output

    def _forget(self) -> None:
        for memory in self._memories:
            memory.clear()

    def _end(self, step: Step, _result: Any) -> None:
        if step.total is not None and step.index >= step.total - 1:
            self._forget()

    def _bytes(self) -> int:
        outputs = {
            id(entry.output): entry.output for memory in self._memories for entry in memory.entries
        }
        return bytes_of(outputs)

    def _why_idle(self) -> str:
        if not self._memories:
            return "no module sees the text alone, or all that do are inside a compiled graph"
        if any(memory.blind for memory in self._memories):
            return (
                "its weights were loaded in inference mode: what is written into them is not seen"
            )
        return "no module was given the same text tensor twice"


class Key(NamedTuple):
    """What was asked: a tensor as a place in the tensor that owns its memory.

    Attributes:
        version: Of the owner, at that time; -1 where it has none (made in inference mode).
        place: Shape, strides, offset and type: a view made anew each step is the same place.
        form: How it was passed.
        weights: Versions of the module's parameters.
    """

    version: int
    place: tuple[Any, ...]
    form: tuple[str, ...]
    weights: tuple[int, ...]


class Entry(NamedTuple):
    """One input that is remembered.

    Attributes:
        owner: The tensor whose memory the input is in. Held, so that its identity stays its own.
        key: What of it.
        output: What the module made of it.
        version: Of the output; another one means that somebody wrote into it.
    """

    owner: Tensor
    key: Key
    output: Tensor
    version: int


@dataclass
class Memory:
    """Remembers the latest inputs of one module, and what it made of them.

    A module that meets nothing twice is left alone for the rest of the run.

    Attributes:
        module: The module.
        size: How many inputs it remembers.
        entries: The remembered ones, the latest used last.
    """

    module: Any
    size: int
    entries: list[Entry] = field(default_factory=list)
    _misses: int = 0

    def clear(self) -> None:
        """Forget everything."""
        self.entries.clear()
        self._misses = 0

    def __call__(
        self, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, bool]:
        """What the module answers, and whether that was remembered."""
        asked = None if self._hopeless else self._asked(args, kwargs)
        if asked is None:
            return inner(*args, **kwargs), False
        owner, key = asked
        for place, entry in enumerate(self.entries):
            if entry.owner is owner and entry.key == key:
                del self.entries[place]
                if entry.output._version == entry.version:
                    self.entries.append(entry)
                    self._misses = 0
                    return entry.output, True
                break
        output = _versioned(inner, args, kwargs)
        self._remember(owner, key, output)
        return output, False

    @property
    def blind(self) -> bool:
        """Whether weights were loaded in inference mode: writing into them leaves no mark."""
        return any(weight.is_inference() for weight in self.module.parameters())

    @property
    def _hopeless(self) -> bool:
        return self._misses > 2 * self.size

    def _remember(self, owner: Tensor, key: Key, output: Any) -> None:
        import torch

        self._misses += 1
        if self._hopeless:
            self.entries.clear()
        elif isinstance(output, torch.Tensor) and not output.is_inference():
            self.entries.append(Entry(owner, key, output, output._version))
            del self.entries[: -self.size]

    def _asked(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Key] | None:
        """The one tensor that was passed, or ``None``: others too, or nothing can be kept."""
        import torch

        if self.blind:
            return None
        given = [value for value in (*args, *kwargs.values()) if value is not None]
        if torch.is_grad_enabled() or len(given) != 1 or type(given[0]) is not torch.Tensor:
            return None
        tensor = given[0]
        owner = tensor if tensor._base is None else tensor._base
        return owner, Key(
            -1 if owner.is_inference() else owner._version,
            (tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype),
            tuple(kwargs),
            tuple(weight._version for weight in self.module.parameters()),
        )


def _versioned(inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a module so that its output counts what is written into it."""
    import torch

    if not torch.is_inference_mode_enabled():
        return inner(*args, **kwargs)
    with torch.inference_mode(False), torch.no_grad():
        return inner(*args, **kwargs)
