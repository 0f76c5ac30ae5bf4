"""The benchmark of presets: pictures and clips, each preset beside stock."""

import json
import sys
from pathlib import Path

import pytest

import accel
from accel.plan import PRESETS

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import presets


@pytest.mark.parametrize("model", ["scenes-flux", "scenes-wan"])
def test_every_preset_is_drawn_beside_stock(tmp_path, monkeypatch, model):
    pipe, call = accel.load(model)
    small = call | {"num_inference_steps": 5, "height": 64, "width": 64}
    small |= {"num_frames": 5} if "num_frames" in call else {}
    monkeypatch.setattr(accel, "load", lambda _name: (pipe, small))
    given = ["--model", model, "--captions", "2", "--threads", "1", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["presets.py", *given])
    presets.main()
    found = json.loads((tmp_path / f"presets-{model}.json").read_text())["variants"]
    assert tuple(found) == ("stock", *PRESETS)
    for name in ("stock", "exact"):
        row = found[name]
        assert (row["ssim"], row["psnr"], row["perceptual"]) == (1.0, 100.0, 0.0)
        assert row["nfe"] == 10
    for name, row in found.items():
        assert accel.Plan.from_dict(row["plan"]) == accel.Plan.preset(
            name.replace("stock", "exact")
        )
        assert row["seconds"]["repeats"] == 2 and row["ssim_worst"] <= row["ssim"]
        for level, share in row["share"].items():
            assert (share == 1.0) == (row["ssim_worst"] >= float(level))
        assert row["nfe"] <= found["stock"]["nfe"]
    assert found["fastest"]["nfe"] < 10
