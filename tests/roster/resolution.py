"""Large pictures by way of smaller ones."""

from tiny import PIPELINES

from accel.resolution import Bottleneck, Pixelsmith
from roster.row import Row

FLAT = frozenset(
    {
        *("sd15", "sd15_v", "sdxl", "sd3", "flux", "flux_schnell", "flux_cfg", "chroma"),
        *("pixart_sigma", "sana", "hunyuanimage", "qwenimage", "lumina2", "cogview4"),
        *("sd35_skip_layer", "sd_controlnet", "sd_img2img", "sd_inpaint"),
        *("sd3_controlnet", "flux_controlnet", "flux_img2img"),
    }
)
"""Tiny pipelines whose network is given one picture that can be cut."""

CLIPS = frozenset({"wan21", "hunyuanvideo"})

AT_THE_CALL = frozenset(
    {
        *("sd_controlnet", "sd3_controlnet", "flux_controlnet"),
        *("sd_img2img", "sd_inpaint", "flux_img2img"),
        *("hunyuanimage", "qwenimage", "lumina2", "sd35_skip_layer"),
        "cogview4",
    }
)
"""Those whose calls are refused: ControlNets, pictures to start from, guidance that is no weighted
mean, and CogView4, whose timesteps are its own."""

KNOWN = frozenset(
    {
        *("sd15", "sd15_v", "sdxl", "sd3", "sd35_skip_layer"),
        *("flux", "flux_schnell", "flux_cfg", "chroma"),
    }
)
"""Those whose autoencoder and latents `accel.seams.pictures` knows."""

ROWS = {
    "resolution.Bottleneck": Row(
        "stages",
        Bottleneck(),
        refused=frozenset(PIPELINES) - FLAT - CLIPS,
        idle=AT_THE_CALL,
        variants=(Bottleneck(steps=(0, 2, 1), strengths=(1.0, 1.0, 0.5)),),
    ),
    "resolution.Pixelsmith": Row(
        "patches of a picture",
        Pixelsmith(base=24),
        refused=frozenset(PIPELINES) - KNOWN,
        idle=AT_THE_CALL,
        variants=(Pixelsmith(base=24, slider=0.0, border=0),),
    ),
}
