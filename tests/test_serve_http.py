"""A server process under many clients: what is admitted, and what it keeps in memory."""

import multiprocessing
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
import serve_toy

from app.serve.jobs import ENDED

CLIENTS, EACH, WAITING = 50, 4, 60
BATCHES, BATCH = 16, 20
GROWTH = 1.1
"""Of the resident memory, over half of the jobs."""


class Server:
    """A server process with a toy model.

    Args:
        folder: Of its results.
    """

    def __init__(self, folder: Path) -> None:
        self.log = folder / "log"
        self.log.mkdir()
        listener = socket.create_server(("127.0.0.1", 0), backlog=2 * CLIENTS)
        self.address = f"http://127.0.0.1:{listener.getsockname()[1]}/api/v1"
        arguments = (folder / "outputs", self.log, listener, WAITING)
        context = multiprocessing.get_context("spawn")
        self.process = context.Process(target=serve_toy.answer, args=arguments)
        self.process.start()
        listener.close()

    def close(self) -> None:
        """End it."""
        self.process.terminate()
        self.process.join(60)

    @property
    def resident(self) -> int:
        """Bytes of memory that it holds."""
        assert self.process.pid is not None
        return psutil.Process(self.process.pid).memory_info().rss


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path)
    yield made
    made.close()


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.address, timeout=120) as made:
        yield made


def order(seed: int, prompt: str = "a red fox") -> dict[str, object]:
    return {"request": {"prompt": prompt, "seed": seed}}


def became(client: httpx.Client, id: str, *states: str) -> str:
    """The state of a job, as soon as it is one of some."""
    while (state := str(client.get(f"/jobs/{id}").json()["state"])) not in states:
        time.sleep(0.05)
    return state


def test_of_many_clients_at_once_as_many_are_admitted_as_may_wait(
    server: Server, client: httpx.Client
) -> None:
    first = client.post("/generate", json=order(CLIENTS * EACH, "hold")).json()
    became(client, first["id"], "running")
    together = threading.Barrier(CLIENTS)

    def asks(number: int) -> list[httpx.Response]:
        with httpx.Client(base_url=server.address, timeout=120) as one:
            together.wait()
            seeds = range(number * EACH, (number + 1) * EACH)
            return [one.post("/generate", json=order(seed)) for seed in seeds]

    with ThreadPoolExecutor(CLIENTS) as pool:
        answers = [answer for some in pool.map(asks, range(CLIENTS)) for answer in some]
    admitted = [answer.json() for answer in answers if answer.status_code == 202]
    refused = [answer for answer in answers if answer.status_code == 429]
    assert len(admitted) == WAITING and len(refused) == CLIENTS * EACH - WAITING
    assert all(int(answer.headers["retry-after"]) > 0 for answer in refused)

    (server.log / "go").touch()
    admitted = [first, *admitted]
    for job in admitted:
        assert became(client, job["id"], *ENDED) == "done"
    kept = client.get("/jobs", params={"limit": 200}).json()
    assert {job["id"] for job in kept} == {job["id"] for job in admitted}
    assert sorted(serve_toy.runs(server.log)) == sorted(job["request"]["seed"] for job in admitted)


def test_memory_does_not_grow_with_the_jobs(server: Server, client: httpx.Client) -> None:
    held = []
    for batch in range(BATCHES):
        seeds = range(batch * BATCH, (batch + 1) * BATCH)
        jobs = [client.post("/generate", json=order(seed)).json()["id"] for seed in seeds]
        for id in jobs:
            assert became(client, id, *ENDED) == "done"
        held.append(server.resident)
    quarter = BATCHES // 4
    early, late = held[quarter : 2 * quarter], held[-quarter:]
    assert statistics.median(late) <= GROWTH * statistics.median(early)
