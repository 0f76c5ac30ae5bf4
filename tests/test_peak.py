"""Memory at the peak: what is known to be taken shows, and nothing is measured unasked."""

import json

import pytest
import torch
from tiny import PIPELINES

from accel import Plan, peak
from accel.peak import MIB, Peak, watching

BLOCK = 192 * MIB
SLACK = 48 * MIB
"""What else a tiny pipeline may take, of kernels and libraries."""

linux = pytest.mark.skipif(not peak.REFERENCES.exists(), reason="only Linux keeps such a mark")


def take(size=BLOCK):
    """Take that much memory for a moment: touched, so that it is resident."""
    assert torch.ones(size, dtype=torch.uint8)[-1] == 1


@linux
@pytest.mark.parametrize("taken", [0, 1])
def test_a_known_allocation_shows(bench, taken):
    """In the midst of a run, and given back before its end."""
    pipe = bench.pipe("sd15")

    def callback(pipe, index, timestep, state):
        take(taken * BLOCK or 1) if index == 1 else None
        return state

    take()  # before it is measured: does not count
    run = Plan().attach(pipe)
    with run.report.measuring_memory("cpu"):
        bench.call("sd15", steps=3, callback_on_step_end=callback)
    run.detach()
    found = run.report.peak
    assert found.of == "resident memory of the process"
    assert taken * BLOCK <= found.bytes - found.before + MIB < taken * BLOCK + SLACK
    said = run.report.to_dict()["peak"]
    assert json.loads(json.dumps(said)) == found.to_dict()
    assert f"{found.bytes / MIB:.1f} MiB at the peak" in str(run.report)


def test_nothing_is_measured_unasked(bench):
    """And a measured run leaves nothing in the report of one after it that is not."""
    pipe = bench.pipe("sd15")
    with Plan().attach(pipe) as run:
        bench.call("sd15", steps=2)
        assert run.report.peak is None and run.report.to_dict()["peak"] is None
        assert "peak" not in str(run.report)
        with run.report.measuring_memory("cpu"):
            bench.call("sd15", steps=2)
        assert (run.report.peak is None) == (not peak.REFERENCES.exists())
        bench.call("sd15", steps=2)
        assert run.report.peak is None


@linux
def test_the_mark_is_set_back_each_time():
    with watching("cpu") as read:
        take()
        high = read()
    with watching("cpu") as read:
        low = read()
    assert high.bytes - high.before + MIB >= BLOCK
    assert low.bytes < high.bytes - BLOCK / 2


def test_without_a_counter_there_is_no_figure(bench, monkeypatch, tmp_path):
    monkeypatch.setattr(peak, "REFERENCES", tmp_path / "none")
    run = Plan().attach(bench.pipe("sd15"))
    with run.report.measuring_memory("cpu"):
        bench.call("sd15", steps=2)
    run.detach()
    assert run.report.peak is None
    with watching("mps") as read:
        assert read() is None


def test_an_allocator_is_asked_for_its_own_peak(monkeypatch):
    class Counters:
        """As `torch.cuda` counts."""

        def __init__(self):
            self.peak, self.now, self.ready = 900, 100, False

        def init(self):
            self.ready = True

        def reset_peak_memory_stats(self, place):
            assert self.ready, "it does not initialise of itself"
            self.peak = self.now

        def memory_allocated(self, place):
            return self.now

        def max_memory_allocated(self, place):
            return self.peak

    counters = Counters()
    monkeypatch.setattr(torch, "get_device_module", lambda place: counters)
    with watching("cuda:1") as read:
        counters.peak = 400
        assert read() == Peak(400, 100, "allocator of cuda:1")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_an_accelerator():
    tiny = PIPELINES["sd15"]
    pipe = tiny.build().to("cuda")
    weights = sum(weight.nbytes for weight in pipe.unet.parameters())
    run = Plan().attach(pipe)
    with run.report.measuring_memory("cuda"):
        tiny.call(
            pipe,
            steps=2,
            callback_on_step_end=lambda pipe, index, timestep, state: (
                torch.ones(BLOCK, dtype=torch.uint8, device="cuda"),
                state,
            )[1],
        )
    run.detach()
    found = run.report.peak
    assert found.before >= weights
    assert BLOCK <= found.bytes - found.before < BLOCK + SLACK
