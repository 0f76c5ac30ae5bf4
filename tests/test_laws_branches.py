"""Law 5: branches apart. What one guidance branch computes never reaches another.

The latents are forced: `scheduler.step` hands out those of a stock run. Then a branch's answers
depend on its own prompt alone, and changing the prompt of the other must not change one of them.
"""

from functools import cache

import pytest
import torch
from roster import ROSTER, STEPS, TURNS, full, in_ci
from tiny import PIPELINES, Ask

from accel import Plan, hooks
from accel.seams.denoisers import find_denoisers

FEW = ("sd15", "sd3", "sd35_skip_layer", "flux_cfg", "flux_controlnet", "hunyuanimage", "zimage")
FEW += ("pixart_sigma", "lumina2", "wan22")
OTHER = "a green tractor, a violet whale and nine ladders"


def texts(tiny):
    """A family's prompts for one sample."""
    usual = tiny.inputs(Ask(["a red fox"], [0], guidance=True))
    return {key: usual.get(key) for key in ("prompt", "negative_prompt")}


GUIDED = [
    pytest.param(tiny.name, name, id=f"{tiny.name}-{name}", marks=full(not in_ci(tiny, name, FEW)))
    for name, row in ROSTER.items()
    for tiny in PIPELINES.values()
    if row.acts(tiny) and len(tiny.order) > 1 and texts(tiny)["negative_prompt"]
    if row.active.layer not in ("sampler", "loop")  # a loop answers without the network here
]


def varied(cases):
    """Each case in its active form and in its variants, which CI runs on one pipeline a method."""
    return [
        pytest.param(
            name,
            form,
            id=f"{case.id}{f'-{i}' if i else ''}",
            marks=case.marks or full(bool(i) and name != TURNS[method]),
        )
        for case in cases
        for name, method in [case.values]
        for i, form in enumerate((ROSTER[method].active, *ROSTER[method].variants))
    ]


LED = varied(case for case in GUIDED if "cond" not in ROSTER[case.values[1]].follows)
"""Where cond is computed as if it were alone."""
CACHED = [case for case in GUIDED if not ROSTER[case.values[1]].branches]
APART = varied(case for case in CACHED if "uncond" not in ROSTER[case.values[1]].follows)
DIALS = [case for case in CACHED if ROSTER[case.values[1]].dial]
UNGUIDED = [case for case in GUIDED if ROSTER[case.values[1]].branches]


class Forced:
    """Runs a pipeline along the latents of a stock run; writes down all answers."""

    def __init__(self, name, pipe):
        self.tiny, self.pipe = PIPELINES[name], pipe
        self.latents = path(name)

    def run(self, plan, **changed):
        """Answers ``[(branch, step)]`` that the pipeline got, and the report."""
        usual = texts(self.tiny)
        given = {
            key: [text] if isinstance(usual[key], list) else text for key, text in changed.items()
        }
        step, answers = 0, {}

        def force(inner, *args, **kwargs):
            nonlocal step
            result = inner(*args, **kwargs)
            result[0].copy_(self.latents[step])
            step += 1
            return result

        def write(inner, *args, **kwargs):
            native = inner(*args, **kwargs)
            to_come = (name for name in self.tiny.order if (name, step) not in answers)
            for row, name in zip(native[0], list(to_come), strict=False):
                answers[name, step] = row.clone()
            return native

        run = plan.attach(self.pipe)
        undos = [run.detach, hooks.wrap(self.pipe.scheduler, "step", force)]
        undos += [hooks.wrap(d.module, "forward", write) for d in find_denoisers(self.pipe)]
        self.tiny.call(self.pipe, steps=STEPS, **given)
        for undo in undos:
            undo()
        return answers, run.report.to_dict()["events"]


@cache
def path(name):
    """The latents of a stock run, step by step."""
    pipe, latents = PIPELINES[name].build(), []

    def keep(inner, *args, **kwargs):
        result = inner(*args, **kwargs)
        latents.append(result[0].clone())
        return result

    hooks.wrap(pipe.scheduler, "step", keep)
    PIPELINES[name].call(pipe, steps=STEPS)
    return latents


@cache
def leaks(name):
    """Whether the stock pipeline gives uncond what it made of cond."""
    forced = Forced(name, PIPELINES[name].build())
    return not equal(forced.run(Plan())[0], forced.run(Plan(), prompt=OTHER)[0], "uncond")


def equal(answers, others, branch):
    """Whether a branch got the same answers at every step."""
    steps = [key for key in answers if key[0] == branch]
    assert steps
    return all(torch.allclose(answers[key], others[key], rtol=1e-4, atol=1e-5) for key in steps)


@pytest.mark.parametrize(("name", "form"), LED)
def test_cond_knows_nothing_of_uncond(bench, name, form):
    forced = Forced(name, bench.pipe(name))
    answers, events = forced.run(Plan(form))
    others, other_events = forced.run(Plan(form), negative_prompt=OTHER)
    assert equal(answers, others, "cond")
    assert not equal(answers, others, "uncond")
    assert events == other_events


@pytest.mark.parametrize(("name", "form"), APART)
def test_uncond_knows_nothing_of_cond(bench, name, form):
    if leaks(name):
        pytest.skip("the stock pipeline gives uncond what its ControlNet made of cond")
    forced = Forced(name, bench.pipe(name))
    answers, events = forced.run(Plan(form))
    others, other_events = forced.run(Plan(form), prompt=OTHER)
    assert equal(answers, others, "uncond")
    assert not equal(answers, others, "cond")
    assert events == other_events


@pytest.mark.parametrize(("name", "method"), UNGUIDED)
def test_uncond_is_answered_by_cond_or_itself(bench, name, method):
    """Where guidance is left out, by cond to the bit; where it is estimated, by neither; elsewhere
    by what stock computes."""
    forced = Forced(name, bench.pipe(name))
    stock, _ = forced.run(Plan())
    answers, events = forced.run(Plan(ROSTER[method].active))
    states = {step: state for step, branch, _, state in events[method] if branch == "uncond"}
    left_out = ROSTER[method].answers
    assert left_out <= set(states.values()) <= {"computed", *left_out}
    for step, state in states.items():
        uncond, cond = answers["uncond", step], answers["cond", step]
        assert torch.equal(uncond, cond) == (state == "reused")
        assert torch.allclose(cond, stock["cond", step], rtol=1e-4, atol=1e-5)
        if state == "computed":
            assert torch.allclose(uncond, stock["uncond", step], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "method"), DIALS)
def test_cond_leads_the_decisions(bench, gauged, name, method):
    """A threshold in the midst of what is measured: still only cond decides."""
    row = ROSTER[method]
    forced = Forced(name, bench.pipe(name))
    forced.run(Plan(row.dial(1e-12)))
    method = row.dial(1.01 * sorted(gauged)[3 * len(gauged) // 4])
    answers, events = forced.run(Plan(method))
    others, other_events = forced.run(Plan(method), negative_prompt=OTHER)
    assert {state for *_, state in events[method.name]} > {"computed"}
    assert events == other_events
    assert equal(answers, others, "cond")
