"""Empirical model statistics: their measurement, their file, and what they are worth."""

import json
import math
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig
from safetensors.numpy import load, save
from saved import Folders, done, run
from test_cli_calibrate import calls
from test_samplers_v3 import LIKE_PP, WAVY, residual, take
from tiny import PIPELINES
from toy import END, MEANS, PROCESSES, START, STDS, WEIGHTS, mixture_data, mixture_path

from accel import Plan, memory
from accel.errors import AccelWarning, BadInput, BadOutput, UnsupportedModel
from accel.seams.identity import TENSORS, Place, _sample, compared, difference, identity
from app import plans
from samplers import DPMSolverV3, DPMSolverV3Scheduler
from samplers.dpmsolver_v3_step import step
from samplers.ems import EMS, read
from samplers.ems_calibration import Moments, Options, Point, calibrate_ems, measure
from samplers.fingerprint import Fingerprint
from samplers.prediction import vp_level

PRINT = Fingerprint(
    model="m" * 16, process="p" * 16, prediction="epsilon", guidance=(("guidance_scale", 5.0),)
)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders(tmp_path_factory.getbasetemp() / "saved-models")


# The file.


@pytest.mark.parametrize("shape", [(), (3,), (3, 4, 2)], ids=["scalar", "channel", "none"])
@pytest.mark.parametrize("measured", [None, PRINT], ids=["any", "measured"])
def test_the_round_trip_of_the_file_is_exact(shape, measured, tmp_path):
    rng = np.random.default_rng(0)
    tables = [rng.standard_normal((9, *shape)) for _ in range(3)]
    ems = EMS(np.linspace(-3.1, 2.7, 9), *tables, axis=-1, measured=measured, note="by hand")
    sha256 = ems.write(tmp_path / "a.safetensors")
    back = read(tmp_path / "a.safetensors", sha256)
    for name in ("lams", "l", "s", "b"):
        assert np.array_equal(getattr(back, name), getattr(ems, name))
    assert (back.axis, back.measured, back.note) == (-1, measured, "by hand")
    assert back.reduce == ("none" if len(shape) == 3 else "channel" if shape else "scalar")
    assert back.to_bytes() == ems.to_bytes()


def test_the_file_is_one_that_others_can_read(tmp_path):
    from safetensors import safe_open

    replace(WAVY, measured=PRINT).write(tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "np") as file:
        assert set(file.keys()) == {"lams", "l", "s", "b"}
        about = json.loads(file.metadata()["ems"])
    assert about["measured"]["prediction"] == "epsilon"
    assert (about["reduce"], about["grid"], about["lambda"]) == ("scalar", 64, [-8.0, 8.0])


def test_numbers_of_a_plan_are_the_same_statistics():
    back = EMS.from_scalars(replace(WAVY, measured=PRINT).to_scalars(17))
    assert np.array_equal(back.l, WAVY.l) and np.allclose(back.lams, WAVY.lams, atol=1e-12)
    assert back.measured == PRINT
    with pytest.raises(BadInput, match="too large for a plan"):
        EMS(np.arange(3.0), *[np.zeros((3, 4))] * 3).to_scalars()


def test_between_its_levels_a_table_is_straight_and_beyond_them_constant():
    ems = EMS(np.array([0.0, 1.0, 2.0]), *[np.array([1.0, 3.0, 7.0])] * 3)
    found = ems.at(np.array([-5.0, 0.0, 0.25, 1.5, 2.0, 9.0]))[0]
    assert found == pytest.approx([1.0, 1.0, 1.5, 5.0, 7.0, 7.0])


def forged(about=None, **tensors):
    """The bytes of statistics that no check has seen."""
    head = {"format": "diffusers-accel ems 1", "axis": 1, "measured": None, "note": ""}
    return save(load(WAVY.to_bytes()) | tensors, {"ems": json.dumps(head | (about or {}))})


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"no such thing", "no safetensors file"),
        (WAVY.to_bytes()[:500], "no safetensors file"),
        (b"", "no safetensors file"),
        (save({"weight": np.zeros(3)}), "holds no statistics"),
        (forged({"format": "ems 2"}), "holds no statistics"),
        (forged({"measured": {"model": 3}}), "does not say what it was measured on"),
        (forged(l=np.full(65, math.nan)), "not finite"),
        (forged(lams=np.zeros(65)), "uniform, ascending grid"),
        (forged(s=np.zeros((65, 4))), "all of one shape"),
    ],
)
def test_a_damaged_file_is_refused(content, told, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(BadInput, match=rf"{told}(.|\n)*accel calibrate ems"):
        read(path)


def test_another_file_than_was_meant_is_refused(tmp_path):
    WAVY.write(tmp_path / "a.safetensors")
    with pytest.raises(BadInput, match="not those that were meant"):
        read(tmp_path / "a.safetensors", "0" * 64)
    with pytest.raises(BadInput, match="cannot be read"):
        read(tmp_path / "b.safetensors")


# What they are for.


def tiny_fingerprint(pipe, **guidance):
    scheduler = DPMSolverV3Scheduler.from_config(
        pipe.scheduler.config, statistics=LIKE_PP.to_scalars().model_dump(mode="json")
    )
    return Fingerprint.of(pipe, scheduler, guidance)


def test_statistics_of_another_model_schedule_prediction_or_guidance_are_refused():
    tiny = PIPELINES["sd15"]
    pipe = tiny.build()
    true = tiny_fingerprint(pipe, guidance_scale=5.0, guidance_rescale=0.0)
    stock = pipe.scheduler

    def attach(**changed):
        measured = true.model_copy(update=changed)
        numbers = LIKE_PP.to_scalars().model_copy(update={"measured": measured})
        return Plan(DPMSolverV3(numbers=numbers)).attach(pipe)

    for changed, told in (
        ({"model": "f" * 16}, "another network"),
        ({"process": "f" * 16}, "another noise process"),
        ({"prediction": "v_prediction"}, "another prediction"),
    ):
        with pytest.raises(UnsupportedModel, match=told):
            attach(**changed)
        assert pipe.scheduler is stock
    with attach():
        tiny.call(pipe, steps=3)
    with attach(guidance=(("guidance_scale", 2.0),)) as attached:
        with pytest.raises(BadInput, match="another guidance: guidance_scale=2, not"):
            tiny.call(pipe, steps=3)
        assert attached.report.calls == 0
    assert pipe.scheduler is stock


def test_a_scheduler_alone_refuses_another_process_or_prediction():
    pipe = PIPELINES["sd15"].build()
    measured = tiny_fingerprint(pipe)
    given = LIKE_PP.to_scalars().model_copy(update={"measured": measured}).model_dump(mode="json")
    config = pipe.scheduler.config
    DPMSolverV3Scheduler.from_config(config, statistics=given)
    for changed in ({"beta_end": 0.015}, {"prediction_type": "v_prediction"}):
        with pytest.raises(BadInput, match="measured for another"):
            DPMSolverV3Scheduler.from_config(config, statistics=given, **changed)


# Whose numbers they are: classes, configs, and the weights.


def measured_on(pipe):
    """A method whose numbers are of a pipeline."""
    numbers = LIKE_PP.to_scalars().model_copy(update={"measured": tiny_fingerprint(pipe)})
    return DPMSolverV3(numbers=numbers)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["sd15", "flux_cfg", "wan22"])
def test_the_same_weights_in_another_dtype_are_the_same_network(name, dtype):
    one, other = PIPELINES[name].build(), PIPELINES[name].build().to(dtype)
    assert difference(identity(one), identity(other)) is None
    assert difference(identity(other), identity(one)) is None


def test_any_other_weight_is_another_network():
    """One tensor after the other."""
    pipe = PIPELINES["flux_cfg"].build()
    weights = list(pipe.transformer.parameters())
    before = identity(pipe)
    assert len(weights) <= TENSORS
    for weight in weights:
        kept = weight.data.clone()
        weight.data.add_(0.02 * kept.abs().max() + 1e-3)
        assert "other weights" in (difference(before, identity(pipe)) or "")
        weight.data.copy_(kept)
    assert identity(pipe) == before


def test_numbers_refuse_another_networks_weights():
    pipe = PIPELINES["sd15"].build()
    plan = Plan(measured_on(pipe))
    with torch.no_grad():
        for weight in pipe.unet.parameters():
            weight.mul_(1.05)
    with pytest.raises(UnsupportedModel, match=r"other weights .*accel calibrate"):
        plan.attach(pipe)


def test_a_lora_is_another_network_as_long_as_it_acts():
    """Loaded or fused it is the same other one."""
    pipe = PIPELINES["sd15"].build()
    plan, before = Plan(measured_on(pipe)), identity(pipe)
    targets = ["to_q", "to_k", "to_v", "conv1"]
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False), "one")
    loaded = identity(pipe)
    with pytest.raises(UnsupportedModel, match="with a LoRA"):
        plan.attach(pipe)
    pipe.unet.disable_adapters()
    assert identity(pipe) == before
    plan.attach(pipe).detach()
    pipe.unet.enable_adapters()
    pipe.unet.fuse_lora()
    assert difference(loaded, identity(pipe)) is None
    pipe.unet.unfuse_lora()
    assert difference(loaded, identity(pipe)) is None
    pipe.unet.delete_adapters(["one"])
    assert difference(before, identity(pipe)) is None


def test_numbers_that_tell_no_weights_are_used_with_a_warning():
    pipe = PIPELINES["sd15"].build()
    measured = tiny_fingerprint(pipe)
    old = measured.model_copy(update={"model": measured.model.partition(":")[0]})
    numbers = LIKE_PP.to_scalars().model_copy(update={"measured": old})
    with pytest.warns(AccelWarning, match="its numbers do not tell most weights"):
        Plan(DPMSolverV3(numbers=numbers)).attach(pipe).detach()


def test_weights_that_have_no_value_are_not_compared():
    """Quantized, or elsewhere than in memory."""
    pipe, other = PIPELINES["sd15"].build(), PIPELINES["sd15"].build()
    method = measured_on(pipe)
    other.unet.conv_in.to(torch.float8_e4m3fn)
    Plan(method).attach(other).detach()
    other.unet.to("meta")
    with pytest.warns(AccelWarning, match=r"the network as it is stored does not tell"):
        Plan(method).attach(other).detach()


@pytest.mark.parametrize("name", ["sd15", "flux_cfg"])
def test_weights_in_8_bits_are_said_to_be_unknown(name):
    """Their norms keep their values, which tell nothing: the LoRA of such a network is not seen."""
    pipe = PIPELINES[name].build()
    before = identity(pipe)
    (denoiser,) = PIPELINES[name].denoisers
    network = getattr(pipe, denoiser)
    network.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "one")
    casts = Plan(memory.LayerwiseCasting()).attach(pipe)
    with pytest.warns(AccelWarning, match="does not tell most weights"):
        assert compared(before, identity(pipe), "test") is None
    casts.detach()
    assert "with a LoRA" in (compared(before, identity(pipe), "test") or "")


@pytest.mark.parametrize("name", ["sd15", "flux_cfg", "wan21"])
def test_norms_and_biases_alone_do_not_tell_the_weights(name):
    """As `bitsandbytes` and torchao leave them."""
    pipe = PIPELINES[name].build()
    before = identity(pipe)
    for module in getattr(pipe, PIPELINES[name].denoisers[0]).modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d | torch.nn.Conv3d):
            module.weight.data = module.weight.data.to(torch.int8)
    with pytest.warns(AccelWarning, match="does not tell most weights"):
        assert compared(before, identity(pipe), "test") is None


def test_weights_on_disk_have_no_value(tmp_path):
    """What is in memory in their place is not initialised."""
    pipe = PIPELINES["sd15"].build()
    before = identity(pipe)
    cpu = torch.device("cpu")
    pipe.unet.enable_group_offload(
        cpu, cpu, "leaf_level", offload_to_disk_path=str(tmp_path), low_cpu_mem_usage=True
    )
    for weight in pipe.unet.parameters():
        weight.data.fill_(7.0)  # as bad as it may be
    with pytest.warns(AccelWarning, match="does not tell most weights"):
        assert compared(before, identity(pipe), "test") is None


def test_a_compiled_block_is_the_same_network():
    pipe = PIPELINES["pixart_sigma"].build()
    before, blocks = identity(pipe), pipe.transformer.transformer_blocks
    blocks[0] = torch.compile(blocks[0])
    assert identity(pipe) == before


@pytest.mark.parametrize("name", ["sd15", "flux_cfg", "wan21", "pixart_sigma"])
def test_fused_projections_are_the_same_network(name):
    pipe = PIPELINES[name].build()
    before = identity(pipe)
    network = getattr(pipe, PIPELINES[name].denoisers[0])
    weights = len(list(network.parameters()))
    network.fuse_qkv_projections()
    assert len(list(network.parameters())) > weights
    assert identity(pipe) == before


def test_a_damaged_identity_is_said_to_be():
    whole = identity(PIPELINES["sd15"].build())
    digest, _, _ = whole.partition(":")
    for damaged in (f"{digest}:", digest):
        with pytest.warns(AccelWarning, match="do not tell most weights"):
            assert compared(damaged, whole, "test") is None
    for damaged in (whole[:-2], whole + "?", f"{digest}:AAA", f"{digest}:AAAA"):
        for pair in ((damaged, whole), (whole, damaged), (damaged, digest)):
            assert "damaged" in (compared(*pair, "test") or "")


@pytest.mark.parametrize("first", [0, 1, 2])
def test_one_read_of_the_device(monkeypatch, first):
    """Wherever the tensors without a value are, the others go to the CPU together."""
    pipe = PIPELINES["sd15"].build()
    places = iter(range(10**6))

    def value(_):
        missing = next(places) == first
        return torch.full((), torch.nan) if missing else torch.empty((), device="meta")

    monkeypatch.setattr(Place, "value", value)
    assert _sample(pipe.unet).device.type == "meta"


def test_a_scheduler_alone_says_once_that_it_does_not_know_the_network():
    pipe = PIPELINES["sd15"].build()
    method, config = measured_on(pipe), pipe.scheduler.config
    given = method.numbers.model_dump(mode="json")
    alone = DPMSolverV3Scheduler.from_config(config, statistics=given)
    with pytest.warns(AccelWarning, match="set scheduler.compared = True"):
        alone.set_timesteps(4)
    alone.set_timesteps(4)
    told = DPMSolverV3Scheduler.from_config(config, statistics=given)
    told.compared = True
    told.set_timesteps(4)
    before = dict(vars(pipe.scheduler))
    with Plan(method.model_copy(update={"order": 3})).attach(pipe):
        pipe.scheduler.set_timesteps(4)
    assert vars(pipe.scheduler).keys() == before.keys()


# What is measured: on the mixture of Gaussians, against its exact predictor.


def eps(x, level):
    return (x - level.alpha * mixture_data(x, level)) / level.sigma


@cache
def mixture_ems(process, count=100, samples=2000):
    """The statistics of the mixture's predictor, from exact trajectories and Jacobians."""
    level, rng, substeps = PROCESSES[process], np.random.default_rng(0), 4
    lams = np.linspace(START, END, count + 1)
    which = rng.choice(3, samples, p=WEIGHTS)
    data = MEANS[which] + STDS[which] * rng.standard_normal(samples)
    first = level(START)
    y = (first.alpha * data + first.sigma * rng.standard_normal(samples)) / first.sigma

    def slope(lam, y):
        here = level(lam)
        return math.exp(lam) * mixture_data(here.sigma * y, here)

    points, h = [], (lams[1] - lams[0]) / substeps
    for lam in lams:
        here = level(lam)
        x = here.sigma * y
        jacobian = (eps(x + 1e-4, here) - eps(x - 1e-4, here)) / 2e-4
        seen = (torch.from_numpy(value)[:, None] for value in (x, eps(x, here), jacobian))
        points.append(Point(here, *seen))
        for at in lam + h * np.arange(substeps):
            k1 = slope(at, y)
            k2 = slope(at + h / 2, y + h / 2 * k1)
            k3 = slope(at + h / 2, y + h / 2 * k2)
            k4 = slope(at + h, y + h * k3)
            y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    moments = Moments(Options(grid=200))
    moments.add(points)
    return moments.statistics(PRINT)


def toy_error(ems, process, count, order):
    """Error at the end of a run from one exact state; predictor only."""
    levels = [PROCESSES[process](lam) for lam in np.linspace(START, END, count + 1)]
    path, history = mixture_path(process), []
    x = path[0]
    for i in range(count):
        history.insert(0, residual(ems, x, levels[i]))
        nodes = levels[max(i - order + 1, 0) : i + 1][::-1]
        x = take(step(ems, levels[i + 1], nodes), x, history[: len(nodes)])
    return np.sqrt(np.mean((x - path[-1]) ** 2))


@pytest.mark.parametrize("process", PROCESSES)
def test_the_linear_part_falls_from_1_to_0(process):
    """Pure noise is its own noise prediction; at the data's end the noise is what is unknown."""
    ems = mixture_ems(process)
    assert ems.l[0] == pytest.approx(0.99, abs=0.01)
    assert ems.l[-1] == pytest.approx(0.06, abs=0.02)
    assert (np.diff(ems.l) < 1e-3).all()


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("order", [1, 2])
def test_measured_statistics_beat_dpm_solver_pp(process, order):
    """And by as much as was measured before: by 2.5 at 10 steps, in either order."""
    ems = mixture_ems(process)
    ratios = {
        count: toy_error(ems, process, count, order) / toy_error(LIKE_PP, process, count, order)
        for count in (5, 8, 10, 15, 20)
    }
    assert max(ratios.values()) < 0.55
    assert ratios[10] < 0.4


def test_the_errors_are_those_that_were_measured_before():
    assert toy_error(mixture_ems("vp"), "vp", 10, 1) == pytest.approx(0.061, rel=0.1)
    assert toy_error(LIKE_PP, "vp", 10, 1) == pytest.approx(0.158, rel=0.1)
    assert toy_error(mixture_ems("vp"), "vp", 10, 2) == pytest.approx(0.0117, rel=0.15)


def points_of(f_of, levels, samples=400):
    """A world with l = 0 in which f follows a given function of λ and of the sample."""
    rng = np.random.default_rng(1)
    draw = torch.from_numpy(rng.standard_normal((samples, 2, 3)))
    seen = []
    for level in levels:
        noise = f_of(draw, level.lam) * level.alpha / level.sigma
        seen.append(Point(level, draw, noise, torch.zeros_like(draw)))
    return seen


@pytest.mark.parametrize("reduce", ["scalar", "channel", "none"])
def test_scale_and_bias_are_the_slope_and_intercept_of_the_change_of_f(reduce):
    """f' = s·f + b: f = (z + b/s)·e^{sλ} − b/s, for one s and b a channel."""
    s, b = torch.tensor([[0.3], [-0.6]]), torch.tensor([[0.5], [1.0]])
    if reduce == "scalar":
        s, b = s[:1], b[:1]
    levels = [vp_level(math.exp(-lam)) for lam in np.linspace(-1.5, 1.5, 121)]

    def f_of(z, lam):
        return (z + b / s) * torch.exp(s * lam) - b / s

    moments = Moments(Options(reduce=reduce, grid=60, axis=1))
    moments.add(points_of(f_of, levels))
    ems = moments.statistics(PRINT)
    assert ems.reduce == reduce and not ems.l.any()
    inner = slice(2, -2)
    expected = {"scalar": lambda t: t[0, 0], "channel": lambda t: t[:, 0], "none": lambda t: t}
    for found, true in ((ems.s, s), (ems.b, b)):
        want = expected[reduce](true).numpy() * np.ones(found.shape[1:])
        assert np.allclose(found[inner], want, atol=2e-3)


def test_calls_are_pooled_as_if_they_were_one_batch():
    levels = [vp_level(math.exp(-lam)) for lam in np.linspace(-1.5, 1.5, 20)]
    points = points_of(lambda z, lam: z * math.exp(0.4 * lam) + z**2, levels)
    whole, parts = Moments(Options(reduce="none")), Moments(Options(reduce="none"))
    whole.add(points)
    for rows in (slice(0, 150), slice(150, None)):
        cut = [Point(p.level, p.x[rows], p.noise[rows], p.product[rows]) for p in points]
        parts.add(cut)
    a, b = whole.statistics(PRINT), parts.statistics(PRINT)
    assert all(np.allclose(getattr(a, n), getattr(b, n), atol=1e-5) for n in ("l", "s", "b"))


# On pipelines.


@pytest.mark.parametrize("name", ["sd15_v", "flux_cfg", "wan22"])
def test_exact_derivatives_and_differences_agree(name):
    found = []
    for jacobian in ("exact", "difference"):
        pipe = PIPELINES[name].build()
        stock = pipe.scheduler
        options = Options(jacobian=jacobian, distance=0.02, grid=12)
        ems, how = measure(pipe, calls(name, 1, 7), options)
        assert pipe.scheduler is stock
        assert ("exact" if jacobian == "exact" else "differences of 0.02") in how
        found.append(ems)
    exact, difference = found
    assert np.allclose(exact.span, difference.span)
    assert np.allclose(
        exact.l[3:], difference.l[3:], atol=2e-3
    )  # the first level has none if exact
    assert exact.measured == difference.measured
    assert exact.measured.guidance


def test_a_network_without_forward_derivatives_is_differenced_or_refused(monkeypatch):
    class Opaque(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def jvp(ctx, *tangents):
            raise NotImplementedError("none here")

    pipe = PIPELINES["sd3"].build()
    pipe.transformer.register_forward_hook(lambda m, a, out: (Opaque.apply(out[0]),))
    how = measure(pipe, calls("sd3", 1, 5), Options())[1]
    plain = measure(pipe, calls("sd3", 1, 5), Options(jacobian="difference"))[0]
    assert "differences" in how
    again = measure(pipe, calls("sd3", 1, 5), Options())[0]
    assert np.array_equal(again.l, plain.l)  # the noise of the call was drawn once
    with pytest.raises(UnsupportedModel, match="jacobian=difference"):
        measure(pipe, calls("sd3", 1, 5), Options(jacobian="exact"))


def test_what_cannot_be_measured_is_refused(bench):
    pipe = bench.pipe("sd3")
    with pytest.raises(BadInput, match="at least one prompt"):
        calibrate_ems(pipe, [], {})
    with pytest.raises(BadInput, match="4 steps or more"):
        calibrate_ems(pipe, calls("sd3", 1, 3), {})
    with pytest.raises(BadInput, match="two samples or more"):
        calibrate_ems(pipe, calls("sd3", 1, 5), {"reduce": "none"})
    with pytest.raises(BadInput, match="differ in their noise levels"):
        calibrate_ems(pipe, [*calls("sd3", 1, 5), *calls("sd3", 1, 6)], {})
    other = [call | {"guidance_scale": 2.0 + i} for i, call in enumerate(calls("sd3", 2, 5))]
    with pytest.raises(BadInput, match="differ in guidance"):
        calibrate_ems(pipe, other, {})
    weight = pipe.transformer.pos_embed.proj.weight
    kept = weight.data.clone()
    weight.data.fill_(math.nan)
    with pytest.raises(BadOutput, match="nothing to calibrate"):
        calibrate_ems(pipe, calls("sd3", 1, 5), {})
    weight.data.copy_(kept)


@pytest.mark.parametrize(
    ("name", "reduce"), [("sd15", "channel"), ("flux_cfg", "scalar"), ("flux_cfg", "none")]
)
def test_the_command_from_end_to_end(models, tmp_path, monkeypatch, name, reduce):
    monkeypatch.chdir(tmp_path)
    Path("plans").mkdir()
    written = done(
        "calibrate", "ems", "--model", models(name), "--count", 2, "--steps", 6,
        "--set", f"reduce={reduce}", "--set", "order=3", "--out", "plans/v3.toml",
    )  # fmt: skip
    files = ["plans/v3.toml", "plans/v3.safetensors"][: 1 if reduce == "scalar" else 2]
    assert written.stdout.splitlines() == files
    assert "2 samples" in written.stderr and "exact" in written.stderr
    (method,) = plans.read(Path("plans/v3.toml"))
    ems = method.ems()
    assert (method.order, ems.reduce) == (3, reduce)
    assert ems.measured.guidance
    if reduce == "channel":
        assert ems.l.shape[1] == 4
    picture = done(
        "generate", "a fox", "--model", models(name), "--seed", 1, "--steps", 5,
        "--plan", "plans/v3.toml", "--out", "fox.png",
    )  # fmt: skip
    assert "ACTIVE" in picture.stderr and "INACTIVE" not in picture.stderr
    refused = run(
        "generate", "a fox", "--model", models(name), "--guidance", 1.5, "--steps", 5,
        "--plan", "plans/v3.toml", "--out", "other.png",
    )  # fmt: skip
    assert refused.exit_code == 2
    assert "measured for another guidance" in refused.stderr
