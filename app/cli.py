"""The command line: options in, one call of the module that does the work.

Only typer and dataclasses are imported here; torch, pydantic and the methods wait until a command
needs them, so that ``accel --help`` answers at once.
"""

from __future__ import annotations

from typing import Annotated

import typer

from app.flags import Given, takes
from app.request import (
    Batch,
    Calibration,
    Choice,
    Editing,
    Like,
    Listing,
    Measuring,
    Printing,
    Proving,
    Repeats,
    Request,
    Serving,
    Settings,
    Sharing,
    Source,
    Streaming,
    Target,
    Together,
    Tuning,
)

app = typer.Typer(
    name="accel",
    help="Training-free accelerators for diffusers pipelines, with their cost in quality measured.",
    epilog="Exit codes: 0 done · 1 failed while running · 2 what was typed cannot be done · "
    "3 some rows of a batch failed · 130 interrupted. Results go to stdout, everything for humans "
    "to stderr.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(version("diffusers-accel"))
        raise typer.Exit


@app.callback()
def root(
    _version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="show the version")
    ] = False,
) -> None:
    """Start here; commands follow."""


@app.command()
@takes(Request, Choice, Together, Like, Target, Printing)
def generate(given: Given) -> None:
    """Make one picture or clip (MP4); without --plan, --preset or --set by the stock pipeline."""
    from app.generate import generate as run

    run(given)


@app.command()
@takes(Editing, Target, Printing)
def edit(given: Given) -> None:
    """Change a region of a picture: only that is computed, the rest stays as it was, bit for bit.

    The original is made once more by its record, to know what its layers had; give --mask or
    --region. --compare says what computing everything takes.
    """
    from app.edit import edit as run

    run(given)


@app.command()
@takes(Request, Choice, Target, Repeats, Printing)
def compare(given: Given) -> None:
    """Run the stock pipeline and the accelerated one side by side, and measure both.

    The plan is --preset balanced unless another is given. --out is a folder: both pictures or
    clips, their difference, a sheet, the timeline and report.json.
    """
    from app.compare import compare as run

    run(given)


@app.command()
@takes(Batch, Settings, Choice, Printing)
def batch(given: Given) -> None:
    """Make thousands of pictures or clips: nothing lost, one machine or many.

    INPUT has a row for each: a prompt, and what differs from the options given here. What is there
    already is left as it is, so that the same command goes on after whatever has stopped it.
    """
    from app.batch.command import batch as run

    run(given)


@app.command()
@takes(Streaming, Choice, Printing)
def stream(given: Given) -> None:
    """Draw a clip anew, frame after frame, as a stream.

    Frames at different noise levels share the calls of the network (loop.StreamBatch, unless a plan
    is given). Frames are cut to the size of the model. Needs the extra `video`.
    """
    from app.streaming import stream as run

    run(given)


@app.command()
@takes(Calibration, Target, Printing)
def calibrate(given: Given) -> None:
    """Measure what a method must know of a model, and write a plan with it.

    Runs the stock pipeline on a few prompts. The plan is for `accel generate --plan FILE`.
    """
    from app.calibrate import calibrate as run

    run(given)


@app.command()
@takes(Tuning, Target, Printing)
def tune(given: Given) -> None:
    """Find the fastest plan that holds a fidelity on this model and machine, with proof.

    Searches on a few prompts, then checks the best on others; the plan has what was measured in it.
    Beside it come a plot, and a folder of trials from which the same command goes on. It is for
    `accel generate --plan FILE`. Needs the extra `tune`.
    """
    from app.tune import tune as run

    run(given)


@app.command()
@takes(Proving, Choice, Target, Printing)
def prove(given: Given) -> None:
    """Measure on this model and machine whether a plan holds a target, and write that into it.

    For a plan that was written by hand, a preset, or a tuned plan that is to be measured anew. On
    prompts that a tuned plan did not see, drawn by stock and by the plan in turns.
    """
    from app.prove import prove as run

    run(given)


@app.command()
@takes(Listing, Printing)
def methods(given: Given) -> None:
    """List the methods: layer, fields with ranges and defaults, source."""
    from app.listing import methods as run

    run(given)


@app.command()
@takes(Source, Measuring, Sharing, Printing)
def explain(given: Given) -> None:
    """Say what a model's pipeline is, which methods fit it, and why not the others.

    And what to expect of each preset, and how sure that is: whether it was measured on this model.

    With --devices, which way of sharing one picture out pays here: a step and the link are
    measured, and time and memory predicted. With --cluster they are predicted for other devices.
    """
    from app.listing import explain as run

    run(given)


@app.command()
@takes(Printing)
def env(given: Given) -> None:
    """Show versions, devices, threads and optional packages."""
    from app.listing import environment as run

    run(given)


@app.command()
@takes(Serving)
def ui(given: Given) -> None:
    """Start the app: pages for a browser, and a REST interface under /api/v1.

    Needs `pip install diffusers-accel[ui]`. It works offline, and listens on this machine alone
    unless told otherwise.
    """
    from app.launch import ui as run

    run(given)


def main() -> None:
    """Run the command line; the console command ``accel``."""
    app()
