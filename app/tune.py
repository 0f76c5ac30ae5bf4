"""``accel tune``: the fastest plan that holds a fidelity here, as a file with its evidence."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accel.errors import BadInput
from app.calibrate import read_prompts
from app.call import arguments
from app.compare import png
from app.exits import say
from app.files import check_target, slug, write
from app.flags import Given
from app.models import Model, load
from app.modes import pipeline_for
from app.progress import Bar
from app.request import Clip, Printing, Proving, Request, Source, Target, Tuning, make
from app.tables import print_result

if TYPE_CHECKING:
    from accel.plan import Plan
    from accel.tuning.tune import Observe

UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}
TRIALS = "-trials"
"""Ending of the folder in which trials are kept, beside the plan."""


def tune(given: Given) -> None:
    """Tune, and write the plan and its plot.

    Args:
        given: The options that were typed.

    Raises:
        AccelError: Of any kind; but for the folder of trials, nothing was written then.
    """
    from accel.tuning import tune as search
    from accel.tuning.targets import Targets

    asked, target = make(Tuning, given), make(Target, given)
    Targets.parse(asked.target)
    budget = seconds(asked.budget)
    out = target.out or Path(f"tuned-{slug(Path(asked.model).name)}.toml")
    plot = out.with_suffix(".png")
    for path in (out, plot):
        check_target(path, target.overwrite)
    split = (asked.captions, asked.choice, asked.held_out)
    prompts = asked.prompts and read_prompts(
        asked.prompts, sum(split), "--captions, --choice and --held-out together"
    )
    model, pipe, call = stock(asked)
    with Bar() as bar:
        found = search(
            pipe,
            asked.target,
            budget,
            prompts=prompts or None,
            call=call,
            split=split,
            folder=asked.trials or out.with_name(out.stem + TRIALS),
            observe=_shown(bar),
        )
    write({out: written("tune", asked, model, found.plan), plot: png(found.plot())})
    for line in str(found).splitlines():
        say(line)
    say(f"use it by: accel generate PROMPT --model {asked.model} --plan {out}")
    document = {"plan": found.plan.to_dict(), "tried": found.tried, "refused": found.refused}
    print_result(make(Printing, given).format, [out, plot], document)


def seconds(text: str) -> float:
    """A time as it is typed: ``90s``, ``10m``, ``2h``, or a number of seconds.

    Raises:
        BadInput: If it is none.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smh]?)\s*", text)
    if found is None or float(found[1]) == 0.0:
        raise BadInput(f"--budget {text!r} is no time: write such as 90s, 10m or 2h.")
    return float(found[1]) * UNITS[found[2] or "s"]


def stock(asked: Proving) -> tuple[Model, Any, dict[str, Any]]:
    """The model, its pipeline, and the arguments of its call but for the prompt."""
    model = load(Source(**{name: getattr(asked, name) for name in Source.__dataclass_fields__}))
    drawn = {name: getattr(asked, name) for name in Clip.__dataclass_fields__}
    request = Request(**drawn, steps=asked.steps, prompt="a prompt", seed=0)
    pipe = pipeline_for(model.pipe, request)
    pipe.set_progress_bar_config(disable=True)
    call = arguments(pipe, request, model.call)
    call.pop("prompt")
    return model, pipe, call


def written(command: str, asked: Proving, model: Model, plan: Plan) -> bytes:
    """The file of a plan with its evidence."""
    proven = plan.tuned
    assert proven is not None
    names = ", ".join(method.name for method in plan) or "no method"
    head = (
        f"# accel {command}: {asked.model} (sha256 {model.fingerprint[:16]}), {names}\n"
        f"# {' and '.join(proven.targets)}, proven on {proven.held_out} held-out prompts\n"
    )
    return (head + plan.to_toml()).encode()


def _shown(bar: Bar) -> Observe:
    """A line of the progress bar for each stage."""
    stage, done, advance = "", 0, bar.count("starting", 1)

    def observe(now: str, count: int, total: int) -> None:
        nonlocal stage, done, advance
        if now != stage:
            stage, done, advance = now, 0, bar.count(now, total)
        for _ in range(count - done):
            advance()
        done = max(done, count)

    return observe
