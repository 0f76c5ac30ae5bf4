"""The REST interface: what it takes, what it answers, and to whom."""

import dataclasses
import io
import json
import pickle
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import schemathesis
from evidence import proven
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.specs.openapi.checks import positive_data_acceptance
from starlette.testclient import TestClient
from tiny import PIPELINES
from web import USERS, Memory, client, door, logged_in, png, service

from accel import Plan, cache, errors, methods
from app import launch, request, rest
from app.files import without_folders
from app.request import FILES, Serving
from app.serve.jobs import Busy, NoSuchJob
from app.serve.limits import Limits
from app.serve.service import Service

BASE = "/api/v1"
ORDER: dict[str, Any] = {"request": {"prompt": "a boat on the sea", "steps": 2}}


@pytest.fixture
def memory(tmp_path: Path) -> Memory:
    return service(tmp_path)


@pytest.fixture
def rest_client(memory: Memory) -> TestClient:
    return client(memory)


# what it does


def test_a_picture_from_order_to_file(rest_client: TestClient, memory: Memory) -> None:
    answer = rest_client.post(f"{BASE}/generate", json=ORDER | {"preset": "balanced"})
    job = answer.json()
    assert answer.status_code == 202
    assert job["title"] == "balanced" and job["plan"]["plan"] == 1 and len(job["plan"]) > 1
    assert job["request"] == ORDER["request"]
    assert rest_client.get(f"{BASE}/jobs/{job['id']}").json() == job
    picture = rest_client.get(job["files"]["picture"])
    assert (picture.status_code, picture.content) == (200, png())
    assert picture.headers["content-type"] == "image/png"
    assert picture.headers["content-disposition"].startswith("inline")
    assert "private" in picture.headers["cache-control"]


def test_a_goal_takes_the_plan_that_was_proven_to_hold_it(
    rest_client: TestClient, memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = proven(Plan(cache.EasyCache()), PIPELINES["flux_cfg"].build())
    offered = {"scenes-flux": {Path("near.toml"): plan}}
    monkeypatch.setattr(memory, "tuned", lambda model: offered.get(model, {}))
    order = ORDER | {"goal": ["ssim>=0.9", "speedup>=2"]}
    job = rest_client.post(f"{BASE}/generate", json=order).json()
    assert Plan.from_dict(job["plan"]) == plan and job["title"] == "ssim>=0.9 and speedup>=2"
    [goal] = rest_client.get(f"{BASE}/goals?model=scenes-flux").json()
    assert goal == {"targets": ["ssim>=0.95"], "speedup": 2.5, "low": 2.25, "high": 2.75}
    assert rest_client.get(f"{BASE}/goals?model=scenes-unet").json() == []
    for more, said in (
        ({"goal": ["ssim>=0.99"]}, "near.toml: ssim>=0.95 at 2.50 times"),
        ({"request": {**ORDER["request"], "model": "scenes-unet"}}, "for scenes-unet"),
    ):
        answer = rest_client.post(f"{BASE}/generate", json=order | more)
        assert answer.status_code == 422 and said in answer.json()["detail"]
    assert len(memory.jobs) == 1


def test_history_trash_and_restore(rest_client: TestClient) -> None:
    ids = [rest_client.post(f"{BASE}/generate", json=ORDER).json()["id"] for _ in range(3)]

    def listed(**query: Any) -> list[str]:
        return [job["id"] for job in rest_client.get(f"{BASE}/jobs", params=query).json()]

    assert listed() == ids[::-1] and listed(limit=2) == ids[:0:-1]
    assert rest_client.delete(f"{BASE}/jobs/{ids[1]}").status_code == 204
    assert listed() == [ids[2], ids[0]] and listed(deleted=True) == [ids[1]]
    assert rest_client.post(f"{BASE}/jobs/{ids[1]}/restore").json()["deleted"] is None
    assert listed() == ids[::-1]


def test_an_upload_is_named_without_folders_and_found_again(
    rest_client: TestClient, memory: Memory
) -> None:
    files = {"file": ("photo.png", png(), "image/png")}
    upload = rest_client.post(f"{BASE}/uploads", files=files).json()["upload"]
    assert not Path(upload).is_absolute() and (memory.folder / upload).read_bytes() == png()
    asked = {"request": {"prompt": "a boat", "image": upload, "strength": 0.5}}
    job = rest_client.post(f"{BASE}/generate", json=asked).json()
    assert job["request"]["image"] == upload
    [kept] = memory.jobs.values()
    assert kept.spec.request["image"] == str(memory.folder / upload)


def test_figures_that_json_has_not_are_words(rest_client: TestClient) -> None:
    job = rest_client.post(f"{BASE}/generate", json=ORDER).json()
    assert job["result"]["quality"] == {"psnr": "equal", "ssim": 1.0}


def test_methods_and_models_are_listed(rest_client: TestClient) -> None:
    listed = rest_client.get(f"{BASE}/methods").json()
    assert {entry["name"] for entry in listed} == set(methods())
    for entry in listed:
        assert set(entry["fields"]) == set(methods()[entry["name"]].model_fields)
    assert rest_client.get(f"{BASE}/models").json()[0]["name"] == "scenes-flux"


@pytest.mark.parametrize("paused", [None, "The disk of /root/a/b is full: free 1 GiB."])
def test_health_says_whether_the_queue_moves(
    rest_client: TestClient, memory: Memory, paused: str | None
) -> None:
    memory.paused = paused  # type: ignore[assignment,misc]
    told = rest_client.get(f"{BASE}/health").json()
    assert told["status"] == ("ok" if paused is None else "paused")
    assert "/root" not in json.dumps(told)


def test_a_proxys_path_stands_before_every_address(memory: Memory) -> None:
    test = client(memory, root_path="https://pictures.example/accel")
    job = test.post(f"/accel{BASE}/generate", json=ORDER).json()
    assert job["files"]["picture"].startswith(f"/accel{BASE}/jobs/")
    assert test.get(job["files"]["picture"]).content == png()
    assert test.get(f"{BASE}/openapi.json").json()["servers"] == [{"url": f"/accel{BASE}"}]


# what it takes


def test_an_order_has_the_vocabulary_of_the_command_line() -> None:
    taken = rest.Picture.model_json_schema()["properties"]
    known = {one.name for one in dataclasses.fields(request.Request)}
    assert set(taken) == known - rest.NOT_OFFERED
    assert all(field["description"] for field in taken.values())
    paths = {name for name, field in taken.items() if rest.UPLOAD in json.dumps(field)}
    assert paths == set(FILES)


@pytest.mark.parametrize(
    ("order", "named"),
    [
        ({}, "request"),
        ({"request": {"prompt": "x", "steps": 0}}, "request.steps"),
        ({"request": {"prompt": "x", "seed": 2**63}}, "request.seed"),
        ({"request": {"prompt": "x", "colour": "red"}}, "request.colour"),
        ({"request": {"prompt": "x", "device": "cpu"}}, "request.device"),
        ({"request": {"prompt": "x", "image": "/etc/passwd"}}, "request.image"),
        ({"request": {"prompt": "x", "image": "a\0b"}}, "request.image"),
        ({"request": {"prompt": "x", "lora": "a" * 5000}}, "request.lora"),
        ({"request": {"prompt": 3}}, "request.prompt"),
        (ORDER | {"kind": "measure"}, "kind"),
        (ORDER | {"preset": "quick"}, "preset"),
        (ORDER | {"repeats": 21}, "repeats"),
        (ORDER | {"against": "../x"}, "against"),
        (ORDER | {"title": "x" * 201}, "title"),
        (ORDER | {"owner": "bob"}, "owner"),
        (ORDER | {"preset": "fast", "plan": {"plan": 1}}, "plan and preset"),
        (ORDER | {"preset": "fast", "goal": ["ssim>=0.9"]}, "preset and goal"),
        (ORDER | {"goal": []}, "goal"),
        (ORDER | {"goal": ["nearly"]}, "The target 'nearly' is none"),
        (ORDER | {"goal": ["ssim>=0.9"]}, "There is no tuned plan in this server's folder"),
    ],
)
def test_an_order_that_is_none_is_refused_by_its_name(
    rest_client: TestClient, memory: Memory, order: Any, named: str
) -> None:
    answer = rest_client.post(f"{BASE}/generate", json=order)
    assert answer.status_code == 422 and answer.json()["detail"].startswith(named)
    assert not memory.jobs


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"request": {"prompt": "\\ud800"}}',
        b'{"request": {"prompt": "x"}, "title": "\\ud800"}',
        b'{"request": {"prompt": "x"}, "plan": {"cache": {"\\ud800": {}}}}',
        b'{"request": {"prompt": "x"}, "plan": {"cache": {"EasyCache": {"threshold": NaN}}}}',
        b'{"request": {"prompt": "x", "guidance": Infinity}}',
        b'{"request": {"prompt": "x", "steps": ' + b"9" * 5000 + b"}}",
        b'{"request": {"prompt": "x"}, "plan": {"a": ' + b"[" * 5000 + b"]" * 5000 + b"}}",
        *(
            b'{"request": {"prompt": "x"}, "plan": {"a": ' + b"[" * deep + b"]" * deep + b"}}"
            for deep in (300, 900, 960, 990)
        ),
    ],
)
def test_a_body_that_cannot_be_read_is_refused(rest_client: TestClient, body: bytes) -> None:
    headers = {"content-type": "application/json"}
    answer = rest_client.post(f"{BASE}/generate", content=body, headers=headers)
    assert answer.status_code in (400, 422) and set(answer.json()) == {"detail"}


@pytest.mark.parametrize("body", [b"{", b"\xff", b"a=b", json.dumps(ORDER).encode()])
@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "?"])
def test_a_body_that_does_not_say_to_be_json_is_refused(
    rest_client: TestClient, memory: Memory, body: bytes, kind: str | None
) -> None:
    headers = {} if kind is None else {"content-type": kind}
    answer = rest_client.post(f"{BASE}/generate", content=body, headers=headers)
    assert answer.status_code == 422 and "application/json" in answer.json()["detail"]
    assert not memory.jobs


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.BadInput("x"), 422),
        (errors.PlanError("x"), 422),
        (errors.Conflict("x"), 422),
        (errors.UnknownMethod("x"), 422),
        (errors.UnsupportedModel("x"), 422),
        (errors.BadModel("/root/models/a/model.safetensors is truncated: restore it."), 422),
        (NoSuchJob("x"), 404),
        (Busy("x", 11.2), 429),
        (errors.NotWritten("/root/outputs/a.png could not be written: free space."), 507),
        (errors.BadInput("a lone \ud800"), 422),
    ],
)
def test_an_error_of_the_service_has_its_status(
    rest_client: TestClient, memory: Memory, error: Exception, code: int
) -> None:
    def refuse(owner: str, specs: Any, group: str | None = None) -> None:
        raise error

    memory.submit = refuse  # type: ignore[method-assign]
    answer = rest_client.post(f"{BASE}/generate", json=ORDER)
    assert answer.status_code == code and "/root" not in answer.text
    assert answer.headers.get("retry-after") == ("12" if code == 429 else None)


def test_any_other_error_says_nothing_about_the_inside(
    rest_client: TestClient, memory: Memory
) -> None:
    memory.submit = None  # type: ignore[assignment,method-assign]
    answer = rest_client.post(f"{BASE}/generate", json=ORDER)
    assert answer.status_code == 500 and "NoneType" not in answer.text


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("/root/a/b.png is gone", "b.png is gone"),
        ("'/root/a/b.png': no", "'b.png': no"),
        ("take owner/model or a/b", "take owner/model or a/b"),
        ("see https://example.org/a/b", "see https://example.org/a/b"),
        ("width / height is 1/2", "width / height is 1/2"),
        ("/top", "/top"),
    ],
)
def test_texts_keep_names_and_lose_folders(text: str, plain: str) -> None:
    assert without_folders(text) == plain


@pytest.mark.parametrize(
    ("state", "result", "code"),
    [("queued", False, 409), ("running", False, 409), ("failed", False, 404), ("done", True, 404)],
)
def test_a_file_that_is_not_there_yet_is_told_from_one_that_never_will_be(
    rest_client: TestClient, memory: Memory, state: Any, result: bool, code: int
) -> None:
    id = rest_client.post(f"{BASE}/generate", json=ORDER).json()["id"]
    kept = memory.jobs[id].result if result else None
    memory.jobs[id] = dataclasses.replace(memory.jobs[id], state=state, result=kept)
    assert rest_client.get(f"{BASE}/jobs/{id}/files/report").status_code == code


# to whom


def described(test: TestClient, headers: dict[str, str]) -> dict[str, Any]:
    answer = test.get(f"{BASE}/openapi.json", headers=headers)
    assert answer.status_code == 200
    return answer.json()


def test_no_route_gives_one_user_what_is_anothers(memory: Memory) -> None:
    """Every route of the description, with all ids of the other user in the place of ids."""
    test = client(memory, door())
    mine, other = (logged_in(test, name) for name in USERS)
    order = ORDER | {"title": "a secret of ada"}
    job = test.post(f"{BASE}/generate", json=order, headers=mine).json()
    before = dict(memory.jobs)
    paths = described(test, other)["paths"]
    assert len(paths) >= 10
    for path, operations in paths.items():
        filled = BASE + path.replace("{id}", job["id"]).replace("{role}", "picture")
        for method in operations:
            if "{id}" not in path and method != "get":
                continue
            theirs = test.request(method, filled, headers=other)
            assert "secret" not in theirs.text and png() != theirs.content, (method, path)
            assert job["id"] not in theirs.text or theirs.status_code == 404
            assert theirs.status_code == (404 if "{id}" in path else 200), (method, path)
    assert memory.jobs == before
    assert test.get(f"{BASE}/jobs/{job['id']}", headers=mine).json() == job


def test_every_route_but_health_asks_for_a_session(memory: Memory) -> None:
    test = client(memory, door())
    mine = logged_in(test, "ada")
    for path, operations in described(test, mine)["paths"].items():
        for method in operations:
            filled = BASE + path.replace("{id}", "0" * 32).replace("{role}", "picture")
            answer = test.request(method, filled)
            assert answer.status_code == (200 if path == "/health" else 401), (method, path)


def test_the_description_is_whole(memory: Memory) -> None:
    for login, test in ((False, client(memory)), (True, client(memory, door()))):
        headers = logged_in(test, "ada") if login else {}
        schema = described(test, headers)
        for path, operations in schema["paths"].items():
            for method, operation in operations.items():
                answers = operation["responses"]
                assert operation["summary"] and operation["description"], (method, path)
                assert {"400", "413"} <= set(answers) and ("401" in answers) is login
                assert ("404" in answers) is ("{id}" in path or path == "/generate")
                assert bool(operation.get("security")) is login
        assert schema["components"]["schemas"]["Order"]["examples"]


# the real service under schemathesis and hypothesis


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A real service whose workers are not started: what is admitted waits.

    Whether methods fit is not asked of a model, which takes long; other tests do.
    """
    made = Service(
        tmp_path_factory.mktemp("real"), limits=Limits(upload_bytes=200_000, lora_bytes=200_000)
    )
    made._examiner = SimpleNamespace(check=lambda model, plan: None, close=lambda: None)  # type: ignore[assignment]
    yield made
    made.close()


@pytest.fixture(scope="module")
def real_client(real: Service) -> TestClient:
    return client(real)  # type: ignore[arg-type]


def test_no_request_breaks_it_and_every_answer_is_as_described(
    real: Service,
) -> None:
    app = launch.build(real, None, Serving(), None, frozenset({"testserver"}))
    schema = schemathesis.openapi.from_asgi(f"{BASE}/openapi.json", app)
    for operation in schema.get_all_operations():
        _survives(operation.ok())


def _survives(operation: Any) -> None:
    """Cases of one operation, valid and invalid, hold what is described.

    Limits and fits, which no schema can say, may refuse a valid one: with a 422 as described.
    """

    @given(case=operation.as_strategy())
    @settings(max_examples=15, suppress_health_check=list(HealthCheck))
    def holds(case: Any) -> None:
        case.call_and_validate(excluded_checks=[positive_data_acceptance])

    holds()


def _safetensors(header: bytes, tail: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + tail


def _zipped() -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        archive.writestr("../../evil.png", png())
    return held.getvalue()


def _bomb() -> bytes:
    """A PNG of 60,000 x 60,000 pixels in a few bytes."""
    whole = bytearray(png())
    whole[16:24] = struct.pack(">II", 60_000, 60_000)
    return bytes(whole)


class Evil:
    """What unpickles to a file that gives it away."""

    def __reduce__(self) -> Any:
        return (Path.write_text, (Path("/tmp/accel-unpickled"), "x"))


CONTENTS = st.one_of(
    st.sampled_from(
        [
            b"",
            png(),
            png()[:-20],
            png()[:8],
            _bomb(),
            _zipped(),
            pickle.dumps(Evil()),
            b"\x89PNG\r\n\x1a\n" + pickle.dumps(Evil()),
            b"GIF89a" + b"\0" * 20,
            b"<svg xmlns='http://www.w3.org/2000/svg' onload='x()'/>",
            b"x" * 300_000,
            _safetensors(b"{}", b""),
            _safetensors(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', b"1234"),
            _safetensors(b'{"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 4]}}', b"1"),
            _safetensors(b"[" * 50_000, b""),
            struct.pack("<Q", 2**63) + b"{}",
        ]
    ),
    st.binary(max_size=400),
    st.binary(max_size=200).map(lambda tail: png()[:40] + tail),
    st.binary(max_size=200).map(lambda head: _safetensors(head, b"")),
)
NAMES = st.one_of(
    st.sampled_from(
        [
            "../../evil.png",
            "..\\..\\evil.png",
            "/etc/cron.d/evil",
            "a.safetensors",
            "a.pkl",
            ".png",
            "con.png",
            "a" * 3000 + ".png",
            "evil\x01.png",
            "%2e%2e%2fevil.png",
        ]
    ),
    st.text(max_size=30).filter(lambda name: "\r" not in name and "\n" not in name),
)


@given(name=NAMES, content=CONTENTS)
@settings(max_examples=150, suppress_health_check=list(HealthCheck))
def test_no_upload_breaks_it_or_lands_elsewhere(
    real: Service, real_client: TestClient, name: str, content: bytes
) -> None:
    around = real.folder.parent
    before = set(around.iterdir())
    files = {"file": (name.encode("utf-8", "replace").decode(), content)}
    answer = real_client.post(f"{BASE}/uploads", files=files)
    assert answer.status_code in (201, 400, 413, 422), (answer.status_code, answer.text)
    assert set(around.iterdir()) == before and not Path("/tmp/accel-unpickled").exists()
    if answer.status_code == 201:
        kept = (real.folder / answer.json()["upload"]).resolve()
        assert kept.is_relative_to(real.folder / "uploads") and kept.suffix in (
            ".png",
            ".jpg",
            ".webp",
            ".safetensors",
        )
        assert kept.read_bytes()[:4] != b"PK\x03\x04"
    else:
        assert str(real.folder) not in answer.text


@pytest.mark.parametrize("role", FILES)
def test_an_upload_serves_its_owner_alone(real: Service, role: str) -> None:
    test = client(real, door())  # type: ignore[arg-type]
    mine, other = (logged_in(test, name) for name in USERS)
    files = {"file": ("photo.png", png(32), "image/png")}
    upload = test.post(f"{BASE}/uploads", files=files, headers=mine).json()["upload"]
    for path in (upload, f"{upload}/../{Path(upload).name}", "queue.sqlite", "..", "."):
        asked = {"request": {"prompt": "a boat", role: path}}
        answer = test.post(f"{BASE}/generate", json=asked, headers=other)
        assert answer.status_code == 422, (path, answer.text)
        assert str(real.folder) not in answer.text


def test_limits_hold_for_every_order(real: Service, real_client: TestClient) -> None:
    beyond: dict[str, Any] = {
        "width": real.limits.side + 8,
        "height": real.limits.side + 8,
        "frames": real.limits.frames + 8,
        "steps": real.limits.steps + 1,
        "prompt": "x" * (real.limits.prompt + 1),
        "negative": "x" * (real.limits.prompt + 1),
        "model": "someone/else",
        "controlnet": "/etc",
    }
    for name, value in beyond.items():
        asked = {"request": {"prompt": "a boat", name: value}}
        answer = real_client.post(f"{BASE}/generate", json=asked)
        assert answer.status_code == 422 and name in answer.text, (name, answer.text)
