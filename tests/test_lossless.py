"""TextKV: the bits of the stock pipeline, and nothing computed twice that depends on text alone."""

import warnings

import pytest
import torch
from conftest import bits_equal
from peft import LoraConfig
from roster import CORE, ROSTER, STEPS, pipelines
from tiny import PIPELINES
from torch import nn

from accel import Plan, cache, errors
from accel.cache.text_kv import Memory
from accel.seams.denoisers import find_denoisers
from accel.seams.text import find_text_modules

METHOD = cache.TextKV()
FORMS = {"batch": {"batch": 2}, "unguided": {"guidance": False}, "plain": {}}
CROSS = {"sd15": 2, "sdxl": 2, "pixart_sigma": 2, "sana": 2, "wan21": 3, "ltx": 3}
"""Pipelines whose every cross-attention sees the text alone: its projections of keys and values."""


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pipelines(PIPELINES)
def test_it_is_the_stock_pipeline(bench, name, form):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", errors.AccelWarning)
        with Plan(METHOD).attach(bench.pipe(name)) as run:
            output = bench.call(name, steps=4, **form)
    assert bits_equal(output, bench.stock(name, steps=4, **form))
    state = run.report.verdicts["cache.TextKV"].state
    assert (state == "ACTIVE") == ROSTER["cache.TextKV"].acts(PIPELINES[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pipelines(CORE)
def test_it_is_the_stock_pipeline_at_half_precision(bench, name, dtype):
    with Plan(METHOD).attach(bench.pipe(name, dtype)):
        output = bench.call(name, steps=4, dtype=dtype)
    assert bits_equal(output, bench.stock(name, steps=4, dtype=dtype))


def counted(pipe):
    """Count calls of the text modules, below the memories."""
    counts, undos = {}, []
    for denoiser in find_denoisers(pipe):
        for module in find_text_modules(denoiser):
            key = f"{denoiser.name}.{module.path}"

            def forward(*args, inner=module.module.forward, key=key, **kwargs):
                counts[key] = counts.get(key, 0) + 1
                return inner(*args, **kwargs)

            module.module.forward = forward
            undos.append(lambda module=module: delattr(module.module, "forward"))
    return counts, lambda: [undo() for undo in undos]


@pytest.mark.parametrize("name", CROSS)
def test_each_key_and_value_is_computed_once_for_each_branch(bench, name):
    """The closed form: modules × calls a step, however many steps."""
    pipe = bench.pipe(name)
    counts, undo = counted(pipe)
    bench.call(name, steps=STEPS)
    stock = dict(counts)
    counts.clear()
    with Plan(METHOD).attach(pipe) as run:
        bench.call(name, steps=STEPS)
    undo()
    attentions = {key: n for key, n in counts.items() if "attn2" in key}
    calls = 2 if PIPELINES[name].layout.startswith("two_calls") else 1
    assert set(attentions.values()) == {calls}
    assert len(attentions) % CROSS[name] == 0
    assert {stock[key] for key in attentions} == {calls * STEPS}
    assert run.report.verdicts["cache.TextKV"].detail == f"{STEPS - 1}/{STEPS} reused"


def test_two_calls_need_two_entries(bench):
    plan = Plan(cache.TextKV(entries=1))
    with (
        pytest.warns(errors.AccelWarning, match="same text"),
        plan.attach(bench.pipe("wan21")) as run,
    ):
        output = bench.call("wan21", steps=4)
    assert bits_equal(output, bench.stock("wan21", steps=4))
    assert run.report.verdicts["cache.TextKV"].state == "INACTIVE"


def test_what_is_kept_is_counted_and_dropped(bench):
    pipe = bench.pipe("sd15")
    with Plan(METHOD).attach(pipe) as run:
        bench.call("sd15", steps=4)
        (tally,) = run.report.tallies
        text = 2 * 77  # rows × tokens
        widths = [m.module.out_features for m in find_text_modules(find_denoisers(pipe)[0])]
        assert tally.peak == 4 * text * sum(widths)
        assert tally.memory() == 0


def test_a_sub_batch_of_adjacent_rows_is_found_again(bench):
    """Guidance that ends asks for the conditional half: a new view of the same text each step."""
    method = ROSTER["guidance.Adaptive"].active
    pipe = bench.pipe("sd15")
    with Plan(method).attach(pipe):
        expected = bench.call("sd15", steps=STEPS)
    counts, undo = counted(pipe)
    with Plan(method, METHOD).attach(pipe):
        assert bits_equal(bench.call("sd15", steps=STEPS), expected)
    undo()
    assert set(counts.values()) == {2}  # once for both branches, once for cond


@pytest.mark.parametrize("other", [name for name in ROSTER if name != "cache.TextKV"])
@pytest.mark.parametrize("name", CORE)
def test_it_changes_nothing_beside_any_other_method(bench, name, other):
    row = ROSTER[other]
    if not row.acts(PIPELINES[name]):
        pytest.skip("not served")
    if other == "weights.Int8Static":  # by its scales a projection is another at another step
        with pytest.raises(errors.Conflict, match=r"Int8Static and cache\.TextKV"):
            Plan(row.active, METHOD).attach(bench.pipe(name))
        return
    for plan in (Plan(row.active), Plan(row.active, METHOD)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", errors.AccelWarning)
            with plan.attach(bench.pipe(name)) as run:
                output = bench.call(name, steps=STEPS)
        if len(plan) == 1:
            alone, nfe = output, run.report.nfe
    assert bits_equal(output, alone)
    assert run.report.nfe == nfe


@pytest.mark.parametrize("name", ["sd15", "wan21"])
def test_inference_mode(bench, name):
    pipe = bench.pipe(name)
    with torch.inference_mode(), Plan(METHOD).attach(pipe) as run:
        output = bench.call(name, steps=4)
    assert bits_equal(output.clone(), bench.stock(name, steps=4))
    assert run.report.verdicts["cache.TextKV"].detail == "3/4 reused"


def test_weights_of_inference_mode_are_not_kept_track_of(bench):
    """Nobody sees what is written into them, so nothing is reused, and the report says so."""
    with torch.inference_mode():
        pipe = PIPELINES["sd15"].build()
        told = pytest.warns(errors.AccelWarning, match="loaded in inference mode")
        with told, Plan(METHOD).attach(pipe):
            output = PIPELINES["sd15"].call(pipe, steps=4)
    assert bits_equal(torch.as_tensor(output).clone(), bench.stock("sd15", steps=4))


def test_a_text_that_changes_in_the_middle_of_a_run(bench):
    """In place (a new version) or by another tensor: what a user's callback may do."""

    def callback(pipe, index, timestep, state):
        if index == 1:
            state["prompt_embeds"].mul_(0.5)
        if index == 3:
            state["prompt_embeds"] = state["prompt_embeds"] + 1
        return state

    inputs = ["latents", "prompt_embeds"]
    call = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": inputs}
    stock = bench.call("sd15", steps=STEPS, **call)
    assert not bits_equal(stock, bench.stock("sd15", steps=STEPS))
    with Plan(METHOD).attach(bench.pipe("sd15")):
        assert bits_equal(bench.call("sd15", steps=STEPS, **call), stock)


@pytest.mark.parametrize("first", ["LoRA", "plan"])
def test_a_lora_that_is_switched_in_the_middle_of_a_run(first):
    tiny = PIPELINES["sd15"]
    config = LoraConfig(r=2, target_modules=["to_k", "to_v"], init_lora_weights=False)

    def callback(pipe, index, timestep, state):
        pipe.unet.disable_adapters() if index == 2 else pipe.unet.enable_adapters()
        return state

    outputs = []
    for plan in (Plan(), Plan(METHOD)):
        pipe = tiny.build()
        torch.manual_seed(0)
        if first == "LoRA":
            pipe.unet.add_adapter(config)
        run = plan.attach(pipe)
        if first == "plan":
            pipe.unet.add_adapter(config)
        outputs.append(tiny.call(pipe, steps=STEPS, callback_on_step_end=callback))
        assert first == "plan" or not len(plan) or run.report.verdicts["cache.TextKV"].state
        run.detach()
    assert bits_equal(*outputs)


def test_weights_that_change_in_the_middle_of_a_run(bench):
    def callback(pipe, index, timestep, state):
        with torch.no_grad():
            for module in pipe.unet.modules():
                if hasattr(module, "to_k"):
                    module.to_k.weight.mul_(1.5 if index % 2 else 1 / 1.5)
        return state

    outputs = []
    for plan in (Plan(), Plan(METHOD)):
        pipe = PIPELINES["sd15"].build()
        with plan.attach(pipe):
            outputs.append(PIPELINES["sd15"].call(pipe, steps=STEPS, callback_on_step_end=callback))
    assert bits_equal(*outputs)


# One memory, by itself.


@pytest.fixture
def linear():
    return nn.Linear(4, 4)


@pytest.fixture
def ask(linear):
    memory = Memory(linear, 2)
    with torch.no_grad():
        yield lambda x: memory(linear.forward, (x,), {})


def test_the_same_tensor_is_answered_with_the_same_output(ask):
    x = torch.randn(3, 4)
    (first, hit), (second, again) = ask(x), ask(x)
    assert (hit, again) == (False, True)
    assert first is second


def test_equal_tensors_are_not_the_same(ask):
    x = torch.randn(3, 4)
    ask(x)
    assert ask(x.clone())[1] is False


def test_a_view_is_known_by_its_place(ask):
    x = torch.randn(6, 4)
    ask(x[:3])
    assert ask(x[:3])[1]
    assert not ask(x[3:])[1]
    assert not ask(x)[1]


def test_what_was_written_into_is_computed_again(ask, linear):
    x = torch.randn(3, 4)
    output, _ = ask(x)
    right = output.clone()
    output.view(-1).mul_(2)
    again, hit = ask(x)
    assert not hit
    assert torch.equal(again, right)
    x[1] += 1
    changed, hit = ask(x)
    assert not hit
    assert torch.equal(changed, linear(x))


def test_an_address_that_is_used_again_is_no_match(ask, linear):
    for _ in range(50):
        x = torch.randn(3, 4)
        assert torch.equal(ask(x)[0], linear(x))
        del x


def test_with_gradients_it_keeps_out(linear):
    memory, x = Memory(linear, 2), torch.randn(3, 4)
    assert [memory(linear.forward, (x,), {})[1] for _ in range(2)] == [False, False]
    assert not memory.entries


def test_a_module_that_meets_nothing_twice_is_left_alone(ask):
    x = torch.randn(3, 4)
    for _ in range(5):
        ask(torch.randn(3, 4))
    assert [ask(x)[1] for _ in range(2)] == [False, False]
