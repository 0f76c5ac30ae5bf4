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
    console.print(verdicts(report))


def verdicts(report: Report) -> Table:
    """The verdicts of a report; a method that did nothing stands out."""
    table = Table.grid(padding=(0, 2))
    for method, verdict in report.verdicts.items():
        style = "green" if verdict.state == ACTIVE else "bold white on red"
        table.add_row(f"  {method}", Text(verdict.state, style), Text(verdict.detail))
    return table


def print_comparison(found: Comparison) -> None:
    """Say what a comparison found."""
    console = human()
    table = Table("", "seconds", "NFE", *(LABELS[name] for name in found.quality))
    stock, fast = found.baseline, found.accelerated
    table.add_row("stock", _seconds(stock), f"{stock.report.nfe:g}")
    quality = [figure(name, value) for name, value in found.quality.items()]
    table.add_row(found.title, _seconds(fast), f"{fast.report.nfe:g}", *quality)
    console.print(table)
    low, high = found.ratios
    console.print(f"{faster(found)} (pairs of runs: {low:.2f} to {high:.2f})", style="bold")
    console.print(verdicts(fast.report))
    if found.frames:
        console.print(_worst(found.frames["ssim"]))
    for name, value in found.quality.items():
        if isinstance(value, str):
            console.print(Text(f"{name} {value}", "yellow"))


def _worst(ssim: Sequence[float | str]) -> str:
    """The frame that is least like the stock one."""
    known = {index: value for index, value in enumerate(ssim) if not isinstance(value, str)}
    if not known:
        return "no frame is large enough for SSIM"
    frame = min(known, key=lambda index: known[index])
    return f"worst frame: {frame + 1} of {len(ssim)}, SSIM {known[frame]:.4f}"


def _seconds(side: Side) -> str:
    return f"{side.timing.median:.2f} ± {side.timing.spread:.2f}"
