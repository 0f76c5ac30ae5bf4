"""Fresh noise that is reproducible where pipelines pass no generator.

Pipelines of flows call ``scheduler.step`` without their generator; drawing from the global one
would make a seeded call irreproducible, and a sample depend on its batch. So the noise of a sample
is then seeded by what the sample looked like at its first step, and by the step.
"""

from __future__ import annotations

from hashlib import blake2b

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

Generator = torch.Generator | list[torch.Generator] | None


def restarted(generator: Generator) -> Generator:
    """A generator (or a list of them) in the state of this one: it draws the same again."""
    if isinstance(generator, list):
        return [one.clone_state() for one in generator]
    return None if generator is None else generator.clone_state()


def seeds_of(sample: Tensor) -> list[int]:
    """One 63-bit seed per sample, from its bytes; reads ``sample`` ``[B, ...]`` from its device."""
    rows = sample.detach().to("cpu", torch.float32).contiguous()
    digests = (blake2b(row.numpy().tobytes(), digest_size=8).digest() for row in rows)
    return [int.from_bytes(digest) >> 1 for digest in digests]


def seeded(seeds: list[int], step: int, device: torch.device) -> list[torch.Generator]:
    """One generator per sample for one step of a run."""
    return [torch.Generator(device).manual_seed((seed + step) % 2**63) for seed in seeds]


def standard_normal(like: Tensor, generator: Generator) -> Tensor:
    """Noise of the shape, dtype and device of ``like``."""
    noise: Tensor = randn_tensor(
        like.shape, generator=generator, device=like.device, dtype=like.dtype
    )
    return noise
