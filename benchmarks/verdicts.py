"""What the benchmark of samplers was to show, and whether its points show it.

Everything here is a pure function of the points that `sampling` writes; a point has ``sampler``,
``ours``, ``steps`` and the figures, or ``refused``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

Points = Sequence[dict[str, Any]]
Rows = dict[tuple[str, bool], dict[int, float]]

SECOND_ORDER = ("DPM++ 2M", "diffusers DPMSolverMultistep")
"""The same solver as a sampler of ours and in diffusers; the nearer counts."""


@dataclass(frozen=True)
class Claim:
    """That one sampler ends nearer to the exact solution than others do.

    Attributes:
        ours: The sampler.
        against: The others; the nearest of them counts.
        steps: The numbers of evaluations at which it is claimed.
    """

    ours: str
    against: tuple[str, ...]
    steps: tuple[int, ...]

    def ratios(self, rows: Rows) -> dict[int, float | None]:
        """Distance over that of the nearest other, by steps; ``None`` where one is not measured."""
        mine, found = _of(rows, self.ours), {}
        for n in self.steps:
            others = [row[n] for name in self.against if n in (row := _of(rows, name))]
            found[n] = mine[n] / min(others) if n in mine and others else None
        return found

    def line(self, rows: Rows) -> str:
        """The verdict as a row of a table."""
        ratios = self.ratios(rows)
        measured = [ratio for ratio in ratios.values() if ratio is not None]
        holds = sum(ratio < 1.0 for ratio in measured)
        verdict = "not measured"
        if measured:
            verdict = "yes" if holds == len(ratios) else f"at {holds} of {len(ratios)}"
        cells = [
            f"{n}: –" if ratio is None else f"{n}: {ratio:.2f} {'yes' if ratio < 1.0 else 'no'}"
            for n, ratio in ratios.items()
        ]
        return f"| {self.ours} | {' or '.join(self.against)} | {', '.join(cells)} | {verdict} |"


FEW = (5, 6, 8, 10)
SEARCHED = (6, 8)
SEARCHES = ("GITS", "AYS", "OSS", "AutoDiffusion")
CLAIMS = (
    Claim("DPM-Solver-v3", SECOND_ORDER, FEW),
    Claim("OLSS", SECOND_ORDER, FEW),
    Claim("OLSS, refined", SECOND_ORDER, SEARCHED),
    Claim("OLSS, refined", ("OLSS",), SEARCHED),
    *(Claim(f"DPM++ 2M, {name}", ("DPM++ 2M",), SEARCHED) for name in SEARCHES),
)
"""What the samplers that rest on measured numbers are for: few evaluations."""

FIGURES = {
    "frechet": "Fréchet distance to real scenes; biased upwards by so few pictures, so compare it "
    "only within this table",
    "kernel": "kernel distance to real scenes, unbiased: 0 is expected of real scenes, and it may "
    "be negative",
    "caption_accuracy": "caption accuracy, the share of what captions say that the oracle sees",
    "ssim": "SSIM to the pictures of the 200-step solution, mean",
}
"""Tables beside that of distances, by the name of the figure in a point."""


def figures(points: Points, name: str, evaluations: Sequence[int]) -> Rows:
    """By sampler and whether it is ours: a figure by the number of steps."""
    rows: Rows = {}
    for one in points:
        if name in one and one["steps"] in evaluations:
            rows.setdefault((one["sampler"], one["ours"]), {})[one["steps"]] = one[name]
    return rows


def verdicts(points: Points, evaluations: Sequence[int]) -> str:
    """Each claim with its ratios, ours that are nowhere nearest, and what was refused."""
    rows = figures(points, "distance", evaluations)
    lines = [
        "What was to be shown: ours ends nearer to the exact solution. Ratio: the distance of ours "
        "over that of the nearest other, at a number of evaluations.",
        "",
        "| ours | against | ratio at | holds |",
        "|---|---|---|---|",
        *(claim.line(rows) for claim in CLAIMS),
        "",
        f"Ours that are nowhere nearer than every stock scheduler: {_listed(losers(rows))}.",
    ]
    refused = sorted(refusals(points))
    return "\n".join([*lines, *(["", "Refused:", "", *refused] if refused else [])]) + "\n"


def losers(rows: Rows) -> list[str]:
    """Ours that no number of evaluations sees nearer than every stock scheduler."""
    stocks = [row for (_, mine), row in rows.items() if not mine]
    return [
        name
        for (name, mine), row in rows.items()
        if mine and not any(_nearest(row, n, stocks) for n in row)
    ]


def refusals(points: Points) -> Iterator[str]:
    """A line for each reason for which a sampler was not run, with the numbers of evaluations."""
    reasons: dict[tuple[str, str], list[int]] = {}
    for one in points:
        if "refused" in one:
            reasons.setdefault((one["sampler"], one["refused"]), []).append(one["steps"])
    for (name, reason), steps in reasons.items():
        yield f"* {name} at {', '.join(map(str, steps))}: {reason}"


def fidelity(points: Points, evaluations: Sequence[int]) -> str:
    """A table for each figure beside the distance, with that of the exact solution above it."""
    tables = []
    for name, title in FIGURES.items():
        rows = figures(points, name, evaluations)
        if not rows:
            continue
        exact = [f"{one[name]:.3f}" for one in points if one["steps"] > max(evaluations)]
        told = f" (the stock schedule at many steps: {', '.join(exact)})" if exact else ""
        lines = [
            f"{title[0].upper()}{title[1:]}{told}.",
            "",
            f"| sampler | {' | '.join(map(str, evaluations))} |",
            f"|---|{'---|' * len(evaluations)}",
            *(
                f"| {sampler} | {' | '.join(_cell(row.get(n)) for n in evaluations)} |"
                for (sampler, _), row in rows.items()
            ),
        ]
        tables.append("\n".join(lines) + "\n")
    return "\n".join(tables)


def _of(rows: Rows, name: str) -> dict[int, float]:
    found: dict[int, float] = {}
    for (sampler, _), row in rows.items():
        if sampler == name:
            found |= row
    return found


def _nearest(row: dict[int, float], n: int, stocks: Sequence[dict[int, float]]) -> bool:
    others = [stock[n] for stock in stocks if n in stock]
    return bool(others) and row[n] < min(others)


def _cell(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"
