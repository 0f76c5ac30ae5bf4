"""``accel ui``: what it refuses, where it stands, how it starts and ends."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from saved import done, run
from starlette.testclient import TestClient
from typer.testing import CliRunner
from web import BASE, PASSWORD, client, door, in_loop, pages, service

from accel.errors import AccelError, BadInput
from app import launch
from app.accounts import FREE, FREE_OF_ADDRESS, Accounts
from app.cli import app
from app.request import Serving

LOOPBACK = ("127.0.0.1", "127.8.9.1", "::1", "localhost")
OTHERS = ("0.0.0.0", "::", "192.168.1.7", "2001:db8::1", "example.org", "localhost.example", "")


LIGHT = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import app.serve.service, app.ui.page, web
app.serve.service.Service, app.ui.page.build = web.Memory, web.pages
import app.cli
app.cli.main()
"""
"""The command line, with a service and pages that load nothing."""


# who can reach it


@pytest.mark.parametrize("host", [*LOOPBACK, *OTHERS])
def test_loopback_is_what_only_this_machine_reaches(host: str) -> None:
    assert launch.is_loopback(host) is (host in LOOPBACK)


@pytest.mark.parametrize(
    ("host", "auth", "public", "share"),
    list(product(["127.0.0.1", "0.0.0.0"], [None, Path("users")], [False, True], [False, True])),
)
def test_others_reach_it_only_with_a_login_or_if_that_is_said(
    host: str, auth: Path | None, public: bool, share: bool
) -> None:
    asked = Serving(host=host, auth=auth, public=public, share=share)
    if auth or public or (host == "127.0.0.1" and not share):
        launch.check_reach(asked)
    else:
        with pytest.raises(BadInput, match=r"--auth FILE.*--public"):
            launch.check_reach(asked)


@pytest.mark.parametrize("options", [("--host", "0.0.0.0"), ("--share",)])
def test_the_command_refuses_before_anything_is_made(
    options: tuple[str, ...], tmp_path: Path
) -> None:
    out = tmp_path / "outputs"
    result = run("ui", *options, "--out", out)
    assert result.exit_code == 2 and "--auth" in result.stderr
    assert not out.exists()


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = run("ui", "--port", port, "--out", tmp_path / "outputs")
    assert result.exit_code == 2 and str(port) in result.stderr


@pytest.mark.parametrize("option", [("--port", "-1"), ("--port", "70000"), ("--auth", "nowhere")])
def test_options_that_will_not_do_are_named(option: tuple[str, str], tmp_path: Path) -> None:
    result = run("ui", *option, "--out", tmp_path / "outputs")
    assert result.exit_code == 2 and option[0] in result.stderr + result.stdout


def test_without_gradio_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    result = run("ui", "--out", tmp_path / "outputs")
    assert result.exit_code == 2 and "diffusers-accel[ui]" in result.stderr


# users


def test_a_user_is_added_by_typing_the_password_twice(tmp_path: Path) -> None:
    file = tmp_path / "users"
    typed = f"{PASSWORD}\n{PASSWORD}\n"
    command = ["ui", "--add-user", "ada", "--auth", str(file)]
    result = CliRunner().invoke(app, command, input=typed)
    assert result.exit_code == 0, result.output
    assert PASSWORD not in result.output
    assert Accounts.read(file).accepts("ada", PASSWORD)


@pytest.mark.parametrize(
    ("command", "typed"),
    [
        (["--add-user", "ada"], ""),
        (["--add-user", "ada", "--auth", "users"], "short\nshort\n"),
        (["--add-user", "a/b", "--auth", "users"], f"{PASSWORD}\n{PASSWORD}\n"),
    ],
)
def test_a_user_that_will_not_do_is_not_written(
    command: list[str], typed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["ui", *command], input=typed)
    assert result.exit_code == 2
    assert not list(tmp_path.iterdir())


# where it stands


@pytest.mark.parametrize("fault", [None, RuntimeError("broke"), KeyboardInterrupt()])
def test_it_stands_in_an_empty_folder_and_leaves_as_it_came(
    fault: BaseException | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", "/")
    monkeypatch.setenv("GRADIO_ALLOWED_PATHS", "/etc")
    before = Path.cwd(), tempfile.gettempdir()
    try:
        with launch._empty_folder() as folder:
            assert Path.cwd() == folder and not list(folder.iterdir())
            assert Path(tempfile.gettempdir()).resolve() == folder
            assert not [name for name in os.environ if name.startswith("GRADIO_")]
            if fault is not None:
                raise fault
    except (RuntimeError, KeyboardInterrupt) as raised:
        assert raised is fault
    assert (Path.cwd(), tempfile.gettempdir()) == before and not folder.exists()


def test_gradio_is_told_what_it_may_serve(tmp_path: Path) -> None:
    made = service(tmp_path)
    blocks = in_loop(lambda: pages(made))
    client(made, blocks=blocks)
    assert blocks.allowed_paths == [str(made.outputs)]
    assert not blocks.show_error and not blocks.enable_monitoring and not blocks.ssr_mode
    assert blocks.max_file_size == made.limits.largest_upload
    assert blocks.delete_cache == launch.COPIES and not blocks.run_history
    assert not blocks.mcp_server and not blocks.pwa


def test_the_pages_ask_nobody_elsewhere(tmp_path: Path) -> None:
    from app.ui import page

    blocks = in_loop(lambda: page.build(service(tmp_path)))
    assert blocks.analytics_enabled is False


def test_names_come_from_what_was_asked() -> None:
    asked = Serving(
        host="mine.lan", root_path="https://Pictures.Example/accel", allow_host=["Box.local"]
    )
    names = launch._names(asked, "https://abc.gradio.live")
    wanted = {"mine.lan", "pictures.example", "box.local", "abc.gradio.live"}
    assert wanted <= names and len(names) <= len(wanted) + 1


# how it starts and ends


def test_help_imports_neither_gradio_nor_torch() -> None:
    for words in (["--help"], ["ui", "--help"]):
        code = (
            f"import sys; sys.argv = ['accel', *{words}]\n"
            "import app.cli\n"
            "try:\n    app.cli.main()\nexcept SystemExit as end:\n    assert not end.code\n"
            "late = {'gradio', 'torch', 'fastapi', 'uvicorn', 'diffusers'} & set(sys.modules)\n"
            "assert not late, late"
        )
        subprocess.run([sys.executable, "-c", code], check=True, timeout=60, capture_output=True)


def test_help_names_every_option() -> None:
    text = done("ui", "--help").output
    for option in ("host", "port", "out", "model", "device", "auth", "add-user", "share", "public"):
        assert f"--{option}" in text


@contextmanager
def served(folder: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`accel ui` in a process of its own, and its address."""
    temporary = folder / "tmp"
    temporary.mkdir()
    options = ["ui", "--port", "0", "--device", "cpu", "--out", "outputs"]
    server = subprocess.Popen(
        [sys.executable, "-c", LIGHT, *options],
        cwd=folder,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(temporary)},
    )
    assert server.stderr is not None
    try:
        yield server, next(line for line in server.stderr if line.startswith("http")).split()[0]
    finally:
        server.kill()
        server.wait()
        server.stderr.close()


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_it_starts_answers_and_ends_when_told(tmp_path: Path, end: signal.Signals) -> None:
    with served(tmp_path) as (server, address):
        health = json.loads(_get(f"{address}/api/v1/health"))
        page = _get(f"{address}/")
        server.send_signal(end)
        assert server.wait(60) == 0
    assert health["status"] == "ok" and b"gradio" in page
    assert (tmp_path / "outputs" / "closed").exists()
    assert not list((tmp_path / "tmp").glob("accel-ui-*"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["outputs", "tmp"]


def test_it_sleeps_while_nobody_asks(tmp_path: Path) -> None:
    """Gradio's queue wakes two thousand times a second, unless it is told not to."""
    with served(tmp_path) as (server, address):
        _get(f"{address}/")
        before, begin = _wakes(server.pid), time.monotonic()
        time.sleep(2)
        assert _wakes(server.pid) - before < 400 * (time.monotonic() - begin)


def _wakes(process: int) -> int:
    """How often the threads of a process have waited for something, and gone on."""
    known = Path(f"/proc/{process}/task").glob("*/status")
    lines = [line for path in known for line in path.read_text().splitlines()]
    return sum(int(line.split()[1]) for line in lines if line.startswith("voluntary_ctxt"))


def _get(address: str) -> bytes:
    for _ in range(100):
        try:
            with urllib.request.urlopen(address, timeout=30) as answer:
                return answer.read()
        except urllib.error.HTTPError:
            raise
        except OSError:
            time.sleep(0.1)
    raise TimeoutError(address)


def test_a_stranger_names_get_no_answer(tmp_path: Path) -> None:
    test = client(service(tmp_path))
    assert test.get("/api/v1/health").status_code == 200
    evil: dict[str, Any] = {"host": BASE.replace("127.0.0.1", "evil.example")[7:]}
    assert test.get("/api/v1/health", headers=evil).status_code == 421


@pytest.mark.parametrize("how", [{"share": True}, {"root_path": "https://pictures.example/accel"}])
def test_who_fails_behind_a_tunnel_locks_out_nobody_else(
    tmp_path: Path, how: dict[str, Any]
) -> None:
    enter = visitors(tmp_path, "127.0.0.1", how)
    for number in range(FREE_OF_ADDRESS):
        enter("203.0.113.5", f"name {number}", "guess")
    for _ in range(FREE):
        enter("203.0.113.5", "ada", "guess")
    assert enter("203.0.113.5", "ada", PASSWORD) == 429
    assert enter("203.0.113.6", "ada", PASSWORD) == 200
    assert enter("203.0.113.6, 203.0.113.5", "ada", PASSWORD) == 429, "what stands before"


@pytest.mark.parametrize(
    ("peer", "how"),
    [
        ("127.0.0.1", {}),
        ("192.0.2.9", {}),
        ("192.0.2.9", {"share": True}),
        ("192.0.2.9", {"root_path": "https://pictures.example/accel"}),
    ],
)
def test_where_a_visitor_says_to_come_from_counts_only_from_a_tunnel(
    tmp_path: Path, peer: str, how: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "*")
    enter = visitors(tmp_path, peer, how)
    for number in range(FREE):
        assert enter(f"203.0.113.{number}", "ada", "guess") == 401
    assert enter("203.0.113.200", "ada", PASSWORD) == 429


def visitors(folder: Path, peer: str, how: dict[str, Any]) -> Callable[[str, str, str], int]:
    """Tries to log in from an address that is forwarded by a peer; the status of the answer."""
    asked = Serving(**how)
    config = launch._config(launch.build(service(folder), None, asked, door()), asked)
    config.load()
    test = TestClient(config.loaded_app, BASE, client=(peer, 1))  # type: ignore[arg-type]

    def enter(address: str, name: str, password: str) -> int:
        form = {"username": name, "password": password}
        return test.post("/login", data=form, headers={"x-forwarded-for": address}).status_code

    return enter


def test_a_tunnel_leads_to_the_port_or_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    from gradio import networking

    asked: list[Any] = []

    def tunnel(host: str, port: int, token: str, address: None, certificate: None) -> str:
        asked.append((host, port))
        if len(asked) > 1:
            raise RuntimeError("Could not get share link")
        return "https://abc.gradio.live"

    monkeypatch.setattr(networking, "setup_tunnel", tunnel)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        assert launch._tunnel(listener) == "https://abc.gradio.live"
        assert asked == [listener.getsockname()]
        with pytest.raises(AccelError, match=r"--share.*network"):
            launch._tunnel(listener)
