"""Key frames: the picture that an image-to-video pipeline shows its network beside every frame.

For a clip to be turned round in time its latents must have a frame for each frame of it, and the
picture must say the same to all of them: then a clip from its last frame on is asked for as one
from its first. Pipelines whose latent frames stand for several frames of the clip (Wan, CogVideoX,
HunyuanVideo, LTX: the first for one, the others for more) are no such ones.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from accel.errors import UnsupportedModel
from accel.seams.denoisers import Row
from accel.seams.loop import Evaluation

SERVED = ("StableVideoDiffusionPipeline",)

FRAMES = 1
"""The axis of their latents ``[B, F, C, H, W]`` that counts frames."""


def check(pipe: Any, method: str) -> None:
    """Refuse pipelines whose clips cannot be turned round.

    Raises:
        UnsupportedModel: By name.
    """
    name = type(pipe).__name__
    if name not in SERVED:
        raise UnsupportedModel(
            f"{method} does not fit {name}: it needs an image-to-video pipeline with a latent "
            "frame for each frame of the clip, and the picture in further channels beside each. "
            f"Use {', '.join(SERVED)}, or leave the method out of the plan."
        )


def latents_of(pipe: Any, evaluation: Evaluation, sample: int) -> Tensor:
    """The latents of the picture of a sample, ``[1, C, H, W]`` in float32.

    They are those that the network is shown: of the picture with the pipeline's noise
    (``noise_aug_strength``), in the scale of the clip's latents.
    """
    row = Row("cond", sample)
    [question] = (one for one in evaluation.questions if row in one.call.rows)
    assert question.beside is not None  # in the pipelines that are served
    shown = question.beside[question.call.rows.index(row)]
    return shown[:1].float() * float(pipe.vae.config.scaling_factor)
