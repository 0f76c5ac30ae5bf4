"""The dispatcher as a theorem: whatever workers do, every row comes to its own end, once.

The engine here is a machine of states without processes: what a call does to its worker follows
from its rows, and a script of the test's own ends workers at any moment besides.
"""

from collections import deque
from itertools import pairwise
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accel.plan import Plan
from app.batch.dispatch import Dispatcher, Fatal, Rules
from app.batch.engine import Died
from app.batch.grouping import calls, groups
from app.batch.job import Form, Row
from app.batch.manifest import Failed, Made
from app.batch.tasks import Answer, Began
from app.request import Request

FINE, FAILS, KILLS = "fine", "fails", "kills"


def row(index, act=FINE, group="g", model="m"):
    form = Form(Request(model=model), Plan(), model, group, group)
    return Row(
        index, f"rows:{index}", f"id{index}", form, act, None, index, f"h{index}", f"{index}.png"
    )


def made(one, task):
    return Made(
        id=one.id, hash=one.hash, index=one.index, file=one.file, sha256="", bytes=0, pixels="",
        group=one.form.group, batch=tuple(r.id for r in task.rows), seed=one.seed,
        prompt=one.prompt, seconds=0, steps=1, nfe=1, notes=task.notes, moment=0,
    )  # fmt: skip


class Machine:
    """Workers that perform one task after another; every look is one step of one of them.

    Args:
        count: Workers.
        ahead: Tasks that each takes.
        script: For every step, which worker moves, and whether it is killed instead.
    """

    def __init__(self, count, ahead=2, script=()):
        self.count, self.ahead = count, ahead
        self._script = deque(script)
        self._tasks = [deque() for _ in range(count)]
        self._begun = [False] * count
        self._turn = 0
        self.kills = 0

    def send(self, number, task):
        self._tasks[number].append(task)

    def events(self, _seconds):
        number, killed = self._script.popleft() if self._script else (self._turn, False)
        self._turn = (self._turn + 1) % self.count
        number %= self.count
        if not self._tasks[number]:
            return []
        if killed:
            self.kills += 1
            return self._die(number, "signal SIGKILL")
        return self._move(number)

    def _die(self, number, reason):
        self._tasks[number].clear()
        self._begun[number] = False
        return [(number, Died(reason))]

    def _move(self, number):
        task = self._tasks[number][0]
        if not self._begun[number]:
            self._begun[number] = True
            return [(number, Began(task.key))]
        acts = {one.prompt for one in task.rows}
        if KILLS in acts:
            return self._die(number, "signal SIGSEGV")
        self._begun[number] = False
        self._tasks[number].popleft()
        if FAILS in acts:
            return [(number, Answer(task.key, "failed", error="no"))]
        lines = tuple(made(one, task) for one in task.rows if one.id in task.wanted)
        return [(number, Answer(task.key, "made", lines))]

    def kill(self, number, reason):
        raise AssertionError("nothing takes time here")

    def close(self):
        pass


def ran(rows, machine, size, wanted=None, **rules):
    lines = []
    dispatcher = Dispatcher(machine, Rules(**rules), lines.extend, lambda _text: None)
    wanted = {one.id: one for one in rows} if wanted is None else wanted
    dispatcher.run(calls(rows, dict.fromkeys(groups(rows), size)), wanted)
    return lines


ACTS = st.lists(st.sampled_from([FINE, FINE, FINE, FAILS, KILLS]), min_size=1, max_size=14)
SCRIPT = st.lists(st.tuples(st.integers(0, 2), st.booleans()), max_size=40)


@settings(max_examples=300, deadline=None)
@given(ACTS, st.integers(1, 5), st.integers(1, 3), st.integers(1, 2), SCRIPT)
def test_every_row_ends_once_as_it_must(acts, size, count, ahead, script):
    """Deaths by others' hands change nothing, if there are fewer than rows are tried."""
    rows = [row(index, act) for index, act in enumerate(acts)]
    lines = ran(rows, Machine(count, ahead, script), size, retries=len(script) + 1)
    assert sorted(line.id for line in lines) == sorted(one.id for one in rows)
    for line in lines:
        act = acts[line.index]
        assert isinstance(line, Made if act == FINE else Failed)
        if isinstance(line, Failed):
            assert line.quarantined == (act == KILLS)


@settings(max_examples=200, deadline=None)
@given(ACTS, st.integers(1, 5), st.integers(1, 3), SCRIPT)
def test_the_company_of_a_row_depends_on_no_death(acts, size, count, script):
    """Each is made with the others of its call that can be made: so its bits are the same."""
    rows = [row(index, act) for index, act in enumerate(acts)]
    lines = ran(rows, Machine(count, 2, script), size, retries=len(script) + 1)
    for line in lines:
        if isinstance(line, Made):
            start = line.index // size * size
            own = range(start, min(start + size, len(acts)))
            assert line.batch == tuple(f"id{place}" for place in own if acts[place] == FINE)


@settings(max_examples=100, deadline=None)
@given(ACTS, st.integers(1, 5), st.data())
def test_only_what_is_wanted_is_written_and_its_call_is_whole(acts, size, data):
    rows = [row(index) for index, _ in enumerate(acts)]
    ids = data.draw(st.sets(st.sampled_from([one.id for one in rows])))
    lines = ran(rows, Machine(2), size, wanted=dict.fromkeys(ids))
    assert sorted(line.id for line in lines) == sorted(ids)
    for line in lines:
        start = line.index // size * size
        assert line.batch == tuple(one.id for one in rows[start : start + size])


def test_rows_that_die_only_together_are_made_in_halves():
    """As under a kernel that ends what takes too much memory."""

    class Narrow(Machine):
        def _move(self, number):
            task = self._tasks[number][0]
            if self._begun[number] and len(task.rows) > 2:
                return self._die(number, "signal SIGKILL")
            return super()._move(number)

    lines = ran([row(index) for index in range(8)], Narrow(2), 8)
    assert all(isinstance(line, Made) and len(line.batch) == 2 for line in lines)
    assert len(lines) == 8
    assert all("two calls" in line.notes[0] for line in lines)


def test_after_a_failure_nothing_more_is_begun_where_that_is_asked():
    rows = [row(0, FAILS), *(row(index) for index in range(1, 9))]
    lines = ran(rows, Machine(1, ahead=1), 1, stop=True)
    assert [line.id for line in lines] == ["id0"]


def test_a_model_that_cannot_be_loaded_fails_its_rows_once_each():
    class Broken(Machine):
        def _move(self, number):
            task = self._tasks[number][0]
            if task.rows[0].form.model != "bad":
                return super()._move(number)
            self._tasks[number].popleft()
            self._begun[number] = False
            return [(number, Answer(task.key, "model", error="truncated"))]

    rows = [row(i, group=f"g{i % 3}", model="bad" if i % 3 else "good") for i in range(12)]
    lines = ran(rows, Broken(2), 2)
    assert sorted(line.id for line in lines) == sorted(one.id for one in rows)
    for line in lines:
        assert isinstance(line, Failed) == bool(line.index % 3)


def test_an_output_that_refuses_files_ends_the_job():
    class Full(Machine):
        def _move(self, number):
            key = self._tasks[number][0].key
            return [(number, Answer(key, "unwritten", error="full"))]

    with pytest.raises(Fatal, match="full"):
        ran([row(0)], Full(1), 1)


def test_a_worker_keeps_to_its_model_while_there_are_rows_of_it():
    """Loading is dear: with two models and two workers each is loaded once."""
    seen = {0: [], 1: []}

    class Noting(Machine):
        def send(self, number, task):
            seen[number].append(task.rows[0].form.model)
            super().send(number, task)

    rows = [row(i, group=f"g{i % 2}", model=f"m{i % 2}") for i in range(24)]
    ran(rows, Noting(2), 2)
    loads = sum(sum(one != other for one, other in pairwise(models)) for models in seen.values())
    assert loads <= 2


def test_a_late_answer_of_a_worker_that_was_given_up_changes_nothing():
    lines = []
    machine = Machine(1)
    dispatcher = Dispatcher(machine, Rules(), lines.extend, lambda _text: None)
    dispatcher._hear(0, Answer("unknown", "made", (SimpleNamespace(),)))
    assert lines == []
