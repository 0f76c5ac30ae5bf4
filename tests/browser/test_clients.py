"""The real app as programs meet it: Gradio's client, the REST interface, and the network's edge.

One server with a login for all; it, its worker and its examiner note whom they talk to.
"""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import httpx
import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError, AuthenticationError

from accel.plan import Plan, methods
from app import accounts, metadata
from browser.conftest import served

USERS = ("ada", "bob")
PASSWORD = "a password of length"
PICTURE = {"prompt": "a boat on the sea", "model": "scenes-flux", "steps": 2, "seed": 5}
CACHED = {"plan": 1, "cache": {"EasyCache": {}}}
SILENCING = ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "DISABLE_TELEMETRY", "DO_NOT_TRACK")
NOTES = """
import os, sys
WHERE = {"socket.connect": 1, "socket.sendto": 1, "socket.sendmsg": 1, "socket.getaddrinfo": 0,
         "socket.gethostbyname": 0, "socket.gethostbyaddr": 0}
def note(event, arguments):
    if event in WHERE:
        with open(os.path.join(os.path.dirname(__file__), "notes"), "a") as file:
            file.write(f"{arguments[WHERE[event]]!r}\\n")
sys.addaudithook(note)
"""
"""What every Python process of the server runs first."""


class Server:
    """`accel ui` with a login.

    Attributes:
        address: Where it answers.
        notes: Whom its processes have talked to.
    """

    def __init__(self, address: str, notes: Path) -> None:
        self.address = address
        self.notes = notes

    @contextmanager
    def client(self, name: str, folder: Path) -> Iterator[Client]:
        """Gradio's client, logged in."""
        options = {"verbose": False, "analytics_enabled": False, "download_files": folder / name}
        client = Client(self.address, auth=(name, PASSWORD), **options)
        yield client
        client.close()

    @contextmanager
    def plain(self, name: str) -> Iterator[httpx.Client]:
        """A client that knows nothing of Gradio, logged in."""
        with httpx.Client(base_url=self.address, timeout=300) as client:
            form = {"username": name, "password": PASSWORD}
            assert client.post("/login", data=form).status_code == 200
            yield client


@pytest.fixture(scope="module")
def noted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of processes that note whom they talk to."""
    folder = tmp_path_factory.mktemp("noted")
    (folder / "sitecustomize.py").write_text(NOTES)
    loud = {name: value for name, value in os.environ.items() if name not in SILENCING}
    return {**loud, "PYTHONPATH": str(folder)}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, noted: dict[str, str]) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("clients")
    for name in USERS:
        accounts.add(folder / "people", name, PASSWORD)
    with served(folder, "--auth", "people", env=noted) as address:
        yield Server(address, Path(noted["PYTHONPATH"]) / "notes")


@pytest.fixture(scope="module")
def clients(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Client]]:
    """Gradio's client of each user."""
    folder = tmp_path_factory.mktemp("files")
    with ExitStack() as stack:
        yield [stack.enter_context(server.client(name, folder)) for name in USERS]


def last(running: Any) -> Any:
    """What a stream of answers ends with."""
    *_, answer = running
    return answer


def test_a_picture_by_a_client_is_its_owners_alone(clients: list[Client]) -> None:
    ada, bob = clients
    job, files = last(ada.submit(PICTURE, CACHED, api_name="/generate"))
    assert (job["state"], job["owner"]) == ("done", "ada")
    assert Plan.from_dict(job["spec"]["plan"]) == Plan.from_dict(CACHED)
    assert len(files) == len(job["result"]["files"])
    made, _ = metadata.read(next(Path(file) for file in files if file.endswith(".png")))
    assert {name: made.request[name] for name in PICTURE} == PICTURE
    assert ada.predict(job["id"], api_name="/status")[0] == job
    for name in ("/status", "/cancel"):
        with pytest.raises(AppError, match="no job"):
            bob.predict(job["id"], api_name=name)


def test_a_run_that_a_client_stops_ends_early(clients: list[Client]) -> None:
    ada, _ = clients
    seen = iter(ada.submit({**PICTURE, "steps": 200}, api_name="/generate"))
    job = next(seen)[0]
    while not job.get("progress", {}).get("step"):
        job = next(seen)[0]
    ada.predict(job["id"], api_name="/cancel")
    ended, _ = last(seen)
    assert ended["state"] == "stopped" and 0 < ended["result"]["steps"] < 200


@pytest.mark.parametrize("settings", [{"steps": 1000}, {"prompt": 3}, {"model": "someone/else"}])
def test_a_client_is_told_why_not(clients: list[Client], settings: dict[str, Any]) -> None:
    with pytest.raises(AppError, match=next(iter(settings))):
        clients[0].predict({**PICTURE, **settings}, api_name="/generate")


def test_without_a_login_there_is_no_client(server: Server) -> None:
    with pytest.raises(AuthenticationError):
        Client(server.address, auth=("ada", "guess"), verbose=False)
    with pytest.raises((AuthenticationError, ValueError)):
        Client(server.address, verbose=False)


def test_a_plan_is_admitted_exactly_if_its_method_fits(
    server: Server, clients: list[Client]
) -> None:
    listed = clients[0].predict("scenes-unet", api_name="/methods")
    unfit = {one["name"]: one["unfit"] for one in listed}
    assert set(unfit) == set(methods()) and None in unfit.values() and any(unfit.values())
    with server.plain("bob") as bob:
        for one in listed:
            layer, name = one["name"].split(".")
            plan = {"plan": 1, layer: {name: {}}}
            order = {"request": {**PICTURE, "model": "scenes-unet"}, "plan": plan}
            answer = bob.post("/api/v1/generate", json=order)
            assert answer.status_code == (422 if one["unfit"] else 202), answer.text
            if one["unfit"]:
                assert answer.json() == {"detail": one["unfit"]}
            else:
                bob.post(f"/api/v1/jobs/{answer.json()['id']}/cancel")
        assert bob.post("/api/v1/generate", content=b"{").status_code in (400, 422)
        kept = [job["plan"] for job in bob.get("/api/v1/jobs", params={"limit": 200}).json()]
        assert len(kept) == list(unfit.values()).count(None)


def test_the_server_talks_to_this_machine_alone(server: Server, noted: dict[str, str]) -> None:
    with server.plain("ada") as ada:
        assert "gradio" in ada.get("/", headers={"accept": "text/html"}).text
        job = ada.post("/api/v1/generate", json={"request": PICTURE}).json()
        while job["ended"] is None:
            job = ada.get(f"/api/v1/jobs/{job['id']}").json()
        assert job["state"] == "done"
    outside = [note for note in notes(server.notes) if not is_local(note)]
    assert not outside
    call = "import socket; socket.socket(type=socket.SOCK_DGRAM).connect_ex(('192.0.2.1', 9))"
    subprocess.run([sys.executable, "-c", call], env=noted, check=True)
    assert ("192.0.2.1", 9) in notes(server.notes), "the notes are written"


def notes(file: Path) -> list[Any]:
    """Addresses and names, as they were given."""
    lines = file.read_text().splitlines() if file.exists() else []
    return [ast.literal_eval(line) for line in lines]


def is_local(address: Any) -> bool:
    """Whether an address or name stays on this machine: a path does."""
    host = address[0] if isinstance(address, tuple) else address
    if isinstance(address, (str, bytes)) and os.sep in os.fsdecode(address):
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host in (None, "localhost")
