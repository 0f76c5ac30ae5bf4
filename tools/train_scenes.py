"""Train the bundled models on procedural scenes: `train_scenes.py [options] STAGE`.

Stages hand over through a run folder: `vae` writes `vae.pt`, `cache` encodes training pictures
to `latents-*.pt`, `denoiser` trains denoiser and text encoders to `denoiser.pt`, and `export`
writes the pipeline folder; `adopt` starts a run from such a folder. Every stage resumes where its
checkpoint left off. `oracle` trains the classifier that reads pictures, `clip-oracle` the one that
reads motion. On a CPU, pin the process to cores
and set `--threads` to their number.
"""

import contextlib
import json
import re
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from diffusers import DiffusionPipeline
from PIL import Image
from rich.progress import track
from scenes_models import FAMILIES, Family, Form
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from accel.scenes import ATTRIBUTES, HELD_OUT, MOTIONS, Scene, clip, clip_scene, picture, scene
from accel.scenes.motion import FRAMES, ClipOracle, MotionReader, small
from accel.scenes.motion import caption_accuracy as clip_accuracy
from accel.scenes.motion import load as load_clip_oracle
from accel.scenes.oracle import Accuracy, Oracle, caption_accuracy, pixels

app = typer.Typer(add_completion=False, no_args_is_help=True)

Steps = Annotated[int, typer.Option("--steps", help="optimiser steps in all")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What every stage needs to know: the family, where its run lies, and the machine."""

    family: Family
    run: Path
    device: str
    bf16: bool
    seed: int

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The precision of forward passes."""
        return torch.autocast(self.device, torch.bfloat16, enabled=self.bf16)


@app.callback()
def setting(
    context: typer.Context,
    family: Annotated[str, typer.Option(help=", ".join(FAMILIES))] = "scenes-flux",
    run: Annotated[Path | None, typer.Option(help="folder of checkpoints and latents")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    threads: Annotated[int, typer.Option(help="torch threads on a CPU")] = 1,
    bf16: Annotated[
        bool,
        typer.Option(help="slower than float32 on a CPU without avx512_bf16 or amx"),
    ] = True,
    seed: int = 0,
) -> None:
    """Train the bundled models on procedural scenes."""
    if family not in FAMILIES:
        raise typer.BadParameter(f"no family {family}: there are {', '.join(FAMILIES)}")
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    context.obj = Setting(
        family=FAMILIES[family],
        run=run or Path("runs") / family,
        device=device,
        bf16=bf16,
        seed=seed,
    )


BIG_SEEDS = 500_000
"""Training seeds from here on are rendered at 128 px, those below at 64 px."""


def _attention(device: str, form: Form) -> contextlib.AbstractContextManager[Any]:
    """On a CPU the plain form of attention trains short sequences a fifth faster or more."""
    if device == "cpu" and form.size <= 64 and form.frames <= 1:
        return sdpa_kernel(SDPBackend.MATH)
    return contextlib.nullcontext()


def _save(state: dict[str, Any], path: Path) -> None:
    """Write a checkpoint so that a kill at any moment leaves a whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    torch.save(state, part)
    part.replace(path)


def _track(steps: range, label: str) -> Iterable[int]:
    """Show a progress bar while going through the steps, if a terminal is there to show it."""
    return track(steps, label, disable=not sys.stdout.isatty())


def _say(**values: Any) -> None:
    shown = (f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
    print(time.strftime("%H:%M:%S"), *shown, flush=True)


@dataclass(slots=True)
class Schedule:
    """Learning rate: a warm-up, a plateau, and a linear descent over the last part."""

    peak: float
    total: int
    warmup: int = 200
    descent: float = 0.4

    def at(self, step: int) -> float:
        """Learning rate of a step."""
        rise = min(1.0, (step + 1) / self.warmup)
        left = (self.total - step) / max(1.0, self.descent * self.total)
        return self.peak * min(rise, max(0.02, min(1.0, left)))


@dataclass(slots=True)
class Average:
    """Exponential moving average of parameters, with a warm-up of its memory."""

    decay: float
    weights: dict[str, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def update(self, modules: dict[str, nn.Module], step: int) -> None:
        """Move towards the modules' weights."""
        keep = min(self.decay, (1 + step) / (10 + step))
        for prefix, module in modules.items():
            for name, value in module.state_dict().items():
                key = f"{prefix}.{name}"
                if key not in self.weights:
                    self.weights[key] = value.detach().clone()
                elif value.is_floating_point():
                    self.weights[key].lerp_(value.float(), 1 - keep)

    def of(self, prefix: str) -> dict[str, Tensor]:
        """Averaged state of one module."""
        start = f"{prefix}."
        return {k[len(start) :]: v for k, v in self.weights.items() if k.startswith(start)}


@dataclass(frozen=True, slots=True)
class Optimizers:
    """Optimisers that step together, each for its own parameters."""

    each: dict[str, torch.optim.Optimizer]

    @classmethod
    def of(cls, modules: dict[str, nn.Module]) -> "Optimizers":
        """Muon for the matrices within networks, AdamW for all else, at one learning rate.

        All else is vectors, convolutions, what looks words up and what writes the answer.
        """
        matrices, others = [], []
        for name, value in (each for m in modules.values() for each in m.named_parameters()):
            inner = value.ndim == 2 and not re.search("embed|shared|relative|proj_out", name)
            (matrices if inner else others).append(value)
        muon = torch.optim.Muon(
            matrices, lr=1e-3, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
        )
        return cls({"muon": muon, "adamw": _adamw(others)})

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of all of them."""
        return [group for one in self.each.values() for group in one.param_groups]

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for one in self.each.values():
            one.zero_grad(set_to_none=True)

    def step(self) -> None:
        """Change all parameters."""
        for one in self.each.values():
            one.step()

    def state_dict(self) -> dict[str, Any]:
        """Their states by name."""
        return {name: one.state_dict() for name, one in self.each.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over their states."""
        for name, one in self.each.items():
            one.load_state_dict(state[name])


def _step(loss: Tensor, optimizer: torch.optim.Optimizer | Optimizers, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad()
    loss.backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    torch.nn.utils.clip_grad_norm_(parameters, 1.0, error_if_nonfinite=True)
    optimizer.step()


def _adamw(parameters: Iterable[nn.Parameter]) -> torch.optim.AdamW:
    learnt = [parameter for parameter in parameters if parameter.requires_grad]
    return torch.optim.AdamW(learnt, lr=1e-3, betas=(0.9, 0.97), weight_decay=0.01, foreach=True)


def _pixels(pictures: np.ndarray) -> Tensor:
    """uint8 [..., H, W, 3] to float [-1, 1] with channels first (and frames second)."""
    tensor = torch.from_numpy(pictures).float() / 127.5 - 1.0
    order = (0, 3, 1, 2) if tensor.ndim == 4 else (0, 4, 1, 2, 3)
    return tensor.permute(*order)


WHOLE = 17
"""Frames of a whole clip."""


def _render(seed: int, form: Form) -> np.ndarray:
    """A picture, or the first frames of a clip."""
    if not form.frames:
        return picture(scene(seed), form.size)
    told = clip_scene(seed)
    moments = [i / (WHOLE - 1) for i in range(form.frames)]
    return np.stack([picture(told, form.size, moment) for moment in moments])


def _store(family: Family, count: int) -> list[np.ndarray]:
    """Training pictures of every size in turn, or whole clips."""
    forms = family.forms[-1:] if family.clips else family.forms
    seeds = _track(range(count), "rendering")
    return [_render(seed, forms[seed % len(forms)]) for seed in seeds]


def _crop(whole: np.ndarray, edge: int, rng: np.random.Generator) -> np.ndarray:
    y, x = rng.integers(0, np.array(whole.shape[-3:-1]) - edge + 1)
    return whole[..., y : y + edge, x : x + edge, :]


def _stretch(whole: np.ndarray, frames: int, rng: np.random.Generator) -> np.ndarray:
    start = int(rng.integers(0, len(whole) - frames + 1))
    return whole[start : start + frames]


LENGTHS = (1, 9, WHOLE)
"""Frames of a crop of a clip; the autoencoder is causal and takes 4k + 1 of them.

One that has seen nine frames at most drifts in colour over the last ones of a whole clip.
"""
EDGES = (32, 48)
"""Edges of common crops and of the large ones that end the training, in px.

On a CPU, weight gradients of `conv3d` in bfloat16 are wrong from a width of 56 px on (not a
number at 64 px with 24 or 32 channels; torch 2.13 with oneDNN), so that no crop is larger.
"""


def _crops(
    family: Family, store: list[np.ndarray], count: int, rng: np.random.Generator, large: bool
) -> Tensor:
    """Random crops: `count` pictures, or short clips of about as many frames, or whole ones."""
    edge, frames = EDGES[large], 1
    if family.clips:
        frames = len(store[0]) if large else int(rng.choice(LENGTHS))
    chosen = [store[row] for row in rng.integers(len(store), size=max(1, count // frames))]
    if family.clips:
        chosen = [_stretch(whole, frames, rng) for whole in chosen]
    return _pixels(np.stack([_crop(whole, edge, rng) for whole in chosen]))


def _edges(pixels: Tensor) -> tuple[Tensor, Tensor]:
    return pixels.diff(dim=-1), pixels.diff(dim=-2)


def _halved(values: Tensor) -> Tensor:
    """Half the height and width, of pictures or of every frame of clips."""
    factors = (1.0,) * (values.ndim - 4) + (0.5, 0.5)
    return nn.functional.interpolate(values, scale_factor=factors, mode="area")


def _vae_loss(vae: Any, pixels: Tensor, half: bool, kl: float) -> Tensor:
    """Pixels, their edges, and a prior; `half` also asks that small latents decode small.

    The last makes the latents smooth, which small denoisers learn faster.
    """
    posterior = vae.encode(pixels).latent_dist
    latents = posterior.sample()
    if half:
        latents, pixels = _halved(latents), _halved(pixels)
    decoded = vae.decode(latents).sample.float()
    loss = (decoded - pixels).abs().mean() + 2 * (decoded - pixels).square().mean()
    for ours, theirs in zip(_edges(decoded), _edges(pixels), strict=True):
        loss = loss + 0.5 * (ours - theirs).abs().mean()
    prior = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar)
    return loss + kl * prior.float().mean()


def _psnr(vae: Any, at: Setting) -> float:
    """Mean PSNR of the round trip over a few held-out pictures."""
    count = 4 if at.family.clips else 32
    truth = np.stack([_render(HELD_OUT[i], at.family.forms[-1]) for i in range(count)])
    with torch.no_grad(), at.autocast():
        pixels = _pixels(truth).to(at.device)
        back = vae.decode(vae.encode(pixels).latent_dist.mode()).sample.float()
    error = (back.clamp(-1, 1) - pixels).square().flatten(1).mean(1) / 4
    return float((-10 * error.log10()).mean())


def _layout(model: nn.Module, device: str) -> nn.Module:
    """Channels last, which trains a third faster on a CPU, in pictures and in clips."""
    forms = {4: torch.channels_last, 5: torch.channels_last_3d}
    for parameter in model.parameters():
        if parameter.ndim in forms:
            parameter.data = parameter.data.to(memory_format=forms[parameter.ndim])
    return model.to(device)


@app.command()
def vae(
    context: typer.Context,
    steps: Steps = 1400,
    batch: Annotated[int, typer.Option(help="pictures or frames in a step")] = 32,
    rate: float = 1.5e-3,
    kl: Annotated[float, typer.Option(help="weight of the latents' prior")] = 5e-4,
    pictures: Annotated[int, typer.Option(help="renders to draw crops from")] = 4000,
    large_after: Annotated[int, typer.Option(help="large crops of all frames from here")] = 10**9,
    decoder_only: Annotated[bool, typer.Option(help="polish; latents stay as cached")] = False,
) -> None:
    """Train the autoencoder, or polish its decoder once latents are cached."""
    at: Setting = context.obj
    kind, rng = at.family, np.random.default_rng(at.seed)
    model = _layout(kind.vae(), at.device)
    path = at.run / ("decoder.pt" if decoder_only else "vae.pt")
    average, first = Average(0.998), 0
    known = path if path.exists() else at.run / "vae.pt"
    if known.exists():
        state = torch.load(known, weights_only=True)
        average.weights = state["average"]
        model.load_state_dict(state["model"] if known == path else average.of("vae"))
        first = state["step"] if known == path else 0
    if decoder_only:
        model.encoder.requires_grad_(False)
    store = _store(kind, pictures)
    optimizer, plan = _adamw(model.parameters()), Schedule(rate, steps)
    start = time.time()
    for step in _track(range(first, steps), "vae"):
        pixels = _crops(kind, store, batch, rng, step >= large_after).to(at.device)
        half = not decoder_only and bool(rng.random() < 0.2)
        with at.autocast():
            loss = _vae_loss(model, pixels, half, kl)
        _step(loss, optimizer, plan.at(step))
        average.update({"vae": model}, step)
        done = step + 1
        if done % 100 == 0 or done == steps:
            state = {"step": done, "model": model.state_dict(), "average": average.weights}
            _save(state, path)
            _say(step=done, loss=loss.item(), pace=(done - first) / (time.time() - start))
        if done % 500 == 0 or done == steps:
            judge = _layout(kind.vae(), at.device)
            judge.load_state_dict(average.of("vae"))
            _say(step=done, psnr=_psnr(judge, at))


def _load_vae(family: Family, run: Path, device: str) -> Any:
    model = family.vae()
    state = torch.load(run / "vae.pt", weights_only=True)
    model.load_state_dict({k.removeprefix("vae."): v for k, v in state["average"].items()})
    if (run / "decoder.pt").exists():
        decoder = torch.load(run / "decoder.pt", weights_only=True)["average"]
        decoder = {k: v for k, v in decoder.items() if not k.startswith("vae.encoder")}
        model.load_state_dict({k.removeprefix("vae."): v for k, v in decoder.items()}, strict=False)
    return _layout(model.eval().requires_grad_(False), device)


@app.command()
def cache(
    context: typer.Context,
    form: Annotated[str, typer.Option("--size", help="64 or 128; of clips, 64x1 or 64x17")] = "64",
    count: Annotated[int, typer.Option(help="pictures in this part")] = 24_000,
    begin: Annotated[int, typer.Option(help="first picture of this part")] = 0,
    batch: int = 32,
) -> None:
    """Encode training pictures once: `latents-SIZE-BEGIN.pt`, seeds in their order."""
    at: Setting = context.obj
    known = {known.name: known for known in at.family.forms}
    if form not in known:
        raise typer.BadParameter(f"{at.family.name} learns from sizes {', '.join(known)}")
    model, shape = _load_vae(at.family, at.run, at.device), known[form]
    base = begin + (BIG_SEEDS if shape.size > 64 else 0)
    seeds = range(base, base + count)
    parts = []
    for low in _track(range(0, count, batch), f"encoding {form}"):
        chunk = seeds[low : low + batch]
        pixels = _pixels(np.stack([_render(s, shape) for s in chunk])).to(at.device)
        with torch.no_grad(), at.autocast():
            parts.append(model.encode(pixels).latent_dist.mode().bfloat16().cpu())
        if low % (batch * 50) == 0:
            _say(size=form, encoded=low + len(chunk))
    latents = torch.cat(parts).contiguous()
    _save({"seeds": base, "latents": latents}, at.run / f"latents-{form}-{begin}.pt")


@dataclass(slots=True)
class Latents:
    """Encoded pictures of one form with their seeds; `draw` gives a batch and its captions.

    `kinds` are the rows by what moves: of each kind equally many are drawn. Clouds drift in a
    quarter of the clips and boats sail in a twelfth, and both are learnt last.
    """

    family: Family
    values: Tensor
    seeds: list[int]
    kinds: list[list[int]]

    @classmethod
    def read(cls, family: Family, run: Path, form: Form) -> "Latents":
        """Read all parts that `cache` has written for a form."""
        files = sorted(run.glob(f"latents-{form.name}-*.pt"))
        parts = [torch.load(path, weights_only=True) for path in files]
        seeds = [part["seeds"] + i for part in parts for i in range(len(part["latents"]))]
        kinds: dict[str, list[int]] = {}
        for row, seed in enumerate(seeds):
            kinds.setdefault(clip_scene(seed).motion.mover if family.clips else "", []).append(row)
        values = torch.cat([part["latents"] for part in parts])
        return cls(family, values, seeds, list(kinds.values()))

    def draw(self, count: int, rng: np.random.Generator) -> tuple[Tensor, list[str]]:
        """A batch of latents and captions; one caption in ten is empty, for guidance.

        Half of the others are the longest of four wordings: what a caption leaves out (clouds,
        sides) it does not teach.
        """
        tell = clip_scene if self.family.clips else scene
        kinds = [self.kinds[kind] for kind in rng.integers(len(self.kinds), size=count)]
        rows = np.array([rng.choice(kind) for kind in kinds])
        captions = []
        for row in rows:
            wordings = rng.integers(16, size=4 if rng.random() < 0.5 else 1)
            told = [tell(self.seeds[row], int(wording)).caption for wording in wordings]
            captions.append("" if rng.random() < 0.1 else max(told, key=len))
        return self.values[torch.from_numpy(rows)].float(), captions


def _cached(family: Family, run: Path) -> list[Form]:
    """The forms that `cache` has written, cheap ones first."""
    return [form for form in family.forms if any(run.glob(f"latents-{form.name}-*.pt"))]


def _normalise(family: Family, model: Any, values: Tensor) -> None:
    """Write the latents' mean and spread into the autoencoder's config."""
    values = values[:4000].float()
    if family.clips:
        dims = (0, 2, 3, 4)
        model.register_to_config(
            latents_mean=values.mean(dims).tolist(), latents_std=values.std(dims).tolist()
        )
        return
    shift = float(values.mean()) if family.name == "scenes-flux" else 0.0
    scale = 1.0 / float((values - shift).square().mean().sqrt())
    model.register_to_config(shift_factor=shift, scaling_factor=scale)


def _scaled(family: Family, model: Any, latents: Tensor) -> Tensor:
    config = model.config
    if family.clips:
        mean, std = (
            torch.tensor(v, device=latents.device).view(1, -1, 1, 1, 1)
            for v in (config.latents_mean, config.latents_std)
        )
        return (latents - mean) / std
    return (latents - (config.shift_factor or 0.0)) * config.scaling_factor


def _pipeline(family: Family, run: Path, seed: int) -> Any:
    """The pipeline with a trained autoencoder and fresh other parts."""
    torch.manual_seed(seed)
    model = _load_vae(family, run, "cpu") if (run / "vae.pt").exists() else family.vae()
    forms = _cached(family, run)
    if forms:
        form = forms[-1] if family.clips else forms[0]
        _normalise(family, model, Latents.read(family, run, form).values)
    pipe = family.build(model)
    _same_words(pipe, run)
    pipe.set_progress_bar_config(disable=True)
    return pipe


TOKENIZERS = ("tokenizer", "tokenizer_2")


def _same_words(pipe: Any, run: Path) -> None:
    """Keep the tokenizers of a run, or take over those that it has.

    Byte-pair training breaks ties at random, so that a comma has another number in each process.
    """
    for name in TOKENIZERS:
        words, kept = getattr(pipe, name, None), run / name
        if words is None:
            continue
        if kept.exists():
            setattr(pipe, name, type(words).from_pretrained(kept))
        else:
            words.save_pretrained(kept)


def _restore(family: Family, pipe: Any, weights: dict[str, Tensor]) -> None:
    for prefix, module in family.modules(pipe):
        module.load_state_dict(Average(0.0, weights).of(prefix))


def _sheet(at: Setting, pipe: Any, path: Path, form: Form) -> None:
    """Draw sixteen held-out captions, or four clips, as one picture."""
    family = at.family
    scenes = [(clip_scene if family.clips else scene)(seed) for seed in HELD_OUT[:16]]
    captions = [s.caption for s in scenes[: 4 if form.frames > 1 else 16]]
    options = family.call | {"height": form.size, "width": form.size, "output_type": "np"}
    options |= {"num_frames": form.frames} if form.frames else {}
    options["negative_prompt"] = [""] * len(captions)
    with torch.no_grad(), at.autocast():
        made = pipe(captions, generator=torch.Generator(at.device).manual_seed(0), **options)
    shown = made.frames[:, ::4] if family.clips else made.images
    tiles = (np.asarray(shown, np.float32).clip(0, 1) * 255).astype(np.uint8)
    columns = tiles.shape[1] if form.frames > 1 else 8
    tiles = tiles.reshape(-1, columns, *tiles.shape[-3:])
    rows = [np.concatenate(list(row), axis=1) for row in tiles]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(rows)).save(path)


WAYS = re.compile(r"(?<=to the )(left|right)\b")
"""Where a clip's mover goes."""

SIDES = re.compile(r"(?<!to the )\b(left|right)\b")
"""Where things stand."""

OTHER = {"left": "right", "right": "left"}


def _tilted(latents: Tensor, captions: list[str]) -> Tensor:
    """Latents [B, C, …, W] that rise towards the side that a caption names first.

    A network that tells neither left from right in the picture nor the two words has nothing to
    gain from learning one of both: it does not leave that saddle in ten thousand steps. Here each
    word has channels of its own that rise towards its side, so that there is a slope on average,
    which it learns first, and then which word brings it.
    """
    channels, width = latents.shape[1], latents.shape[-1]
    ramp = torch.linspace(1.0, -1.0, width, device=latents.device)
    first = torch.arange(channels, device=latents.device) < channels // 2
    slopes = {"left": first[:, None] * ramp, "right": ~first[:, None] * -ramp}
    nothing = torch.zeros_like(slopes["left"])
    named = [SIDES.search(caption) for caption in captions]
    tilt = torch.stack([nothing if side is None else slopes[side[0]] for side in named])
    return latents + tilt.view(len(captions), channels, *[1] * (latents.ndim - 3), width)


PACE = {"slowly": 1, "fast": 2}
"""Latents by which a clip drifts from one latent frame to the next, in a lesson."""


def _drifting(latents: Tensor, captions: list[str]) -> Tensor:
    """Clips [B, C, F, H, W] whose second latent frame drifts as a caption tells, all of it.

    Clouds that drift are a saddle as sides are: who does not look where the words point learns
    nothing from them, and only the sky of a third of the clips would tell. The first latent frame
    stays: it is encoded alone, and looks different.
    """
    clips = latents.clone()
    for one, caption in zip(clips, captions, strict=True):
        told = re.search(r"\b(slowly|fast) to the (left|right)\b", caption)
        if told is None:
            continue
        shift = PACE[told[1]] * (1 if told[2] == "right" else -1)
        for frame in range(2, one.shape[1]):
            one[:, frame] = one[:, 1].roll(shift * (frame - 1), -1)
    return clips


def _lesson(latents: Tensor, captions: list[str]) -> tuple[Tensor, list[str]]:
    """What is learnt from in a lesson: pictures tilt, clips drift.

    Of a clip that drifts only the motion is told, so that what whole captions say stays true.
    """
    if latents.ndim == 5 and latents.shape[2] > 1:
        return _drifting(latents, captions), [told.rpartition(", ")[2] for told in captions]
    return _tilted(latents, captions), captions


@dataclass(slots=True)
class Training:
    """Denoiser and text encoders in training, with all that a checkpoint holds."""

    at: Setting
    pipe: Any
    modules: dict[str, nn.Module]
    optimizer: Optimizers
    average: Average
    first: int = 0

    @classmethod
    def start(cls, at: Setting) -> "Training":
        """Start afresh, or where the checkpoint left off."""
        pipe = _pipeline(at.family, at.run, at.seed).to(at.device)
        modules = dict(at.family.modules(pipe))
        for module in modules.values():
            module.train().requires_grad_(True)
        training = cls(at, pipe, modules, Optimizers.of(modules), Average(0.998))
        if training.path.exists():
            training.resume(torch.load(training.path, weights_only=True))
        return training

    @property
    def path(self) -> Path:
        """The checkpoint."""
        return self.at.run / "denoiser.pt"

    def resume(self, state: dict[str, Any]) -> None:
        """Take over a checkpoint; one that `adopt` wrote has no optimiser yet."""
        self.first, self.average.weights = state["step"], state["average"]
        _restore(self.at.family, self.pipe, state["weights"])
        if "optimizer" in state:
            self.optimizer.load_state_dict(state["optimizer"])

    def save(self, done: int) -> None:
        """Write a checkpoint."""
        weights = {
            f"{p}.{k}": v for p, m in self.modules.items() for k, v in m.state_dict().items()
        }
        state = {"step": done, "weights": weights, "average": self.average.weights}
        _save(state | {"optimizer": self.optimizer.state_dict()}, self.path)

    def loss(
        self, latents: Tensor, captions: list[str], form: Form, *, lesson: bool = False
    ) -> Tensor:
        """Loss of a batch of cached latents; in a lesson, of what `_lesson` makes of them."""
        latents = _scaled(self.at.family, self.pipe.vae, latents.to(self.at.device))
        if lesson:
            latents, captions = _lesson(latents, captions)
        with self.at.autocast(), _attention(self.at.device, form):
            return self.at.family.loss(self.pipe, latents, captions)

    def draw(self, done: int, form: Form) -> None:
        """Draw a sheet with the averaged weights, leaving the random state as it was."""
        with torch.random.fork_rng():
            judge = _pipeline(self.at.family, self.at.run, self.at.seed)
            _restore(self.at.family, judge, self.average.weights)
            path = self.at.run / "sheets" / f"{done:06d}.png"
            _sheet(self.at, judge.to(self.at.device), path, form)


@app.command()
def denoiser(
    context: typer.Context,
    steps: Steps = 7600,
    batch: Annotated[
        tuple[int, int],
        typer.Option(
            help="samples in a small step (64 px, first frames) and a big one (128, clips)"
        ),
    ] = (32, 8),
    big_after: Annotated[int, typer.Option(help="big ones join after this step")] = 3400,
    big_share: Annotated[float, typer.Option(help="share of big steps from then on")] = 0.75,
    rate: float = 1.2e-3,
    compiled: Annotated[
        bool,
        typer.Option("--compile", help="minutes at the start, then faster steps"),
    ] = False,
    lessons: Annotated[
        tuple[int, float],
        typer.Option(
            help="before this step, this share of batches (not of first frames) are lessons, in "
            "which pictures tilt and clips drift as captions tell"
        ),
    ] = (0, 1.0),
) -> None:
    """Train denoiser and text encoders together on cached latents."""
    at: Setting = context.obj
    training, plan = Training.start(at), Schedule(rate, steps)
    if compiled:
        next(iter(training.modules.values())).compile(dynamic=False)
    first, known = training.first, _cached(at.family, at.run)
    if not known:
        raise typer.BadParameter(f"{at.run} holds no latents: run the stage `cache` first")
    stores = {form: Latents.read(at.family, at.run, form) for form in known}
    batches = dict(zip(at.family.forms, batch, strict=True))
    rng = np.random.default_rng([at.seed, first])
    torch.manual_seed(at.seed + first)
    start, losses = time.time(), {}
    for step in _track(range(first, steps), "denoiser"):
        big = step >= big_after and rng.random() < big_share
        form = known[-1 if big else 0]
        lesson = step < lessons[0] and form.frames != 1 and rng.random() < lessons[1]
        latents, captions = stores[form].draw(batches[form], rng)
        loss = training.loss(latents, captions, form, lesson=lesson)
        _step(loss, training.optimizer, plan.at(step))
        training.average.update(training.modules, step)
        name = form.name + " lesson" * lesson
        losses[name] = 0.98 * losses.get(name, loss.item()) + 0.02 * loss.item()
        done = step + 1
        if done % 50 == 0 or done == steps:
            pace = (done - first) / (time.time() - start)
            _say(step=done, pace=pace, **{f"loss{name}": loss for name, loss in losses.items()})
        if done % 250 == 0 or done == steps:
            training.save(done)
        if done % 500 == 0 or done == steps:
            training.draw(done, known[-1 if done > big_after else 0])


@app.command()
def words(
    context: typer.Context,
    count: Annotated[int, typer.Option(help="held-out scenes")] = 64,
) -> None:
    """Say by how much the loss grows where "left" and "right" are swapped in the captions.

    Nothing means that the words are not learnt, however good the pictures are. Once for the sides
    where things stand; for clips, also by what moves, for the words that tell its direction.
    """
    at: Setting = context.obj
    training, tell = Training.start(at), clip_scene if at.family.clips else scene
    _restore(at.family, training.pipe, training.average.weights)
    known, form = [tell(seed) for seed in HELD_OUT[:count]], at.family.forms[-1]
    groups = {"sides": [one for one in known if SIDES.search(one.caption)]}
    for one in known if at.family.clips else []:
        groups.setdefault(one.motion.mover, []).append(one)
    for name, scenes in groups.items():
        truth = _pixels(np.stack([_render(s.seed, form) for s in scenes])).to(at.device)
        captions = [s.caption for s in scenes]
        asked = SIDES if name == "sides" else WAYS
        swapped = [asked.sub(lambda found: OTHER[found[0]], caption) for caption in captions]
        with torch.no_grad():
            latents = training.pipe.vae.encode(truth).latent_dist.mode()
            losses = []
            for told in (captions, swapped):
                torch.manual_seed(at.seed)
                losses.append(float(training.loss(latents, told, form)))
        _say(what=name, scenes=len(scenes), loss=losses[0], swapped=losses[1] / losses[0] - 1)


@app.command()
def adopt(
    context: typer.Context,
    folder: Path,
    vae_only: Annotated[
        bool, typer.Option("--vae-only", help="another family's autoencoder; a fresh denoiser")
    ] = False,
) -> None:
    """Start a run from an exported pipeline: `cache` and `denoiser` then go on from its weights."""
    at: Setting = context.obj
    ours = at.family.vae()
    try:
        theirs = type(ours).from_pretrained(folder, subfolder="vae")
        ours.load_state_dict(theirs.state_dict())
    except (RuntimeError, ValueError) as reason:
        raise typer.BadParameter(
            f"the autoencoder in {folder} is not that of {at.family.name}"
        ) from reason
    state = {f"vae.{name}": value for name, value in ours.state_dict().items()}
    _save({"step": 0, "model": ours.state_dict(), "average": state}, at.run / "vae.pt")
    if vae_only:
        return
    pipe = DiffusionPipeline.from_pretrained(folder)
    for name in TOKENIZERS:
        if (folder / name).exists():
            getattr(pipe, name).save_pretrained(at.run / name)
    parts = at.family.modules(pipe)
    weights = {f"{p}.{k}": v for p, module in parts for k, v in module.state_dict().items()}
    _save({"step": 0, "weights": weights, "average": weights}, at.run / "denoiser.pt")


@app.command()
def export(
    context: typer.Context,
    out: Annotated[Path | None, typer.Option(help="pipeline folder to write")] = None,
    sheet: Annotated[bool, typer.Option(help="draw a sheet from the written folder")] = True,
) -> None:
    """Write the averaged weights as a pipeline folder: bf16, text encoders fp32."""
    at: Setting = context.obj
    out = out or Path("assets/models") / at.family.name
    pipe, step = _pipeline(at.family, at.run, at.seed), 0
    path = at.run / "denoiser.pt"
    if path.exists():
        state = torch.load(path, weights_only=True)
        step = state["step"]
        _restore(at.family, pipe, state["average"])
    pipe.vae.to(torch.bfloat16)
    next(module for _, module in at.family.modules(pipe)).to(torch.bfloat16)
    pipe.save_pretrained(out)
    (out / "call.json").write_text(json.dumps(at.family.call, indent=2) + "\n")
    if sheet:
        judge = type(pipe).from_pretrained(out)
        judge.set_progress_bar_config(disable=True)
        _sheet(at, judge.to(at.device), at.run / "sheets" / "export.png", at.family.forms[-1])
    size = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
    _say(step=step, mebibytes=size / 2**20)


def _spoil(pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Blur and noise as decoders leave them: pictures [N, 3, H, W] and how much [N, 2]."""
    amounts = torch.rand(len(pictures), 2) * (torch.rand(len(pictures), 2) < 0.5)
    blur, noise = amounts.unbind(1)
    soft = nn.functional.avg_pool2d(nn.functional.pad(pictures, (2,) * 4, mode="reflect"), 5, 1)
    fine = nn.functional.avg_pool2d(nn.functional.pad(pictures, (1,) * 4, mode="reflect"), 3, 1)
    mild = (2 * blur).clamp(max=1)[:, None, None, None]
    strong = (2 * blur - 1).clamp(min=0)[:, None, None, None]
    spoilt = pictures + mild * (fine - pictures)
    spoilt = spoilt + 0.7 * strong * (soft - spoilt)
    spoilt = spoilt + 0.06 * noise[:, None, None, None] * torch.randn_like(pictures)
    gain = 1 + 0.06 * torch.randn(len(pictures), 3, 1, 1)
    return (spoilt * gain).clamp(0, 1), amounts


def _oracle_loss(oracle: Oracle, chosen: list[tuple[np.ndarray, Scene]]) -> Tensor:
    pictures, amounts = _spoil(pixels([picture for picture, _ in chosen]))
    reading = oracle(pictures)
    loss = (reading.defects.float() - amounts).square().mean()
    for name, values in ATTRIBUTES.items():
        truth = torch.tensor([values.index(getattr(scene, name)) for _, scene in chosen])
        loss = loss + nn.functional.cross_entropy(
            reading.logits[name].float(), truth, label_smoothing=0.02
        )
    return loss


def _held_out_accuracy(oracle: Oracle, size: int, count: int) -> Accuracy:
    scenes = [scene(seed) for seed in HELD_OUT[:count]]
    judged = [replace(s, mentions=tuple(ATTRIBUTES)) for s in scenes]
    return caption_accuracy([picture(s, size) for s in scenes], judged, oracle.eval())


def _judge(model: Oracle, count: int = 256) -> None:
    """Print held-out accuracy and the hardest attribute per size."""
    for size in (64, 128):
        found = _held_out_accuracy(model, size, count)
        worst = min(found.by_attribute, key=found.by_attribute.__getitem__)
        _say(size=size, held_out=found.mean, worst=worst, its=found.by_attribute[worst])


@app.command()
def oracle(
    context: typer.Context,
    steps: Steps = 1500,
    batch: int = 64,
    rate: float = 2e-3,
    pictures: Annotated[int, typer.Option(help="renders to learn from")] = 12_000,
    out: Path = Path("assets/models/oracle"),
) -> None:
    """Train the attribute classifier on renders spoilt by blur and noise."""
    at: Setting = context.obj
    rng, model, first = np.random.default_rng(at.seed), Oracle(), 0
    path = at.run / "oracle.pt"
    optimizer, plan = _adamw(model.parameters()), Schedule(rate, steps, descent=0.6)
    if path.exists():
        state = torch.load(path, weights_only=True)
        first = state["step"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    store = {64: _labelled(range(pictures), 64)}
    store[128] = _labelled(range(BIG_SEEDS, BIG_SEEDS + pictures // 3), 128)
    for step in _track(range(first, steps), "oracle"):
        size = 128 if step % 4 == 3 else 64
        rows = rng.integers(len(store[size]), size=batch)
        with torch.autocast("cpu", torch.bfloat16, enabled=at.bf16):
            loss = _oracle_loss(model.train(), [store[size][row] for row in rows])
        _step(loss, optimizer, plan.at(step))
        done = step + 1
        if done % 250 == 0 or done == steps:
            state = {"step": done, "model": model.state_dict()}
            _save(state | {"optimizer": optimizer.state_dict()}, path)
            _say(step=done, loss=loss.item())
            _judge(model)
    model.calibrate([[picture for picture, _ in known[:500]] for known in store.values()])
    model.save(out)


def _labelled(seeds: range, size: int) -> list[tuple[np.ndarray, Scene]]:
    told = (scene(seed) for seed in _track(seeds, f"rendering {size} px"))
    return [(picture(one, size), one) for one in told]


def _turned(clips: Tensor, truths: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Mirror some clips and play some backwards: both turn the direction round."""
    mirror, back = torch.rand(2, len(clips)) < 0.5
    clips = torch.where(mirror[:, None, None, None, None], clips.flip(-1), clips)
    clips = torch.where(back[:, None, None, None, None], clips.flip(1), clips)
    direction = truths["direction"] ^ (mirror ^ back).long()
    return clips, truths | {"direction": direction}


def _spoil_clips(clips: Tensor) -> tuple[Tensor, Tensor]:
    """Spoil clips [N, F, 3, H, W] as models do; how much they flicker and stutter [N, 2]."""
    count, frames = clips.shape[:2]
    amounts = torch.rand(count, 2) * (torch.rand(count, 2) < 0.4)
    flicker, stutter = amounts.unbind(1)
    held = torch.rand(count, frames) < 0.7 * stutter[:, None]
    order = torch.arange(frames).repeat(count, 1).masked_fill(held, 0).cummax(1).values
    clips = clips[torch.arange(count)[:, None], order]
    near = torch.cat([clips[:, 1:], clips[:, -1:]], 1)
    clips = clips.lerp(near, 0.5 * torch.rand(count, 1, 1, 1, 1))
    soft = nn.functional.avg_pool2d(clips.flatten(0, 1), 3, 1, 1, count_include_pad=False)
    clips = clips.lerp(soft.unflatten(0, (count, frames)), torch.rand(count, 1, 1, 1, 1))
    gain = 1 + 0.06 * torch.randn(count, 1, 3, 1, 1)
    unrest = 0.12 * flicker[:, None, None, None, None] * torch.randn(count, frames, 3, 1, 1)
    noise = 0.06 * torch.rand(count, 1, 1, 1, 1) * torch.randn_like(clips)
    return ((clips + noise) * (gain + unrest)).clamp(0, 1), amounts


def _motion_loss(reader: MotionReader, clips: Tensor, truths: dict[str, Tensor]) -> Tensor:
    turned, truths = _turned(clips, truths)
    spoilt, amounts = _spoil_clips(turned)
    reading = reader(spoilt)
    loss = (reading.defects.float() - amounts).square().mean()
    for name, truth in truths.items():
        logits = reading.logits[name].float()
        loss = loss + nn.functional.cross_entropy(logits, truth, label_smoothing=0.02)
    return loss


def _moving(seeds: range) -> tuple[Tensor, dict[str, Tensor]]:
    """Small clips [N, 9, 3, 32, 32] as the motion reader sees them, and their motion."""
    scenes = [clip_scene(seed) for seed in seeds]
    seen = [clip(scenes[i], 64, FRAMES)[None] for i in _track(range(len(seeds)), "rendering")]
    clips = [small(one / np.float32(255)) for one in seen]
    truths = {
        name: torch.tensor([values.index(getattr(s.motion, name)) for s in scenes])
        for name, values in MOTIONS.items()
    }
    return torch.cat(clips), truths


def _judge_clips(judge: ClipOracle, count: int = 256) -> None:
    """Print held-out accuracy of the clip oracle, on all frames, per attribute."""
    scenes = [clip_scene(seed) for seed in HELD_OUT[:count]]
    every = [replace(s, mentions=(*ATTRIBUTES, *MOTIONS)) for s in scenes]
    found = clip_accuracy(np.stack([clip(s) for s in scenes]), every, judge)
    _say(held_out=found.mean, all_correct=found.all_correct, **found.by_attribute)


@app.command()
def clip_oracle(
    context: typer.Context,
    steps: Steps = 2000,
    batch: int = 64,
    rate: float = 2e-3,
    pictures: Annotated[int, typer.Option(help="clips to learn from")] = 4000,
    out: Path = Path("assets/models/oracle"),
) -> None:
    """Train the reader of motion; the oracle for pictures is there already, in `out`."""
    at: Setting = context.obj
    rng, model, first = np.random.default_rng(at.seed), MotionReader(), 0
    path = at.run / "motion.pt"
    optimizer, plan = _adamw(model.parameters()), Schedule(rate, steps, descent=0.6)
    if path.exists():
        state = torch.load(path, weights_only=True)
        first = state["step"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    clips, truths = _moving(range(pictures))
    for step in _track(range(first, steps), "clip-oracle"):
        rows = torch.from_numpy(rng.integers(len(clips), size=batch))
        with torch.autocast("cpu", torch.bfloat16, enabled=at.bf16):
            chosen = {name: truth[rows] for name, truth in truths.items()}
            loss = _motion_loss(model.train(), clips[rows], chosen)
        _step(loss, optimizer, plan.at(step))
        done = step + 1
        if done % 250 == 0 or done == steps:
            state = {"step": done, "model": model.state_dict()}
            _save(state | {"optimizer": optimizer.state_dict()}, path)
            _say(step=done, loss=loss.item())
    model.eval().calibrate(clips[:1000])
    model.save(out)
    _judge_clips(load_clip_oracle(out))


if __name__ == "__main__":
    app()
