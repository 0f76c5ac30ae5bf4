"""Processes that work together: they find each other, agree, and end together whatever happens."""

import multiprocessing
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from parallel_jobs import breaks, drawn, other_versions, summed
from saved import Folders, done, run
from torch.distributed import FileStore
from worlds import World

from accel.errors import AccelError, BadInput
from app import metadata
from app.together import _device
from parallel.launch import Lost, Place, joined, meeting, spread, told


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Folders:
    return Folders(tmp_path_factory.getbasetemp() / "saved-models")


def test_they_find_each_other_and_the_first_one_answers():
    assert spread(3, summed, 2.0) == (Place(0, 3, 0), 12.0)
    assert not multiprocessing.active_children()


def test_what_the_first_one_drew_all_have():
    assert spread(2, drawn) == 0.5


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("how", "kind", "says"),
    [
        ("refuses", BadInput, "there is no such thing"),
        ("bug", Lost, "KeyError"),
        ("dies", Lost, r"died \(exit code -9\)"),
        ("is slow", Lost, "failed"),
    ],
)
def test_when_one_fails_all_end_and_say_why(how, kind, says, rank):
    begin = time.monotonic()
    with pytest.raises(kind, match=says):
        spread(2, breaks, how, rank, patience=3.0)
    assert time.monotonic() - begin < 29  # nobody sleeps to the end
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    ("names", "place"),
    [
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, Place(3, 8, 1)),
        ({"SLURM_PROCID": "5", "SLURM_NTASKS": "6", "SLURM_LOCALID": "1"}, Place(5, 6, 1)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0"}, None),
        ({"RANK": "3"}, None),
        ({}, None),
    ],
)
def test_torchrun_and_slurm_tell_a_process_its_place(names, place):
    assert told(names) == place


@pytest.mark.parametrize(
    ("names", "place"),
    [
        ({"MASTER_ADDR": "one", "SLURM_STEP_NODELIST": "two"}, "env://"),
        ({"SLURM_STEP_NODELIST": "gpu[03-05,9],other", "SLURM_JOB_ID": "12"}, "tcp://gpu03:20012"),
        ({"SLURM_STEP_NODELIST": "a-1,a-2", "SLURM_JOB_ID": "10001"}, "tcp://a-1:20001"),
    ],
)
def test_they_meet_where_torchrun_says_or_at_the_first_node(names, place):
    assert meeting(names) == place
    with pytest.raises(BadInput, match="set MASTER_ADDR"):
        meeting({})


def test_the_command_works_under_torchrun(models, tmp_path):
    """Each process parses the command, and one seed is drawn for both."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    accel = ["--no-python", sys.executable, "-c", "import app.cli; app.cli.main()", "generate"]
    asked = ["fox", "--model", models("flux_cfg"), "--steps", "2", "--device", "cpu"]
    plan = ["--set", "parallel.CFG.degree=2", "--out", "a.png"]
    command = [*torchrun, *accel, *asked, *plan]
    done = subprocess.run(command, check=False, cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert metadata.read(tmp_path / "a.png")[0].fingerprint.processes == 2
    assert done.stdout.decode().split() == ["a.png"]


LEFT = """
import os, sys
from pathlib import Path
from torch.distributed import FileStore
from parallel.launch import Place, joined

with joined(Place(int(sys.argv[1]), 2, 0), FileStore(sys.argv[2], 2)):
    import torch._dynamo  # which diffusers imports
tasks = Path("/proc/self/task")
print([name for one in tasks.iterdir() if "gloo" in (name := (one / "comm").read_text())])
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted on Linux")
def test_no_thread_of_the_group_outlives_it(tmp_path):
    """One that did could abort the process at its end, now and then."""
    command = [sys.executable, "-c", LEFT]
    both = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], stdout=subprocess.PIPE)
        for rank in range(2)
    ]
    assert [one.communicate(timeout=120)[0].decode().strip() for one in both] == ["[]", "[]"]


def test_those_that_do_not_come_are_not_waited_for(tmp_path):
    store = FileStore(str(tmp_path / "store"), 2)
    missed = pytest.raises(AccelError, match="did not find the others")
    with missed, joined(Place(0, 2, 0), store, patience=1.0):
        pass


def test_a_port_that_is_taken_is_an_error(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        missed = pytest.raises(Lost, match="did not find the others")
        with missed, joined(Place(0, 2, 0), patience=2.0):
            pass


def test_other_versions_are_named_in_every_process():
    world = World(3)
    found = world.run(other_versions, 2)
    world.close()
    assert len(set(found)) == 1 and "Process 2 has torch 0.0" in found[0]


def test_the_command_makes_the_picture_of_one_process(models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = ["generate", "a red fox", "--model", models("flux_cfg"), "--seed", 3, "--steps", 4]
    branches = ["--set", "parallel.CFG.degree=2"]
    done(*asked, "--out", "one.png")
    accel = Path(sys.executable).with_name("accel")
    command = [accel, *asked, *branches, "--device", "cpu", "--devices", 2, "--out", "two.png"]
    words = [*map(str, command)]
    ran = subprocess.run(words, capture_output=True, text=True, check=False, timeout=250)
    assert ran.returncode == 0 and "a branch each" in ran.stderr, ran.stderr
    one, two = (metadata.read(Path(name))[0] for name in ("one.png", "two.png"))
    assert one.pixels == two.pixels
    assert (one.fingerprint.processes, two.fingerprint.processes) == (1, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.png", "two.png"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--devices", 2], "shares no work out"),
        (["--devices", 3, "--set", "parallel.CFG.degree=2"], "there are 3"),
        (["--set", "parallel.CFG.degree=2"], "--devices 2"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_written(
    models, tmp_path, monkeypatch, options, says
):
    monkeypatch.chdir(tmp_path)
    refused = run("generate", "fox", "--model", models("flux_cfg"), "--steps", 2, *options)
    assert refused.exit_code == 2 and says in refused.stderr
    assert not list(tmp_path.iterdir())


def test_each_process_has_a_device_of_its_own():
    assert _device({"device": "cuda"}, Place(5, 8, 1)) == "cuda:1"
    assert _device({"device": "cpu"}, Place(5, 8, 1)) == "cpu"
    with pytest.raises(BadInput, match="name the kind alone"):
        _device({"device": "cuda:1"}, Place(0, 2, 0))
