"""Where the tokens of a transformer are cut into parts, and where they are put together again.

What diffusers says for its context parallelism is taken over for networks that have such a plan; of
others it is said here. Only the places are: how much of the tokens is a part is up to the method.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from torch import Tensor

from accel.errors import UnsupportedModel
from accel.seams.blocks import wrap_call
from accel.seams.denoisers import Denoiser

Part = Any
"""What a plan says of a place: how inputs (by name) and outputs (by index) are cut, or how the
output (alone, or as ``return`` beside inputs) is put together again."""

RETURN = "return"


@dataclass(frozen=True)
class Joint:
    """A dimension counts the tokens of the text and of the picture, one after the other."""

    dim: int
    text_first: bool


@dataclass(frozen=True)
class Each:
    """A dimension counts tokens, or there is one value for all of them."""

    dim: int


@dataclass(frozen=True)
class Count:
    """A number of tokens of the picture: those at its beginning, or those at its end."""

    leading: bool


def tokens(dim: int, dims: int) -> ContextParallelInput:
    """Dimension ``dim`` counts tokens, of a tensor that has ``dims``."""
    return ContextParallelInput(split_dim=dim, expected_dims=dims, split_output=False)


GIVEN = {0: ContextParallelInput(split_dim=1, expected_dims=3, split_output=True)}
TAKEN = tokens(1, 3)
WHOLE = ContextParallelOutput(gather_dim=1, expected_dims=3)
STREAMS = {"hidden_states": TAKEN, "encoder_hidden_states": TAKEN}
ANGLES = (tokens(0, 2), tokens(0, 2))
EACH_ANGLE = ContextParallelInput(split_dim=0, expected_dims=3, split_output=True)
EACH_ROW = ContextParallelInput(split_dim=-2, expected_dims=None, split_output=True)
IDS = {"img_ids": EACH_ROW, "txt_ids": EACH_ROW}

HUNYUAN: dict[str, Part] = {
    # what the first block is given is cut before its mask is: these wrap around each other
    "transformer_blocks.*": {
        "attention_mask": Joint(3, text_first=False),
        "freqs_cis": ANGLES,
        "num_tokens": Count(leading=True),
    },
    "single_transformer_blocks.*": {
        "attention_mask": Joint(3, text_first=False),
        "image_rotary_emb": ANGLES,
        "num_tokens": Count(leading=True),
    },
    "transformer_blocks.0": STREAMS,
    "proj_out": WHOLE,
}

PLANS: dict[str, dict[str, Part]] = {
    "AuraFlowTransformer2DModel": {"joint_transformer_blocks.0": STREAMS, "proj_out": WHOLE},
    "ChromaTransformer2DModel": {
        "": {**STREAMS, **IDS},
        "transformer_blocks.*": {"attention_mask": Joint(1, text_first=True)},
        "single_transformer_blocks.*": {"attention_mask": Joint(1, text_first=True)},
        "proj_out": WHOLE,
    },
    "CogVideoXTransformer3DModel": {
        "transformer_blocks.*": {"image_rotary_emb": ANGLES},
        "transformer_blocks.0": STREAMS,
        "proj_out": WHOLE,
    },
    "CogView4Transformer2DModel": {
        "transformer_blocks.*": {"attention_mask": tokens(1, 2), "image_rotary_emb": ANGLES},
        "transformer_blocks.0": STREAMS,
        "proj_out": WHOLE,
    },
    "DiTTransformer2DModel": {"pos_embed": GIVEN, "proj_out_2": WHOLE},
    # diffusers' knows ids of one kind alone, without or with a dimension for samples
    "Flux2Transformer2DModel": {"": {**STREAMS, **IDS}, "proj_out": WHOLE},
    "FluxTransformer2DModel": {"": {**STREAMS, **IDS}, "proj_out": WHOLE},
    # diffusers' puts the tokens together around each module, and cannot tell those of the history
    "HeliosTransformer3DModel": {
        "blocks.*": {
            "temb": tokens(1, 4),
            "rotary_emb": TAKEN,
            "original_context_length": Count(leading=False),
        },
        "blocks.0": {"hidden_states": TAKEN},
        "blocks.-1": WHOLE,
    },
    "HunyuanImageTransformer2DModel": {
        "transformer_blocks.*": {
            "attention_mask": Joint(3, text_first=False),
            "image_rotary_emb": ANGLES,
        },
        "single_transformer_blocks.*": {
            "attention_mask": Joint(3, text_first=False),
            "image_rotary_emb": ANGLES,
        },
        "transformer_blocks.0": STREAMS,
        "proj_out": WHOLE,
    },
    "HunyuanVideoTransformer3DModel": HUNYUAN,
    "HunyuanVideo15Transformer3DModel": {
        "transformer_blocks.*": {"attention_mask": tokens(1, 2), "freqs_cis": ANGLES},
        "transformer_blocks.0": STREAMS,
        "proj_out": WHOLE,
    },
    # behind its last block it leaves out the tokens of the history
    "HunyuanVideoFramepackTransformer3DModel": {
        **{path: part for path, part in HUNYUAN.items() if path != "proj_out"},
        "single_transformer_blocks.-1": (WHOLE, None),
    },
    # diffusers' cuts the text as well, to which this network only attends
    "LTXVideoTransformer3DModel": {
        "": {"hidden_states": TAKEN},
        "rope": {0: GIVEN[0], 1: GIVEN[0]},
        "proj_out": WHOLE,
    },
    # likewise, and it cuts no sound, to whose tokens those of the picture attend and the reverse
    "LTX2VideoTransformer3DModel": {
        "": {
            "hidden_states": TAKEN,
            "audio_hidden_states": TAKEN,
            "timestep": Each(1),
            "audio_timestep": Each(1),
            "video_keyframes_mask": TAKEN,
        },
        **{
            path: {0: EACH_ROW, 1: EACH_ROW}
            for path in ("rope", "audio_rope", "cross_attn_rope", "cross_attn_audio_rope")
        },
        "proj_out": WHOLE,
        "audio_proj_out": WHOLE,
    },
    "Lumina2Transformer2DModel": {
        "layers.*": {"attention_mask": tokens(1, 2), "image_rotary_emb": TAKEN},
        "layers.0": {"hidden_states": TAKEN},
        "norm_out": WHOLE,
    },
    "MochiTransformer3DModel": {
        "transformer_blocks.*": {"encoder_attention_mask": tokens(1, 2)},
        "transformer_blocks.0": STREAMS,
        "rope": {0: EACH_ANGLE, 1: EACH_ANGLE},
        "proj_out": WHOLE,
    },
    "PixArtTransformer2DModel": {"pos_embed": GIVEN, "proj_out": WHOLE},
    "SD3Transformer2DModel": {"pos_embed": GIVEN, "context_embedder": GIVEN, "proj_out": WHOLE},
    "WanVACETransformer3DModel": {
        "rope": {0: tokens(1, 4), 1: tokens(1, 4)},
        "vace_blocks.*": {"hidden_states": TAKEN},
        "vace_blocks.0": {"control_hidden_states": TAKEN},
        "blocks.0": {"hidden_states": TAKEN},
        "proj_out": WHOLE,
    },
    # text and picture are one stream, whose order differs by sample: none of it is cut as text
    "ZImageTransformer2DModel": {
        "layers.*": {
            "attn_mask": tokens(1, 2),
            "freqs_cis": TAKEN,
            "noise_mask": tokens(1, 2),
        },
        "layers.0": {"x": TAKEN},
        "all_final_layer.*": {"noise_mask": tokens(1, 2), RETURN: WHOLE},
    },
}
"""Of networks of which diffusers says nothing, or something else than we need, by class."""

TEXT = frozenset({"encoder_hidden_states", "encoder_hidden_states_mask", "txt_ids"})
"""Arguments that belong to the tokens of the text."""

OF_TEXT = frozenset(
    {
        ("CogView4Transformer2DModel", "transformer_blocks.*", "attention_mask"),
        ("HunyuanVideo15Transformer3DModel", "transformer_blocks.*", "attention_mask"),
        ("MochiTransformer3DModel", "transformer_blocks.*", "encoder_attention_mask"),
        ("SD3Transformer2DModel", "context_embedder", 0),
        ("QwenImageTransformer2DModel", "pos_embed", 1),
    }
)
"""Others that do: class, path, and name of the argument or index of the output."""

UNSERVED = {"Flux2Transformer2DModel": "kv_cache_mode"}
"""Arguments under which the plan of a network does not hold: tokens are told apart by number."""

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


class Cuts:
    """The places where the tokens of one network are cut and put together again.

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
        self._whole: dict[bool, int] = {}

    def attach(self) -> Iterator[Callable[[], None]]:
        """Hook them, all but the network's own arguments; yields the undos."""
        for path, part in self._plan.items():
            for module in _modules(self._core, path):
                yield wrap_call(module, partial(self._place, path, module, part))

    @property
    def ends(self) -> int:
        """How many places there are at which tokens are put together again."""
        return sum(not isinstance(part, Mapping) for part in self._plan.values())

    @property
    def of_text(self) -> bool:
        """Whether tokens of the text are among those that are cut."""
        return any(
            name in TEXT or (self._kind, path, name) in OF_TEXT
            for path, part in self._plan.items()
            if isinstance(part, Mapping)
            for name in part
        )

    def arguments(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The network's arguments with a part of their tokens.

        Raises:
            UnsupportedModel: If they are of a kind that cannot be shared out.
        """
        root, arguments = self._plan.get(""), dict(given)
        self._whole.clear()
        unserved = UNSERVED.get(self._kind)
        if unserved is not None and given.get(unserved) is not None:
            raise UnsupportedModel(
                f"{self._kind} is called with {unserved}, under which its tokens cannot be shared "
                "out, so sequence parallelism does not fit. Call the pipeline without it, or use "
                "parallel.CFG or parallel.AsyncDiff."
            )
        if isinstance(root, Mapping):
            self._inputs("", arguments, root)
        for name in RESIDUALS:
            if arguments.get(name) is not None:
                arguments[name] = self._residuals(arguments[name])
        return arguments

    def _residuals(self, given: Any) -> Any:
        """Parts of what is added to blocks, in their order or by their number."""
        if isinstance(given, Mapping):
            return {index: self._cut(one, TAKEN, False) for index, one in given.items()}
        return [self._cut(one, TAKEN, False) for one in given]

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
        self._inputs(path, given, part)
        positional = [given.pop(name) for name in names[: len(args)]]
        answer = self._outputs(path, inner(*positional, *args[len(names) :], **given), part)
        return self._joined(answer, part[RETURN]) if RETURN in part else answer

    def _inputs(self, path: str, given: dict[str, Any], part: Mapping[Any, Any]) -> None:
        """Put parts of arguments in their place, where they are given."""
        for name, how in part.items():
            if not isinstance(name, str) or name == RETURN or given.get(name) is None:
                continue
            text = name in TEXT or (self._kind, path, name) in OF_TEXT
            if name in STREAMS:
                self._whole[text] = given[name].shape[1]
            given[name] = self._cut(given[name], how, text)

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
        """A part of a tensor, or of each of several; of a number of tokens, how many are here."""
        assert self.shares is not None
        if isinstance(how, Count):
            return self._counted(value, how)
        if isinstance(value, (list, tuple)):
            return type(value)(self._cut(*pair, text) for pair in zip(value, how, strict=True))
        if isinstance(how, Joint):
            return self._cut_joint(value, how)
        if isinstance(how, Each):
            single = value.ndim <= how.dim or value.shape[how.dim] == 1
            return value if single else self.shares.cut(value, how.dim, text)
        if how.expected_dims not in (None, value.ndim):
            return value
        return self.shares.cut(value, how.split_dim % value.ndim, text)

    def _cut_joint(self, value: Tensor, how: Joint) -> Tensor:
        """A part of the text's tokens and one of the picture's, in their order."""
        assert self.shares is not None
        order = (how.text_first, not how.text_first)
        parts = torch.split(value, [self._whole[text] for text in order], how.dim)
        pairs = zip(parts, order, strict=True)
        return torch.cat([self.shares.cut(part, how.dim, text) for part, text in pairs], how.dim)

    def _counted(self, count: int, how: Count) -> int:
        """How many of the first tokens of the picture, or of the last ones, are in the part."""
        assert self.shares is not None
        places = torch.arange(self._whole[False])
        among = places < count if how.leading else places >= len(places) - count
        return int(self.shares.cut(among, 0, False).sum())

    def _joined(self, answer: Any, part: Any) -> Any:
        """The whole of a tensor, or of each of several."""
        if isinstance(answer, Tensor):
            assert self.shares is not None
            one = part[0] if isinstance(part, (list, tuple)) else part
            return self.shares.joined(answer, one.gather_dim)
        pairs = zip(answer, part, strict=True)
        return tuple(one if how is None else self._joined(one, how) for one, how in pairs)


def _modules(core: Any, path: str) -> list[Any]:
    """The modules that a path of a plan names; none for the root.

    ``blocks.*`` are all in a list, ``blocks.-1`` is its last one.
    """
    found = [core] if path else []
    for name in path.split(".") if path else ():
        found = [child for one in found for child in _named(one, name)]
    return found


def _named(owner: Any, name: str) -> list[Any]:
    if name == "*":
        return list(owner.children())
    return [list(owner.children())[-1] if name == "-1" else getattr(owner, name)]


def _parameters(module: Any) -> list[str]:
    core = getattr(module, "_orig_mod", module)
    return list(inspect.signature(type(core).forward).parameters)[1:]
