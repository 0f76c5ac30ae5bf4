"""The models that a server offers: what their folders tell, before any weights are read."""

from __future__ import annotations

import hashlib
import inspect
import json
from pathlib import Path
from typing import Any, Literal

from accel.bundled import call_of, folder_of
from app import env, hub, models
from app.call import GUIDANCE, NAMES
from app.modes import VIDEO
from app.serve.jobs import ModelInfo
from app.serve.limits import Limits

INDEX, CONFIG = "model_index.json", "config.json"
"""What a pipeline has at the top of its folder, and what a single network has."""


def folder(name: str) -> Path | None:
    """The folder of a model or ControlNet; ``None``: of the hub, and not here yet.

    Raises:
        BadInput: If there is none of that name.
    """
    if hub.is_id(name) and not Path(name).is_dir():
        return hub.cached_pipeline(name) or _cached_controlnet(name)
    return folder_of(name)


def _cached_controlnet(name: str) -> Path | None:
    """The folder of a ControlNet that is in the hub's cache: its config says that it is one."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, CONFIG)
    if not isinstance(found, str):
        return None
    try:
        told = json.loads(Path(found).read_text(encoding="utf-8"))
    except ValueError:
        return None
    kind = told.get("_class_name") if isinstance(told, dict) else None
    return Path(found).parent if "ControlNet" in str(kind) else None


def files_of(name: str) -> list[Path]:
    """The files that a model is loaded from; none if it is not here yet."""
    here = folder(name)
    return [] if here is None else models.files(here)


def call(name: str) -> dict[str, Any]:
    """The arguments of a normal call of a model, as far as they are known."""
    here = folder(name)
    return {} if here is None else call_of(here)


def signature(name: str) -> str:
    """A hash of what is known of a model, and of the versions that load it: equal, if equal.

    Of names, sizes and times of the files, so that nothing large is read.
    """
    held = [(path.name, path.stat()) for path in files_of(name)]
    told = {
        "model": name,
        "files": [(file, about.st_size, about.st_mtime_ns) for file, about in held],
        "versions": env.versions(),
    }
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def figures_of(name: str, machine: str) -> str:
    """Under which name the store keeps what was measured of the presets on a model.

    Args:
        name: The model.
        machine: Where it was measured (``Fingerprint.machine``).
    """
    return f"figures {signature(name)} {machine}"


def offered(limits: Limits) -> list[str]:
    """The names of the models that pictures can be asked of: ControlNets are left out.

    One of the hub that is not here yet can be either; it counts as a model.
    """
    return [
        name for name in limits.models if (here := folder(name)) is None or (here / INDEX).is_file()
    ]


def controls(limits: Limits) -> bool:
    """Whether a ControlNet is among what is offered."""
    return len(offered(limits)) < len(limits.models)


def info(name: str, limits: Limits) -> ModelInfo:
    """What a model is. Imports diffusers, to look at the call of its pipeline."""
    here = folder(name)
    if here is None:
        likely = ("prompt", "negative", "guidance", "image")
        return ModelInfo(name, "image", {}, likely, None, here=False)
    own = call_of(here)
    size = sum(path.stat().st_size for path in files_of(name))
    inputs = _inputs(json.loads((here / INDEX).read_text()).get("_class_name", ""), limits)
    kind: Literal["image", "video"] = "video" if "frames" in inputs else "image"
    return ModelInfo(name, kind, own, inputs, size)


def _inputs(pipeline: str, limits: Limits) -> tuple[str, ...]:
    import diffusers
    from diffusers.pipelines import auto_pipeline as auto

    from accel.seams import keys

    kind = getattr(diffusers, pipeline, None)
    known = set() if kind is None else set(inspect.signature(kind.__call__).parameters)
    takes = {
        "prompt": "prompt" in known,
        "negative": "negative_prompt" in known,
        "guidance": bool(known & {*GUIDANCE, "true_cfg_scale"}),
        "image": "image" in known or pipeline in VIDEO or _mapped(auto, "IMAGE2IMAGE", pipeline),
        "last": "last_image" in known or pipeline in keys.SERVED,
        "mask": "mask_image" in known or _mapped(auto, "INPAINT", pipeline),
        "control": controls(limits) and any("ControlNet" in one for one in _family(auto, pipeline)),
        "lora": hasattr(kind, "load_lora_weights"),
        "frames": bool(known & set(NAMES["frames"])),
    }
    return tuple(name for name, taken in takes.items() if taken)


def _mapped(auto: Any, task: str, pipeline: str) -> bool:
    """Whether diffusers has a pipeline of the same parts for another task."""
    others = getattr(auto, f"AUTO_{task}_PIPELINES_MAPPING")
    name = _short(auto, pipeline)
    return name is not None and name in others


def _family(auto: Any, pipeline: str) -> list[str]:
    """The text-to-image pipelines of the same model family, by class name."""
    name = _short(auto, pipeline)
    if name is None:
        return []
    found = auto.AUTO_TEXT2IMAGE_PIPELINES_MAPPING
    return [kind.__name__ for key, kind in found.items() if key.startswith(name)]


def _short(auto: Any, pipeline: str) -> str | None:
    """What diffusers' tables call the model of a text-to-image pipeline."""
    found = auto.AUTO_TEXT2IMAGE_PIPELINES_MAPPING
    return next((key for key, kind in found.items() if kind.__name__ == pipeline), None)
