"""The denoising loop in other hands: who does what the pipeline would do changes nothing."""

import pytest
import torch
from roster import full

from accel import Accelerator, Plan
from accel.errors import Conflict, UnsupportedModel
from accel.seams.loop import Loop
from samplers import DPMSolverPP

CI = ("sd15", "sd3", "flux_cfg", "wan21", "wan22", "cogvideox")
SERVED = (*CI, "sd_inpaint", "sdxl", "sd3_controlnet", "flux", "hunyuanvideo", "pixart_sigma")
SERVED += ("chroma",)


class Same:
    """Makes the pipeline's own evaluations, with a solver of its own."""

    def __init__(self, at_once):
        self.at_once, self.kept = at_once, []

    def begin(self, latents, solver):
        self.latents, self.solver, self.kept = latents, solver, []

    def evaluate(self, evaluation):
        self.kept.append(evaluation)
        if self.at_once or evaluation.step.last:
            while self.kept:
                self._make(self.kept.pop(0))
        return self.latents

    def _make(self, evaluation):
        timestep = self.solver.timesteps[evaluation.step.position]
        x = self.latents
        if hasattr(self.solver, "scale_model_input"):
            x = self.solver.scale_model_input(x, timestep)
        answers = {}
        for question in evaluation.questions:
            answers |= question.answers(x)
        guided = evaluation.guided(answers)
        stepped = self.solver.step(guided, timestep, self.latents, **evaluation.options)
        self.latents = stepped[0]


class Owns(Accelerator):
    """A method of one owner."""

    name = "test.Owns"
    layer = "loop"
    seam = "loop"
    supports = "everything"
    source = "none"
    at_once: bool = True

    @classmethod
    def off(cls):
        return None

    def why_off(self):
        return None

    def attach(self, site):
        site.tally.change = "owned"
        yield from Loop(Same(self.at_once)).attach(site)


class OwnsToo(Owns):
    name = "test.OwnsToo"


CASES = [
    pytest.param(name, at_once, marks=full(name not in CI))
    for name in SERVED
    for at_once in (True, False)
    if at_once or "controlnet" not in name  # which looks at the latents of each step
]


@pytest.mark.parametrize(("name", "at_once"), CASES)
def test_the_pipelines_own_evaluations_make_its_own_result(bench, name, at_once):
    with Plan(Owns(at_once=at_once)).attach(bench.pipe(name)) as run:
        found = [bench.call(name, batch=2) for _ in range(2)]
    stock = bench.stock(name, batch=2)
    assert torch.equal(*found)
    assert (found[0] - stock).abs().max() <= 1e-5 * stock.abs().max()
    with Plan().attach(bench.pipe(name)) as plain:
        bench.call(name, batch=2)
    assert (run.report.calls, run.report.rows) == (plain.report.calls, plain.report.rows)
    assert torch.equal(bench.call(name, batch=2), stock)


@pytest.mark.parametrize("name", ["sd15", "wan22"])
def test_it_is_the_plans_sampler_that_an_owner_gets(bench, name):
    alone, _ = bench.under(name, Plan(DPMSolverPP()))
    with Plan(Owns(), DPMSolverPP()).attach(bench.pipe(name)):
        found = bench.call(name)
    assert (found - alone).abs().max() <= 1e-5 * alone.abs().max()


def test_without_guidance_there_is_one_branch(bench):
    with Plan(Owns()).attach(bench.pipe("wan21")) as run:
        found = bench.call("wan21", guidance=False)
    assert torch.equal(found, bench.stock("wan21", guidance=False))
    assert run.report.calls == run.report.steps


@pytest.mark.parametrize("name", ["svd", "sd_inpaint"])
def test_what_is_beside_the_latents_is_given_to_the_network_too(bench, name):
    """With a clip's channels behind its frames, and as many frames as channels."""
    call = {"steps": 2, "batch": 2, "guidance": False}
    call |= {"num_frames": 8} if name == "svd" else {}
    with Plan(Owns()).attach(bench.pipe(name)):
        found = bench.call(name, **call)
    stock = bench.stock(name, **call)
    assert (found - stock).abs().max() <= 1e-5 * stock.abs().max()


class Alone:
    """Answers a sample of the batch under its own conditions alone; guides by the last branch."""

    def begin(self, latents, solver):
        self.same, self.asked = Same(at_once=True), 0
        self.same.begin(latents, solver)

    def evaluate(self, evaluation):
        assert not evaluation.weights
        solver, latents = self.same.solver, self.same.latents
        timestep = solver.timesteps[evaluation.step.position]
        rows = []
        for sample, x in enumerate(solver.scale_model_input(latents, timestep).split(1)):
            answers = {}
            for question in evaluation.questions:
                answers |= question.answers_of(sample, x)
            rows.append(answers["cond"])
        self.same.latents = solver.step(torch.cat(rows), timestep, latents)[0]
        return self.same.latents


class Guides(Owns):
    name = "test.Guides"

    def attach(self, site):
        site.tally.change = "owned"
        yield from Loop(Alone(), guides=True).attach(site)


@pytest.mark.parametrize("name", ["svd", "sd15", "cogvideox"])
def test_an_owner_that_guides_by_itself_asks_each_sample_alone(bench, name):
    """Going by cond alone, it makes what the pipeline makes without guidance."""
    with Plan(Guides()).attach(bench.pipe(name)):
        found = bench.call(name, steps=2, batch=2)
    stock = bench.stock(name, steps=2, batch=2, guidance=False)
    assert (found - stock).abs().max() <= 1e-4 * stock.abs().max()


RULES = {"rescaled": ("sd15", {"guidance_rescale": 0.7}), "by the frame": ("svd", {})}


@pytest.mark.parametrize(("name", "call"), RULES.values(), ids=RULES)
def test_a_rule_that_is_no_weighted_mean_is_refused(bench, name, call):
    with (
        Plan(Owns()).attach(bench.pipe(name)),
        pytest.raises(UnsupportedModel, match=r"rescale.*does not fit"),
    ):
        bench.call(name, **call)


def test_a_loop_has_one_owner(bench):
    with pytest.raises(Conflict, match=r"test\.Owns.*loop"):
        Plan(Owns(), OwnsToo()).attach(bench.pipe("sd15"))
