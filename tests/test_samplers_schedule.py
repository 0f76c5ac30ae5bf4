"""Grids and configs: what the stock schedulers give for the same arguments, and clear refusals."""

import math

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from accel.errors import BadInput, UnsupportedModel
from accel.seams.lists import Lists
from samplers import DPMSolverPPScheduler

TABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
FLOWS = {
    "plain": {},
    "static": {"shift": 3.0},
    "odd shift": {"shift": 1.15},
    "dynamic": {"use_dynamic_shifting": True},
    "linear": {"use_dynamic_shifting": True, "time_shift_type": "linear"},
    "terminal": {"use_dynamic_shifting": True, "shift_terminal": 0.1},
    "karras": {"shift": 3.0, "use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_dynamic_shifting": True, "use_beta_sigmas": True},
    "inverted": {"shift": 2.0, "invert_sigmas": True},
}
ASKED = {
    "count": {"num_inference_steps": 7},
    "flux": {"sigmas": np.linspace(1.0, 1 / 8, 8)},
    "hunyuan": {"sigmas": np.linspace(1.0, 0.0, 9)[:-1]},
    "list": {"sigmas": [1.0, 0.7, 0.33, 0.1]},
    "cogview": {
        "sigmas": np.linspace(1000, 1, 6).astype(np.int64).astype(np.float32) / 1000,
        "timesteps": np.linspace(1000, 1, 6).astype(np.int64).astype(np.float32),
    },
}
VP_GRIDS = {
    "plain": {},
    "trailing": {"timestep_spacing": "trailing"},
    "leading": {"timestep_spacing": "leading", "steps_offset": 1},
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
    "sigma_min": {"final_sigmas_type": "sigma_min"},
    "cosine": {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1},
    "betas": {
        "trained_betas": [0.001 + 0.0001 * i for i in range(200)],
        "num_train_timesteps": 200,
    },
}


def of(config, **settings):
    return DPMSolverPPScheduler.from_config(config, **settings)


@pytest.mark.parametrize(
    ("flow", "asked"),
    [
        (flow, asked)
        for flow in FLOWS
        for asked in ASKED
        if (flow, asked) != ("inverted", "cogview")
    ],
)
def test_a_flow_has_the_grid_of_the_stock(flow, asked):
    stock = FlowMatchEulerDiscreteScheduler(**FLOWS[flow])
    ours = of(stock.config)
    for scheduler in (stock, ours):
        scheduler.set_timesteps(**ASKED[asked], mu=0.8, device="cpu")
    assert torch.equal(ours.timesteps, stock.timesteps)
    assert torch.equal(ours.sigmas, stock.sigmas)
    assert ours.num_inference_steps == len(ours.timesteps)


def test_inverted_levels_run_from_noise_to_data():
    ours = of(FlowMatchEulerDiscreteScheduler(invert_sigmas=True).config)
    ours.set_timesteps(4)
    assert ours._levels[0].alpha == 0.0
    assert ours._levels[-1].sigma == 0.0


@pytest.mark.parametrize("grid", VP_GRIDS)
@pytest.mark.parametrize("count", [8, 25])
def test_a_vp_model_has_the_grid_of_the_stock(grid, count):
    stock = DPMSolverMultistepScheduler(**(TABLE | VP_GRIDS[grid]))
    ours = of(stock.config)
    stock.set_timesteps(count)
    ours.set_timesteps(count)
    assert torch.equal(ours.sigmas, stock.sigmas)
    assert torch.equal(ours.timesteps.round().long(), stock.timesteps) or grid in (
        "exponential",  # the stock truncates
        "beta",
    )


def test_the_uniform_lambda_grid_of_the_stock():
    stock = DPMSolverMultistepScheduler(**TABLE, use_lu_lambdas=True)
    ours = of(stock.config)
    stock.set_timesteps(12)
    ours.set_timesteps(12)
    assert torch.allclose(ours.sigmas, stock.sigmas, rtol=1e-6)


def test_the_uniform_lambda_grid_of_a_shared_flow():
    """Even in λ between the ends of a flow; and asked for, so that a list of levels is refused."""
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    stock = DPMSolverMultistepScheduler(**TABLE, **flow, use_lu_lambdas=True)
    ours, plain = of(stock.config), of(stock.config, use_lu_lambdas=False)
    for scheduler in (ours, plain):
        scheduler.set_timesteps(12)
        assert not scheduler.config.get("use_lu_lambdas")
    ratios = ours.sigmas[1:] / ours.sigmas[:-1]
    assert torch.allclose(ratios[:-1], ratios[:1])
    assert not torch.equal(ours.sigmas, plain.sigmas)
    Lists(plain, "test")
    with pytest.raises(UnsupportedModel, match="use_exponential_sigmas of the DPMSolverPP"):
        Lists(ours, "test")


@pytest.mark.parametrize(
    "source",
    [
        DDIMScheduler(**TABLE, prediction_type="v_prediction", rescale_betas_zero_snr=True),
        PNDMScheduler(**TABLE, steps_offset=1),
        EulerDiscreteScheduler(**TABLE, timestep_spacing="leading", steps_offset=1),
        UniPCMultistepScheduler(**TABLE, timestep_spacing="trailing", thresholding=True),
    ],
    ids=lambda source: type(source).__name__,
)
def test_the_facts_of_a_vp_model_are_kept(source):
    ours = of(source.config, order=3)
    stock = DPMSolverMultistepScheduler.from_config(source.config)
    for scheduler in (ours, stock):
        scheduler.set_timesteps(20)
    assert ours.config.order == 3
    assert ours.order == 1
    assert ours.config.prediction_type == source.config.prediction_type
    assert ours.config.thresholding == source.config.get("thresholding", False)
    assert torch.equal(ours.timesteps, stock.timesteps)
    assert torch.allclose(ours.sigmas, stock.sigmas, rtol=2e-5)


def test_cogvideox_keeps_its_shifted_table():
    source = CogVideoXDDIMScheduler(
        prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True
    )
    ours = of(source.config)
    kept = ours.alphas_cumprod[:-1].double()
    assert torch.allclose(kept, source.alphas_cumprod[:-1].double(), rtol=1e-4, atol=1e-9)
    ours.set_timesteps(10)
    source.set_timesteps(10)
    assert torch.equal(ours.timesteps, source.timesteps)


def test_defaults_of_the_class_that_wrote_a_file_are_facts():
    ours = of({"_class_name": "CogVideoXDDIMScheduler", "prediction_type": "v_prediction"})
    assert ours.config.snr_shift_scale == 3.0
    assert ours.config.beta_schedule == "scaled_linear"


@pytest.mark.parametrize("kind", [FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler])
def test_a_flow_keeps_its_shift(kind):
    ours = of(kind(shift=7.0).config)
    assert ours.config.prediction_type == "flow_prediction"
    assert ours.config.shift == 7.0


def test_what_pipelines_read_of_a_flow_is_kept():
    stock = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.6, max_shift=0.9, max_image_seq_len=8192
    )
    config = of(stock.config).config
    assert (config["base_shift"], config["max_shift"]) == (0.6, 0.9)
    assert (config["base_image_seq_len"], config["max_image_seq_len"]) == (256, 8192)


@pytest.mark.parametrize("kind", [UniPCMultistepScheduler, DPMSolverMultistepScheduler])
def test_a_flow_of_a_shared_scheduler(kind):
    stock = kind(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
    ours = of(stock.config)
    assert ours.config.shift == 5.0
    ours.set_timesteps(8)
    stock.set_timesteps(8)
    assert torch.allclose(ours.sigmas, stock.sigmas, atol=2.5e-3)
    assert of(stock.config, shift=2.0).config.shift == 2.0
    again = of(ours.config)
    assert again.config == ours.config


@pytest.mark.parametrize("ramp", ["karras", "exponential", "beta"])
@pytest.mark.parametrize("kind", [UniPCMultistepScheduler, DPMSolverMultistepScheduler])
def test_a_ramp_of_a_shared_flow_is_that_of_the_flow_scheduler(kind, ramp):
    """Between the ends of the flow's own grid, and from pure noise."""
    flag = {f"use_{ramp}_sigmas": True}
    shared = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    plain, ramped = of(kind(**shared).config), of(kind(**shared, **flag).config)
    stock = FlowMatchEulerDiscreteScheduler(shift=3.0, **flag)
    plain.set_timesteps(8)
    unshifted = np.linspace(1, 1 / 1000, 9)[:-1]
    for scheduler in (ramped, stock):
        scheduler.set_timesteps(sigmas=unshifted)
    assert torch.allclose(ramped.sigmas, stock.sigmas)
    assert ramped.sigmas[[0, -2, -1]].tolist() == pytest.approx(plain.sigmas[[0, -2, -1]].tolist())
    ramped.set_timesteps(8)
    assert torch.allclose(ramped.sigmas, stock.sigmas)
    assert not torch.allclose(ramped.sigmas, plain.sigmas, atol=1e-2)
    again = of(ramped.config)
    assert again.config == ramped.config


def test_the_ends_of_a_ramp_of_a_shared_flow_are_ratios():
    """σ/α from 9 to ¼ are σ from 0.9 to 0.2, as that class itself has them."""
    settings = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    ends = {"use_karras_sigmas": True, "sigma_min": 0.25, "sigma_max": 9.0}
    stock = UniPCMultistepScheduler(**settings, **ends)
    ours = of(stock.config)
    for scheduler in (stock, ours):
        scheduler.set_timesteps(6)
    assert ours.sigmas[[0, -2]].tolist() == pytest.approx([0.9, 0.2])
    assert ours.sigmas[[0, -2]].tolist() == pytest.approx(stock.sigmas[[0, -2]].tolist())


def test_sigmas_of_a_vp_model():
    ours = DPMSolverPPScheduler(**TABLE)
    ays = diffusers.schedulers.AysSchedules["StableDiffusionSigmas"]
    ours.set_timesteps(sigmas=ays)
    assert ours.sigmas.tolist() == pytest.approx(ays)
    stock = EulerDiscreteScheduler(**TABLE)
    stock.set_timesteps(sigmas=ays)
    assert torch.allclose(ours.timesteps, stock.timesteps, atol=1e-3)
    ours.set_timesteps(sigmas=ays[:-1])
    assert ours.sigmas.tolist() == pytest.approx(ays)


def test_timesteps_of_a_vp_model_are_handed_over_as_given():
    ours = DPMSolverPPScheduler(**TABLE)
    ays = diffusers.schedulers.AysSchedules["StableDiffusionTimesteps"]
    ours.set_timesteps(timesteps=ays)
    assert ours.timesteps.tolist() == ays
    assert ours.timesteps.dtype == torch.int64
    ours.set_timesteps(timesteps=[900.5, 400.25, 3.0])
    assert ours.timesteps.tolist() == [900.5, 400.25, 3.0]


def test_timesteps_of_a_flow_name_its_levels():
    ours = of(FlowMatchEulerDiscreteScheduler(shift=3.0).config)
    ours.set_timesteps(timesteps=[1000.0, 712.5, 301.0])
    assert ours.timesteps.tolist() == [1000.0, 712.5, 301.0]
    assert ours.sigmas.tolist() == pytest.approx([1.0, 0.7125, 0.301, 0.0])


def test_a_continuous_model_is_told_the_logarithm():
    svd = EulerDiscreteScheduler(
        prediction_type="v_prediction",
        timestep_type="continuous",
        use_karras_sigmas=True,
        sigma_min=0.002,
        sigma_max=700.0,
    )
    ours = of(svd.config)
    for scheduler in (ours, svd):
        scheduler.set_timesteps(6)
    assert torch.allclose(ours.sigmas, svd.sigmas)
    assert torch.allclose(ours.timesteps, svd.timesteps)


FLOW = {"prediction_type": "flow_prediction"}
REFUSED = {
    "order": (lambda: DPMSolverPPScheduler(order=4), "order is 4"),
    "eta": (lambda: DPMSolverPPScheduler(eta=1.5), "eta is 1.5"),
    "sde 3": (lambda: DPMSolverPPScheduler(order=3, eta=1.0), "order=3 with eta=1.0"),
    "variant": (lambda: DPMSolverPPScheduler(variant="bh2"), "bh2"),
    "typo": (lambda: DPMSolverPPScheduler(beta_strat=0.1), "Did you mean beta_start"),
    "other process": (lambda: DPMSolverPPScheduler(shift=3.0), "'shift'"),
    "override": (lambda: of(DDIMScheduler().config, solver_order=3), "'solver_order'"),
    "prediction": (lambda: DPMSolverPPScheduler(prediction_type="score"), "'score'"),
    "spacing": (lambda: DPMSolverPPScheduler(timestep_spacing="log"), "'log'"),
    "flow spacing": (lambda: DPMSolverPPScheduler(timestep_spacing="leading", **FLOW), "leading"),
    "betas": (lambda: DPMSolverPPScheduler(beta_schedule="laplace"), "trained_betas"),
    "ramps": (
        lambda: DPMSolverPPScheduler(use_karras_sigmas=True, use_beta_sigmas=True),
        "both set",
    ),
    "shift": (lambda: DPMSolverPPScheduler(shift=0.0, **FLOW), "shift is 0.0"),
    "threshold": (lambda: DPMSolverPPScheduler(sample_max_value=0.5), "0.5"),
    "folder": (lambda: of("a/folder"), "from_pretrained"),
    "process": (lambda: of(diffusers.EDMEulerScheduler().config), "neither"),
    "half a flow": (lambda: of(UniPCMultistepScheduler(**FLOW).config), "use_flow_sigmas=True"),
    "flow of ε": (lambda: of(UniPCMultistepScheduler(use_flow_sigmas=True).config), "'epsilon'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_are_refused(case):
    attempt, words = REFUSED[case]
    with pytest.raises(BadInput, match=words.replace("(", r"\(")):
        attempt()


REFUSED_RUNS = {
    "nothing": ({}, {}, "nothing"),
    "no steps": ({}, {"num_inference_steps": 0}, "says 0"),
    "lengths": (FLOW, {"num_inference_steps": 3, "sigmas": [1, 0.5]}, "says 3"),
    "ascending": (FLOW, {"sigmas": [0.1, 0.5, 1.0]}, "descending"),
    "repeat": (FLOW, {"sigmas": [1.0, 0.5, 0.5]}, "positions 1 and 2"),
    "nan": (FLOW, {"sigmas": [1.0, math.nan]}, "NaN"),
    "negative": ({}, {"timesteps": [3, -1]}, "≥ 0"),
    "final zero": (FLOW, {"sigmas": [1.0, 0.5, 0.0]}, "Leave out the final 0"),
    "final zero time": (FLOW, {"timesteps": [1000.0, 0.0]}, "Leave out the final 0"),
    "above 1": (FLOW, {"sigmas": [1.4, 0.5]}, "1.4"),
    "too late": (FLOW, {"timesteps": [1200.0, 5.0]}, "1200"),
    "too late for vp": ({}, {"timesteps": [1000, 5]}, "999"),
    "told 1 − σ": (FLOW | {"invert_sigmas": True}, {"timesteps": [9.0, 1.0]}, "Pass sigmas"),
    "no mu": (FLOW | {"use_dynamic_shifting": True}, {"num_inference_steps": 3}, "mu is None"),
    "mu of vp": ({}, {"num_inference_steps": 3, "mu": 1.0}, "Drop mu"),
    "both of vp": ({}, {"sigmas": [3.0, 1.0], "timesteps": [9, 1]}, "Both"),
    "ramp": ({"use_karras_sigmas": True}, {"timesteps": [9, 1]}, "use_karras_sigmas"),
    "flow ramp": (FLOW | {"use_beta_sigmas": True}, {"timesteps": [9.0, 1.0]}, "use_beta_sigmas"),
    "too many": ({"num_train_timesteps": 10}, {"num_inference_steps": 30}, "fewer steps"),
}


@pytest.mark.parametrize("kind", [FlowMatchEulerDiscreteScheduler, DPMSolverPPScheduler])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_levels_come_out_as_asked_beside_a_shift_and_without_a_warning(kind, shift, recwarn):
    """Where a config alone has the shift, diffusers deprecates to read it off the scheduler."""
    scheduler = kind.from_config(FlowMatchEulerDiscreteScheduler(shift=shift).config)
    lists, levels = Lists(scheduler, "test"), [9.0, 2.0, 0.5]
    scheduler.set_timesteps(**lists.arguments(levels, {}))
    lists.check(levels)
    assert [str(one.message) for one in recwarn] == []


@pytest.mark.parametrize("case", REFUSED_RUNS)
def test_runs_that_are_refused(case):
    settings, asked, words = REFUSED_RUNS[case]
    scheduler = DPMSolverPPScheduler(**settings)
    with pytest.raises(BadInput, match=words):
        scheduler.set_timesteps(**asked)
