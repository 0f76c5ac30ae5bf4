"""Module caches: which modules run when, and what they answer where they do not."""

import math
from collections import Counter, defaultdict
from contextlib import contextmanager

import diffusers
import pytest
import torch
from roster import STEPS, pipelines
from test_laws_counts import computed_steps, switch_of
from test_laws_samples import close, only
from tiny import PIPELINES, Ask

from accel import Plan, cache, errors, hooks
from accel.cache import table
from accel.cache.columns import columns_of
from accel.cache.fields import StaticCache
from accel.cache.modules import ModuleCache
from accel.cache.policies import Every
from accel.seams.denoisers import find_denoisers
from accel.seams.modules import KINDS, find_modules

SERVED = ("sd15", "svd", "animatediff", "dit", "sd3", "flux_cfg", "chroma", "zimage", "wan22")


def modules_of(pipe):
    return [module for denoiser in find_denoisers(pipe) for module in find_modules(denoiser)]


@contextmanager
def replaced(modules, forward):
    """Give each module ``forward(module, inner, *args)`` below everything of ours."""
    for module in modules:

        def below(*args, module=module, inner=module.module.forward, **kwargs):
            return forward(module, inner, *args, **kwargs)

        below.__wrapped__ = module.module.forward
        module.module.forward = below
    try:
        yield
    finally:
        for module in modules:
            del module.module.forward


@contextmanager
def forwards(pipe):
    """Rows that each module really computes, by denoiser and module."""
    counts = Counter()

    def count(module, inner, *args, **kwargs):
        counts[module.denoiser.name, module.index] += 1
        return inner(*args, **kwargs)

    with replaced(modules_of(pipe), count):
        yield counts


def calls_a_step(name):
    """How often a pipeline calls its network at each step."""
    return 2 if PIPELINES[name].layout.startswith("two_calls") else 1


# The seam.


@pipelines(PIPELINES)
def test_modules_are_found_and_named_by_kind(bench, name):
    pipe = bench.pipe(name)
    for denoiser in find_denoisers(pipe):
        modules = find_modules(denoiser)
        assert [module.index for module in modules] == list(range(len(modules)))
        assert len({id(module.module) for module in modules}) == len(modules)
        kinds = Counter(module.kind for module in modules)
        assert kinds["self"] >= 2
        assert kinds["mlp"] >= 2
        assert bool(kinds["temporal"]) == (name in ("animatediff", "svd"))
        separate = PIPELINES[name].blocks == "unet" or name in (
            *("pixart_sigma", "sana", "wan21", "wan22", "ltx"),
        )
        assert bool(kinds["cross"]) == separate


@pipelines(SERVED)
def test_every_module_runs_in_every_stock_step(bench, name):
    """What is hooked is what computes: none is found that never runs."""
    pipe = bench.pipe(name)
    with forwards(pipe) as counts:
        bench.call(name, steps=4)
    ran = {key for key, count in counts.items() if count}
    assert ran == {(module.denoiser.name, module.index) for module in modules_of(pipe)}


def test_a_flux_single_block_is_cached_before_its_gate(bench):
    paths = [module.path for module in modules_of(bench.pipe("flux"))]
    single = {path.rsplit(".", 1)[1] for path in paths if path.startswith("single")}
    assert single == {"attn", "proj_mlp"}


def test_compiled_blocks_are_refused_by_name():
    tiny = PIPELINES["flux"]
    pipe = tiny.build()
    pipe.transformer.compile_repeated_blocks()
    with pytest.raises(errors.UnsupportedModel, match=r"compiled.*block or network cache"):
        Plan(cache.FORA()).attach(pipe)
    Plan(cache.TaylorSeer(site="network")).attach(pipe).detach()


def test_blocks_compiled_under_an_attached_plan_are_noticed():
    tiny = PIPELINES["flux"]
    pipe = tiny.build()
    run = Plan(cache.FORA()).attach(pipe)
    pipe.transformer.transformer_blocks[1].compile()
    with pytest.raises(errors.BrokenAttachment, match=r"transformer.*was compiled while"):
        tiny.call(pipe)
    run.detach()


# Computed sets, by counting what really ran.


@pytest.mark.parametrize("interval", [2, 3, 5])
@pytest.mark.parametrize("name", SERVED)
def test_fora_computes_every_nth_step(bench, name, interval):
    pipe, steps = bench.pipe(name), 7
    method = cache.FORA(interval=interval)
    with forwards(pipe) as counts, Plan(method).attach(pipe) as run:
        bench.call(name, steps=steps, batch=2 if PIPELINES[name].batchable else 1)
    expected = set(range(0, steps, interval))
    assert len(expected) == math.ceil(steps / interval)
    if len(PIPELINES[name].denoisers) > 1:  # the second network counts from where it takes over
        first = switch_of(pipe)
        expected = {*range(0, first, interval), *range(first, steps, interval)}
        assert all(computed == expected for computed in computed_steps(run, method).values())
        return
    assert all(computed == expected for computed in computed_steps(run, method).values())
    assert set(counts.values()) == {len(expected) * calls_a_step(name)}
    assert len(counts) == len(modules_of(pipe))


SETS = [
    ({"interval": 4, "warmup": 2}, 50, [0, *range(1, 50, 4)]),
    ({"interval": 6, "warmup": 3}, 50, [0, 1, *range(2, 50, 6)]),
    ({"interval": 6, "warmup": 3, "last": True}, 50, [0, 1, *range(2, 50, 6), 49]),
]


@pytest.mark.parametrize("site", ["modules", "blocks", "network"])
@pytest.mark.parametrize(("fields", "steps", "expected"), SETS)
def test_taylorseer_computes_the_sets_of_its_paper(bench, site, fields, steps, expected):
    method = cache.TaylorSeer(site=site, **fields)
    pipe = bench.pipe("dit")
    with forwards(pipe) as counts, Plan(method).attach(pipe) as run:
        bench.call("dit", steps=steps)
    assert all(computed == set(expected) for computed in computed_steps(run, method).values())
    assert set(counts.values()) == {len(expected)}
    assert (run.report.nfe == 2 * steps) == (site != "network")


def test_pab_computes_33_of_50(bench):
    """The closed form: t = 999 − 20 i, range 2 in (100, 800)."""
    method = cache.PAB(spatial=2, cross=1, low=100, high=800)
    pipe = bench.pipe("sd15_v")  # its timesteps trail
    with forwards(pipe) as counts, Plan(method).attach(pipe) as run:
        bench.call("sd15_v", steps=50)
    assert pipe.scheduler.timesteps.tolist() == [999 - 20 * i for i in range(50)]
    ran = {module.kind: counts["unet", module.index] for module in modules_of(pipe)}
    assert ran == {"self": 33, "cross": 50, "mlp": 50}
    assert run.report.verdicts["cache.PAB"].detail == "17/50 reused"


@pytest.mark.parametrize("name", ["svd", "animatediff", "wan21", "flux_cfg"])
def test_pab_has_an_interval_for_each_kind(bench, name):
    intervals = {"self": 2, "temporal": 3, "cross": 4, "mlp": 5}
    method = cache.PAB(spatial=2, temporal=3, cross=4, mlp=5, low=-1e9, high=1e9, last=False)
    pipe, steps = bench.pipe(name), 9
    with forwards(pipe) as counts, Plan(method).attach(pipe):
        bench.call(name, steps=steps)
    for module in modules_of(pipe):
        expected = math.ceil(steps / intervals[module.kind]) * calls_a_step(name)
        assert counts[module.denoiser.name, module.index] == expected


TABLE = ("1111", "0110", "1001", "0000", "1111")


@pytest.mark.parametrize("name", ["svd", "flux_cfg"])
def test_a_table_is_what_runs(bench, name):
    method = cache.Table(steps=TABLE, by="kind")
    pipe = bench.pipe(name)
    with forwards(pipe) as counts, Plan(method).attach(pipe):
        bench.call(name, steps=len(TABLE))
    for module in modules_of(pipe):
        column = KINDS.index(module.kind)
        expected = sum(line[column] == "1" for line in TABLE) * calls_a_step(name)
        assert counts[module.denoiser.name, module.index] == expected


@pytest.mark.parametrize("by", ["block", "module"])
def test_a_table_may_tell_modules_apart(bench, by):
    """A diagonal: at step i > 0 only the i-th column runs."""
    pipe = bench.pipe("dit")
    width = len(modules_of(pipe))  # one of a kind in each block: the two ways are one
    lines = ["".join("01"[k == i] for k in range(width)) for i in range(width)]
    method = cache.Table(steps=("1" * width, *lines), by=by)
    with forwards(pipe) as counts, Plan(method).attach(pipe):
        bench.call("dit", steps=width + 1)
    assert set(counts.values()) == {2}


def test_a_table_is_refused_where_it_does_not_fit(bench):
    pipe = bench.pipe("dit")
    with pytest.raises(errors.UnsupportedModel, match=r"5 characters.*DiTTransformer2DModel has 6"):
        Plan(cache.Table(steps=("11111", "00000"))).attach(pipe)
    fitting = Plan(cache.Table(steps=("1" * 6, "0" * 6)))
    with (
        pytest.raises(errors.UnsupportedModel, match=r"runs of 2 evaluations; this one has 5"),
        fitting.attach(pipe),
    ):
        bench.call("dit", steps=5)
    with Plan(cache.Table(steps=("1" * 6, "0" * 6), stretch=True)).attach(pipe) as run:
        bench.call("dit", steps=6)
    assert run.report.verdicts["cache.Table"].detail == "3/6 reused"


@pytest.mark.parametrize("steps", [("10", "1"), ("12",), ("",)])
def test_a_table_that_is_none(steps):
    with pytest.raises(ValueError, match=r"steps|lines"):
        cache.Table(steps=steps)
    with pytest.raises(ValueError, match="4 characters"):
        cache.Table(steps=("111",), by="kind")


# What is answered where nothing runs.


def filled(value, returned):
    """An answer of the form of ``returned`` with every number the same."""
    if torch.is_tensor(returned):
        return torch.full_like(returned, value)
    return tuple(filled(value, part) if torch.is_tensor(part) else part for part in returned)


FORECASTS = [
    cache.FORA(interval=3),
    cache.PAB(spatial=2, temporal=3, cross=3, mlp=2, low=-1e9, high=1e9),
    cache.TaylorSeer(interval=3, warmup=2, order=3),
    cache.TaylorSeer(interval=3, warmup=2, predictor="newton", order=2),
    cache.HiCache(interval=2),
    cache.FoCa(interval=3),
    cache.DMD(interval=2, site="modules"),
    cache.Table(steps=("1111", "0000", "0101"), by="kind", stretch=True),
]


@pytest.mark.parametrize("method", FORECASTS, ids=lambda m: f"{m.name}-{m.predictor}")
@pytest.mark.parametrize("name", ["svd", "sd3", "flux_cfg"])
def test_modules_that_answer_the_same_every_step_are_exact(bench, name, method):
    pipe = bench.pipe(name)

    def constant(module, inner, *args, **kwargs):
        return filled(0.1 * (1 + module.index % 7), inner(*args, **kwargs))

    with replaced(modules_of(pipe), constant):
        stock = bench.call(name, steps=10)
        with Plan(method).attach(pipe) as run:
            output = bench.call(name, steps=10)
    assert run.report.verdicts[method.name].state == "ACTIVE"
    assert torch.allclose(output, stock, atol=1e-4 * stock.abs().max())


@pytest.mark.parametrize(
    "method",
    [
        cache.TaylorSeer(interval=3, warmup=2, order=1),
        cache.TaylorSeer(interval=4, warmup=2, order=2),
        cache.HiCache(interval=3, warmup=2, order=1, scale=math.sqrt(0.5)),
    ],
    ids=repr,
)
@pytest.mark.parametrize("name", ["svd", "sd3", "flux_cfg"])
def test_modules_that_go_along_a_line_are_forecast_exactly(bench, name, method):
    pipe = bench.pipe(name)
    step = 0

    def linear(module, inner, *args, **kwargs):
        return filled(0.5 + 0.1 * step * (1 + module.index % 3), inner(*args, **kwargs))

    def stepped(inner, *args, **kwargs):
        nonlocal step
        step += 1
        return inner(*args, **kwargs)

    undo = hooks.wrap(pipe.scheduler, "step", stepped)
    with replaced(modules_of(pipe), linear):
        stock = bench.call(name, steps=10)
        step = 0
        with Plan(method).attach(pipe) as run:
            output = bench.call(name, steps=10)
        step = 0
        with Plan(cache.FORA(interval=3)).attach(pipe):
            stale = bench.call(name, steps=10)
    undo()
    assert run.report.verdicts[method.name].state == "ACTIVE"
    scale = stock.abs().max()
    assert torch.allclose(output, stock, atol=1e-3 * scale)
    assert not torch.allclose(stale, stock, atol=1e-3 * scale)


def test_fora_is_its_reference_on_a_dit(bench):
    """Written by hand: a DiT whose blocks keep what attention and MLP gave, before their gates."""
    pipe, interval, steps = bench.pipe("dit"), 3, 7
    step = 0

    def block_with_cache(block):
        kept = {}

        def forward(hidden, timestep, class_labels, **_):
            shifted, gate, shift, scale, mlp_gate = block.norm1(
                hidden, timestep, class_labels, hidden_dtype=hidden.dtype
            )
            if step % interval == 0:
                kept["attention"] = block.attn1(shifted)
            hidden = hidden + gate[:, None] * kept["attention"]
            if step % interval == 0:
                moved = block.norm3(hidden) * (1 + scale[:, None]) + shift[:, None]
                kept["mlp"] = block.ff(moved)
            return hidden + mlp_gate[:, None] * kept["mlp"]

        return forward

    def stepped(inner, *args, **kwargs):
        nonlocal step
        step += 1
        return inner(*args, **kwargs)

    blocks = pipe.transformer.transformer_blocks
    undo = hooks.wrap(pipe.scheduler, "step", stepped)
    for block in blocks:
        block.forward = block_with_cache(block)
    reference = bench.call("dit", steps=steps, batch=2)
    for block in blocks:
        del block.forward
    undo()
    with Plan(cache.FORA(interval=interval)).attach(pipe):
        output = bench.call("dit", steps=steps, batch=2)
    assert torch.allclose(output, reference, atol=1e-5)
    assert not torch.allclose(output, bench.stock("dit", steps=steps, batch=2), atol=1e-3)


def heard(pipe, module):
    """What a module answers, call by call, above everything of ours."""
    answers = []
    handle = module.module.register_forward_hook(
        lambda _, args, returned: answers.append(
            (returned[0] if isinstance(returned, tuple) else returned).clone()
        )
    )
    return answers, handle.remove


@pytest.mark.parametrize("name", ["flux_cfg", "wan21", "flux_kontext"])
def test_pab_keeps_branches_apart_in_two_calls(bench, name):
    pipe = bench.pipe(name)
    *_, last = (module for module in modules_of(pipe) if module.kind == "self")
    answers, undo = heard(pipe, last)
    method = cache.PAB(spatial=2, cross=2, low=-1e9, high=1e9, last=False)
    with Plan(method).attach(pipe):
        bench.call(name, steps=6)
    undo()
    cond, uncond = answers[::2], answers[1::2]
    for branch in (cond, uncond):
        for step in (0, 2, 4):
            assert torch.equal(branch[step + 1], branch[step])
            assert step == 0 or not torch.equal(branch[step], branch[step - 1])
    assert not any(map(torch.equal, cond[2:], uncond[2:]))


def test_the_hosts_pab_mixes_branches_of_two_calls():
    """Why ours is keyed by branch: there, the second call of a step is answered by the first."""
    pipe = PIPELINES["flux_cfg"].build()
    answers, _ = heard(pipe, next(m for m in modules_of(pipe) if m.kind == "self"))
    pipe.transformer.enable_cache(
        diffusers.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(-1, 10_000),
            current_timestep_callback=lambda: 500,
        )
    )
    PIPELINES["flux_cfg"].call(pipe, steps=6)
    assert any(map(torch.equal, answers[::2], answers[1::2]))


def test_kept_outputs_are_nobody_elses(bench):
    """A block that changes in place what its module gave changes nothing that is kept."""
    pipe = bench.pipe("dit")
    seen = defaultdict(list)
    handles = []
    for module in modules_of(pipe):

        def spoil(_, args, returned, *, module=module):
            seen[module.index].append(returned.clone())
            returned.mul_(1.5)

        handles.append(module.module.register_forward_hook(spoil))
    with Plan(cache.FORA(interval=3)).attach(pipe):
        bench.call("dit", steps=6)
    for handle in handles:
        handle.remove()
    for answers in seen.values():
        for first, *rest in (answers[:3], answers[3:]):
            assert all(torch.equal(first, answer) for answer in rest)


@pytest.mark.parametrize("name", ["svd", "flux_cfg"])
def test_inference_mode(same, name):
    tiny = PIPELINES[name]
    outputs = []
    for mode in (torch.no_grad, torch.inference_mode):
        pipe = tiny.build()
        with mode(), Plan(cache.TaylorSeer(interval=2, warmup=1)).attach(pipe):
            outputs.append(torch.as_tensor(tiny.call(pipe, steps=STEPS)))
            assert same(torch.as_tensor(tiny.call(pipe, steps=STEPS)), outputs[-1])
    assert torch.allclose(*outputs, atol=1e-4 * outputs[0].abs().max())


def test_a_chunked_feed_forward_is_several_calls(bench, same):
    """Each chunk has a place of its own; interval 2 and constant latents' laws hold as before."""
    whole, _ = bench.under("sd15", Plan(cache.FORA(interval=2)), steps=STEPS)
    pipe = PIPELINES["sd15"].build()
    for module in pipe.unet.modules():
        if hasattr(module, "set_chunk_feed_forward"):
            module.set_chunk_feed_forward(16, 1)
    with Plan(cache.FORA(interval=2)).attach(pipe):
        chunked = PIPELINES["sd15"].call(pipe, steps=STEPS)
    assert torch.allclose(chunked, whole, atol=1e-3)


# Samples that are decided about apart.


class Apart(StaticCache):
    """Every second step for one sample, every third for the next."""

    name = "cache.Apart"
    layer = "block cache"
    seam = "modules"
    supports = source = "tests"
    interval: int = 2
    last: bool = False

    def attach(self, site):
        yield site.claim("blocks")
        rules = iter([Every(2), Every(3)] * 100)
        yield from ModuleCache(
            site.tally, lambda module: "all", lambda group: self.guarded(next(rules)), self.forecast
        ).attach(site)


@pytest.mark.parametrize("name", ["sd15", "svd", "animatediff", "sd3", "flux_cfg", "zimage"])
def test_a_call_whose_rows_differ_is_split(bench, name):
    if not PIPELINES[name].batchable:
        pytest.skip("takes one sample")
    with Plan(Apart()).attach(bench.pipe(name)) as run:
        together = bench.call(name, steps=STEPS, batch=2)
    steps = computed_steps(run, Apart())
    for sample, interval in enumerate((2, 3)):
        mine = {frozenset(found) for (_, k), found in steps.items() if k == sample}
        assert mine == {frozenset(range(0, STEPS, interval))}
        with Plan(cache.FORA(interval=interval)).attach(bench.pipe(name)):
            alone = bench.call(name, steps=STEPS, **only(sample))
        assert close(bench, name, together, alone, sample, of=2)
    assert run.report.rows == STEPS * len(PIPELINES[name].order) * 2


# Memory.


@pytest.mark.parametrize(("name", "order"), [("dit", 1), ("flux_cfg", 2)])
def test_what_will_be_kept_is_told_from_the_first_step(bench, name, order):
    """(order + 1) values × all modules × all rows: reached, not passed, and no limit by default."""
    pipe = bench.pipe(name)
    sizes = []

    def sized(module, inner, *args, **kwargs):
        returned = inner(*args, **kwargs)
        parts = [returned] if torch.is_tensor(returned) else returned
        sizes.append(sum(p.numel() * p.element_size() for p in parts if torch.is_tensor(p)))
        return returned

    method = cache.TaylorSeer(interval=2, warmup=1, order=order)
    with replaced(modules_of(pipe), sized), Plan(method).attach(pipe) as run:
        bench.call(name, steps=1)
        first = run.report.to_dict()["planned_bytes"]
        assert first == {method.name: (order + 1) * sum(sizes)}
        bench.call(name, steps=7)
    said = run.report.to_dict()
    assert said["planned_bytes"] == first
    assert said["cached_bytes"] == first


def test_a_memory_limit_is_one_clear_error(bench, same):
    pipe = bench.pipe("flux_cfg")
    method = cache.TaylorSeer(interval=2, warmup=1, order=4, memory_limit=0.5)
    run = Plan(method).attach(pipe)
    with pytest.raises(errors.AccelError, match=r"5 values of each of 10 modules.*is 0.5 MiB"):
        bench.call("flux_cfg", steps=STEPS)
    assert run.report.tallies[0].memory() == 0
    assert run.report.tallies[0].planned > 2**19
    run.detach()
    roomy = method.model_copy(update={"memory_limit": 64.0})
    unlimited = method.model_copy(update={"memory_limit": 0.0})
    outputs = []
    for form in (roomy, unlimited):
        with Plan(form).attach(pipe):
            outputs.append(bench.call("flux_cfg", steps=STEPS))
    assert same(*outputs)


def test_half_the_memory_in_bfloat16(bench):
    sizes = {}
    for keep in ("native", "bfloat16"):
        with Plan(cache.FORA(interval=2, keep=keep)).attach(bench.pipe("dit")) as run:
            bench.call("dit", steps=STEPS)
        said = run.report.to_dict()
        assert said["cached_bytes"] == said["planned_bytes"]
        sizes[keep] = said["cached_bytes"]["cache.FORA"]
    assert sizes["native"] == 2 * sizes["bfloat16"]


# Sites.


@pytest.mark.parametrize("kind", [cache.TaylorSeer, cache.HiCache, cache.FoCa, cache.DMD])
def test_a_site_decides_the_layer_and_what_it_excludes(bench, kind):
    pipe = bench.pipe("flux_cfg")
    layers = {site: kind(site=site).layer for site in ("modules", "blocks", "network")}
    assert layers == {"modules": "block cache", "blocks": "block cache", "network": "step cache"}
    for site, other in (
        ("network", cache.EasyCache()),
        ("modules", cache.FirstBlock()),
        ("blocks", cache.FORA()),
    ):
        with pytest.raises(errors.Conflict, match=other.name):
            Plan(kind(site=site), other).attach(pipe)
    Plan(kind(site="modules"), cache.EasyCache()).attach(pipe).detach()
    with pytest.raises(errors.UnsupportedModel, match="fit"):
        Plan(kind(site="blocks")).attach(bench.pipe("sd15"))


@pytest.mark.parametrize("kind", [cache.TaylorSeer, cache.HiCache, cache.FoCa, cache.DMD])
@pytest.mark.parametrize("name", ["sd3", "flux_cfg", "wan22"])
def test_all_blocks_as_a_site(bench, same, name, kind):
    method = kind(site="blocks", interval=2, warmup=1)
    with Plan(method).attach(bench.pipe(name)) as run:
        outputs = [bench.call(name, steps=STEPS) for _ in range(2)]
    assert same(*outputs)
    assert torch.isfinite(outputs[0]).all()
    assert run.report.verdicts[method.name].state == "ACTIVE"


# Making a table.


def usual_call(tiny, steps):
    """Arguments of a tiny pipeline's call, without its prompt."""
    given = tiny.inputs(Ask([""], [0], guidance=True)) | {"num_inference_steps": steps}
    del given["prompt"]
    return given | {"output_type": "latent", "negative_prompt": "blurry"}


@pytest.mark.parametrize("by", ["block", "module", "kind"])
@pytest.mark.parametrize("name", ["flux_cfg", "sd15"])
def test_a_built_table_is_between_all_and_nothing(bench, name, by):
    tiny, pipe = PIPELINES[name], bench.pipe(name)
    call = usual_call(tiny, 6)
    built = {
        threshold: table.build(pipe, call, ["a fox", {"prompt": "a boat"}], threshold, by)
        for threshold in (0.0, 0.5, math.inf)
    }
    width = len(columns_of(find_denoisers(pipe)[0], by))
    assert built[0.0].steps == ("1" * width,) * 6
    first, *rest = built[math.inf].steps
    assert first == "1" * width
    assert len(set(rest)) == 1
    # kinds that the network does not have are never measured, and count as computed
    assert rest[0].count("1") == (
        4 - len({m.kind for m in modules_of(pipe)}) if by == "kind" else 0
    )
    ones = "".join(built[0.5].steps).count("1")
    assert "".join(built[math.inf].steps).count("1") < ones < 6 * width
    with Plan(built[0.5]).attach(pipe) as run:
        bench.call(name, steps=6)
    assert run.report.verdicts["cache.Table"].state == "ACTIVE"


def test_changes_are_those_of_the_modules(bench):
    """A module that grows by a constant: relative change 1 / i at step i."""
    pipe, step = bench.pipe("dit"), 0

    def growing(module, inner, *args, **kwargs):
        return filled(1.0 + step, inner(*args, **kwargs))

    def stepped(inner, *args, **kwargs):
        nonlocal step
        step += 1
        return inner(*args, **kwargs)

    undo = hooks.wrap(pipe.scheduler, "step", stepped)
    with replaced(modules_of(pipe), growing):
        call = {"num_inference_steps": 7, "output_type": "pt"}
        made = table.build(pipe, call, [{"class_labels": [3]}], 0.6)
    undo()
    # 1, 1/2 + 1/3, 1/4 + 1/5 + 1/6: computed where the sum reaches 0.6
    assert [line[0] for line in made.steps] == ["1", "1", "0", "1", "0", "0", "1"]


def test_a_table_needs_prompts(bench):
    with pytest.raises(errors.BadInput, match="at least one prompt"):
        table.build(bench.pipe("flux"), {}, [], 0.1)
