"""What a download of each hub model that is not here will bring: asked beside everything else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import Event, Lock, Thread

from accel.errors import BadModel, NotWritten
from app import hub
from app.serve import catalogue


def fact(name: str) -> str:
    """Under which name the store keeps the bytes of a download."""
    return f"download {name}"


class Downloads:
    """Asks the hub for sizes in a thread, so that no page waits for a network.

    Where the hub does not answer, the size stays unknown until the next start.

    Args:
        names: The models that are offered.
        keep: Keeps a fact.
    """

    def __init__(self, names: Sequence[str], keep: Callable[[str, str], None]) -> None:
        self._names = names
        self._keep = keep
        self._closing = Event()
        self._keeping = Lock()
        self._thread = Thread(target=self._run, name="downloads", daemon=True)

    def start(self) -> None:
        """Begin, if there is a model that is not here."""
        if self._absent():
            self._thread.start()

    def close(self) -> None:
        """Keep nothing from now on; a question that is under way is not waited for."""
        self._closing.set()
        with self._keeping:
            pass

    def _absent(self) -> list[str]:
        of_hub = (name for name in self._names if hub.is_id(name))
        return [name for name in of_hub if catalogue.folder(name) is None]

    def _run(self) -> None:
        for name in self._absent():
            if self._closing.is_set():
                return
            try:
                size = hub.size(name)
            except BadModel:
                continue
            with self._keeping:
                if not self._closing.is_set():
                    self._write(name, size)

    def _write(self, name: str, size: int) -> None:
        try:
            self._keep(fact(name), str(size))
        except NotWritten:  # the disk is full, of which the queue tells
            return
