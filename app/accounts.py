"""Who may use the app: the file of users, delays after failed logins, and sessions.

The file has a user a line, ``NAME:scrypt$N$R$P$SALT$HASH`` with salt and hash in hexadecimal;
``accel ui --add-user NAME --auth FILE`` writes it.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address
from math import ceil
from pathlib import Path

from accel.errors import AccelError, BadInput
from app.files import write

ANYBODY = "local"
"""The owner of everything where there is no login; no user may have this name."""

SHORTEST, LONGEST = 10, 1024
FREE, FREE_OF_ADDRESS = 5, 30
LONGEST_WAIT, FORGOTTEN_AFTER, REMEMBERED = 900.0, 3600.0, 10_000
SESSION_SECONDS, SESSIONS = 7 * 24 * 3600.0, 20

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_HASH = re.compile(r"scrypt\$(\d+)\$(\d+)\$(\d+)\$([0-9a-f]{32})\$([0-9a-f]{64})")
_COST, _BLOCK, _LANES = 2**15, 8, 1


class Refused(AccelError):
    """A login with a name and a password that do not belong together."""


class Locked(AccelError):
    """A login that is not looked at because too many before it failed.

    Attributes:
        seconds: How long to wait.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        super().__init__(f"Too many failed logins: wait {ceil(seconds)} seconds and try again.")


def hashed(password: str) -> str:
    """A password as it stands in the file: scrypt with a fresh salt."""
    salt = secrets.token_bytes(16)
    digest = _scrypt(password, salt, _COST, _BLOCK, _LANES)
    return _written(salt, digest)


def _written(salt: bytes, digest: bytes) -> str:
    return f"scrypt${_COST}${_BLOCK}${_LANES}${salt.hex()}${digest.hex()}"


def _scrypt(password: str, salt: bytes, cost: int, block: int, lanes: int) -> bytes:
    memory = 256 * cost * block
    return hashlib.scrypt(
        password.encode("utf-8", "surrogatepass"),
        salt=salt,
        n=cost,
        r=block,
        p=lanes,
        maxmem=memory,
        dklen=32,
    )


class Accounts:
    """The users and the hashes of their passwords.

    Args:
        hashes: By name, as ``hashed`` gives them.
    """

    def __init__(self, hashes: Mapping[str, str]) -> None:
        self._hashes = dict(hashes)
        self._nobody = _written(secrets.token_bytes(16), secrets.token_bytes(32))

    @classmethod
    def read(cls, path: Path) -> Accounts:
        """The users of a file.

        Raises:
            BadInput: If the file is not there or holds no user; names the first line that is not
                ``NAME:scrypt$…``.
        """
        hashes = _read(path)
        if not hashes:
            raise BadInput(f"--auth {path} has no user: add one with --add-user NAME.")
        return cls(hashes)

    def accepts(self, name: str, password: str) -> bool:
        """Whether it is a user's password. Takes as long for names that do not exist."""
        known = _HASH.fullmatch(self._hashes.get(name, self._nobody))
        assert known is not None
        cost, block, lanes, salt, digest = known.groups()
        found = _scrypt(password, bytes.fromhex(salt), int(cost), int(block), int(lanes))
        return secrets.compare_digest(found, bytes.fromhex(digest)) and name in self._hashes


def add(path: Path, name: str, password: str) -> None:
    """Write a user to a file, which others cannot read; replaces one of that name.

    Raises:
        BadInput: If the name or the password will not do, or the file holds something else.
        NotWritten: If the disk is full or refuses.
    """
    if not _NAME.fullmatch(name) or name == ANYBODY:
        raise BadInput(
            f"--add-user {name}: take 1 to 64 of the letters a-z, digits and . _ -, beginning with "
            f"a letter or digit, and not '{ANYBODY}'."
        )
    if not SHORTEST <= len(password) <= LONGEST:
        raise BadInput(f"A password has {SHORTEST} to {LONGEST} characters: choose a longer one.")
    hashes = {**(_read(path) if path.exists() else {}), name: hashed(password)}
    text = "".join(f"{one}:{digest}\n" for one, digest in sorted(hashes.items()))
    mask = os.umask(0o077)
    try:
        write({path: text.encode()})
    finally:
        os.umask(mask)


def _read(path: Path) -> dict[str, str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(
            f"--auth {path} cannot be read: give the file that `accel ui --add-user NAME --auth "
            "FILE` writes."
        ) from error
    return dict(_user(path, place, line) for place, line in enumerate(lines, 1) if line.strip())


def _user(path: Path, place: int, line: str) -> tuple[str, str]:
    name, _, digest = line.strip().partition(":")
    if not _NAME.fullmatch(name) or name == ANYBODY or not _HASH.fullmatch(digest):
        raise BadInput(
            f"--auth {path}, line {place} is no user (NAME:scrypt$…): write it anew with "
            "--add-user NAME."
        )
    return name, digest


@dataclass
class _Failures:
    """How often logins failed, and until when the next one is not looked at."""

    count: int = 0
    until: float = 0.0


class Door:
    """Lets users in, slower the more often they fail.

    A name and an address together have ``FREE`` failures, and an address with any names
    ``FREE_OF_ADDRESS``; each failure from there on doubles the wait, from a second to a quarter
    of an hour. While they wait nothing is looked at, not even the right password. Nobody is locked
    out by what others type elsewhere.

    Args:
        accounts: The users.
        clock: Seconds that only grow.
    """

    def __init__(self, accounts: Accounts, clock: Callable[[], float] = time.monotonic) -> None:
        self._accounts = accounts
        self._clock = clock
        self._failures: OrderedDict[tuple[str, str], _Failures] = OrderedDict()
        self._sessions: dict[bytes, tuple[str, float]] = {}
        self._lock = threading.Lock()
        self._looking = threading.BoundedSemaphore(2)

    def enter(self, name: str, password: str, address: str) -> str:
        """The token of a new session.

        Args:
            name: The user's.
            password: The user's.
            address: Where the request comes from.

        Raises:
            Locked: If it is too early after failures.
            Refused: If name and password do not belong together.
        """
        place = _network(address)
        limits = {(name[:65], place): FREE, ("", place): FREE_OF_ADDRESS}
        with self._lock:
            self._count(limits)
        with self._looking:
            right = self._accounts.accepts(name, password)
        if not right:
            raise Refused("Name and password do not belong together: type them again.")
        with self._lock:
            self._uncount(limits)
            return self._open(name)

    def user(self, token: str | None) -> str | None:
        """Whose session it is; ``None`` where it is none or has ended."""
        name, ends = self._sessions.get(_key(token or ""), ("", 0.0))
        return name if name and ends > self._clock() else None

    def leave(self, token: str | None) -> None:
        """End a session."""
        with self._lock:
            self._sessions.pop(_key(token or ""), None)

    def _count(self, limits: Mapping[tuple[str, str], int]) -> None:
        """Count an attempt as failed before it is looked at, so that none slips in meanwhile."""
        now = self._clock()
        self._forget(now)
        known = [self._failures[key] for key in limits if key in self._failures]
        wait = max((failures.until for failures in known), default=now)
        if wait > now:
            raise Locked(wait - now)
        for key, free in limits.items():
            failures = self._failures.setdefault(key, _Failures())
            failures.count += 1
            over = failures.count - free
            failures.until = now + (0.0 if over < 0 else min(2.0 ** min(over, 20), LONGEST_WAIT))
            self._failures.move_to_end(key)

    def _uncount(self, limits: Mapping[tuple[str, str], int]) -> None:
        """A success clears the name at this address, and is no failure of the address."""
        for key in limits:
            failures = self._failures.pop(key, None)
            if failures is not None and not key[0] and failures.count > 1:
                failures.count -= 1
                self._failures[key] = failures

    def _forget(self, now: float) -> None:
        while self._failures:
            key, oldest = next(iter(self._failures.items()))
            if len(self._failures) < REMEMBERED and oldest.until + FORGOTTEN_AFTER > now:
                return
            del self._failures[key]

    def _open(self, name: str) -> str:
        now = self._clock()
        self._sessions = {key: one for key, one in self._sessions.items() if one[1] > now}
        mine = [key for key, (user, _) in self._sessions.items() if user == name]
        for key in mine[: max(len(mine) - SESSIONS + 1, 0)]:
            del self._sessions[key]
        token = secrets.token_urlsafe(32)
        self._sessions[_key(token)] = (name, now + SESSION_SECONDS)
        return token


def _key(token: str) -> bytes:
    """What a token is looked up by: how long that takes tells nothing about the token."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()


def _network(address: str) -> str:
    """An address, or the /64 of an IPv6 address: a user has all of it."""
    try:
        parsed = ip_address(address)
    except ValueError:
        return address
    if isinstance(parsed, IPv6Address) and parsed.ipv4_mapped is None:
        return parsed.exploded[:19]
    return str(parsed)
