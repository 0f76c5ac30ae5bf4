"""Bad input: one clear line, the right exit code, and nothing written."""

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image
from safetensors.torch import load_file, save_file
from saved import Folders, done, picture, run

import accel.plan
from accel.attach import Run
from accel.cache import EasyCache
from app import metadata
from app.progress import Bar
from app.session import Session

FAILED, USAGE, INTERRUPTED = 1, 2, 130


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders(tmp_path_factory.getbasetemp() / "saved-models")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test runs in an empty folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def broken(models: Folders, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A copy of a model folder to break."""

    def copy(name: str) -> Path:
        folder = tmp_path_factory.mktemp("broken") / name
        shutil.copytree(models(name), folder)
        return folder

    return copy


def refused(code: int, says: tuple[str, ...], *args: object, command: str = "generate") -> None:
    """Run a command that has to fail with one line that says something, and write nothing."""
    before = sorted(Path.cwd().rglob("*"))
    result = run(command, *args)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    line = result.stderr
    assert line.startswith("error: ") and line.endswith("\n") and line.count("\n") == 1, line
    assert "Traceback" not in line and len(line) < 600
    for words in says:
        assert words in line, line
    assert sorted(Path.cwd().rglob("*")) == before


# The plan


PLANS = {
    "unknown method": ("cache.EasyCach.threshold=1", ("no method 'cache.EasyCach'", "EasyCache?")),
    "unknown family": ("cash.EasyCache.threshold=1", ("no method 'cash.EasyCache'",)),
    "unknown field": ("cache.EasyCache.treshold=1", ("no field 'treshold'", "threshold")),
    "out of range": ("cache.EasyCache.threshold=-1", ("threshold = -1", "greater than or equal")),
    "wrong type": ("cache.EasyCache.threshold=often", ("threshold = 'often'", "number")),
    "wrong choice": ("guidance.Adaptive.space=rgb", ("space = 'rgb'", "'raw', 'x0' or 'v'")),
    "empty interval": ("guidance.Interval.high=0.1", ("must be below high",)),
    "no change": ("cache.EasyCache.threshold", ("METHOD.FIELD=VALUE",)),
    "no field": ("cache.EasyCache=1", ("METHOD.FIELD=VALUE",)),
}


@pytest.mark.parametrize("change", PLANS)
@pytest.mark.parametrize("command", ["generate", "compare"])
def test_change_of_a_plan(change: str, command: str) -> None:
    typed, says = PLANS[change]
    refused(USAGE, says, "fox", "--set", typed, command=command)


FILES = {
    "no toml": (b"[cache.EasyCache", ("mine.toml", "no TOML", "accel methods --toml")),
    "binary": (b"\xff\xfe\x00", ("mine.toml", "no text")),
    "other format": (b"plan = 99", ("mine.toml", "format 99")),
    "no table": (b"cache = 3", ("mine.toml", "no method")),
    "method no table": (b"[cache]\nEasyCache = 3", ("mine.toml", "table of fields")),
    "range": (b"[cache.EasyCache]\nthreshold = -1", ("mine.toml", "threshold = -1")),
}


@pytest.mark.parametrize("kind", FILES)
def test_plan_file(kind: str) -> None:
    content, says = FILES[kind]
    Path("mine.toml").write_bytes(content)
    refused(USAGE, says, "fox", "--plan", "mine.toml")


def test_plan_file_that_is_not_there() -> None:
    refused(USAGE, ("mine.toml", "No such file"), "fox", "--plan", "mine.toml")
    Path("folder.toml").mkdir()
    refused(USAGE, ("folder.toml", "directory"), "fox", "--plan", "folder.toml")


def test_plan_file_and_preset() -> None:
    Path("mine.toml").write_text("plan = 1")
    refused(USAGE, ("choose one",), "fox", "--plan", "mine.toml", "--preset", "exact")


class Rival(EasyCache):
    """Holds the same seam."""

    name: ClassVar[str] = "cache.Rival"


def test_two_methods_that_cannot_go_together(
    models: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {
        **accel.plan.entry_points_by_name(),
        "cache.Rival": EntryPoint("cache.Rival", f"{__name__}:Rival", accel.plan.GROUP),
    }
    monkeypatch.setattr(accel.plan, "entry_points_by_name", lambda: known)
    both = ["--set", "cache.EasyCache", "--set", "cache.Rival"]
    says = ("cache.Rival", "cache.EasyCache", "leave one of them out")
    refused(USAGE, says, "fox", "--model", models("sd15"), *both)


def test_method_that_does_not_fit_the_model(models: Folders) -> None:
    block_cache = ["--set", "cache.FirstBlock"]
    refused(USAGE, ("UNet",), "fox", "--model", models("sd15"), *block_cache)


# The model


def test_pipeline_that_is_not_supported(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("ddpm")
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
        layers_per_block=1,
    )
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(folder)
    refused(USAGE, ("DDPMPipeline", "not known"), "--model", folder, "--steps", 2)


def test_model_that_is_not_there() -> None:
    refused(USAGE, ("foo", "scenes-flux"), "fox", "--model", "foo")
    refused(USAGE, ("some/folder/deep", "path of"), "fox", "--model", "some/folder/deep")


def test_hub_model_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_args: object, **_more: object) -> None:
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", unreachable)
    says = ("no-such-owner/model", "hub cache", "no route to the hub", "--model PATH")
    refused(FAILED, says, "fox", "--model", "no-such-owner/model")


def break_nothing_there(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def break_index(folder: Path) -> None:
    (folder / "model_index.json").write_text("{")


def break_call(folder: Path) -> None:
    (folder / "call.json").write_text("{")


def break_part(folder: Path) -> None:
    shutil.rmtree(folder / "text_encoder")


def weights(folder: Path) -> Path:
    return folder / "transformer" / "diffusion_pytorch_model.safetensors"


def break_weights_missing(folder: Path) -> None:
    weights(folder).unlink()


def break_weights_pickled(folder: Path) -> None:
    torch.save(load_file(weights(folder)), weights(folder).with_suffix(".bin"))
    weights(folder).unlink()


def break_weights_truncated(folder: Path) -> None:
    os.truncate(weights(folder), weights(folder).stat().st_size - 5)


def break_weights_header(folder: Path) -> None:
    os.truncate(weights(folder), 40)


def break_weights_empty(folder: Path) -> None:
    weights(folder).write_bytes(b"")


def break_tokenizer(folder: Path) -> None:
    for path in (folder / "tokenizer").iterdir():
        if path.name != "tokenizer_config.json":
            path.unlink()


BREAKS = {
    break_nothing_there: ("no model_index.json",),
    break_index: ("model_index.json is no JSON",),
    break_call: ("call.json is no JSON",),
    break_part: ("text_encoder",),
    break_weights_missing: ("diffusion_pytorch_model.safetensors",),
    break_weights_pickled: ("diffusion_pytorch_model.safetensors",),
    break_weights_truncated: ("diffusion_pytorch_model.safetensors", "truncated"),
    break_weights_header: ("diffusion_pytorch_model.safetensors", "no readable header"),
    break_weights_empty: ("diffusion_pytorch_model.safetensors", "no readable header"),
    break_tokenizer: ("tokenizer",),
}


@pytest.mark.parametrize("damage", BREAKS, ids=lambda damage: damage.__name__)
def test_damaged_model(damage: Callable[[Path], None], broken: Callable[[str], Path]) -> None:
    folder = broken("flux_cfg")
    damage(folder)
    refused(FAILED, (str(folder), *BREAKS[damage]), "fox", "--model", folder)


@pytest.mark.parametrize("plan", [(), ("--set", "cache.EasyCache.threshold=0.1", "--steps", "6")])
def test_nan_latents(plan: tuple[str, ...], broken: Callable[[str], Path]) -> None:
    folder = broken("flux_cfg")
    poisoned = {name: weight * torch.nan for name, weight in load_file(weights(folder)).items()}
    save_file(poisoned, weights(folder), metadata={"format": "pt"})
    refused(FAILED, ("NaN", "nothing was written"), "fox", "--model", folder, *plan)


# Options


OPTIONS: dict[str, tuple[str, list[object], tuple[str, ...]]] = {
    "steps": ("sd15", ["fox", "--steps", 0], ("--steps 0", "greater than or equal to 1")),
    "height": ("sd15", ["fox", "--height", 0], ("--height 0",)),
    "width": ("flux_cfg", ["fox", "--width", 30], ("--width 30", "multiples of 4", "28", "32")),
    "odd": ("sd15", ["fox", "--width", 36], ("StableDiffusionPipeline", "divisible by 8")),
    "strength": ("sd15", ["fox", "--strength", 0.5], ("--strength", "--image")),
    "strengths": ("sd15", ["fox", "--strength", 2], ("--strength 2", "less than or equal to 1")),
    "seed": ("sd15", ["fox", "--seed", -1], ("--seed -1",)),
    "guidance": ("sd15", ["fox", "--guidance", "nan"], ("--guidance nan",)),
    "prompt": ("sd15", [" "], ("PROMPT is empty",)),
    "zero": ("sd15", ["a\0b"], ("zero character",)),
    "surrogate": ("sd15", ["a\udcffb"], ("no Unicode text",)),
    "no prompt taken": ("svd", ["fox", "--image", "start.png"], ("takes no prompt",)),
    "frames": ("sd15", ["fox", "--frames", 4], ("takes no --frames",)),
    "negative": ("svd", ["--image", "start.png", "--negative", "x"], ("takes no --negative",)),
    "no image": ("svd", [], ("StableVideoDiffusionPipeline needs --image",)),
    "no mask": ("sd_inpaint", ["fox", "--image", "start.png"], ("needs --mask",)),
    "mask": ("sd15", ["fox", "--mask", "start.png"], ("--mask needs --image",)),
    "image taken": ("animatediff", ["fox", "--image", "start.png"], ("AnimateDiff", "--image")),
    "control": ("sd15", ["fox", "--control", "start.png"], ("--controlnet",)),
    "image missing": ("sd15", ["fox", "--image", "none.png"], ("none.png", "No such file")),
    "image broken": ("sd15", ["fox", "--image", "broken.png"], ("broken.png", "picture")),
    "lora missing": ("sd15", ["fox", "--lora", "a.safetensors"], ("a.safetensors",)),
    "lora broken": ("sd15", ["fox", "--lora", "b.safetensors"], ("b.safetensors", "header")),
    "device": ("sd15", ["fox", "--device", "abacus"], ("--device abacus",)),
    "no such device": ("sd15", ["fox", "--device", "cuda:77"], ("--device cuda:77", "accel env")),
    "out": ("sd15", ["fox", "--out", "none/a.png"], ("none", "create it first")),
    "out is a folder": ("sd15", ["fox", "--out", "folder.png"], ("folder.png is a folder",)),
    "type": ("sd15", ["fox", "--out", "a.jpg"], ("a.jpg", ".png")),
    "like": ("sd15", ["--like", "none.png"], ("none.png", "No such file")),
    "like broken": ("sd15", ["--like", "broken.png"], ("broken.png", "PNG")),
    "like other": ("sd15", ["--like", "start.png"], ("start.png", "no record")),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_option(option: str, models: Folders) -> None:
    model, args, says = OPTIONS[option]
    picture(Path("start.png"))
    Path("broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno more")
    Path("b.safetensors").write_bytes(b"short")
    Path("folder.png").mkdir()
    code = FAILED if option == "lora broken" else USAGE
    device: list[str] | None = [] if "--device" in args else None
    before = sorted(Path.cwd().rglob("*"))
    result = run("generate", *args, "--model", models(model), device=device)
    assert result.exit_code == code, result.output
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    for words in says:
        assert words in result.stderr, result.stderr
    assert sorted(Path.cwd().rglob("*")) == before


def test_controlnet_that_is_none(models: Folders) -> None:
    picture(Path("start.png"))
    common = ["fox", "--model", models("sd15"), "--control", "start.png", "--controlnet"]
    refused(USAGE, ("config.json",), *common, "nothing")
    refused(USAGE, ("AutoencoderKL", "no ControlNet"), *common, Path(models("sd15"), "vae"))
    fitting = ["fox", "--model", models("sd15"), "--controlnet", models.controlnet()]
    refused(USAGE, ("--controlnet needs --control",), *fitting)
    video = ["fox", "--model", models("animatediff"), "--control", "start.png"]
    refused(USAGE, ("AnimateDiff",), *video, "--controlnet", models.controlnet())


def test_lora_of_another_model(models: Folders) -> None:
    stranger = {"transformer.blocks.0.attn.lora_A.weight": torch.zeros(4, 4)}
    save_file(stranger, "other.safetensors")
    refused(
        USAGE,
        ("other.safetensors",),
        "fox",
        "--model",
        models("sd15"),
        "--lora",
        "other.safetensors",
    )


@pytest.mark.parametrize("kind", ["version", "json", "field", "request", "plan"])
def test_like_a_file_with_a_damaged_record(kind: str, models: Folders) -> None:
    done("generate", "fox", "--model", models("sd15"), "--seed", 3, "--out", "a.png")
    made, frames = metadata.read(Path("a.png"))
    document = made.model_dump()
    changes = {
        "version": {"version": 2},
        "field": {"pixels": 3},
        "request": {"request": {"prompt": "fox", "steps": -1}},
        "plan": {"plan": {"cache": {"EasyCache": {"threshold": -1}}}},
    }
    text = json.dumps({**document, **changes.get(kind, {})})
    write_record(frames[0], text[:-5] if kind == "json" else text)
    refused(USAGE, (), "--like", "a.png", "--out", "b.png")


def write_record(image: Image.Image, text: str) -> None:
    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    chunks.add_text("accel", text)
    image.save("a.png", pnginfo=chunks)


def test_like_with_another_input_picture(models: Folders) -> None:
    picture(Path("start.png"))
    done("generate", "fox", "--model", models("sd15"), "--image", "start.png", "--out", "a.png")
    picture(Path("start.png"), "red")
    refused(USAGE, ("--image start.png", "not the file"), "--like", "a.png", "--out", "b.png")


# While running


@pytest.fixture
def full_disk() -> Iterator[Path]:
    """A file system of 8 KiB."""
    folder = Path("full").absolute()
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting needs rights that this user has not")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_full_disk(models: Folders, full_disk: Path) -> None:
    (full_disk / "ballast").write_bytes(b"0" * 8000)
    says = ("full/a.png", "No space left", "free some space", "Nothing was left behind")
    refused(FAILED, says, "fox", "--model", models("sd15"), "--out", full_disk / "a.png")
    out = ["--out", full_disk / "out", "--repeats", 1]
    result = run("compare", "fox", "--model", models("sd15"), *out, "--set", "cache.EasyCache")
    assert result.exit_code == FAILED and "No space left" in result.stderr
    assert not [path for path in full_disk.rglob("*.p*")]


@pytest.mark.parametrize("at", ["write", "fsync"])
def test_disk_that_fills_up_half_way(
    at: str, models: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("a.png").write_text("precious")

    def fill(_number: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fill)
    target = ["--out", "a.png", "--overwrite"]
    refused(FAILED, ("a.png", "No space left"), "fox", "--model", models("sd15"), *target)
    assert Path("a.png").read_text() == "precious"


def interrupting(error: BaseException) -> Callable[[Bar, Run], None]:
    def follow(_bar: Bar, run: Run, label: str = "") -> None:
        def observe(step: object, _result: object) -> None:
            raise error

        run.trajectory.observers.append(observe)

    return follow


def test_ctrl_c_leaves_nothing_behind(models: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Bar, "follow", interrupting(KeyboardInterrupt()))
    result = run("generate", "fox", "--model", models("sd15"), "--out", "a.png")
    assert result.exit_code == INTERRUPTED
    assert result.stderr == "interrupted: nothing was written\n"
    assert not list(Path.cwd().iterdir())


def test_a_bug_is_one_line_and_its_traceback_by_debug(
    models: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Bar, "follow", interrupting(RuntimeError("first line\nsecond line")))
    says = ("RuntimeError: first line", "--debug")
    refused(FAILED, says, "fox", "--model", models("sd15"), "--out", "a.png")
    result = run("generate", "fox", "--model", models("sd15"), "--out", "a.png", "--debug")
    assert isinstance(result.exception, RuntimeError)


def test_a_session_refuses_the_request_of_another_model(models: Folders) -> None:
    from accel import Plan
    from accel.errors import BadInput
    from app.request import Request, Source

    session = Session.open(Source(model=models("sd15"), device="cpu"))
    with pytest.raises(BadInput, match="another session"):
        session.run(Request(model="scenes-flux", prompt="fox", seed=1), Plan())
