"""Law 1: off is off. A plan whose methods are off leaves every bit of the output as it was."""

import pytest
import torch
from peft import LoraConfig
from roster import CI, CORE, ROSTER, full, in_ci, off_plans, pipelines
from tiny import PIPELINES

from accel import Plan, errors

OFF = off_plans()
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        pytest.param(
            tiny.name,
            plan,
            id=f"{tiny.name}-{off}",
            marks=full((off in ROSTER and not in_ci(tiny, off, CI)) or tiny.name not in CI),
        )
        for tiny in PIPELINES.values()
        for off, plan in OFF.items()
    ],
)
def test_off_is_off(bench, same, name, plan):
    with plan.attach(bench.pipe(name)) as run:
        output = bench.call(name, steps=3, batch=2)
    assert same(output, bench.stock(name, steps=3, batch=2))
    assert all(verdict.detail.startswith("off: ") for verdict in run.report.verdicts.values())


@pytest.mark.parametrize("dtype", HALF.values(), ids=HALF)
@pipelines(CORE)
def test_off_is_off_at_half_precision(bench, same, name, dtype):
    try:
        stock = bench.stock(name, steps=3, dtype=dtype)
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"the stock pipeline does not run in {dtype} here: {error}")
    with OFF["all"].attach(bench.pipe(name, dtype)):
        assert same(bench.call(name, steps=3, dtype=dtype), stock)


@pytest.mark.parametrize("name", ["sd15", "flux_cfg"])
def test_off_is_off_with_lora(same, name):
    plan, tiny = OFF["all"], PIPELINES[name]
    pipe = tiny.build()
    bare = tiny.call(pipe, steps=3)
    network = getattr(pipe, tiny.denoisers[0])
    network.add_adapter(
        LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights="gaussian")
    )
    _fill(network)
    stock = tiny.call(pipe, steps=3)
    assert not same(stock, bare)
    with plan.attach(pipe):
        assert same(tiny.call(pipe, steps=3), stock)


def _fill(network: torch.nn.Module) -> None:
    for name, weight in network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight.data, std=0.3)


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux_cfg", "flux_controlnet"])
def test_off_is_off_without_guidance(bench, same, name):
    with OFF["all"].attach(bench.pipe(name)):
        output = bench.call(name, steps=3, guidance=False)
    assert same(output, bench.stock(name, steps=3, guidance=False))


@pytest.mark.parametrize("method", [m for m in ROSTER if ROSTER[m].active.off() is not None])
def test_off_says_why(method):
    row = ROSTER[method]
    assert row.active.off().why_off()
    assert all(form.why_off() is None for form in (row.active, *row.variants))


@pipelines(CI)
def test_a_method_serves_a_pipeline_or_says_why_not(bench, name):
    for row in ROSTER.values():
        if row.serves(PIPELINES[name]):
            Plan(row.active).attach(bench.pipe(name)).detach()
        else:
            with pytest.raises(errors.UnsupportedModel, match="fit"):
                Plan(row.active).attach(bench.pipe(name))
