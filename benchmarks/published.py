"""What papers measured on several devices, beside what the model of costs predicts.

    python benchmarks/published.py

The networks are built without weights from their published shapes, and one call of each is counted
(torch's device ``meta``), so it takes seconds on any machine. The table is the one in
``docs/parallel.md``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from accel.seams.denoisers import Row
from parallel.clusters import NAMED
from parallel.simulate import predict
from parallel.work import Work, work_of_call

GUIDED = [Row("cond", 0), Row("uncond", 0)]
STEPS = 50

DISTRIFUSION = "DistriFusion, arXiv 2402.19481"
ASYNCDIFF = "AsyncDiff, arXiv 2406.06911"
PCPP = "PCPP, arXiv 2412.02962"


@dataclass(frozen=True)
class Figure:
    """What a paper measured.

    Attributes:
        source: The paper.
        network: `sdxl` or `sd21`.
        size: Pixels, high and wide.
        cluster: Where.
        devices: How many.
        method: As the model of costs has it.
        faster: Times as fast as one device.
        fitted: Whether the cluster's figures come from it: then it is no test of the model.
    """

    source: str
    network: Callable[[int, int], Work]
    size: tuple[int, int]
    cluster: str
    devices: int
    method: str
    faster: float
    fitted: bool = False

    @property
    def predicted(self) -> float:
        """Times as fast, by the model."""
        cluster = replace(NAMED[self.cluster], devices=self.devices)
        ways = predict(self.network(*self.size), cluster, STEPS)
        return next(one.faster for one in ways if one.method == self.method)

    @property
    def error(self) -> float:
        """How far the prediction is off, as a share."""
        return self.predicted / self.faster - 1


def _empty(*shape: int) -> Tensor:
    return torch.empty(*shape, dtype=torch.half, device="meta")


def _built(**config: Any) -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel(**config).half().eval()


@cache
def sdxl(height: int, width: int) -> Work:
    """A step of Stable Diffusion XL with guidance, in half precision."""
    unet = _built(
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )
    more = {"text_embeds": _empty(2, 1280), "time_ids": _empty(2, 6)}
    return _called(unet, height, width, 2048, added_cond_kwargs=more)


@cache
def sd21(height: int, width: int) -> Work:
    """A step of Stable Diffusion 2.1 with guidance, in half precision."""
    unet = _built(
        attention_head_dim=(5, 10, 20, 20), cross_attention_dim=1024, use_linear_projection=True
    )
    return _called(unet, height, width, 1024)


def _called(unet: Any, height: int, width: int, text: int, **more: Any) -> Work:
    arguments = {
        "sample": _empty(2, 4, height // 8, width // 8),
        "timestep": torch.tensor(1, device="meta"),
        "encoder_hidden_states": _empty(2, 77, text),
        **more,
    }
    return work_of_call(unet, GUIDED, arguments)


LARGE, LARGER = (2048, 2048), (3840, 3840)
STALE, SYNC = "parallel.DistriFusion", "parallel.DistriFusion (sync)"

FIGURES = (
    Figure(DISTRIFUSION, sdxl, (1280, 1920), "a100-nvlink", 4, STALE, 12.3 / 4.16, fitted=True),
    Figure(DISTRIFUSION, sdxl, LARGE, "a100-nvlink", 4, STALE, 3.05),
    Figure(DISTRIFUSION, sdxl, LARGE, "a100-nvlink", 4, SYNC, 2.92),
    Figure(DISTRIFUSION, sdxl, LARGER, "a100-nvlink", 2, STALE, 1.8),
    Figure(DISTRIFUSION, sdxl, LARGER, "a100-nvlink", 4, STALE, 3.4),
    Figure(DISTRIFUSION, sdxl, LARGER, "a100-nvlink", 8, STALE, 6.1),
    Figure(ASYNCDIFF, sd21, (768, 768), "a5000-pcie", 4, "parallel.AsyncDiff", 2.7),
)


def markdown() -> str:
    """The table."""
    lines = [
        "| Source | Network and size | Devices | Method | Published | Predicted | Off by |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in FIGURES:
        off = "fitted" if one.fitted else f"{one.error:+.0%}"
        name = one.method.removeprefix("parallel.")
        lines.append(
            f"| {one.source} | {one.network.__name__} {one.size[0]} × {one.size[1]} | "
            f"{one.devices} × {one.cluster} | {name} | {one.faster:.2f}× | "
            f"{one.predicted:.2f}× | {off} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown())
