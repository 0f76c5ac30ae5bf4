"""``accel batch`` as it is typed: what it makes, refuses, leaves alone and goes on with.

The model is a tiny random one; everything else is real, worker processes too.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from forks import Command
from PIL import Image
from saved import Folders, done, run, size
from typer.testing import CliRunner

from app import metadata
from app.batch import manifest
from app.batch.storage import Folder, digest
from app.cli import app

FOXES = ["a red fox", "a blue fox", "two foxes", "no fox", "a fox in snow"]


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    return Folders(tmp_path_factory.getbasetemp() / "saved-models")


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def job(models):
    """The options of a job of five rows, with its input written."""
    Path("rows.txt").write_text("\n".join(FOXES))
    return ["rows.txt", "--model", models("sd15"), "--steps", "3", "--threads", "1",
            "--device", "cpu", "--out", "out"]  # fmt: skip


def batch(*args, code=0):
    result = run("batch", *args)
    assert result.exit_code == code, result.output
    return result


def state(out="out"):
    return manifest.read(Folder(Path(out)))


def pixels(out="out"):
    """What the files show, by id."""
    return {one.id: metadata.record_of(Path(out) / one.file).pixels for one in
            state(out).made.values()}  # fmt: skip


def levels(out, one):
    with Image.open(Path(out) / one.file) as found:
        return np.asarray(found, float)


def alone(*args):
    """The same command in a process of its own."""
    return Command(["batch", *args])


def until(check, seconds=100.0):
    end = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.02)


def entered(count):
    path = Path("out/manifest.jsonl")
    return lambda: path.is_file() and path.read_text().count('"made"') >= count


def test_a_row_is_what_generate_makes_and_a_second_run_makes_nothing(job, models):
    result = batch(*job, "--batch", "1", "--format", "json")
    told = json.loads(result.stdout)
    assert (told["rows"], told["made"], told["left"], told["failed"]) == (5, 5, 0, {})
    made = sorted(state().made.values(), key=lambda one: one.index)
    assert [one.prompt for one in made] == FOXES
    assert {path.name for path in Path("out").iterdir() if not path.name.startswith(".")} == {
        *(one.file for one in made),
        "manifest.jsonl", "report.html", "report.json", "contact.jpg", "failures.jsonl",
    }  # fmt: skip
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for one in made[:2]:
        done("generate", one.prompt, "--seed", one.seed, *job[1:5], "--out", "alone.png",
             "--overwrite")  # fmt: skip
        assert metadata.record_of(Path("alone.png")).pixels == one.pixels
        with Image.open(Path("out") / one.file) as found:
            assert metadata.pixels([found]) == one.pixels
    torch.set_num_threads(threads)
    before = pixels()
    assert "0 made" in batch(*job, "--batch", "1").stderr
    (Path("out") / made[0].file).unlink()
    (Path("out") / made[1].file).write_bytes(b"spoilt")
    assert "2 made" in batch(*job, "--batch", "1").stderr
    assert pixels() == before
    assert "5 made" in batch(*job, "--batch", "1", "--overwrite").stderr
    assert pixels() == before
    assert "holds an earlier run" in batch(*job, "--no-resume", code=2).stderr


def test_the_command_as_users_start_it_has_workers_of_its_own(job):
    """Not forks, as elsewhere in the tests: workers that start anew and are told what to load."""
    accel = Path(sys.executable).with_name("accel")
    command = [accel, "batch", *job, "--batch", "3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=250)
    assert done.returncode == 0, done.stderr
    assert len(state().made) == len(FOXES)


def test_a_call_of_several_decides_for_each_row_as_alone(job):
    """The law of samples, through files: the share that each row saved is the same."""
    plan = ["--set", "cache.EasyCache.threshold=0.2", "--steps", "6"]
    batch(*job, *plan, "--batch", "1")
    single = state().made
    batch(*job[:-1], "together", *plan, "--batch", "3", "--workers", "2")
    several = state("together").made
    assert {one.batch for one in several.values()} == {
        tuple(row.id for row in sorted(several.values(), key=lambda one: one.index)[low:low + 3])
        for low in (0, 3)
    }  # fmt: skip
    for id, one in several.items():
        assert one.saved == single[id].saved
        assert one.saved["cache.EasyCache"] > 0
        assert np.abs(levels("out", single[id]) - levels("together", one)).max() <= 1
        record = metadata.record_of(Path("together") / one.file)
        assert record.fingerprint.together == len(one.batch)


def test_rows_say_what_differs_and_files_are_grouped_by_it(models):
    rows = [
        {"prompt": "fox", "id": "small", "size": "32x32"},
        {"prompt": "fox", "id": "tall", "size": "32x48", "negative": "fog"},
        {"prompt": "fox", "id": "fast", "preset": "fast", "seed": 5},
        {"prompt": "fox", "id": "own", "plan": {"cache": {"EasyCache": {"threshold": 0.3}}}},
    ]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    batch("rows.jsonl", "--model", models("sd15"), "--steps", 3, "--device", "cpu", "--out", "out",
          "--name", "{model}/{id}_{width}", "--threads", 1)  # fmt: skip
    made = state().made
    assert made["tall"].file == "sd15/tall_32.png"
    assert size("out/sd15/tall_32.png") == (32, 48)
    assert len({one.group for one in made.values()}) == 4
    records = {id: metadata.record_of(Path("out") / one.file) for id, one in made.items()}
    assert records["tall"].request["negative"] == "fog"
    assert records["fast"].request["seed"] == 5
    assert records["own"].plan["cache"]["EasyCache"]["threshold"] == 0.3
    assert "cache" not in records["small"].plan


def test_a_dry_run_says_what_would_be_done_and_does_nothing(job):
    found = json.loads(batch(*job, "--dry-run", "--format", "json").stdout)
    assert [part["pending"] for part in found["parts"]] == [5]
    assert found["seconds"] is None
    assert found["free"] > found["room"] > 0
    assert not Path("out").exists()
    measured = json.loads(batch(*job, "--dry-run", "--measure", "--format", "json").stdout)
    assert measured["seconds"] > 0
    assert measured["parts"][0]["weights"] > 0
    assert measured["parts"][0]["size"] in (1, 2, 4)
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"prompt": "fox", "width": 33}, "multiples"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": "fox", "frames": 5}, "takes no --frames"),
        ({"prompt": "fox", "set": "samplers.DEIS;samplers.UniPC"}, "samplers.UniPC"),
        ({"prompt": "fox", "mask": "rows.jsonl"}, "cannot be read as a picture"),
        ({"prompt": "fox", "colour": "red"}, "colour"),
    ],
)
def test_what_the_model_refuses_is_said_of_every_row_before_weights_are_read(models, row, told):
    broken = Path(models("sd15"))
    rows = [{"prompt": "fox"}, row, row | {"seed": 2}]
    Path("rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    result = batch("rows.jsonl", "--model", broken, "--out", "out", "--device", "cpu", code=2)
    lines = result.stderr.splitlines()
    assert [line.split(": ")[0] for line in lines[:2]] == ["rows.jsonl:2", "rows.jsonl:3"]
    assert all(told in line for line in lines[:2])
    assert "2 rows cannot be made" in lines[-1]
    assert not Path("out/manifest.jsonl").exists()


def test_rows_that_take_too_long_are_set_aside_and_taken_up_when_that_is_asked(job):
    result = batch(*job, "--timeout", "0.001", "--retries", "0", code=3)
    assert "failed (set aside): rows.txt:1" in result.stderr
    assert "0 rows to make" in batch(*job, code=3).stderr
    again = Path("out/failures.jsonl").read_text().splitlines()
    assert [json.loads(line)["prompt"] for line in again] == FOXES
    shutil.copy("out/failures.jsonl", "again.jsonl")
    batch("again.jsonl", *job[5:-1], "second")
    assert {one.prompt for one in state("second").made.values()} == set(FOXES)
    assert "5 made" in batch(*job, "--requeue").stderr
    assert Path("out/failures.jsonl").read_text() == ""
    page = json.loads(Path("out/report.json").read_text())
    assert page["made"] == 5


def test_shards_share_the_rows_out_and_the_last_report_has_them_all(job):
    for part in (1, 2):
        batch(*job, "--batch", "2", "--shard", f"{part}/2")
    assert {path.name for path in Path("out").glob("manifest*")} == {
        "manifest-1of2.jsonl",
        "manifest-2of2.jsonl",
    }
    assert len(state().made) == 5
    assert json.loads(Path("out/report.json").read_text())["made"] == 5


def test_rows_with_pictures_of_their_own_go_into_one_call(models):
    """Each starts from its own picture: as it does alone."""
    rows = []
    for colour in ("red", "blue", "green"):
        Image.new("RGB", (32, 32), colour).save(f"{colour}.png")
        rows.append({"prompt": "fox", "id": colour, "image": f"{colour}.png", "strength": 0.7})
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--model", models("sd15"), "--steps", 4, "--device", "cpu", "--threads", 1]
    for count in (1, 3):
        batch("rows.jsonl", *options, "--out", f"by-{count}", "--batch", count)
    alone, together = state("by-1").made, state("by-3").made
    for id, one in together.items():
        assert one.batch == ("red", "blue", "green")
        assert np.abs(levels("by-1", alone[id]) - levels("by-3", one)).max() <= 1
    assert len(set(pixels("by-3").values())) == 3


def test_two_processes_make_a_row_together_where_its_plan_shares_it_out(job):
    Path("rows.txt").write_text("\n".join(FOXES[:2]))
    batch(*job)
    batch(*job[:-1], "shared", "--devices", "2", "--set", "parallel.CFG.degree=2")
    alone, shared = state().made, state("shared").made
    assert shared.keys() == alone.keys()
    for id, one in shared.items():
        assert one.verdicts["parallel.CFG"]["state"] == "ACTIVE"
        assert one.nfe == alone[id].nfe / 2
        assert np.abs(levels("out", alone[id]) - levels("shared", one)).max() <= 1


def test_a_gang_of_which_one_fails_is_started_again(tmp_path):
    """The other one waits for it in an exchange; the next row is made all the same."""
    from test_batch_workers import Job

    job = Job(tmp_path, ["fail", "fine", "fail", "fine"], size=1)
    job.engine.devices = 2
    found = job.run()
    assert {one.index for one in found.failed.values()} == {0, 2}
    assert {one.index for one in found.made.values()} == {1, 3}


def test_an_address_of_fsspec_holds_a_job_as_a_folder_does(job, tmp_path):
    there = f"local://{tmp_path}/remote"
    batch(*job[:-1], there, "--batch", "2")
    assert len(state("remote").made) == 5
    assert "0 made" in batch(*job[:-1], there, "--batch", "2").stderr


def test_clips_have_their_record_beside_them(models):
    pytest.importorskip("av")
    Path("rows.txt").write_text("fox\nowl\n")
    batch("rows.txt", "--model", models("animatediff"), "--steps", 2, "--device", "cpu", "--out",
          "out", "--threads", 1)  # fmt: skip
    for one in state().made.values():
        path = Path("out") / one.file
        assert path.suffix == ".mp4"
        assert metadata.Record.model_validate_json(
            path.with_name(f"{path.name}.json").read_text()
        ).request["prompt"] == one.prompt  # fmt: skip


def test_folders_of_others_are_left_alone(job):
    batch(*job, "--batch", "1", "--seeds", "fixed", "--name", "{index}")
    Path("out/manifest.jsonl").unlink()
    options = [*job, "--batch", "1", "--seeds", "fixed", "--name", "{index}"]
    assert "is there already" in batch(*options, code=2).stderr
    assert "5 made" in batch(*options, "--overwrite").stderr


def test_a_damaged_line_costs_its_row_alone(job):
    batch(*job, "--batch", "1")
    before = pixels()
    path = Path("out/manifest.jsonl")
    lines = path.read_bytes().splitlines(keepends=True)
    place = next(i for i, line in enumerate(lines) if b'"made"' in line)
    lines[place] = lines[place].replace(b'"made"', b'"mode"')
    path.write_bytes(b"".join(lines) + b"torn")
    result = batch(*job, "--batch", "1")
    assert f"manifest.jsonl:{place + 1} is damaged" in result.stderr
    assert "1 made" in result.stderr
    assert pixels() == before


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--batch", "0"], "--batch 0"),
        (["--batch", "many"], "--batch many"),
        (["--shard", "3/2"], "--shard 3/2"),
        (["--name", "../{id}"], "--name"),
        (["--resume", "--overwrite"], "leave one out"),
        (["--measure"], "--dry-run"),
        (["--out", "rows.txt"], "is a file"),
        (["--out", "no/such"], "create it first"),
        (["--plan", "p.toml", "--preset", "fast"], "both given"),
        (["--steps", "0"], "steps"),
    ],
)
def test_options_that_cannot_be_are_refused_at_once(job, options, told):
    assert told in " ".join(batch(*job, *options, code=2).output.split())
    assert not Path("out").exists() or not any(Path("out").glob("*.png"))


def test_without_input_or_output_it_says_what_is_missing(job):
    assert "--out is missing" in batch("rows.txt", code=2).stderr
    Path("empty.txt").write_text("# nothing\n\n")
    assert "empty.txt" in batch("empty.txt", "--out", "out", code=2).stderr


def test_two_at_once_are_refused_and_one_that_was_killed_holds_nothing(job):
    Path("rows.txt").write_text("\n".join(f"fox {number}" for number in range(300)))
    first = alone(*job, "--batch", "2")
    until(entered(2))
    second = alone(*job, "--batch", "2")
    _, told = second.communicate(timeout=100)
    assert second.returncode == 2
    assert "Another `accel batch` is at work" in told
    workers = _children(first.pid)
    assert workers
    first.kill()
    first.communicate()
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))
    there = Path("out/manifest.jsonl").read_text().count('"made"')
    third = alone(*job, "--batch", "2")
    until(entered(there + 4))
    third.send_signal(signal.SIGINT)
    _, told = third.communicate(timeout=100)
    assert third.returncode == 130
    assert "what was made is kept" in told
    assert json.loads(Path("out/report.json").read_text())["left"] > 0


def test_an_output_that_is_removed_ends_the_job_and_the_same_command_makes_it_again(job):
    Path("rows.txt").write_text("\n".join(f"fox {number}" for number in range(40)))
    process = alone(*job, "--batch", "2")
    until(entered(4))
    shutil.rmtree("out")
    _, told = process.communicate(timeout=100)
    assert process.returncode == 1
    assert "removed" in told and "run the same command again" in told
    assert "40 made" in batch(*job, "--batch", "2").stderr


def test_files_that_are_removed_while_it_runs_are_made_again(job):
    Path("rows.txt").write_text("\n".join(f"fox {number}" for number in range(40)))
    process = alone(*job, "--batch", "2")
    until(entered(4))
    next(Path("out").glob("00000*.png")).unlink()
    Path("out/.torn.png.0.part").write_bytes(b"as a worker leaves it that is killed")
    _, told = process.communicate(timeout=100)
    assert process.returncode == 0, told
    assert "1 files were removed while the job ran" in told
    assert len(list(Path("out").glob("*.png"))) == 40
    assert not list(Path("out").rglob("*.part"))


def test_a_full_disk_ends_the_job_and_loses_nothing(job, tmp_path):
    Path("rows.txt").write_text("\n".join(f"fox {number}" for number in range(40)))
    disk = tmp_path / "out"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a tmpfs")
    try:
        result = batch(*job, "--batch", "2", code=1)
        assert "No space left on device" in result.stderr
        made = state().made
        assert 0 < len(made) < 40
        for one in made.values():
            assert digest(Folder(disk), one.file) == one.sha256
        assert not list(disk.glob(".*.part"))
        subprocess.run(["mount", "-o", "remount,size=16m", str(disk)], check=True)
        assert f"{40 - len(made)} made" in batch(*job, "--batch", "2").stderr
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_rows_come_from_stdin_too(job):
    """A prompt a line, or an object a line."""
    lines = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in FOXES)
    for text in ("\n".join(FOXES), lines):
        result = CliRunner().invoke(app, ["batch", "-", *job[1:], "--batch", "1"], input=text)
        assert result.exit_code == 0, result.output
    assert len(state().made) == 5


def _children(parent):
    """Processes that a process has started, and those of its children."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(path.read_text().rpartition(")")[2].split()[1]) == parent:
                found.append(int(path.parent.name))
    return [*found, *(deeper for one in found for deeper in _children(one))]


def test_killed_again_and_again_it_ends_with_the_bits_of_an_undisturbed_run(job):
    """The parent and its workers, each time somewhere else."""
    Path("rows.txt").write_text("\n".join(f"fox {number}" for number in range(40)))
    batch(*job[:-1], "undisturbed", "--batch", "4")
    for goal in (4, 20):
        process = alone(*job, "--batch", "4", "--workers", "2", "--retries", "50")
        until(entered(goal))
        os.kill(_worker(process.pid), signal.SIGKILL)
        until(entered(goal + 4))
        process.kill()
        process.communicate()
    batch(*job, "--batch", "4", "--workers", "2")
    assert pixels() == pixels("undisturbed")
    assert len(state().made) == 40
    assert not state().failed
    assert not list(Path("out").rglob("*.part"))


def _worker(parent):
    """A worker of a job: the largest of its processes."""
    return max(_children(parent), key=_resident)


def _resident(pid):
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return 0
