"""What stands before every request: hosts, origins, sizes, logins, files, headers."""

import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.responses import HTMLResponse, PlainTextResponse, StreamingResponse
from starlette.routing import Route
from starlette.testclient import TestClient
from web import (
    BASE,
    HASH,
    PASSWORD,
    USERS,
    Clock,
    Memory,
    client,
    door,
    in_loop,
    logged_in,
    pages,
    png,
    service,
)

from accel.errors import BadInput
from app import accounts, launch, security
from app.accounts import FREE, FREE_OF_ADDRESS, LONGEST_WAIT, Accounts, Door, Locked, Refused
from app.security import HEADERS, Guard, Policy

PAGE = {"accept": "text/html"}
COST = accounts._COST


@pytest.fixture(scope="module", autouse=True)
def _standing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """In an empty folder, as the server does; pytest's own folder stays where it is."""
    tmp_path_factory.getbasetemp()
    with launch._empty_folder():
        yield


@pytest.fixture(autouse=True)
def _weak(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hashes that take no time."""
    monkeypatch.setattr(accounts, "_COST", 16)


# the file of users


def test_a_user_written_to_the_file_is_accepted_and_nobody_else(tmp_path: Path) -> None:
    file = tmp_path / "users"
    accounts.add(file, "ada", PASSWORD)
    accounts.add(file, "bob", PASSWORD + "2")
    read = Accounts.read(file)
    for name in ("ada", "bob", "eve", "", "Ada", "ada:", "local"):
        for password in (PASSWORD, PASSWORD + "2", "", HASH):
            right = (name, password) in (("ada", PASSWORD), ("bob", PASSWORD + "2"))
            assert read.accepts(name, password) is right, (name, password)


def test_the_file_holds_no_password_is_private_and_has_a_fresh_salt_each_time(
    tmp_path: Path,
) -> None:
    file = tmp_path / "users"
    accounts.add(file, "ada", PASSWORD)
    first = file.read_text()
    accounts.add(file, "ada", PASSWORD)
    assert PASSWORD not in first and first != file.read_text()
    assert file.stat().st_mode & 0o077 == 0
    assert len(file.read_text().splitlines()) == 1


@pytest.mark.parametrize("name", ["", "local", "a:b", "a/b", "../a", "a\nb", "-a", "ä", "a" * 65])
def test_names_that_will_not_do_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadInput, match="--add-user"):
        accounts.add(tmp_path / "users", name, PASSWORD)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("password", ["", "short", "x" * 1025])
def test_passwords_that_will_not_do_are_refused(tmp_path: Path, password: str) -> None:
    with pytest.raises(BadInput, match="10 to 1024"):
        accounts.add(tmp_path / "users", "ada", password)


@pytest.mark.parametrize(
    "line",
    ["ada", "ada:secret", f"ada:{HASH}0", f"a b:{HASH}", f"local:{HASH}", f":{HASH}", "\x00"],
)
def test_a_line_that_is_no_user_is_named_by_its_number_alone(tmp_path: Path, line: str) -> None:
    file = tmp_path / "users"
    file.write_text(f"bob:{HASH}\n{line}\n")
    with pytest.raises(BadInput, match="line 2") as caught:
        Accounts.read(file)
    assert "secret" not in str(caught.value) and HASH not in str(caught.value)


@pytest.mark.parametrize("content", [None, b"", b"\n\n", b"\xff\xfe"])
def test_a_file_without_users_is_refused(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "users"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(BadInput, match="--auth"):
        Accounts.read(file)


def test_a_hash_takes_32_mib() -> None:
    assert 128 * COST * accounts._BLOCK >= 32 * 2**20


def test_a_name_that_does_not_exist_costs_the_same_work(monkeypatch: pytest.MonkeyPatch) -> None:
    work: list[tuple[int, int, int]] = []
    inner = accounts._scrypt

    def counted(password: str, salt: bytes, cost: int, block: int, lanes: int) -> bytes:
        work.append((cost, block, lanes))
        return inner(password, salt, cost, block, lanes)

    users = Accounts({"ada": accounts.hashed(PASSWORD)})
    monkeypatch.setattr(accounts, "_scrypt", counted)
    for name in ("ada", "eve"):
        assert not users.accepts(name, "wrong")
    assert len(work) == 2 and work[0] == work[1]


# delays


class Counting(Accounts):
    """Counts how often it was asked, and knows one password without working for it."""

    def __init__(self) -> None:
        self.asked = 0

    def accepts(self, name: str, password: str) -> bool:
        self.asked += 1
        return name in USERS and password == PASSWORD


def attempt(door: Door, name: str, password: str, address: str = "192.0.2.1") -> float | str | None:
    """The token, the seconds to wait, or ``None`` where it was refused."""
    try:
        return door.enter(name, password, address)
    except Locked as error:
        return error.seconds
    except Refused:
        return None


def test_forty_bad_logins_are_locked_out_a_good_one_waits_and_others_do_not() -> None:
    users, clock = Counting(), Clock()
    door = Door(users, clock)
    answers = [attempt(door, "ada", f"guess {number}") for number in range(40)]
    assert answers[:FREE] == [None] * FREE and users.asked == FREE
    assert all(isinstance(answer, float) for answer in answers[FREE:])
    wait = attempt(door, "ada", PASSWORD)
    assert isinstance(wait, float) and users.asked == FREE
    assert isinstance(attempt(door, "bob", PASSWORD), str)
    assert isinstance(attempt(door, "ada", PASSWORD, "192.0.2.2"), str)
    clock.now += wait
    assert isinstance(attempt(door, "ada", PASSWORD), str)
    assert [attempt(door, "ada", "wrong") for _ in range(FREE)] == [None] * FREE


def test_the_wait_doubles_up_to_a_quarter_of_an_hour() -> None:
    clock = Clock()
    door, waits = Door(Counting(), clock), []
    for _ in range(FREE - 1):
        attempt(door, "ada", "wrong")
    for _ in range(14):
        assert attempt(door, "ada", "wrong") is None
        wait = attempt(door, "ada", "wrong")
        assert isinstance(wait, float)
        waits.append(wait)
        clock.now += wait
    assert waits == [min(2.0**step, LONGEST_WAIT) for step in range(14)]


@given(pauses=st.lists(st.floats(0, 5000), max_size=60))
def test_no_rhythm_of_guesses_gets_more_looks_than_the_waits_allow(pauses: list[float]) -> None:
    users, clock = Counting(), Clock()
    door = Door(users, clock)
    forgotten = 0
    for pause in pauses:
        clock.now += pause
        forgotten += pause >= accounts.FORGOTTEN_AFTER
        attempt(door, "ada", "wrong")
    looks, left = FREE, clock.now - 1000
    for step in range(60):
        wait = min(2.0**step, LONGEST_WAIT)
        if left + 1e-6 < wait:
            break
        left, looks = left - wait, looks + 1
    assert users.asked <= looks * (forgotten + 1)


def test_an_address_that_tries_many_names_is_slowed_too() -> None:
    users = Counting()
    door = Door(users, Clock())
    for number in range(500):
        attempt(door, f"name{number}", "wrong")
    assert users.asked == FREE_OF_ADDRESS
    assert isinstance(attempt(door, "ada", PASSWORD, "198.51.100.7"), str)


def test_an_ipv6_network_counts_as_one_address() -> None:
    users = Counting()
    door = Door(users, Clock())
    for number in range(40):
        attempt(door, "ada", "wrong", f"2001:db8::{number:x}:1")
    assert users.asked == FREE
    assert isinstance(attempt(door, "ada", PASSWORD, "2001:db8:1::1"), str)


def test_guesses_at_the_same_moment_are_counted_before_they_are_looked_at() -> None:
    start, asked = threading.Barrier(20), []

    class Slow(Counting):
        def accepts(self, name: str, password: str) -> bool:
            asked.append(name)
            return False

    door = Door(Slow(), Clock())

    def guess() -> None:
        start.wait()
        attempt(door, "ada", "wrong")

    threads = [threading.Thread(target=guess) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(asked) == FREE


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounts, "REMEMBERED", 50)
    clock = Clock()
    door = Door(Counting(), clock)
    for number in range(1000):
        attempt(door, f"name{number}", "wrong", f"198.51.{number // 250}.{number % 250}")
        assert len(door._failures) <= 52
    clock.now += accounts.FORGOTTEN_AFTER + 1
    attempt(door, "ada", PASSWORD)
    assert not door._failures


# sessions


def test_a_session_ends_by_logout_by_time_and_by_too_many_others() -> None:
    clock = Clock()
    door = Door(Counting(), clock)
    tokens = [str(attempt(door, "ada", PASSWORD)) for _ in range(accounts.SESSIONS + 3)]
    assert len(set(tokens)) == len(tokens) and min(map(len, tokens)) >= 40
    assert [door.user(token) for token in tokens[:3]] == [None] * 3
    assert {door.user(token) for token in tokens[3:]} == {"ada"}
    door.leave(tokens[-1])
    assert door.user(tokens[-1]) is None and door.user(tokens[-2]) == "ada"
    clock.now += accounts.SESSION_SECONDS
    assert {door.user(token) for token in tokens} == {None}


@given(st.none() | st.text(max_size=60))
def test_no_other_text_is_a_session(token: str | None) -> None:
    door = Door(Counting(), Clock())
    attempt(door, "ada", PASSWORD)
    assert door.user(token) is None


# the guard before a small app


async def _echo(request: Any) -> PlainTextResponse:
    return PlainTextResponse(str(len(await request.body())))


async def _break(request: Any) -> PlainTextResponse:
    raise RuntimeError("/root/secret/place")


async def _traceback(request: Any) -> PlainTextResponse:
    return PlainTextResponse("Traceback: /root/secret/place", 500)


async def _open_to_all(request: Any) -> PlainTextResponse:
    headers = {"Access-Control-Allow-Origin": "*", "X-Frame-Options": "ALLOW"}
    return PlainTextResponse("ok", headers=headers)


async def _html(request: Any) -> HTMLResponse:
    return HTMLResponse(SCRIPT)


async def _packed(request: Any) -> PlainTextResponse:
    return PlainTextResponse("packed", 500, {"Content-Encoding": "gzip"})


async def _stream(request: Any) -> StreamingResponse:
    return StreamingResponse(iter(["a", "b"]), media_type="text/event-stream")


SCRIPT = "<script>taken()</script>"
HTML = ["/any.html", "/gradio_api/any.html", "/api/v1/any.html", "/assets/any.html"]
EVERY = ["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"]
SMALL = Starlette(
    routes=[
        Route("/break", _break),
        Route("/traceback", _traceback),
        Route("/packed", _packed),
        *(Route(path, _html) for path in ("/", *HTML)),
        Route("/open", _open_to_all),
        Route("/stream", _stream),
        Route("/{path:path}", _echo, methods=EVERY),
    ]
)


def small(**policy: Any) -> TestClient:
    """The guard before an app that answers with the length of what it was sent."""
    options = {"may_read": lambda owner, path: False, "upload_bytes": 1000} | policy
    return TestClient(Guard(SMALL, Policy(**options)), BASE, raise_server_exceptions=False)


@pytest.mark.parametrize(
    ("host", "answered"),
    [
        ("127.0.0.1:7860", True),
        ("localhost", True),
        ("LOCALHOST:1", True),
        ("localhost.", True),
        ("[::1]:7860", True),
        ("192.168.7.9:7860", True),
        ("pictures.example", True),
        ("Pictures.Example:443", True),
        ("evil.example", False),
        ("evil.example:7860", False),
        ("localhost.evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("localhost@evil.example", False),
        ("evil.example#localhost", False),
        ("", False),
        ("[::1", False),
        ("127.0.0.1 evil", False),
        ("2130706433", False),
    ],
)
@pytest.mark.parametrize("path", ["/", "/api/v1/health", "/login", "/gradio_api/info"])
def test_only_our_own_names_are_answered(host: str, answered: bool, path: str) -> None:
    answer = small(names=frozenset({"pictures.example"})).get(path, headers={"host": host})
    assert (answer.status_code == 200) is answered
    assert answered or answer.status_code == 421


ORIGINS = [
    ({}, True),
    ({"origin": BASE}, True),
    ({"origin": "https://pictures.example"}, True),
    ({"sec-fetch-site": "same-origin", "origin": BASE}, True),
    ({"sec-fetch-site": "none"}, True),
    ({"origin": "null"}, False),
    ({"origin": ""}, False),
    ({"origin": "http://["}, False),
    ({"origin": "http://evil.example"}, False),
    ({"origin": "http://127.0.0.1:3000"}, False),
    ({"origin": "http://localhost:7860"}, False),
    ({"origin": "http://127.0.0.1:7860.evil.example"}, False),
]
SITES = [({"sec-fetch-site": "cross-site"}, False), ({"sec-fetch-site": "same-site"}, False)]


@pytest.mark.parametrize("method", EVERY)
@pytest.mark.parametrize(("headers", "answered"), ORIGINS)
def test_pages_of_other_origins_get_no_answer(
    method: str, headers: dict[str, str], answered: bool
) -> None:
    answer = small(origins=frozenset({"pictures.example"})).request(method, "/x", headers=headers)
    assert answer.status_code == (200 if answered else 403)


@pytest.mark.parametrize("method", EVERY)
@pytest.mark.parametrize(("headers", "answered"), SITES)
def test_pages_of_other_sites_change_nothing(
    method: str, headers: dict[str, str], answered: bool
) -> None:
    answer = small().request(method, "/x", headers=headers)
    assert answer.status_code == (200 if answered or method in security.SAFE else 403)


@pytest.mark.parametrize("path", ["/x", "/api/v1/uploads", "/gradio_api/upload"])
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("over", [-1, 0, 1, 70_000])
def test_bodies_end_at_their_limit(
    path: str, chunked: bool, over: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(security, "MESSAGE_BYTES", 500)
    limit = 500 if path == "/x" else 1000 + security.FORM_BYTES
    body = b"x" * (limit + over)
    parts: Iterator[bytes] = (body[at : at + 100] for at in range(0, len(body), 100))
    answer = small().post(path, content=parts if chunked else body)
    if over > 0:
        assert answer.status_code == 413
    else:
        assert (answer.status_code, answer.text) == (200, str(len(body)))


@pytest.mark.parametrize("length", ["9" * 15, "9" * 5000, "-1", "+1", "1e3", "٣"])
def test_a_length_that_is_none_is_refused(length: str) -> None:
    answer = small().post("/x", headers={"content-length": length.encode()})
    assert answer.status_code == 413


@pytest.mark.parametrize("path", ["/break", "/traceback", "/packed"])
def test_failures_say_nothing_about_the_inside(path: str) -> None:
    answer = small().get(path)
    assert answer.status_code == 500
    assert "secret" not in answer.text and set(answer.json()) == {"detail"}
    assert all(answer.headers[name] == value for name, value in HEADERS.items())


def test_headers_of_the_app_that_open_it_are_replaced() -> None:
    answer = small().get("/open")
    assert "access-control-allow-origin" not in answer.headers
    assert answer.headers["x-frame-options"] == "DENY"


@pytest.mark.parametrize("prefix", ["", "/accel"])
def test_scripts_of_the_page_alone_may_run(prefix: str) -> None:
    test = small(prefix="/accel")
    answer = test.get(f"{prefix}/")
    [nonce] = re.findall(r'<script nonce="([^"]+)">', answer.text)
    assert f"'nonce-{nonce}'" in answer.headers["content-security-policy"]
    for path in HTML:
        other = test.get(prefix + path)
        assert other.text == SCRIPT
        assert other.headers["content-security-policy"] == security.FOR_DATA


def test_streams_are_not_held_back() -> None:
    assert small().get("/stream").text == "ab"


def test_web_sockets_are_closed() -> None:
    from starlette.websockets import WebSocketDisconnect

    with pytest.raises(WebSocketDisconnect), small().websocket_connect("/gradio_api/stream/1"):
        pass


@pytest.mark.parametrize("path", ["/accel/x", "/x", "/accel", "/accelerate"])
def test_a_proxy_may_leave_its_prefix_on_or_not(path: str) -> None:
    assert small(prefix="/accel").get(path).status_code == 200
    wanted = {"/accel/x": "/x", "/accel": "/"}.get(path, path)
    assert security._below("/accel", path) == wanted


# the guard before the whole app


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Memory:
    return service(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def locked(served: Memory) -> Iterator[TestClient]:
    """The app with a login."""
    with client(served, door(), blocks=in_loop(lambda: pages(served))) as entered:
        yield entered


@pytest.fixture(scope="module")
def users(locked: TestClient) -> dict[str, dict[str, str]]:
    """The headers of each user's session."""
    return {name: logged_in(locked, name) for name in USERS}


def every_route(test: TestClient) -> list[tuple[str, str]]:
    """Method and path of every route, those of Gradio and of the REST interface too."""
    outer: Any = test.app
    return sorted(set(_routes(outer._app.routes, "")))


def _routes(routes: Any, base: str) -> Iterator[tuple[str, str]]:
    for route in routes:
        path = base + re.sub(r"{[^}]*}", "x", getattr(route, "path", ""))
        included = getattr(route, "original_router", None)
        if included is not None:
            yield from _routes(included.routes, base)
        elif hasattr(route, "app") and hasattr(route, "routes"):
            yield from _routes(route.routes, path)
        else:
            yield from ((method, path) for method in getattr(route, "methods", None) or ())


STREAMS = ("heartbeat", "queue/data", "upload_progress", "dev/reload")
"""Routes that never end; they are asked for without a session only."""


def test_every_route_has_the_headers_and_none_breaks(
    locked: TestClient, users: dict[str, dict[str, str]]
) -> None:
    routes = every_route(locked)
    paths = {path for _, path in routes}
    assert {"/login", "/api/v1/generate", "/gradio_api/upload", "/config"} <= paths
    for method, path in routes:
        for session in ({}, users["ada"]):
            if session and any(part in path for part in (*STREAMS, "logout")):
                continue
            answer = locked.request(method, path, headers=session)
            where = (method, path, answer.status_code, answer.text[:200])
            assert all(answer.headers.get(name) == value for name, value in HEADERS.items()), where
            assert "frame-ancestors 'none'" in answer.headers["content-security-policy"], where
            assert not [name for name in answer.headers if name.startswith("access-control")], where


def test_without_a_session_no_route_answers_but_the_login_and_health(locked: TestClient) -> None:
    for method, path in every_route(locked):
        answer = locked.request(method, path)
        if path in ("/login", "/api/v1/health") or path.startswith("/gradio_api/proxy="):
            continue
        assert answer.status_code in (401, 404), (method, path, answer.status_code)
        assert answer.status_code == 401 or security._CLOSED.match(path), (method, path)
    assert locked.get("/", headers=PAGE).headers["location"] == "/login"


def test_gradios_own_login_opens_nothing(locked: TestClient) -> None:
    answer = locked.post("/login/", data={"username": "ada", "password": PASSWORD})
    locked.cookies.clear()
    assert "access-token" not in str(answer.headers.get("set-cookie"))


@pytest.mark.parametrize("path", ["/monitoring", "/gradio_api/proxy=http://example.org/x"])
def test_what_is_not_used_is_closed(locked: TestClient, users: Any, path: str) -> None:
    assert locked.get(path, headers=users["ada"]).status_code == 404


def test_every_script_of_the_page_has_the_nonce_and_each_page_another(
    locked: TestClient, users: Any
) -> None:
    nonces = set()
    for _ in range(2):
        answer = locked.get("/", headers=PAGE | users["ada"])
        assert answer.status_code == 200
        inline = re.findall(r"<script(?![^>]*\bsrc\s*=)[^>]*>", answer.text)
        [nonce] = {re.search(r'nonce="([^"]+)"', tag).group(1) for tag in inline}  # type: ignore[union-attr]
        assert f"'nonce-{nonce}'" in answer.headers["content-security-policy"]
        assert int(answer.headers["content-length"]) == len(answer.content)
        nonces.add(nonce)
    assert len(nonces) == 2
    script = re.search(r"script-src ([^;]*)", security.FOR_PAGE)
    assert script is not None and "unsafe-inline" not in script[1] and "*" not in script[1]


# logging in


def test_a_browser_gets_a_page_and_is_sent_on_others_get_json(locked: TestClient) -> None:
    form = {"username": "ada", "password": PASSWORD}
    assert "<form" in locked.get("/login", headers=PAGE).text
    browser = locked.post("/login", data=form, headers=PAGE)
    assert (browser.status_code, browser.headers["location"]) == (303, "/")
    other = locked.post("/login", data=form)
    assert other.json() == {"success": True}
    for answer in (browser, other):
        cookie = answer.headers["set-cookie"].lower()
        assert "httponly" in cookie and "samesite=lax" in cookie and PASSWORD not in cookie
    locked.cookies.clear()


@pytest.mark.parametrize("accept", ["text/html", "*/*"])
def test_what_was_typed_is_not_said_again(locked: TestClient, accept: str) -> None:
    form = {"username": "<script>x</script>", "password": "<b>guess</b>"}
    answer = locked.post("/login", data=form, headers={"accept": accept})
    assert answer.status_code == 401
    assert "x</script>" not in answer.text and "guess" not in answer.text


def test_forty_bad_logins_over_http(served: Memory) -> None:
    clock = Clock()
    test = client(served, door(clock))
    bad = [test.post("/login", data={"username": "ada", "password": "no"}) for _ in range(40)]
    assert [answer.status_code for answer in bad] == [401] * FREE + [429] * (40 - FREE)
    good = {"username": "ada", "password": PASSWORD}
    waiting = test.post("/login", data=good)
    assert waiting.status_code == 429 and "set-cookie" not in waiting.headers
    assert test.post("/login", data=good | {"username": "bob"}).status_code == 200
    clock.now += int(waiting.headers["retry-after"])
    assert test.post("/login", data=good).status_code == 200


def test_a_session_is_over_after_logout(locked: TestClient) -> None:
    session = logged_in(locked, "bob")
    assert locked.get("/api/v1/jobs", headers=session).status_code == 200
    locked.get("/logout", headers=session)  # Gradio's; a link changes nothing
    assert locked.get("/api/v1/jobs", headers=session).status_code == 200
    assert locked.post("/logout", headers=session).status_code == 303
    assert locked.get("/api/v1/jobs", headers=session).status_code == 401


@pytest.mark.parametrize("cookie", ["accel_session=", "accel_session=x", "access-token=x", "ä=1"])
def test_no_other_cookie_is_a_session(locked: TestClient, cookie: str) -> None:
    answer = locked.get("/api/v1/jobs", headers={"cookie": cookie.encode()})
    assert answer.status_code == 401


# files through Gradio


def call(test: TestClient, name: str, data: list[Any], headers: dict[str, str]) -> tuple[str, Any]:
    """The last event of a call of one of Gradio's endpoints."""
    asked = test.post(f"/gradio_api/call/{name}", json={"data": data}, headers=headers)
    assert asked.status_code == 200, asked.text
    told = test.get(f"/gradio_api/call/{name}/{asked.json()['event_id']}", headers=headers)
    event, _, rest = told.text.strip().rpartition("event: ")[2].partition("\n")
    return event, json.loads(rest.removeprefix("data: "))


def test_pages_are_told_who_asks(locked: TestClient, users: Any, served: Memory) -> None:
    for name in USERS:
        assert call(locked, "whoami", [], users[name]) == ("complete", [name])
    with client(served, blocks=in_loop(lambda: pages(served))) as unlocked:
        assert call(unlocked, "whoami", [], {}) == ("complete", ["local"])


def test_a_shown_picture_keeps_its_bytes_and_has_a_name_that_cannot_be_guessed(
    locked: TestClient, users: Any, served: Memory
) -> None:
    [job] = served.submit("ada", [spec()])
    event, [shown] = call(locked, "show", [job.id], users["ada"])
    assert event == "complete" and re.search(r"/[0-9a-f]{64}/picture\.png$", shown["path"])
    path = f"/gradio_api/file={shown['path']}"
    assert locked.get(path, headers=users["ada"]).content == png()
    assert locked.get(path).status_code == 401


def test_nobody_is_shown_anothers_picture(locked: TestClient, users: Any, served: Memory) -> None:
    [job] = served.submit("ada", [spec()])
    event, said = call(locked, "show", [job.id], users["bob"])
    assert event == "error" and job.id not in str(said)


def test_a_failing_event_says_nothing_about_the_inside(locked: TestClient, users: Any) -> None:
    event, said = call(locked, "fail", ["x"], users["ada"])
    assert event == "error" and "secret" not in str(said)


@pytest.mark.parametrize("route", ["file=", "file/"])
def test_only_ones_own_results_are_sent(
    locked: TestClient, users: Any, served: Memory, route: str
) -> None:
    jobs = {name: served.submit(name, [spec()])[0] for name in USERS}
    paths = {name: served.file(name, job.id, "picture") for name, job in jobs.items()}
    for name in USERS:
        for owner, path in paths.items():
            answer = locked.get(f"/gradio_api/{route}{path}", headers=users[name])
            assert (answer.status_code == 200) is (owner == name), (name, owner)
            assert owner == name or answer.status_code == 403


@pytest.mark.parametrize("route", ["file=", "file/", "/file=", "file=/"])
def test_no_other_file_is_sent(
    locked: TestClient, users: Any, served: Memory, route: str, tmp_path: Path
) -> None:
    [job] = served.submit("ada", [spec()])
    mine = served.file("ada", job.id, "picture")
    (mine.parent / "notes.txt").write_text("secret")
    (mine.parent / "link.png").symlink_to("/etc/passwd")
    (tmp_path / "other.png").write_bytes(png())
    wanted = [
        "/etc/passwd",
        "/proc/self/environ",
        served.folder / "queue.sqlite",
        mine.parent,
        mine.parent / "notes.txt",
        mine.parent / "link.png",
        f"{mine}/../notes.txt",
        f"{served.outputs}/../queue.sqlite",
        tmp_path / "other.png",
        "queue.sqlite",
        "../../etc/passwd",
        "http://evil.example/x.png",
        "\\\\evil\\share",
        "file:///etc/passwd",
        f"{mine}%00",
        "a" * 5000,
        "",
    ]
    for path in wanted:
        answer = locked.get(f"/gradio_api/{route}{path}", headers=users["ada"])
        assert answer.status_code in (403, 404), (path, answer.status_code)
        assert b"secret" not in answer.content and b"root:" not in answer.content


def test_an_event_reads_no_file_that_was_not_uploaded(
    locked: TestClient, users: Any, served: Memory
) -> None:
    [job] = served.submit("ada", [spec()])
    for path in ("/etc/passwd", str(served.file("ada", job.id, "picture"))):
        given = {"path": path, "meta": {"_type": "gradio.FileData"}}
        event, said = call(locked, "take", [given], users["bob"])
        assert event == "error", said


def test_an_uploaded_file_is_read_by_the_event_it_was_uploaded_for(
    locked: TestClient, users: Any
) -> None:
    files = {"files": ("../../evil.png", png(), "image/png")}
    [path] = locked.post("/gradio_api/upload", files=files, headers=users["bob"]).json()
    assert re.search(r"/[0-9a-f]{64}/[^/]*evil\.png$", path) and ".." not in path
    given = {"path": path, "meta": {"_type": "gradio.FileData"}}
    event, [said] = call(locked, "take", [given], users["bob"])
    assert event == "complete" and said


@pytest.mark.parametrize("route", ["/gradio_api/upload", "/api/v1/uploads"])
@pytest.mark.parametrize("size", [1001, 40_000, 70_000, 3_000_000])
def test_a_file_that_is_too_large_is_refused_and_leaves_nothing(
    tmp_path: Path, route: str, size: int
) -> None:
    small = service(tmp_path, upload_bytes=1000, lora_bytes=1000)
    field = "files" if "gradio" in route else "file"
    with client(small, blocks=in_loop(lambda: pages(small))) as test:
        before = everything(Path.cwd(), tmp_path)
        answer = test.post(route, files={field: ("a.png", b"x" * size)})
        assert answer.status_code == 413
        assert everything(Path.cwd(), tmp_path) == before


@given(
    name=st.text(min_size=1, max_size=40)
    | st.sampled_from(["../../x.png", "/etc/x", "a\\b", "x" * 999])
)
@settings(max_examples=60, suppress_health_check=list(HealthCheck))
def test_no_name_brings_a_file_elsewhere(locked: TestClient, users: Any, name: str) -> None:
    copies = Path.cwd() / "gradio"
    before = everything(Path.cwd())
    plain = name.encode("utf-8", "replace").decode()
    answer = locked.post(
        "/gradio_api/upload",
        files={"files": (plain, name.encode("utf-8", "replace"))},
        headers=users["ada"],
    )
    assert answer.status_code in (200, 400, 413), answer.text
    new = everything(Path.cwd()) - before
    assert all(path.parent.parent == copies for path in new)


def everything(*folders: Path) -> set[Path]:
    """All files below some folders."""
    return {path for folder in folders for path in folder.rglob("*") if path.is_file()}


def spec() -> Any:
    """A job of the least size."""
    from app.serve.jobs import Spec

    return Spec(request={"prompt": "a boat"})


def test_pages_behind_a_proxy_know_their_address_and_are_as_closed(served: Memory) -> None:
    address = "https://pictures.example/accel"
    pages_of = in_loop(lambda: pages(served))
    with client(served, door(), blocks=pages_of, root_path=address) as test:
        assert test.get("/accel/", headers=PAGE).headers["location"] == "/accel/login"
        form = {"username": "ada", "password": PASSWORD}
        entered = test.post("/accel/login", data=form, headers=PAGE)
        assert entered.headers["location"] == "/accel/"
        assert "Path=/accel/" in entered.headers["set-cookie"]
        session = {"cookie": entered.headers["set-cookie"].partition(";")[0]}
        test.cookies.clear()
        for path in ("/accel/", "/accel", "/"):
            assert f'"root":"{address}"' in test.get(path, headers=PAGE | session).text
        for prefix in ("/accel", ""):
            stolen = f"{prefix}/gradio_api/file=/etc/passwd"
            assert test.get(stolen, headers=session).status_code == 403
            assert test.get(f"{prefix}/gradio_api/info").status_code == 401
            assert test.get(f"{prefix}/gradio_api/info", headers=session).status_code == 200
