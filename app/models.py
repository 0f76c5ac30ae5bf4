"""Load a model: bundled by name, a folder, or a hub id; safetensors only, no remote code."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any

from accel.bundled import call_of, check_folder, check_safetensors, check_tokenizers, folder_of
from accel.errors import AccelError, BadInput, BadModel
from app import hub
from app.request import Source

if TYPE_CHECKING:
    import torch

WHOLE = 64 * 2**20
WINDOWS, WINDOW = 256, 64 * 2**10

NEEDLESS = {
    "transformers.utils.import_utils": "requires torchvision",
    "torchao": "Failed to load",
    "torch.utils._pytree": "is an Enum subclass",
    "diffusers.quantizers.torchao.torchao_quantizer": "Unable to import `torchao` Tensor objects",
}
"""By logger, what libraries say of parts of theirs that we do not use: pictures are read without
torchvision, and of torchao neither kernels for 4 and 8 bits of floating point nor checkpoints."""


@dataclass(frozen=True)
class Model:
    """A loaded model.

    Attributes:
        source: What was asked for.
        pipe: The pipeline, on its device.
        call: Arguments of a normal call (``call.json`` of the folder).
        fingerprint: SHA-256 over its files; see ``fingerprint``.
    """

    source: Source
    pipe: Any
    call: dict[str, Any]
    fingerprint: str


def load(source: Source) -> Model:
    """Load a model.

    Raises:
        BadInput: If there is no such model, device or ControlNet.
        BadModel: If a file is missing, truncated or empty, or the hub cannot be reached.
    """
    quiet()
    import diffusers

    device = device_of(source.device)
    folder = check(source)
    options = {**load_options(source), "dtype": dtype_of(source, device)}
    pipe = pipeline(diffusers.DiffusionPipeline, folder, options)
    check_tokenizers(pipe, folder)
    folders = [folder]
    if source.controlnet is not None:
        control = controlnet_folder(source)
        folders.append(control)
        pipe = with_controlnet(pipe, control, options)
    pipe.set_progress_bar_config(disable=True)
    pipe.to(device)
    return Model(source, pipe, call_of(folder), fingerprint(folders))


def check(source: Source) -> Path:
    """The folder of a source's model, whose files are whole as far as their headers tell.

    Raises:
        BadInput: If there is none.
        BadModel: Names the file that is missing or truncated; or the hub cannot be reached.
    """
    folder = find(source)
    check_folder(folder)
    return folder


def find(source: Source) -> Path:
    """The folder of a source's model; downloads a hub model.

    Raises:
        BadInput: If there is none.
        BadModel: If the hub cannot be reached, or has none of that id.
    """
    if hub.is_id(source.model) and not Path(source.model).is_dir():
        return hub.fetch_pipeline(source.model, source.revision, source.variant)
    try:
        return folder_of(source.model)
    except BadInput as error:
        raise BadInput(
            f"--model {source.model}: {error} Or give the path of a folder, or a hub id "
            "(owner/name)."
        ) from error


def title(source: Source) -> str:
    """What a person calls the model of a source."""
    return Path(source.model).name


def defaults(source: Source) -> dict[str, Any]:
    """The arguments of a normal call that a source's model brings; no weights are read.

    Raises:
        BadInput: If there is no such model.
    """
    return call_of(find(source))


def device_of(name: str | None) -> torch.device:
    """The device that was asked for, or CUDA where there is one, else the CPU.

    Raises:
        BadInput: If torch knows no such device, or this machine has none.
    """
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise BadInput(f"--device {name}: choose cpu, cuda, cuda:1 or mps.") from error
    counts = {
        "cpu": 1,
        "cuda": torch.cuda.device_count(),
        "mps": int(torch.backends.mps.is_available()),
    }
    if (device.index or 0) >= counts.get(device.type, 0):
        raise BadInput(
            f"--device {name}: torch {torch.__version__} finds no such device here; `accel env` "
            "lists what there is."
        )
    return device


def dtype_of(source: Source, device: torch.device) -> torch.dtype:
    """The dtype that was asked for; by default float32 on the CPU, else bfloat16."""
    import torch

    named = source.dtype or ("float32" if device.type == "cpu" else "bfloat16")
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    return kinds[named]


def load_options(source: Source) -> dict[str, Any]:
    """What every part is loaded with: from this machine, safetensors, no code of others."""
    return {
        "local_files_only": True,
        "use_safetensors": True,
        "trust_remote_code": False,
        "variant": source.variant,
    }


def pipeline(kind: Any, folder: Path, options: dict[str, Any]) -> Any:
    """A pipeline, or a part of one, from its folder.

    Raises:
        BadModel: If it cannot be loaded.
    """
    try:
        return kind.from_pretrained(folder, **options)
    except AccelError:
        raise
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        raise BadModel(
            f"{folder} cannot be loaded ({type(error).__name__}: {first}): restore the file, or "
            "download the model again."
        ) from error


def controlnet_folder(source: Source) -> Path:
    """The folder of a source's ControlNet; downloads one of the hub.

    Raises:
        BadInput: If there is none.
        BadModel: If its weights are damaged.
    """
    assert source.controlnet is not None
    path = Path(source.controlnet)
    if not path.is_dir() and hub.is_id(source.controlnet):
        path = hub.fetch_part(source.controlnet, source.variant)
    if not (path / "config.json").is_file():
        raise BadInput(
            f"--controlnet {source.controlnet}: no folder with a config.json, and no hub id; give "
            "the folder that `save_pretrained` wrote."
        )
    for weights in sorted(path.glob("*.safetensors")):
        check_safetensors(weights)
    return path


def with_controlnet(pipe: Any, folder: Path, options: dict[str, Any]) -> Any:
    """A pipeline of the same parts, with a ControlNet.

    Raises:
        BadInput: If diffusers has none for them, or the folder holds another class.
    """
    import json

    import diffusers

    name = str(json.loads((folder / "config.json").read_text()).get("_class_name"))
    if "ControlNet" not in name or name not in dir(diffusers):
        raise BadInput(f"--controlnet {folder}: its class is {name}, which is no ControlNet.")
    plain = {key: value for key, value in options.items() if key != "trust_remote_code"}
    controlnet = pipeline(getattr(diffusers, name), folder, plain)
    try:
        return diffusers.AutoPipelineForText2Image.from_pipe(pipe, controlnet=controlnet)
    except ValueError as error:
        raise BadInput(
            f"--controlnet: diffusers has no ControlNet pipeline for {type(pipe).__name__}; use a "
            "model of Stable Diffusion, SDXL, SD3, Flux, Qwen-Image or Z-Image."
        ) from error


def quiet() -> None:
    """Keep the bars of both libraries off the terminal, and `NEEDLESS`: ours says what matters.

    The lock of those bars is one of this process alone: a lock between processes would be missed
    when a worker is ended.
    """
    for name, words in NEEDLESS.items():  # before the imports that say it
        logging.getLogger(name).addFilter(Without(words))
    import diffusers
    import transformers
    from tqdm import tqdm

    tqdm.set_lock(RLock())

    diffusers.logging.disable_progress_bar()
    transformers.logging.disable_progress_bar()


@dataclass(frozen=True)
class Without:
    """A filter of a logger: drops lines with some words."""

    words: str

    def filter(self, line: logging.LogRecord) -> bool:
        """Whether a line stays."""
        return self.words not in line.getMessage()


def fingerprint(folders: list[Path]) -> str:
    """SHA-256 over names, sizes and contents of the files that a model is loaded from.

    Of files above 64 MiB, 256 windows of 64 KiB stand for the content: training changes weights
    everywhere, and gigabytes are not read twice.
    """
    digest = hashlib.sha256()
    for folder in folders:
        for path in files(folder):
            digest.update(
                f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\0".encode()
            )
            for piece in _pieces(path):
                digest.update(piece)
    return digest.hexdigest()


def files(folder: Path) -> list[Path]:
    """The files that a model is loaded from: its weights, configs and vocabularies."""
    top = [folder / "model_index.json", folder / "config.json", *folder.glob("*.safetensors")]
    below = [
        path for path in folder.glob("*/*") if path.suffix in (".json", ".safetensors", ".txt")
    ]
    return sorted(path for path in [*top, *below] if path.is_file())


def _pieces(path: Path) -> Iterator[bytes]:
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= WHOLE:
            yield file.read()
            return
        for window in range(WINDOWS):
            file.seek(window * (size - WINDOW) // (WINDOWS - 1))
            yield file.read(WINDOW)
