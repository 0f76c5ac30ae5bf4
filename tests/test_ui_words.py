"""Words: both languages say everything, pages say nothing else, and every label is explained."""

import ast
import inspect
import json
import re
from pathlib import Path
from string import Formatter
from typing import get_args

import gradio as gr
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pages import Memory, drawn

import app.ui
from app.serve.jobs import Phase, State
from app.sheet import LABELS
from app.ui import page, words
from app.ui.compare import SIDES
from app.ui.forms import GOALS
from app.ui.parts import MARKS

UI = Path(app.ui.__file__).parent
SOURCES = sorted(UI.glob("*.py"))
PAGES = sorted(path.stem for path in words.STRINGS.glob("*.json"))
EVERY = [
    (page, name)
    for page in PAGES
    for name in json.loads((words.STRINGS / f"{page}.json").read_text(encoding="utf-8"))
]
SHOWN = {"label", "info", "placeholder", "title", "description", "submit_btn", "stop_btn"}
"""Arguments of components that are shown as they are."""
FIRST = {"Button", "DownloadButton", "UploadButton", "Markdown", "Accordion", "Tab", "Info"}
"""Components that show their first argument, and notices."""
SAYING = {"t", "say", "labelled"}


def entry(page, name):
    return json.loads((words.STRINGS / f"{page}.json").read_text(encoding="utf-8"))[name]


def placeholders(text):
    return {field for _, field, _, _ in Formatter().parse(text) if field is not None}


@pytest.mark.parametrize(("page", "name"), EVERY)
def test_both_languages_say_it_with_the_same_values(page, name):
    found = entry(page, name)
    assert set(found) == set(words.LANGUAGES)
    assert all(text.strip() for text in found.values())
    assert placeholders(found["en"]) == placeholders(found["de"])


def test_the_tables_have_the_same_keys():
    assert set(words.table("en")) == set(words.table("de")) == {f"{p}_{n}" for p, n in EVERY}
    assert len(EVERY) == len(words.table("en")), "two pages have the same key"


@pytest.mark.parametrize(("page", "name"), [one for one in EVERY if one[1].endswith(words.HELP)])
def test_a_help_is_one_sentence_of_something_that_is_there(page, name):
    assert (page, name.removesuffix(words.HELP)) in EVERY
    for text in entry(page, name).values():
        assert text.endswith(".") and not re.search(r"[.!?] ", text), text


def calls(names=None):
    """Calls in the pages: of functions of these names, or of components of Gradio."""
    for source in SOURCES:
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            called = node.func
            if names and isinstance(called, ast.Name) and called.id in names:
                yield source.name, called.id, node
            of_gradio = isinstance(called, ast.Attribute) and ast.unparse(called.value) == "gr"
            if not names and of_gradio and not unseen(source, node):
                yield source.name, called.attr, node


def unseen(source, node):
    """Whether a component is there for clients or scripts alone."""
    hidden = [ast.unparse(one.value) for one in node.keywords if one.arg == "visible"]
    return source.name == "endpoints.py" or hidden == ["'hidden'"]


def said(names=SAYING):
    """(function, pattern of its key) of everything that the pages say."""
    return {
        (name, pattern)
        for _, name, node in calls(names)
        if node.args and (pattern := key_of(node.args[0])) is not None
    }


def key_of(node):
    """A regular expression of the keys that an expression can be; None: it is just passed on.

    What is filled in is a group.
    """
    if isinstance(node, ast.Constant):
        return re.escape(node.value)
    if isinstance(node, ast.JoinedStr):
        pieces = [
            re.escape(part.value) if isinstance(part, ast.Constant) else "([a-z_]+)"
            for part in node.values
        ]
        return "".join(pieces)
    if isinstance(node, ast.IfExp):
        return f"(?:{key_of(node.body)}|{key_of(node.orelse)})"
    return None


def matching(pattern):
    return [key for key in words.table("en") if re.fullmatch(pattern, key)]


def test_everything_that_is_said_has_words():
    for name, pattern in said():
        found = [key for key in matching(pattern) if not key.endswith(words.HELP)]
        assert found or matching(pattern), f"no words for {pattern}"
        if name == "labelled":
            lacking = [key for key in found if f"{key}{words.HELP}" not in words.table("en")]
            assert not ("[" not in pattern and lacking), f"no help for {lacking}"


def test_every_word_is_said(monkeypatch):
    shown = drawn_words(monkeypatch)
    unsaid = [key for key in words.table("en") if key not in shown and not is_said(key)]
    assert not unsaid


def drawn_words(monkeypatch):
    """The keys of everything that the components of the pages show."""
    real, shown = words.translator(), set()

    def note(key):
        shown.add(key)
        return real(key)

    monkeypatch.setattr(words, "translator", lambda: note)
    drawn(lambda: page.build(Memory()))
    return shown


def is_said(key):
    """Whether a page says a key; what it fills in must be a word that it goes through."""
    for source in SOURCES:
        constants = FILLED | set(constants_of(source))
        for pattern in spoken(source):
            found = re.fullmatch(pattern, key)
            if found and all(part in constants for part in found.groups() if part is not None):
                return True
    return False


FILLED = {*get_args(State), *get_args(Phase), *GOALS, *SIDES, *MARKS, *LABELS}
"""What the pages fill in that has a name of its own."""


def constants_of(source):
    """The words that a page goes through, and those that its functions return or choose from."""
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.comprehension | ast.For):
            yield from texts_in(node.iter)
        elif isinstance(node, ast.Return | ast.IfExp):
            yield from texts_in(node)


def texts_in(tree):
    return [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]


def spoken(source):
    """Patterns of the keys that a page says, or gives to a function that says them."""
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and node.value in words.table("en"):
            yield re.escape(node.value)
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.JoinedStr):
            yield key_of(node.value)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "say":
            yield key_of(node.args[0]) or "(?!)"


def test_what_the_browser_translates_is_plain():
    """Its formatter takes braces and tags for its own."""
    for name, pattern in said({"t", "labelled"}):
        for key in matching(pattern) if "[" not in pattern else []:
            for language in words.LANGUAGES:
                assert not set("{}<>") & set(words.table(language)[key]), (name, key)


def literal(node):
    """The words in an expression that are no words of the tables."""
    if isinstance(node, ast.Constant):
        return isinstance(node.value, str) and re.search(r"[A-Za-z]{2}", node.value)
    if isinstance(node, ast.JoinedStr):
        return any(literal(part) for part in node.values)
    return isinstance(node, (ast.List, ast.Tuple)) and any(map(literal, node.elts))


@pytest.mark.parametrize("source", [path.name for path in SOURCES])
def test_a_page_has_no_words_of_its_own(source):
    for where, name, node in calls():
        if where != source:
            continue
        shown = [keyword.value for keyword in node.keywords if keyword.arg in SHOWN]
        if name in FIRST:
            shown += node.args[:1] + [k.value for k in node.keywords if k.arg == "value"]
        wrong = [ast.unparse(value) for value in shown if literal(value)]
        assert not wrong, f"{source}:{node.lineno} gr.{name}: {wrong}"


@pytest.mark.parametrize("source", [path.name for path in SOURCES])
def test_every_label_has_a_help_sentence(source):
    """Where a component takes one it has it as ``info``; where not, it is said beside it."""
    for where, name, node in calls():
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        if where != source or "label" not in given or not hasattr(gr, name):
            continue
        takes = "info" in inspect.signature(getattr(gr, name)).parameters
        called = given["label"]
        key = key_of(called.args[0]) if isinstance(called, ast.Call) and called.args else None
        helped = key is not None and key + words.HELP in {pattern for _, pattern in said()}
        assert "info" in given if takes else helped, f"{source}:{node.lineno} gr.{name}"


def test_the_check_for_words_sees_words():
    assert literal(ast.parse('"Run"').body[0].value)
    assert literal(ast.parse('f"Run {x}"').body[0].value)
    assert not literal(ast.parse('t("explore_run")').body[0].value)


def test_a_component_cannot_be_given_a_key_without_words():
    with pytest.raises(KeyError, match="strings"):
        words.t("explore_no_such_thing")
    with pytest.raises(KeyError):
        words.labelled("explore_intro")


def test_gradio_gets_both_tables():
    tables = words.translator().translations_dict
    assert set(tables) == set(words.LANGUAGES)
    assert all(tables[language] == words.table(language) for language in words.LANGUAGES)
    assert json.loads(str(words.t("explore_run")).removeprefix("__i18n__"))["key"] == "explore_run"


@pytest.mark.parametrize(
    ("accepted", "language"),
    [
        (None, "en"),
        ("", "en"),
        ("de", "de"),
        ("de-AT,de;q=0.9,en;q=0.8", "de"),
        ("DE;q=0.7", "de"),
        ("en-GB,de", "en"),
        ("fr,de", "en"),
        ("deu", "en"),
        ("*", "en"),
    ],
)
def test_the_language_is_the_first_that_a_browser_accepts(accepted, language):
    assert words.language_of(accepted) == language


@given(st.text())
def test_any_header_gives_a_language(accepted):
    assert words.language_of(accepted) in words.LANGUAGES


@given(st.floats(-1e9, 1e9), st.integers(0, 4))
def test_numbers_are_written_as_the_language_writes_them(value, digits):
    english, german = (words.number(value, digits, language) for language in words.LANGUAGES)
    assert float(english) == pytest.approx(value, abs=0.51 * 10**-digits)
    assert german.replace(",", ".") == english


@given(st.text())
def test_values_are_filled_in_as_they_are(text):
    assert text in words.say("generate_restored", name=text)
