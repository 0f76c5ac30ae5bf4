"""Clips as files: what a model draws decides the type, before anything is loaded or drawn."""

import json
import re
import sys
from pathlib import Path

import pytest
from PIL import Image
from saved import CALLS, Folders, done, picture, run

from accel import quality
from accel.scenes import clip, clip_scene
from app import clips, metadata, models, nearness
from app.request import Request


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders(tmp_path_factory.getbasetemp() / "saved-models")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test runs in an empty folder."""
    monkeypatch.chdir(tmp_path)


def test_the_bundled_clip_model_writes_an_mp4_with_its_record() -> None:
    call = ["a red ball", "--model", "scenes-wan", "--steps", 2, "--frames", 5, "--seed", 3]
    result = done("generate", *call)
    assert result.stdout.splitlines() == ["a-red-ball-3.mp4", "a-red-ball-3.mp4.json"]
    record, frames = clips.read(Path("a-red-ball-3.mp4"))
    assert len(frames) == 5 and frames[0].size == (64, 64)
    assert record.request["prompt"] == "a red ball" and record.result.steps == 2
    assert metadata.parse(Path("a-red-ball-3.mp4.json").read_text(), "beside") == record
    again = done("generate", "--like", "a-red-ball-3.mp4", "--overwrite")
    assert "identical" in again.stderr and again.stdout == result.stdout


def test_the_type_of_file_is_told_by_the_folder_alone(
    folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the call that the model brings, or the arguments of its pipeline; nothing is loaded."""
    folder = folders.fresh("ltx", Path("ltx"))
    monkeypatch.setattr(models, "load", None)
    for call in (CALLS["ltx"], {}):
        (folder / "call.json").write_text(json.dumps(call))
        assert clips.suffix(Request(prompt="fox", model="ltx")) == ".mp4"
    assert clips.suffix(Request(prompt="fox", model="ltx", frames=1)) == ".png"
    for name in CALLS:
        draws_clips = name in ("animatediff", "svd", "ltx")
        found = clips.suffix(Request(prompt="fox", model=folders(name)))
        assert found == (".mp4" if draws_clips else ".png"), name


def test_a_clip_between_two_pictures(folders: Folders) -> None:
    first, last = picture(Path("first.png")), picture(Path("last.png"), "navy")
    ends = ["--model", folders("svd"), "--seed", 1, "--image", first, "--last", last]
    between = ["--set", "loop.ViBiD.scale=1", "--out", "a.mp4"]
    told = done("generate", *ends, *between)
    assert "INACTIVE" not in told.stderr
    record, frames = clips.read(Path("a.mp4"))
    assert set(record.inputs) == {"image", "last"} and len(frames) == 4
    assert "identical" in done("generate", "--like", "a.mp4", "--out", "again.mp4").stderr
    for words, wanted in (
        (ends, "needs loop.ViBiD"),
        ([*ends[:6], *between[:2]], "image=\\[first, last\\]"),
        ([*ends[:4], "--last", last, *between[:2]], "needs --image"),
        (["fox", "--model", folders("sd15"), *ends[4:]], "takes no --last"),
    ):
        refused = run("generate", *words, "--out", "b.mp4")
        assert refused.exit_code == 2 and re.search(wanted, refused.stderr), refused.stderr
    assert not Path("b.mp4").exists()


def test_without_the_extra_it_says_what_to_install_and_loads_nothing(
    folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = folders("animatediff")
    monkeypatch.setitem(sys.modules, "av", None)
    with monkeypatch.context() as patched:
        patched.setattr(models, "load", None)
        refused = run("generate", "fox", "--model", model)
    assert refused.exit_code == 2 and not list(Path().iterdir())
    assert "pip install 'diffusers-accel[video]'" in refused.stderr
    assert "--out that ends in .png" in " ".join(refused.stderr.split())
    written = done(
        "generate", "fox", "--model", model, "--frames", 2, "--steps", 1, "--out", "a.png"
    )
    assert written.stdout == "a.png\n"


def test_a_file_is_reproduced_in_its_own_type(folders: Folders) -> None:
    call = ["--model", folders("animatediff"), "--frames", 2, "--steps", 1, "--seed", 1]
    done("generate", "fox", *call, "--out", "a.png")
    assert done("generate", "--like", "a.png").stdout == "fox-1.png\n"


def test_figures_of_frames_are_those_of_the_frames_alone() -> None:
    """One frame that differs shows there, and flickers before and after."""
    stock = [Image.fromarray(frame) for frame in clip(clip_scene(0))[:5]]
    fast = list(stock)
    fast[2] = stock[3]
    found = nearness.by_frame(stock, fast)
    assert [value == float("inf") for value in found["psnr"]] == [True, True, False, True, True]
    for name in ("ssim", "perceptual"):
        alone = [getattr(quality, name)([a], [b]) for a, b in zip(stock, fast, strict=True)]
        assert found[name] == pytest.approx(alone)
    assert [value > 0 for value in found["flicker"]] == [False, True, True, False]


def test_explain_says_for_which_size_and_length_it_measured(
    folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("accel.attention.sizes.BUDGET", 0.0)  # the model's own size alone
    monkeypatch.setenv("COLUMNS", "200")
    shown = done("explain", "--model", "scenes-wan", "--sparse").stdout
    assert "64 × 64 pixels × 17 frames, 5 × 8 × 8 tokens" in shown
    assert "accel explain --sparse" in done("explain", "--model", "scenes-wan").stdout
