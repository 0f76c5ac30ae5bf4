"""Numbers of earlier code, kept for those settings that draw the same pictures as before.

Raw numbers hold for the code that they were measured with (`measure.here`). Most changes of it
touch few methods, and a table takes hours. So each setting draws one of its captions again: where
fidelity and work come out the same, to all digits that are kept, its lines stay; of the others none
does. What was found is written into the file's first line, with the speedups of the new draws over
those that are kept: pictures tell nothing about time.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import contest
from compact import Compact, packed, rounded
from contest import EVERY, STOCK, Benches, Contestant, Drawn, drawn_by, line_of
from measure import spread

from accel.scenes import Scene, clip_scene, scene

CODE, CARRIED = "code", "carried"

FIGURES = ("psnr", "ssim", "perceptual", "block_rows", "nfe")
"""What must come out the same."""


def carry(
    path: Path,
    header: dict[str, Any],
    who: Sequence[Contestant],
    benches: Benches,
    albums: Path,
) -> None:
    """Make a file of earlier code one of the present code; another file is left as it is.

    Args:
        path: Of the lines (`compact`), or where they would be unpacked from.
        header: What the present run holds for.
        who: The settings; lines of others are given up.
        benches: The pipelines.
        albums: Where pictures are kept (`album`), by weights and code.
    """
    before = _header(path)
    if before is None or before.get(CODE) == header[CODE]:
        return
    old = Compact(path, header | {CODE: before[CODE]})
    again = Again(benches)
    same, speedups, other = [], list[float](), list[str]()
    for one in who:
        lines = drawn_by(one, old)
        if not lines and not any(one.wrote(line) for line in old.found):
            continue
        ratio = again.draw(one, lines)
        if ratio is None:
            other.append(one.label)
            continue
        same.append(one)
        speedups += [ratio] * bool(lines)
    kept = [line for line in old.found if any(one.wrote(line) for one in same)]
    told = {"from": [*before.get(CARRIED, {}).get("from", []), before[CODE]], "settings": len(same)}
    told |= {"other": other, "speedup": spread(speedups) if speedups else None}
    fresh = path.with_suffix(".new")
    fresh.unlink(missing_ok=True)
    new = Compact(fresh, {**header, CARRIED: told})
    for line in kept:
        new.add(line)
    fresh.replace(path)
    drawn = albums / f"{header['weights']}-{before[CODE]}"
    if drawn.exists():
        drawn.rename(albums / f"{header['weights']}-{header[CODE]}")


@dataclass
class Again:
    """Draws captions a second time; stock anew after every few of the others, as `contest` does.

    Attributes:
        benches: The pipelines.
    """

    benches: Benches
    _stock: dict[int, Drawn] = field(default_factory=dict)
    _age: int = 0

    def draw(self, who: Contestant, lines: list[dict[str, Any]]) -> float | None:
        """The speedup of a new draw over the old one, if that is the same otherwise; else ``None``.

        Who was refused, and draws nothing again, is the same.
        """
        if not lines:
            return None if self._drawn(who, self._subject(0)) else 1.0
        subject = self._subject(lines[0]["seed"])
        stock, drawn = self._reference(subject), self._drawn(who, subject)
        if drawn is None:
            return None
        found = line_of(who, subject, stock, drawn)
        if any(rounded(found[name]) != lines[0][name] for name in FIGURES):
            return None
        before = lines[0]["stock_seconds"] / lines[0]["seconds"]
        return float(found["stock_seconds"] / found["seconds"] / before)

    def _reference(self, subject: Scene) -> Drawn:
        if subject.seed not in self._stock or self._age >= EVERY:
            stock = contest.draw(self.benches, Contestant(STOCK, STOCK, 0), subject)
            self._stock, self._age = {subject.seed: stock}, 0
        self._age += 1
        return self._stock[subject.seed]

    def _drawn(self, who: Contestant, subject: Scene) -> Drawn | None:
        """What it draws; ``None`` where it raises whatever: what others raise is theirs."""
        try:
            return contest.draw(self.benches, who, subject)
        except Exception:
            self.benches.drop(who.package)
            return None

    def _subject(self, seed: int) -> Scene:
        return (clip_scene if "num_frames" in self.benches.call else scene)(seed)


def _header(path: Path) -> dict[str, Any] | None:
    if path.exists():
        text = path.read_text()
    elif packed(path).exists():
        text = gzip.decompress(packed(path).read_bytes()).decode()
    else:
        return None
    found: dict[str, Any] = json.loads(text.partition("\n")[0])
    return found


def told(path: Path) -> list[str]:
    """What is to be said of a file's numbers of earlier code: a line, or none."""
    carried = (_header(path) or {}).get(CARRIED)
    if carried is None:
        return []
    times = carried["speedup"]
    spread_of = (
        f"{times['median']:.2f} ({times['low']:.2f} to {times['high']:.2f})" if times else "–"
    )
    return [
        f"{carried['settings']} settings have numbers of earlier code "
        f"({', '.join(carried['from'])}): each drew one caption again, with the same "
        f"figures of fidelity and work; the new speedups are {spread_of} times the old ones. "
        f"Drawn anew: {', '.join(carried['other']) or 'none'}."
    ]
