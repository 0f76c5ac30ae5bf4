"""The durable layer: what was entered is found again, whatever crashed or was damaged."""

import errno
import itertools
import os
import shutil
from pathlib import Path
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from accel.errors import BadInput, NotWritten
from app import files
from app.batch import manifest
from app.batch.manifest import Begun, Ended, Failed, Made, Manifest, Sized
from app.batch.storage import Folder, Remote, digest, open_storage

TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
IDS = st.sampled_from(["a", "b", "c", "ü"])
MADE = st.builds(
    Made,
    id=IDS, hash=TEXT, index=st.integers(0, 9), file=TEXT, sha256=TEXT,
    bytes=st.integers(0, 9), pixels=TEXT, group=IDS, batch=st.tuples(IDS), seed=st.integers(0, 9),
    prompt=TEXT, seconds=st.floats(0, 9), steps=st.integers(1, 9), nfe=st.floats(0, 9),
    moment=st.floats(0, 1e9), notes=st.tuples(TEXT),
)  # fmt: skip
FAILED = st.builds(
    Failed, id=IDS, hash=TEXT, index=st.integers(0, 9), prompt=TEXT, reason=TEXT,
    quarantined=st.booleans(), moment=st.floats(0, 1e9),
)  # fmt: skip
SIZED = st.builds(Sized, group=IDS, size=st.integers(1, 9), note=TEXT)
LINES = st.lists(st.one_of(MADE, FAILED, SIZED), max_size=12)
TIMES = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def folder(tmp_path):
    return Folder(tmp_path / uuid4().hex)


def filled(storage, lines, name="manifest.jsonl"):
    storage.prepare()
    ledger = Manifest(storage, name)
    for line in lines:
        ledger.write([line])
    return storage


def expected(lines):
    state = manifest.State()
    rows = [line for line in lines if isinstance(line, Made | Failed)]
    for line in [*(x for x in lines if x not in rows), *sorted(rows, key=lambda one: one.moment)]:
        state.add(line)
    return state


@TIMES
@given(LINES)
def test_what_is_entered_is_found_again(tmp_path, lines):
    assert manifest.read(filled(folder(tmp_path), lines)) == expected(lines)


@TIMES
@given(LINES)
def test_on_an_object_storage_as_well(lines):
    storage = filled(Remote(f"memory://{uuid4().hex}"), lines)
    assert manifest.read(storage) == expected(lines)


@TIMES
@given(LINES, st.data())
def test_a_torn_end_loses_its_line_and_no_other_and_is_written_on_after(tmp_path, lines, data):
    """Cut at any byte, as by a crash or a full disk; then the job goes on."""
    storage = filled(folder(tmp_path), lines)
    path = Path(storage.where) / "manifest.jsonl"
    whole = path.read_bytes() if lines else b""
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:cut])
    ends = list(itertools.accumulate(len(manifest.encode(line)) for line in lines))
    kept = [line for line, end in zip(lines, ends, strict=True) if end - 1 <= cut]
    more = Sized(group="later", size=3)
    later = Folder(Path(storage.where))  # another process
    Manifest(later, "manifest.jsonl").write([more])
    found = manifest.read(later)
    assert len(found.damaged) <= 1
    found.damaged.clear()
    assert found == expected([*kept, more])


@TIMES
@given(LINES.filter(bool), st.data())
def test_a_damaged_byte_is_noticed_and_costs_its_line_alone(tmp_path, lines, data):
    storage = filled(folder(tmp_path), lines)
    path = Path(storage.where) / "manifest.jsonl"
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    value = data.draw(st.integers(0, 255).filter(lambda byte: byte != content[place]))
    hit = sum(1 for byte in content[:place] if byte == ord("\n"))
    joined = content[place] == ord("\n")
    content[place] = value
    path.write_bytes(content)
    lost = {hit, hit + 1} if joined else {hit}
    found = manifest.read(storage)
    assert found.damaged
    found.damaged.clear()
    assert found == expected([line for place, line in enumerate(lines) if place not in lost])


@TIMES
@given(st.binary(max_size=300))
def test_no_bytes_at_all_stop_a_reader(tmp_path, content):
    storage = filled(folder(tmp_path), [])
    (Path(storage.where) / "manifest.jsonl").write_bytes(content)
    found = manifest.read(storage)
    assert not found.made
    assert len(found.damaged) == sum(bool(raw) for raw in content.split(b"\n"))


def test_shards_are_read_together_and_a_size_holds_for_good(tmp_path):
    storage = folder(tmp_path)
    for part, size in (("1of2", 4), ("2of2", 8)):
        filled(storage, [Sized(group="g", size=size)], f"manifest-{part}.jsonl")
    assert manifest.read(storage).sizes["g"].size == 4


def test_a_call_that_came_to_its_end_is_told_from_one_that_did_not(tmp_path):
    begun = Begun(rows=3, seed=0, moment="2026-01-01T00:00:00+00:00")
    storage = filled(folder(tmp_path), [begun, begun, Ended(seconds=1, made=3, failed=0)])
    found = manifest.read(storage)
    assert (len(found.begun), len(found.ended)) == (2, 1)


@pytest.mark.parametrize("harm", ["removed", "cut", "replaced", "folder removed"])
def test_a_manifest_that_somebody_takes_away_ends_the_job(tmp_path, harm):
    """Else a file would be written on that nobody finds again."""
    storage = filled(folder(tmp_path), [])
    ledger = Manifest(storage, "manifest.jsonl")
    ledger.write([Sized(group="g", size=1)])
    path = Path(storage.where) / "manifest.jsonl"
    content = path.read_bytes()
    match harm:
        case "removed":
            path.unlink()
        case "cut":
            os.truncate(path, 3)
        case "replaced":
            other = path.with_name("other")
            other.write_bytes(content)
            other.replace(path)
        case "folder removed":
            shutil.rmtree(path.parent)
    with pytest.raises(NotWritten, match=r"manifest\.jsonl"):
        ledger.write([Sized(group="h", size=1)])


def test_a_full_disk_leaves_whole_files_or_none(tmp_path, monkeypatch):
    storage = folder(tmp_path)
    storage.prepare()
    storage.put({"a.png": b"old"})

    def full(_fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(NotWritten, match="No space left"):
        storage.put({"a.png": b"new", "b/c.png": b"new"})
    with pytest.raises(NotWritten, match="same command goes on"):
        storage.append("manifest.jsonl", b"line\n")
    monkeypatch.undo()
    assert storage.get("a.png") == b"old"
    assert not storage.exists("b/c.png")
    assert not list(Path(storage.where).rglob("*.part"))


def test_folders_that_cannot_be_used_are_refused_before_any_work(tmp_path):
    file = tmp_path / "file"
    file.touch()
    for place in (file, tmp_path / "no" / "such", Path("/proc/nothing")):
        with pytest.raises(BadInput, match=r"--out|cannot be written"):
            Folder(place).prepare()
    with pytest.raises(BadInput, match="fsspec"):
        open_storage("nosuch://bucket/folder")


@pytest.mark.parametrize("kind", ["folder", "memory"])
def test_both_storages_do_the_same(tmp_path, kind):
    storage = folder(tmp_path) if kind == "folder" else Remote(f"memory://{uuid4().hex}")
    storage.prepare()
    assert storage.empty()
    assert storage.names("*.png") == []
    storage.put({"b.png": b"1", "a.png": b"2", "deep/er/c.png": b"3"})
    assert not storage.empty()
    assert storage.names("*.png") == ["a.png", "b.png"]
    assert storage.get("deep/er/c.png") == b"3"
    assert storage.exists("deep/er/c.png") and not storage.exists("deep/er")
    assert digest(storage, "no.png") is None
    assert digest(storage, "a.png") == digest(storage, "a.png") != digest(storage, "b.png")
    with pytest.raises(NotWritten, match=r"no\.png"):
        storage.get("no.png")


def test_what_another_shard_is_writing_is_left_to_it(tmp_path):
    storage = folder(tmp_path)
    storage.prepare()
    part = Path(storage.where) / "deep" / ".a.png.1234.part"
    part.parent.mkdir()
    part.touch()
    storage.sweep(600.0)
    assert part.exists()
    os.utime(part, (1, 1))
    storage.sweep(600.0)
    assert not part.exists()


def test_an_address_of_files_is_a_folder(tmp_path):
    assert isinstance(open_storage(f"file://{tmp_path}"), Folder)
