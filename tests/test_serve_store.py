"""The queue on disk: all or nothing, in rounds over owners, and no job is lost or run thrice."""

import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from accel.errors import BadInput, NotWritten
from app.serve.jobs import ENDED, FIRST, Busy, NoSuchJob, Result, Spec
from app.serve.limits import Limits
from app.serve.store import ATTEMPTS, Draft, Store

OWNERS = ("ada", "bob", "cleo")
WIDE = Limits(jobs=10**6, jobs_of_owner=10**6)


def draft(kind="generate", device=None, workload="w", words="", model="m", **more):
    spec = Spec(kind=kind, request={"model": model, "seed": 1}, **more)
    return Draft(spec, model, device, workload, words)


def result(seconds=1.0, **more):
    told = {"files": {"picture": "p.png"}, "seed": 1, "seconds": seconds, "steps": 4, "nfe": 8}
    return Result(**told | more)


@pytest.fixture
def store(tmp_path):
    made = Store(tmp_path / "jobs.sqlite3")
    yield made
    made.close()


def admit(store, owner="ada", count=1, limits=WIDE, group=None, **more):
    return store.admit(owner, [draft(**more) for _ in range(count)], group, limits)


def test_what_is_admitted_comes_back_as_it_was(store):
    spec = Spec(request={"model": "m", "seed": 3}, plan={"plan": 1}, title="fast")
    [id] = store.admit("ada", [Draft(spec, "m", None, "w", "")], "sweep", WIDE)
    job = store.job("ada", id)
    assert (job.spec, job.owner, job.group, job.state) == (spec, "ada", "sweep", "queued")
    assert (job.position, job.eta, job.attempts) == (0, None, 0)


@pytest.mark.parametrize("limit", ["jobs", "jobs_of_owner"])
def test_fifty_at_once_are_admitted_whole_or_not_at_all(store, limit):
    size, room = 3, 40
    limits = replace(WIDE, **{limit: room})

    def ask(number):
        with suppress(Busy):
            return admit(store, "ada", size, limits, group=str(number))

    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(ask, range(50)))
    admitted = [ids for ids in answers if ids]
    assert len(admitted) == room // size and all(len(ids) == size for ids in admitted)
    jobs = store.history("ada", [], False, 500, None)
    assert {job.id for job in jobs} == {id for ids in admitted for id in ids}
    assert sorted(job.position for job in jobs) == list(range(len(jobs)))


def test_a_full_queue_says_how_full_and_when_to_ask_again(store):
    admit(store, "ada", 2)
    with pytest.raises(
        Busy, match=r"2 jobs of yours.* at most 3 may, and this would add 2"
    ) as busy:
        admit(store, "ada", 2, replace(WIDE, jobs_of_owner=3))
    assert busy.value.retry_after >= 1
    with pytest.raises(Busy, match="of all users"):
        admit(store, "bob", 2, replace(WIDE, jobs=3))


def rounds(queue, served):
    """The order that the docstring promises, by hand: rounds, who was served longest ago first."""
    order, left, turns = [], {owner: [] for owner in OWNERS}, dict(served)
    for seq, owner in queue:
        left[owner].append(seq)
    while any(left.values()):
        ready = [owner for owner in OWNERS if left[owner]]
        for owner in sorted(ready, key=lambda one: (turns.get(one, 0), left[one][0])):
            order.append((left[owner].pop(0), owner))
    return order


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.one_of(st.sampled_from(OWNERS), st.just(None)), max_size=25))
def test_owners_take_turns_and_positions_tell_the_order(tmp_path_factory, script):
    store = Store(tmp_path_factory.mktemp("queue") / "jobs.sqlite3")
    queue, served, turn, numbers = [], {}, count(1), count()
    ids = {}
    for owner in script:
        if owner is not None:
            [ids[number := next(numbers)]] = admit(store, owner)
            queue.append((number, owner))
            continue
        claimed = store.claim(None)
        expected = rounds(queue, served)
        assert (claimed is None) == (not expected)
        if claimed is not None:
            assert claimed.id == ids[expected[0][0]]
            queue.remove(expected[0])
            served[expected[0][1]] = next(turn)
    expected = rounds(queue, served)
    places = [store.job(owner, ids[number]).position for number, owner in expected]
    assert places == list(range(len(expected)))
    store.close()


def test_measurements_go_last(store):
    [figures] = admit(store, "ada", kind="measure")
    [picture] = admit(store, "ada")
    assert store.waits()
    assert [store.claim(None).id for _ in range(2)] == [picture, figures]
    assert not store.waits()


def test_a_job_for_a_device_waits_for_it(store):
    [first] = admit(store, device="cuda:1")
    [second] = admit(store)
    assert store.claim("cuda:0").id == second
    assert store.claim("cuda:0") is None
    assert store.claim("cuda:1").id == first


def test_a_job_waits_for_the_one_that_it_is_measured_against(store):
    [stock] = admit(store)
    [fast] = admit(store, against=stock)
    [other] = admit(store, "bob")
    assert [store.claim(None).id for _ in range(2)] == [stock, other]
    assert store.claim(None) is None
    store.finish(stock, "failed", error="It failed.")
    assert store.claim(None).id == fast


def test_jobs_that_come_together_can_be_measured_against_the_first(store):
    stock, *others = store.admit("ada", [draft(), *[draft(against=FIRST)] * 2], "sweep", WIDE)
    assert [store.job("ada", id).spec.against for id in (stock, *others)] == [None, stock, stock]


class Lives(RuleBasedStateMachine):
    """Whatever happens to a job: it is somewhere, starts at most twice, and ends once."""

    def __init__(self):
        super().__init__()
        self.store = Store(Path(":memory:"))
        self.starts, self.ended = {}, {}

    @rule(owner=st.sampled_from(OWNERS), number=st.integers(1, 3))
    def submit(self, owner, number):
        self.starts |= {(owner, id): 0 for id in admit(self.store, owner, number)}

    @rule()
    def begin(self):
        job = self.store.claim(None)
        if job is not None:
            self.starts[job.owner, job.id] += 1

    @property
    def running(self):
        return self.store.running()

    @precondition(lambda self: self.running)
    @rule(state=st.sampled_from(["done", "stopped", "failed"]))
    def end(self, state):
        self.store.finish(self.running[0].id, state, result())

    @precondition(lambda self: self.running)
    @rule()
    def crash(self):
        self.store.crashed(self.running[0].id, "It died")

    @precondition(lambda self: self.running)
    @rule()
    def give_back(self):
        job = self.running[0]
        self.store.give_back(job.id)
        self.starts[job.owner, job.id] -= 1

    @precondition(lambda self: self.starts)
    @rule(data=st.data())
    def cancel(self, data):
        owner, id = data.draw(st.sampled_from(sorted(self.starts)))
        waiting = self.store.job(owner, id).state == "queued"
        assert self.store.stop_waiting(owner, id) == waiting

    @precondition(lambda self: self.starts)
    @rule(data=st.data(), state=st.sampled_from(["done", "failed"]))
    def a_late_word_changes_nothing(self, data, state):
        owner, id = data.draw(st.sampled_from(sorted(self.starts)))
        if self.store.job(owner, id).state != "running":
            before = self.store.job(owner, id)
            self.store.finish(id, state, result())
            self.store.crashed(id, "It died")
            assert replace(self.store.job(owner, id), eta=None) == replace(before, eta=None)

    @invariant()
    def holds(self):
        for (owner, id), starts in self.starts.items():
            job = self.store.job(owner, id)
            assert job.attempts == starts <= ATTEMPTS
            assert (job.ended is not None) == (job.state in ENDED)
            assert (job.position is not None) == (job.state == "queued")
            if job.state == "quarantined":
                assert starts == ATTEMPTS and "not tried again" in job.error
            before = self.ended.setdefault((owner, id), job) if job.state in ENDED else job
            assert before == job

    def teardown(self):
        self.store.close()


TestLives = Lives.TestCase
TestLives.settings = settings(max_examples=15, stateful_step_count=15, deadline=None)


def test_what_was_committed_is_there_after_a_crash(tmp_path):
    path = tmp_path / "jobs.sqlite3"
    store = Store(path)
    [waiting, begun] = admit(store, count=2)
    store.claim(None)
    other = Store(path)  # the first one was never closed
    assert other.job("ada", waiting).state == "running"
    assert other.job("ada", begun).state == "queued"
    assert [job.id for job in other.running()] == [waiting]
    assert sqlite3.connect(path).execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_a_change_that_fails_midway_never_happened(store):
    [id] = admit(store)
    broken = [draft(), replace(draft(), words=None)]
    with pytest.raises(AttributeError):
        store.admit("ada", broken, None, WIDE)
    assert [job.id for job in store.history("ada", [], False, 500, None)] == [id]


@pytest.mark.parametrize(
    "change", ["admit", "claim", "finish", "crashed", "stop", "delete", "keep"]
)
def test_a_full_disk_changes_nothing_and_is_said(tmp_path, change):
    store = Store(tmp_path / "jobs.sqlite3")
    [running, waiting] = admit(store, count=2)
    store.claim(None)
    pages = store._rows("PRAGMA page_count")[0][0]
    store._rows(f"PRAGMA max_page_count = {pages}")
    long = "x" * 10**6
    changes = {
        "admit": lambda: admit(store, words=long),
        "finish": lambda: store.finish(running, "done", result(notes=[long])),
        "crashed": lambda: store.finish(running, "failed", error=long),
        "keep": lambda: store.keep("name", long),
    }
    before = store.history("ada", [], False, 500, None)
    if change in changes:
        with pytest.raises(NotWritten, match="free some space"):
            changes[change]()
    assert [job.state for job in store.history("ada", [], False, 500, None)] == [
        job.state for job in before
    ]
    store._rows("PRAGMA max_page_count = 1000000")
    store.finish(running, "done", result())
    assert store.claim(None).id == waiting
    store.close()


def test_history_is_searched_paged_and_emptied(store):
    ids = [admit(store, words=words)[0] for words in ("Red Fox fast", "red boat", "green 100%_fox")]
    admit(store, "bob", words="red fox")

    def found(*words, deleted=False, limit=60, before=None):
        return [job.id for job in store.history("ada", words, deleted, limit, before)]

    assert found() == ids[::-1]
    assert found("red") == [ids[1], ids[0]] and found("FOX", "red") == [ids[0]]
    assert found("100%_") == [ids[2]] and found("%") == [ids[2]] and not found("x' OR '1")
    newest = store.history("ada", [], False, 1, None)[0]
    assert found(limit=1) == [ids[2]]
    assert set(found(before=newest.created)) <= set(ids[:2])
    store.stop_waiting("ada", ids[0])
    for id in ids[:2]:
        store.set_deleted("ada", id, True)
    assert found() == [ids[2]] and found(deleted=True) == [ids[1], ids[0]]
    removed = []
    assert store.purge("ada", removed.append) == 1  # the other one still waits
    assert removed == [ids[0]] and found(deleted=True) == [ids[1]]
    with pytest.raises(NoSuchJob):
        store.job("ada", ids[0])
    store.set_deleted("ada", ids[1], False)
    assert found() == [ids[2], ids[1]]


def test_nobody_reaches_the_jobs_of_others(store):
    [id] = admit(store)
    for act in (
        lambda: store.job("bob", id),
        lambda: store.set_deleted("bob", id, True),
        lambda: store.set_deleted("bob", id, False),
    ):
        with pytest.raises(NoSuchJob):
            act()
    assert not store.stop_waiting("bob", id)
    assert not store.history("bob", [], False, 500, None) and not store.measuring("bob", "m")
    assert store.job("ada", id).state == "queued"


def test_the_time_that_is_left_comes_from_measured_seconds_alone(store, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])

    def ran(workload, seconds, model="m"):
        [id] = admit(store, workload=workload, model=model)
        assert store.claim(None).id == id
        now[0] += seconds
        store.finish(id, "done", result())

    [unknown] = admit(store, workload="a", model="other")
    assert store.job("ada", unknown).eta is None
    store.stop_waiting("ada", unknown)
    for seconds in (2.0, 4.0, 9.0):
        ran("a", seconds)
    ran("b", 30.0)
    [first] = admit(store, workload="a")
    [second] = admit(store, workload="b")
    [third] = admit(store, workload="never seen")
    assert [store.job("ada", id).eta for id in (first, second)] == [4.0, 34.0]
    assert store.job("ada", third).eta == 34.0 + 6.5  # as jobs of this model took: 2, 4, 9, 30
    store.claim(None)
    now[0] += 3.0
    assert [store.job("ada", id).eta for id in (first, second)] == [1.0, 31.0]
    now[0] += 60.0
    assert store.job("ada", first).eta == 0.0


def test_devices_share_the_queue_and_a_measurement_gives_way(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1000.0)
    store = Store(tmp_path / "jobs.sqlite3", ["cuda:0", "cuda:1"])
    monkeypatch.setattr(store, "_estimate", lambda row, known: float(row["workload"]))
    [measured] = admit(store, kind="measure", workload="60")
    assert store.claim("cuda:0").id == measured
    jobs = [admit(store, workload=seconds)[0] for seconds in ("5", "3", "4")]
    [pinned] = admit(store, workload="1", device="cuda:0")
    found = [store.job("ada", id).eta for id in (measured, *jobs, pinned)]
    assert found == [60.0, 5.0, 3.0, 7.0, 6.0]
    store.close()


def test_of_each_kind_of_fact_the_newest_are_kept(store, monkeypatch):
    monkeypatch.setattr("app.serve.store.FACTS", 3)
    store.keep("figures of a model", "measured")
    for plan in "abcdea":
        store.keep(f"fits {plan}", plan)
    store.keep("fits", "a name of one word")
    store.keep("fitsa b", "another kind")
    assert [plan for plan in "abcde" if store.fact(f"fits {plan}") == plan] == ["a", "d", "e"]
    assert store.fact("figures of a model") == "measured" and store.fact("fits") is not None
    assert store.fact("fitsa b") == "another kind"


def test_a_fact_that_cannot_be_kept_pushes_none_out(store, monkeypatch):
    monkeypatch.setattr("app.serve.store.FACTS", 1)
    store.keep("fits a", "a")
    store._rows(f"PRAGMA max_page_count = {store._rows('PRAGMA page_count')[0][0]}")
    with pytest.raises(NotWritten):
        store.keep("fits b", "x" * 10**6)
    assert store.fact("fits a") == "a" and store.fact("fits b") is None


def test_a_speedup_is_shown_as_soon_as_stock_was_timed_and_only_where_it_may_be(store):
    accelerated = {"plan": {"plan": 1, "cache": {"EasyCache": {}}}}

    def done(configuration="c", **more):
        [id] = admit(store, **more)
        store.claim(None)
        store.finish(id, "done", result(2.0), configuration=configuration)
        return id

    fast, stock, cold = done(**accelerated), done(), done(None, **accelerated)
    other = done("d", **accelerated)
    assert store.job("ada", fast).result.speedup is None
    store.add_stock("c", [4.0, 5.0, 6.0, 7.0, 8.0])
    found = store.job("ada", fast).result.speedup
    assert (found.ratio, found.low, found.high) == (3.0, 2.5, 3.5)
    assert found.baseline_seconds == 6.0 and found.measured == time.strftime("%Y-%m-%d")
    for id in (stock, cold, other):
        assert store.job("ada", id).result.speedup is None
    store.add_stock("d", [4.0])
    lone = store.job("ada", other).result.speedup
    assert lone.low == lone.ratio == lone.high == 2.0


@pytest.mark.parametrize("content", [b"no database at all" * 100, None])
def test_another_file_is_refused(tmp_path, content):
    path = tmp_path / "jobs.sqlite3"
    if content is None:
        Store(path).close()
        db = sqlite3.connect(path)
        db.execute("PRAGMA user_version = 9")
        db.close()
    else:
        path.write_bytes(content)
    with pytest.raises(BadInput, match=r"format 9|no database of ours"):
        Store(path)
