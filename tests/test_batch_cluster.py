"""Actors of a Ray cluster: whatever ends them, every row is made once, with its own pixels.

The model is a toy; Ray, its actors and placement groups, signals, files and manifest are real. The
GPUs are not: Ray believes what it is told, and actors on GPUs need no torch.
"""

import importlib
import os
import signal
import socket
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import batch_toy
import cluster_jobs
import pytest
from PIL import Image
from test_batch_dispatch import row

from accel.errors import AccelError, BadInput
from app.batch import cluster as module
from app.batch import manifest
from app.batch.cluster import Cluster, _Gang
from app.batch.dispatch import Dispatcher, Rules
from app.batch.engine import Died, Local
from app.batch.grouping import calls, groups
from app.batch.manifest import Manifest
from app.batch.storage import Folder
from app.batch.tasks import Answer, Began, Make, Measure, Measured
from app.batch.worker import Station
from app.request import Batch

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")


@pytest.fixture(scope="session")
def ray():
    """A Ray of this test run: two CPUs, two GPUs that are none."""
    ray = pytest.importorskip("ray", reason="Ray is not installed: diffusers-accel[cluster]")
    environment, handler = dict(os.environ), signal.getsignal(signal.SIGTERM)
    ray.init(
        address="local",
        num_cpus=2,
        num_gpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        object_store_memory=100 * 2**20,
        _system_config={"worker_niceness": 0},  # the machine may be busy
        runtime_env={"env_vars": {"PYTHONPATH": str(Path(__file__).parent)}},
    )
    yield ray
    ray.shutdown()
    signal.signal(signal.SIGTERM, handler)
    os.environ.clear()
    os.environ.update(environment)


class Job:
    """Rows of the toy, made in a folder."""

    def __init__(self, folder, prompts, load=batch_toy.opener):
        folder.mkdir(exist_ok=True)
        self.log = folder / "log"
        self.log.touch()
        self.load = load(self.log)
        self.rows = [row(index, prompt) for index, prompt in enumerate(prompts)]
        self.storage = Folder(folder / "out")
        self.storage.prepare()
        self.said = []
        self.lines = []

    def cluster(self, device=None, **options):
        return Cluster(Batch(**options), self.storage.where, self.load, device)

    def run(self, engine, size=1, **rules):
        ledger = Manifest(self.storage, "manifest.jsonl")

        def enter(lines):
            self.lines += lines
            ledger.write(lines)

        with engine:
            dispatcher = Dispatcher(engine, Rules(**rules), enter, self.said.append)
            sizes = dict.fromkeys(groups(self.rows), size)
            dispatcher.run(calls(self.rows, sizes), {one.id: one for one in self.rows})
        return manifest.read(self.storage)

    def runs(self):
        """Process ids, a call each."""
        return [int(line.split()[0]) for line in self.log.read_text().splitlines()]

    def pictures(self):
        found = {}
        for path in Path(self.storage.where).glob("*.png"):
            with Image.open(path) as picture:
                found[path.name] = picture.tobytes()
        return found


def check(job, state):
    """Every row came to an end once, and what is there is what it should be."""
    ids = [line.id for line in job.lines]
    assert sorted(ids) == sorted(one.id for one in job.rows)
    made = {one.file: batch_toy.picture(one.seed).tobytes() for one in state.made.values()}
    assert job.pictures() == made
    left = {path.name for path in Path(job.storage.where).iterdir()} - made.keys()
    assert left == {"manifest.jsonl"}


def await_run(job, count):
    while len(job.runs()) < count:
        time.sleep(0.02)


def await_end(job):
    """No actor is left."""
    end = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in job.runs()):
        assert time.monotonic() < end
        time.sleep(0.02)


def test_two_actors_make_all_rows_and_those_of_local_processes(ray, tmp_path, monkeypatch):
    """The folder is a relative one: actors stand in another."""
    monkeypatch.chdir(tmp_path)
    job = Job(tmp_path, ["slow"] * 12)
    job.storage = Folder(Path("out"))
    state = job.run(job.cluster(), size=2)
    check(job, state)
    assert len(state.made) == 12 and not job.said
    assert len(set(job.runs())) == 2
    assert {one.worker for one in state.made.values()} == {"worker-0", "worker-1"}
    local = Job(tmp_path / "local", ["slow"] * 12)
    local.run(Local([Station("w", local.storage.where, "cpu")], local.load), size=2)
    assert job.pictures() == local.pictures()
    await_end(job)


def test_an_actor_that_is_killed_costs_nothing_but_time(ray, tmp_path):
    job = Job(tmp_path, ["slow"] * 30)

    def kill():
        await_run(job, 4)
        os.kill(job.runs()[-1], signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    state = job.run(job.cluster(workers=2))
    thread.join()
    check(job, state)
    assert len(state.made) == 30
    assert len(job.said) == 1 and "process has died" in job.said[0]
    assert len(set(job.runs())) == 3


def test_poison_is_set_aside_and_the_others_are_made(ray, tmp_path):
    job = Job(tmp_path, ["fine", "die", "fail", "fine", "bug", "fine"])
    state = job.run(job.cluster(workers=1), size=6, retries=0)
    check(job, state)
    found = {one.index: one.quarantined for one in state.failed.values()}
    assert found == {1: True, 2: False, 4: False}
    assert "process has died" in state.failed["id1"].reason
    assert state.failed["id2"].reason == "The run holds NaN: try another dtype."
    assert {one.batch for one in state.made.values()} == {("id0", "id3", "id5")}


def test_a_row_that_takes_too_long_is_ended(ray, tmp_path):
    job = Job(tmp_path, ["fine", "hang", "fine"])
    state = job.run(job.cluster(workers=1), retries=0, timeout=3)
    check(job, state)
    assert "longer than 3 s" in state.failed["id1"].reason
    assert state.failed["id1"].quarantined
    await_end(job)


def heard(engine, most=30.0):
    """What worker 0 says up to its answer or death."""
    found, end = [], time.monotonic() + most
    while not any(isinstance(one, (Answer, Measured, Died)) for one in found):
        assert time.monotonic() < end
        found += [event for _, event in engine.events(0.2)]
    return found


def test_what_is_heard(ray, tmp_path, monkeypatch):
    """A beginning once, when the actor is there; a death at once; a model, measured."""
    job = Job(tmp_path, ["fine", "hang"])
    fine, hang = (Make(f"key {one.id}", (one,), frozenset({one.id})) for one in job.rows)
    with job.cluster(workers=1) as engine:
        assert (engine.count, engine.ahead) == (1, 1)
        engine.start()
        engine.send(0, fine)
        assert engine.events(0.0) == []
        began, answer = heard(engine)
        assert began == Began(fine.key)
        assert (answer.key, answer.how) == (fine.key, "made")
        engine.send(0, hang)
        assert engine.events(0.1) == [(0, Began(hang.key))]
        engine.kill(0, "it was too slow")
        assert engine.events(5.0) == [(0, Died("it was too slow"))]
        assert engine.events(0.0) == []
        engine.send(0, Measure("g", (job.rows[0],) * 2))
        assert [type(one) for one in heard(engine)] == [Measured]
        monkeypatch.setattr(Cluster, "_start", lambda self, gang: gang.members[0])
        engine.kill(0, "again")
        assert heard(engine) == [Died("again")]
        engine.send(0, fine)
        assert heard(engine) == [Died("IndexError: list index out of range")]
    assert engine.count == 1  # for the report


def test_what_cannot_be_sent_or_loaded_is_a_death_with_its_reason(ray, tmp_path, monkeypatch):
    """An opener that holds a lock, and one whose module is there only where the job is started."""
    (tmp_path / "only_here.py").write_text("def opened(source): ...")
    monkeypatch.syspath_prepend(tmp_path)
    job = Job(tmp_path, ["fine"])
    task = Make("key", (job.rows[0],), frozenset())
    lock = threading.Lock()
    job.load = lambda source: lock
    with job.cluster(workers=1) as engine:
        engine.send(0, task)
        (died,) = heard(engine)
    assert died.reason.startswith("TypeError: Could not serialize the argument")
    assert "\n" not in died.reason
    job.load = importlib.import_module("only_here").opened
    with job.cluster(workers=1) as engine:
        engine.send(0, task)
        (died,) = heard(engine)
    assert died.reason == "ModuleNotFoundError: No module named 'only_here'"


def await_free(ray):
    """Nobody holds anything of the cluster."""
    end = time.monotonic() + 10
    while ray.available_resources().get("GPU") != 2.0:
        assert time.monotonic() < end
        time.sleep(0.1)


@contextmanager
def taken(ray):
    """Inside, somebody else holds one of the GPUs."""
    await_free(ray)
    other = ray.util.placement_group([{"GPU": 1}])
    assert other.wait(10)
    try:
        yield
    finally:
        ray.util.remove_placement_group(other)


def test_a_worker_without_room_leaves_its_rows_to_another(ray, tmp_path, monkeypatch, capsys):
    """And nothing is held of the cluster afterwards."""
    monkeypatch.setattr(module, "SOON", 0.5)
    monkeypatch.setattr(module, "LOOK", 0.1)
    job = Job(tmp_path, ["slow"] * 20)
    with taken(ray):
        state = job.run(job.cluster())
    check(job, state)
    assert len(state.made) == 20 and len(set(job.runs())) == 1 and not job.said
    told = "no room yet for 1 of 2 workers (1 × 1 GPU): waiting for it"
    assert capsys.readouterr().err.count(told) == 1
    await_free(ray)


def test_more_workers_than_the_cluster_has_are_refused(ray, tmp_path):
    job = Job(tmp_path, [])
    told = r"3 workers: the cluster has room for 2 processes of 1 GPU each: give fewer --workers"
    with pytest.raises(BadInput, match=told), job.cluster(workers=3):
        pass
    told = r"1 worker of 2: the cluster has room for 1 processes of 2 CPUs each"
    with pytest.raises(BadInput, match=told), job.cluster("cpu", devices=2, threads=2):
        pass
    with job.cluster(devices=2) as engine:
        assert engine.count == 1
    with job.cluster("cpu") as engine:
        assert engine.count == 1
    assert ray.is_initialized()  # it was not ours
    assert not list(Path(job.storage.where).iterdir())


def test_a_folder_that_is_not_shared_is_refused(ray, tmp_path, monkeypatch):
    """It is one that nothing arrives in."""
    job = Job(tmp_path, ["fine"])
    monkeypatch.setattr(Folder, "put", lambda self, contents: None)
    told = r"out is not shared with node \d+\.\d+\.\d+\.\d+: give a folder that all nodes see"
    with job.cluster(workers=1) as engine:
        engine.send(0, Make("key", (job.rows[0],), frozenset()))
        with pytest.raises(AccelError, match=told):
            heard(engine)


def test_two_actors_make_a_row_together_and_start_again_together(ray, tmp_path):
    job = Job(tmp_path, ["slow"] * 8, cluster_jobs.pair)

    def kill():
        await_run(job, 4)
        os.kill(job.runs()[-1], signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    state = job.run(job.cluster(devices=2))
    thread.join()
    assert len(state.made) == len(job.lines) == 8 and not state.failed
    assert len(job.said) == 1 and "process has died" in job.said[0]
    assert len(set(job.runs())) == 4
    assert set(job.pictures().values()) == {bytes((11, 0, 0)) * 16}


def fails(key="key"):
    return Answer(key, "failed", error=f"no {key}")


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ({0: [Answer("key", "made")], 1: [fails()]}, [Answer("key", "made")]),
        ({1: [fails("first")], 0: [fails()]}, [fails("first")]),
        ({1: [fails()]}, [fails()]),
        ({1: [Answer("key", "made")]}, []),
    ],
)
def test_of_several_the_first_one_counts_or_who_failed_first(answers, said):
    gang = _Gang(Station("w", "out"), task=Make("key", (), frozenset()), answers=answers)
    gang.conclude()
    assert gang.said == said
    assert (gang.task is None) == bool(said)


def test_one_that_does_not_answer_after_a_failure_is_waited_for_so_long(monkeypatch):
    task = Make("key", (), frozenset())
    gang = _Gang(Station("w", "out"), task=task, answers={1: [fails()]}, owed={"late": 0})
    gang.conclude()
    assert not gang.said and gang.task is task
    monkeypatch.setattr(module, "GRACE", -1.0)
    gang.conclude()
    assert gang.said == [fails()] and gang.task is None


def test_a_cluster_that_does_not_answer_is_not_waited_for(ray, monkeypatch):
    """A port that is closed, and one where somebody listens who says nothing."""
    monkeypatch.setattr(module, "REACH", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        address = f"127.0.0.1:{mute.getsockname()[1]}"
        told = rf"The Ray cluster at {address} cannot be joined \(no answer for 1 s\)"
        with pytest.raises(AccelError, match=told):
            module._reach(address)
    with pytest.raises(AccelError, match="refused"):
        module._reach(address)


def test_without_ray_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with (
        pytest.raises(BadInput, match=r"pip install 'diffusers-accel\[cluster\]'"),
        Cluster(Batch(), "out", batch_toy.opener(Path("log")), None),
    ):
        pass
