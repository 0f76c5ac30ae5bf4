"""``accel explain --devices N``: which way of sharing the work pays, on these devices or others."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from accel.errors import BadInput
from app.exits import say
from app.flags import Given
from app.request import Printing, Sharing, Source, make

if TYPE_CHECKING:
    from parallel.clusters import Cluster
    from parallel.launch import Place
    from parallel.simulate import Prediction
    from parallel.work import Work

PROMPT = {"prompt": "a picture"}
STEPS = 28
"""Steps of a picture where the model does not say how many it usually takes."""
MOST = 1024
"""Devices."""
WORTH = 1.05
"""Times as fast that sharing has to be: less is within what predictions are off by."""

Form = Callable[["Prediction"], str]


@dataclass(frozen=True)
class Known:
    """What predictions are made from.

    Attributes:
        work: Of a step.
        decoding: Of the decoder.
        steps: Of a picture.
        cluster: Where.
    """

    work: Work
    decoding: Work
    steps: int
    cluster: Cluster

    def predictions(self, devices: int) -> list[Prediction]:
        """What each way takes on so many devices, the fastest first."""
        from parallel.simulate import predict

        cluster = replace(self.cluster, devices=devices)
        return predict(self.work, cluster, self.steps, self.decoding)


def advise(given: Given) -> None:
    """Say what each way of sharing takes, and recommend one.

    On this machine a step and the link are measured, by so many processes. For other devices, which
    are described, one process counts a step.
    """
    from parallel import launch
    from parallel.clusters import described

    asked = make(Sharing, given)
    counts = numbers(asked.devices)
    if asked.cluster is not None:
        known = _counted(given, described(asked.cluster))
    elif len(counts) == 1:
        known = launch.spread(counts[0], _measured, given)
    else:
        raise BadInput(
            f"--devices {asked.devices}: links are measured between so many processes here, one "
            "number of them. Name it, or describe other devices by --cluster."
        )
    found = {count: known.predictions(count) for count in counts}
    if make(Printing, given).format == "json":
        typer.echo(json.dumps(_finite(told(known, found)), indent=2))
        return
    console = Console(highlight=False)
    for each in tables(known, found):
        console.print(each)
    for line in unfit(found):
        console.print(Text(line, "dim"))
    for count, ways in found.items():
        say(recommended(ways, count, known.cluster.memory))


def numbers(text: str) -> list[int]:
    """``4``: 4 alone; ``2-64``: doubled from 2 to 64.

    Raises:
        BadInput: If it is neither, or one of them is less than two.
    """
    read = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    first, last = (int(each) for each in (read[1], read[2] or read[1])) if read else (0, 0)
    if not 2 <= first <= last <= MOST:
        raise BadInput(
            f"--devices {text}: a number of devices that share a picture is needed, from 2 to "
            f"{MOST}, such as 4; or, with --cluster, a range of them, such as 2-64."
        )
    found = [first]
    while 2 * found[-1] < last:
        found.append(2 * found[-1])
    return found if first == last else [*found, last]


def _measured(place: Place, given: Given) -> Known:
    from app import models
    from app.together import _device
    from parallel.probe import measured

    model = models.load(make(Source, {**given, "device": _device(given, place)}))
    work, decoding, cluster = measured(place, model.pipe, {**PROMPT, **model.call})
    return Known(work, decoding, _steps(model.call), cluster)


def _counted(given: Given, cluster: Cluster) -> Known:
    from app import models
    from parallel.probe import counted

    model = models.load(make(Source, given))
    work, decoding = counted(model.pipe, {**PROMPT, **model.call})
    return Known(work, decoding, _steps(model.call), cluster)


def _steps(call: dict[str, Any]) -> int:
    return int(call.get("num_inference_steps", STEPS))


def tables(known: Known, found: dict[int, list[Prediction]]) -> list[Table]:
    """What each way takes: one table for one number of devices, else one for each quantity."""
    if len(found) == 1:
        [(count, ways)] = found.items()
        return [_alone(known, count, ways)]
    titles: dict[str, Form] = {
        "times as fast; the fastest is marked": lambda one: f"{one.faster:.2f}",
        "seconds": lambda one: f"{one.seconds:.2f}",
        "MB that a device sends": lambda one: f"{one.bytes / 1e6:.1f}",
        "MB that a device holds": lambda one: f"{one.memory / 1e6:.0f}",
    }
    made = [_by_devices(title, form, known, found) for title, form in titles.items()]
    made[-1].caption = _source(known)
    return made


def _alone(known: Known, count: int, ways: Sequence[Prediction]) -> Table:
    columns = [Column(name, justify="right") for name in ("seconds", "×", "MB sent", "MB held")]
    shown = Table("way", *columns, title=f"{count} devices")
    for one in ways:
        if one.reason:
            continue
        times = Text(f"{one.faster:.2f}", _colour(one))
        held = Text(f"{one.memory / 1e6:.0f}", _fits(known, one))
        sent = f"{one.bytes / 1e6:.1f}"
        shown.add_row(_short(one.method), f"{one.seconds:.2f}", times, sent, held)
    shown.caption = _source(known)
    return shown


def _by_devices(title: str, form: Form, known: Known, found: dict[int, list[Prediction]]) -> Table:
    shown = Table("way", *(Column(str(count), justify="right") for count in found), title=title)
    by_way = {
        count: {one.method: one for one in ways if not one.reason} for count, ways in found.items()
    }
    best = {count: _best(ways, known.cluster.memory).method for count, ways in found.items()}
    for name in dict.fromkeys(one.method for ways in found.values() for one in ways):
        cells = [by_way[count].get(name) for count in found]
        if any(cells):
            texts: list[Text] = [
                Text("–", "dim")
                if one is None
                else Text(form(one) + ("*" if best[count] == name else ""), _colour(one))
                for count, one in zip(found, cells, strict=True)
            ]
            shown.add_row(_short(name), *texts)
    return shown


def unfit(found: dict[int, list[Prediction]]) -> list[str]:
    """What serves for no number of devices, and why, by the reason."""
    reasons: dict[str, str] = {}
    for ways in found.values():
        reasons |= {one.method: one.reason for one in ways if one.reason}
    served = {one.method for ways in found.values() for one in ways if not one.reason}
    by_reason: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        if name not in served:
            by_reason.setdefault(reason, []).append(_short(name))
    return [f"not {', '.join(names)}: {reason}" for reason, names in by_reason.items()]


def _short(method: str) -> str:
    return method.replace("parallel.", "")


def _colour(one: Prediction) -> str:
    return "green" if one.faster > 1 else "red" if one.faster < 1 else ""


def _fits(known: Known, one: Prediction) -> str:
    return "" if one.memory <= known.cluster.memory else "red"


def _source(known: Known) -> str:
    cluster = known.cluster
    return (
        f"predicted for {known.steps} steps and {cluster.operations / 1e9:.1f} GFLOP/s, "
        f"{1e6 * cluster.fixed:.1f} µs an operator, {cluster.bandwidth / 1e9:.2f} GB/s and "
        f"{1e6 * cluster.latency:.0f} µs a message"
    )


def _best(ways: Sequence[Prediction], memory: float) -> Prediction:
    """The fastest that a device can hold; where none can, of all."""
    held = [one for one in ways if not one.reason and one.memory <= memory]
    return (held or list(ways))[0]


def recommended(ways: Sequence[Prediction], devices: int, memory: float) -> str:
    """What to do, in a sentence."""
    best = _best(ways, memory)
    if best.faster < WORTH:
        return (
            f"warning: one device is about as fast as any way of sharing among {devices}, or "
            "faster: leave --devices out"
        )
    if best.method == "parallel.VAE":
        return f"recommended for {devices}: parallel.VAE in a plan file ({best.faster:.2f}×)"
    sets = " ".join(_setting(part) for part in best.method.split(" + "))
    more = "" if best.memory <= memory else ", though a device cannot hold it"
    return f"recommended for {devices}: {sets} ({best.faster:.2f}× predicted{more})"


def _setting(part: str) -> str:
    name, _, form = part.partition(" ")
    if name == "parallel.CFG":
        return f"--set {name}.degree=2"
    if name == "parallel.USP":
        return f"--set {name}.ulysses=2"
    more = {"(sync)": f" --set {name}.mode=sync", "(split)": f" --set {name}.weights=split"}
    return f"--set {name}.degree=0{more.get(form, '')}"


def told(known: Known, found: dict[int, list[Prediction]]) -> dict[str, Any]:
    """All of it, for programs."""
    ways = {count: [asdict(one) for one in each] for count, each in found.items()}
    return {
        "cluster": {**asdict(known.cluster), "devices": max(found)},
        "steps": known.steps,
        "ways": {str(count): each for count, each in ways.items()},
    }


def _finite(value: Any) -> Any:
    """Without infinity, which JSON has not."""
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if value == float("inf") else value
