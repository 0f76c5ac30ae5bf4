"""A model's pipeline without its weights: to say what it refuses before gigabytes are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from accel.bundled import call_of
from app import models
from app.request import Source

CONFIG = "config.json"


def skeleton(source: Source) -> models.Model:
    """The pipeline of a source, with networks that have shapes and no values.

    Plans attach to it as to the model; calls of it do not run. Networks that cannot be made from
    their configuration alone are loaded.

    Raises:
        BadInput: If there is no such model or ControlNet.
        BadModel: If a file is missing or damaged.
    """
    models.quiet()
    import diffusers
    import torch

    folder = models.check(source)
    options = {**models.load_options(source), "dtype": models.dtype_of(source, torch.device("cpu"))}
    pipe = models.pipeline(diffusers.DiffusionPipeline, folder, {**options, **_empty(folder)})
    if source.controlnet is not None:
        pipe = models.with_controlnet(pipe, models.controlnet_folder(source), options)
    return models.Model(source, pipe, call_of(folder), "")


def _empty(folder: Path) -> dict[str, Any]:
    """The networks of a pipeline's folder, on torch's device ``meta``."""
    index = json.loads((folder / "model_index.json").read_text())
    parts = {name: kind for name, kind in index.items() if isinstance(kind, list) and kind[1]}
    made = {name: _network(folder / name, *kind) for name, kind in parts.items()}
    return {name: network for name, network in made.items() if network is not None}


def _network(folder: Path, library: str, kind: str) -> Any | None:
    """A network without values; ``None`` for what has none: a tokenizer, a scheduler."""
    import diffusers
    import transformers
    from accelerate import init_empty_weights

    home = {"diffusers": diffusers, "transformers": transformers}.get(library)
    found = getattr(home, kind, None)
    if found is None or not (folder / CONFIG).is_file():
        return None
    with init_empty_weights(include_buffers=False):
        if issubclass(found, diffusers.ModelMixin):
            return found.from_config(found.load_config(folder)).eval()
        if issubclass(found, transformers.PreTrainedModel):
            return found(found.config_class.from_pretrained(folder)).eval()
    return None
