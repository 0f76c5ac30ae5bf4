"""Scales of activations: how calls are drawn, how scales are searched, and the file of them."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from roster.weights import SCALES, STATIC
from test_memory_methods import networks
from tiny import PIPELINES, PROMPTS, Ask

from accel import Plan, errors, weights
from accel.seams import quantizing
from accel.seams.quantizing import linears, quantized
from accel.weights.calibration import (
    GRID,
    Options,
    bin_edges,
    calibrate_int8,
    candidates,
    square_errors,
)
from accel.weights.sampling import Samples, drawn_steps
from accel.weights.scales import REST, Scales, noise_share, read
from app.calibrators import CALIBRATORS

NAME = "flux_cfg"
STEPS = 6


def calls(name, count=1, steps=STEPS):
    for number in range(count):
        yield {
            **PIPELINES[name].inputs(Ask([PROMPTS[number]], [number], guidance=True)),
            "num_inference_steps": steps,
            "output_type": "latent",
            "generator": torch.Generator().manual_seed(number),
        }


@pytest.fixture(scope="module")
def measured():
    """A calibration of a tiny pipeline, and that pipeline."""
    pipe = PIPELINES[NAME].build()
    options = CALIBRATORS["int8"].checked({"bins": 2})
    return pipe, calibrate_int8(pipe, calls(NAME), options)


@pytest.fixture
def static(measured, tmp_path):
    """The method that was calibrated, with its file."""
    path = tmp_path / "int8.safetensors"
    path.write_bytes(measured[1].files["scales"])
    return measured[1].method.model_copy(update={"scales": path})


# Which calls.


def test_steps_are_drawn_from_a_normal_that_is_held_within_the_run():
    total, count = 50, 40_000
    found = drawn_steps(total, count, np.random.default_rng(0))
    assert sum(found.values()) == count

    def below(t):
        return 0.5 * (1 + math.erf((t - 0.4 * total) / (0.4 * total * math.sqrt(2))))

    for t in range(total):
        share = below(t + 0.5) * (t < total - 1) + (t == total - 1) - below(t - 0.5) * (t > 0)
        error = math.sqrt(share * (1 - share) / count)
        assert abs(found[total - 1 - t] / count - share) < 5 * error, t


@given(st.integers(1, 60), st.integers(1, 80), st.integers(0, 9))
@settings(deadline=None, max_examples=40)
def test_every_draw_is_a_step_of_the_run(total, count, seed):
    found = drawn_steps(total, count, np.random.default_rng(seed))
    assert sum(found.values()) == count
    assert set(found) <= set(range(total))


@pytest.mark.parametrize("name", ["flux_cfg", "sd15", "wan22"])
def test_calls_are_kept_whole_with_every_branch(name):
    """What is replayed answers what the network answered; the run is that of the stock pipeline."""
    pipe = PIPELINES[name].build()
    answers = []

    def note(_module, _args, output):
        answers.append((output[0] if isinstance(output, tuple) else output.sample).clone())

    handles = [network.register_forward_hook(note) for network in networks(pipe)]
    recorder = Samples().drawing("all", 1, 0)
    recorder.watch(pipe, calls(name, steps=3))
    for handle in handles:
        handle.remove()
    assert len(recorder.kept) == len(answers)
    for sample, answer in zip(recorder.kept, answers, strict=True):
        assert torch.equal(sample.replay(), answer)
        assert torch.equal(sample.replay(), answer)  # it is not used up
    branches = {row.branch for sample in recorder.kept for row in sample.call.rows}
    assert branches == set(PIPELINES[name].order)
    assert all(sample.share == noise_share(sample.call.step.sigma) for sample in recorder.kept)


def test_draws_of_a_run_are_its_weights():
    recorder = Samples().drawing("normal", 20, 3)
    recorder.watch(PIPELINES["sd15"].build(), calls("sd15", count=2, steps=4))
    per_run = Counter()
    for sample in recorder.kept:
        per_run[sample.run] += sample.weight
    assert per_run == {1: 20, 2: 20}
    again = Samples().drawing("normal", 20, 3)
    again.watch(PIPELINES["sd15"].build(), calls("sd15", count=2, steps=4))
    assert [s.weight for s in again.kept] == [s.weight for s in recorder.kept]


# Which scales.


@given(st.integers(0, 2**31), st.floats(0.01, 100.0))
@settings(deadline=None, max_examples=25)
def test_inside_the_range_rounding_is_half_a_scale_at_most(seed, size):
    x = torch.randn(64, generator=torch.Generator().manual_seed(seed)) * size
    for scale in candidates(x.abs().amax()):
        rounded = torch.fake_quantize_per_tensor_affine(x, float(scale), 0, -128, 127)
        inside = x.abs() <= 127 * scale
        assert ((x - rounded).abs()[inside] <= scale * 0.5001).all()


@given(st.integers(0, 2**31))
@settings(deadline=None, max_examples=25)
def test_the_square_error_is_that_of_torchaos_rounding(seed):
    from torchao.quantization import PerTensor
    from torchao.quantization.quantize_.workflows.int8.int8_tensor import Int8Tensor

    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(seed)) ** 3
    scales = candidates(x.abs().amax())
    for scale, error in zip(scales, square_errors(x, scales), strict=True):
        theirs = Int8Tensor.from_hp(x, PerTensor(), scale=scale.reshape(1, 1)).dequantize()
        torch.testing.assert_close((x - theirs).square().sum(), error, rtol=1e-3, atol=1e-9)


def test_a_scale_for_each_channel_is_nearer_than_one_for_all():
    from torchao.quantization import Int8WeightOnlyConfig, PerTensor

    weight = torch.randn(24, 16) * torch.rand(24, 1).exp()
    one = Int8WeightOnlyConfig(granularity=PerTensor(), set_inductor_config=False)
    errors_ = [
        (quantized(weight, config).dequantize() - weight).square().mean()
        for config in (quantizing.weight_only(), one)
    ]
    assert errors_[0] <= errors_[1]


def test_scales_are_the_best_of_the_grid(measured):
    """Against a search by hand over the inputs of one layer, replayed at every draw of a bin."""
    pipe, found = measured
    scales = Scales.from_bytes(found.files["scales"], "memory")
    path = "transformer_blocks.1.ff.net.2"
    recorder = Samples().drawing("normal", Options().samples, 0)
    recorder.watch(pipe, calls(NAME))
    inputs = {0: [], 1: []}
    layer = pipe.transformer.get_submodule(path)
    for sample in recorder.kept:
        bin_ = scales.bin("transformer", sample.call.step.sigma)
        handle = layer.register_forward_pre_hook(
            lambda _m, args, into=inputs[bin_], weight=sample.weight: into.append((weight, args[0]))
        )
        sample.replay()
        handle.remove()
    for bin_, seen in inputs.items():
        largest = max(float(x.abs().amax()) for _, x in seen)
        left = [
            sum(
                w
                * ((x / (a * largest / 127)).round().clamp(-128, 127) * (a * largest / 127) - x)
                .double()
                .square()
                .sum()
                for w, x in seen
            )
            for a in GRID
        ]
        chosen = float(scales.of("transformer", path)[bin_].item())
        at = min(range(len(GRID)), key=lambda i: abs(GRID[i] * largest / 127 - chosen))
        assert math.isclose(GRID[at] * largest / 127, chosen, rel_tol=1e-5)
        assert left[at] <= min(left) * (1 + 1e-3)


def test_bins_hold_equally_many_levels():
    shares = [0.9, 0.1, 0.5, 0.5, 0.7, 0.3, 0.95]
    edges = bin_edges(shares, 3, "unet")
    levels = sorted(set(shares))
    assert np.bincount(np.searchsorted(edges, levels, "right")).tolist() == [2, 2, 2]
    with pytest.raises(errors.BadInput, match=r"unet was called at 6 .*7 bins: raise --steps"):
        bin_edges(shares, 7, "unet")


def test_noise_levels_without_end():
    assert noise_share(math.inf) == 1.0
    assert noise_share(0.0) == 0.0
    assert noise_share(1.0) == 0.5


# What a layer costs.


def test_the_error_of_a_layer_is_that_of_the_network_with_it_alone(measured, static):
    """In every bin; and a layer that is skipped for its error is the worst."""
    pipe, found = measured
    scales = Scales.from_bytes(found.files["scales"], "memory")
    layers = linears(pipe.transformer)
    assert set(scales.errors["transformer"]) == set(scales.scales["transformer"]) == set(layers)
    path = "single_transformer_blocks.1.proj_mlp"
    only = static.model_copy(update={"skip": tuple(p for p in layers if p != path)})
    recorder = Samples().drawing("normal", Options().samples, 0)
    recorder.watch(pipe, calls(NAME))
    from accel.weights.calibration import _tried

    binned = [(scales.bin("transformer", s.call.step.sigma), s) for s in recorder.kept]
    for bin_, samples in _tried(binned, 1).items():
        stock = torch.cat([sample.replay() for sample in samples])
        run = Plan(only).attach(pipe)
        scale = float(scales.of("transformer", path)[bin_].item())
        layers[path].weight.act_quant_scale.fill_(scale)
        alone = torch.cat([sample.replay() for sample in samples])
        run.detach()
        error = float((alone - stock).norm() / stock.norm())
        assert math.isclose(error, scales.errors["transformer"][path][bin_], rel_tol=1e-3)
        assert error > 0
    means = {p: e.mean() for p, e in scales.errors["transformer"].items()}
    named = [one for one in static.skip if one != "recommended"]
    assert all(means[one] > 4 * np.median(list(means.values())) * 0.5 for one in named)
    assert max(means, key=means.get) in found.note


# The file.


def test_the_roster_has_scales_for_any_model():
    table = np.array([6 / 127, 5 / 127], np.float32).reshape(2, 1, 1, 1)
    networks = ("unet", "transformer", "transformer_2")
    scales = Scales(
        {name: np.array([0.5], np.float32) for name in networks},
        {name: {REST: table} for name in networks},
        note="made up",
    )
    assert SCALES.read_bytes() == scales.to_bytes()


def test_a_file_comes_back(measured):
    content = measured[1].files["scales"]
    scales = Scales.from_bytes(content, "memory")
    assert scales.to_bytes() == content
    assert scales.note == measured[1].note
    assert len(scales.edges["transformer"]) == 1


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"nothing", "no safetensors file"),
        (Scales({}, {"unet": {"a": np.ones((2, 1), np.float32)}}).to_bytes(), "bins of unet"),
        (
            Scales({"unet": np.zeros(1)}, {"unet": {"a": -np.ones((2, 1))}}).to_bytes(),
            "unet/a holds no positive scale for each of 2 bins",
        ),
        (
            Scales({"unet": np.zeros(1)}, {"unet": {"a": np.ones((3, 1))}}).to_bytes(),
            "unet/a holds no positive scale",
        ),
    ],
)
def test_a_damaged_file_is_named(tmp_path, content, match):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(errors.BadInput, match=match):
        read(path)


def test_another_file_than_was_meant(tmp_path, bench, static):
    for method, match in (
        (static.model_copy(update={"sha256": "0" * 64}), r"not those that were meant: SHA-256"),
        (static.model_copy(update={"scales": tmp_path / "none"}), r"cannot be read"),
        (weights.Int8Static(), r"needs scales .*accel calibrate int8.*Int8Dynamic"),
    ):
        with pytest.raises(errors.UnsupportedModel, match=match):
            Plan(method).attach(bench.pipe(NAME))


def test_scales_of_another_network_are_refused(bench, static, measured):
    with pytest.raises(errors.UnsupportedModel, match=r"measured for another network.*accel cal"):
        Plan(static).attach(bench.pipe("sd3"))
    other = PIPELINES[NAME].build()
    with torch.no_grad():
        for weight in other.transformer.parameters():
            weight.mul_(1.5)
    with pytest.raises(errors.UnsupportedModel, match="with other weights"):
        Plan(static).attach(other)


def test_layers_that_a_file_does_not_name_stay_as_they_are(bench, tmp_path):
    path = tmp_path / "one.safetensors"
    layer = "transformer_blocks.0.attn.to_q"
    table = np.full((1, 1, 1, 1), 0.05, np.float32)
    path.write_bytes(
        Scales({"transformer": np.zeros(0)}, {"transformer": {layer: table}}).to_bytes()
    )
    pipe = bench.pipe(NAME)
    count = len(linears(pipe.transformer))
    with Plan(weights.Int8Static(skip=(), scales=path)).attach(pipe) as run:
        bench.call(NAME, steps=2)
    detail = run.report.verdicts["weights.Int8Static"].detail
    assert detail.startswith("1 linear layers")
    assert f"{count - 1} of unknown activations" in detail


# A run.


def test_each_call_takes_the_scale_of_its_noise_level(bench):
    """Whatever the number of steps; the first call of a second run as in the first."""
    pipe = bench.pipe("sd15")
    with Plan(STATIC).attach(pipe) as run:
        layer = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
        seen = []
        handle = layer.register_forward_pre_hook(
            lambda m, _: seen.append(
                (run.trajectory.now.sigma, round(float(m.weight.act_quant_scale) * 127))
            )
        )
        for steps in (4, 6):
            bench.call("sd15", steps=steps)
        handle.remove()
    assert {scale for _, scale in seen} == {5, 6}
    for sigma, scale in seen:
        assert scale == (5 if noise_share(sigma) >= 0.5 else 6)


def test_a_calibration_of_nothing_is_refused(bench):
    with pytest.raises(errors.BadInput, match="at least one prompt"):
        calibrate_int8(bench.pipe(NAME), [], {})
    with pytest.raises(errors.BadInput, match="too few for 9 bins"):
        calibrate_int8(bench.pipe(NAME), calls(NAME), {"bins": 9, "draw": "all"})


def test_a_compiled_network_is_not_calibrated():
    pipe = PIPELINES[NAME].build()
    pipe.transformer.transformer_blocks[0].compile(backend="eager")
    with pytest.raises(errors.UnsupportedModel, match="is compiled: its layers cannot be watched"):
        calibrate_int8(pipe, calls(NAME), {})
