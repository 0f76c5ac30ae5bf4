"""What the tests of sequence parallelism run in every rank of a world: networks of toy size."""

import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from accel.errors import UnsupportedModel
from accel.report import Tally
from accel.seams import places as plans
from accel.seams.denoisers import Call, Denoiser, Result, Row
from parallel import sequence
from parallel.counting import counter
from parallel.mesh import Mesh
from parallel.sequence_parallel import SequenceParallel

ROOT = Path(__file__).resolve().parents[1]
SIDE, FRAMES = 10, 5


def _load() -> Any:
    """The tool that builds a toy of every denoiser (`coverage` is also the name of a package)."""
    spec = importlib.util.spec_from_file_location("accel_toys", ROOT / "tools" / "coverage.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


coverage = _load()
ROWS, TIME = coverage.ROWS, coverage.TIME
noise, ids = coverage.noise, coverage.ids


# Calls of 25 tokens of a picture, or 125 of a clip: neither two processes nor three divide them


def kept(words: int) -> Tensor:
    """A mask of a text: the second row's is shorter."""
    return (torch.arange(words) < torch.tensor([[words], [words - 3]])).long()


def prompted(latents: Callable[[], Tensor], words: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_states": latents(),
        "timestep": TIME,
        "encoder_hidden_states": noise(ROWS, words, 16),
        **more,
    }


def picture(channels: int = 4) -> Tensor:
    return noise(ROWS, channels, SIDE, SIDE)


def clip(channels: int = 4) -> Tensor:
    return noise(ROWS, channels, FRAMES, SIDE, SIDE)


def packed(width: int = 4) -> Tensor:
    return noise(ROWS, 25, width)


def pooled() -> dict[str, Tensor]:
    return {"pooled_projections": noise(ROWS, 16)}


def places(words: int, axes: int = 3) -> dict[str, Tensor]:
    return {"img_ids": ids(25, axes), "txt_ids": ids(words, axes)}


def mask(words: int) -> dict[str, Tensor]:
    return {"encoder_attention_mask": kept(words)}


def ltx2(words: int) -> dict[str, Any]:
    return {
        "hidden_states": noise(ROWS, 20, 4),
        "audio_hidden_states": noise(ROWS, 7, 4),
        "encoder_hidden_states": noise(ROWS, words, 16),
        "audio_encoder_hidden_states": noise(ROWS, words, 16),
        "timestep": noise(ROWS, 20).abs() * 100,
        "audio_timestep": TIME[:, None],
        "encoder_attention_mask": kept(words),
        "audio_encoder_attention_mask": kept(words),
        "num_frames": 5,
        "height": 2,
        "width": 2,
        "audio_num_frames": 7,
    }


def minimax(words: int) -> dict[str, Any]:
    rows = words + 7
    return {
        "hidden_states": noise(ROWS, 4, 16),
        "audio_hidden_states": noise(ROWS, 3, 4),
        "encoder_hidden_states": noise(ROWS, words, 16),
        "timestep": torch.tensor([0.5, 0.25]),
        "timestep_indices": torch.tensor([0] * (words + 4) + [1] * 3),
        "token_tags": torch.tensor([1] * words + [0] * 4 + [2] * 3),
        "position_ids": torch.arange(rows)[:, None].expand(rows, 3),
        "video_indices": torch.arange(words, words + 4),
        "audio_indices": torch.arange(words + 4, rows),
        "text_indices": torch.arange(words),
    }


def remembered() -> dict[str, Any]:
    """The history of Helios, from near to far."""
    return {
        "indices_hidden_states": torch.arange(7, 12).expand(ROWS, FRAMES),
        "latents_history_short": noise(ROWS, 4, 1, SIDE, SIDE),
        "indices_latents_history_short": torch.arange(6, 7).expand(ROWS, 1),
        "latents_history_mid": noise(ROWS, 4, 2, SIDE, SIDE),
        "indices_latents_history_mid": torch.arange(4, 6).expand(ROWS, 2),
        "latents_history_long": noise(ROWS, 4, 4, SIDE, SIDE),
        "indices_latents_history_long": torch.arange(4).expand(ROWS, 4),
    }


def hunyuanvideo15(words: int) -> dict[str, Any]:
    return prompted(
        clip,
        words,
        **mask(words),
        encoder_hidden_states_2=noise(ROWS, 4, 16),
        encoder_attention_mask_2=kept(4),
        image_embeds=noise(ROWS, 5, 16),
    )


def framepack(words: int) -> dict[str, Any]:
    return prompted(
        clip,
        words,
        **mask(words),
        **pooled(),
        image_embeds=noise(ROWS, 5, 16),
        indices_latents=torch.arange(FRAMES),
        latents_clean=noise(ROWS, 4, 1, SIDE, SIDE),
        indices_latents_clean=torch.arange(1),
        latents_history_2x=noise(ROWS, 4, 2, SIDE, SIDE),
        indices_latents_history_2x=torch.arange(2),
        latents_history_4x=noise(ROWS, 4, 4, SIDE, SIDE),
        indices_latents_history_4x=torch.arange(4),
    )


def zimage(words: int) -> dict[str, Any]:
    """Texts of one row that take 32 tokens more, and of one that do not."""
    return {
        "x": [*noise(ROWS, 4, 1, SIDE, SIDE)],
        "t": TIME / 1000,
        "cap_feats": [noise(words, 16), noise(words + 32, 16)],
    }


def chroma(words: int) -> dict[str, Any]:
    whole = torch.cat([kept(words), torch.ones(ROWS, 25, dtype=torch.long)], 1)
    return prompted(packed, words, **places(words), attention_mask=whole.float())


SHAPES = {"img_shapes": [[(1, 5, 5)]] * ROWS}

CALLS: dict[str, Callable[[int], dict[str, Any]]] = {
    "AuraFlowTransformer2DModel": partial(prompted, picture),
    "ChromaTransformer2DModel": chroma,
    "ChronoEditTransformer3DModel": partial(prompted, clip),
    "CogVideoXTransformer3DModel": lambda words: prompted(
        partial(noise, ROWS, FRAMES, 4, SIDE, SIDE),
        words,
        image_rotary_emb=(noise(125, 16), noise(125, 16)),
    ),
    "CogView4Transformer2DModel": lambda words: prompted(
        picture,
        words,
        attention_mask=kept(words),
        original_size=noise(ROWS, 2),
        target_size=noise(ROWS, 2),
        crop_coords=noise(ROWS, 2),
    ),
    "DiTTransformer2DModel": lambda _: {
        "hidden_states": picture(),
        "timestep": TIME.long(),
        "class_labels": torch.tensor([1, 2]),
    },
    "Flux2Transformer2DModel": lambda words: prompted(
        packed, words, **places(words, 4), guidance=torch.ones(ROWS)
    ),
    "FluxTransformer2DModel": lambda words: prompted(packed, words, **places(words), **pooled()),
    "HeliosTransformer3DModel": partial(prompted, clip),
    "HunyuanImageTransformer2DModel": lambda words: prompted(picture, words, **mask(words)),
    "HunyuanVideo15Transformer3DModel": hunyuanvideo15,
    "HunyuanVideoFramepackTransformer3DModel": framepack,
    "HunyuanVideoTransformer3DModel": lambda words: prompted(
        clip, words, **mask(words), **pooled()
    ),
    "LTX2VideoTransformer3DModel": ltx2,
    "LTXVideoTransformer3DModel": lambda words: prompted(
        partial(noise, ROWS, 20, 4), words, **mask(words), num_frames=5, height=2, width=2
    ),
    "Lumina2Transformer2DModel": lambda words: prompted(picture, words, **mask(words)),
    "MiniMaxH3Transformer3DModel": minimax,
    "MochiTransformer3DModel": lambda words: prompted(
        clip, words, encoder_attention_mask=kept(words).bool()
    ),
    "PixArtTransformer2DModel": lambda words: prompted(
        picture,
        words,
        **mask(words),
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
    ),
    "QwenImageTransformer2DModel": lambda words: prompted(
        packed, words, **SHAPES, encoder_hidden_states_mask=kept(words)
    ),
    "SD3Transformer2DModel": lambda words: prompted(picture, words, **pooled()),
    "WanTransformer3DModel": partial(prompted, clip),
    "WanVACETransformer3DModel": lambda words: prompted(
        clip, words, control_hidden_states=noise(ROWS, 8, FRAMES, SIDE, SIDE)
    ),
    "ZImageTransformer2DModel": zimage,
}
"""Arguments by class, for texts of so many tokens."""

SETTINGS: dict[str, dict[str, Any]] = {
    "DiTTransformer2DModel": {"sample_size": SIDE},
    "CogVideoXTransformer3DModel": {"use_rotary_positional_embeddings": True},
    "ZImageTransformer2DModel": {"axes_lens": [128, 32, 32]},
}
"""What is other in the toys that these calls are for."""


@dataclass(frozen=True)
class Other:
    """Another kind of a network.

    Attributes:
        name: Its class.
        settings: What is other in its toy.
        call: What is other in its call.
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    call: Callable[[], dict[str, Any]] = dict


OTHERS = {
    "ids by sample": Other(
        "Flux2Transformer2DModel", call=lambda: {"img_ids": ids(25, 4).expand(ROWS, 25, 4)}
    ),
    "first frame kept": Other(
        "HunyuanVideoTransformer3DModel", {"image_condition_type": "token_replace"}
    ),
    "history": Other(
        "HeliosTransformer3DModel",
        {
            "has_multi_term_memory_patch": True,
            "guidance_cross_attn": True,
            "is_amplify_history": True,
            "zero_history_timestep": True,
        },
        remembered,
    ),
    "two pictures": Other(
        "QwenImageTransformer2DModel",
        {"zero_cond_t": True},
        lambda: {"img_shapes": [[(1, 3, 5), (1, 2, 5)]] * ROWS},
    ),
    "times of tokens": Other(
        "WanTransformer3DModel", call=lambda: {"timestep": noise(ROWS, 125).abs() * 100}
    ),
    "what is added behind blocks": Other(
        "ZImageTransformer2DModel",
        call=lambda: {"controlnet_block_samples": {1: noise(ROWS, 96, 32)}},
    ),
    "angles by head": Other("LTX2VideoTransformer3DModel", {"rope_type": "split"}),
}
"""Other kinds of these networks, by what is other."""


@dataclass(frozen=True)
class Shared:
    """What one rank saw of a toy.

    Attributes:
        errors: Largest differences to one process, in units of the largest number, call by call.
        sent: What it told.
    """

    errors: list[float]
    sent: str


@torch.no_grad()
def toy(name: str, method: SequenceParallel, lengths: Sequence[int] = (7, 5, 7)) -> Shared:
    """Call a toy, its tokens shared out, with texts of these lengths in turns: each a branch."""
    network, give = _built(name)
    alone = [_flat(network(**give(words), return_dict=False)) for words in lengths]
    tally, errors = Tally("test"), []
    with _shared_out(network, method, tally) as layer:
        for words, stock in zip(lengths, alone, strict=True):
            rows = tuple(Row(str(words), sample) for sample in range(ROWS))
            call = Call(layer.denoiser, None, rows, give(words))
            found = _flat(layer.around(call, partial(_inner, network)).native)
            errors.append(float((found - stock).abs().max() / stock.abs().max()))
    assert all(
        torch.equal(_flat(network(**give(words), return_dict=False)), stock)
        for words, stock in zip(lengths, alone, strict=True)
    )
    return Shared(errors, str(tally.change))


def _built(name: str) -> tuple[Any, Callable[[int], dict[str, Any]]]:
    other = OTHERS.get(name, Other(name))
    settings = SETTINGS.get(other.name, {}) | other.settings
    network = coverage.build(other.name, **settings)
    return network, lambda words: CALLS[other.name](words) | other.call()


def _inner(network: Any, call: Call) -> Result:
    native = network(**call.arguments, return_dict=False)
    return Result(native[0], (True,) * ROWS, native)


def _flat(value: Any) -> Tensor:
    return torch.cat([one.flatten() for one in coverage._tensors(value)])


@contextmanager
def _shared_out(network: Any, method: SequenceParallel, tally: Tally) -> Iterator[Any]:
    """What is put around the calls of a network."""
    mesh, layers, undos = Mesh(), [], []
    axes = [mesh.claim(name, degree, "test") for name, degree in method.degrees().items()]
    denoiser = Denoiser("transformer", network)
    site = SimpleNamespace(around=lambda _, layer: layers.append(layer) or (lambda: None))
    undos = list(sequence.Sequence(denoiser, axes, tally).attach(site))
    try:
        yield SimpleNamespace(denoiser=denoiser, around=layers[0])
    finally:
        for undo in reversed(undos):
            undo()


# Attention under masks


def hiding(seen: Tensor) -> Tensor:
    """What is added to scores."""
    return torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)


def seen_by_some(seen: Tensor) -> Tensor | None:
    """None where this process has nothing to hide."""
    return None if seen.all() else seen[:, None, None, :]


MASKS: dict[str, Callable[[Tensor], Tensor | None]] = {
    "none": lambda _: None,
    "keys": lambda seen: seen[:, None, None, :],
    "keys, added": lambda seen: hiding(seen)[:, None, None, :],
    "keys, weighed": lambda seen: torch.where(seen, 0.5, -2.0)[:, None, None, :],
    "keys, for all samples": lambda seen: seen[:1, None, None, :],
    "keys, two dimensions": lambda seen: seen[:1].expand(seen.shape[1], -1),
    "keys, or none": seen_by_some,
    "keys, repeated": lambda seen: seen[:, None, None, :].repeat(1, 1, seen.shape[1], 1),
    "keys, repeated, added": lambda seen: hiding(seen)[:, None, None, :].repeat(
        1, 1, seen.shape[1], 1
    ),
    "both": lambda seen: seen[:, None, None, :] & seen[:, None, :, None],
    "both, added": lambda seen: seen[:, None, None, :].float() * seen[:, None, :, None].float(),
}
"""Masks of own tokens, as networks make them of those that are seen ``[B, S]``."""

STRANGE: dict[str, Callable[[Tensor], Tensor]] = {
    "of all tokens": lambda seen: seen.new_ones(len(seen), 1, 1, 40),
    "in order": lambda seen: seen.new_ones(seen.shape[1], seen.shape[1]).tril(),
    "by head": lambda seen: seen[:, None, None, :].expand(-1, 3, -1, -1),
    "a band": lambda seen: torch.ones(seen.shape[1], seen.shape[1]).tril(1).triu(-1).bool(),
}
"""Masks that are not of own tokens, or not of tokens."""


class Attention(nn.Module):
    """An attention under a mask that it makes, of heads that are 8 wide.

    Args:
        heads: How many.
        groups: How many of them share one of keys and values.
    """

    def __init__(self, heads: int, groups: int) -> None:
        super().__init__()
        width = 8 * heads
        self.to_q = nn.Linear(width, width)
        self.to_k, self.to_v = (nn.Linear(width, width // groups) for _ in range(2))

    def forward(self, hidden_states: Tensor, seen: Tensor, form: str) -> Tensor:
        heads = [
            to(hidden_states).unflatten(2, (-1, 8)).transpose(1, 2)
            for to in (self.to_q, self.to_k, self.to_v)
        ]
        mask = (MASKS | STRANGE)[form](seen)
        found = nn.functional.scaled_dot_product_attention(
            *heads, attn_mask=mask, enable_gqa=heads[1].shape != heads[0].shape
        )
        return found.transpose(1, 2).flatten(2)


class Block(nn.Module):
    """One attention."""

    def __init__(self, heads: int, groups: int) -> None:
        super().__init__()
        self.attn = Attention(heads, groups)

    def forward(self, hidden_states: Tensor, seen: Tensor, form: str) -> Tensor:
        return self.attn(hidden_states, seen, form)


class Network(nn.Module):
    """One block, of whose mask each process has its part."""

    _cp_plan: ClassVar[dict[str, Any]] = {
        "": {"hidden_states": plans.TAKEN},
        "blocks.0": {"seen": plans.tokens(1, 2)},
        "proj_out": plans.WHOLE,
    }

    def __init__(self, heads: int, groups: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(heads, groups)])
        self.proj_out = nn.Identity()

    def forward(
        self, hidden_states: Tensor, seen: Tensor, form: str, return_dict: bool = False
    ) -> tuple[Tensor]:
        return (self.proj_out(self.blocks[0](hidden_states, seen, form)),)


@torch.no_grad()
def attended(
    form: str,
    seen: Tensor,
    method: SequenceParallel,
    before: str = "",
    *,
    heads: int = 3,
    groups: int = 1,
) -> Any:
    """What an attention under a mask answers alone, and shared out: ``[B, S, D]`` each.

    Args:
        form: Of the mask.
        seen: ``[B, S]``.
        method: Shares it out.
        before: Form of the mask in an earlier step.
        heads: Of the attention.
        groups: How many of them share one of keys and values.
    """
    torch.manual_seed(0)
    network = Network(heads, groups)
    given = {"hidden_states": noise(*seen.shape, 8 * heads) * 3, "seen": seen, "form": form}
    rows = tuple(Row("cond", sample) for sample in range(len(seen)))
    with _shared_out(network, method, Tally("test")) as layer:
        for each in (before, form) if before else (form,):
            call = Call(layer.denoiser, None, rows, given | {"form": each})
            found = layer.around(call, partial(_inner, network)).native[0]
    return network(**given)[0], found


@torch.no_grad()
def shares(heads: int, tokens: int, method: SequenceParallel) -> tuple[int, int]:
    """Operations of an attention and the layers about it: alone, and of this process."""
    network = Network(heads, 1)
    given = {"hidden_states": noise(1, tokens, 8 * heads), "form": "none"}
    given["seen"] = torch.ones(1, tokens, dtype=torch.bool)
    with counter() as alone:
        network(**given)
    with _shared_out(network, method, Tally("test")) as layer, counter() as own:
        call = Call(layer.denoiser, None, (Row("cond", 0),), given)
        layer.around(call, partial(_inner, network))
    return alone.get_total_flops(), own.get_total_flops()


@torch.no_grad()
def with_references(method: SequenceParallel) -> None:
    """Flux 2 with pictures of reference kept in a cache."""
    network, give = _built("Flux2Transformer2DModel")
    with _shared_out(network, method, Tally("test")) as layer:
        rows = tuple(Row("cond", sample) for sample in range(ROWS))
        given = give(7) | {"kv_cache_mode": "extract", "num_ref_tokens": 4}
        layer.around(Call(layer.denoiser, None, rows, given), partial(_inner, network))


def refusal(job: Callable[..., Any], *args: Any) -> str:
    """With which words a job is refused; in every rank, so that the world goes on."""
    try:
        job(*args)
    except UnsupportedModel as error:
        return str(error)
    return ""
