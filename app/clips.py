"""Pictures and clips as files: MP4 for clips, PNG for pictures (animated for clips: lossless)."""

from __future__ import annotations

import inspect
import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accel.bundled import call_of, check_folder
from accel.errors import BadInput
from app import metadata, models
from app.call import NAMES
from app.metadata import Record
from app.request import Request

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (PICTURE, CLIP) = (".png", ".mp4")


def suffix(request: Request) -> str:
    """The type of file that holds what a request asks for: ``.mp4`` for a clip, else ``.png``.

    Told by the model's folder before any weights are read: by its ``call.json``, or by whether the
    call of its pipeline counts frames. A clip of one frame is a picture. Downloads a hub model.

    Raises:
        BadInput: If there is no such model.
        BadModel: If its folder cannot be read.
    """
    if request.frames == 1:
        return PICTURE
    folder = models.find(request.source)
    check_folder(folder)
    return CLIP if any(name in _counted(folder) for name in NAMES["frames"]) else PICTURE


def _counted(folder: Path) -> set[str]:
    """Names of the arguments that a model's call takes, by its folder alone."""
    import diffusers

    index = json.loads((folder / "model_index.json").read_text())
    kind = getattr(diffusers, str(index.get("_class_name")), None)
    known = () if kind is None else inspect.signature(kind.__call__).parameters
    return {*call_of(folder), *known}


def check_suffix(path: Path) -> None:
    """Refuse a file type that is not written, or not without another package.

    Raises:
        BadInput: If it is one.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise BadInput(f"--out {path}: the name has to end in {' or '.join(SUFFIXES)}.")
    if _is_film(path):
        av()


def files(path: Path, pictures: Sequence[Image.Image], made: Record, fps: int) -> dict[Path, bytes]:
    """The file at ``path`` and, of an MP4, the record beside it."""
    found = {path: encode(path, pictures, made, fps)}
    if record := beside(path):
        found[record] = made.model_dump_json(indent=2).encode()
    return found


def encode(path: Path, pictures: Sequence[Image.Image], made: Record, fps: int) -> bytes:
    """The bytes of the file at ``path``: pictures and record."""
    if _is_film(path):
        return film(pictures, fps, made)
    return metadata.png(pictures, made, fps)


def beside(path: Path) -> Path | None:
    """Where the record of a file lies beside it as well: of an MP4, which many programs rewrite."""
    return path.with_name(f"{path.name}.json") if _is_film(path) else None


def read(path: Path) -> tuple[Record, list[Image.Image]]:
    """The record and the pictures of a file that we wrote.

    Raises:
        BadInput: If it carries no record that can be read.
    """
    if _is_film(path):
        return _read_mp4(path)
    return metadata.read(path)


def record_of(path: Path) -> Record:
    """The record of a file that we wrote, or that lies beside an MP4; no pixel is decoded.

    Raises:
        BadInput: If it carries no record that can be read.
    """
    match path.suffix.lower():
        case ".png":
            return metadata.record_of(path)
        case ".mp4":
            with opened(path) as file:
                return _in_mp4(file, path)
        case ".json":
            return _in_json(path)
    raise BadInput(f"{path} is no PNG, MP4 or JSON: give a file that was written here.")


def _is_film(path: Path) -> bool:
    return path.suffix.lower() == CLIP


def av() -> Any:
    """The package that reads and writes MP4.

    Raises:
        BadInput: If it is not installed.
    """
    try:
        import av as package
    except ImportError as error:
        raise BadInput(
            "MP4 needs the extra 'video': pip install 'diffusers-accel[video]', or give an --out "
            "that ends in .png (an animated PNG)."
        ) from error
    return package


def film(pictures: Sequence[Image.Image], fps: int, made: Record | None = None) -> bytes:
    """An MP4 of some frames, cut to even sizes, with their record if they have one.

    Raises:
        BadInput: If the package that writes it is not installed.
    """
    package, buffer = av(), io.BytesIO()
    with package.open(buffer, "w", format="mp4", options={"movflags": "use_metadata_tags"}) as file:
        if made is not None:
            file.metadata["comment"] = made.model_dump_json()
        stream = file.add_stream("h264", rate=fps, options={"crf": "17"})
        first = pictures[0]
        stream.width, stream.height = first.width // 2 * 2, first.height // 2 * 2
        stream.pix_fmt = "yuv420p"
        for picture in pictures:
            frame = package.VideoFrame.from_image(picture.convert("RGB"))
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return buffer.getvalue()


def labelled(path: Path, made: Record) -> bytes:
    """The bytes of an MP4 with a record in it; its pictures stay as they are coded."""
    package, buffer = av(), io.BytesIO()
    options = {"movflags": "use_metadata_tags"}
    with (
        package.open(str(path)) as source,
        package.open(buffer, "w", format="mp4", options=options) as file,
    ):
        file.metadata["comment"] = made.model_dump_json()
        video = source.streams.video[0]
        copied = file.add_stream_from_template(video)
        for packet in source.demux(video):
            if packet.dts is not None:
                packet.stream = copied
                file.mux(packet)
    return buffer.getvalue()


def _read_mp4(path: Path) -> tuple[Record, list[Image.Image]]:
    with opened(path) as file:
        return _in_mp4(file, path), [frame.to_image() for frame in file.decode(video=0)]


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A clip, for reading.

    Raises:
        BadInput: If it cannot be read.
    """
    package = av()
    try:
        with package.open(str(path)) as file:
            yield file
    except BadInput:
        raise
    except (OSError, ValueError, IndexError) as error:
        raise BadInput(f"{path} cannot be read as an MP4 clip: {error}.") from error


def _in_mp4(file: Any, path: Path) -> Record:
    text = file.metadata.get("comment")
    if text is None:
        raise BadInput(f"{path} carries no record of diffusers-accel.")
    return metadata.parse(text, str(path))


def _in_json(path: Path) -> Record:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} cannot be read as JSON: {error}.") from error
    return metadata.parse(text, str(path))
