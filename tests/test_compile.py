"""Compiled, offloaded, cast, with a LoRA: a plan does what it does on the plain pipeline."""

import warnings
from dataclasses import dataclass, field

import pytest
import torch
from accelerate import cpu_offload
from conftest import bits_equal
from diffusers.hooks import apply_group_offloading, apply_layerwise_casting
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from roster import ROSTER, STEPS, full
from tiny import PIPELINES
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from accel import Plan, cache, errors
from accel.seams.denoisers import find_denoisers
from accel.seams.modules import compile_modules

NAMES = ("flux_cfg", "wan21", "sd15")
SHOWN = ("cache.EasyCache", "cache.FirstBlock", "cache.FORA", "cache.DeepCache", "cache.TextKV")
"""The methods that CI runs of the long tests: one of each site."""

CACHES = {name: row for name, row in ROSTER.items() if name.startswith("cache.")}


def each(names=NAMES, methods=CACHES, shown=SHOWN):
    """Every cache × the pipelines of ``names`` that it acts on; CI runs those ``shown``."""
    return pytest.mark.parametrize(
        ("name", "method"),
        [
            pytest.param(
                name, CACHES[method].active, id=f"{name}-{method}", marks=full(method not in shown)
            )
            for method in methods
            for name in names
            if CACHES[method].acts(PIPELINES[name])
        ],
    )


def networks(pipe):
    return [denoiser.core for denoiser in find_denoisers(pipe)]


def outcome(name, pipe, plan, **call):
    """Output and events of two runs under a plan, which are equal."""
    runs = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", errors.AccelWarning)
        with plan.attach(pipe) as run:
            for _ in range(2):
                output = torch.as_tensor(PIPELINES[name].call(pipe, steps=STEPS, **call))
                runs.append((output, run.report.to_dict()["events"]))
    (first, events), (second, again) = runs
    assert bits_equal(first, second)
    assert agree(events, again)
    return first, events


def agree(events, others):
    """Whether decisions are the same; a lossless cache takes what the host gives it."""
    assert events.keys() == others.keys()
    return all(events[name] == others[name] or ROSTER[name].lossless for name in events)


def equals(name, pipe, method):
    """Whether a plan does on a pipeline what it does on the plain one."""
    if ("plain", name, method) not in PLAIN:
        PLAIN["plain", name, method] = outcome(name, PIPELINES[name].build(), Plan(method))
    expected, events = PLAIN["plain", name, method]
    output, found = outcome(name, pipe, Plan(method))
    assert agree(found, events)
    return bits_equal(output, expected)


PLAIN = {}
"""Outcomes on the plain pipelines, computed once."""


# Compiled.


@dataclass
class Compiling:
    """What dynamo did since the last look."""

    seen: dict = field(default_factory=dict)

    def __call__(self):
        now = {
            "frames": counters["frames"]["total"],
            "graphs": counters["stats"]["unique_graphs"],
            "breaks": sum(counters["graph_break"].values()),
        }
        grown = {key: count - self.seen.get(key, 0) for key, count in now.items()}
        self.seen = now
        return grown


NOTHING = {"frames": 0, "graphs": 0, "breaks": 0}


@pytest.fixture
def compiling():
    look = Compiling()
    look()
    return look


def compile_blocks(pipe, **options):
    for network in networks(pipe):
        network.compile_repeated_blocks(**options)


class Compiled:
    """Pipelines of which parts are compiled, without a graph break, and that were called once."""

    def __init__(self):
        self.store = {}

    def __call__(self, name, parts=compile_blocks, backend="eager"):
        key = (name, parts, backend)
        if key not in self.store:
            pipe = PIPELINES[name].build()
            parts(pipe, backend=backend, fullgraph=True)
            PIPELINES[name].call(pipe, steps=2)
            self.store[key] = pipe
        return self.store[key]

    def forget(self):
        """The graphs of all of them."""
        self.store.clear()
        torch._dynamo.reset()


@pytest.fixture(scope="module")
def compiled():
    pipelines = Compiled()
    pipelines.forget()
    yield pipelines
    pipelines.forget()


def at_modules(method):
    """Whether a method works at modules, which a compiled block hides: the only ones refused."""
    return method.seam == "modules"


@each()
def test_compiled_blocks(compiled, compiling, name, method):
    """The same bits, the same decisions, and nothing compiled that stock did not compile."""
    pipe = compiled(name)
    compiling()
    if at_modules(method):
        with pytest.raises(errors.UnsupportedModel, match=r"are compiled.*compile_modules\(pipe\)"):
            Plan(method).attach(pipe)
    else:
        assert equals(name, pipe, method)
    assert compiling() == NOTHING


@each(shown=("cache.FORA",))
def test_compiled_modules(compiled, compiling, name, method):
    """The way out that the refusal names serves every cache: those of modules too."""
    pipe = compiled(name, compile_modules)
    compiling()
    assert equals(name, pipe, method)
    assert compiling() == NOTHING


@pytest.mark.parametrize("name", [pytest.param(n, marks=full(n != "wan21")) for n in NAMES])
def test_modules_of_one_class_share_a_graph(compiled, compiling, name):
    """There is not a graph for each block."""
    compiled.forget()
    compiling()
    pipe = compiled(name, compile_modules)
    grown = compiling()
    modules = [m for network in networks(pipe) for m in network.modules() if graph(m)]
    assert grown["breaks"] == 0
    assert len({type(m) for m in modules}) <= grown["graphs"] < len(modules)


def graph(module):
    return module._compiled_call_impl


def test_modules_of_compiled_blocks_are_not_compiled(compiled):
    """A graph inside of a graph would hide them all the same."""
    with pytest.raises(errors.UnsupportedModel, match="are compiled"):
        compile_modules(compiled("wan21"), backend="eager")
    attentions = [m for m in compiled("wan21").transformer.modules() if hasattr(m, "to_q")]
    assert attentions
    assert not any(map(graph, attentions))


@pytest.mark.parametrize("method", [CACHES["cache.EasyCache"].active, cache.FirstBlock()])
def test_compiled_by_another_backend(compiled, compiling, method):
    """aot_eager traces further down; the maths is the same."""
    pipe = compiled("wan21", backend="aot_eager")
    compiling()
    assert equals("wan21", pipe, method)
    assert compiling() == NOTHING


@pytest.mark.parametrize("batch", [1, 3])
def test_samples_that_part_compile_once(compiled, compiling, batch):
    """Sub-batches are new shapes: they compile in the first run and never again."""
    pipe, plan = compiled("wan21"), Plan(cache.FirstBlock(threshold=0.05))
    with warnings.catch_warnings(), plan.attach(pipe):
        warnings.simplefilter("ignore", errors.AccelWarning)
        PIPELINES["wan21"].call(pipe, steps=STEPS, batch=batch)
        compiling()
        PIPELINES["wan21"].call(pipe, steps=STEPS, batch=batch)
    assert compiling() == NOTHING


@each(("wan21", "sd15"), SHOWN)
def test_compiling_after_attaching_is_right_or_refused(name, method):
    pipe = PIPELINES[name].build()
    PIPELINES[name].call(pipe, steps=2)
    expected, _ = outcome(name, PIPELINES[name].build(), Plan(method))
    run = Plan(method).attach(pipe)
    for network in networks(pipe):
        network.compile_repeated_blocks(backend="eager")
    try:
        assert bits_equal(PIPELINES[name].call(pipe, steps=STEPS), expected)
    except errors.BrokenAttachment as refusal:
        assert "compiled" in str(refusal)
        assert "Detach" in str(refusal)
    run.detach()


# Reads of the device.


class Reads(TorchDispatchMode):
    """Counts reads of single numbers, below Python."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.fixture
def reads(monkeypatch):
    """Counts the reads of a run: numbers, and whole tensors as lists or arrays."""
    whole = []
    for name in ("tolist", "numpy"):
        inner = getattr(torch.Tensor, name)

        def read(tensor, *args, inner=inner, **kwargs):
            whole.append(tensor)
            return inner(tensor, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, read)

    def count(name, pipe, plan, steps):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", errors.AccelWarning)
            with plan.attach(pipe):
                whole.clear()
                with Reads() as mode:
                    PIPELINES[name].call(pipe, steps=steps)
        return mode.count + len(whole)

    return count


@each(("flux_cfg", "sd15"))
def test_reads_of_the_device(bench, reads, name, method):
    """What has a threshold reads once a step, the others never; all may read once a run."""
    row, pipe, more = ROSTER[method.name], bench.pipe(name), 5
    if method.name == "cache.DMD":
        pytest.skip("its predictor solves a small system on the host")
    if row.fixed:
        pytest.skip("its runs are of one length")
    forms = [method] if row.dial is None else [method, row.dial(1e6), row.dial(1e-12)]
    stock = reads(name, pipe, Plan(), STEPS + more) - reads(name, pipe, Plan(), STEPS)
    for form in forms:
        longer = reads(name, pipe, Plan(form), STEPS + more)
        grown = longer - reads(name, pipe, Plan(form), STEPS) - stock
        assert grown <= (more if getattr(form, "threshold", 0) else 0)


# Offloaded.


def model_offload(pipe):
    pipe.enable_model_cpu_offload(device="cpu")


def sequential_offload(pipe):
    for network in networks(pipe):
        cpu_offload(network, torch.device("cpu"), offload_buffers=True)


def group_offload(pipe):
    for network in networks(pipe):
        apply_group_offloading(
            network, torch.device("cpu"), torch.device("cpu"), num_blocks_per_group=1
        )


def leaf_offload(pipe):
    for network in networks(pipe):
        apply_group_offloading(
            network, torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level"
        )


OFFLOADS = {
    "model": model_offload,
    "sequential": sequential_offload,
    "groups": group_offload,
    "leaves": leaf_offload,
}


@pytest.mark.parametrize("offload", OFFLOADS.values(), ids=OFFLOADS)
@each(("flux_cfg", "sd15"))
def test_offloaded(bench, name, method, offload):
    """Above the hooks of accelerate and diffusers: the same bits, run after run, and off again."""
    pipe = PIPELINES[name].build()
    offload(pipe)
    assert equals(name, pipe, method)
    stock = bench.stock(name, steps=4)
    for _ in range(2):
        assert bits_equal(PIPELINES[name].call(pipe, steps=4), stock)
    hooked = [hasattr(network, "_hf_hook") for network in networks(pipe)]
    assert all(hooked) == (offload in (model_offload, sequential_offload))


@pytest.mark.parametrize("name", ["flux_cfg", "sd15"])
def test_model_offload_that_comes_after(bench, name):
    """Put on, and taken off, while a plan is attached."""
    method = CACHES["cache.EasyCache"].active
    expected, events = outcome(name, PIPELINES[name].build(), Plan(method))
    pipe = PIPELINES[name].build()
    run = Plan(method).attach(pipe)
    model_offload(pipe)
    for _ in range(2):
        assert bits_equal(PIPELINES[name].call(pipe, steps=STEPS), expected)
        assert run.report.to_dict()["events"] == events
    pipe.remove_all_hooks()
    assert bits_equal(PIPELINES[name].call(pipe, steps=STEPS), expected)
    assert run.report.to_dict()["events"] == events
    run.detach()
    assert bits_equal(PIPELINES[name].call(pipe, steps=4), bench.stock(name, steps=4))


@pytest.mark.parametrize("offload", [sequential_offload, model_offload])
def test_the_hooks_of_accelerate_leave_first(bench, offload):
    pipe = PIPELINES["flux_cfg"].build()
    offload(pipe)
    run = Plan(CACHES["cache.EasyCache"].active).attach(pipe)
    PIPELINES["flux_cfg"].call(pipe, steps=4)
    pipe.remove_all_hooks()
    PIPELINES["flux_cfg"].call(pipe, steps=STEPS)
    assert run.report.verdicts["cache.EasyCache"].state == "ACTIVE"
    run.detach()
    assert bits_equal(PIPELINES["flux_cfg"].call(pipe, steps=4), bench.stock("flux_cfg", steps=4))


# Cast layer by layer.


def rounded(pipe, casted):
    """Round, once, the weights that layerwise casting rounds."""
    for network, like in zip(networks(pipe), networks(casted), strict=True):
        stored = dict(like.named_parameters())
        for path, weight in network.named_parameters():
            weight.data = weight.data.to(stored[path].dtype).to(weight.dtype)


@each(("flux_cfg", "sd15"))
def test_layerwise_casting(name, method):
    """Stored in half, computed in full: as if the weights had been rounded once."""
    pipe, reference = PIPELINES[name].build(), PIPELINES[name].build()
    for network in networks(pipe):
        apply_layerwise_casting(network, torch.bfloat16, torch.float32)
    rounded(reference, pipe)
    expected, events = outcome(name, reference, Plan(method))
    output, found = outcome(name, pipe, Plan(method))
    assert found == events
    assert bits_equal(output, expected)
    assert bits_equal(outcome(name, pipe, Plan())[0], outcome(name, reference, Plan())[0])


# With a LoRA.


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """A LoRA for the network of a tiny pipeline, as the folder of a file."""

    def save(name):
        folder = tmp_path_factory.getbasetemp() / f"lora-{name}"
        if not folder.exists():
            pipe = PIPELINES[name].build()
            (part,) = PIPELINES[name].denoisers
            torch.manual_seed(0)
            network = getattr(pipe, part)
            network.add_adapter(
                LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False)
            )
            weights = get_peft_model_state_dict(network)
            pipe.save_lora_weights(folder, **{f"{part}_lora_layers": weights})
        return folder

    return save


LORAS = [
    *(("sd15", method) for method in ("cache.EasyCache", "cache.FORA", "cache.DeepCache", None)),
    *(("flux_cfg", f"cache.{method}") for method in ("FirstBlock", "TeaCache", "TaylorSeer")),
]


@pytest.mark.parametrize(("name", "method"), LORAS, ids=str)
def test_a_lora_loaded_before_and_after_attaching(bench, lora, name, method):
    """Loaded, weighed, switched off, unloaded: as on a pipeline that had it from the start."""
    plan = Plan(*([CACHES[method].active] if method else []), CACHES["cache.TextKV"].active)
    tiny = PIPELINES[name]
    outputs = {}
    for when in ("before", "after"):
        pipe = tiny.build()
        if when == "before":
            pipe.load_lora_weights(lora(name), adapter_name="one")
        run = plan.attach(pipe)
        if when == "after":
            pipe.load_lora_weights(lora(name), adapter_name="one")
        outputs[when] = [tiny.call(pipe, steps=STEPS)]
        pipe.set_adapters(["one"], [0.3])
        outputs[when].append(tiny.call(pipe, steps=STEPS))
        pipe.disable_lora()
        outputs[when].append(tiny.call(pipe, steps=STEPS))
        pipe.unload_lora_weights()
        outputs[when].append(tiny.call(pipe, steps=STEPS))
        assert not method or run.report.verdicts[method].state == "ACTIVE"
        run.detach()
        assert bits_equal(tiny.call(pipe, steps=4), bench.stock(name, steps=4))
    assert all(map(bits_equal, outputs["before"], outputs["after"]))
    full_, weighed, none, unloaded = outputs["after"]
    assert not bits_equal(full_, weighed)
    assert not bits_equal(weighed, none)
    assert bits_equal(none, unloaded)
    assert bits_equal(unloaded, outcome(name, tiny.build(), plan)[0])
