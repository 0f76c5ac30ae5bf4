"""``accel explain --devices N``: which way of sharing the work pays, on these devices."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from app.exits import say
from app.flags import Given
from app.request import Printing, Source, make

if TYPE_CHECKING:
    from parallel.launch import Place
    from parallel.simulate import Cluster, Prediction
    from parallel.work import Work

PROMPT = {"prompt": "a picture"}
STEPS = 28
"""Steps of a picture where the model does not say how many it usually takes."""


def advise(given: Given, devices: int) -> None:
    """Measure a step and the link, predict what each way of sharing takes, and recommend one."""
    from parallel import launch
    from parallel.simulate import predict

    work, cluster, steps = launch.spread(devices, _measured, given)
    found = predict(work, cluster, steps)
    if make(Printing, given).format == "json":
        told = {"cluster": asdict(cluster), "steps": steps, "ways": [asdict(one) for one in found]}
        typer.echo(json.dumps(_finite(told), indent=2))
        return
    Console(highlight=False).print(table(found, cluster, steps))
    say(recommended(found))


def _measured(place: Place, given: Given) -> tuple[Work, Cluster, int]:
    from app import models
    from app.together import _device
    from parallel.probe import measured

    source = make(Source, {**given, "device": _device(given, place)})
    model = models.load(source)
    work, cluster = measured(place, model.pipe, {**PROMPT, **model.call})
    return work, cluster, int(model.call.get("num_inference_steps", STEPS))


def table(found: list[Prediction], cluster: Cluster, steps: int) -> Table:
    """What each way takes, the fastest first."""
    columns = [Column(name, justify="right") for name in ("seconds", "×", "MB sent")]
    shown = Table("way", *columns, "")
    for one in found:
        if one.reason:
            shown.add_row(one.method, "–", "–", "–", Text(one.reason, "dim"))
            continue
        pays = "green" if one.faster > 1 else "red" if one.faster < 1 else ""
        times = Text(f"{one.faster:.2f}", pays)
        shown.add_row(one.method, f"{one.seconds:.2f}", times, f"{one.bytes / 1e6:.1f}", "")
    shown.caption = (
        f"predicted for {cluster.devices} devices and {steps} steps from what was measured: "
        f"{cluster.operations / 1e9:.1f} GFLOP/s and {1e3 * cluster.fixed:.1f} ms a call that "
        f"stay; {cluster.bandwidth / 1e9:.2f} GB/s and {1e6 * cluster.latency:.0f} µs a message"
    )
    return shown


def recommended(found: list[Prediction]) -> str:
    """What to do, in a sentence."""
    best = found[0]
    if best.method == "one device":
        return "warning: one device is faster than any way of sharing here: leave --devices out"
    plain = best.method.split(" ")[0]
    degree = "degree=2" if plain == "parallel.CFG" else "degree=0"
    mode = f" --set {plain}.mode=sync" if best.method.endswith("(sync)") else ""
    return f"recommended: --set {plain}.{degree}{mode} ({best.faster:.2f}× predicted)"


def _finite(value: Any) -> Any:
    """Without infinity, which JSON has not."""
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if value == float("inf") else value
