"""Record what a pipeline does with its denoiser, by running it, as rows for FACTS.md.

python -m tiny.facts                # from tests/: writes tiny/FACTS.md
"""

import functools
import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from tiny.base import PROMPTS, Tiny

Shapes = dict[str, str | tuple[int, ...]]


@dataclass
class Call:
    """One call of a denoiser or of a block."""

    name: str
    context: str | None
    step: int
    values: dict[str, Any]
    passed: str
    output: Any = None


@dataclass
class Tape:
    """Everything seen in one run."""

    denoiser: list[Call] = field(default_factory=list)
    blocks: dict[str, Call] = field(default_factory=dict)
    scheduler: list[str] = field(default_factory=list)
    steps: int = 0
    context: str | None = None


def record(tiny: Tiny, pipe: DiffusionPipeline, **how: Any) -> Tape:
    """Run `pipe` once under observation."""
    tape = Tape()
    with ExitStack() as undo:
        for name in tiny.denoisers:
            denoiser = getattr(pipe, name)
            _watch(denoiser, name, tape, tape.denoiser.append, undo)
            _watch_context(denoiser, tape, undo)
            for path, block in blocks(denoiser):
                key = f"{name}.{path}" if len(tiny.denoisers) > 1 else path
                _watch(block, key, tape, _first(tape.blocks), undo)
        undo.enter_context(_watched_scheduler(pipe.scheduler, tape))
        tiny.call(pipe, **how)
    return tape


def _first(found: dict[str, Call]) -> Callable[[Call], Any]:
    return lambda call: found.setdefault(call.name, call)


def blocks(denoiser: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, child in denoiser.named_children():
        if name == "mid_block" and child is not None:
            yield name, child
        elif isinstance(child, nn.ModuleList) and len(child) and "block" in name + _kind(child[0]):
            yield from ((f"{name}.{index}", block) for index, block in enumerate(child))


def _kind(module: nn.Module) -> str:
    return type(module).__name__.lower()


def _watch(
    module: nn.Module, name: str, tape: Tape, keep: Callable[[Call], Any], undo: ExitStack
) -> None:
    signature = inspect.signature(module.forward)
    calls: list[Call] = []

    def before(_: nn.Module, args: tuple, kwargs: dict) -> None:
        values = _named(signature, args) | kwargs
        passed = f"{len(args)} positional, {len(kwargs)} keyword"
        calls.append(Call(name, tape.context, tape.steps, values, passed))

    def after(_: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        call = calls.pop()
        call.output = output
        keep(call)

    for handle in (
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after, with_kwargs=True),
    ):
        undo.callback(handle.remove)


def _named(signature: inspect.Signature, args: tuple) -> dict[str, Any]:
    values = signature.bind_partial(*args).arguments
    more = values.pop("args", ())  # HunyuanVideo's blocks end in *args
    return values | {f"args[{index}]": value for index, value in enumerate(more)}


def _watch_context(denoiser: nn.Module, tape: Tape, undo: ExitStack) -> None:
    original = getattr(denoiser, "cache_context", None)
    if original is None:
        return

    @contextmanager
    def named(name: str, *args: Any, **kwargs: Any) -> Iterator[None]:
        tape.context = name
        with original(name, *args, **kwargs):
            yield
        tape.context = None

    denoiser.cache_context = named
    undo.callback(denoiser.__dict__.pop, "cache_context")


@contextmanager
def _watched_scheduler(scheduler: Any, tape: Tape) -> Iterator[None]:
    def watched(name: str, original: Callable) -> Callable:
        @functools.wraps(original)  # pipelines read the signatures of set_timesteps and step
        def call(*args: Any, **kwargs: Any) -> Any:
            if name == "step":
                tape.steps += 1
            shown = [*map(_short, args), *(f"{k}={_short(v)}" for k, v in kwargs.items())]
            line = f"{name}({', '.join(shown)})"
            if line not in tape.scheduler and not _seen(tape, name):
                tape.scheduler.append(line)
            return original(*args, **kwargs)

        return call

    names = [name for name in ("set_timesteps", "set_begin_index", "scale_model_input", "step")]
    names = [name for name in names if hasattr(scheduler, name)]
    for name in names:
        setattr(scheduler, name, watched(name, getattr(scheduler, name)))
    try:
        yield
    finally:
        for name in names:
            scheduler.__dict__.pop(name)


def _seen(tape: Tape, name: str) -> bool:
    repeated = name in ("step", "scale_model_input")
    return repeated and any(line.startswith(f"{name}(") for line in tape.scheduler)


def _short(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        shape = "×".join(map(str, value.shape)) or "scalar"
        return f"{shape} {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, float):
        return f"{value:.3g}"
    if type(value).__name__ == "ndarray":
        return f"ndarray[{len(value)}]"
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], torch.Generator):
        return "generators"
    return "generator" if isinstance(value, torch.Generator) else str(value)


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{path}[{key!r}]")
    elif isinstance(value, (list, tuple)) and any(
        isinstance(item, (torch.Tensor, list, tuple)) for item in value
    ):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{path}[{index}]")
    elif hasattr(value, "to_tuple"):
        yield from _leaves(value.to_tuple(), path)
    else:
        yield path, value


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    return {path: leaf for name, value in values.items() for path, leaf in _leaves(value, name)}


def _axis(two: Any, three: Any) -> str:
    """Say how a value follows the batch, from runs with 2 and 3 samples."""
    if not isinstance(two, torch.Tensor):
        return "–"
    if three is None or two.ndim != three.ndim:
        return "changes with the batch"
    grown = [axis for axis in range(two.ndim) if two.shape[axis] != three.shape[axis]]
    if not grown:
        return "**none**"
    axis = grown[0]
    times = three.shape[axis] - two.shape[axis]
    return ("" if axis == 0 else f"axis {axis}: ") + _times(times)


def rows(two: Call, three: Call) -> list[str]:
    """Return a table row for every argument of a call."""
    found = []
    for name, value in two.values.items():
        other = three.values.get(name)
        if isinstance(value, (list, tuple)) and value and len(value) != len(other):
            times = len(other) - len(value)
            items = ", ".join(_short(item) for item in value)
            kind = type(value).__name__
            found.append(f"| `{name}` | {kind} of {len(value)}: {items} | length {_times(times)} |")
            continue
        flat, others = _flat({name: value}), _flat({name: other})
        found += [
            f"| `{path}` | {_show(leaf)} | {_axis(leaf, others.get(path))} |"
            for path, leaf in flat.items()
        ]
    return found


def _times(times: int) -> str:
    return "B" if times == 1 else f"{times}·B"


def _show(value: Any) -> str:
    kind = f"{type(value).__name__} " if isinstance(value, (list, tuple, dict)) else ""
    return f"{kind}{_short(value)}"


def describe(tiny: Tiny) -> str:
    """Return the section of FACTS.md for one pipeline."""
    pipe = tiny.build()
    many = (2, 3) if tiny.batchable else (1, 1)
    two, three = (
        record(tiny, pipe, prompts=[PROMPTS[0]] * count, seeds=range(count)) for count in many
    )
    plain = record(tiny, pipe, prompts=[PROMPTS[0]] * many[0], guidance=False)
    lines = [f"## {tiny.name}", "", *_head(tiny, pipe, two, plain), ""]
    lines += _arguments(two, three)
    lines += ["", *_block_lines(two, three), ""]
    lines += [f"* scheduler: `{type(pipe.scheduler).__name__}`"]
    lines += [f"  * `{call}`" for call in two.scheduler]
    return "\n".join(lines) + "\n"


def _head(tiny: Tiny, pipe: DiffusionPipeline, tape: Tape, plain: Tape) -> list[str]:
    arguments = inspect.signature(pipe.__call__).parameters
    names = ", ".join(f"`{name}` {type(getattr(pipe, name)).__name__}" for name in tiny.denoisers)
    batch = "" if tiny.batchable else "; one prompt at a time"
    return [
        f"`{type(pipe).__name__}` · {tiny.media} · layout **{tiny.layout}**, order"
        f" {' '.join(tiny.order)}{batch}",
        "",
        f"* denoiser: {names}",
        f"* calls per step: {_per_step(tape)}; without guidance: {_per_step(plain)}",
        f"* returns {_returned(tape.denoiser[0])}",
        f"* time passed, per call: {_times_passed(tape)}",
        f"* `callback_on_step_end`: {_yes('callback_on_step_end' in arguments)};"
        f" `interrupt`: {_yes(hasattr(type(pipe), 'interrupt'))};"
        f" `scheduler.step` calls in a run of 4 steps: {tape.steps}",
    ]


def _yes(truth: bool) -> str:
    return "yes" if truth else "**no**"


def _per_step(tape: Tape) -> str:
    steps: dict[int, list[str]] = {}
    for call in tape.denoiser:
        place = f"{call.context}" if call.context else "no context"
        if call.name not in ("transformer", "unet"):
            place += f" ({call.name})"
        steps.setdefault(call.step, []).append(place)
    texts = [f"{len(found)} ({', '.join(found)})" for found in steps.values()]
    return " then ".join(dict.fromkeys(texts))


def _returned(call: Call) -> str:
    flag = call.values.get("return_dict", "not passed")
    return f"`{type(call.output).__name__}`, `return_dict` {flag}: {_outputs(call)}"


def _outputs(call: Call) -> str:
    leaves = [leaf for _, leaf in _leaves(call.output, "")]
    return ", ".join(_short(leaf) for leaf in leaves)


def _times_passed(tape: Tape) -> str:
    names = ("timestep", "timesteps", "t")
    values = (next((c.values[n] for n in names if n in c.values), None) for c in tape.denoiser)
    return ", ".join(f"{torch.as_tensor(value).flatten()[0].item():.4g}" for value in values)


def _arguments(two: Tape, three: Tape) -> list[str]:
    lines = []
    shown: list[str] = []
    for first, other in zip(two.denoiser, three.denoiser, strict=False):
        table = rows(first, other)
        names = [row.split("|")[1] + row.split("|")[3] for row in table]
        if names in shown:
            continue
        shown.append(names)
        lines += [f"Denoiser call ({first.passed}; context {first.context}):", ""]
        lines += ["| argument | at 2 samples | batch |", "|---|---|---|", *table, ""]
    return lines[:-1]


def _block_lines(two: Tape, three: Tape) -> list[str]:
    groups: dict[tuple, list[str]] = {}
    for name, call in two.blocks.items():
        arguments = ", ".join(_argument(path, call, three.blocks[name]) for path in call.values)
        text = f"{call.passed}: {arguments} → {_named_output(call)}"
        signature = re.sub(r"\d+×\S+ \w+", "", text)
        groups.setdefault((name.rpartition(".")[0], signature), []).append(text)
    lines = ["* blocks:"]
    for (owner, _), texts in groups.items():
        members = [n for n in two.blocks if n.rpartition(".")[0] == owner]
        lines.append(f"  * `{owner or members[0]}` × {len(texts)}: {texts[0]}")
    return lines


def _argument(path: str, call: Call, other: Call) -> str:
    value, batch = call.values[path], _axis(call.values[path], other.values[path])
    if isinstance(value, torch.Tensor):
        return f"`{path}` {_short(value)} [{batch}]"
    leaves = _flat({path: value})
    if len(leaves) > 1:
        kinds = {f"{_short(leaf)} [{_axis(leaf, None)}]" for leaf in leaves.values()}
        return (
            f"`{path}` {type(value).__name__} of {len(leaves)} ({sorted(kinds)[0].split(' [')[0]})"
        )
    return f"`{path}`={_show(value)}"


def _named_output(call: Call) -> str:
    """Name each output by the input stream of the same shape."""
    streams = ("encoder_hidden_states", "hidden_states", "x")
    inputs = {
        tuple(value.shape): name
        for name, value in call.values.items()
        if name in streams and isinstance(value, torch.Tensor)
    }
    kind = type(call.output).__name__
    outputs = call.output if isinstance(call.output, (tuple, list)) else (call.output,)
    return f"{kind} ({', '.join(_one_output(output, inputs) for output in outputs)})"


def _one_output(output: Any, inputs: dict[tuple[int, ...], str]) -> str:
    if isinstance(output, torch.Tensor):
        return inputs.get(tuple(output.shape), _short(output))
    if isinstance(output, (tuple, list)):
        return f"{type(output).__name__} of {len(output)}"
    return str(output)


def main() -> None:
    """Write FACTS.md beside this file."""
    from tiny import PIPELINES

    path = Path(__file__).with_name("FACTS.md")
    title = "\n# The pipelines\n"
    preface = path.read_text().partition(title)[0]
    sections = [describe(tiny) for tiny in PIPELINES.values()]
    path.write_text(preface + title + "\n" + "\n".join(sections))


if __name__ == "__main__":
    main()
