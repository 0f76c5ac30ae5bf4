"""Tiny pipelines as model folders, and the command line run in this process."""

import json
from pathlib import Path
from typing import Any

import transformers
from PIL import Image
from tiny import PIPELINES
from typer.testing import CliRunner, Result

from app.cli import app

SMALL = {"height": 32, "width": 32, "num_inference_steps": 4}
CALLS: dict[str, dict[str, Any]] = {
    "flux_cfg": SMALL | {"true_cfg_scale": 3.5, "negative_prompt": "", "max_sequence_length": 48},
    "sd15": SMALL | {"guidance_scale": 5.0},
    "sd_inpaint": SMALL,
    "animatediff": SMALL | {"num_frames": 4},
    "svd": SMALL | {"num_frames": 4, "decode_chunk_size": 2},
    "ltx": SMALL | {"num_frames": 9, "max_sequence_length": 48},
}


class Folders:
    """Model folders below a temporary one, written when first asked for."""

    def __init__(self, base: Path) -> None:
        self._base = base

    def __call__(self, name: str) -> str:
        """The folder of a tiny pipeline; not to be changed."""
        folder = self._base / name
        return str(folder) if folder.is_dir() else str(self.fresh(name, folder))

    def fresh(self, name: str, folder: Path) -> Path:
        """A tiny pipeline, saved to a folder that a test may change."""
        transformers.logging.disable_progress_bar()
        pipe = PIPELINES[name].build()
        if name == "svd":
            enlarge_eye(pipe)
        pipe.save_pretrained(folder)
        (folder / "call.json").write_text(json.dumps(CALLS[name]))
        return folder

    def controlnet(self) -> str:
        """The folder of a ControlNet for ``sd15``."""
        folder = self._base / "controlnet"
        if not folder.is_dir():
            PIPELINES["sd_controlnet"].build().controlnet.save_pretrained(folder)
        return str(folder)


def enlarge_eye(pipe: Any) -> None:
    """The pipeline resizes every picture that is no tensor to 224 x 224."""
    config = pipe.image_encoder.config
    config.image_size, config.patch_size = 224, 56
    pipe.register_modules(image_encoder=type(pipe.image_encoder)(config))


def run(*args: object, device: list[str] | None = None) -> Result:
    """Run the command line, on the CPU unless told, so that a GPU changes no test."""
    texts = [str(arg) for arg in args]
    runs = texts[0] in ("generate", "compare", "calibrate", "tune", "explain")
    chosen = ["--device", "cpu"] if runs and device is None else []
    return CliRunner().invoke(app, [*texts, *chosen])


def done(*args: object) -> Result:
    """Run the command line; it has to succeed."""
    result = run(*args)
    assert result.exit_code == 0, result.output
    return result


def size(path: str | Path) -> tuple[int, int]:
    """Width and height of a picture."""
    with Image.open(path) as image:
        image.load()
        return image.size


def picture(path: Path, colour: str = "teal", side: int = 32) -> Path:
    """Write a picture: a square on a ground."""
    image = Image.new("RGB", (side, side), colour)
    image.paste("orange", (side // 4, side // 4, side // 2, side // 2))
    image.save(path)
    return path
