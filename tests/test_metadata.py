"""The record in a file: what is written is what is read, whatever the text; no half files."""

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from accel import Plan, cache, guidance
from accel.errors import BadInput, NotWritten
from app import clips, files, metadata
from app.models import Model
from app.request import Request, Source, make

SEEDS = st.integers(0, 2**63 - 1)
TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=60)
PLANS = st.builds(
    lambda threshold, low, order: Plan(
        cache.EasyCache(threshold=threshold, order=order), guidance.Interval(low=low)
    ),
    st.floats(0, 10),
    st.floats(0, 5),
    st.integers(1, 3),
)
REQUESTS = st.builds(
    Request,
    prompt=TEXT,
    negative=st.none() | TEXT,
    seed=SEEDS,
    steps=st.none() | st.integers(1, 1000),
    guidance=st.none() | st.floats(0, 100),
    image=st.none() | st.just(Path("a b/ü.png")),
)


def record(request: Request, plan: Plan, picture: Image.Image) -> metadata.Record:
    return metadata.Record(
        request=request.to_dict(),
        plan=plan.to_dict(),
        call={"prompt": request.prompt, "width": 8, "height": 8, "guidance_scale": 1.0},
        inputs={},
        fingerprint=metadata.Fingerprint(
            model="ab" * 32,
            versions={"torch": "2.13.0", "diffusers-accel": "0.1.0"},
            device="cpu",
            processor="some",
            threads=1,
            dtype="float32",
        ),
        pixels=metadata.pixels([picture]),
        result=metadata.Result(
            seconds=1.5, steps=4, nfe=8.0, verdicts={"cache.EasyCache": {"state": "ACTIVE"}}
        ),
    )


def noise(seed: int = 0) -> Image.Image:
    generator = np.random.default_rng(seed)
    return Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8))


@settings(max_examples=40)
@given(REQUESTS, PLANS)
def test_record_comes_back_from_a_png(
    tmp_path_factory: pytest.TempPathFactory, request_: Request, plan: Plan
) -> None:
    path = tmp_path_factory.getbasetemp() / "round-trip.png"
    made = record(request_, plan, noise())
    path.write_bytes(metadata.png([noise()], made, 16))
    read, frames = metadata.read(path)
    assert read == made
    assert read.asked == request_
    assert Plan.from_dict(read.plan) == plan
    assert metadata.pixels(frames) == made.pixels


@settings(max_examples=40)
@given(st.text(max_size=200))
def test_text_that_is_no_record_is_bad_input(text: str) -> None:
    with pytest.raises(BadInput, match="its record"):
        metadata.parse(text, "a.png")


@settings(max_examples=60)
@given(
    st.sampled_from(["request", "plan", "call", "inputs", "fingerprint", "pixels", "result"]),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner),
        max_leaves=4,
    ),
)
def test_a_record_with_a_field_replaced_is_read_or_bad_input(field: str, value: object) -> None:
    document = record(Request(prompt="fox", seed=1), Plan(), noise()).model_dump()
    try:
        metadata.parse(json.dumps({**document, field: value}), "a.png")
    except BadInput as error:
        assert "record" in str(error)


@settings(max_examples=40)
@given(TEXT)
def test_file_names_are_plain(prompt: str) -> None:
    name = files.slug(prompt)
    assert name and len(name) <= 48 and not name.startswith(("-", "."))
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")


def test_the_line_for_other_tools_says_what_they_show(tmp_path: Path) -> None:
    request = Request(prompt="ein Fuchs – 狐", negative="blurry", seed=7)
    made = record(request, Plan(), noise())
    made = made.model_copy(update={"call": {**made.call, "negative_prompt": "blurry"}})
    path = tmp_path / "a.png"
    path.write_bytes(metadata.png([noise()], made, 16))
    with Image.open(path) as picture:
        lines = picture.info["parameters"].splitlines()
    assert lines[0] == "ein Fuchs – 狐"
    assert lines[1] == "Negative prompt: blurry"
    assert lines[2].startswith(
        "Steps: 4, Sampler: the model's own, CFG scale: 1.0, Seed: 7, Size: 8x8"
    )


def test_frames_come_back_even_where_two_are_alike(tmp_path: Path) -> None:
    frames = [noise(0), noise(1), noise(1), noise(2)]
    made = record(Request(prompt="fox", seed=1, fps=8), Plan(), noise())
    made = made.model_copy(update={"pixels": metadata.pixels(frames)})
    path = tmp_path / "a.png"
    path.write_bytes(clips.encode(path, frames, made, 8))
    read, back = clips.read(path)
    assert metadata.pixels(back) == read.pixels


def test_differences_of_fingerprints_are_named() -> None:
    made = record(Request(prompt="fox", seed=1), Plan(), noise()).fingerprint
    other = made.model_copy(update={"threads": 8, "versions": {**made.versions, "torch": "3.0"}})
    assert made.differences(made) == []
    assert made.differences(other) == ["torch: 2.13.0, now 3.0", "threads: 1, now 8"]


@given(st.lists(st.sampled_from(["vae", "unet"]), unique=True), st.booleans())
def test_the_record_says_what_was_changed_and_where_the_networks_run(
    offloaded: list[str], tiled: bool
) -> None:
    parts = {
        "vae": SimpleNamespace(use_tiling=tiled),
        "unet": SimpleNamespace(),
        "tokenizer": None,
    }
    for name in offloaded:
        parts[name]._hf_hook = object()
    device = "mps:0" if offloaded else "mps"
    pipe: Any = SimpleNamespace(
        components=parts,
        dtype="torch.float32",
        device="cpu" if offloaded else device,
        _execution_device=device,
    )
    found = metadata.fingerprint(Model(Source(), pipe, {}, "ab"))
    assert found.device == device and found.machine.startswith(f"{device}, ")
    words = [*["decoder in tiles"] * tiled, *["networks offloaded"] * bool(offloaded)]
    assert found.savings == tuple(words)
    plain = found.model_copy(update={"savings": ()})
    told = " and ".join(words)
    assert found.differences(plain) == ([f"savings: {told}, now none"] if words else [])
    assert plain.differences(found) == ([f"savings: none, now {told}"] if words else [])


def test_a_record_from_before_savings_were_recorded_is_read() -> None:
    document = record(Request(prompt="fox", seed=1), Plan(), noise()).model_dump()
    del document["fingerprint"]["savings"]
    assert metadata.parse(json.dumps(document), "a.png").fingerprint.savings == ()


def test_requests_from_text_are_checked() -> None:
    assert make(Request, {"prompt": "fox", "steps": "7", "seed": 3}).steps == 7
    with pytest.raises(BadInput, match="--steps 'many'"):
        make(Request, {"prompt": "fox", "steps": "many"})
    assert replace(Request(prompt="fox")).seeded().seed is not None


# Writing


def test_several_files_are_written_together_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    files.write({one: b"1", other: b"2"})
    assert (one.read_bytes(), other.read_bytes()) == (b"1", b"2")
    count = iter(range(10))

    def fill(number: int) -> None:
        if next(count) == 1:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fill)
    with pytest.raises(NotWritten, match="No space left"):
        files.write({one: b"new", other: b"new"})
    assert (one.read_bytes(), other.read_bytes()) == (b"1", b"2")
    assert len(list(tmp_path.iterdir())) == 2


def test_files_have_the_rights_that_the_user_s_mask_leaves(tmp_path: Path) -> None:
    files.write({tmp_path / "one": b"1"})
    (tmp_path / "plain").write_bytes(b"1")
    assert (tmp_path / "one").stat().st_mode == (tmp_path / "plain").stat().st_mode
