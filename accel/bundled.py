"""The files that ship with the project, wherever it is installed: wheel or editable checkout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from accel.errors import BadInput, BadModel

HERE = Path(__file__).parent

UNREADABLE = (AssertionError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""What a header of safetensors raises that is something else, or damaged."""


def root() -> Path:
    """The folder of assets: inside the package in a wheel, beside it in a checkout."""
    installed = HERE / "assets"
    return installed if installed.is_dir() else HERE.parent / "assets"


def asset(name: str) -> Path:
    """The path of a file or folder that ships with the project.

    Args:
        name: Below the assets, such as ``plans/balanced.toml``.

    Raises:
        BadInput: If there is none of that name.
    """
    path = root() / name
    if not path.exists():
        family = root() / Path(name).parts[0]
        known = sorted(p.name for p in family.iterdir()) if family.is_dir() else []
        raise BadInput(
            f"No asset '{name}' ships with diffusers-accel; below '{Path(name).parts[0]}' there "
            f"are: {', '.join(known) or 'none'}."
        )
    return path


def load(name: str) -> tuple[Any, dict[str, Any]]:
    """A model folder as a pipeline, and the arguments of a normal call.

    Args:
        name: Short name of a bundled model (``scenes-flux``), or the path of a folder.

    Returns:
        The pipeline (float32, on the CPU) and its call arguments (the folder's ``call.json``;
        empty where it has none).

    Raises:
        BadInput: If there is no such model.
        BadModel: If a file is missing or truncated, or a tokenizer is empty.
    """
    from diffusers import DiffusionPipeline

    folder = folder_of(name)
    check_folder(folder)
    pipe = DiffusionPipeline.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    check_tokenizers(pipe, folder)
    return pipe, call_of(folder)


def folder_of(name: str) -> Path:
    """The folder of a bundled model, or of a model at a path.

    Raises:
        BadInput: If there is none.
    """
    path = Path(name)
    if path.is_dir():
        return path
    if len(path.parts) == 1:
        return asset(f"models/{name}")
    raise BadInput(f"No folder '{name}': give the path of a model folder or a bundled name.")


def call_of(folder: Path) -> dict[str, Any]:
    """The arguments of a normal call that a model folder brings.

    Raises:
        BadModel: If ``call.json`` is there but cannot be read.
    """
    path = folder / "call.json"
    if not path.exists():
        return {}
    try:
        call: dict[str, Any] = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise BadModel(f"{path} is no JSON ({error}): restore the file.") from error
    return call


def check_folder(folder: Path) -> None:
    """Check the files of a model folder before anything is loaded from it.

    Raises:
        BadModel: Names the file that is missing, not readable or shorter than its header says.
    """
    index = folder / "model_index.json"
    if not index.is_file():
        raise BadModel(
            f"{folder} has no model_index.json: it is no diffusers pipeline. Give the folder that "
            "`save_pretrained` wrote."
        )
    try:
        parts = json.loads(index.read_text())
    except json.JSONDecodeError as error:
        raise BadModel(f"{index} is no JSON ({error}): restore the file.") from error
    for part, kind in parts.items():
        if isinstance(kind, list) and kind[0] is not None and not (folder / part).is_dir():
            raise BadModel(f"{folder} lacks the folder '{part}' ({kind[1]}): restore it.")
    for path in sorted(folder.rglob("*.safetensors")):
        check_safetensors(path)


def check_safetensors(path: Path) -> None:
    """Compare a file's size with what its header promises; reads the header only.

    Raises:
        BadModel: If the file is truncated or its header cannot be read.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if 0 < length < size else None
        assert header is not None
        ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
        needed = 8 + length + max(ends, default=0)
    except UNREADABLE as error:
        raise BadModel(f"{path} has no readable header: download or copy it again.") from error
    if size != needed:
        raise BadModel(
            f"{path} has {size} bytes where its header promises {needed}: it is truncated. "
            "Download or copy it again."
        )


def check_tokenizers(pipe: Any, source: object) -> None:
    """Refuse tokenizers without a vocabulary.

    transformers 5 makes an *empty* tokenizer, without an error, where its files are missing.

    Raises:
        BadModel: If one is empty.
    """
    for name, part in pipe.components.items():
        if name.startswith("tokenizer") and part is not None and len(part) < 8:
            raise BadModel(
                f"{source}: '{name}' is empty ({len(part)} tokens), so every prompt would mean the "
                "same. Restore the tokenizer's files."
            )
