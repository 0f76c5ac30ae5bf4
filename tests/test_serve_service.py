"""The service with real worker processes on a toy model: what it promises, whatever is killed."""

import gc
import io
import multiprocessing
import os
import random
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil
import pytest
import serve_toy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from serve_toy import opener, runs, spec

from accel import Plan
from accel.errors import BadInput, PlanError
from app.serve.folders import Folders
from app.serve.jobs import ENDED, FIRST, Busy, Figure, Job, NoSuchJob, Progress, Spec
from app.serve.limits import Limits
from app.serve.performing import Measured
from app.serve.service import Service
from app.serve.store import speedup
from app.serve.supervisor import Room, finish
from app.serve.worker import DONE, Ended

KILLS = 20
AT_MOST = 60.0
NO_ROOM_NEEDED = Room(least=0, pixel=0)


def wait_until(condition, seconds=AT_MOST):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def states(service, owner="ada"):
    return [job.state for job in service.history(owner, limit=500)]


def ended(service, owner="ada"):
    return all(state in ENDED for state in states(service, owner))


@pytest.fixture
def start(tmp_path):
    """Starts services, which end with the test."""
    started = []

    def begin(folder=tmp_path / "server", seconds=0.01, opens=None, **options):
        service = Service(folder, opener=opens or opener(tmp_path, seconds), **options)
        service.start()
        started.append(service)
        return service

    yield begin
    for service in started:
        service.close()


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """One running service for the tests that need nothing special."""
    folder = tmp_path_factory.mktemp("shared")
    service = Service(folder / "server", opener=opener(folder))
    service.start()
    yield service
    service.close()


def check_whole(service, owner="ada"):
    """Every file of every job is whole, and a job that is done has all of them."""
    for job in service.history(owner, limit=500):
        folder = Folders(service.folder).job(owner, job.id)
        for path in folder.glob("[!.]*.png"):
            with Image.open(path) as picture:
                picture.load()
        if job.state == "done":
            for role in job.result.files:
                assert service.file(owner, job.id, role).stat().st_size > 0
            with Image.open(service.file(owner, job.id, "picture")) as picture:
                seed = job.spec.request["seed"]
                assert picture.getpixel((0, 0)) == tuple(seed >> at & 255 for at in (0, 8, 16))


def test_a_job_is_made_and_watched_to_its_end(shared):
    [job] = shared.submit("watcher", [spec(0xABCDEF)])
    seen = list(shared.watch("watcher", job.id))
    assert isinstance(seen[0], Job) and isinstance(seen[-1], Job)
    assert [one.state for one in seen if isinstance(one, Job)][-1] == "done"
    assert {one.job for one in seen if isinstance(one, Progress)} <= {job.id}
    assert list(shared.watch("watcher", job.id)) == [seen[-1]]  # and again after a reload
    path = shared.file("watcher", job.id, "picture")
    assert path.is_relative_to(shared.outputs)
    with Image.open(path) as picture:
        assert picture.getpixel((0, 0)) == (0xEF, 0xCD, 0xAB)


def test_a_seed_is_drawn_once_and_then_stays(shared):
    [job] = shared.submit("seeds", [Spec(request={"prompt": "fox"})])
    seed = job.spec.request["seed"]
    list(shared.watch("seeds", job.id))
    assert shared.job("seeds", job.id).result.seed == seed


def test_a_watcher_is_told_at_most_ten_times_a_second(shared):
    ids = [job.id for job in shared.submit("many", [spec(seed) for seed in range(20)])]
    began = time.monotonic()
    items = list(shared.watch("many", ids[-1]))
    assert len(items) <= 10 * (time.monotonic() - began) + 2
    places = [one.position for one in items if isinstance(one, Job) and one.position is not None]
    assert places == sorted(places, reverse=True)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(
            st.sampled_from([3, 2]),
            st.none() | st.floats(0, 5),
            st.sampled_from([None, "The disk is full."]),
        ),
        max_size=12,
    ),
    st.sampled_from(["queued", "running"]),
)
def test_a_watcher_hears_of_each_change_that_matters_and_of_no_other(shared, script, state):
    """Waiting times count when they moved by more than a second since the last that was told."""
    job = Job("0" * 32, "ada", None, spec(1), state, 0, 0.0)
    looks = iter([*script, None])

    def look(_owner, _id):
        now = next(looks)
        if now is None:
            return replace(job, state="done")
        position, eta, paused = now
        shared._board.pause("test", paused)
        return replace(job, position=position, eta=eta)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared, "job", look)
        patch.setattr("app.serve.service.PAUSE", 0.0)
        patch.setattr("app.serve.service.LOOK", 0.0)
        told = [(one.position, one.eta) for one in shared.watch("ada", job.id)][:-1]
    shared._board.pause("test", None)
    expected, last = [], None
    for position, eta, paused in script:
        moved = last is not None and state == "queued" and eta != last[1] and (
            eta is None or last[1] is None or abs(eta - last[1]) > 1.0
        )  # fmt: skip
        if last is None or moved or (position, paused) != (last[0], last[2]):
            last = position, eta, paused
            expected.append((position, eta))
    assert told == expected


def test_figures_are_those_of_the_machine_that_this_is(tmp_path):
    """A folder that was moved to another machine, or a server on another device, has none."""
    measured = {"fast": Figure(speedup=speedup(1.0, [(2.0, 0.0)]), seconds=1.0)}
    ended = Ended(job="", state="done", measured=Measured(figures=measured, machine="cpu, ours"))
    service = Service(tmp_path, opener=opener(tmp_path))
    asked = Spec(kind="measure", request={"model": "scenes-unet"})
    finish(service._store, Job("0" * 32, "ada", None, asked, "running", 1, 0.0), ended)
    for machines, found in (
        ([], {}),
        (["cuda, ours", "cpu, theirs"], {}),
        (["cpu, ours"], measured),
    ):
        for number, machine in enumerate(machines):
            service._board.place(f"worker {number}", machine)
        assert service.figures("scenes-unet") == found
    service.close()


def test_a_worker_says_what_machine_it_is_before_there_is_a_job(start):
    service = start()
    wait_until(lambda: service._board.machines == ("cpu, toy, 1 threads",))


def test_errors_are_one_sentence_and_the_queue_goes_on(shared):
    made = shared.submit("luckless", [spec(1, "fail"), spec(2, "bug"), spec(3)])
    last = [list(shared.watch("luckless", job.id))[-1] for job in made]
    assert [job.state for job in last] == ["failed", "failed", "done"]
    assert last[0].error == "The run holds NaN: try another dtype."
    assert last[1].error.startswith("RuntimeError: a bug of ours")


def test_one_person_does_not_hold_up_another(shared):
    shared.submit("greedy", [spec(seed) for seed in range(40)])
    [job] = shared.submit("modest", [spec(7)])
    assert (job.position or 0) <= 2  # none once it has begun
    list(shared.watch("modest", job.id))
    assert "queued" in states(shared, "greedy")
    wait_until(lambda: ended(shared, "greedy"))


def test_a_waiting_job_is_stopped_at_once_and_an_ended_one_stays(start):
    service = start(seconds=0.3)
    first, second = service.submit("ada", [spec(1), spec(2)])
    stopped = service.cancel("ada", second.id)
    assert (
        stopped.state == "stopped" and stopped.result is None and "before it began" in stopped.error
    )
    list(service.watch("ada", first.id))
    assert service.cancel("ada", first.id).state == "done"
    assert runs(service.folder.parent) == [1]


def test_restored_from_the_trash_or_gone_with_its_files(shared):
    [job] = shared.submit("tidy", [spec(5)])
    list(shared.watch("tidy", job.id))
    path = shared.file("tidy", job.id, "picture")
    shared.delete("tidy", job.id)
    assert not shared.history("tidy") and shared.history("tidy", deleted=True)[0].id == job.id
    shared.restore("tidy", job.id)
    assert shared.history("tidy")[0].deleted is None and path.is_file()
    shared.delete("tidy", job.id)
    assert shared.purge("tidy") == 1 and not path.parent.exists()
    assert not shared.history("tidy", deleted=True)


def test_fifty_clients_at_once_are_admitted_whole_or_not_at_all(tmp_path):
    service = Service(tmp_path, opener=opener(tmp_path), limits=Limits(jobs=40))

    def ask(number):
        try:
            return service.submit(f"client {number}", [spec(1), spec(2), spec(3)])
        except Busy as busy:
            assert busy.retry_after > 0
            return []

    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(ask, range(50)))
    assert sorted({len(jobs) for jobs in answers}) == [0, 3]
    assert sum(map(len, answers)) == 39
    assert sum(len(service.history(f"client {number}")) for number in range(50)) == 39
    service.close()


def test_one_bad_job_keeps_all_of_a_group_out(shared):
    good, unknown = spec(1), Spec(request={"prompt": "fox", "stepz": 3})
    bad_plan = spec(1, plan={"plan": 1, "cache": {"Nonsense": {}}})
    for wrong, error in ((unknown, BadInput), (bad_plan, PlanError)):
        with pytest.raises(error):
            shared.submit("picky", [good, wrong])
    for against in ("0" * 32, "../../etc/passwd"):
        with pytest.raises(NoSuchJob):
            shared.submit("picky", [good, spec(1, against=against)])
    with pytest.raises(BadInput, match="at most 64"):
        shared.submit("picky", [good] * 65)
    with pytest.raises(BadInput, match="against itself"):
        shared.submit("picky", [spec(1, against=FIRST), good])
    assert not shared.history("picky")


def test_closing_gives_a_running_job_back_without_counting_the_attempt(start, tmp_path):
    service = Service(tmp_path / "server", opener=opener(tmp_path, 5.0))
    service.start()
    [job] = service.submit("ada", [spec(1)])
    wait_until(lambda: runs(tmp_path) == [1])
    service.close()
    again = start()
    assert list(again.watch("ada", job.id))[-1].state == "done"
    assert again.job("ada", job.id).attempts == 1


def test_a_second_server_on_the_same_folder_is_refused(start):
    service = start()
    other = Service(service.folder, opener=opener(service.folder))
    with pytest.raises(BadInput, match="Another server runs on"):
        other.start()


# Killing


def test_a_job_that_kills_its_worker_is_tried_again_once_and_holds_up_nobody(start, tmp_path):
    service = start()
    lucky, deadly, other = service.submit("ada", [spec(1, "die once"), spec(2, "die"), spec(3)])
    last = {job.id: list(service.watch("ada", job.id))[-1] for job in (lucky, deadly, other)}
    assert last[lucky.id].state == "done" and last[lucky.id].attempts == 2
    assert last[deadly.id].state == "quarantined" and "SIGKILL" in last[deadly.id].error
    assert last[other.id].state == "done" and last[other.id].attempts == 1
    assert sorted(runs(tmp_path)) == [1, 1, 2, 2, 3]


class Server:
    """A server in a process of its own, forked from a clean one."""

    def __init__(self, folder, log):
        self._process = multiprocessing.get_context("spawn").Process(
            target=serve_toy.serve, args=(folder, log)
        )
        self._process.start()
        self._handle = psutil.Process(self._process.pid)

    def kill(self):
        """Kill it, and see its worker die with it."""
        workers = self._handle.children(recursive=True)
        self._process.kill()
        self._process.join()
        _, alive = psutil.wait_procs(workers, timeout=AT_MOST)
        assert not alive, "a worker outlived its server"

    def kill_worker(self):
        for worker in self._handle.children():
            with suppress(psutil.NoSuchProcess):
                worker.kill()


def submitted(folder, log, kill):
    """Two jobs, put into the queue as another server would."""
    desk = Service(folder, opener=opener(log))
    ids = [job.id for job in desk.submit("ada", [spec(2 * kill), spec(2 * kill + 1)])]
    desk.close()
    return ids


def test_a_worker_that_is_killed_at_any_moment_loses_no_job(tmp_path):
    folder, chance, ids = tmp_path / "server", random.Random(5), []
    server = Server(folder, tmp_path)
    for kill in range(KILLS):
        known = len(runs(tmp_path))
        ids += submitted(folder, tmp_path, kill)
        wait_until(lambda known=known: len(runs(tmp_path)) > known)
        time.sleep(chance.uniform(0, 0.1))
        server.kill_worker()
    desk = Service(folder, opener=opener(tmp_path))
    wait_until(lambda: ended(desk))
    server.kill()
    check_life(desk, ids, tmp_path)
    desk.close()


def test_a_server_that_is_killed_at_any_moment_loses_no_job(tmp_path):
    folder, chance, ids = tmp_path / "server", random.Random(7), []
    for kill in range(KILLS):
        known = len(runs(tmp_path))
        ids += submitted(folder, tmp_path, kill)
        server = Server(folder, tmp_path)
        wait_until(lambda known=known: len(runs(tmp_path)) > known)
        time.sleep(chance.uniform(0, 0.1))
        server.kill()
    server = Server(folder, tmp_path)
    desk = Service(folder, opener=opener(tmp_path))
    wait_until(lambda: ended(desk))
    server.kill()
    check_life(desk, ids, tmp_path)
    desk.close()


def check_life(service, ids, log):
    """No job is lost, none ran more than twice, and no file is half there."""
    found = {job.id: job for job in service.history("ada", limit=500)}
    assert set(found) == set(ids)
    counts = runs(log)
    for job in found.values():
        ran = counts.count(job.spec.request["seed"])
        assert job.state == "done" or (job.state == "quarantined" and job.attempts == 2)
        assert ran <= job.attempts  # a worker may be killed before the model is asked
    assert sum(job.state == "done" for job in found.values()) > len(ids) // 2
    check_whole(service)
    assert not list(service.outputs.rglob("*.part"))


def test_what_was_finished_when_the_server_died_is_not_made_again(start, tmp_path):
    first = start()
    [job] = first.submit("ada", [spec(3)])
    list(first.watch("ada", job.id))
    first.close()
    forgotten = Service(tmp_path / "server", opener=opener(tmp_path))
    with forgotten._store._transaction() as db:  # as if the server had died before it heard of it
        db.execute("UPDATE jobs SET state = 'running', result = NULL, ended = NULL")
    forgotten.close()
    again = start()
    assert again.job("ada", job.id).state == "done"
    assert again.job("ada", job.id).result.files and runs(tmp_path) == [3]
    assert (Folders(again.folder).job("ada", job.id) / DONE).is_file()


# A full disk


def test_on_a_full_disk_the_queue_waits_says_so_and_goes_on(start, monkeypatch):
    service = start()
    free = [0]
    monkeypatch.setattr(Folders, "free", lambda folders: free[0])
    [job] = service.submit("ada", [spec(1)])
    wait_until(lambda: service.paused is not None)
    assert "The disk is full" in service.paused and "Free some space" in service.paused
    assert service.job("ada", job.id).state in ("queued", "running")
    free[0] = 2**40
    last = list(service.watch("ada", job.id))[-1]
    assert last.state == "done" and last.attempts == 1
    wait_until(lambda: service.paused is None)


def test_a_picture_that_does_not_fit_is_kept_until_it_does(start, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a tmpfs")
    try:
        service = Service(disk / "server", opener=opener(tmp_path), room=NO_ROOM_NEEDED)
        ballast = disk / "ballast"
        [job] = service.submit("ada", [spec(9)])
        with ballast.open("wb") as file:
            file.write(bytes(os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize - 45_000))
        service.start()
        wait_until(lambda: service.paused is not None)
        assert "No space left" in service.paused or "full" in service.paused
        assert service.job("ada", job.id).state == "running"
        check_whole(service)
        ballast.unlink()
        assert list(service.watch("ada", job.id))[-1].state == "done"
        assert service.job("ada", job.id).attempts == 1
        check_whole(service)
        service.close()
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)


def test_a_stop_counts_while_the_disk_is_full(start, monkeypatch):
    """It comes at the moment in which the job is running, and is about to be given back."""
    service, free = start(), [0]
    asked = []

    def look(folders):
        if not free[0] and not asked:
            asked.append(service.cancel("ada", service.history("ada")[0].id))
        return free[0]

    monkeypatch.setattr(Folders, "free", look)
    [job] = service.submit("ada", [spec(1)])
    wait_until(lambda: ended(service))
    free[0] = 2**40
    last = service.job("ada", job.id)
    assert asked[0].state == "running" and last.state == "stopped" and last.result is None
    assert not runs(service.folder.parent)


@pytest.mark.parametrize(
    ("before", "meanwhile", "state"), [(1, 0, "done"), (0, 1, "stopped"), (1, 1, "stopped")]
)
def test_only_a_stop_that_comes_while_the_disk_is_full_throws_a_picture_away(
    start, tmp_path, before, meanwhile, state
):
    full = tmp_path / "full"
    full.touch()
    service = start(opens=partial(serve_toy.full, log=tmp_path / "runs.log", full=full))
    [job] = service.submit("ada", [spec(1)])
    wait_until(lambda: runs(tmp_path) == [1])
    for _ in range(before):
        service.cancel("ada", job.id)
    wait_until(lambda: service.paused is not None)
    assert "No space left" in service.paused
    for _ in range(meanwhile):
        service.cancel("ada", job.id)
    if not meanwhile:
        full.unlink()
    last = list(service.watch("ada", job.id))[-1]
    assert last.state == state and (last.result is None) == bool(meanwhile)


# Whose is whose

OTHERS = {
    "job": lambda service, owner, id: service.job(owner, id),
    "watch": lambda service, owner, id: next(service.watch(owner, id)),
    "cancel": lambda service, owner, id: service.cancel(owner, id),
    "delete": lambda service, owner, id: service.delete(owner, id),
    "restore": lambda service, owner, id: service.restore(owner, id),
    "picture": lambda service, owner, id: service.file(owner, id, "picture"),
    "record": lambda service, owner, id: service.file(owner, id, DONE),
    "against": lambda service, owner, id: service.submit(owner, [spec(1, against=id)]),
}


@pytest.fixture(scope="module")
def owned(shared):
    """A job of somebody who keeps it to herself."""
    [job] = shared.submit("private", [spec(4, "secret words")])
    return list(shared.watch("private", job.id))[-1]


@pytest.mark.parametrize("act", OTHERS)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_nobody_gets_at_what_is_another_s(shared, owned, act, data):
    near = ["Private", "private ", "", "local", "../private", "private/", "%", "_"]
    owner = data.draw(st.one_of(st.sampled_from(near), st.text()).filter(lambda o: o != "private"))
    id = data.draw(st.one_of(st.just(owned.id), st.just(owned.id.upper()), st.text()))
    with pytest.raises(NoSuchJob) as refused:
        OTHERS[act](shared, owner, id)
    assert "secret" not in str(refused.value)
    assert shared.job("private", owned.id) == owned


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(owner=st.text().filter(lambda o: o != "private"), search=st.text(), role=st.text())
def test_searching_and_emptying_stay_at_home(shared, owned, owner, search, role):
    for deleted in (False, True):
        found = shared.history(owner, search=search, deleted=deleted)
        assert all(job.owner == owner for job in found)
    shared.purge(owner)
    assert shared.history("private") == [owned]
    if role not in owned.result.files:
        with pytest.raises(NoSuchJob):
            shared.file("private", owned.id, role)


@settings(max_examples=100)
@given(one=st.text(), other=st.text())
def test_folders_of_owners_lie_apart_and_below_the_server_s(one, other):
    folders = Folders(Path("/srv"))
    for place in (lambda o: folders.job(o, "0" * 32), folders.uploads):
        assert place(one).resolve().is_relative_to("/srv") and ".." not in place(one).parts
        assert (place(one) == place(other)) == (one == other)


def test_uploads_of_others_cannot_be_used(shared, tmp_path):
    Image.new("RGB", (8, 8), "teal").save(tmp_path / "start.png")
    path = shared.upload("ada", "start.png", tmp_path / "start.png")
    assert path == shared.upload("ada", "again.png", (tmp_path / "start.png").read_bytes())
    asked = {"prompt": "fox", "image": str(path)}
    [job] = shared.submit("ada", [Spec(request=asked)])
    list(shared.watch("ada", job.id))
    for owner, image in (("bob", path), ("ada", tmp_path / "start.png"), ("ada", "/etc/passwd")):
        with pytest.raises(BadInput, match="none of your uploads"):
            shared.submit(owner, [Spec(request=asked | {"image": str(image)})])


def pictured(service, owner, colour, hours):
    """An upload that is so old."""
    held = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(held, "PNG")
    path = service.upload(owner, "start.png", held.getvalue())
    age(path, hours)
    return path


def age(path, hours):
    then = time.time() - 3600 * hours
    os.utime(path, (then, then))


def test_emptying_the_trash_removes_old_uploads_that_no_job_names(tmp_path):
    service = Service(tmp_path, opener=opener(tmp_path))
    colours = ("red", "green", "blue", "gray")
    named, dropped, stray, young = (
        pictured(service, "ada", colour, hours)
        for colour, hours in zip(colours, (2, 2, 2, 0.5), strict=True)
    )
    others = pictured(service, "bob", "red", 2)
    jobs = service.submit(
        "ada", [Spec(request={"prompt": "x", "image": str(path)}) for path in (named, dropped)]
    )
    service.delete("ada", jobs[1].id)
    assert service.purge("ada") == 1
    assert not stray.exists() and all(path.exists() for path in (named, young, others))
    assert dropped.exists()  # a job named it less than an hour ago
    for path in (named, dropped):
        age(path, 2)
    service.purge("ada")
    assert named.exists() and not dropped.exists()
    service.delete("ada", jobs[0].id)
    service.restore("ada", jobs[0].id)
    service.purge("ada")
    assert named.exists()
    service.close()


def test_an_upload_stays_while_a_job_that_names_it_is_being_submitted(tmp_path, monkeypatch):
    """The trash is emptied between the check of the request and its admission."""
    service = Service(tmp_path, opener=opener(tmp_path))
    path = pictured(service, "ada", "red", 2)
    plan = Plan.preset("balanced").to_dict()
    monkeypatch.setattr(service._examiner, "check", lambda *_: service.purge("ada"))
    service.submit("ada", [Spec(request={"prompt": "x", "image": str(path)}, plan=plan)])
    assert path.exists()
    service.close()


# For long


def heap(process):
    """Bytes that a process has written, in memory or swapped out: a host may move them about."""
    found = process.memory_full_info()
    return found.rss - found.shared + found.swap


def test_memory_is_flat_over_five_hundred_jobs(shared):
    process = psutil.Process()
    jobs = [spec(seed) for seed in range(50)]

    def round_of_fifty():
        made = shared.submit("soak", jobs)
        list(shared.watch("soak", made[-1].id))
        wait_until(lambda: ended(shared, "soak"))

    sizes = []
    for turn in range(10):
        round_of_fifty()
        gc.collect()
        sizes.append((len(gc.get_objects()), heap(process)))
        workers = [heap(psutil.Process(pid)) for pid in shared.processes]
        if turn == 2:
            first = (*sizes[-1], *workers)
    last = (*sizes[-1], *workers)
    objects, *memory = zip(first, last, strict=True)
    assert objects[1] - objects[0] < 500  # less than one an each of 350 jobs
    assert all(after - before < 16 * 2**20 for before, after in memory)
