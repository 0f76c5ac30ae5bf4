"""Law 2: no trace. A detached plan leaves every attribute and every bit as they were."""

import contextlib
import random
from functools import cache

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from conftest import bits_equal, differences, trace
from diffusers import hooks as host
from roster import CI, CORE, LEADERS, ROSTER, STEPS, cases, compatible, pipelines
from tiny import PIPELINES

from accel import Plan, errors


@cache
def everything(name):
    """A plan of the leaders of all engines that serve a pipeline, as far as they go together."""
    tiny = PIPELINES[name]
    rows = [ROSTER[leader] for leader in LEADERS.values()]
    return compatible(tiny.build(), [row.active for row in rows if row.serves(tiny)])


@pipelines(CI)
def test_attach_and_detach_leave_every_attribute(bench, name):
    pipe = bench.pipe(name)
    before = trace(pipe, strict=True)
    run = everything(name).attach(pipe)
    assert differences(before, trace(pipe, strict=True))
    run.detach()
    run.detach()
    assert not differences(before, trace(pipe, strict=True))


@cases(CI)
def test_detach_restores_the_output(bench, same, name, method):
    # the bench checks all attributes when the test ends
    random_state = torch.get_rng_state()
    with Plan(method).attach(bench.pipe(name)) as run:
        output = bench.call(name, steps=STEPS)
    assert run.report.verdicts[method.name].state == "ACTIVE"
    row = ROSTER[method.name]
    lossless = method in row.exact or row.lossless
    assert lossless in (None, same(output, bench.stock(name, steps=STEPS)))
    assert same(bench.call(name, steps=STEPS), bench.stock(name, steps=STEPS))
    assert torch.equal(random_state, torch.get_rng_state())


@pytest.mark.parametrize("seed", range(4))
@pipelines(CORE)
def test_undos_in_any_order(bench, name, seed):
    pipe = bench.pipe(name)
    before = trace(pipe, strict=True)
    run = everything(name).attach(pipe)
    undos = [callback for _, callback in run._stack.pop_all()._exit_callbacks]
    random.Random(seed).shuffle(undos)
    for undo in undos:
        undo(None, None, None)
    assert not differences(before, trace(pipe, strict=True))


@pipelines(CI)
def test_a_failed_attach_rolls_back(bench, name):
    class Refusing(type(ROSTER["guidance.Interval"].active)):
        name = "zzz.Refusing"
        layer = "weights"

        def attach(self, site):
            yield from super().attach(site)

    pipe = bench.pipe(name)
    before = trace(pipe, strict=True)
    plan = Plan(*everything(name), ROSTER["guidance.Interval"].active, Refusing())
    with pytest.raises(errors.Conflict, match=r"guidance\.Interval") as caught:
        plan.attach(pipe)
    assert "zzz.Refusing" in str(caught.value)
    assert not differences(before, trace(pipe, strict=True))


def test_an_unsupported_second_method_rolls_back(bench):
    before = trace(bench.pipe("sd15"), strict=True)
    with pytest.raises(errors.UnsupportedModel):
        Plan(ROSTER["cache.EasyCache"].active, ROSTER["cache.FirstBlock"].active).attach(
            bench.pipe("sd15")
        )
    assert not differences(before, trace(bench.pipe("sd15"), strict=True))


# Hooks of other libraries, above or below ours, leaving in every order.


class Doubling(ModelHook):
    """accelerate's kind of hook."""

    def post_forward(self, module, output):
        return tuple(2 * part for part in output)


class DiffusersDoubling(host.ModelHook):
    """diffusers' kind of hook."""

    def new_forward(self, module, *args, **kwargs):
        return tuple(2 * part for part in self.fn_ref.original_forward(*args, **kwargs))


def accelerate_hook(module):
    add_hook_to_module(module, Doubling())
    return lambda: remove_hook_from_module(module)


def diffusers_hook(module):
    own = not hasattr(module, "_diffusers_hook")
    registry = host.HookRegistry.check_if_exists_or_initialize(module)
    registry.register_hook(DiffusersDoubling(), "doubling")

    def remove():
        registry.remove_hook("doubling", recurse=False)
        if own:
            del module._diffusers_hook

    return remove


FOREIGN = {"accelerate": accelerate_hook, "diffusers": diffusers_hook}
ORDERS = {"theirs below, ours first": "to-o", "theirs below, theirs first": "to-t"}
ORDERS |= {"ours below, ours first": "ot-o", "ours below, theirs first": "ot-t"}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("hook", FOREIGN.values(), ids=FOREIGN)
@pytest.mark.parametrize("name", CORE)
def test_hooks_of_others(name, hook, order):
    tiny = PIPELINES[name]
    pipe = tiny.build()
    network = getattr(pipe, tiny.denoisers[0])
    stock = tiny.call(pipe, steps=3)
    theirs_off = hook(network)
    doubled = tiny.call(pipe, steps=3)
    theirs_off()
    assert bits_equal(tiny.call(pipe, steps=3), stock)
    before = trace(pipe)

    undo = {}
    for who in order[:2]:
        if who == "t":
            undo["t"] = hook(network)
        else:
            run = Plan(ROSTER["cache.EasyCache"].active).attach(pipe)
            undo["o"] = run.detach
    with pytest.raises(errors.Conflict, match="already carries"):
        everything(name).attach(pipe)
    tiny.call(pipe, steps=STEPS)
    assert run.report.steps == STEPS
    assert run.report.verdicts["cache.EasyCache"].state == "ACTIVE"

    exact_or_refused(undo.pop(order[-1]))
    if "t" in undo:
        assert bits_equal(tiny.call(pipe, steps=3), doubled)
    else:
        exact_or_refused(lambda: tiny.call(pipe, steps=3))
    exact_or_refused(*undo.values())
    assert bits_equal(tiny.call(pipe, steps=3), stock)
    assert not differences(before, trace(pipe))


def exact_or_refused(action):
    with contextlib.suppress(errors.BrokenAttachment):
        action()
