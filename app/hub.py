"""Models of the Hugging Face hub: from the local cache, or downloaded after the size is said."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from accel.bundled import check_folder
from accel.errors import BadModel
from app.exits import say

ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
KEPT = (".safetensors", ".json", ".txt", ".model")


def is_id(name: str) -> bool:
    """Whether a name can be the id of a hub model: ``owner/model``."""
    return ID.fullmatch(name) is not None


def fetch_pipeline(name: str, revision: str | None, variant: str | None) -> Path:
    """The folder of a hub pipeline, downloaded if it is not in the cache.

    Raises:
        BadModel: If it is neither in the cache nor to be had from the hub.
    """
    from diffusers import DiffusionPipeline

    options = {
        "revision": revision,
        "variant": variant,
        "use_safetensors": True,
        "trust_remote_code": False,
    }
    cached = cached_pipeline(name, revision)
    if cached is not None:
        return cached
    say(f"downloading {name}: {size(name, revision, variant) / 1e9:.2f} GB into the hub cache")
    try:
        return Path(DiffusionPipeline.download(name, **options))
    except Exception as error:
        raise _unreachable(name, error) from error


def size(name: str, revision: str | None = None, variant: str | None = None) -> int:
    """Bytes that a download of a hub model brings, as the hub tells them.

    Raises:
        BadModel: If the hub cannot be reached, or has none of that id.
    """
    return _size(_info(name, revision).siblings, variant)


def cached_pipeline(name: str, revision: str | None = None) -> Path | None:
    """The folder of a hub pipeline that is in the cache with all its parts, or ``None``."""
    cached = _cached(name, revision, "model_index.json")
    return cached if cached is not None and _whole(cached) else None


def fetch_part(name: str, variant: str | None) -> Path:
    """The folder of one network of the hub (a ControlNet), downloaded if it is not in the cache.

    Raises:
        BadModel: If it is neither in the cache nor to be had from the hub.
    """
    from huggingface_hub import snapshot_download

    cached = _cached(name, None, "config.json")
    if cached is not None:
        return cached
    say(f"downloading {name}: {size(name, None, variant) / 1e9:.2f} GB into the hub cache")
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:
        raise _unreachable(name, error) from error


def _cached(name: str, revision: str | None, marker: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, marker, revision=revision)
    return Path(found).parent if isinstance(found, str) else None


def _whole(folder: Path) -> bool:
    """Whether a cached folder has all its parts: a download may have been interrupted."""
    try:
        check_folder(folder)
    except BadModel:
        return False
    return True


def _info(name: str, revision: str | None) -> Any:
    from huggingface_hub import HfApi

    try:
        return HfApi().model_info(name, revision=revision, files_metadata=True, timeout=10)
    except Exception as error:
        raise _unreachable(name, error) from error


def _unreachable(name: str, error: Exception) -> BadModel:
    first = (str(error).strip().splitlines() or [""])[0]
    return BadModel(
        f"The model '{name}' is not in the hub cache of this machine, and the hub did not give it "
        f"({type(error).__name__}: {first}). Without a network, give a local folder: "
        "--model PATH, or the bundled --model scenes-flux."
    )


def _size(files: Iterable[Any], variant: str | None) -> int:
    """Bytes of the files that a pipeline is loaded from, as far as their names tell."""
    return sum(file.size or 0 for file in files if _wanted(file.rfilename, variant))


def _wanted(path: str, variant: str | None) -> bool:
    name = path.rsplit("/", 1)[-1]
    if not path.endswith(KEPT) or (path.endswith(".safetensors") and "/" not in path):
        return False
    parts = name.split(".")
    other = {"fp16", "bf16", "fp32"} & set(parts[1:-1])
    return variant in parts if variant and path.endswith(".safetensors") else not other
