"""Tiny pipelines and their stock outputs, built once a worker; the options of `make laws-full`."""

import hashlib
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import forks
import numpy as np
import pytest
import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from hypothesis import settings
from tiny import TINIES
from torch import Tensor, nn
from worlds import World

from accel import Plan, Report
from accel.cache.policies import Guarded
from accel.guidance import adaptive

ROOT = Path(__file__).parent.parent
DATA = (Tensor, np.ndarray, int, float, str, list, tuple, set, dict, type(None), torch.Generator)

# this process shares the machine with others, and so does what it starts: one thread each
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


class Bench:
    """The pipelines that one test uses."""

    def __init__(self, store: dict[Any, Any]) -> None:
        self._store = store
        self._used: dict[Any, Any] = {}

    def pipe(self, name: str, dtype: torch.dtype = torch.float32) -> Any:
        """The tiny pipeline of a name. Checked for traces when the test ends."""
        key = (name, dtype)
        if key not in self._store:
            pipe = _built(name, dtype)
            TINIES[name].call(pipe, steps=2)
            self._store[key] = (pipe, trace(pipe))
        self._used[key] = self._store[key]
        return self._store[key][0]

    def call(self, name: str, *, dtype: torch.dtype = torch.float32, **call: Any) -> Tensor:
        """The output of the pipeline as it is now."""
        return torch.as_tensor(TINIES[name].call(self.pipe(name, dtype), **call))

    def stock(self, name: str, **call: Any) -> Tensor:
        """The output of the stock pipeline, computed once."""
        return self._once(("stock", name, repr(sorted(call.items()))), name, Plan(), call)[0]

    def under(self, name: str, plan: Plan, **call: Any) -> tuple[Tensor, Report]:
        """Output and report of a run under a plan, detached again: computed once."""
        return self._once((plan, name, repr(sorted(call.items()))), name, plan, call)

    def _once(self, key: Any, name: str, plan: Plan, call: dict[str, Any]) -> Any:
        if key not in self._store:
            pipe = _built(name, call.pop("dtype", torch.float32))
            run = plan.attach(pipe) if len(plan) else None
            output = torch.as_tensor(TINIES[name].call(pipe, **call))
            self._store[key] = (output, run and run.report)
        return self._store[key]

    def check(self) -> None:
        """Every pipeline is as it was before the test."""
        for key, (pipe, before) in self._used.items():
            changes = differences(before, trace(pipe))
            if changes:
                del self._store[key]
            assert not changes, f"{key[0]}: the test left a trace: {changes[:5]}"


def _built(name: str, dtype: torch.dtype) -> Any:
    with torch.inference_mode(False):  # whoever asks first: weights are for all
        pipe = TINIES[name].build()
    return pipe if dtype == torch.float32 else pipe.to(dtype)


@pytest.fixture(scope="session")
def _store() -> dict[Any, Any]:
    return {}


@pytest.fixture
def bench(_store: dict[Any, Any]) -> Iterator[Bench]:
    bench = Bench(_store)
    yield bench
    bench.check()


@pytest.fixture(scope="module")
def worlds() -> Iterator[dict[int, World]]:
    """Processes that work together, by their number; each world starts when it is first needed."""
    known = {size: World(size) for size in (1, 2, 3, 4)}
    yield known
    for world in known.values():
        world.close()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _forks() -> Iterator[None]:
    """Processes of this one are forks of one that has all loaded."""
    with pytest.MonkeyPatch.context() as patch:
        forked = forks.context()
        patch.setattr(multiprocessing, "get_context", lambda method=None: forked)
        yield


@pytest.fixture(autouse=True)
def _nothing_global() -> Iterator[None]:
    """No test leaves diffusers another backend of attention: it would be that of all models."""
    before = _AttentionBackendRegistry._active_backend
    yield
    after, _AttentionBackendRegistry._active_backend = (
        _AttentionBackendRegistry._active_backend,
        before,
    )
    assert after == before


def trace(pipe: Any, *, strict: bool = False) -> dict[str, Any]:
    """All attributes of a pipeline, its scheduler and every module, and of their classes.

    What a run of the stock pipeline changes as well (tensors and numbers that the pipeline, its
    scheduler or a module keeps) counts by its name only, unless ``strict``.
    """
    marks: dict[str, Any] = {}
    for path, owner in _owners(pipe):
        for key, value in vars(owner).items():
            _mark(marks, f"{path}.{key}", value, strict)
        for key, value in vars(type(owner)).items():
            # transformers fills some class attributes when they are first asked for
            if not key.startswith(("__", "_abc")) and not key.endswith("_cached_value"):
                marks[f"{type(owner).__name__}:{key}"] = value
    return marks


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Attributes that are new, gone or others than before."""
    changed = [
        key for key in before.keys() & after.keys() if not _unchanged(before[key], after[key])
    ]
    return sorted([*(before.keys() ^ after.keys()), *changed])


def _unchanged(before: Any, after: Any) -> bool:
    # diffusers writes a new one, of equal content, whenever a component is set
    return before is after or (isinstance(after, FrozenDict) and before == after)


def _owners(pipe: Any) -> Iterator[tuple[str, Any]]:
    yield "pipe", pipe
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module):
            yield from ((f"{name}.{path}", module) for path, module in part.named_modules())
        elif part is not None and name == "scheduler":
            yield name, part


def _mark(marks: dict[str, Any], path: str, value: Any, strict: bool) -> None:
    registered = path.rsplit(".", 1)[-1] in {"_parameters", "_buffers", "_modules"}
    if type(value) is dict and (registered or "_hooks" in path):
        for key, item in value.items():
            marks[f"{path}[{key}]"] = item
    marks[path] = "data" if isinstance(value, DATA) and not strict else value


@pytest.fixture
def same() -> Callable[[Any, Any], bool]:
    """Bit equality of two outputs."""
    return bits_equal


def bits_equal(a: Any, b: Any) -> bool:
    """Whether two outputs are equal bit for bit."""
    a, b = torch.as_tensor(a).contiguous(), torch.as_tensor(b).contiguous()
    return a.dtype == b.dtype and a.shape == b.shape and _bytes(a) == _bytes(b)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.view(torch.uint8).numpy().tobytes()


@pytest.fixture
def gauged(monkeypatch):
    """Everything that a method compares with its threshold, in the order of the samples."""
    seen = []

    def compute(policy, step, value, *, inner=Guarded.compute):
        if value is not None:
            seen.append(value)
        return inner(policy, step, value)

    def cosine(a, b, *, inner=adaptive._cosine):
        result = inner(a, b)
        seen.append(float(result))
        return result

    monkeypatch.setattr(Guarded, "compute", compute)
    monkeypatch.setattr(adaptive, "_cosine", cosine)
    return seen


# `make laws-full`: every law on everything, in shards, resumable


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("laws")
    group.addoption("--shard", metavar="I/N", help="run the I-th of N parts of the tests")
    group.addoption(
        "--laws-record",
        metavar="FILE",
        help="all laws count as laws_full; append outcomes to FILE, skip what passed in it before "
        "with the same code and the same file of tests",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--laws-record"):
        passed = _passed(Path(config.getoption("--laws-record")))
        for item in items:
            if item.path.name.startswith("test_laws_"):
                item.add_marker("laws_full")
        items[:] = [item for item in items if item.nodeid not in passed]
    if config.getoption("--shard"):
        part, parts = map(int, config.getoption("--shard").split("/"))
        items[:] = items[part - 1 :: parts]


def pytest_configure(config: pytest.Config) -> None:
    file = config.getoption("--laws-record")
    if file and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder(Path(file)))


class Recorder:
    """Appends the outcome of each test to a file, a line of JSON each."""

    def __init__(self, file: Path) -> None:
        self._file = file
        file.parent.mkdir(parents=True, exist_ok=True)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            aside = report.when != "call" and report.outcome == "failed"
            line = {
                "test": report.nodeid,
                "outcome": f"{report.when} failed" if aside else report.outcome,
                "seconds": round(report.duration, 2),
                "code": code_hash(report.nodeid.partition("::")[0]),
            }
            with self._file.open("a") as file:
                file.write(json.dumps(line) + "\n")


def _passed(file: Path) -> set[str]:
    if not file.exists():
        return set()
    outcomes = {}
    for line in file.read_text().splitlines():
        entry = json.loads(line)
        if entry["code"] == code_hash(entry["test"].partition("::")[0]):
            outcomes[entry["test"]] = entry["outcome"]
    return {test for test, outcome in outcomes.items() if outcome in ("passed", "skipped")}


@cache
def code_hash(file: str) -> str:
    """Of the code under test, a file of tests with what it stands on, and the host's versions."""
    digest = hashlib.sha256(f"{torch.__version__} {diffusers.__version__}".encode())
    paths = {ROOT / file, ROOT / "tests" / "conftest.py"}
    for folder in ("accel", "samplers", "parallel", "tests/roster", "tests/tiny"):
        paths |= set((ROOT / folder).rglob("*.py"))
    for path in sorted(path for path in paths if path.exists()):
        digest.update(path.relative_to(ROOT).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
