"""Every word of the pages, in English and in German.

A page's words lie in ``strings/PAGE.json``, both languages side by side: ``{"run": {"en": "Run",
"de": "Starten"}}`` in ``explore.json`` has the key ``explore_run``. The help sentence of a label
has the label's key with ``_help`` behind it. What a component shows as it is goes through ``t``,
and the browser translates it; what is put into HTML goes through ``say``, here.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

import gradio as gr

Language = Literal["en", "de"]
LANGUAGES: tuple[Language, ...] = get_args(Language)
STRINGS = Path(__file__).parent / "strings"
HELP = "_help"


@cache
def table(language: Language) -> dict[str, str]:
    """All words of a language by key."""
    pages = sorted(STRINGS.glob("*.json"))
    return {
        f"{page.stem}_{name}": words[language]
        for page in pages
        for name, words in json.loads(page.read_text(encoding="utf-8")).items()
    }


@cache
def translator() -> gr.I18n:
    """The tables as ``launch(i18n=…)`` and ``mount_gradio_app(i18n=…)`` take them."""
    return gr.I18n(**{language: table(language) for language in LANGUAGES})


def t(key: str) -> Any:
    """The words of a component, translated by the browser.

    Raises:
        KeyError: If there are no words of that key.
    """
    if key not in table("en"):
        raise KeyError(f"strings/*.json has no words for '{key}': add them in both languages.")
    return translator()(key)


def labelled(key: str) -> dict[str, Any]:
    """A component's ``label`` and, in one sentence, its ``info``.

    Raises:
        KeyError: If either of them has no words.
    """
    return {"label": t(key), "info": t(key + HELP)}


def say(key: str, language: Language = "en", **values: Any) -> str:
    """Words with values filled in, translated here.

    Raises:
        KeyError: If there are no words of that key, or a value is missing.
    """
    return table(language)[key].format(**values)


def number(value: float, digits: int, language: Language = "en") -> str:
    """A number with a fixed count of decimals, as the language writes it."""
    text = f"{value:.{digits}f}"
    return text.replace(".", ",") if language == "de" else text


def language_of(accepted: str | None) -> Language:
    """The language of a browser: the first of its ``Accept-Language`` where we have it.

    Gradio's frontend chooses by the same rule, so that both halves of a page agree.
    """
    first = (accepted or "").partition(",")[0].partition(";")[0].partition("-")[0]
    return "de" if first.strip().lower() == "de" else "en"


def language_for(request: gr.Request | None) -> Language:
    """The language of the browser that sent a request; English where none did."""
    return language_of(None if request is None else request.headers.get("accept-language"))
