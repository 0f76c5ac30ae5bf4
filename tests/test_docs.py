"""The documents are true: generated pages are current, and what they show runs."""

import re
import shlex
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import torch
from diffusers import StableVideoDiffusionPipeline
from forks import accel as typed
from PIL import Image, ImageChops

import accel
from accel.errors import AccelWarning
from app import metadata

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BATCH = (ROOT / "docs" / "batch.md").read_text()
TUNING = (ROOT / "docs" / "tuning.md").read_text()
STREAMING = (ROOT / "docs" / "streaming.md").read_text()
LARGE = (ROOT / "docs" / "large-pictures.md").read_text()
EDITING = (ROOT / "docs" / "editing.md").read_text()
KEY_FRAMES = (ROOT / "docs" / "key-frames.md").read_text()
SAMPLERS = (ROOT / "docs" / "samplers.md").read_text()
INT8 = (ROOT / "docs" / "int8.md").read_text()
ATTENTION = (ROOT / "docs" / "attention.md").read_text()
SMALL = "--steps 3 --height 64 --width 64"
"""What makes of a documented command a short one: the last of two options counts."""
PROMPTS = "a boat on the sea\na red house\n"
GUIDE = (ROOT / "docs" / "adding-a-method.md").read_text()


def fenced(text, language):
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def commands(page=README):
    lines = [line for block in fenced(page, "bash") for line in block.splitlines()]
    return [line.split("  #")[0].strip() for line in lines if line.strip()]


def made_by(target):
    """The accel command that `make TARGET` would run."""
    done = subprocess.run(
        ["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=True
    )
    (line,) = [line for line in done.stdout.splitlines() if "/accel " in line]
    return "accel " + line.split("/accel ", 1)[1]


def run(command, folder):
    """Run it; what it wrote to stdout."""
    words = shlex.split(command)
    assert words[0] == "accel", command
    return typed(words[1:], folder)


def serve(command, folder):
    """Start it on a free port, ask whether it is well, and end it."""
    words = [*shlex.split(command), "--port", "0"]
    server = subprocess.Popen(
        [Path(sys.executable).parent / words[0], *words[1:]],
        cwd=folder,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        with urllib.request.urlopen(_address(server) + "/api/v1/health", timeout=60) as answer:
            assert answer.status == 200
        server.terminate()
        assert server.wait(timeout=60) == 0
    finally:
        server.kill()
        server.communicate()


def _address(server):
    """What the server says where it is; the rest of what it writes is an error."""
    lines = iter(server.stderr.readline, "")
    told = next((line for line in lines if line.startswith("http")), None)
    assert told, f"accel ui ended with {server.wait()}"
    return told.split()[0]


def test_generated_pages_are_current():
    done = subprocess.run(
        [sys.executable, "tools/write_docs.py", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_readme_commands_run_in_order(tmp_path):
    (tmp_path / "prompts.txt").write_text(PROMPTS)
    for command in commands():
        if command.startswith("make "):
            assert command in ("make demo", "make test")
            continue
        if not command.startswith("accel ui"):
            run(command, tmp_path)
    for name in ("boat.png", "again.png", "compare/sheet.png", "compare/report.json"):
        assert (tmp_path / name).stat().st_size > 0
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 2


def test_the_commands_of_the_page_on_batches_run_in_order(tmp_path):
    (tmp_path / "prompts.txt").write_text(PROMPTS)
    (tmp_path / "rows.yaml").write_text(fenced(BATCH, "yaml")[0])
    for command in commands(BATCH):
        run(command, tmp_path)
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 2
    assert len(list((tmp_path / "sweep").glob("*.png"))) == 8


def test_the_page_on_int8_runs(tmp_path):
    small = "--height 32 --width 32"
    for command in commands(INT8):
        run(f"{command} {small if 'generate' in command else ''}", tmp_path)
    for name in ("int8.toml", "int8.safetensors", "house.png"):
        assert (tmp_path / name).stat().st_size > 0
    (python,) = fenced(INT8, "python")
    compile(python, "docs/int8.md", "exec")


def test_the_page_on_samplers_runs(tmp_path):
    for command in commands(SAMPLERS):
        run(f"{command} --height 32 --width 32", tmp_path)
    for name in ("olss.toml", "boat.png", "levels.toml", "house.png"):
        assert (tmp_path / name).stat().st_size > 0
    (python,) = fenced(SAMPLERS, "python")
    scope = {}
    exec(python.replace('"num_inference_steps": 10', '"num_inference_steps": 3'), scope)
    assert scope["image"].size == (128, 128)


@pytest.mark.filterwarnings("ignore:.*does not pay")
def test_the_page_on_attention_runs(tmp_path):
    small = "--steps 3 --height 32 --width 32"
    for command in commands(ATTENTION):
        run(f"{command} {'' if 'explain' in command else small}", tmp_path)
    for name in ("house.png", "boat.mp4", "clips/report.json"):
        assert (tmp_path / name).stat().st_size > 0
    (python,) = fenced(ATTENTION, "python")
    scope = {}
    exec(python.replace("512", "128"), scope)
    assert scope["run"].report.verdicts["attention.Pattern"].state == "ACTIVE"


def test_the_page_on_tuning_runs(tmp_path):
    briefly = {"accel tune": "--captions 1 --choice 1 --held-out 1 --budget 20s"}
    briefly["accel prove"] = "--held-out 1"
    for command in commands(TUNING):
        brief = next((more for name, more in briefly.items() if name in command), "")
        run(f"{command} {SMALL} {brief}", tmp_path)
    for name in ("near.toml", "near.png", "boat.png", "house.png", "near-here.toml"):
        assert (tmp_path / name).stat().st_size > 0
    python, proving = fenced(TUNING, "python")
    compile(python, "docs/tuning.md", "exec")
    small = '.load("scenes-flux")\ncall |= dict(num_inference_steps=3, height=64, width=64)'
    short = python.replace('.load("scenes-flux")', small).replace(
        "budget=600", "20, split=(1, 1, 1)"
    )
    scope = {}
    exec(short.replace('"near.png"', repr(str(tmp_path / "again.png"))), scope)
    assert scope["image"].size == (64, 64) and (tmp_path / "again.png").stat().st_size > 0
    with pytest.warns(AccelWarning, match="did nothing"):  # three steps leave nothing to reuse
        exec(proving.replace("call=call", "call=call, held_out=1"), scope)
    assert scope["plan"].tuned.targets == ("ssim>=0.95",)


def test_the_page_on_streams_runs(tmp_path):
    """The command on a small clip, with few levels; the Python as it stands, on two frames."""
    from app import clips

    pictures = [Image.new("RGB", (48, 32), (shade, 90, 120)) for shade in (0, 60, 120)]
    (tmp_path / "in.mp4").write_bytes(clips.film(pictures, 8))
    for command in commands(STREAMING):
        run(f"{command} --width 32 --height 32 --steps 4 --levels 2", tmp_path)
    assert clips.record_of(tmp_path / "out.mp4").result.verdicts["loop.RCFG"]["state"] == "ACTIVE"
    (python,) = fenced(STREAMING, "python")
    scope = {}
    exec(python.replace("(64, 64)", "(32, 32)").replace("240, 40", "80, 40"), scope)
    assert len(scope["pictures"]) == 2


def test_readme_server_starts_answers_and_ends(tmp_path):
    served = [command for command in commands() if command.startswith("accel ui")]
    assert served
    for command in served:
        serve(command, tmp_path)


def test_make_demo_writes_the_comparison(tmp_path):
    run(made_by("demo"), tmp_path)
    assert {path.name for path in (tmp_path / "demo").iterdir()} >= {
        "baseline.png",
        "accelerated.png",
        "difference.png",
        "sheet.png",
        "timeline.png",
        "report.json",
    }


def test_make_test_is_what_ci_runs():
    assert "make test" in (ROOT / ".ci" / "run").read_text()
    assert "make test" in commands()


@pytest.mark.filterwarnings("default::accel.errors.AccelWarning")  # weights may change
@pytest.mark.parametrize("block", range(len(fenced(README, "python"))))
def test_readme_python_runs(block):
    scope = {}
    exec(fenced(README, "python")[block], scope)
    results = [value for value in scope.values() if isinstance(value, accel.Plan)]
    assert "image" in scope or results


def test_the_example_method_is_a_method(tmp_path, monkeypatch):
    """The file in the guide, as it stands, obeys its closed form and comes off."""
    (tmp_path / "fixed_example.py").write_text(fenced(GUIDE, "python")[0])
    monkeypatch.syspath_prepend(tmp_path)
    import fixed_example
    from tiny import PIPELINES

    tiny = PIPELINES["flux_cfg"]
    pipe = tiny.build()
    stock = tiny.call(pipe, steps=6)
    with accel.Plan(fixed_example.Fixed(interval=3)).attach(pipe) as run_:
        tiny.call(pipe, steps=6)
    assert run_.report.nfe == 2 * 2
    assert run_.report.verdicts["cache.Fixed"].detail == "4/6 reused"
    assert torch.equal(tiny.call(pipe, steps=6), stock)


def test_large_pictures_are_made_as_documented(tmp_path):
    stages, patches, shared = commands(LARGE)
    run(f"{stages} --steps 3 --height 64 --width 64", tmp_path)
    for each in (patches, shared):
        small = "--steps 1 --height 64 --width 64 --set resolution.Pixelsmith.base=48 --seed 1"
        run(f"{each} {small}", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"stages.png", "patches.png", "shared.png"}
    with Image.open(tmp_path / "patches.png") as one, Image.open(tmp_path / "shared.png") as two:
        extremes = ImageChops.difference(one, two).getextrema()
    assert max(high for _, high in extremes) <= 1  # processes may have fewer threads
    assert metadata.read(tmp_path / "shared.png")[0].fingerprint.processes == 2


def test_editing_runs_as_documented(tmp_path):
    generate, edit = commands(EDITING)
    run(f"{generate} --steps 3 --height 64 --width 64", tmp_path)
    run(edit, tmp_path)
    assert (tmp_path / "blue.png").exists()
    (block,) = fenced(EDITING, "python")
    short = block.replace(
        "**call,", '**{**call, "num_inference_steps": 3, "height": 64, "width": 64},'
    )
    exec(compile(short, "editing.md", "exec"), {})


def test_the_page_on_key_frames_runs(tmp_path, monkeypatch):
    """As it stands, with a tiny pipeline in the place of the published one."""
    from saved import enlarge_eye
    from tiny import TINIES

    pipe = TINIES["svd_keys"].build()
    enlarge_eye(pipe)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        StableVideoDiffusionPipeline, "from_pretrained", lambda _model, torch_dtype: pipe
    )
    for name, shade in (("first.png", 40), ("last.png", 200)):
        Image.new("RGB", (24, 24), (shade, 90, 120)).save(name)
    (block,) = fenced(KEY_FRAMES, "python")
    size = "num_frames=3, num_inference_steps=1, height=16, width=16"
    small = block.replace('.to("cuda")', "").replace("num_frames=25", size)
    scope = {}
    exec(compile(small, "key-frames.md", "exec"), scope)
    assert len(scope["frames"]) == 3
    assert scope["run"].report.verdicts["loop.ViBiD"].state == "ACTIVE"
