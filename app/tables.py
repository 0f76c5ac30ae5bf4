"""What the terminal shows: results on stdout, text for humans on stderr."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from accel.peak import MIB
from accel.report import ACTIVE
from app.sheet import LABELS, faster, figure

if TYPE_CHECKING:
    from accel.report import Report
    from app.compare import Comparison, Side


def human() -> Console:
    """The console for humans: stderr."""
    return Console(stderr=True, highlight=False)


def print_result(style: str, files: Sequence[Path], document: Mapping[str, Any]) -> None:
    """Write a result to stdout: the paths, a line each, or one JSON object with them."""
    if style == "json":
        typer.echo(json.dumps({"files": [str(path) for path in files], **document}))
        return
    for path in files:
        typer.echo(path)


def print_report(report: Report, seconds: float) -> None:
    """Say what a run did: one line, and one for each method."""
    console = human()
    console.print(
        f"{report.steps} steps, {report.nfe:g} network evaluations, {seconds:.2f} s", style="bold"
    )
    if report.peak is not None:
        console.print(str(report.peak))
    console.print(verdicts(report))


def verdicts(report: Report) -> Table:
    """The verdicts of a report; a method that did nothing stands out."""
    table = Table.grid(padding=(0, 2))
    for tally in report.tallies:
        verdict = tally.verdict()
        style = "green" if verdict.state == ACTIVE else "bold white on red"
        told = "; ".join(filter(None, (verdict.detail, tally.cost)))
        table.add_row(f"  {tally.method}", Text(verdict.state, style), Text(told))
    for line in report.guarded:
        table.add_row("  guard", Text(""), Text(line))
    return table


def print_comparison(found: Comparison) -> None:
    """Say what a comparison found."""
    console = human()
    stock, fast = found.baseline, found.accelerated
    table = Table("", "seconds", "NFE", "peak MiB", *(LABELS[name] for name in found.quality))
    table.add_row("stock", *_cost(stock))
    quality = [figure(name, value) for name, value in found.quality.items()]
    table.add_row(found.title, *_cost(fast), *quality)
    console.print(table)
    low, high = found.ratios
    console.print(f"{faster(found)} (pairs of runs: {low:.2f} to {high:.2f})", style="bold")
    console.print(verdicts(fast.report))
    for who, right in zip(("stock", found.title), found.motion, strict=False):
        console.print(_moved(who, right))
    if found.frames:
        console.print(_worst(found.frames["ssim"]))
    for name, value in found.quality.items():
        if isinstance(value, str):
            console.print(Text(f"{name} {value}", "yellow"))


def _moved(who: str, right: Mapping[str, bool]) -> str:
    """What of a clip's motion is as the prompt says."""
    wrong = [name for name, found in right.items() if not found]
    missed = f", wrong: {', '.join(wrong)}" if wrong else ""
    return f"motion of {who}: {sum(right.values())} of {len(right)} right{missed}"


def _worst(ssim: Sequence[float | str]) -> str:
    """The frame that is least like the stock one."""
    known = {index: value for index, value in enumerate(ssim) if not isinstance(value, str)}
    if not known:
        return "no frame is large enough for SSIM"
    frame = min(known, key=lambda index: known[index])
    return f"worst frame: {frame + 1} of {len(ssim)}, SSIM {known[frame]:.4f}"


def _cost(side: Side) -> tuple[str, str, str]:
    """Seconds, evaluations, and memory at the peak."""
    timing, report = side.timing, side.report
    peak = "–" if report.peak is None else f"{report.peak.bytes / MIB:.0f}"
    return f"{timing.median:.2f} ± {timing.spread:.2f}", f"{report.nfe:g}", peak
