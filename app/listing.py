"""``accel methods``, ``accel explain`` and ``accel env``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from types import UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin

import tomli_w
import typer
from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from accel.attach import LAYERS, Accelerator
from accel.plan import method_class
from accel.plan import methods as all_methods
from app.flags import Given
from app.request import Listing, Measuring, Printing, Sharing, Source, make

if TYPE_CHECKING:
    from accel.attention.sizes import Payoff
    from accel.expected import Expectation

Kind = type[Accelerator]
PROMPT = {"prompt": "a photograph"}
STEPS = "num_inference_steps"
CERTAIN = {"measured": "green", "derived": "green", "transferred": "yellow", "unknown": "red"}
SIGNS = {Ge: "≥ {0.ge:g}", Gt: "> {0.gt:g}", Le: "≤ {0.le:g}", Lt: "< {0.lt:g}"}


def methods(given: Given) -> None:
    """Show the methods as a table, as JSON, or as a plan file. Imports no torch."""
    asked = make(Listing, given)
    kinds = all_methods() if asked.name is None else {asked.name: method_class(asked.name)}
    ordered = sorted(kinds.values(), key=lambda kind: (LAYERS.index(kind.layer), kind.name))
    if asked.toml:
        typer.echo(as_toml(ordered, live=asked.name is not None))
    elif make(Printing, given).format == "json":
        typer.echo(json.dumps([described(kind) for kind in ordered], indent=2))
    elif asked.name is None:
        Console(highlight=False).print(_overview(ordered))
    else:
        _show(ordered[0])


def described(kind: Kind) -> dict[str, Any]:
    """A method in plain data."""
    return {
        "name": kind.name,
        "layer": kind.layer,
        "seam": kind.seam,
        "supports": kind.supports,
        "source": kind.source,
        "summary": _summary(kind),
        "fields": {
            name: {
                "default": _default(kind, name),
                "range": allowed(field),
                "description": field.description,
            }
            for name, field in kind.model_fields.items()
        },
    }


def allowed(field: FieldInfo) -> str:
    """The values that a field takes: ``0 ≤ number ≤ 1``, ``reuse | newton``."""
    if get_origin(field.annotation) is Literal:
        return " | ".join(map(str, get_args(field.annotation)))
    if isinstance(field.annotation, UnionType) or get_origin(field.annotation) is Union:
        return " | ".join(allowed(FieldInfo(annotation=one)) for one in get_args(field.annotation))
    kind = getattr(field.annotation, "__name__", str(field.annotation))
    bounds = [SIGNS[type(note)].format(note) for note in field.metadata if type(note) in SIGNS]
    return " ".join([kind, ", ".join(bounds)]).strip()


def as_toml(kinds: list[Kind], *, live: bool) -> str:
    """A plan file with every field at its default and explained; commented out unless live."""
    lines = ["plan = 1"]
    for kind in kinds:
        lines += ["", f"# {_summary(kind)}", _line(f"[{kind.name}]", live)]
        for name, field in kind.model_fields.items():
            default = _default(kind, name)
            unset = " (not set)" if default is None else ""
            lines.append(f"# {name}: {allowed(field)}; {field.description}{unset}")
            if default is not None:
                lines.append(_line(tomli_w.dumps({name: default}).strip(), live))
    return "\n".join(lines)


def _line(text: str, live: bool) -> str:
    return text if live else "\n".join(f"# {line}" for line in text.splitlines())


def _default(kind: Kind, name: str) -> Any:
    return kind().model_dump(mode="json")[name]


def _summary(kind: Kind) -> str:
    return (kind.__doc__ or "").strip().splitlines()[0]


def _overview(kinds: list[Kind]) -> Table:
    table = Table(Column("method", no_wrap=True), "what it does, and its fields", show_lines=True)
    for kind in kinds:
        place = Text(f"\n{kind.layer}", "dim")
        fields = (
            f"{name} = {_default(kind, name)}  ({allowed(field)})"
            for name, field in kind.model_fields.items()
        )
        text = Text("\n".join([_summary(kind), *fields]))
        text.append(f"\n{kind.source}", "dim")
        table.add_row(Text(kind.name, "bold") + place, text)
    table.caption = "`accel methods NAME` explains the fields of one"
    return table


def _show(kind: Kind) -> None:
    console = Console(highlight=False)
    console.print(Text(kind.name, "bold"), f"· {kind.layer} · {kind.supports}")
    console.print(_summary(kind))
    console.print(f"Source: {kind.source}\n")
    if not kind.model_fields:
        console.print("It has no fields.")
        return
    names = Column("field", min_width=max(map(len, kind.model_fields)))
    table = Table(names, "default", "values", "what it is")
    for name, field in kind.model_fields.items():
        table.add_row(name, str(_default(kind, name)), allowed(field), field.description)
    console.print(table)
    first = next(iter(kind.model_fields))
    console.print(f"\n--set {kind.name}.{first}={_default(kind, first)}", markup=False)


def explain(given: Given) -> None:
    """Load a model and say which methods fit it, and from where on sparse attention pays."""
    import accel
    from app import models

    if make(Sharing, given) != Sharing():
        from app.advice import advise

        advise(given)
        return
    model = models.load(make(Source, given))
    asked = make(Measuring, given)
    steps = {} if asked.steps is None else {STEPS: asked.steps}
    settings = {**model.call, **steps}
    explanation = accel.explain(
        model.pipe, PROMPT | settings if asked.sparse else None, settings=settings
    )
    if make(Printing, given).format == "json":
        typer.echo(json.dumps(asdict(explanation), indent=2))
        return
    console = Console(highlight=False)
    console.print(Text(explanation.pipeline, "bold"), f"· {explanation.scheduler}")
    for denoiser in explanation.denoisers:
        console.print(Text(f"denoiser  {denoiser}"))
    console.print(Text(f"guidance  {explanation.layout}"))
    table = Table("method", "fits", "why")
    for fit in explanation.fits:
        fits = Text("yes", "green") if fit.fits else Text("no", "red")
        table.add_row(fit.method, fits, Text(fit.reason))
    console.print(table)
    if explanation.sparse:
        console.print(_paying(explanation.sparse))
    else:
        for line in explanation.paying:
            console.print(Text(line, "dim"))
    console.print(_expectations(explanation.presets))
    for line in explanation.measured:
        console.print(Text(line, "dim"))


def _expectations(found: Sequence[Expectation]) -> Table:
    """What each preset may be expected to do, and how sure that is."""
    table = Table("preset", "certainty", "what to expect")
    for one in found:
        refused = one.reason is not None
        certainty = Text("–" if refused else one.certainty, CERTAIN.get(one.certainty, ""))
        table.add_row(one.preset, certainty, Text(str(one), "red" if refused else ""))
    return table


def _paying(found: Sequence[Payoff]) -> Table:
    """Dense and sparse attention beside each other, by method and tokens."""
    columns = [Column(name, justify="right") for name in ("density", "dense ms", "sparse ms", "×")]
    table = Table("method", "tokens, what they show", *columns)
    for paying in found:
        for place, one in enumerate(paying.timed):
            table.add_row(
                paying.method if place == 0 else "",
                f"{one.tokens:,} ({one.layout})",
                f"{one.density:.2f}",
                f"{1000 * one.dense:.1f}",
                f"{1000 * one.sparse:.1f}",
                Text(f"{one.dense / one.sparse:.2f}", "green" if one.pays else "red"),
            )
        table.add_row("" if paying.timed else paying.method, Text(str(paying), "dim"))
    table.caption = (
        "attention alone, as the network's own at its first step, enlarged; searches with the "
        "share that falls on a step; each method with its default fields"
    )
    return table


def environment(given: Given) -> None:
    """Show what results depend on besides their plan."""
    from app import env

    decisive: dict[str, Any] = {
        **env.versions(),
        **env.devices(),
        "threads": str(env.threads()),
    }
    digest = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()
    shown = {**decisive, "fingerprint": digest[:16], **env.optional()}
    if make(Printing, given).format == "json":
        typer.echo(json.dumps(shown, indent=2))
        return
    table = Table.grid(padding=(0, 2))
    for name, value in shown.items():
        table.add_row(Text(name, "bold"), Text(str(value)))
    Console(highlight=False).print(table)
