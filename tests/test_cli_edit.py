"""`accel edit`: a region of a picture with its record."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from saved import Folders, done, run

from app import metadata


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return Folders(tmp_path_factory.getbasetemp() / "saved-models")


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_edit_changes_a_region_and_keeps_the_rest(models):
    done("generate", "fox", "--model", models("sd15"), "--seed", 3, "--steps", 3, "--out", "a.png")
    told = done(
        *("edit", "a.png", "two boats", "--region", "0,0,0.1,0.1", "--out", "b.png"),
        *("--compare", "--format", "json"),
    )
    document = json.loads(told.stdout)
    before, after = (np.asarray(Image.open(name).convert("RGB")) for name in ("a.png", "b.png"))
    differs = (before != after).any(-1)
    assert differs.any()
    assert not differs[differs.shape[0] // 2 :].any()
    assert 0 < document["share"] < 0.5
    assert document["dense_seconds"] > 0
    assert document["report"]["verdicts"]["region.SIGE"]["state"] == "ACTIVE"
    made, [picture] = metadata.read(Path("b.png"))
    assert made.result.edited == document["share"] and made.pixels == metadata.pixels([picture])
    assert (made.request["prompt"], made.request["seed"]) == ("two boats", 3)
    like = run("generate", "--like", "b.png", "--out", "like.png")
    assert "an edit of a region of another picture: not compared" in " ".join(like.output.split())
    mask = np.zeros(before.shape[:2], np.uint8)
    mask[: before.shape[0] // 10, : before.shape[1] // 10] = 255
    Image.fromarray(mask).save("mask.png")
    done("edit", "a.png", "two boats", "--mask", "mask.png", "--out", "c.png")
    metadata.read("a.png")


def test_bad_edits_are_one_line_and_write_nothing(models, tmp_path):
    done("generate", "fox", "--model", models("sd15"), "--seed", 3, "--steps", 3, "--out", "a.png")
    Image.new("L", (7, 5), 255).save("small.png")
    for wrong, match in {
        (): "found none",
        ("--region", "1,2"): "left,top,width,height",
        ("--region", "0,0,9000,9000"): "does not lie in",
        ("--mask", "small.png"): "mask is 7×5 pixels",
        ("--mask", "small.png", "--region", "0,0,1,1"): "found both",
    }.items():
        found = run("edit", "a.png", "boats", *wrong, "--out", "b.png")
        assert found.exit_code == 2
        assert match in " ".join(found.output.split())
    assert not (tmp_path / "b.png").exists()
