"""`accel compare`: what it measures is what happened, and it says so loudly."""

import json
import sys
from pathlib import Path

import av
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from saved import Folders, done, run, size

from accel import asset
from accel.errors import BadInput
from accel.scenes import HELD_OUT, MOTIONS, clip, clip_scene, motion_of, scene
from app import clips, metadata, nearness
from app.compare import FILMS, NAMES, REPORT, SIDES, Timing
from app.request import Request
from app.session import Session


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders(tmp_path_factory.getbasetemp() / "saved-models")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test runs in an empty folder."""
    monkeypatch.chdir(tmp_path)


def test_compare_writes_pictures_sheet_timeline_and_report(models: Folders) -> None:
    result = done(
        "compare", "a red fox in the snow", "--model", models("flux_cfg"), "--seed", 7,
        "--steps", 6, "--set", "cache.EasyCache.threshold=1e6", "--out", "out", "--repeats", 2,
    )  # fmt: skip
    assert result.stdout.splitlines() == [f"out/{name}" for name in (*NAMES, REPORT)]
    assert sorted(path.name for path in Path("out").iterdir()) == sorted([*NAMES, REPORT])
    report = json.loads(Path("out", REPORT).read_text())
    assert report["baseline"]["report"]["nfe"] == 12
    assert report["accelerated"]["report"]["nfe"] == 8  # 3 steps of warm-up and the last one
    assert len(report["baseline"]["seconds"]["all"]) == 2
    medians = [report[side]["seconds"]["median"] for side in ("baseline", "accelerated")]
    assert report["ratio"] == pytest.approx(medians[0] / medians[1])
    assert report["ratios"][0] <= report["ratio"] <= report["ratios"][1]
    assert 0 < report["quality"]["psnr"] < 100 and report["quality"]["ssim"] < 1
    for name in NAMES:
        assert min(size(Path("out", name))) > 30
    assert ("stock" in result.stderr and "faster" in result.stderr) or "slower" in result.stderr
    peaks = [report[side]["report"]["peak"] for side in ("baseline", "accelerated")]
    assert "peak MiB" in result.stderr
    for peak in filter(None, peaks):  # not every system keeps one
        assert peak["bytes"] >= peak["before"] > 2**20
        assert f"{peak['bytes'] / 2**20:.0f}" in result.stderr


def test_both_pictures_can_be_made_again_from_themselves(models: Folders) -> None:
    done(
        "compare", "fox", "--model", models("sd15"), "--seed", 7, "--out", "out", "--repeats", 1,
        "--steps", 6, "--set", "cache.EasyCache.threshold=1e6",
    )  # fmt: skip
    for side, methods in (("baseline", 0), ("accelerated", 1)):
        again = done("generate", "--like", f"out/{side}.png", "--out", f"{side}.png")
        assert "identical" in again.stderr
        assert len(metadata.read(Path(f"{side}.png"))[0].result.verdicts) == methods


def test_clips_are_compared_frame_by_frame_and_side_by_side(models: Folders) -> None:
    result = done(
        "compare", "fox", "--model", models("animatediff"), "--seed", 7, "--out", "out",
        "--repeats", 1, "--steps", 6, "--frames", 5, "--set", "cache.EasyCache.threshold=1e6",
    )  # fmt: skip
    pictures = [name for name in NAMES if Path(name).stem not in SIDES]
    names = [*FILMS, *pictures, REPORT]
    assert result.stdout.splitlines() == [f"out/{name}" for name in names]
    report = json.loads(Path("out", REPORT).read_text())
    frames, figures = report["frames"], report["quality"]
    assert {name: len(each) for name, each in frames.items()} == {
        "psnr": 5, "ssim": 5, "perceptual": 5, "flicker": 4
    }  # fmt: skip
    for name in ("ssim", "perceptual", "flicker"):
        assert figures[name] == pytest.approx(sum(frames[name]) / len(frames[name]), rel=1e-4)
        assert len({*frames[name]}) > 1  # every frame is a figure of its own
    assert "flicker" in result.stderr and "worst frame" in result.stderr
    assert report["motion"] == {}  # no caption of a scene
    for side, methods in (("baseline", 0), ("accelerated", 1)):
        record, both = clips.read(Path("out", f"{side}.mp4"))
        assert len(both) == 5 and len(record.result.verdicts) == methods
        assert metadata.parse(Path("out", f"{side}.mp4.json").read_text(), side) == record
    with av.open(f"out/{FILMS[0]}") as film:
        shown = [frame.to_image() for frame in film.decode(video=0)]
    assert len(shown) == 5
    assert shown[0].width > 3 * 320 and shown[0].height > 320


@given(st.integers(0, 10**6), st.integers(0, 3))
def test_what_a_caption_says_to_move_is_read_off_its_end(seed: int, wording: int) -> None:
    told = clip_scene(seed, wording)
    assert motion_of(told.caption) == motion_of(f"{told.caption.capitalize()}.") == told.motion
    assert motion_of(scene(seed, wording).caption) is None


def test_motion_is_right_where_a_clip_moves_as_it_is_told_to() -> None:
    """Rendered clips, and the same played backwards."""
    told = [clip_scene(seed) for seed in HELD_OUT[:12]]
    right = backwards = 0
    for one in told:
        frames = [Image.fromarray(frame) for frame in clip(one)]
        forth, back = nearness.motion(one.caption, [frames, frames[::-1]])
        assert set(forth) == set(back) == set(MOTIONS)
        right += sum(forth.values())
        backwards += back["direction"]
    assert right > 0.8 * 3 * len(told)
    assert backwards < 0.4 * len(told)
    assert nearness.motion("a red fox", [[], []]) == []


def test_compare_says_what_moves_as_the_caption_tells(models: Folders) -> None:
    told = clip_scene(HELD_OUT[0])
    result = done(
        "compare", told.caption, "--model", models("animatediff"), "--out", "out", "--repeats", 1,
        "--steps", 2, "--frames", 5,
    )  # fmt: skip
    motion = json.loads(Path("out", REPORT).read_text())["motion"]
    assert set(motion) == {"baseline", "accelerated"}
    for who, right in zip(("stock", "balanced"), motion.values(), strict=True):
        assert set(right) == set(MOTIONS)
        assert f"motion of {who}: {sum(right.values())} of 3 right" in result.stderr


def test_nothing_of_an_earlier_comparison_stays_in_the_folder(models: Folders) -> None:
    """A clip leaves films, a picture PNGs: whichever is written over."""
    common = ["--out", "out", "--repeats", 1, "--steps", 1, "--overwrite"]
    clip = ["--model", models("animatediff"), "--frames", 2]
    for options, films in ((clip, True), (["--model", models("sd15")], False), (clip, True)):
        done("compare", "fox", *options, *common)
        found = {path.name for path in Path("out").iterdir()}
        assert found & {*FILMS} == ({*FILMS} if films else set())
        assert {f"{side}.png" for side in SIDES} <= found or films
        assert ("baseline.png" in found) != films


def test_without_the_extra_for_video_the_rest_is_written(
    models: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    result = done(
        "compare", "fox", "--model", models("animatediff"), "--out", "out", "--repeats", 1,
        "--steps", 2,
    )  # fmt: skip
    warning = f"warning: animated PNGs, and no {FILMS[0]}: MP4 needs the extra 'video'"
    assert warning in result.stderr
    assert sorted(path.name for path in Path("out").iterdir()) == sorted([*NAMES, REPORT])


def test_a_method_that_did_nothing_is_loud_and_the_pictures_are_equal(models: Folders) -> None:
    result = done(
        "compare", "fox", "--model", models("sd15"), "--seed", 7, "--out", "out", "--repeats", 1,
        "--set", "cache.EasyCache.threshold=0.0001",
    )  # fmt: skip
    assert "INACTIVE" in result.stderr and "warning: cache.EasyCache did nothing" in result.stderr
    report = json.loads(Path("out", REPORT).read_text())
    assert report["quality"]["psnr"] == "equal" and report["quality"]["ssim"] == 1
    assert report["accelerated"]["report"]["verdicts"]["cache.EasyCache"]["state"] == "INACTIVE"


def test_stock_is_timed_with_nothing_attached(
    models: Folders,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[bool] = []
    bare = Session.bare

    def watched(session: Session, request: Request) -> object:
        pipe = session.model.pipe
        seen.append("step" in vars(pipe.scheduler) or "forward" in vars(pipe.unet))
        return bare(session, request)

    monkeypatch.setattr(Session, "bare", watched)
    done("compare", "fox", "--model", models("sd15"), "--out", "out", "--repeats", 3)
    assert seen == [False] * 3


def test_compare_refuses_a_folder_with_results_in_it(models: Folders) -> None:
    Path("out").mkdir()
    Path("out", REPORT).write_text("precious")
    result = run("compare", "fox", "--model", models("sd15"), "--out", "out")
    assert result.exit_code == 2 and "report.json is there already" in result.stderr
    assert [path.name for path in Path("out").iterdir()] == [REPORT]


def test_spread_is_half_the_range() -> None:
    timing = Timing((1.0, 5.0, 2.0))
    assert (timing.median, timing.spread) == (2.0, 2.0)


def test_the_bundled_model_is_compared_with_the_default_preset() -> None:
    try:
        asset("models/scenes-flux")
        asset("plans/balanced.toml")
    except BadInput:
        pytest.skip("scenes-flux does not ship yet")
    done("compare", "a red house", "--steps", 2, "--repeats", 1, "--seed", 7, "--out", "out")
    assert size("out/baseline.png") == (128, 128)
