"""The benchmark of low precision: every form beside stock, with its bytes."""

import json
import sys
from pathlib import Path

import pytest

import accel

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import int8

pytest.importorskip("torchao", reason="the extra 'int8' is not installed")

FORMS = {
    f"{form}{which}" for form in ("weight only", "dynamic", "static") for which in ("", ", all")
}


def test_every_form_is_drawn_beside_stock_and_in_half_precision(tmp_path, monkeypatch):
    load = accel.load

    def small(name):
        pipe, call = load(name)
        return pipe, call | {"height": 64, "width": 64}

    monkeypatch.setattr(accel, "load", small)
    options = {"captions": 1, "prompts": 1, "steps": 8, "threads": 1, "out": tmp_path}
    options["kept"] = tmp_path / "kept"
    given = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["int8.py", *given])
    int8.main()
    result = json.loads((tmp_path / "int8-scenes-flux.json").read_text())
    rows = {row["method"]: row for row in result["rows"]}
    assert rows.keys() == FORMS | {"stock", "bfloat16"}
    assert rows["bfloat16"]["bytes"] * 2 == rows["stock"]["bytes"]
    for form in ("weight only", "dynamic", "static"):
        assert rows[f"{form}, all"]["bytes"] < rows[form]["bytes"] < rows["stock"]["bytes"]
    assert rows["stock"]["ssim"] == 1.0
    assert all(0.5 < row["ssim"] < 1.0 for name, row in rows.items() if name != "stock")
    table = (tmp_path / "int8-scenes-flux.md").read_text()
    assert all(f"| {name} |" in table for name in rows)
