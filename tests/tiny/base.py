"""What a tiny pipeline is, and how to call it."""

import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline

PROMPTS = (
    "a red fox in the snow",
    "two boats on a lake",
    "an old clock tower",
    "a bowl of green apples",
    "rain over a city",
    "a paper crane",
)
NEGATIVE = "blurry"


@dataclass(frozen=True)
class Ask:
    """What `Tiny.call` was asked for, per sample."""

    prompts: list[str]
    seeds: list[int]
    guidance: bool

    @property
    def negatives(self) -> list[str]:
        """The negative prompt, once per sample."""
        return [NEGATIVE] * len(self.prompts)

    def pictures(self, height: int, width: int) -> torch.Tensor:
        """Return smooth pictures `[B, 3, H, W]` in [0, 1], one per sample, told by its prompt."""
        return torch.stack([_picture(number, height, width) for number in self.numbers])

    @property
    def numbers(self) -> list[int]:
        """Return a number per sample, told by its prompt."""
        return [zlib.crc32(prompt.encode()) for prompt in self.prompts]


@dataclass(frozen=True)
class Tiny:
    """A small random pipeline of one family, and what a seam must know of it."""

    name: str
    build: Callable[[], DiffusionPipeline]  # seeded: two builds are bit-identical
    layout: str  # batched | two_calls | two_calls_no_context | embedded | list | guider | none
    order: tuple[str, ...]  # guidance branches as the pipeline evaluates or stacks them
    # what a block gives back: unet | hidden | mmdit (encoder, hidden) | hidden_encoder |
    # mmdit_joined: mmdit, then single blocks over one stream of text and image
    blocks: str
    media: str  # image | video
    inputs: Callable[[Ask], dict[str, Any]]  # call arguments of the family
    denoisers: tuple[str, ...] = ("transformer",)
    output: str = "latent"  # output_type
    batchable: bool = True  # a stock call takes a list of prompts
    samples: int | None = None  # of every call, whatever is asked for
    # turns guidance on or off where no argument of the call does
    switch: Callable[[DiffusionPipeline, bool], None] | None = None
    global_noise: bool = False  # the stock pipeline draws from the global generator too

    def call(
        self,
        pipe: DiffusionPipeline,
        *,
        steps: int = 4,
        seed: int = 0,
        batch: int = 1,
        guidance: bool = True,
        prompts: Sequence[str] | None = None,
        seeds: Sequence[int] | None = None,
        **more: Any,
    ) -> torch.Tensor | np.ndarray:
        """Run `pipe` and return its output, `[B, ...]`.

        Sample k has prompt `PROMPTS[k]` and noise `seed + k`: it is the same sample in any batch.

        Args:
            pipe: What `build` returned.
            steps: Number of denoising steps.
            seed: Noise of the first sample.
            batch: Number of samples, when neither `prompts` nor `seeds` tells it, nor the family.
            guidance: Whether classifier-free guidance is on.
            prompts: Instead of the default prompts, one per sample.
            seeds: Instead of `seed`, `seed + 1`, …, one per sample.
            **more: For the pipeline; they win over the family's own arguments.
        """
        count = self.samples or len(prompts or seeds or range(batch))
        ask = Ask(
            prompts=[*(prompts or (PROMPTS[k % len(PROMPTS)] for k in range(count)))],
            seeds=[*(seeds or (seed + k for k in range(count)))],
            guidance=guidance,
        )
        if count > 1 and not (self.batchable or self.samples):
            raise ValueError(f"{self.name} takes one prompt at a time, not {count}")
        generators = [torch.Generator().manual_seed(seed) for seed in ask.seeds]
        arguments = {
            "num_inference_steps": steps,
            "generator": generators if count > 1 else generators[0],
            "output_type": self.output,
        }
        if self.switch is not None:
            self.switch(pipe, guidance)
        with torch.random.fork_rng(devices=[], enabled=self.global_noise), _quiet_autocast():
            if self.global_noise:
                torch.manual_seed(ask.seeds[0])
            return pipe(**(arguments | self.inputs(ask) | more))[0]


@contextmanager
def _quiet_autocast() -> Iterator[None]:
    """Let Mochi ask for an autocast to float32, which torch does not have on a CPU."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "In CPU autocast", UserWarning)
        yield


def _picture(seed: int, height: int, width: int) -> torch.Tensor:
    rows = torch.linspace(0, 1, height)[:, None]
    columns = torch.linspace(0, 1, width)[None, :]
    phases = torch.rand(3, 3, generator=torch.Generator().manual_seed(seed)) * 6
    waves = [torch.sin(3 * rows * a + 4 * columns * b + c) for a, b, c in phases.tolist()]
    return torch.stack(waves) * 0.5 + 0.5
