"""Frames in, pictures out: queues with a thread at the other end; nobody waits for a disk."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, Self


class Feed:
    """Frames of a source that is read in a thread of its own.

    Of a file every frame is kept: the reader waits where the queue is full. Of a live source the
    newest frame counts: those that wait are dropped, and counted, as another one comes.

    Args:
        source: Gives the frames. It is iterated in the thread, and closed there.
        live: Whether it is live.
        waiting: Frames that may wait; of a live source it is 1.

    Attributes:
        dropped: Frames that nobody took.
    """

    def __init__(self, source: Iterable[Any], *, live: bool = False, waiting: int = 4) -> None:
        self._source, self._live = source, live
        self._room = 1 if live else max(1, waiting)
        self._frames: deque[Any] = deque()
        self._changed = threading.Condition()
        self._done = self._closed = False
        self._error: BaseException | None = None
        self.dropped = 0
        self._thread = threading.Thread(target=self._read, name="frames", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take no more frames, and wait until the source is let go of."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def __iter__(self) -> Iterator[Any]:
        """The frames, until the source ends.

        Raises:
            Exception: What the source raised, behind all frames that it gave before.
        """
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._frames or self._done)
                if not self._frames:
                    break
                frame = self._frames.popleft()
                self._changed.notify_all()
            yield frame
        if self._error is not None:
            raise self._error

    def _read(self) -> None:
        frames = iter(self._source)
        try:
            for frame in frames:
                if not self._put(frame):
                    break
        except BaseException as error:  # it is raised where the frames are taken
            self._error = error
        finally:
            _close(frames)
            with self._changed:
                self._done = True
                self._changed.notify_all()

    def _put(self, frame: Any) -> bool:
        """Queue a frame; false where no more are wanted."""
        with self._changed:
            if self._live:
                self.dropped += len(self._frames)
                self._frames.clear()
            self._changed.wait_for(lambda: self._closed or len(self._frames) < self._room)
            if self._closed:
                return False
            self._frames.append(frame)
            self._changed.notify_all()
            return True


def _close(frames: Iterator[Any]) -> None:
    close = getattr(frames, "close", None)
    if close is not None:
        close()


class Outlet:
    """Hands pictures on in a thread of its own, in order; all of them before it is closed.

    Args:
        take: Called with each picture, in the thread.
        waiting: Pictures that may wait; who puts one more waits.
    """

    def __init__(self, take: Callable[[Any], None], waiting: int = 8) -> None:
        self._take, self._room = take, waiting
        self._pictures: deque[Any] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="pictures", daemon=True)

    def put(self, picture: Any) -> None:
        """Hand a picture on.

        Raises:
            Exception: What became of an earlier one.
        """
        with self._changed:
            self._changed.wait_for(lambda: len(self._pictures) < self._room or self._error)
            self._raise()
            self._pictures.append(picture)
            self._changed.notify_all()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        """Wait until all are handed on; raises what became of them, if nothing else was raised."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()
        if error is None:
            self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pictures or self._closed)
                if not self._pictures:
                    return
                picture = self._pictures[0]
            try:
                self._take(picture)
            except BaseException as error:  # it is raised where pictures are put
                with self._changed:
                    self._error = error
                    self._pictures.clear()
                    self._changed.notify_all()
                return
            with self._changed:
                self._pictures.popleft()
                self._changed.notify_all()
