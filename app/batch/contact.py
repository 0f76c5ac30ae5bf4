"""The contact sheet of a job: a small picture of each row, or of some hundred of them."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from itertools import islice
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

from app.clips import CLIP

if TYPE_CHECKING:
    from app.batch.manifest import Made
    from app.batch.storage import Storage

MOST, SIDE, COLUMNS = 400, 160, 20
GAP, LINE, SMALL, LEAST = 10, 18, 13, 72
QUALITY = 88
INK, PAPER, GREY = "#202020", "#ffffff", "#d0d0d0"


def chosen(made: Sequence[Made]) -> list[Made]:
    """The rows that are shown: all, or evenly chosen ones with the first and the last.

    Args:
        made: All rows that were made, in the order of the input.
    """
    if len(made) <= MOST:
        return list(made)
    return [made[place * (len(made) - 1) // (MOST - 1)] for place in range(MOST)]


def draw(rows: Sequence[Made], storage: Storage) -> bytes:
    """A JPEG of some rows, each above its place in the input; a grey tile where there is none.

    One picture at a time is open, and of each a small one is kept.

    Args:
        rows: At least one.
        storage: Where the pictures lie.
    """
    small = [_small(storage, row.file) for row in rows]
    there = [picture for picture in small if picture is not None]
    width = max([LEAST, *(picture.width for picture in there)] if there else [SIDE])
    height = max((picture.height for picture in there), default=SIDE)
    columns = min(COLUMNS, math.ceil(math.sqrt(len(rows))))
    lines = math.ceil(len(rows) / columns)
    size = (GAP + columns * (width + GAP), GAP + lines * (height + LINE + GAP))
    sheet, font = Image.new("RGB", size, PAPER), ImageFont.load_default(SMALL)
    pen = ImageDraw.Draw(sheet)
    for place, (row, picture) in enumerate(zip(rows, small, strict=True)):
        left = GAP + place % columns * (width + GAP)
        top = GAP + place // columns * (height + LINE + GAP)
        tile = picture or _grey((width, height), row.file)
        sheet.paste(tile, (left + (width - tile.width) // 2, top + (height - tile.height) // 2))
        pen.text((left, top + height + 1), str(row.index), INK, font)
    buffer = io.BytesIO()
    sheet.save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def _small(storage: Storage, name: str) -> Image.Image | None:
    """The picture of a file in small; ``None``: it is missing, or cannot be read."""
    try:
        return _sized(_picture(storage.get(name), name))
    except Exception:  # whatever storages and decoders raise: a report is no place to fail
        return None


def _picture(content: bytes, name: str) -> Image.Image:
    """A picture, or the frame in the middle of a clip."""
    if PurePosixPath(name).suffix.lower() == CLIP:
        return _frame(content)
    with Image.open(io.BytesIO(content), formats=["PNG"]) as picture:
        picture.seek(getattr(picture, "n_frames", 1) // 2)
        return picture.convert("RGB")


def _frame(content: bytes) -> Image.Image:
    import av

    with av.open(io.BytesIO(content), format="mp4") as file:
        middle = file.streams.video[0].frames // 2  # 0 where the file does not say how many
        frame = next(islice(file.decode(video=0), middle, None))
        picture: Image.Image = frame.to_image()
        return picture


def _sized(picture: Image.Image) -> Image.Image:
    """Enlarged by a whole factor where it is small, reduced where it is large."""
    width, height = picture.size
    longest = max(width, height)
    if longest > SIDE:
        size = (max(1, width * SIDE // longest), max(1, height * SIDE // longest))
        return picture.resize(size, Image.Resampling.LANCZOS)
    factor = SIDE // longest
    return picture.resize((width * factor, height * factor), Image.Resampling.NEAREST)


def _grey(size: tuple[int, int], name: str) -> Image.Image:
    """What is shown for a file that cannot be: the end of its name, in as many lines as fit."""
    tile, font = Image.new("RGB", size, GREY), ImageFont.load_default(SMALL)
    pen = ImageDraw.Draw(tile)
    across, down = max(1, size[0] // 8 - 1), max(1, size[1] // LINE)
    text = "".join(letter if letter.isprintable() else "?" for letter in name)[-across * down :]
    for line in range(math.ceil(len(text) / across)):
        part = text[line * across : (line + 1) * across]
        pen.text((4, 2 + line * LINE), part, INK, font)
    return tile
