"""LinearAG: the fit on a problem whose branches are known, and the method in a run."""

import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from saved import Folders, done, run
from test_laws_branches import Forced
from test_laws_counts import computed_steps, counting
from tiny import PIPELINES, PROMPTS, Ask

from accel import Plan, cache, errors, guidance
from accel.guidance.calibration import Normal, Options, calibrate_linear_ag
from accel.seams import underway

AGAIN = (-1.0, 1.0, 1.0)  # û = c + (the last u − c)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders(tmp_path_factory.getbasetemp() / "saved-models")


def calls(name, count, steps, guided=True):
    for number in range(count):
        ask = Ask([PROMPTS[number]], [number], guidance=guided)
        yield {
            **PIPELINES[name].inputs(ask),
            "num_inference_steps": steps,
            "output_type": "latent",
            "generator": torch.Generator().manual_seed(number),
        }


# A mixture of Gaussians with exact answers: u is of the whole mixture, c of one half of it.


class Toy:
    """DDIM along a mixture in 8 dimensions, on T even steps of σ, in float64."""

    def __init__(self, samples=200, steps=20, scale=4.0, seed=0):
        draw = torch.Generator().manual_seed(5)
        self.means = torch.randn(6, 8, generator=draw, dtype=torch.float64)
        self.spread = 0.3
        self.sigmas = torch.linspace(0.98, 0.02, steps + 1, dtype=torch.float64)
        draw = torch.Generator().manual_seed(seed)
        self.x = torch.randn(samples, 8, generator=draw, dtype=torch.float64)
        self.scale = scale
        self.conds, self.unconds = [], []

    def noise(self, components):
        """Exact ε of a mixture of some components."""
        sigma = self.sigmas[len(self.conds)]
        alpha = (1 - sigma**2).sqrt()
        means, variance = self.means[components], alpha**2 * self.spread**2 + sigma**2
        away = self.x[:, None] - alpha * means
        weights = (-away.square().sum(-1) / (2 * variance)).softmax(-1)
        return sigma * (weights[..., None] * away).sum(1) / variance

    def answers(self):
        return self.noise(slice(0, 3)), self.noise(slice(None))

    def step(self, cond, uncond):
        """One DDIM step of the guided answer; keeps both branches."""
        guided = uncond + self.scale * (cond - uncond)
        now, after = self.sigmas[len(self.conds) : len(self.conds) + 2]
        self.conds.append(cond)
        self.unconds.append(uncond)
        clean = (self.x - now * guided) / (1 - now**2).sqrt()
        self.x = (1 - after**2).sqrt() * clean + after * guided


def columns(toy, index):
    return [*toy.conds[:index], toy.answers()[0], *toy.unconds[0:index:2]]


def fitted(steps=20, ridge=1e-8):
    """Coefficients of the odd steps of the first half, each fitted along the runs before it."""
    toy, found = Toy(steps=steps), {}
    for index in range(steps // 2):
        cond, uncond = toy.answers()
        if index % 2:
            normal = Normal()
            normal.add(columns(toy, index), uncond)
            found[index] = normal.solve(ridge)
            uncond = combined(found[index], columns(toy, index))
        toy.step(cond, uncond)
    return found


def combined(beta, values):
    return sum(weight * value for weight, value in zip(beta, values, strict=True))


def test_coefficients_sum_to_one():
    found = fitted()
    assert list(found) == [1, 3, 5, 7, 9]
    for beta in found.values():
        assert sum(beta) == pytest.approx(1.0, abs=0.03)


def test_the_sum_beats_taking_the_last_difference_again():
    """On samples that were not fitted, relative to u − c."""
    found, toy = fitted(), Toy(seed=1)
    ours, again = [], []
    for index in range(10):
        cond, uncond = toy.answers()
        whole = (uncond - cond).norm()
        if index % 2:
            guess = combined(found[index], columns(toy, index))
            last = cond + toy.unconds[index - 1] - toy.conds[index - 1]
            ours.append(float((guess - uncond).norm() / whole))
            again.append(float((last - uncond).norm() / whole))
            uncond = guess
        toy.step(cond, uncond)
    assert all(mine < 0.7 * last for mine, last in zip(ours, again, strict=True)), (ours, again)
    assert max(ours) < 0.3


@settings(max_examples=20)
@given(st.integers(1, 6), st.integers(0, 99))
def test_a_true_sum_is_found(count, seed):
    draw = torch.Generator().manual_seed(seed)
    truth = torch.randn(count, generator=draw, dtype=torch.float64)
    normal = Normal()
    for _ in range(3):
        values = torch.randn(count, 50, generator=draw, dtype=torch.float64)
        normal.add([*values], truth @ values)
    assert normal.solve(0.0) == pytest.approx(truth.tolist(), abs=1e-6)
    shrunk = normal.solve(1.0)
    assert sum(b * b for b in shrunk) < float(truth.square().sum())


def test_errors_are_those_of_the_residuals():
    draw = torch.Generator().manual_seed(3)
    c0, c1, u0, u1 = torch.randn(4, 30, generator=draw, dtype=torch.float64)
    normal = Normal()
    normal.add([c0, c1, u0], u1)
    ours, again = normal.errors((0.2, 0.3, 0.4), 2, 0)
    size = (u1 - c1).norm()
    assert ours == pytest.approx(float((0.2 * c0 + 0.3 * c1 + 0.4 * u0 - u1).norm() / size))
    assert again == pytest.approx(float((c1 + u0 - c0 - u1).norm() / size))


def test_nan_is_not_fitted():
    with pytest.raises(errors.BadOutput, match="nothing to calibrate"):
        Normal().add([torch.full((3,), math.nan)], torch.zeros(3))


# The method in a run.


def again(steps, every=2, guided=0.5):
    """Coefficients that take the last difference again, for every estimated step."""
    method = guidance.LinearAG(every=every, guided=guided)
    lines = []
    for index in range(math.ceil(guided * steps)):
        if not method.evaluates(index):
            conds, unconds = method.inputs(index)
            line = [0.0] * (len(conds) + len(unconds))
            line[index], line[unconds[-1]], line[-1] = 1.0, -1.0, 1.0
            lines.append(tuple(line))
    return guidance.LinearAG(every=every, guided=guided, coefficients=tuple(lines))


@pytest.mark.parametrize("name", ["sd15", "flux_cfg", "zimage", "hunyuanimage"])
def test_20_steps_take_25_evaluations(bench, name):
    method = again(20)
    pipe = bench.pipe(name)
    with counting(pipe) as counts, Plan(method).attach(pipe) as run:
        bench.call(name, steps=20)
    assert run.report.nfe == counts["network"] == 25
    states = Counter(state for *_, state in run.report.to_dict()["events"][method.name])
    assert states == {"computed": 5, "predicted": 5, "reused": 10}
    assert computed_steps(run, method)["uncond", 0] == {0, 2, 4, 6, 8}


@settings(max_examples=12)
@given(st.integers(1, 9), st.integers(1, 4), st.floats(0.0, 1.0))
def test_evaluations_are_those_of_the_pattern(steps, every, guided):
    method = again(steps, every, guided)
    pipe = _flux()
    attached = Plan(method).attach(pipe)
    PIPELINES["flux_cfg"].call(pipe, steps=steps)
    attached.detach()
    if method.why_off() is None:
        within = math.ceil(guided * steps)
        assert attached.report.nfe == steps + math.ceil(within / every)


def _flux(built=[]):  # noqa: B006
    if not built:
        built.append(PIPELINES["flux_cfg"].build())
    return built[0]


class Always(guidance.LinearAG):
    """LinearAG that is attached even where it is off."""

    name = "guidance.Always"

    def why_off(self):
        return None


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux_cfg", "wan22"])
def test_evaluating_every_step_is_plain_guidance(bench, same, name):
    run = Plan(Always(every=1, guided=1.0)).attach(bench.pipe(name))
    output = bench.call(name)
    run.detach()
    assert same(output, bench.stock(name))
    assert guidance.LinearAG.off().why_off()


@pytest.mark.parametrize("name", ["sd15", "flux_cfg"])
def test_the_pipeline_gets_the_sum(bench, name):
    forced = Forced(name, bench.pipe(name))
    beta = (0.2, 0.9, -0.1)
    answers, _ = forced.run(Plan(guidance.LinearAG(coefficients=(beta,))))
    values = answers["cond", 0], answers["cond", 1], answers["uncond", 0]
    assert torch.allclose(answers["uncond", 1], combined(beta, values), atol=1e-5)
    assert torch.equal(answers["uncond", 5], answers["cond", 5])


def test_answers_of_a_cache_are_not_summed(bench):
    """Where an input of a sum came from a cache, the branch is evaluated instead."""
    method = again(12, guided=1.0)
    plan = Plan(method, cache.EasyCache(threshold=1e6, warmup=5, last=False))
    attached = plan.attach(bench.pipe("flux_cfg"))
    bench.call("flux_cfg", steps=12)
    attached.detach()
    events = attached.report.to_dict()["events"][method.name]
    states = {step: state for step, branch, _, state in events}
    assert [states[i] for i in range(6)] == [
        "computed", "predicted", "computed", "predicted", "computed", "predicted",
    ]  # fmt: skip
    assert set(states[i] for i in range(6, 12)) == {"computed"}


def test_without_coefficients_it_is_off(bench, same):
    with Plan(guidance.LinearAG()).attach(bench.pipe("sd15")) as attached:
        assert same(bench.call("sd15"), bench.stock("sd15"))
    assert "accel calibrate linear-ag" in attached.report.verdicts["guidance.LinearAG"].detail


@pytest.mark.parametrize(
    ("fields", "error", "told"),
    [
        ({"total": 8}, errors.UnsupportedModel, "are for 8 evaluations, and this run has 6"),
        ({"scales": (("guidance_scale", 7.5),)}, errors.BadInput, "fitted at guidance_scale=7.5"),
        ({"coefficients": ((1.0, 0.0),)}, errors.BadInput, "2 coefficients for step 1"),
    ],
)
def test_coefficients_of_another_run_are_refused(bench, same, fields, error, told):
    method = guidance.LinearAG(**{"coefficients": (AGAIN,)} | fields)
    attached = Plan(method).attach(bench.pipe("sd15"))
    with pytest.raises(error, match=told):
        bench.call("sd15", steps=6)
    attached.detach()
    assert same(bench.call("sd15"), bench.stock("sd15"))


def fitted_for(bench, name, **call):
    """Coefficients of a pipeline and a negative prompt."""
    pipe = bench.pipe(name)
    asked = [one | call for one in calls(name, 1, 4)]
    return calibrate_linear_ag(pipe, asked, {"guided": 1.0}).method


@pytest.mark.parametrize("name", ["sd15", "flux_cfg"])
def test_coefficients_refuse_another_network(bench, name):
    """Of other weights, or of another config."""
    method, pipe = fitted_for(bench, name), PIPELINES[name].build()
    Plan(method).attach(pipe).detach()
    with torch.no_grad():
        for weight in getattr(pipe, PIPELINES[name].denoisers[0]).parameters():
            weight.mul_(1.05)
    with pytest.raises(errors.UnsupportedModel, match=r"other weights .*calibrate linear-ag"):
        Plan(method).attach(pipe)
    other = "sd3" if name == "sd15" else "sd15"
    with pytest.raises(errors.UnsupportedModel, match="another network"):
        Plan(method).attach(bench.pipe(other))


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "flux_cfg", "wan21", "zimage"])
def test_coefficients_refuse_another_negative_prompt(bench, name):
    method = fitted_for(bench, name, negative_prompt=["blurred"])
    call = {"steps": 4, "negative_prompt": ["blurred"]}
    with Plan(method).attach(bench.pipe(name)) as attached:
        bench.call(name, **call)
        assert attached.report.verdicts[method.name].state == "ACTIVE"
        with pytest.raises(errors.BadInput, match="another negative prompt"):
            bench.call(name, **call | {"negative_prompt": ["a green tractor"]})
        bench.call(name, batch=2, **call | {"negative_prompt": ["blurred"] * 2})


def test_no_negative_prompt_is_the_empty_one(bench):
    """Where it is: SDXL takes zeros for none."""
    for name, equal in (("sd15", True), ("sdxl", False)):
        method = fitted_for(bench, name, negative_prompt=[""])
        with Plan(method).attach(bench.pipe(name)):
            asked = {**next(iter(calls(name, 1, 4))), "negative_prompt": None}
            if equal:
                bench.pipe(name)(**asked)
            else:
                with pytest.raises(errors.BadInput, match="another negative prompt"):
                    bench.pipe(name)(**asked)


EMBEDDED = {
    "sd15": lambda drawn, width: drawn[None, :, :width],
    "zimage": lambda drawn, width: [drawn[:, :width]],
}
"""How a pipeline takes the embeddings of one prompt, of drawn values ``[77, 64]``."""


@pytest.mark.parametrize("name", EMBEDDED)
def test_embeddings_are_told_apart_by_what_they_are(bench, name):
    """By any token but a few; not by the dtype or the device that they were computed in."""
    pipe = bench.pipe(name)
    config = pipe.unet.config if name == "sd15" else pipe.transformer.config
    width = config.get("cross_attention_dim") or config.cap_feat_dim
    draw = torch.Generator().manual_seed(0)
    prompt, one, noise = torch.randn(3, 77, width, generator=draw)
    rounded = (one + 0.005 * noise).bfloat16().float()
    tail = torch.cat([one[:-5], noise[-5:]])
    given = {
        key: EMBEDDED[name](value, width)
        for key, value in {"one": one, "rounded": rounded, "tail": tail, "noise": noise}.items()
    }
    asked = next(iter(calls(name, 1, 4))) | {"prompt": None, "negative_prompt": None}
    asked["prompt_embeds"] = EMBEDDED[name](prompt, width)
    method = calibrate_linear_ag(
        pipe, [asked | {"negative_prompt_embeds": given["one"]}], {"guided": 1.0}
    ).method
    with Plan(method).attach(pipe):
        for same in ("one", "rounded"):
            pipe(**asked | {"negative_prompt_embeds": given[same]})
        for other in ("tail", "noise"):
            with pytest.raises(errors.BadInput, match="another negative prompt"):
                pipe(**asked | {"negative_prompt_embeds": given[other]})
        with pytest.warns(errors.AccelWarning, match="in words and the other one in embeddings"):
            pipe(**next(iter(calls(name, 1, 4))))


def test_embeddings_are_looked_at_only_where_they_count(bench, monkeypatch):
    """The look reads the device."""
    monkeypatch.setattr(underway, "negative_prompt", lambda _: pytest.fail("was looked at"))
    with Plan(guidance.LinearAG(coefficients=(AGAIN,))).attach(bench.pipe("sd15")):
        bench.call("sd15", steps=4)


# Calibration.


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux_cfg", "wan22", "hunyuanimage"])
def test_a_calibration_leaves_the_pipeline_and_its_method_acts(bench, same, name):
    pipe = bench.pipe(name)
    found = calibrate_linear_ag(pipe, calls(name, 2, 8), {})
    assert same(bench.call(name), bench.stock(name))
    plan = Plan(found.method)
    assert Plan.from_toml(plan.to_toml()) == plan
    assert [len(line) for line in found.method.coefficients] == [3, 6]
    assert all(sum(line) == pytest.approx(1.0, abs=0.15) for line in found.method.coefficients)
    with plan.attach(pipe) as attached:
        bench.call(name, steps=8)
    assert attached.report.nfe == 8 + 2
    assert calibrate_linear_ag(pipe, calls(name, 2, 8), {}).method == found.method


@pytest.mark.parametrize("name", ["sd15", "flux_cfg"])
def test_the_fit_is_that_of_the_runs_it_makes(bench, name):
    """By hand, for the second estimated step: along a run under the coefficients of the first."""
    pipe = bench.pipe(name)
    found = calibrate_linear_ag(pipe, calls(name, 1, 8), {}).method
    answers = []

    class Looking(guidance.LinearAG):
        name = "guidance.Looking"
        layer = "weights"

        def attach(self, site):
            def look(call, inner):
                result = inner(call)
                answers.extend(zip(call.rows, result.value.clone(), strict=True))
                return result

            for denoiser in site.denoisers:
                yield site.around(denoiser, look)

    first = found.model_copy(update={"coefficients": found.coefficients[:1], "total": 0})
    attached = Plan(first, Looking(coefficients=(AGAIN,))).attach(pipe)
    pipe(**next(iter(calls(name, 1, 8))))
    attached.detach()
    conds = [value for row, value in answers if row.branch == "cond"]
    unconds = [value for row, value in answers if row.branch == "uncond"]
    normal = Normal()
    normal.add([*conds[:4], *unconds[:2]], unconds[2])  # u of steps 0, 2 and 3
    assert found.coefficients[1] == pytest.approx(normal.solve(1e-8), rel=1e-4, abs=1e-4)


def test_what_cannot_be_calibrated_is_refused(bench, same):
    pipe = bench.pipe("sd15")
    with pytest.raises(errors.BadInput, match="at least one prompt"):
        calibrate_linear_ag(pipe, [], {})
    with pytest.raises(errors.BadInput, match="take more steps"):
        calibrate_linear_ag(pipe, calls("sd15", 1, 2), {})
    with pytest.raises(errors.BadInput, match="no unconditional branch"):
        calibrate_linear_ag(pipe, calls("sd15", 1, 6, guided=False), {})
    with pytest.raises(errors.BadInput, match="no unconditional branch"):
        calibrate_linear_ag(bench.pipe("flux"), calls("flux", 1, 6), {})
    with pytest.raises(errors.BadInput, match="of one number of steps"):
        calibrate_linear_ag(pipe, [*calls("sd15", 1, 6), *calls("sd15", 1, 7)], {})
    two = [
        call | {"negative_prompt": [word]}
        for call, word in zip(calls("sd15", 2, 6), ("blurred", "grey"), strict=True)
    ]
    with pytest.raises(errors.BadInput, match="of two negative prompts"):
        calibrate_linear_ag(pipe, two, {})
    with pytest.raises(ValueError, match="threshold"):
        Options(threshold=0.1)
    assert same(bench.call("sd15"), bench.stock("sd15"))


def test_a_plan_is_written_and_used(models: Folders, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = models("flux_cfg")
    done(
        "calibrate", "linear-ag", "--model", folder, "--count", 1, "--steps", 7, "--out", "p.toml",
        "--set", "guided=0.8",
    )  # fmt: skip
    (made,) = Plan.from_toml(Path("p.toml").read_text()).methods
    assert (made.total, made.guided, len(made.coefficients)) == (7, 0.8, 3)
    picture = done(
        "generate", "a fox", "--model", folder, "--seed", 1, "--steps", 7, "--plan", "p.toml",
        "--out", "fox.png",
    )  # fmt: skip
    assert "ACTIVE" in picture.stderr and "INACTIVE" not in picture.stderr
    refused = run("generate", "a fox", "--model", folder, "--steps", 6, "--plan", "p.toml")
    assert refused.exit_code != 0 and "are for 7 evaluations" in refused.stderr
