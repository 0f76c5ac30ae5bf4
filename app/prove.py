"""``accel prove``: what a plan holds here, as a file with its evidence."""

from __future__ import annotations

import os
from pathlib import Path

from accel.errors import BadInput
from app.calibrate import read_prompts
from app.exits import say
from app.files import check_target, slug, write
from app.flags import Given
from app.plans import chosen
from app.progress import Bar
from app.request import Choice, Printing, Proving, Target, make
from app.tables import print_result
from app.tune import stock, written


def prove(given: Given) -> None:
    """Measure a plan, and write it with what was measured.

    Args:
        given: The options that were typed.

    Raises:
        AccelError: Of any kind; nothing was written then.
    """
    from accel.tuning import prove as measure
    from accel.tuning.targets import Targets

    asked, target = make(Proving, given), make(Target, given)
    plan = chosen(make(Choice, given))
    if not len(plan):
        raise BadInput("There is no plan to prove: name one by --plan, --preset or --set.")
    if asked.target:
        Targets.parse(asked.target)
    out = target.out or Path(f"proven-{slug(Path(asked.model).name)}.toml")
    check_target(out, target.overwrite)
    seen = plan.tuned.seen if plan.tuned else 0  # those it saw come first
    prompts = asked.prompts and read_prompts(asked.prompts, asked.held_out, "--held-out", seen)
    model, pipe, call = stock(asked)
    with Bar() as bar:
        advance = bar.count("held out", asked.held_out)
        found = measure(
            pipe,
            plan,
            asked.target,
            prompts=prompts or None,
            call=call,
            held_out=asked.held_out,
            observe=lambda _done, _total: advance(),
        )
    here = Path(os.path.relpath(".", out.parent))  # files that it names lie where they lay
    write({out: written("prove", asked, model, found.beside(here))})
    proven = found.tuned
    assert proven is not None
    say(f"{' and '.join(proven.targets)}: held on {proven.held_out} prompts: {proven.measured}")
    say(f"use it by: accel generate PROMPT --model {asked.model} --plan {out}")
    print_result(make(Printing, given).format, [out], {"plan": found.to_dict()})
