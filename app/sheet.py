"""The sheet of a comparison: both pictures and their difference, with what was measured."""

from __future__ import annotations

from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

from accel.report import ACTIVE

if TYPE_CHECKING:
    from app.compare import Comparison, Side

INK, PAPER, QUIET, GOOD, BAD = "#202020", "#ffffff", "#6a6a6a", "#1a7f37", "#b3261e"
MARGIN, LINE, SMALL, LARGE = 20, 22, 15, 21
SIDE_LEAST, SIDE_MOST = 320, 768
LABELS = {
    "psnr": "PSNR",
    "ssim": "SSIM",
    "perceptual": "perceptual distance",
    "flicker": "flicker",
}
Line = tuple[str, str]


def draw(
    prompt: str, found: Comparison, difference: Image.Image, gain: float, place: str
) -> Image.Image:
    """Three pictures in a row, captions below, the verdicts under them; the middle of a clip.

    Args:
        prompt: The title.
        found: What was measured.
        difference: The amplified difference.
        gain: How much it is amplified.
        place: The last line: where and with what it was measured.
    """
    stock, fast = found.baseline, found.accelerated
    frame = len(stock.outcome.pictures) // 2
    pictures = row(stock.outcome.pictures, fast.outcome.pictures, difference, frame)
    captions = [
        [("stock", INK), *_timed(stock)],
        [(f"{found.title}: {faster(found)}", GOOD if found.ratio > 1 else BAD), *_timed(fast)],
        [
            (f"difference, {gain:g} times amplified", INK),
            *((text, QUIET) for text in measured(found)),
        ],
    ]
    verdicts = [*_verdicts(found), ("", QUIET), (place, QUIET)]
    font, large = ImageFont.load_default(SMALL), ImageFont.load_default(LARGE)
    side = max(picture.width for picture in pictures)
    tallest = max(picture.height for picture in pictures)
    title = _wrapped(prompt, large, 3 * side + 2 * MARGIN)
    head = MARGIN + len(title) * (LARGE + 7) + 8
    height = head + tallest + 10 + 5 * LINE + len(verdicts) * LINE + MARGIN
    sheet = Image.new("RGB", (3 * side + 4 * MARGIN, height), PAPER)
    pen = ImageDraw.Draw(sheet)
    for line, text in enumerate(title):
        pen.text((MARGIN, MARGIN + line * (LARGE + 7)), text, INK, large)
    for column, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        left = MARGIN + column * (side + MARGIN)
        sheet.paste(picture, (left, head))
        _write(pen, (left, head + tallest + 10), caption, font)
    _write(pen, (MARGIN, head + tallest + 10 + 5 * LINE), verdicts, font)
    return sheet


def row(
    stock: list[Image.Image], fast: list[Image.Image], difference: Image.Image, frame: int
) -> list[Image.Image]:
    """A frame of both sides and their difference, all of one size for the screen.

    Args:
        stock: The frames of the stock side.
        fast: Those of the accelerated one.
        difference: All frames' differences side by side.
        frame: Which one, from 0.
    """
    width, height = stock[0].size
    apart = difference.crop((frame * width, 0, (frame + 1) * width, height))
    return [_sized(picture) for picture in (stock[frame], fast[frame], apart)]


def side_by_side(found: Comparison, difference: Image.Image, gain: float) -> list[Image.Image]:
    """The frames of a clip: both sides and their difference under a line of what they are."""
    stock, fast = found.baseline, found.accelerated
    heads = [
        ("stock", INK),
        (f"{found.title}: {faster(found)}", GOOD if found.ratio > 1 else BAD),
        (f"difference, {gain:g} times amplified", INK),
    ]
    font = ImageFont.load_default(SMALL)
    frames = []
    for frame in range(len(stock.outcome.pictures)):
        pictures = row(stock.outcome.pictures, fast.outcome.pictures, difference, frame)
        width, height = pictures[0].size
        size = (3 * width + 4 * MARGIN, height + LINE + 2 * MARGIN)
        sheet = Image.new("RGB", size, PAPER)
        pen = ImageDraw.Draw(sheet)
        for column, (picture, head) in enumerate(zip(pictures, heads, strict=True)):
            left = MARGIN + column * (width + MARGIN)
            _write(pen, (left, MARGIN // 2), [head], font)
            sheet.paste(picture, (left, MARGIN + LINE))
        frames.append(sheet)
    return frames


def faster(found: Comparison) -> str:
    """The speed-up in words."""
    word = "faster" if found.ratio >= 1 else "slower"
    return f"{max(found.ratio, 1 / found.ratio):.2f} times {word}"


def measured(found: Comparison) -> list[str]:
    """PSNR, SSIM, perceptual distance, and flicker of clips, a line each."""
    return [f"{LABELS[name]}  {figure(name, value)}" for name, value in found.quality.items()]


def figure(name: str, value: float | str) -> str:
    """One figure of quality as text."""
    if isinstance(value, str):
        return "not measured"
    if name == "psnr":
        return "equal" if value == float("inf") else f"{value:.1f} dB"
    return f"{value:.4f}"


def _timed(side: Side) -> list[Line]:
    timing, report = side.timing, side.report
    return [
        (f"{timing.median:.2f} ± {timing.spread:.2f} s  ({len(timing.seconds)} runs)", INK),
        (f"{report.nfe:g} network evaluations, {report.steps} steps", QUIET),
    ]


def _verdicts(found: Comparison) -> list[Line]:
    return [
        (f"{method}  {verdict.state}  {verdict.detail}", QUIET if verdict.state == ACTIVE else BAD)
        for method, verdict in found.accelerated.report.verdicts.items()
    ]


def _write(
    pen: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    lines: list[Line],
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> None:
    left, top = corner
    for line, (text, colour) in enumerate(lines):
        pen.text((left, top + line * LINE), text, colour, font)


def _sized(picture: Image.Image) -> Image.Image:
    """Enlarged by a whole factor where it is small, reduced where it is large."""
    width, height = picture.size
    if max(width, height) > SIDE_MOST:
        share = SIDE_MOST / max(width, height)
        return picture.resize((round(width * share), round(height * share)))
    factor = -(-SIDE_LEAST // max(width, height))
    return picture.resize((width * factor, height * factor), Image.Resampling.NEAREST)


def _wrapped(
    text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int
) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines[:4]
