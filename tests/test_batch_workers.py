"""Worker processes: whatever ends them, files and manifest say the truth, and every row is there.

The model is a toy; processes, pipes, signals, files and manifest are real.
"""

import os
import random
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import batch_toy
import pytest
from PIL import Image
from test_batch_dispatch import row

from app import metadata
from app.batch import manifest
from app.batch.dispatch import Dispatcher, Fatal, Rules
from app.batch.engine import Local
from app.batch.grouping import calls, groups
from app.batch.manifest import Failed, Made, Manifest
from app.batch.storage import Folder, digest
from app.batch.tasks import Measure, Measured
from app.batch.worker import Station, Worker
from parallel.launch import Place


class Job:
    """Rows of the toy, made in a folder."""

    def __init__(self, tmp_path, prompts, workers=1, size=3):
        self.log = tmp_path / "log"
        self.log.touch()
        self.rows = [row(index, prompt) for index, prompt in enumerate(prompts)]
        self.storage = Folder(tmp_path / "out")
        self.storage.prepare()
        self.size = size
        stations = [Station(f"w{n}", self.storage.where, "cpu") for n in range(workers)]
        self.engine = Local(stations, batch_toy.opener(self.log))
        self.said = []

    def run(self, **rules):
        ledger = Manifest(self.storage, "manifest.jsonl")
        dispatcher = Dispatcher(self.engine, Rules(**rules), ledger.write, self.said.append)
        sizes = dict.fromkeys(groups(self.rows), self.size)
        with self.engine:
            dispatcher.run(calls(self.rows, sizes), {one.id: one for one in self.rows})
        return manifest.read(Folder(Path(self.storage.where)))

    def record(self, index):
        return metadata.record_of(Path(self.storage.where) / self.rows[index].file)

    def pids(self):
        return {int(line.split()[0]) for line in self.log.read_text().splitlines()}


def check(job, state):
    """What is entered is there, and is what it should be."""
    for one in state.made.values():
        assert digest(job.storage, one.file) == one.sha256
        with Image.open(Path(job.storage.where) / one.file) as found:
            assert found.tobytes() == batch_toy.picture(one.seed).tobytes()
    assert state.made.keys() | state.failed.keys() == {one.id for one in job.rows}
    assert not state.made.keys() & state.failed.keys()
    assert not list(Path(job.storage.where).rglob("*.part"))


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("size", [1, 4])
def test_all_rows_are_made(tmp_path, workers, size):
    job = Job(tmp_path, ["fine"] * 9, workers, size)
    state = job.run()
    check(job, state)
    assert len(state.made) == 9
    assert len(job.pids()) == workers
    assert not job.said


def test_poison_fails_alone_and_the_others_of_its_call_are_made(tmp_path):
    job = Job(tmp_path, ["fine", "die", "fine", "fail", "bug", "fine", "fine"], size=7)
    state = job.run(retries=1)
    check(job, state)
    assert {one.index: one.quarantined for one in state.failed.values()} == {
        1: True, 3: False, 4: False,
    }  # fmt: skip
    assert "SIGKILL" in state.failed["id1"].reason
    assert state.failed["id3"].reason == "The run holds NaN: try another dtype."
    assert "a bug of ours" in state.failed["id4"].reason
    assert "batch_toy.py" in state.failed["id4"].reason
    assert {one.batch for one in state.made.values()} == {("id0", "id2", "id5", "id6")}


def test_a_row_that_takes_too_long_is_ended_and_set_aside(tmp_path):
    job = Job(tmp_path, ["fine", "hang", "fine"], size=1)
    state = job.run(retries=0, timeout=8)
    check(job, state)
    assert "longer than 8 s" in state.failed["id1"].reason
    assert state.failed["id1"].quarantined


def test_out_of_memory_halves_the_call_and_says_so(tmp_path):
    job = Job(tmp_path, ["big"] * 5, size=5)
    state = job.run()
    check(job, state)
    assert len(state.made) == 5
    assert all("out of memory with 5" in one.notes[0] for one in state.made.values())
    sizes = [len(line.split("|")) for line in job.log.read_text().splitlines()]
    assert sizes == [5, 2, 3, 1, 2]


def test_what_fits_only_in_tiles_is_made_in_tiles_and_the_next_row_is_not(tmp_path):
    job = Job(tmp_path, ["fine", "huge", "fine"], size=1)
    state = job.run()
    check(job, state)
    notes = {one.index: one.notes for one in state.made.values()}
    assert notes == {0: (), 1: ("out of memory: made with the decoder in tiles",), 2: ()}
    records = {index: job.record(index) for index in notes}
    savings = {index: record.fingerprint.savings for index, record in records.items()}
    assert savings == {0: (), 1: ("decoder in tiles",), 2: ()}


@pytest.mark.parametrize("times", [12])
def test_workers_killed_at_random_cost_nothing_but_time(tmp_path, times):
    job = Job(tmp_path, ["slow"] * 40, workers=2, size=4)
    kills = threading.Thread(target=_kill, args=(job, times, random.Random(0)))
    kills.start()
    state = job.run(retries=100)
    kills.join()
    job.storage.sweep()  # as a run does at its end: one may have died while it wrote
    check(job, state)
    assert len(state.made) == 40
    assert job.said and all("died (signal SIGKILL)" in one for one in job.said)
    for one in state.made.values():
        start = one.index // 4 * 4
        assert one.batch == tuple(f"id{place}" for place in range(start, start + 4))


def _kill(job, times, luck):
    """End one of the workers, again and again, while the job runs."""
    for _ in range(times):
        time.sleep(luck.uniform(0.1, 0.8))
        alive = [pid for pid in job.engine.processes if pid is not None]
        if alive:
            os.kill(luck.choice(alive), signal.SIGKILL)


def test_a_model_that_cannot_be_loaded_fails_its_rows_and_no_others(tmp_path):
    job = Job(tmp_path, ["fine"] * 2)
    job.rows += [row(index, "fine", "bad", "bad") for index in (2, 3)]
    state = job.run()
    check(job, state)
    assert {one.index for one in state.failed.values()} == {2, 3}
    assert all("truncated" in one.reason for one in state.failed.values())


def test_an_output_that_refuses_files_ends_the_job_and_what_was_made_is_kept(tmp_path):
    job = Job(tmp_path, ["fine"] * 6, size=1)
    (Path(job.storage.where) / "3.png").mkdir()
    with pytest.raises((Fatal, OSError), match=r"3\.png"):
        job.run()
    state = manifest.read(Folder(Path(job.storage.where)))
    assert 0 < len(state.made) <= 5
    assert not any(isinstance(one, Failed) for one in state.made.values())


def test_a_process_that_gives_no_sign_of_life_is_ended(tmp_path, monkeypatch):
    """Stopped by a signal, as one that hangs inside Python's lock."""
    monkeypatch.setattr("app.batch.engine.SILENCE", 20.0)
    job = Job(tmp_path, ["slow"] * 3, size=1)
    stopped = []

    def stop():
        while not job.pids():
            time.sleep(0.05)
        stopped.append(job.engine.processes[0])
        os.kill(stopped[0], signal.SIGSTOP)

    thread = threading.Thread(target=stop)
    thread.start()
    state = job.run()
    thread.join()
    check(job, state)
    assert len(state.made) == 3
    assert any("no sign of life" in one for one in job.said)
    assert not Path(f"/proc/{stopped[0]}").exists()


def test_a_worker_and_each_of_a_gang_has_a_device_of_its_own(tmp_path):
    """Where a row names none, or only its kind."""
    first = Station("w", str(tmp_path), "cuda:2")
    assert first.of(None) == first
    assert [first.of(Place(rank, 2, rank)).device for rank in (0, 1)] == ["cuda:2", "cuda:3"]
    assert Station("w", str(tmp_path), "cpu").of(Place(1, 2, 1)).device == "cpu"
    worker = Worker(first, batch_toy.opener(tmp_path / "log"))
    for named, used in ((None, "cuda:2"), ("cuda", "cuda:2"), ("cuda:0", "cuda:0"), ("cpu", "cpu")):
        one = row(0)
        form = replace(one.form, request=replace(one.form.request, device=named))
        assert worker._request(replace(one, form=form)).device == used


def test_no_process_outlives_its_engine(tmp_path):
    job = Job(tmp_path, ["fine"] * 4, workers=2, size=1)
    job.run()
    assert not any(Path(f"/proc/{pid}").exists() for pid in job.pids())


def test_a_size_that_memory_does_not_suffice_for_is_not_chosen(tmp_path):
    job = Job(tmp_path, ["big"] * 8)
    with job.engine as engine:
        engine.send(0, Measure("g", tuple(job.rows)))
        found = []
        while not found:
            found = [event for _, event in engine.events(1.0)]
    assert isinstance(found[0], Measured)
    assert found[0].size <= 2
    assert "out of memory with 4" in found[0].note
    assert set(found[0].seconds) == {1, 2}


def test_the_manifest_has_what_the_report_needs(tmp_path):
    job = Job(tmp_path, ["fine"] * 2, size=2)
    one = job.run().made["id1"]
    assert isinstance(one, Made)
    assert (one.steps, one.nfe, one.worker, one.prompt) == (batch_toy.STEPS, 4, "w0", "fine")
    assert one.bytes == len(job.storage.get(one.file))
