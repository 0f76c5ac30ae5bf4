"""Worlds of processes: a function runs in every rank of a torch.distributed group on the CPU.

Starting a process that has torch and diffusers in it takes seconds, so a world stays until it is
closed, or until something in it fails: what failed in one rank leaves the others in the middle of
an exchange.
"""

import multiprocessing as processes
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

PATIENCE = 120.0
"""Seconds that a rank waits for the others, and the test for all of them."""


class Failed(Exception):
    """A function failed in a rank; the message is its traceback."""


class World:
    """Processes that run functions together; `run` starts them where there are none."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._members: list[tuple[Any, Connection]] = []

    def run(self, function: Callable[..., Any], *args: Any, **named: Any) -> list[Any]:
        """What the function returned in each rank; it has to be importable.

        Raises:
            Failed: If it failed in one of them.
        """
        if not self._members:
            self._start()
        for _, link in self._members:
            link.send((function, args, named))
        found: dict[int, Any] = {}
        while len(found) < self.size:
            missing = [link for rank, (_, link) in enumerate(self._members) if rank not in found]
            ready = wait(missing, PATIENCE)
            if not ready:
                self.close()
                raise Failed(f"ranks {set(range(self.size)) - found.keys()} gave no answer")
            for rank, (_, link) in enumerate(self._members):
                if link in ready:
                    found[rank] = self._answer(link, rank)
        return [found[rank] for rank in range(self.size)]

    def _answer(self, link: Connection, rank: int) -> Any:
        try:
            told, value = link.recv()
        except EOFError:
            told, value = "failed", f"rank {rank} died"
        if told == "failed":
            self.close()
            raise Failed(value)
        return value

    def _start(self) -> None:
        context = processes.get_context("spawn")
        folder = tempfile.mkdtemp(prefix="world-")
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            arguments = (theirs, rank, self.size, folder)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._members.append((process, ours))

    def close(self) -> None:
        """End them."""
        for process, link in self._members:
            process.kill()
            process.join()
            link.close()
        self._members.clear()


def _serve(link: Connection, rank: int, size: int, folder: str) -> None:
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    store = distributed.FileStore(str(Path(folder) / "store"), size)
    distributed.init_process_group(
        "gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=PATIENCE)
    )
    while True:
        try:
            function, args, named = link.recv()
        except EOFError:
            return
        try:
            link.send(("done", function(*args, **named)))
        except BaseException:
            link.send(("failed", f"rank {rank} of {size}:\n{traceback.format_exc()}"))
            return
