"""Where the tokens of a transformer are cut into parts, and where they are put together again.

What diffusers says for its context parallelism is taken over for networks that have such a plan; of
others it is said here. Only the places are: how much of the tokens is a part is up to the method.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Protocol

from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from torch import Tensor

from accel.errors import UnsupportedModel
from accel.seams.blocks import wrap_call
from accel.seams.denoisers import Call, Denoiser

Part = Any
"""What a plan says of a place: how inputs (by name) and outputs (by index) are cut, or how the
output is put together again."""

GIVEN = {0: ContextParallelInput(split_dim=1, expected_dims=3, split_output=True)}
TAKEN = ContextParallelInput(split_dim=1, expected_dims=3, split_output=False)
WHOLE = ContextParallelOutput(gather_dim=1, expected_dims=3)

PLANS: dict[str, dict[str, Part]] = {
    "SD3Transformer2DModel": {"pos_embed": GIVEN, "context_embedder": GIVEN, "proj_out": WHOLE},
    "PixArtTransformer2DModel": {"pos_embed": GIVEN, "proj_out": WHOLE},
    # diffusers cuts the text as well, to which this network only attends
    "LTXVideoTransformer3DModel": {
        "": {"hidden_states": TAKEN},
        "rope": {0: GIVEN[0], 1: GIVEN[0]},
        "proj_out": WHOLE,
    },
}
"""Of networks of which diffusers says nothing, or something else than we need, by class."""

TEXT = frozenset({"encoder_hidden_states", "encoder_hidden_states_mask", "txt_ids"})
"""Arguments that belong to the tokens of the text."""

OF_TEXT = frozenset(
    {
        ("SD3Transformer2DModel", "context_embedder", 0),
        ("QwenImageTransformer2DModel", "pos_embed", 1),
    }
)
"""Outputs that do: class, path and index."""

RESIDUALS = (
    "block_controlnet_hidden_states",
    "controlnet_block_samples",
    "controlnet_single_block_samples",
)
"""Arguments that hold tokens for the blocks: what ControlNets add."""


class Shares(Protocol):
    """What a method does at a place."""

    def cut(self, value: Tensor, dim: int, text: bool, /) -> Tensor:
        """The part of a tensor that is worked on; ``dim`` counts tokens: of the text, or not."""

    def joined(self, value: Tensor, dim: int) -> Tensor:
        """The whole of a tensor of which there is a part."""


def plan_of(denoiser: Denoiser) -> dict[str, Part]:
    """Where a network's tokens are cut and put together again.

    Raises:
        UnsupportedModel: If nobody has said it.
    """
    kind = type(denoiser.core).__name__
    found: dict[str, Part] | None = PLANS.get(kind) or getattr(denoiser.core, "_cp_plan", None)
    if found is None:
        raise UnsupportedModel(
            f"{kind}: nobody has said where its tokens are shared out, so sequence parallelism "
            "does not fit. Use parallel.CFG or parallel.AsyncDiff, or add it to PLANS in "
            "accel/seams/places.py."
        )
    return found


class Places:
    """The places of one network.

    Args:
        denoiser: The network.

    Attributes:
        shares: What is done there; ``None``: nothing.

    Raises:
        UnsupportedModel: If it is not known where they are.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        self.shares: Shares | None = None
        self._core = denoiser.core
        self._kind = type(denoiser.core).__name__
        self._plan = plan_of(denoiser)

    def attach(self) -> Iterator[Callable[[], None]]:
        """Hook them, all but the network's own arguments; yields the undos."""
        for path, part in self._plan.items():
            for module in _modules(self._core, path):
                yield wrap_call(module, partial(self._place, path, module, part))

    def arguments(self, call: Call) -> dict[str, Any]:
        """The network's arguments with a part of their tokens."""
        root, arguments = self._plan.get(""), dict(call.arguments)
        if isinstance(root, Mapping):
            arguments |= {
                name: self._cut(arguments[name], how, name in TEXT)
                for name, how in root.items()
                if arguments.get(name) is not None
            }
        for name in RESIDUALS:
            if arguments.get(name) is not None:
                arguments[name] = [self._cut(one, GIVEN[0], False) for one in arguments[name]]
        return arguments

    def _place(
        self,
        path: str,
        module: Any,
        part: Part,
        inner: Callable[..., Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """A module whose input or output is cut, or whose output is put together."""
        if self.shares is None:
            return inner(*args, **kwargs)
        if not isinstance(part, Mapping):
            return self._joined(inner(*args, **kwargs), part)
        names = _parameters(module)
        given = dict(zip(names, args, strict=False)) | kwargs
        for name, how in part.items():
            if isinstance(name, str) and given.get(name) is not None:
                given[name] = self._cut(given[name], how, name in TEXT)
        positional = [given.pop(name) for name in names[: len(args)]]
        return self._outputs(path, inner(*positional, *args[len(names) :], **given), part)

    def _outputs(self, path: str, answer: Any, part: Mapping[Any, Any]) -> Any:
        """An answer of which some tensors are cut."""
        cut = {index: how for index, how in part.items() if isinstance(index, int)}
        if not cut:
            return answer
        values = [answer] if isinstance(answer, Tensor) else list(answer)
        for index, how in cut.items():
            text = (self._kind, path, index) in OF_TEXT
            values[index] = self._cut(values[index], how, text)
        return values[0] if isinstance(answer, Tensor) else tuple(values)

    def _cut(self, value: Any, how: Any, text: bool) -> Any:
        """A part of a tensor, or of each of several."""
        if isinstance(value, (list, tuple)):
            return type(value)(self._cut(*pair, text) for pair in zip(value, how, strict=True))
        if how.expected_dims not in (None, value.ndim):
            return value
        assert self.shares is not None
        return self.shares.cut(value, how.split_dim, text)

    def _joined(self, answer: Any, part: Any) -> Any:
        """The whole of a tensor, or of each of several."""
        if isinstance(answer, Tensor):
            assert self.shares is not None
            one = part[0] if isinstance(part, (list, tuple)) else part
            return self.shares.joined(answer, one.gather_dim)
        pairs = zip(answer, part, strict=True)
        return tuple(one if how is None else self._joined(one, how) for one, how in pairs)


def _modules(core: Any, path: str) -> list[Any]:
    """The modules that a path of a plan names: ``blocks.*`` all in a list; none for the root."""
    found = [core] if path else []
    for name in path.split(".") if path else ():
        found = (
            [child for one in found for child in one]
            if name == "*"
            else [getattr(one, name) for one in found]
        )
    return found


def _parameters(module: Any) -> list[str]:
    core = getattr(module, "_orig_mod", module)
    return list(inspect.signature(type(core).forward).parameters)[1:]
