"""``accel explain`` for several devices: of this machine, and described ones."""

import json
import math
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from saved import Folders, run
from test_parallel_model import IDEAL, UNET

from accel.errors import BadInput
from app.advice import numbers, recommended
from parallel.clusters import NAMED, described
from parallel.simulate import predict

PAGE = Path(__file__).parent.parent / "docs" / "parallel.md"


@pytest.mark.parametrize(
    ("bandwidth", "says"), [(1e15, "recommended for 2: --set parallel."), (1.0, "warning: one")]
)
def test_one_device_is_recommended_where_links_are_slow(bandwidth, says):
    ways = predict(UNET, replace(IDEAL, bandwidth=bandwidth), 28)
    assert says in recommended(ways, 2, math.inf)


def test_what_a_device_cannot_hold_is_not_recommended():
    ways = predict(UNET, IDEAL, 28)
    largest = max(one.memory for one in ways)
    told = recommended(ways, 2, largest - 1)
    chosen = next(one for one in ways if one.memory < largest and not one.reason)
    assert chosen.method.split(" ")[0] in told and "cannot hold" not in told
    assert "cannot hold" in recommended(ways, 2, 1.0)


@pytest.mark.parametrize(
    ("text", "found"), [("4", [4]), ("2-64", [2, 4, 8, 16, 32, 64]), ("3-7", [3, 6, 7])]
)
def test_a_range_is_doubled(text, found):
    assert numbers(text) == found


@pytest.mark.parametrize("text", ["0", "1", "x", "4-2", "2-", "-2", "2-9999", "1-4"])
def test_other_numbers_are_refused(text):
    with pytest.raises(BadInput, match="from 2 to"):
        numbers(text)


@pytest.mark.parametrize("ending", ["toml", "json"])
def test_a_cluster_is_read_from_a_file(tmp_path, ending):
    fields = {"operations": 1e12, "bandwidth": 1e9, "latency": 1e-5, "per_node": 2}
    file = tmp_path / f"cluster.{ending}"
    lines = [f"{name} = {value}" for name, value in fields.items()]
    file.write_text(json.dumps(fields) if ending == "json" else "\n".join(lines))
    found = described(str(file))
    assert {name: getattr(found, name) for name in fields} == fields


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("operations = 1e12", "bandwidth: Field required"),
        ("operations = 0\nbandwidth = 1\nlatency = 0", "operations: Input should be greater"),
        ("operations = 1\nbandwidth = 1\nlatency = 0\nspeed = 1", "speed"),
        ("operations", "cannot be read"),
    ],
)
def test_what_describes_no_cluster_is_said(tmp_path, text, says):
    file = tmp_path / "cluster.toml"
    file.write_text(text)
    with pytest.raises(BadInput, match=says):
        described(str(file))


def test_a_name_that_is_none_is_refused_with_those_that_are():
    with pytest.raises(BadInput, match=f"Known are {', '.join(NAMED)}"):
        described("my-cluster")


@pytest.fixture
def models(tmp_path_factory):
    return Folders(tmp_path_factory.getbasetemp() / "saved-models")


@pytest.mark.parametrize("format", ["text", "json"])
def test_the_command_measures_and_advises(models, format):
    told = run("explain", "--model", models("sd15"), "--devices", 2, "--format", format)
    assert told.exit_code == 0, told.output
    if format == "text":
        assert "CFG" in told.stdout and "GFLOP/s" in told.stdout
        assert "recommended" in told.stderr or "leave --devices out" in told.stderr
        return
    found = json.loads(told.stdout)
    assert found["cluster"]["devices"] == 2 and found["cluster"]["operations"] > 0
    assert {"one device", "parallel.DistriFusion"} <= {one["method"] for one in found["ways"]["2"]}


def test_the_command_predicts_for_a_described_cluster(models):
    told = run("explain", "--model", models("sd15"), "--devices", "2-8", "--cluster", "a5000-pcie")
    assert told.exit_code == 0, told.output
    for title in ("times as fast", "seconds", "MB that a device sends", "MB that a device holds"):
        assert title in told.stdout
    assert told.stderr.count("for 2:") + told.stderr.count("among 2,") == 1
    assert "not PipeFusion" in told.stdout and "Ulysses" in told.stdout


def test_a_range_needs_a_cluster(models):
    told = run("explain", "--model", models("sd15"), "--devices", "2-4")
    assert told.exit_code == 2 and "--cluster" in told.stderr


def test_the_commands_of_the_page_run(models):
    """Those of the page, with a tiny model in the place of a bundled one."""
    block = PAGE.read_text().split("```bash\n")[1].split("```")[0]
    for line in block.splitlines():
        words = shlex.split(line)
        assert words[:3] == ["accel", "explain", "--model"]
        told = run(*words[1:3], models("sd15"), *words[4:])
        assert told.exit_code == 0, told.output
