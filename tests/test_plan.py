"""Plans: equal as sets, read from text, and wrong in one clear line."""

import subprocess
import sys

import pytest
from roster import ROSTER

import accel
from accel import Plan, cache, errors, guidance, methods
from accel.attach import LAYERS


def test_every_method_is_in_the_roster_and_nothing_else():
    assert methods() == {name: type(row.active) for name, row in ROSTER.items()}


@pytest.mark.parametrize("kind", methods().values(), ids=methods())
def test_a_method_tells_what_it_is(kind):
    family, _ = kind.name.split(".")
    assert kind.__module__.startswith((f"accel.{family}.", f"{family}."))
    assert kind.layer in LAYERS
    assert kind.seam
    assert kind.supports
    assert "arXiv" in kind.source or "http" in kind.source
    assert kind.model_config["frozen"]
    for name, field in kind.model_fields.items():
        assert field.description, f"{kind.name}.{name} has no description"
        assert not field.is_required(), f"{kind.name}.{name} has no default"


def test_methods_are_ordered_by_layer_whatever_the_order_of_writing():
    plan = Plan(*reversed([row.active for row in ROSTER.values()]))
    depths = [LAYERS.index(method.layer) for method in plan]
    assert depths == sorted(depths)
    assert len(plan) == len(ROSTER)
    assert plan != Plan()
    assert plan != "a plan"


def test_a_plan_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        cache.EasyCache().threshold = 1.0


def test_a_method_twice_is_a_conflict():
    with pytest.raises(errors.Conflict, match=r"cache\.EasyCache is in the plan twice"):
        Plan(cache.EasyCache(), cache.EasyCache(threshold=0.2))


@pytest.mark.parametrize("thing", [3, cache.EasyCache, {"cache": {}}, None])
def test_a_plan_holds_methods(thing):
    with pytest.raises(errors.PlanError, match=r"A plan holds methods, not .*: write for example"):
        Plan(thing)


# Bad input: what was found, what was needed, what to do next – in one line.

WRONG = {
    "unknown method": ("[cache.EasyCach]", "'cache.EasyCach'", "did you mean cache.EasyCache?"),
    "unknown family": ("[xyz.Quux]", "'xyz.Quux'", "known are attention."),
    "unknown field": ("[cache.EasyCache]\nlimit = 1", "'limit'", "it has threshold, warmup"),
    "below range": (
        "[cache.EasyCache]\nthreshold = -1",
        "cache.EasyCache.threshold = -1",
        "greater than or equal to 0. Run `accel methods cache.EasyCache`",
    ),
    "not a number": (
        "[guidance.Interval]\nhigh = 'low'",
        "guidance.Interval.high = 'low'",
        "a valid number",
    ),
    "nan": ("[guidance.Interval]\nhigh = nan", "high = nan", "greater than 0"),
    "a fraction of a step": ("[cache.EasyCache]\nwarmup = 2.5", "warmup = 2.5", "integer"),
    "not a choice": (
        "[cache.FirstBlock]\npredictor = 'magic'",
        "'magic'",
        "'foca' or 'dmd'",
    ),
    "fields at odds": ("[guidance.Interval]\nlow = 3\nhigh = 2", "low (3)", "below high (2)"),
    "sampler at odds": ("[samplers.DPMSolverPP]\norder = 3\neta = 1", "eta=1.0", "Set order=2"),
    "no table": ("[cache]\nEasyCache = 3", "found 3", "expected a table of fields"),
    "a method as a family": ('["cache.EasyCache"]', "cache.EasyCache", "inside of it"),
    "no method": ("x = 1", "'x = 1'", "tables such as [cache.EasyCache]"),
    "another format": ("plan = 2", "format 2", "Install the version"),
    "no toml": ("[[", "no TOML", "`accel methods --toml`"),
}


@pytest.mark.parametrize(("text", "found", "needed"), WRONG.values(), ids=WRONG)
def test_a_wrong_plan_says_so_in_one_line(text, found, needed):
    with pytest.raises(errors.PlanError) as caught:
        Plan.from_toml(text)
    message = str(caught.value)
    assert found in message
    assert needed in message
    assert "\n" not in message
    assert ".." not in message


@pytest.mark.parametrize("text", ["{", "[]", "3", ""])
def test_text_that_is_no_json_plan(text):
    with pytest.raises(errors.PlanError, match="JSON"):
        Plan.from_json(text)


def test_an_unknown_preset_lists_the_known():
    with pytest.raises(errors.PlanError, match="choose one of exact, balanced, fast, fastest"):
        Plan.preset("quick")


@pytest.mark.parametrize("name", ["exact", "balanced", "fast", "fastest"])
def test_presets_are_plans(name):
    plan = Plan.preset(name)
    assert Plan.from_toml(plan.to_toml()) == plan


def test_defaults_are_left_to_the_reader():
    assert Plan.from_toml("[cache.EasyCache]") == Plan(cache.EasyCache())
    assert Plan.from_toml("") == Plan()
    assert guidance.Interval() in Plan.from_dict({"guidance": {"Interval": {}}})


def test_names_and_fields_need_no_torch():
    code = (
        "import sys, accel\n"
        "for name, kind in accel.methods().items(): kind.off(), kind.model_fields\n"
        "accel.Plan.from_toml('[cache.EasyCache]')\n"
        "assert not {'torch', 'diffusers', 'numpy'} & {*sys.modules}, 'heavy import'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("module", [accel, cache, guidance])
def test_all_names_are_there(module):
    assert all(hasattr(module, name) for name in module.__all__)
    assert len(set(module.__all__)) == len(module.__all__)  # their order is ruff's
