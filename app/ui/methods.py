"""The page *Methods*: what each one does, on which models, its fields, its source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import gradio as gr
from markupsafe import Markup

from accel.attach import LAYERS
from accel.errors import AccelError
from accel.plan import methods
from app.listing import described
from app.ui import parts
from app.ui.events import QUIET
from app.ui.words import Language, labelled, language_for, say, t

if TYPE_CHECKING:
    from app.serve.service import Service

ANY = ""

_METHOD = Markup(
    '<section class="accel-method"><h2>{name} <span class="accel-tag">{layer}</span> {fit}</h2>'
    '<p>{summary}</p>{reason}<p class="accel-quiet">{supports}</p>'
    '<p class="accel-quiet">{source}</p>{fields}</section>'
)
_FIT = Markup('<span class="accel-tag accel-{kind}">{text}</span>')
_REASON = Markup("<p>{text}</p>")
_FIELDS = Markup("<details><summary>{name}</summary>{table}</details>")
_COUNT = Markup('<p role="status">{text}</p>')


@cache
def all_methods() -> tuple[dict[str, Any], ...]:
    """Every installed method as plain data, outermost layer first."""
    ordered = sorted(methods().values(), key=lambda kind: (LAYERS.index(kind.layer), kind.name))
    return tuple(described(kind) for kind in ordered)


def found(search: str, known: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The methods in which all words of a search occur, in any case."""
    words = search.lower().split()
    return [method for method in known if all(word in _text(method) for word in words)]


def _text(method: Mapping[str, Any]) -> str:
    names = ("name", "layer", "seam", "supports", "source", "summary")
    fields = (f"{name} {field['description']}" for name, field in method["fields"].items())
    return "\n".join([*(str(method[name]) for name in names), *fields]).lower()


def listed(
    search: str,
    model: str = ANY,
    fits: Mapping[str, str | None] | None = None,
    language: Language = "en",
) -> Markup:
    """The methods that a search finds, as HTML.

    Args:
        search: Words that all occur in it.
        model: Which model ``fits`` is about.
        fits: By method why it does not fit, or ``None``; not given: nothing is said of it.
        language: Of the words around.
    """
    known = all_methods()
    shown = found(search, known)
    count = say("methods_count", language, shown=len(shown), total=len(known))
    each = (_method(one, model, fits, language) for one in shown)
    return Markup().join([_COUNT.format(text=count), *each])


def _method(
    method: Mapping[str, Any], model: str, fits: Mapping[str, str | None] | None, language: Language
) -> Markup:
    reason = None if fits is None else fits.get(method["name"])
    return _METHOD.format(
        name=method["name"],
        layer=method["layer"],
        fit="" if fits is None else _fit(model, reason, language),
        summary=method["summary"],
        reason=_REASON.format(text=reason) if reason else "",
        supports=say("methods_supports", language, text=method["supports"]),
        source=say("methods_source", language, text=method["source"]),
        fields=_fields(method, language),
    )


def _fit(model: str, reason: str | None, language: Language) -> Markup:
    kind = "fits" if reason is None else "unfit"
    return _FIT.format(kind=kind, text=say(f"methods_{kind}", language, model=model))


def _fields(method: Mapping[str, Any], language: Language) -> Markup | str:
    fields = method["fields"]
    if not fields:
        return ""
    unset = say("methods_unset", language)
    rows = [
        (
            name,
            unset if field["default"] is None else str(field["default"]),
            field["range"],
            field["description"] or "",
        )
        for name, field in fields.items()
    ]
    heads = [say(f"methods_{name}", language) for name in ("field", "default", "range", "meaning")]
    name = say("methods_fields", language, count=len(rows))
    return _FIELDS.format(name=name, table=parts.table(method["name"], heads, rows))


@dataclass(frozen=True)
class Events:
    """What happens when something on the page is changed."""

    service: Service

    def show(self, search: str | None, model: str | None, request: gr.Request) -> Markup:
        """The methods that a search finds, and whether they fit the chosen model."""
        language = language_for(request)
        try:
            fits = self.service.fits(model).methods if model else None
        except AccelError as error:
            return parts.error(str(error))
        return listed(search or "", model or ANY, fits, language)


def tab(service: Service) -> None:
    """The page; it is drawn inside of the present block."""
    gr.Markdown(t("methods_intro"))
    with gr.Row():
        search = gr.Textbox(**labelled("methods_search"), min_width=240, elem_id="methods-search")
        names = [info.name for info in service.models()]
        model = gr.Dropdown(
            choices=[(t("methods_any"), ANY), *((name, name) for name in names)],
            value=ANY,
            **labelled("methods_model"),
            min_width=240,
            elem_id="methods-model",
        )
    table = gr.HTML(listed(""), elem_id="methods-table")

    gr.on(None, Events(service).show, [search, model], table, trigger_mode="always_last", **QUIET)
