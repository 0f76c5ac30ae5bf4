"""The command line: what it prints, where, and what it leaves to be imported later."""

import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
from PIL import Image, ImageSequence
from saved import Folders, done, picture, run, size

from accel import Plan
from accel import methods as all_methods
from accel.plan import PRESETS
from app import clips, metadata, request

COMMANDS = (
    *("generate", "edit", "compare", "batch", "stream", "ui", "calibrate", "tune"),
    *("methods", "explain", "env"),
)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders(tmp_path_factory.getbasetemp() / "saved-models")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test runs in an empty folder."""
    monkeypatch.chdir(tmp_path)


def python(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, capture_output=True)


def test_help_lists_every_command_and_the_exit_codes() -> None:
    text = done("--help").output
    assert all(command in text for command in (*COMMANDS, "Exit codes", "130"))
    for command in COMMANDS:
        assert "--debug" in done(command, "--help").output


def test_libraries_say_nothing_that_asks_nothing_of_a_person() -> None:
    """Of extras whose parts we do not use, above all."""
    command = ["-c", "from app.cli import main; main()", "explain", "--model", "scenes-unet"]
    told = subprocess.run([sys.executable, *command], check=True, timeout=120, capture_output=True)
    assert told.stderr == b""


def test_help_imports_nothing_of_weight() -> None:
    """Of other packages only those that parse a command line: it answers at once."""
    python(
        "import sys; sys.argv = ['accel', '--help']\n"
        "before = set(sys.modules)\n"
        "import app.cli\n"
        "try:\n    app.cli.main()\n"
        "except SystemExit as end:\n    assert not end.code\n"
        "found = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "light = {'annotated_doc', 'annotated_types', 'app', 'attr', 'markdown_it', 'mdurl',\n"
        "         'pygments', 'rich', 'shellingham', 'typer', 'typing_extensions'}\n"
        "assert not found - set(sys.stdlib_module_names) - light, found"
    )


def test_methods_imports_no_torch() -> None:
    python(
        "import sys; sys.argv = ['accel', 'methods']\n"
        "import app.cli\n"
        "try:\n    app.cli.main()\n"
        "except SystemExit as end:\n    assert not end.code\n"
        "assert 'accel' in sys.modules and 'torch' not in sys.modules"
    )


def test_version() -> None:
    assert done("--version").stdout.strip()[0].isdigit()


# accel methods


def test_methods_shows_every_method() -> None:
    text = done("methods").stdout
    assert all(name in text for name in all_methods())


@pytest.mark.parametrize("name", sorted(all_methods()))
def test_methods_of_a_name_shows_its_fields_and_a_plan_that_is_its_default(name: str) -> None:
    text = done("methods", name).stdout
    assert all(field in text for field in all_methods()[name].model_fields)
    assert Plan.from_toml(done("methods", name, "--toml").stdout) == Plan(all_methods()[name]())


def test_methods_as_toml_is_an_empty_plan_with_everything_commented_out() -> None:
    text = done("methods", "--toml").stdout
    assert Plan.from_toml(text) == Plan()
    wanted = [f"# [{name}]" for name in all_methods()]
    assert [line for line in text.splitlines() if line in wanted]


def test_methods_as_json_tells_ranges() -> None:
    listed = {
        entry["name"]: entry for entry in json.loads(done("methods", "--format", "json").stdout)
    }
    assert set(listed) == set(all_methods())
    assert listed["cache.EasyCache"]["fields"]["threshold"]["range"] == "float ≥ 0"
    assert listed["guidance.Adaptive"]["fields"]["space"]["range"] == "raw | x0 | v"


# accel env and explain


def test_env_tells_versions_device_and_threads() -> None:
    shown = json.loads(done("env", "--format", "json").stdout)
    assert {"torch", "diffusers", "transformers", "cpu", "threads", "fingerprint"} <= set(shown)
    assert "torch" in done("env").stdout


def test_explain_says_which_methods_fit_and_why_not_the_others(models: Folders) -> None:
    text = done("explain", "--model", models("sd15")).stdout
    assert "StableDiffusionPipeline" in text and "cache.EasyCache" in text
    listed = json.loads(done("explain", "--model", models("sd15"), "--format", "json").stdout)
    fits = {fit["method"]: fit["fits"] for fit in listed["fits"]}
    assert fits["cache.EasyCache"] and not fits["cache.FirstBlock"]


def test_explain_says_from_which_size_on_sparse_attention_pays(
    models: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("accel.attention.sizes.BUDGET", 0.0)  # the model's own size alone
    assert "dense ms" in done("explain", "--model", models("sd15"), "--sparse").stdout


# accel generate


def test_generate_a_clip_from_a_picture_by_a_text_to_video_model(models: Folders) -> None:
    start = picture(Path("start.png"))
    common = ["--model", models("ltx"), "--seed", 1]
    done("generate", "fox", *common, "--image", start, "--out", "a.png")
    done("generate", "fox", *common, "--out", "b.png")
    assert not equal("a.png", "b.png")


def test_generate_writes_a_picture_named_after_prompt_and_seed(models: Folders) -> None:
    result = done("generate", "A red fox, in the snow!", "--seed", 5, "--model", models("flux_cfg"))
    assert result.stdout == "a-red-fox-in-the-snow-5.png\n"
    assert size("a-red-fox-in-the-snow-5.png") == (32, 32)
    assert "4 steps, 8 network evaluations" in result.stderr


def test_generate_draws_and_records_a_seed(models: Folders) -> None:
    first = json.loads(
        done("generate", "fox", "--model", models("sd15"), "--format", "json").stdout
    )
    second = json.loads(
        done("generate", "fox", "--model", models("sd15"), "--format", "json").stdout
    )
    assert first["seed"] != second["seed"]
    again = done(
        "generate", "fox", "--model", models("sd15"), "--seed", first["seed"], "--out", "b.png"
    )
    assert again.stdout == "b.png\n"
    assert equal(first["files"][0], "b.png")


def test_generate_builds_the_plan_from_file_preset_and_changes(models: Folders) -> None:
    Path("mine.toml").write_text("[cache.EasyCache]\nthreshold = 0.5\nwarmup = 2\n")
    record = json.loads(
        done(
            "generate", "fox", "--model", models("flux_cfg"), "--plan", "mine.toml", "--seed", 1,
            "--set", "cache.EasyCache.predictor=reuse", "--set", "cache.EasyCache.threshold=1e6",
            "--set", "guidance.Interval", "--steps", 6, "--format", "json",
        ).stdout
    )["record"]  # fmt: skip
    easycache = record["plan"]["cache"]["EasyCache"]
    assert (easycache["threshold"], easycache["warmup"]) == (1e6, 2)
    assert easycache["predictor"] == "reuse"
    assert "Interval" in record["plan"]["guidance"]
    assert record["result"]["verdicts"]["cache.EasyCache"]["state"] == "ACTIVE"
    assert record["result"]["nfe"] < 12


def test_generate_like_reproduces_bit_for_bit(models: Folders) -> None:
    options = ["--model", models("flux_cfg"), "--steps", 6, "--negative", "blurry"]
    methods = ["--set", "cache.EasyCache.threshold=1e6", "--guidance", 2.5]
    done("generate", "fox", *options, *methods, "--seed", 3, "--out", "a.png")
    result = done("generate", "--like", "a.png", "--out", "b.png")
    assert "identical to a.png, bit for bit" in result.stderr
    assert equal("a.png", "b.png")
    told = done("generate", "--like", "a.png", "--out", "c.png", "--seed", 4, "--format", "json")
    assert json.loads(told.stdout)["like"] == {"compared": False}
    assert not equal("a.png", "c.png")


def test_generate_like_elsewhere_warns_and_reports_the_psnr(
    models: Folders,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done("generate", "fox", "--model", models("sd15"), "--seed", 3, "--out", "a.png")
    made, frames = metadata.read(Path("a.png"))
    noisy = Image.fromarray(np.asarray(frames[0]) // 2 * 2)
    other = made.model_copy(
        update={
            "fingerprint": made.fingerprint.model_copy(update={"threads": 64}),
            "pixels": metadata.pixels([noisy]),
        }
    )
    Path("b.png").write_bytes(metadata.png([noisy], other, 16))
    result = done("generate", "--like", "b.png", "--out", "c.png", "--format", "json")
    assert "threads: 64, now" in result.stderr and "PSNR against b.png" in result.stderr
    like = json.loads(result.stdout)["like"]
    assert not like["identical"] and 40 < like["psnr"] < 60


def test_generate_from_a_picture_and_into_a_mask(models: Folders) -> None:
    start, mask = picture(Path("start.png")), picture(Path("mask.png"), "black")
    common = ["--model", models("sd15"), "--seed", 1, "--image", start]
    done("generate", "fox", *common, "--strength", 0.5, "--out", "weak.png")
    done("generate", "fox", *common, "--strength", 1.0, "--out", "strong.png")
    done("generate", "fox", *common, "--mask", mask, "--out", "inpainted.png")
    weak, _ = metadata.read(Path("weak.png"))
    assert weak.result.steps == 2 and set(weak.inputs) == {"image"}
    inpainted, _ = metadata.read(Path("inpainted.png"))
    assert set(inpainted.inputs) == {"image", "mask"}
    assert len({Path(f"{name}.png").read_bytes() for name in ("weak", "strong", "inpainted")}) == 3


def test_generate_from_a_picture_under_a_cache_on_flux(models: Folders) -> None:
    start = picture(Path("start.png"))
    options = ["--image", start, "--strength", 1, "--steps", 8, "--out", "a.png", "--seed", 1]
    cache = ["--set", "cache.EasyCache.threshold=1e6"]
    result = done("generate", "fox", "--model", models("flux_cfg"), *options, *cache)
    assert "ACTIVE" in result.stderr and "INACTIVE" not in result.stderr


def test_generate_with_an_inpainting_model(models: Folders) -> None:
    start, mask = picture(Path("start.png")), picture(Path("mask.png"), "black")
    pictures = ["--image", start, "--mask", mask]
    done("generate", "fox", "--model", models("sd_inpaint"), *pictures, "--out", "a.png")
    assert size("a.png") == (32, 32)


def test_generate_after_a_controlnet(models: Folders) -> None:
    edges = picture(Path("edges.png"))
    control = ["--model", models("sd15"), "--seed", 1, "--controlnet", models.controlnet()]
    done("generate", "fox", *control, "--control", edges, "--out", "a.png")
    done("generate", "fox", *control, "--control", edges, "--image", edges, "--out", "b.png")
    done("generate", "fox", "--model", models("sd15"), "--seed", 1, "--out", "plain.png")
    assert not equal("a.png", "plain.png") and not equal("a.png", "b.png")
    assert "identical" in done("generate", "--like", "a.png", "--out", "again.png").stderr


def test_generate_a_clip_as_animated_png_and_as_mp4(models: Folders) -> None:
    common = ["--model", models("animatediff"), "--seed", 1, "--frames", 5, "--fps", 8]
    done("generate", "fox", *common, "--out", "a.png")
    with Image.open("a.png") as clip:
        assert len(list(ImageSequence.Iterator(clip))) == 5
        assert clip.info["duration"] == 125
    assert "identical" in done("generate", "--like", "a.png", "--out", "b.png").stderr
    pytest.importorskip("av")
    made = done("generate", "fox", *common, "--out", "a.mp4")
    assert made.stdout.splitlines() == ["a.mp4", "a.mp4.json"]
    inside = clips.read(Path("a.mp4"))[0]
    assert metadata.parse(Path("a.mp4.json").read_text(), "a.mp4.json") == inside
    refused = run("generate", "fox", *common, "--out", "a.mp4")
    assert refused.exit_code == 2 and "a.mp4 is there already" in refused.stderr
    again = done("generate", "--like", "a.mp4", "--out", "b.mp4")
    assert "identical" in again.stderr


def test_generate_a_clip_from_a_picture_without_a_prompt(models: Folders) -> None:
    start = picture(Path("start.png"))
    done("generate", "--model", models("svd"), "--image", start, "--out", "a.png", "--seed", 1)
    made, frames = metadata.read(Path("a.png"))
    assert len(frames) == 4 and "prompt" not in made.call


def test_overwrite_is_asked_for(models: Folders) -> None:
    Path("a.png").write_text("precious")
    refused = run("generate", "fox", "--model", models("sd15"), "--out", "a.png")
    assert refused.exit_code == 2 and "--overwrite" in refused.stderr
    assert Path("a.png").read_text() == "precious"
    done("generate", "fox", "--model", models("sd15"), "--out", "a.png", "--overwrite")
    assert size("a.png") == (32, 32)


def test_a_method_that_did_nothing_is_a_warning(models: Folders) -> None:
    result = done("generate", "fox", "--model", models("sd15"), "--set", "cache.EasyCache")
    assert result.stderr.startswith("warning: cache.EasyCache did nothing")
    assert "INACTIVE" in result.stderr


def test_plan_from_the_command_line_is_toml_when_it_is_written_out(models: Folders) -> None:
    text = done("methods", "guidance.Interval", "--toml").stdout
    assert tomllib.loads(text)["guidance"]["Interval"]["high"] == "inf"


def equal(one: str, other: str) -> bool:
    """Whether two files have the same pixels."""
    return metadata.read(Path(one))[0].pixels == metadata.read(Path(other))[0].pixels


def test_like_finds_files_by_content_wherever_they_lie(models: Folders) -> None:
    start = picture(Path("start.png"))
    shutil.copytree(models("sd15"), "model")
    done("generate", "fox", "--model", "model", "--image", start, "--out", "a.png", "--seed", 2)
    moved, elsewhere = start.rename("moved.png"), Path("model").rename("elsewhere")
    like = ["--like", "a.png", "--out", "b.png", "--image", moved, "--model", elsewhere]
    assert "identical" in done("generate", *like).stderr


def test_like_keeps_the_dtype(models: Folders) -> None:
    half = ["--dtype", "bfloat16", "--model", models("sd15")]
    done("generate", "fox", *half, "--out", "a.png", "--seed", 2)
    assert "identical" in done("generate", "--like", "a.png", "--out", "b.png").stderr


# Models of the hub


def test_the_size_of_a_download_is_said_before(
    models: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = [
        ("model_index.json", 100),
        ("unet/diffusion_pytorch_model.safetensors", 2_000_000_000),
        ("unet/diffusion_pytorch_model.fp16.safetensors", 1_000_000_000),
        ("unet/diffusion_pytorch_model.bin", 2_000_000_000),
        ("everything.safetensors", 9_000_000_000),
    ]
    siblings = [SimpleNamespace(rfilename=name, size=size) for name, size in listed]
    asked: list[dict[str, object]] = []

    def download(_name: str, **options: object) -> str:
        asked.append(options)
        return models("sd15")

    monkeypatch.setattr(
        "huggingface_hub.HfApi.model_info",
        lambda *_args, **_more: SimpleNamespace(siblings=siblings),
    )
    monkeypatch.setattr("diffusers.DiffusionPipeline.download", download)
    full = done("generate", "fox", "--model", "no-such-owner/model", "--out", "a.png")
    assert full.stderr.startswith("downloading no-such-owner/model: 2.00 GB")
    assert asked[0]["use_safetensors"] is True and asked[0]["trust_remote_code"] is False
    monkeypatch.setattr("app.models.pipeline", stop)
    half = ["--model", "no-such-owner/model", "--variant", "fp16", "--out", "b.png"]
    assert "1.00 GB" in run("generate", "fox", *half).stderr


def stop(*_args: object) -> None:
    raise KeyboardInterrupt


def test_the_presets_of_the_options_are_those_of_a_plan() -> None:
    assert get_args(request.Preset) == PRESETS
