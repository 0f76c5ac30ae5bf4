"""There and back: what was copied runs and gives the same bits; what was made restores its job."""

import json
import math
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from roster import ROSTER
from saved import Folders, picture
from test_laws_roundtrip import plans
from tiny import PIPELINES
from typer.testing import CliRunner

from accel import Guard, Plan, cache, guidance
from accel.errors import AccelError, BadInput
from accel.plan import PRESETS
from app import cli, clips, metadata
from app.metadata import Fingerprint, Record
from app.plans import chosen
from app.request import Choice, Request, make
from app.serve.jobs import Spec
from app.session import Session
from app.ui.forms import spec_of, title_of, values_of
from app.ui.roundtrip import as_cli, as_python, from_file, lost
from samplers import DPMSolverPP

MARK = Fingerprint(
    model="0" * 64, versions={}, device="cpu", processor="one", threads=1, dtype="float32"
)
RUN = {"seconds": 1.0, "steps": 4, "nfe": 4.0, "verdicts": {}}


GUARDS = (None, Guard(max_error=0.05), Guard(max_error=math.inf, check_every=3, scale=2.0))


def texts(**more: Any) -> st.SearchStrategy[str]:
    """Any text that a request takes: neither zeros nor halves of characters."""
    return st.text(
        st.characters(exclude_characters="\0", exclude_categories=("Cs",)), max_size=20, **more
    )


def paths() -> st.SearchStrategy[Path]:
    return st.text("ab -'é/", min_size=1, max_size=8).map(lambda text: Path("f" + text))


@st.composite
def requests(draw: Any) -> Request:
    """Any request that ``make`` takes."""
    numbers = {
        "seed": st.integers(0, 2**63 - 1),
        "steps": st.integers(1, 1000),
        "guidance": st.floats(0, 100),
        "height": st.integers(1, 16384),
        "width": st.integers(1, 16384),
        "frames": st.integers(1, 1024),
        "fps": st.integers(1, 120),
        "strength": st.floats(0, 1, exclude_min=True),
        "compile": st.booleans(),
        "dtype": st.sampled_from(["float32", "bfloat16", "float16"]),
        "negative": texts(),
        "controlnet": texts(min_size=1),
        "device": st.sampled_from(["cpu", "cuda:1"]),
        "variant": st.just("fp16"),
        "revision": st.just("-main"),
        **dict.fromkeys(("image", "mask", "control", "lora"), paths()),
    }
    given = draw(st.fixed_dictionaries({}, optional=numbers))
    model = draw(st.sampled_from(["scenes-flux", "-odd name", "a'b"]))
    return make(Request, {"prompt": draw(texts()), "model": model, **given})


@st.composite
def specs(draw: Any) -> Spec:
    """Any job that makes a picture."""
    plan = draw(st.one_of(plans(), st.sampled_from([Plan.preset(name) for name in PRESETS])))
    plan = Plan(*plan, guard=draw(st.sampled_from(GUARDS)))
    document = plan.to_dict()
    return Spec(request=draw(requests()).to_dict(), plan=document, title=title_of(document))


# the widgets


@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(spec=specs())
def test_what_the_widgets_show_of_a_job_makes_the_same_job(spec: Spec) -> None:
    shown = json.loads(json.dumps(values_of(spec)))
    assert spec_of(shown) == spec


def test_an_empty_form_leaves_everything_to_the_model() -> None:
    made = spec_of({"prompt": "fox", "model": "scenes-flux", "goal": "exact"})
    assert made.request == {"model": "scenes-flux", "prompt": "fox", "fps": 16}
    assert Plan.from_dict(made.plan) == Plan()


def test_a_seed_that_is_not_kept_is_drawn_anew() -> None:
    assert "seed" not in spec_of({"prompt": "fox", "seed": "7", "seed_lock": False}).request
    assert spec_of({"prompt": "fox", "seed": "7", "seed_lock": True}).request["seed"] == 7


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", "seven"),
        ("seed", "-1"),
        ("steps", 0),
        ("width", 2.5),
        ("guidance", -1),
        ("strength", 0),
        ("frames", 10**6),
        ("dtype", "int4"),
    ],
)
def test_a_value_that_is_refused_is_named(name: str, value: Any) -> None:
    with pytest.raises(BadInput, match=f"^{name} "):
        spec_of({"prompt": "fox", "seed_lock": True, name: value})


# the command, read back by the command line itself


@pytest.fixture
def given_options(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the commands generate and compare were given, instead of running them."""
    seen: dict[str, Any] = {}
    for name in ("generate", "compare"):
        monkeypatch.setattr(f"app.{name}.{name}", seen.update)
    return seen


def typed(line: str) -> None:
    """Type a line; it has to be understood."""
    command, *words = shlex.split(line)
    assert command == "accel"
    result = CliRunner().invoke(cli.app, words)
    assert result.exit_code == 0, f"{line}\n{result.output}"


@settings(max_examples=25, suppress_health_check=list(HealthCheck))
@given(spec=specs())
def test_a_copied_command_asks_for_the_same(spec: Spec, given_options: dict[str, Any]) -> None:
    given_options.clear()
    typed(as_cli(spec))
    assert make(Request, given_options).to_dict() == spec.request
    assert chosen(make(Choice, given_options)) == Plan.from_dict(spec.plan)


@pytest.mark.parametrize("row", ROSTER.values(), ids=ROSTER)
def test_the_command_of_every_form_of_the_roster(row: Any, given_options: dict[str, Any]) -> None:
    for method in filter(None, (row.active, *row.variants, row.active.off())):
        given_options.clear()
        typed(as_cli(Spec(request={"prompt": "fox"}, plan=Plan(method).to_dict())))
        assert chosen(make(Choice, given_options)) == Plan(method)


@pytest.mark.parametrize("goal", PRESETS)
def test_a_comparison_is_copied_as_one(goal: str, given_options: dict[str, Any]) -> None:
    plan = Plan.preset(goal)
    asked = Spec(kind="compare", request={"prompt": "fox"}, plan=plan.to_dict(), repeats=5)
    line = as_cli(asked)
    assert line.startswith("accel compare ") and f"--preset {goal}" in line
    typed(line)
    assert given_options["repeats"] == 5 and chosen(make(Choice, given_options)) == plan


# the Python, read back by Python itself


@settings(max_examples=25, suppress_health_check=list(HealthCheck))
@given(spec=specs())
def test_copied_python_asks_for_the_same(spec: Spec) -> None:
    text = as_python(spec)
    head = text[: text.index("session = ")]
    names: dict[str, Any] = {}
    exec(compile(head, "copied", "exec"), names)
    assert names["request"].to_dict() == spec.request
    assert names["plan"] == Plan.from_dict(spec.plan)
    compile(text, "copied", "exec")


# a file


def record(spec: Spec, inputs: dict[str, str] | None = None) -> Record:
    return Record(
        request=spec.request,
        plan=spec.plan,
        call={},
        inputs=inputs or {},
        fingerprint=MARK,
        pixels="0" * 64,
        result=RUN,
    )


def dropped(folder: Path, name: str, made: Record, frames: int = 1) -> Path:
    """A file as the app writes it."""
    path = folder / name
    pictures = [Image.new("RGB", (16, 16), (10 * index, 0, 0)) for index in range(frames)]
    for file, content in clips.files(path, pictures, made, 16).items():
        file.write_bytes(content)
    return path


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("dropped")


@pytest.mark.parametrize(
    ("name", "frames", "drop"),
    [
        ("a.png", 1, "a.png"),
        ("b.png", 3, "b.png"),
        ("c.mp4", 2, "c.mp4"),
        ("d.mp4", 2, "d.mp4.json"),
    ],
)
@settings(max_examples=25, suppress_health_check=list(HealthCheck))
@given(spec=specs())
def test_a_dropped_file_gives_the_job_that_made_it(
    here: Path, name: str, frames: int, drop: str, spec: Spec
) -> None:
    made = record(spec)
    dropped(here, name, made, frames)
    assert from_file(here / drop) == (spec, made)


def test_files_that_were_not_made_here_are_refused_in_one_sentence(here: Path) -> None:
    plain = picture(here / "plain.png")
    cut = here / "cut.png"
    cut.write_bytes(plain.read_bytes()[:40])
    text = here / "text.png"
    text.write_text("no picture")
    film = here / "cut.mp4"
    film.write_bytes(b"\0" * 64)
    listed = here / "list.json"
    listed.write_text("[1, 2]")
    binary = here / "binary.json"
    binary.write_bytes(b"\xff\xfe\x00")
    other = here / "other.jpg"
    Image.new("RGB", (8, 8)).save(other)
    for path in (plain, cut, text, film, listed, binary, other, here / "gone.png"):
        with pytest.raises(AccelError) as caught:
            from_file(path)
        assert path.name in str(caught.value)


@settings(max_examples=25, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_damaged_record_is_refused_and_never_anything_worse(here: Path, data: Any) -> None:
    document = json.loads(record(Spec(request={"prompt": "fox"})).model_dump_json())
    key = data.draw(st.sampled_from(sorted(document)))
    junk = st.recursive(
        st.none() | st.booleans() | st.integers() | texts(),
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(texts(), inner, max_size=2),
        max_leaves=4,
    )
    document[key] = data.draw(junk)
    path = here / "junk.json"
    path.write_text(json.dumps(document))
    try:
        spec, made = from_file(path)
    except AccelError:
        return
    assert values_of(spec) and lost(made, here) is not None


def test_only_the_very_files_in_the_folder_of_uploads_count_as_at_hand(tmp_path: Path) -> None:
    uploads = tmp_path / "uploads"
    uploads.mkdir()
    inside, outside = picture(uploads / "in.png"), picture(tmp_path / "out.png")
    link = uploads / "link.png"
    link.symlink_to(outside)
    crossed = uploads / ".." / "out.png"
    digest = metadata.digests(Request(image=inside))["image"]
    for path, expected in (
        (inside, []),
        (outside, ["image"]),
        (link, ["image"]),
        (crossed, ["image"]),
    ):
        made = record(Spec(request={"image": str(path)}), {"image": digest})
        assert lost(made, uploads) == expected
    picture(inside, "red")
    assert lost(record(Spec(request={"image": str(inside)}), {"image": digest}), uploads)
    inside.unlink()
    assert lost(record(Spec(request={"image": str(inside)}), {"image": digest}), uploads)


# what was copied, run


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders(tmp_path_factory.getbasetemp() / "saved-models")


@pytest.fixture(scope="module")
def lora(models: Folders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from safetensors.torch import save_file

    network = PIPELINES["sd15"].build().unet
    network.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    weights = get_peft_model_state_dict(network)
    path = tmp_path_factory.mktemp("lora") / "style.safetensors"
    save_file({f"unet.{name}": weight for name, weight in weights.items()}, path)
    return path


RUNS: dict[str, tuple[str, Plan, dict[str, Any]]] = {
    "stock": ("flux_cfg", Plan(), {"prompt": "a red fox"}),
    "preset": ("flux_cfg", Plan.preset("fast"), {"prompt": 'it\'s "red"', "negative": ""}),
    "custom": (
        "flux_cfg",
        Plan(DPMSolverPP(order=2), cache.EasyCache(threshold=0.5), guidance.Interval(low=0.2)),
        {"prompt": "-a fox", "guidance": 2.0, "steps": 6},
    ),
    "image": (
        "sd15",
        Plan(cache.EasyCache(threshold=1e6)),
        {"prompt": "fox", "image": True, "strength": 0.5},
    ),
    "mask": ("sd15", Plan(), {"prompt": "fox", "image": True, "mask": True}),
    "control": ("sd15", Plan(), {"prompt": "fox", "control": True, "controlnet": True}),
    "lora": ("sd15", Plan(cache.EasyCache(threshold=1e6)), {"prompt": "fox", "lora": True}),
    "clip": ("ltx", Plan(cache.EasyCache(threshold=1e6)), {"prompt": "fox", "fps": 8}),
}


@pytest.fixture(params=RUNS)
def job(
    request: pytest.FixtureRequest, models: Folders, lora: Path, tmp_path: Path
) -> Iterator[Spec]:
    """A job on a tiny model, in an empty folder."""
    name, plan, asked = RUNS[request.param]
    files = {
        "image": lambda: picture(tmp_path / "start picture.png"),
        "mask": lambda: picture(tmp_path / "mask.png", "white"),
        "control": lambda: picture(tmp_path / "control.png", "black"),
        "controlnet": models.controlnet,
        "lora": lambda: lora,
    }
    given = {key: files[key]() if value is True else value for key, value in asked.items()}
    made = make(Request, {"model": models(name), "device": "cpu", "seed": 5, **given})
    with chdir(tmp_path):
        yield Spec(request=made.to_dict(), plan=plan.to_dict(), title=title_of(plan.to_dict()))


@pytest.mark.filterwarnings("ignore::accel.errors.AccelWarning")
def test_what_was_copied_gives_the_same_bits_and_the_file_the_same_job(job: Spec) -> None:
    request, plan = make(Request, job.request), Plan.from_dict(job.plan)
    outcome = Session.open(request.source).run(request, plan)
    wanted = metadata.pixels(outcome.pictures)
    typed(as_cli(job))
    (out,) = (path for path in Path.cwd().glob("*-5.*") if path.suffix in clips.SUFFIXES)
    assert read(out) == (wanted, job)
    out.unlink()
    Path(f"{out}.json").unlink(missing_ok=True)
    exec(compile(as_python(job), "copied", "exec"), {})
    assert read(out) == (wanted, job)


def read(path: Path) -> tuple[str, Spec]:
    """What is recorded of the pixels of a file, and its job."""
    spec, made = from_file(path)
    if path.suffix == clips.PICTURE:
        assert made.pixels == metadata.pixels(clips.read(path)[1])
    return made.pixels, spec


def test_what_was_copied_runs_in_processes_of_its_own(models: Folders, tmp_path: Path) -> None:
    plan = Plan(cache.EasyCache(threshold=1e6))
    asked = {
        "model": models("flux_cfg"),
        "device": "cpu",
        "prompt": "a fox's den",
        "seed": 5,
        "steps": 6,
    }
    job = Spec(request=make(Request, asked).to_dict(), plan=plan.to_dict(), title="custom plan")
    request = make(Request, job.request)
    wanted = metadata.pixels(Session.open(request.source).run(request, plan).pictures)
    accel = Path(sys.executable).with_name("accel")
    shell = as_cli(job).replace("accel", shlex.quote(str(accel)), 1)
    for command in (["sh", "-c", shell], [sys.executable, "-c", as_python(job)]):
        subprocess.run(command, check=True, cwd=tmp_path, timeout=120)
        (out,) = tmp_path.glob("*.png")
        assert read(out) == (wanted, job)
        out.unlink()
