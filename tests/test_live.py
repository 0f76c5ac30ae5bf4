"""The live stream of a server, and its page."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from tiny import PIPELINES

from accel.errors import BadInput
from app import clips
from app.live import LEVELS, Live
from app.request import Source, Streaming
from app.ui import live as page

ASKED = Streaming(model="tiny", prompt="a fox", levels=2, steps=4, guidance=5.0, residual="self")
OTHER = {"width": 32, "height": 32}


@pytest.fixture
def streams():
    loaded = []

    def load(source: Source):
        loaded.append(source)
        return SimpleNamespace(source=source, pipe=PIPELINES["sd15"].build(), call=OTHER)

    found = Live(("tiny",), load)
    found.loaded = loaded
    yield found
    for who in ("a", "b"):
        found.end(who)


def frame(shade=90, size=(48, 40)):
    return Image.new("RGB", size, (shade, 120, 40))


def test_frames_give_pictures_of_the_model_s_size_and_figures(streams):
    first = streams.frame("a", ASKED, frame())
    assert first.picture is None
    second = streams.frame("a", ASKED, frame(200, (64, 64)))
    assert second.picture.size == (32, 32)
    assert (second.frames, second.skipped) == (2, 0)
    third = streams.frame("a", ASKED, frame(200, (64, 64)))
    assert third.picture is second.picture and third.skipped == 1
    assert third.rate > 0


def test_another_prompt_goes_on_and_other_settings_begin_anew(streams):
    streams.frame("a", ASKED, frame())
    changed = Streaming(**{**vars(ASKED), "prompt": "a boat"})
    assert streams.frame("a", changed, frame(20)).frames == 2
    fewer = Streaming(**{**vars(ASKED), "levels": 1})
    assert streams.frame("a", fewer, frame(20)).frames == 1
    assert len(streams.loaded) == 1


def test_one_stream_at_a_time(streams, monkeypatch):
    streams.frame("a", ASKED, frame())
    with pytest.raises(BadInput, match="in use"):
        streams.frame("b", ASKED, frame())
    streams.end("b")
    with pytest.raises(BadInput, match="in use"):
        streams.frame("b", ASKED, frame())
    streams.end("a")
    assert streams.frame("b", ASKED, frame()).frames == 1
    monkeypatch.setattr("app.live.LEFT", 0.0)
    assert streams.frame("a", ASKED, frame()).frames == 1


def test_a_clip_gives_as_many_pictures_as_frames(streams, tmp_path):
    path = tmp_path / "in.mp4"
    path.write_bytes(clips.film([frame(shade, (64, 48)) for shade in (0, 80, 240)], 8))
    found = list(streams.film("a", ASKED, path))
    assert sum(one.picture is not None for one in found) == 3
    with pytest.raises(BadInput, match="cannot be read"):
        list(streams.film("a", ASKED, Path(tmp_path / "none.mp4")))


@pytest.mark.parametrize("changed", [{"model": "other"}, {"levels": LEVELS + 1}, {"prompt": " "}])
def test_what_is_not_offered(streams, changed):
    with pytest.raises(BadInput):
        streams.frame("a", Streaming(**{**vars(ASKED), **changed}), frame())


def test_the_page_s_widgets_as_settings():
    asked = page.of(("scenes-unet", "a fox", 0.5, 4, "onetime"), 20)
    assert (asked.residual, asked.guidance, asked.steps, asked.levels) == ("onetime", None, 8, 4)
    assert page.of(("scenes-unet", "a fox", 0.5, 4, "none"), 20).guidance == 1.0
    assert page.of(("scenes-unet", "a fox", 0.1, 8, "full"), 20).steps == 80
    with pytest.raises(BadInput, match="more than 4 characters"):
        page.of(("scenes-unet", "a fox", 0.5, 4, "full"), 4)
    with pytest.raises(BadInput, match="strength"):
        page.of(("scenes-unet", "a fox", 7.0, 4, "full"), 20)
