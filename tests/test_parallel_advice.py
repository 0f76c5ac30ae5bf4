"""The model of costs: its limits, its bytes beside those that are really sent, and the command."""

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from parallel_jobs import outcome
from saved import Folders, run
from tiny import PIPELINES, Ask
from worlds import World

from app.advice import recommended
from parallel import CFG, PCPP, AsyncDiff, DistriFusion, Ring, Ulysses
from parallel.simulate import Cluster, Prediction, predict
from parallel.work import Work, work_of

IDEAL = Cluster(2, operations=1e9, bandwidth=math.inf, latency=0.0)
UNET = Work(
    operations=8e9,
    branches=2,
    output=1e5,
    rows=64,
    borders=[1e3] * 40,
    moments=[512.0] * 60,
    tokens=[1e6] * 16,
    units=[2e9, 1e9, 1e9, 2e9, 2e9],
    answers=[1e5] * 5,
    whole=True,
)
DIT = replace(UNET, rows=0, borders=[], moments=[], calls=2, whole=False)


def by_method(work: Work, cluster: Cluster, steps: int = 28) -> dict[str, Prediction]:
    return {one.method: one for one in predict(work, cluster, steps)}


def test_where_nothing_costs_but_operations_n_devices_are_n_times_as_fast():
    for work in (UNET, DIT):
        for devices in (2, 4, 8):
            found = by_method(work, replace(IDEAL, devices=devices))
            for name, one in found.items():
                if not one.reason and "Async" not in name and "CFG" not in name and one.bytes:
                    assert one.faster == pytest.approx(devices)
    assert by_method(UNET, IDEAL)["parallel.CFG"].faster == pytest.approx(2)
    late = by_method(UNET, IDEAL, steps=10**6)["parallel.AsyncDiff"]
    assert late.faster == pytest.approx(2, rel=1e-4)  # the blocks can be cut in halves of 4e9


@given(
    devices=st.integers(2, 64),
    latency=st.floats(0, 1e-2),
    bandwidth=st.floats(1e6, 1e12),
    fixed=st.floats(0, 1e-1),
)
def test_worse_links_make_nothing_faster(devices, latency, bandwidth, fixed):
    cluster = Cluster(devices, 1e12, bandwidth, latency, fixed)
    worse = [
        replace(cluster, latency=2 * latency + 1e-6),
        replace(cluster, bandwidth=bandwidth / 2),
        replace(cluster, fixed=fixed + 1e-3),
    ]
    for work in (UNET, DIT):
        here = by_method(work, cluster)
        assert here["one device"].faster == 1
        for other in worse:
            there = by_method(work, other)
            assert all(there[name].seconds >= one.seconds for name, one in here.items())
        for one in here.values():
            assert one.reason or one.faster <= devices + 1e-9


@given(devices=st.integers(3, 32))
def test_neighbours_alone_are_sent_less(devices):
    found = by_method(UNET, replace(IDEAL, devices=devices))
    assert found["parallel.PCPP"].bytes < found["parallel.DistriFusion"].bytes


def test_what_does_not_serve_comes_last_with_its_reason():
    found = predict(replace(DIT, branches=1, units=[1.0]), replace(IDEAL, devices=3), 10)
    reasons = {one.method: one.reason for one in found if one.reason}
    assert [bool(one.reason) for one in found] == sorted(bool(one.reason) for one in found)
    assert "one guidance branch" in reasons["parallel.CFG"]
    assert "no UNet" in reasons["parallel.PCPP"] and "1 blocks" in reasons["parallel.AsyncDiff"]


@pytest.mark.parametrize(
    ("bandwidth", "says"), [(1e15, "recommended: --set parallel."), (1.0, "leave --devices out")]
)
def test_one_device_is_recommended_where_links_are_slow(bandwidth, says):
    assert says in recommended(predict(UNET, replace(IDEAL, bandwidth=bandwidth), 28))


# beside what is really sent

STEPS = 8
WAYS = {
    "parallel.CFG": ("sd15", CFG()),
    "parallel.DistriFusion (sync)": ("sd15", DistriFusion(mode="sync")),
    "parallel.DistriFusion": ("sd15", DistriFusion()),
    "parallel.PCPP": ("sd15", PCPP()),
    "parallel.AsyncDiff": ("sd15", AsyncDiff()),
    "parallel.Ulysses": ("flux_cfg", Ulysses()),
    "parallel.Ring": ("flux_cfg", Ring()),
}


@pytest.fixture(scope="module")
def world():
    found = World(2)
    yield found
    found.close()


@pytest.mark.parametrize("way", WAYS)
def test_the_bytes_that_are_predicted_are_sent(world, way):
    name, method = WAYS[way]
    tiny = PIPELINES[name]
    ask = Ask(prompts=["a red fox in the snow"], seeds=[0], guidance=True)
    [work] = work_of(tiny.build(), tiny.inputs(ask)).values()
    predicted = by_method(work, IDEAL, STEPS)[way].bytes
    sent = []
    for one in world.run(outcome, name, [method], steps=STEPS):
        told = one.details[method.name].split("sent ")[1].split(" ")[0]
        sent.append(int(told.replace(",", "")))
    assert 0.8 * predicted <= max(sent) <= 1.25 * predicted


@pytest.mark.parametrize("format", ["text", "json"])
def test_the_command_measures_and_advises(tmp_path_factory, format):
    models = Folders(tmp_path_factory.getbasetemp() / "saved-models")
    told = run("explain", "--model", models("sd15"), "--devices", 2, "--format", format)
    assert told.exit_code == 0, told.output
    if format == "text":
        assert "parallel.CFG" in told.stdout and "GFLOP/s" in told.stdout
        assert "recommended" in told.stderr or "leave --devices out" in told.stderr
        return
    found = json.loads(told.stdout)
    assert found["cluster"]["devices"] == 2 and found["cluster"]["operations"] > 0
    assert {"one device", "parallel.DistriFusion"} <= {one["method"] for one in found["ways"]}
