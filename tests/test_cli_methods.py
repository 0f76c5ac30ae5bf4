"""The command line reaches every cache and memory method, compiled or not."""

import json
from pathlib import Path
from typing import Any

import pytest
from roster import LEADERS, ROSTER, STEPS, full
from saved import Folders, done, run
from tiny import PIPELINES

from accel import Plan
from app import compiling, metadata
from app.request import Request, Source
from app.session import Session

METHODS = {name: row for name, row in ROSTER.items() if name.startswith(("cache.", "memory."))}
MODELS = ("sd15", "flux_cfg")


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders(tmp_path_factory.getbasetemp() / "saved-models")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test runs in an empty folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def _open() -> dict[Source, Session]:
    return {}


@pytest.fixture
def loaded_once(_open: dict[Source, Session], monkeypatch: pytest.MonkeyPatch) -> None:
    """A model is loaded by the first command, and used by the others."""
    inner = Session.open.__func__  # type: ignore[attr-defined]

    def session(cls: type[Session], source: Source) -> Session:
        if source not in _open:
            _open[source] = inner(cls, source)
        return _open[source]

    monkeypatch.setattr(Session, "open", classmethod(session))


def changes(method: Any) -> list[str]:
    """``--set`` for a method and each of its fields that is not the default."""
    default = type(method)()
    options = ["--set", method.name]
    for field in type(method).model_fields:
        value = getattr(method, field)
        if value != getattr(default, field):
            plain = json.loads(method.model_dump_json())[field]
            options += ["--set", f"{method.name}.{field}={json.dumps(plain)}"]
    return options


def turn(method: str) -> str:
    """The model on which CI runs a method: the leaders of engines, on one of two in turn."""
    served = [name for name in MODELS if METHODS[method].acts(PIPELINES[name])]
    return served[list(METHODS).index(method) % len(served)] if served else ""


CASES = [
    pytest.param(
        name,
        method,
        id=f"{name}-{method}",
        marks=full(method not in LEADERS.values() or name != turn(method)),
    )
    for method, row in METHODS.items()
    for name in MODELS
    if row.acts(PIPELINES[name])
]


@pytest.mark.usefixtures("loaded_once")
@pytest.mark.parametrize(("name", "method"), CASES)
def test_generate_runs_every_cache_and_memory_method(
    models: Folders, name: str, method: str
) -> None:
    """Chosen by options alone: the plan in the file is the one that was meant, and it acted."""
    wanted = METHODS[method].active
    options = ["--model", models(name), "--steps", STEPS, "--seed", 1, "--format", "json"]
    made = json.loads(done("generate", "fox", *options, *changes(wanted)).stdout)["record"]
    assert Plan.from_dict(made["plan"]) == Plan(wanted)
    assert made["result"]["verdicts"][method]["state"] == "ACTIVE"


@pytest.mark.usefixtures("loaded_once")
def test_compare_runs_caches_and_memory_methods_together(models: Folders) -> None:
    chosen = (METHODS["cache.TaylorSeer"].active, METHODS["memory.GroupOffload"].active)
    options = [option for method in chosen for option in changes(method)]
    common = ["--model", models("flux_cfg"), "--steps", STEPS, "--seed", 1, "--repeats", 1]
    done("compare", "fox", *common, *options, "--out", "both")
    said = json.loads((Path("both") / "report.json").read_text())
    verdicts = said["record"]["result"]["verdicts"]
    assert {name: found["state"] for name, found in verdicts.items()} == {
        method.name: "ACTIVE" for method in chosen
    }


# Compiled.


@pytest.fixture
def untraced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs that compute nothing else: compiling itself is tested in test_compile.py."""
    monkeypatch.setattr(compiling, "OPTIONS", {"disable": True})


def compiled(session: Session) -> set[str]:
    """The classes of what is compiled."""
    network = session.model.pipe.transformer
    return {type(m).__name__ for m in network.modules() if m._compiled_call_impl is not None}


@pytest.mark.usefixtures("untraced")
def test_a_session_compiles_what_a_plan_needs(models: Folders) -> None:
    session = Session.open(Source(model=models("flux_cfg"), device="cpu"))
    asked = Request(model=models("flux_cfg"), device="cpu", prompt="fox", seed=1, steps=3)
    both = Request(**{**vars(asked), "compile": True})
    blocks = {"FluxTransformerBlock", "FluxSingleTransformerBlock"}
    modules = {"FluxAttention", "FeedForward"}
    plans = {name: Plan(METHODS[f"cache.{name}"].active) for name in ("FirstBlock", "FORA")}
    expected = {
        name: metadata.pixels(session.run(asked, plan).pictures) for name, plan in plans.items()
    }
    assert not compiled(session)
    for name, classes in (("FirstBlock", blocks), ("FORA", modules), ("FirstBlock", blocks)):
        assert metadata.pixels(session.run(both, plans[name]).pictures) == expected[name]
        assert compiled(session) == classes
    session.bare(both)
    assert compiled(session) == blocks
    assert metadata.pixels(session.run(asked, plans["FORA"]).pictures) == expected["FORA"]
    assert not compiled(session)


@pytest.mark.usefixtures("untraced")
def test_generate_compiles_and_records_it(models: Folders) -> None:
    options = ["--model", models("flux_cfg"), "--steps", 3, "--seed", 1, "--format", "json"]
    said = json.loads(done("generate", "fox", *options, "--compile", "--out", "a.png").stdout)
    assert said["record"]["request"]["compile"] is True
    again = done("generate", "--like", "a.png", "--out", "b.png")
    assert "identical to a.png" in again.stderr
    assert metadata.read(Path("b.png"))[0].request["compile"] is True
    plain = json.loads(done("generate", "fox", *options, "--out", "c.png").stdout)
    assert "compile" not in plain["record"]["request"]
    assert "--compile" in done("generate", "--help").output


@pytest.mark.usefixtures("untraced")
def test_compile_is_refused_where_no_blocks_repeat(
    models: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffusers.FluxTransformer2DModel._repeated_blocks", [])
    refused = run("generate", "fox", "--model", models("flux_cfg"), "--compile")
    assert refused.exit_code == 2
    assert "no repeated blocks of FluxTransformer2DModel" in refused.stderr
    assert not list(Path().glob("*.png"))
