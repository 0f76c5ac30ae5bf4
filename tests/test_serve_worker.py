"""The worker in this process: models come and go, a full disk is waited for, errors help."""

import errno
import os
import warnings
from pathlib import Path
from threading import Event

import pytest
import serve_toy
import torch
from hypothesis import given
from hypothesis import strategies as st
from saved import Folders
from serve_toy import STEPS, spec

from accel.errors import AccelWarning
from app import files, metadata
from app.memory import out_of_memory
from app.serve.following import Control
from app.serve.jobs import Progress, Spec
from app.serve.performing import Task
from app.serve.worker import DONE, Asked, Blocked, Ended, Loaded, Worker, obey

CACHED = {"plan": 1, "cache": {"EasyCache": {"threshold": 1e6}}}


@pytest.fixture(autouse=True)
def _toy_machine(monkeypatch):
    monkeypatch.setattr(metadata, "fingerprint", lambda model: serve_toy.FINGERPRINT)


@pytest.fixture
def opened(tmp_path):
    """The sources that were opened, and an opener that notes them."""
    found = []

    def open_toy(source):
        found.append(source.model)
        return serve_toy.Toy(source, tmp_path / "runs.log", 0.0)

    return found, open_toy


@pytest.fixture
def heard():
    return []


@pytest.fixture
def control(heard):
    return Control(Event(), Event(), heard.append)


def task(folder: Path, asked: Spec, job="j") -> Task:
    return Task(job, asked, folder / job, folder / "baselines")


def test_what_is_made_lies_in_the_folder_and_says_how_it_ended(tmp_path, opened, control, heard):
    ended = Worker(opened[1]).perform(task(tmp_path, spec(7)), control)
    assert ended.state == "done" and ended.result.seed == 7 and ended.result.steps == STEPS
    folder = tmp_path / "j"
    held = {path.name for path in folder.iterdir()}
    assert held == {*ended.result.files.values(), DONE}
    assert Ended.model_validate_json((folder / DONE).read_bytes()) == ended
    made, [picture] = metadata.read(folder / ended.result.files["picture"])
    assert picture.getpixel((0, 0)) == (7, 0, 0) and made.asked.seed == 7
    assert [one.phase for one in heard if isinstance(one, Progress)] == ["loading", "writing"]
    assert [one for one in heard if isinstance(one, Loaded)] == [Loaded("cpu, toy, 1 threads")]


def test_the_last_model_stays_loaded_and_another_takes_its_place(tmp_path, opened, control):
    names, open_toy = opened
    worker = Worker(open_toy)
    for model in ("scenes-flux", "scenes-flux", "scenes-unet", "scenes-flux"):
        asked = Spec(request={"prompt": "fox", "seed": 1, "model": model})
        assert worker.perform(task(tmp_path, asked), control).state == "done"
    assert names == ["scenes-flux", "scenes-unet", "scenes-flux"]


def test_a_model_that_was_loaded_ahead_is_warm(tmp_path, opened, control):
    worker = Worker(opened[1])
    worker.preload(task(tmp_path, spec(1)).request.source, control)
    assert worker.perform(task(tmp_path, spec(1)), control).measured.configuration
    assert opened[0] == ["scenes-flux"]


def test_what_cannot_be_loaded_ahead_leaves_it_to_the_job(tmp_path, control, capsys):
    worker = Worker(serve_toy.damaged)
    worker.preload(task(tmp_path, spec(1)).request.source, control)
    assert "truncated" in capsys.readouterr().err
    assert worker.perform(task(tmp_path, spec(1)), control).state == "failed"


def test_times_count_from_the_second_run_after_loading(tmp_path, opened, control):
    worker = Worker(opened[1])
    cold, warm, fast = (
        worker.perform(task(tmp_path, spec(1, plan=plan)), control).measured
        for plan in ({"plan": 1}, {"plan": 1}, CACHED)
    )
    assert cold.configuration is None and cold.stock == []
    assert warm.configuration is not None and len(warm.stock) == 1
    assert fast.configuration == warm.configuration and fast.stock == []


@pytest.mark.parametrize("harm", ["truncated", "no index", "no header"])
def test_a_damaged_model_is_named_and_the_one_before_stays(tmp_path, opened, control, harm):
    source = Folders(tmp_path / "saved").fresh("sd15", tmp_path / "model")
    weights = next((source / "unet").glob("*.safetensors"))
    harmed = source / "model_index.json" if harm == "no index" else weights
    if harm == "truncated":
        os.truncate(weights, weights.stat().st_size - 1)
    elif harm == "no header":
        weights.write_bytes(b"\xff" * 64)
    else:
        harmed.unlink()
    names, open_toy = opened
    worker = Worker(open_toy)
    good = spec(1)
    bad = Spec(request={"prompt": "fox", "seed": 1, "model": str(source)})
    ended = [worker.perform(task(tmp_path, asked), control) for asked in (good, bad, good)]
    assert [one.state for one in ended] == ["done", "failed", "done"]
    assert harmed.name in ended[1].error
    assert names == ["scenes-flux"]  # the model before was never let go


def full_disk(monkeypatch, at, times):
    """The disk is full at some write, so many times."""
    left, writes = [times], []
    inner = os.fsync

    def fsync(descriptor):
        writes.append(descriptor)
        if len(writes) > at and left[0]:
            left[0] -= 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        inner(descriptor)

    monkeypatch.setattr(files.os, "fsync", fsync)


@pytest.mark.parametrize("at", range(4))
def test_a_full_disk_is_waited_for_at_whichever_file(
    tmp_path, opened, control, heard, monkeypatch, at
):
    worker = Worker(opened[1], again=0.01)
    worker.perform(task(tmp_path, spec(1), "first"), control)  # its stock side is kept already
    heard.clear()
    full_disk(monkeypatch, at, times=3)
    ended = worker.perform(task(tmp_path, spec(1)), control)
    assert ended.state == "done"
    written = len(ended.result.files) + 1
    blocked = [one for one in heard if isinstance(one, Blocked)]
    assert len(blocked) == (3 if at < written else 0)
    assert all("No space left" in one.reason for one in blocked)
    names = [path.name for path in (tmp_path / "j").iterdir()]
    assert sorted(names) == sorted([*ended.result.files.values(), DONE])
    assert len(opened[0]) == 1 and (tmp_path / "runs.log").read_text() == "1\n1\n"


def test_nothing_is_there_while_the_disk_is_full_and_a_stop_gives_up(
    tmp_path, opened, heard, monkeypatch
):
    stop = Event()

    def send(message):
        heard.append(message)
        if isinstance(message, Blocked):
            assert not list((tmp_path / "j").iterdir())
            stop.set()

    full_disk(monkeypatch, 0, times=99)
    ended = Worker(opened[1], again=0.01).perform(
        task(tmp_path, spec(1)), Control(stop, Event(), send)
    )
    assert ended.state == "stopped" and "free some space" in ended.error
    assert not list((tmp_path / "j").iterdir())


@pytest.mark.parametrize("times", [0, 1, 3])
def test_a_stop_from_before_the_disk_was_full_throws_nothing_away(
    tmp_path, opened, control, heard, monkeypatch, times
):
    control.stop.set()
    full_disk(monkeypatch, 1, times)  # the first write is that of the stock side
    ended = Worker(opened[1], again=0.01).perform(task(tmp_path, spec(1)), control)
    assert ended.state == "done" and (tmp_path / "j" / DONE).is_file()
    assert len([one for one in heard if isinstance(one, Blocked)]) == times


@given(
    st.lists(st.builds(Asked, stops=st.integers(0, 3), watched=st.booleans()), max_size=8),
    st.integers(0, 8),
)
def test_a_stop_counts_anew_each_time_it_is_asked_for(said, taken):
    """Whoever takes note of a stop, by clearing it, hears of the next one and of no older one."""
    control, stops = Control(Event(), Event(), lambda _: None), 0
    for turn, asked in enumerate(said):
        if turn == taken:
            control.stop.clear()
        was = control.stop.is_set()
        obey(control, asked, stops)
        assert control.watched.is_set() == asked.watched
        assert control.stop.is_set() == (asked.stops > stops or (was and asked.stops > 0))
        stops = asked.stops


def test_a_stock_side_that_cannot_be_kept_is_only_noted(tmp_path, opened, control):
    (tmp_path / "baselines").write_text("in the way")
    ended = Worker(opened[1]).perform(task(tmp_path, spec(1)), control)
    assert ended.state == "done" and "was not kept" in ended.result.notes[0]


def test_warnings_become_notes_and_bugs_go_to_the_log(tmp_path, opened, control, capsys):
    class Warns(serve_toy.Toy):
        def run(self, request, plan, watch=None, *, memory=False):
            for _ in range(2):
                warnings.warn("the method did nothing", AccelWarning, stacklevel=1)
            return super().run(request, plan, watch)

    worker = Worker(lambda source: Warns(source, tmp_path / "runs.log", 0.0))
    assert worker.perform(task(tmp_path, spec(1)), control).result.notes == [
        "the method did nothing"
    ]
    ended = worker.perform(task(tmp_path, spec(1, "bug")), control)
    assert ended.state == "failed" and "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: not enough memory"),
            True,
        ),
        (RuntimeError("shapes do not match"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error, says):
    assert out_of_memory(error) == says


def test_out_of_memory_while_loading_says_so(tmp_path, control):
    def too_large(source):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    ended = Worker(too_large).perform(task(tmp_path, spec(1)), control)
    assert ended.state == "failed" and "while the model was loaded" in ended.error


def test_a_job_on_a_device_of_the_server_names_it(tmp_path):
    asked = Task("j", spec(1), tmp_path, tmp_path, device="cuda:1")
    assert asked.request.device == "cuda:1"
    own = Task(
        "j", Spec(request={"prompt": "x", "seed": 1, "device": "cpu"}), tmp_path, tmp_path, "cuda:1"
    )
    assert own.request.device == "cpu"
