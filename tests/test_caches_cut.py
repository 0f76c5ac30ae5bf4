"""Pipelines that cut their schedule where no public call shows it: `Step.total` is not known."""

import pytest
import torch
from test_laws_counts import computed_steps

from accel import Plan, cache, errors

STEPS = 6

REFUSED = {
    "MagCache, share": ("sd3", cache.MagCache(share=0.2, last=False), "Set share=0"),
    "MagCache, curve": (
        "sd3",
        cache.MagCache(share=0.0, curve=(1.0, 0.9), last=False),
        "Set share=0 and give no curve",
    ),
    "DeltaDiT": ("sd3", cache.DeltaDiT(interval=2), "set boundary to 0 or 1"),
    "DeepCache": ("sd15", cache.DeepCache(schedule="nonuniform"), "use schedule='uniform'"),
    "Custom, clustered": ("sd3", cache.Custom(rule="clustered"), "use rule='interval'"),
    "Table": ("sd3", cache.Table(steps=("1111", "0000"), by="kind"), "a rule with an interval"),
    "Table, stretched": (
        "sd3",
        cache.Table(steps=("1111", "0000"), by="kind", stretch=True),
        r"or cache\.FORA",
    ),
    "StepRehash": ("sd3", cache.StepRehash(steps=(0, 1), total=6), "a rule with an interval"),
    "Custom": (
        "sd3",
        cache.Custom(rule="magnitude", curve=(1.0,), last=False),
        "Set share=0 and give no curve",
    ),
    "SADA": ("sd3", cache.SADA(), "a share of its steps"),
    "ZEUS": ("sd3", cache.ZEUS(), "a share of its steps"),
    "last": ("sd3", cache.EasyCache(), "set last=False"),
}
"""Where the rule needs the length of the run, with what the refusal says to do."""

SERVED = {
    "MagCache": ("sd3", cache.MagCache(threshold=1e9, share=0.0, max_skips=0, last=False)),
    "DeltaDiT": ("sd3", cache.DeltaDiT(interval=2, boundary=1.0)),
    "DeepCache": ("sd15", cache.DeepCache(interval=2)),
    "StepRehash": ("sd3", cache.StepRehash(steps=(0, 2, 4))),
    "EasyCache": ("sd3", cache.EasyCache(threshold=1e9, warmup=2, last=False)),
}
"""What the refusals recommend, and other forms that do not need it."""

COMPUTED = {"MagCache": {0, 1}, "EasyCache": {0, 1}}


def cut(run):
    """As if the pipeline left out steps unseen."""
    run.trajectory.truncated = lambda scheduled: None
    return run


@pytest.mark.parametrize(("name", "method", "words"), REFUSED.values(), ids=REFUSED)
def test_what_needs_the_length_of_the_run_is_refused(bench, name, method, words):
    run = cut(Plan(method).attach(bench.pipe(name)))
    try:
        with pytest.raises(errors.UnsupportedModel, match=words) as caught:
            bench.call(name, steps=STEPS)
    finally:
        run.detach()
    assert "cuts its schedule" in str(caught.value)


@pytest.mark.parametrize("case", SERVED)
def test_what_does_not_need_it_is_served(bench, case):
    name, method = SERVED[case]
    run = cut(Plan(method).attach(bench.pipe(name)))
    output = bench.call(name, steps=STEPS)
    run.detach()
    assert torch.isfinite(output).all()
    expected = COMPUTED.get(case, {0, 2, 4})
    assert all(steps == expected for steps in computed_steps(run, method).values())
