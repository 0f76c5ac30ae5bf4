"""``accel stream``: a clip in, a clip out with its record, and nothing half written."""

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from saved import done, run

from app import clips, streaming

SIZES = ["--width", "32", "--height", "32", "--levels", "2", "--steps", "4"]
SMALL = ["--model", "scenes-unet", *SIZES, "--seed", "1"]
ASK = ["--prompt", "a red house", *SMALL]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    film("in.mp4", 4)


def film(name: str, count: int, size: tuple[int, int] = (48, 32)) -> Path:
    places = np.linspace(0, 3, size[0] * size[1] * 3).reshape(size[1], size[0], 3)
    pictures = [
        Image.fromarray(((np.sin(places + number) + 1) * 127).astype(np.uint8))
        for number in range(count)
    ]
    Path(name).write_bytes(clips.film(pictures, 12))
    return Path(name)


def frames_of(name: str) -> list[Image.Image]:
    with clips.opened(Path(name)) as file:
        return [frame.to_image() for frame in file.decode(video=0)]


def test_a_clip_is_drawn_anew_with_its_record():
    told = done("stream", "in.mp4", "out.mp4", *ASK, "--residual", "self", "--format", "json")
    found = json.loads(told.stdout)
    assert (found["frames"], found["skipped"]) == (4, 0)
    assert found["frames_per_second"] > 0
    pictures = frames_of("out.mp4")
    assert [picture.size for picture in pictures] == [(32, 32)] * 4
    made = clips.record_of(Path("out.mp4"))
    assert made == clips.record_of(Path("out.mp4.json"))
    assert made.plan["loop"] == {
        "StreamBatch": {"frames": 0},
        "RCFG": {"negative": "self", "delta": 1.0},
    }
    assert (made.request["seed"], made.request["levels"], made.request["fps"]) == (1, 2, 12)
    assert made.result.verdicts["loop.StreamBatch"]["state"] == "ACTIVE"
    assert not made.result.partial
    with clips.opened(Path("out.mp4")) as file:
        assert file.streams.video[0].average_rate == Fraction(12)
    again = done("stream", "in.mp4", "again.mp4", *ASK, "--residual", "self")
    assert "frames a second" in again.stderr
    assert clips.record_of(Path("again.mp4")).pixels == made.pixels


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["none.mp4", "out.mp4"], "none.mp4 cannot be read"),
        (["text.mp4", "out.mp4"], "text.mp4 cannot be read"),
        (["in.mp4", "out.png"], "has to end in .mp4"),
        (["in.mp4", "in.mp4", "--overwrite"], "is IN"),
        (["in.mp4", "there.mp4"], "is there already"),
        (["in.mp4", "no/out.mp4"], "folder no"),
        (["in.mp4", "out.mp4", "--prompt", " "], "--prompt is empty"),
        (["in.mp4", "out.mp4", "--width", "33"], "multiples of"),
        (["in.mp4", "out.mp4", "--levels", "9"], "levels = 9"),
        (["in.mp4", "out.mp4", "--set", "cache.EasyCache.threshold=0.1"], "cache.EasyCache and"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_leaves_nothing(words, told):
    Path("text.mp4").write_text("no clip")
    Path("there.mp4").write_text("mine")
    before = {path: path.read_bytes() for path in Path().iterdir()}
    result = run("stream", *words[:2], *ASK, *words[2:])
    assert result.exit_code == 2, result.output
    assert told in result.stderr
    assert "Traceback" not in result.stderr
    assert {path: path.read_bytes() for path in Path().iterdir()} == before


def test_a_clip_without_frames(monkeypatch):
    monkeypatch.setattr(streaming.Film, "frames", lambda _self: iter(()))
    result = run("stream", "in.mp4", "out.mp4", *ASK)
    assert result.exit_code == 2
    assert "no frame" in result.stderr
    assert not Path("out.mp4").exists()


@pytest.mark.parametrize("why", ["another size", "broken"])
def test_what_was_made_before_a_clip_breaks_off_is_written(monkeypatch, why):
    first = frames_of("in.mp4")

    class Frame:
        def __init__(self, picture):
            self.picture, (self.width, self.height) = picture, picture.size

        def to_image(self):
            return self.picture

    def decode(video):
        yield from map(Frame, first[:3])
        if why == "broken":
            raise OSError("camera gone")
        yield Frame(first[3].resize((20, 20)))

    inner = streaming.Film.__enter__

    def entered(self):
        found = inner(self)
        self._file = type("File", (), {"decode": staticmethod(decode)})()
        return found

    monkeypatch.setattr(streaming.Film, "__enter__", entered)
    result = run("stream", "in.mp4", "out.mp4", *ASK)
    assert result.exit_code == 2
    wanted = "20×20, and those before it are 48×32" if why == "another size" else "camera gone"
    assert wanted in result.stderr
    assert "3 frames before it are in out.mp4" in result.stderr
    assert len(frames_of("out.mp4")) == 3
    assert clips.record_of(Path("out.mp4")).result.partial
    assert not list(Path().glob(".*.part"))
