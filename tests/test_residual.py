"""Residual guidance: the virtual negative, its recursion, and what a run evaluates."""

import warnings

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_laws_counts import computed_steps, counting
from tiny import PIPELINES

from accel import Plan, errors, guidance, hooks
from accel.seams.spaces import NEGATED, answer, convert
from accel.trajectory import Levels, Step

SCHEDULERS = {
    "epsilon": diffusers.DDIMScheduler(prediction_type="epsilon"),
    "v_prediction": diffusers.DDIMScheduler(prediction_type="v_prediction"),
    "sample": diffusers.DDIMScheduler(prediction_type="sample"),
    "flow_prediction": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
}


def step_of(kind, position, steps=8):
    scheduler = SCHEDULERS[kind]
    scheduler.set_timesteps(steps)
    return Step(position, steps, position, Levels(scheduler))


# The virtual negative.


@settings(max_examples=20)
@given(st.integers(0, 99), st.integers(2, 6), st.floats(0.0, 2.0))
def test_the_recursion_of_the_paper_is_the_closed_form(seed, levels, delta):
    """s_{i+1} = n_{i+1} + α_{i+1}·(σ_i s_i − σ_i e_i)/α_i/σ_{i+1}, along x_{i+1} = α·x̂0 + σ·n."""
    draw = torch.Generator().manual_seed(seed)
    sigmas = torch.linspace(0.9, 0.2, levels, dtype=torch.float64)
    alphas = (1 - sigmas**2).sqrt()
    clean = torch.randn(12, generator=draw, dtype=torch.float64)
    noises = torch.randn(levels, 12, generator=draw, dtype=torch.float64)
    x, virtual = alphas[0] * clean + sigmas[0] * noises[0], noises[0]
    for i in range(levels):
        alpha, sigma = alphas[i], sigmas[i]
        assert torch.allclose(virtual, (x - alpha * clean) / sigma, atol=1e-12)
        cond = torch.randn(12, generator=draw, dtype=torch.float64)
        guided = delta * virtual + 1.2 * (cond - delta * virtual)
        if i + 1 < levels:
            drift = (sigma * virtual - sigma * guided) / alpha
            virtual = noises[i + 1] + alphas[i + 1] * drift / sigmas[i + 1]
            x = alphas[i + 1] * (x - sigma * guided) / alpha + sigmas[i + 1] * noises[i + 1]


@pytest.mark.parametrize("network", ["Any", *NEGATED])
@pytest.mark.parametrize("position", [1, 4, 7])
@pytest.mark.parametrize("kind", SCHEDULERS)
def test_a_virtual_answer_leads_back_to_the_input(kind, position, network):
    step = step_of(kind, position)
    x, clean = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    virtual = answer(x, clean, step, network)
    assert torch.allclose(convert(virtual, x, step, "x0", network), clean, atol=1e-9)


@pytest.mark.parametrize("position", [1, 4, 7])
@pytest.mark.parametrize("kind", SCHEDULERS)
def test_delta_scales_the_noise_in_every_prediction(kind, position):
    """Guidance of answers is guidance of ε, whatever the network predicts."""
    step = step_of(kind, position)
    _, alpha, sigma = step.level
    x, clean, found = torch.randn(3, 4, 8, 8, dtype=torch.float64)
    noise = (x - alpha * clean) / sigma
    cond = (x - alpha * found) / sigma
    for delta in (0.0, 0.7, 1.0):
        virtual = answer(x, clean, step, "Any", delta)
        guided = virtual + 3.0 * (answer(x, found, step, "Any") - virtual)
        data = convert(guided, x, step, "x0", "Any")
        expected = delta * noise + 3.0 * (cond - delta * noise)
        assert torch.allclose((x - alpha * data) / sigma, expected, atol=1e-7)


def test_a_flow_at_pure_noise_has_a_virtual_velocity():
    step = step_of("flow_prediction", 0)
    x, clean = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    assert torch.allclose(answer(x, clean, step, "Any"), x - clean)


# In a run.


class Watch:
    """What a pipeline does between its network and its scheduler."""

    def __init__(self, pipe):
        self.pipe = pipe
        self.clean, self.inputs, self.answers, self.guided = None, [], [], []

    def noise(self, inner, *args, **kwargs):
        if self.clean is None:
            self.clean = (kwargs["original_samples"] if kwargs else args[0]).clone()
        return inner(*args, **kwargs)

    def forward(self, inner, *args, **kwargs):
        result = inner(*args, **kwargs)
        self.inputs.append(
            (
                kwargs["hidden_states"] if kwargs.get("hidden_states") is not None else args[0]
            ).clone()
        )
        self.answers.append(result[0].clone())
        return result

    def step(self, inner, output, *args, **kwargs):
        self.guided.append(output.clone())
        return inner(output, *args, **kwargs)

    def run(self, plan, call):
        network = getattr(self.pipe, "unet", None) or self.pipe.transformer
        adder = "scale_noise" if hasattr(self.pipe.scheduler, "scale_noise") else "add_noise"
        attached = plan.attach(self.pipe)
        undos = [
            hooks.wrap(self.pipe.scheduler, adder, self.noise),
            hooks.wrap(network, "forward", self.forward),
            hooks.wrap(self.pipe.scheduler, "step", self.step),
        ]
        call()
        for undo in (*undos, attached.detach):
            undo()
        return attached.report


def sd3_img2img():
    """SD3 from a picture: a batched flow."""
    parts = PIPELINES["sd3"].build().components
    pipe = diffusers.StableDiffusion3Img2ImgPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture():
    rows = torch.linspace(0, 1, 32)
    return (rows[:, None] * rows).expand(1, 3, 32, 32).clone()


FLOWS = {
    "sd3": (
        sd3_img2img,
        {"guidance_scale": 4.0, "negative_prompt": "blurry", "height": 32, "width": 32},
    ),
    "flux": (
        PIPELINES["flux_img2img"].build,
        {"true_cfg_scale": 4.0, "negative_prompt": "blurry", "height": 32, "width": 32},
    ),
}


def flow_call(pipe, more, steps=6):
    return lambda: pipe(
        "a red fox",
        image=picture(),
        strength=0.7,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        max_sequence_length=48,
        **more,
    )


def zimage_img2img():
    """A list of rows, and a network that answers the other way round."""
    pipe = diffusers.ZImageImg2ImgPipeline(**PIPELINES["zimage"].build().components)
    return pipe, {"prompt": "a red fox", "negative_prompt": "blurry", "image": picture()}


def wan_from_a_clip():
    """By embeddings: the pipeline cleans words by a package that it does not need otherwise."""
    parts = PIPELINES["wan21"].build().components
    names = ("tokenizer", "text_encoder", "transformer", "vae", "scheduler")
    pipe = diffusers.WanVideoToVideoPipeline(**{name: parts[name] for name in names})
    draw = torch.Generator().manual_seed(1)
    one, other = torch.randn(2, 1, 48, pipe.transformer.config.text_dim, generator=draw)
    clip = [*(torch.linspace(0, 1, 9)[:, None, None, None] * picture())]
    return pipe, {"prompt_embeds": one, "negative_prompt_embeds": other, "video": clip}


class Outside(guidance.Residual):
    """Sees what the pipeline is given: outside of all guidance."""

    name = "guidance.Outside"
    layer = "loop"

    def attach(self, site):
        def look(call, inner):
            result = inner(call)
            SEEN.extend(
                (call.step, row.branch, call.sample[i].clone(), result.value[i].clone())
                for i, row in enumerate(call.rows)
            )
            return result

        SEEN.clear()
        for denoiser in site.denoisers:
            yield site.around(denoiser, look)


SEEN = []


@pytest.mark.parametrize("build", [zimage_img2img, wan_from_a_clip])
def test_lists_and_clips_are_led_back_to_their_input(build):
    """At every step the virtual answer is one whose clean sample is the input."""
    pipe, call = build()
    pipe.set_progress_bar_config(disable=True)
    network, clean = type(pipe.transformer).__name__, []
    adder = "scale_noise" if hasattr(pipe.scheduler, "scale_noise") else "add_noise"
    run = Plan(Outside(), guidance.Residual(negative="self")).attach(pipe)
    undo = hooks.wrap(
        pipe.scheduler,
        adder,
        lambda inner, *a, **k: clean.append(a[0].clone()) or inner(*a, **k),
    )
    pipe(
        **call,
        strength=0.7,
        guidance_scale=4.0,
        num_inference_steps=6,
        height=32,
        width=32,
        max_sequence_length=48,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    )
    undo()
    run.detach()
    virtual = [(step, x, y) for step, branch, x, y in SEEN if branch == "uncond"]
    assert run.report.nfe == len(virtual) == run.report.steps > 2
    for step, x, y in virtual:
        found = convert(y, x, step, "x0", network)
        assert torch.allclose(found, clean[0][0].reshape(found.shape), atol=1e-4)


def counted(pipe, plan, call):
    with counting(pipe) as counts:
        attached = plan.attach(pipe)
        call()
        attached.detach()
    assert attached.report.nfe == counts["network"]
    return attached.report


@pytest.mark.parametrize("name", ["sd_img2img", *FLOWS])
def test_n_n_plus_one_and_two_n_evaluations(bench, name):
    if name in FLOWS:
        build, more = FLOWS[name]
        pipe = build()
        call = flow_call(pipe, more)
    else:
        pipe = bench.pipe(name)
        call = lambda: bench.call(name, steps=8)  # noqa: E731
    reports = {
        negative: counted(pipe, Plan(guidance.Residual(negative=negative)), call)
        for negative in ("self", "onetime", "none")
    }
    steps = reports["none"].steps
    assert {negative: report.nfe for negative, report in reports.items()} == {
        "self": steps,
        "onetime": steps + 1,
        "none": 2 * steps,
    }


@pytest.mark.parametrize("delta", [0.0, 0.8, 1.0])
def test_the_pipeline_is_given_the_virtual_negative(bench, delta):
    """e = δ·s + w(c − δ·s), with s from the input's own latents; at δ = 0, w·c."""
    pipe, watch = bench.pipe("sd_img2img"), Watch(bench.pipe("sd_img2img"))
    plan = Plan(guidance.Residual(negative="self", delta=delta))
    report = watch.run(plan, lambda: bench.call("sd_img2img", steps=8))
    scheduler = pipe.scheduler
    begin = len(scheduler.timesteps) - report.steps
    levels = Levels(scheduler)
    for k, (x, both, guided) in enumerate(
        zip(watch.inputs, watch.answers, watch.guided, strict=True)
    ):
        _, alpha, sigma = levels.at(begin + k)
        cond = both[1:]
        virtual = delta * (x[1:] - alpha * watch.clean) / sigma
        assert torch.allclose(both[:1], virtual, rtol=1e-3, atol=1e-4)
        assert torch.allclose(guided, virtual + 5.0 * (cond - virtual), rtol=1e-3, atol=1e-3)
        if delta == 0:
            assert torch.allclose(guided, 5.0 * cond, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FLOWS)
def test_of_a_flow_it_is_the_velocity_from_the_input(name):
    build, more = FLOWS[name]
    pipe = build()
    watch = Watch(pipe)
    report = watch.run(Plan(guidance.Residual(negative="self")), flow_call(pipe, more))
    levels = Levels(pipe.scheduler)
    begin = len(pipe.scheduler.timesteps) - report.steps
    clean = watch.clean
    if name == "flux":
        clean = pipe._pack_latents(clean, *clean.shape)
        pairs = zip(watch.inputs[::2], watch.answers[1::2], strict=True)
    else:
        pairs = ((x[:1], y[:1]) for x, y in zip(watch.inputs, watch.answers, strict=True))
    for k, (x, uncond) in enumerate(pairs):
        sigma = levels.at(begin + k)[2]
        assert torch.allclose(uncond, (x - clean) / sigma, rtol=1e-3, atol=1e-3)


def test_onetime_leads_back_to_what_the_negative_prompt_shows(bench):
    pipe, watch = bench.pipe("sd_img2img"), Watch(bench.pipe("sd_img2img"))
    method = guidance.Residual(negative="onetime")
    report = watch.run(Plan(method), lambda: bench.call("sd_img2img", steps=8))
    levels = Levels(pipe.scheduler)
    begin = len(pipe.scheduler.timesteps) - report.steps
    _, alpha, sigma = levels.at(begin)
    shown = (watch.inputs[0][:1] - sigma * watch.answers[0][:1]) / alpha
    for k in range(1, report.steps):
        _, alpha, sigma = levels.at(begin + k)
        virtual = (watch.inputs[k][1:] - alpha * shown) / sigma
        assert torch.allclose(watch.answers[k][:1], virtual, rtol=1e-3, atol=1e-3)
    states = {step for step, branch, *_ in report.to_dict()["events"][method.name]}
    assert states == set(range(report.steps))


def test_self_knows_nothing_of_the_negative_prompt(bench, same):
    run = Plan(guidance.Residual(negative="self")).attach(bench.pipe("sd_img2img"))
    first = bench.call("sd_img2img", steps=6)
    other = bench.call("sd_img2img", steps=6, negative_prompt=["a green tractor"])
    run.detach()
    assert same(first, other)


@pytest.mark.parametrize(
    ("negative", "prompt", "warns"),
    [("self", "a green tractor", True), ("self", "", False), ("onetime", "a green tractor", False)],
)
def test_self_says_that_it_does_not_use_the_negative_prompt(bench, negative, prompt, warns):
    with (
        warnings.catch_warnings(record=True) as caught,
        Plan(guidance.Residual(negative=negative)).attach(bench.pipe("sd_img2img")),
    ):
        warnings.simplefilter("always")
        bench.call("sd_img2img", steps=6, negative_prompt=[prompt])
    told = [w for w in caught if "negative prompt of this run is not used" in str(w.message)]
    assert len(told) == warns


def test_self_decides_for_each_sample(bench):
    run = Plan(guidance.Residual(negative="self")).attach(bench.pipe("sd_img2img"))
    together = bench.call("sd_img2img", steps=6, batch=2)
    from tiny import PROMPTS

    alone = bench.call("sd_img2img", steps=6, prompts=[PROMPTS[1]], seeds=[1])
    run.detach()
    assert torch.allclose(together[1], alone[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["sd15", "flux_cfg", "wan21", "sd_inpaint"])
def test_from_noise_alone_it_says_that_there_is_no_input(bench, same, name):
    with (
        pytest.warns(errors.AccelWarning, match="starts from noise alone"),
        Plan(guidance.Residual()).attach(bench.pipe(name)),
    ):
        assert same(bench.call(name), bench.stock(name))


def test_without_guidance_there_is_nothing_to_do(bench, same):
    with (
        pytest.warns(errors.AccelWarning, match="guidance is off"),
        Plan(guidance.Residual()).attach(bench.pipe("sd_img2img")),
    ):
        output = bench.call("sd_img2img", guidance=False)
    assert same(output, bench.stock("sd_img2img", guidance=False))


def test_a_cached_answer_is_not_what_the_negative_prompt_shows(bench):
    """Until the network itself has answered, onetime asks again."""
    from accel import cache

    method = guidance.Residual(negative="onetime")
    plan = Plan(method, cache.EasyCache(threshold=1e6, warmup=3))
    run = plan.attach(bench.pipe("sd_img2img"))
    bench.call("sd_img2img", steps=8)
    run.detach()
    assert computed_steps(run, method)["uncond", 0] == {0}
