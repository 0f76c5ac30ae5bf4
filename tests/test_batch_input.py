"""The input of a batch: what was written is what is read, and what cannot be read says where."""

import csv
import io
import json
import os
import tracemalloc
from dataclasses import fields
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from accel.errors import BadInput
from app.batch import rows, yaml_rows
from app.batch.rows import Found, Problem
from app.request import FILES, Request

KINDS = ("txt", "csv", "jsonl", "yaml")
PATHS = (*FILES, "plan")
TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=30)
NUMBERS = st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False)
PLAIN = TEXT | NUMBERS | st.booleans()
PLANS = st.recursive(
    PLAIN | st.none(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
CHANGE = st.from_regex(r"[a-z]\.[A-Z]\.[a-z]=[0-9]", fullmatch=True)
FREE = sorted(rows.FIELDS - {"size", "set", "plan"})
ROWS = st.fixed_dictionaries(
    {},
    optional={name: PLAIN | st.none() for name in FREE}
    | {"plan": TEXT | st.dictionaries(TEXT, PLANS, max_size=2)}
    | {"set": st.lists(CHANGE, max_size=3)},
)
CELLS = st.fixed_dictionaries({}, optional={name: TEXT for name in (*FREE, "plan")})
MARKS = (
    "\n",
    "\r\n",
    "\r",
    "\ufeff",
    "\0",
    '"',
    ",",
    ":",
    ": ",
    "- ",
    "  ",
    "#",
    "{",
    "}",
    "[",
    "]",
    "|",
)
YAML = (
    "&a ",
    "*a",
    "<<: ",
    "? ",
    "!!int ",
    "!!binary ",
    "!x ",
    "---\n",
    "...\n",
    "%YAML 9\n",
    "{a: ",
)
WORDS = ("prompt", "seed", "size", "set", "plan", "rows:\n", "matrix:\n", "zip:\n", "defaults:\n")
VALUES = ("fox", "1", "-1", "1e999", "NaN", ".inf", "1:30", "64x48", "null", "\\ud800", "\\u0000")
WHOLE = ('{"prompt": "a fox"}', '{"seed": 1, "seed": 2}', "prompt,seed\n", "a fox,1\n")
FRAGMENTS = st.lists(
    st.sampled_from((*MARKS, *YAML, *WORDS, *VALUES, *WHOLE)).map(str.encode)
    | st.binary(max_size=4),
    max_size=40,
).map(b"".join)


def judged(content: bytes, kind: str | None) -> list[Found | Problem]:
    """All that an input gives; nothing if it has no rows."""
    try:
        return list(rows.read("-", io.BytesIO(content), kind))
    except BadInput as error:
        one_line(str(error))
        return []


def values(content: bytes, kind: str | None) -> list[dict[str, Any]]:
    """What the rows of an input say; all have to be rows."""
    found = judged(content, kind)
    assert all(isinstance(one, Found) for one in found), found
    return [one.values for one in found if isinstance(one, Found)]


def problem(content: bytes | str, kind: str | None) -> Problem:
    """The only problem of an input."""
    raw = content.encode() if isinstance(content, str) else content
    wrong = [one for one in judged(raw, kind) if isinstance(one, Problem)]
    assert len(wrong) == 1, wrong
    one_line(wrong[0].text)
    return wrong[0]


def one_line(text: str) -> None:
    assert text.isprintable() and text.endswith((".", "?")), text
    assert 0 < len(text) < 500, text


def given_ones(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if value is not None}


# What was written is what is read


@given(st.lists(ROWS, min_size=1, max_size=4))
def test_json_lines_come_back(written: list[dict[str, Any]]) -> None:
    for ascii_only, end in product((True, False), ("\n", "\r\n")):
        text = end.join(json.dumps(row, ensure_ascii=ascii_only) for row in written)
        for content in (text, text + end, "\ufeff" + text, end + text.replace(end, end * 2)):
            assert values(content.encode(), "jsonl") == list(map(given_ones, written))


@given(st.lists(ROWS, min_size=1, max_size=4), st.booleans(), st.booleans())
def test_yaml_comes_back(written: list[dict[str, Any]], bare: bool, flow: bool) -> None:
    # what PyYAML writes bare of Unicode's own line breaks, nobody reads
    bare = bare and not set("\x85\u2028\u2029") & set(json.dumps(written, ensure_ascii=False))
    for written_as in (written, {"rows": written}):
        text = yaml.safe_dump(written_as, allow_unicode=bare, default_flow_style=flow)
        assert values(text.encode(), "yaml") == list(map(given_ones, written))


@given(
    st.lists(CELLS, min_size=1, max_size=4),
    st.sampled_from([("\r\n", csv.QUOTE_MINIMAL), ("\n", csv.QUOTE_ALL)]),
)
def test_tables_come_back(written: list[dict[str, str]], style: tuple[str, Any]) -> None:
    names = ["prompt", *sorted({name for row in written for name in row} - {"prompt"})]
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, names, lineterminator=style[0], quoting=style[1])
    writer.writeheader()
    writer.writerows(written)
    content = table.getvalue().encode()
    expected = [{name: cell for name, cell in row.items() if cell} for row in written]
    assert values(content, "csv") == values(b"\xef\xbb\xbf" + content, "csv") == expected


@given(st.lists(TEXT.map(lambda text: " ".join(text.split())), min_size=1))
def test_prompts_come_back(written: list[str]) -> None:
    expected = [{"prompt": prompt} for prompt in written if prompt and not prompt.startswith("#")]
    for end in ("\n", "\r\n"):
        for content in (end.join(written), end.join(["\ufeff# a comment", "", *written, ""])):
            assert values(content.encode(), "txt") == expected


@given(st.lists(CHANGE, max_size=3), st.sampled_from([";", "\n", " ;\n "]))
def test_changes_of_the_plan_are_a_list_or_a_text(changes: list[str], between: str) -> None:
    ways = [json.dumps({"set": way}).encode() for way in (changes, between.join(changes))]
    assert values(b"\n".join(ways), "jsonl") == [{"set": changes}] * 2


@given(st.integers(0, 10**9 - 1), st.integers(0, 10**9 - 1), st.sampled_from("xX×"))
def test_size_is_width_and_height(width: int, height: int, sign: str) -> None:
    rectangle = {"width": width, "height": height}
    square = {"width": width, "height": width}
    for text in (f"{width}{sign}{height}", f" {width} {sign} {height} "):
        assert values(f"size\n{text}".encode(), "csv") == [rectangle]
        assert values(json.dumps({"size": text, "width": None}).encode(), "jsonl") == [rectangle]
    assert values(f"size\n{width}".encode(), "csv") == [square]
    assert values(f"- size: {width}".encode(), "yaml") == [square]


# Combinations


NAMES = st.lists(st.sampled_from(FREE), min_size=1, max_size=3, unique=True)
LISTS = NAMES.flatmap(
    lambda names: st.fixed_dictionaries(
        {name: st.lists(PLAIN | st.none(), min_size=1, max_size=3) for name in names}
    )
)
EQUAL = st.tuples(NAMES, st.integers(1, 4)).flatmap(
    lambda case: st.fixed_dictionaries(
        {name: st.lists(PLAIN, min_size=case[1], max_size=case[1]) for name in case[0]}
    )
)
DEFAULTS = st.fixed_dictionaries({}, optional={name: PLAIN | st.none() for name in FREE})


@given(DEFAULTS, st.lists(DEFAULTS | TEXT, max_size=2), LISTS, EQUAL)
def test_parts_stand_together(
    defaults: dict[str, Any], listed: list[Any], matrix: dict[str, Any], beside: dict[str, Any]
) -> None:
    parts = {"zip": beside, "matrix": matrix, "rows": listed, "defaults": defaults}
    found = judged(yaml.safe_dump(parts, sort_keys=False).encode(), "yaml")
    asked = [{"prompt": row} if isinstance(row, str) else row for row in listed]
    crossed = [dict(zip(matrix, chosen, strict=True)) for chosen in product(*matrix.values())]
    paired = [
        dict(zip(beside, chosen, strict=True)) for chosen in zip(*beside.values(), strict=True)
    ]
    expected = [
        Found(f"stdin: {part}[{index}]", given_ones(defaults) | given_ones(row))
        for part, made in (("rows", asked), ("matrix", crossed), ("zip", paired))
        for index, row in enumerate(made)
    ]
    assert found == expected


def test_size_of_the_defaults_gives_way_side_by_side() -> None:
    text = "defaults: {size: 64x48}\nrows: [{width: 32}, {size: 8}, {size: null}]"
    assert values(text.encode(), "yaml") == [
        {"width": 32, "height": 48},
        {"width": 8, "height": 8},
        {"width": 64, "height": 48},
    ]


def test_mappings_take_in_others() -> None:
    text = """
    - &a {prompt: fox, seed: 1}
    - &b {<<: *a, seed: 2}
    - {<<: [{steps: 3}, *b, {steps: 4, guidance: 5}], prompt: owl}
    """
    assert values(text.encode(), "yaml") == [
        {"prompt": "fox", "seed": 1},
        {"prompt": "fox", "seed": 2},
        {"prompt": "owl", "seed": 2, "steps": 3, "guidance": 5},
    ]


def test_what_looks_like_a_time_in_yaml_is_a_text() -> None:
    found = values(b"[{id: 2026-01-02, prompt: 12:30}, =, <<]", "yaml")
    assert found == [{"id": "2026-01-02", "prompt": "12:30"}, {"prompt": "="}, {"prompt": "<<"}]


# Whatever the bytes


@settings(max_examples=400)
@given(st.binary(max_size=60) | FRAGMENTS, st.sampled_from([None, *KINDS]))
def test_any_bytes_are_rows_or_problems(content: bytes, kind: str | None) -> None:
    for one in judged(content, kind):
        assert one.where.startswith("stdin") and one.where.isprintable()
        if isinstance(one, Problem):
            one_line(one.text)
        else:
            assert one.values.keys() <= rows.FIELDS - {"size"}
            assert None not in one.values.values()
            assert json.loads(json.dumps(one.values, allow_nan=False)) == one.values


@settings(max_examples=200)
@given(st.lists(st.binary(max_size=8) | FRAGMENTS, max_size=8).map(b"\n".join))
def test_every_line_counts_once(content: bytes) -> None:
    def numbers(kind: str, comment: str) -> list[str]:
        lines = content.decode(errors="replace").removeprefix("\ufeff").split("\n")
        bad = [b"\0" in raw or not utf8(raw) for raw in content.split(b"\n")]
        return [
            f"stdin:{number}"
            for number, (text, wrong) in enumerate(zip(lines, bad, strict=True), 1)
            if wrong or (text.strip() and not (comment and text.strip().startswith(comment)))
        ]

    for kind, comment in (("txt", "#"), ("jsonl", "")):
        assert [one.where for one in judged(content, kind)] == numbers(kind, comment)


def utf8(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


GOOD = {
    "txt": [b"a fox", "ein Käuzchen".encode(), b'"', b"{}"],
    "jsonl": [b'{"prompt": "a fox"}', b'{"seed": 1}', b"{}"],
    "csv": [b"a fox,1", b'"a\nfox",2', b",", b'"""",3'],
}
BAD = {
    "utf-8": b"\xff",
    "quote and no utf-8": b'"\xe4"',
    "zero": b"a\0b",
    "long": b"x" * (rows.LONGEST + 1),
    "long, with quotes": b'"a","' + b'""' * 2**19 + b'"',
}
TORN = {"jsonl": [b"{", b"[1]", b'{"seed": NaN}', b'{"seed": 1, "seed": 1}', b'"fox"', b"9" * 5000]}


@pytest.mark.parametrize("kind", GOOD)
@pytest.mark.parametrize("wrong", BAD)
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_a_bad_line_changes_no_other(kind: str, wrong: str, end: bytes) -> None:
    start = [b"prompt,seed"] * (kind == "csv")
    good = GOOD[kind]
    expected = values(end.join(start + good), kind)
    for bad in (BAD[wrong], *TORN.get(kind, [])):
        for at in range(len(good) + 1):
            content = end.join([*start, *good[:at], bad, *good[at:]])
            found = judged(content, kind)
            assert [one.values for one in found if isinstance(one, Found)] == expected
            assert isinstance(found[at], Problem)
            one_line(found[at].text)


def test_a_bad_line_in_a_cell_costs_its_row() -> None:
    long = b"x" * (rows.LONGEST + 1)
    for bad in (b"\xff", b"a\0b", long, b'an ""owl""' + long):
        found = judged(b'prompt,id\n"one\n' + bad + b'\nthree",1\n"a fox",2\n', "csv")
        assert isinstance(found[0], Problem) and found[0].where == "stdin:2"
        assert found[1:] == [Found("stdin:5", {"prompt": "a fox", "id": "2"})]
    ends_one_begins_another = b'",1\n"' + long
    found = judged(b'prompt,id\n"one\n' + ends_one_begins_another + b'",2\na fox,3\n', "csv")
    assert [one.where for one in found] == ["stdin:2", "stdin:4", "stdin:5"]
    assert [type(one) for one in found] == [Found, Problem, Found]


def test_rows_begin_on_the_line_that_is_told() -> None:
    content = b'\n prompt , id\n"a\nfox",1\n\n"an\r\nowl",2\na,b,c\n"never closed'
    found = judged(content, "csv")
    assert [one.where for one in found] == [f"stdin:{line}" for line in (3, 6, 8, 9)]
    assert [type(one) for one in found] == [Found, Found, Problem, Problem]


def test_a_line_is_as_long_as_it_may_be() -> None:
    longest = b"x" * rows.LONGEST
    assert values(longest + b"\n\n" + longest, "txt") == [{"prompt": longest.decode()}] * 2
    assert problem(longest + b"x\na fox", "txt").where == "stdin:1"


@pytest.mark.parametrize("kind", ["txt", "csv", "jsonl", None])
def test_an_endless_line_takes_little_memory(kind: str | None) -> None:
    content = io.BytesIO(b'{"prompt": "' + b"x" * 10_000_000 + b'"}\na fox\n')
    tracemalloc.start()
    try:
        found = list(rows.read("-", content, kind))
        assert tracemalloc.get_traced_memory()[1] < 6 * 2**20
    finally:
        tracemalloc.stop()
    assert isinstance(found[0], Problem) and found[0].where == "stdin:1"


# What is wrong with a row


LINES = {
    "no utf-8": (b"a fox\nan \xe4sop\n", "txt", ":2", "byte 0xe4 at position 4"),
    "zero": (b"ab\0c", "txt", ":1", "zero byte at position 3"),
    "torn": (b'{"seed": 1}\n{"prompt": "a fo', "jsonl", ":2", "character 12"),
    "two in a line": (b"{} {}", "jsonl", ":1", "character 4"),
    "no object": (b"[1]", "jsonl", ":1", "[1]"),
    "twice": (b'{"seed": 1, "seed": 1}', "jsonl", ":1", "'seed' is there twice"),
    "twice in the plan": (b'{"plan": {"a": 1, "a": 1}}', "jsonl", ":1", "'a' is there twice"),
    "nan": (b'{"seed": NaN}', "jsonl", ":1", "'NaN' is not finite"),
    "infinite": (b'{"seed": -Infinity}', "jsonl", ":1", "'-Infinity' is not finite"),
    "too large": (b'{"seed": 1e999}', "jsonl", ":1", "'1e999' is not finite"),
    "too long": (b'{"seed": ' + b"9" * 5000 + b"}", "jsonl", ":1", "too long"),
    "bits": (b'{"seed": ' + b"9" * 50 + b"}", "jsonl", ":1", "64 bits"),
    "deep": (b'{"plan": ' + b"[" * 10**5, "jsonl", ":1", "without end"),
    "deep plan": (b'{"plan": ' + b"[" * 40 + b"]" * 40 + b"}", "jsonl", ":1", "32 deep"),
    "wide plan": (b'{"plan": [' + b"1," * 10**5 + b"1]}", "jsonl", ":1", "100,000 wide"),
    "surrogate": (b'{"id": "\\ud800"}', "jsonl", ":1", "surrogate"),
    "surrogate within": (b'{"plan": {"a": ["\\ud800"]}}', "jsonl", ":1", "surrogate"),
    "zero character": (b'{"id": "\\u0000"}', "jsonl", ":1", "zero character"),
    "unknown": (b'{"sede": 1}', "jsonl", ":1", "'sede': did you mean seed?"),
    "unlike any": (b'{"xyzzy": null}', "jsonl", ":1", "known are compile, control"),
    "device": (b'{"device": "cpu"}', "jsonl", ":1", "no field 'device'"),
    "set": (b'{"set": [1]}', "jsonl", ":1", "set is [1]"),
    "few cells": (b"prompt,seed\n1,2\na fox\n", "csv", ":3", "1 cell where"),
    "many cells": (b"prompt,seed\na,fox,1\n", "csv", ":2", "3 cells"),
    "header": (b"promt,seed\na fox,1\n", "csv", ":1", "did you mean prompt?"),
    "nameless": (b"prompt,\na fox,1\n", "csv", ":1", "no field ''"),
    "named twice": (b"seed,prompt, seed\n", "csv", ":1", "seed is named twice"),
    "bad header": (b"\xffprompt\na fox\n", "csv", ":1", "0xff"),
    "unclosed": (b'prompt\n"a fox\n', "csv", ":2", "no CSV"),
    "text behind quotes": (b'prompt\n"a" fox\n', "csv", ":2", "no CSV"),
    "long cell": (b"prompt\n" + b"x" * 140_000, "csv", ":2", "no CSV"),
    "yaml: no utf-8": (b"- fox\n- \xff", "yaml", ":2", "0xff at position 3"),
    "yaml: zero": (b"- fox\n- \0", "yaml", ":2", "'\\x00'"),
    "yaml: torn": (b"rows:\n- [a\n", "yaml", ":3", "no YAML"),
    "yaml: scalar": (b"fox", "yaml", ":1", "'fox'"),
    "yaml: unknown part": (b"zip: {seed: [1]}\nprompt: fox", "yaml", ":2", "no part 'prompt'"),
    "yaml: part twice": (b"rows: [a]\nzip:\nrows: [a]", "yaml", ":3", "'rows' is there twice"),
    "yaml: no part": (b"[1]: fox", "yaml", ":1", "no part [1]"),
    "yaml: no rows": (b"rows: fox", "yaml", ":1", "no list"),
    "yaml: two documents": (b"- fox\n---\n- fox", "yaml", ":2", "second document"),
    "yaml: defaults": (b"defaults: {seeds: 1}\nrows: [fox]", "yaml", ": defaults", "seeds"),
    "yaml: no defaults": (b"defaults: [1]\nrows: [fox]", "yaml", ": defaults", "[1]"),
    "yaml: no row": (b"[a fox, 3]", "yaml", ": rows[1]", "3"),
    "yaml: unknown": (b"[{sede: 1}]", "yaml", ": rows[0]", "seed?"),
    "yaml: twice": (b"- fox\n- seed: 1\n  seed: 2", "yaml", ": rows[1]", "line 3, the key 'seed'"),
    "yaml: key": (b"[{1: 2}]", "yaml", ": rows[0]", "key 1 is no text"),
    "yaml: infinite": (b"[{seed: .inf}, fox]", "yaml", ": rows[0]", "'.inf' is not finite"),
    "yaml: bits": (b"[0x" + b"f" * 10**4 + b"]", "yaml", ": rows[0]", "64 bits"),
    "yaml: tag": (b"[!!python/none , fox]", "yaml", ": rows[0]", "python/none"),
    "yaml: tag of a list": (b"[!!set {a, b}, fox]", "yaml", ": rows[0]", "no plain value"),
    "yaml: wrong tag": (b"[{seed: !!int fox}, fox]", "yaml", ": rows[0]", "'fox' is no int"),
    "yaml: alias": (b"[*a, fox]", "yaml", ": rows[0]", "called 'a'"),
    "yaml: itself": (b"[{plan: &a {b: *a}}]", "yaml", ": rows[0]", "called 'a'"),
    "yaml: takes in": (b"[{<<: fox}]", "yaml", ": rows[0]", "no mapping"),
    "yaml: deep": (b"- fox\n- " + b"[" * 999 + b"]" * 999, "yaml", ": rows[1]", "32 deep"),
    "yaml: very deep": (b"- fox\n- " + b"[" * 10**5, "yaml", ":2", "1000 deep"),
    "matrix: unknown": (b"matrix: {sede: [1]}\nrows: [fox]", "yaml", ": matrix", "seed?"),
    "matrix: no list": (b"matrix: {seed: 1}", "yaml", ": matrix", "seed is 1"),
    "matrix: empty list": (b"matrix: {seed: []}", "yaml", ": matrix", "seed is []"),
    "matrix: nothing": (b"matrix: {}", "yaml", ": matrix", "no field in it"),
    "matrix: no mapping": (b"matrix: [1]", "yaml", ": matrix", "[1]"),
    "matrix: a value": (b"matrix: {size: [8, a]}", "yaml", ": matrix[1]", "size is 'a'"),
    "zip: lengths": (b"zip: {seed: [1], id: [1, 2]}", "yaml", ": zip", "seed has 1, id has 2"),
}


@pytest.mark.parametrize("name", LINES)
def test_a_problem_says_what_and_where(name: str) -> None:
    content, kind, where, says = LINES[name]
    found = problem(content, kind)
    assert found.where == f"stdin{where}"
    assert says in found.text, found.text


@pytest.mark.parametrize("size", ["", "64x", "x", "64x48x3", "-1", "1.5", 1.5, True, [64, 48]])
def test_what_is_no_size(size: Any) -> None:
    assert "WIDTHxHEIGHT" in problem(json.dumps({"size": size}), "jsonl").text
    assert "WIDTHxHEIGHT" in problem(yaml.safe_dump([{"size": size}]), "yaml").text


@pytest.mark.parametrize("side", ["width", "height"])
def test_size_and_a_side_are_too_much(side: str) -> None:
    assert f"with {'width or height'}" in problem(json.dumps({"size": 8, side: 8}), "jsonl").text
    assert "one or the other" in problem(f"size,{side}\n8,8\n8,\n", "csv").text


def test_fields_are_those_of_a_request() -> None:
    of_a_request = {field.name for field in fields(Request)}
    assert rows.FIELDS - of_a_request == {"id", "size", "plan", "preset", "goal", "set"}
    assert of_a_request - rows.FIELDS == {"device"}


def test_aliases_of_aliases_end() -> None:
    levels = "\n".join(f"  a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 31))
    bomb = f"- fox\n- plan:\n  a0: &a0 fox\n{levels}".replace("\n  a", "\n    a")
    assert "wide" in problem(bomb, "yaml").text
    merges = "\n".join(f"- &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}" for n in range(1, 31))
    assert len(values(f"- &a0 {{seed: 1}}\n{merges}".encode(), "yaml")) == 31


def test_a_matrix_has_an_end() -> None:
    values_ = list(range(10))
    matrix = {name: values_ for name in FREE[:7]}
    assert "1e+07 combinations" in problem(json.dumps({"matrix": matrix}), "yaml").text


# Where it comes from


def test_stdin_is_json_lines_if_it_begins_with_a_brace(monkeypatch: pytest.MonkeyPatch) -> None:
    for start in (b"", b"\xef\xbb\xbf", b"\n \n  "):
        assert values(start + b'{"seed": 1}\n{"seed": 2}', None) == [{"seed": 1}, {"seed": 2}]
        assert values(start + b'a fox\n{"seed": 2}', None)[1] == {"prompt": '{"seed": 2}'}
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\na fox")))
    assert list(rows.read("-")) == [Found("stdin:2", {"prompt": "a fox"})]
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(BadInput, match="closed"):
        list(rows.read("-"))


def test_stdin_stays_open() -> None:
    stdin = io.BytesIO(b"a fox")
    list(rows.read("-", stdin))
    assert not stdin.closed


SUFFIXES = {
    ".txt": ("a fox\n", ":1"),
    ".TXT": ("a fox\n", ":1"),
    ".csv": ("prompt\na fox\n", ":2"),
    ".jsonl": ('{"prompt": "a fox"}\n', ":1"),
    ".ndjson": ('{"prompt": "a fox"}\n', ":1"),
    ".yaml": ("- a fox\n", ": rows[0]"),
    ".yml": ("- {prompt: a fox}\n", ": rows[0]"),
}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_suffix_says_the_kind(suffix: str, tmp_path: Path) -> None:
    text, where = SUFFIXES[suffix]
    path = tmp_path / f"my rows{suffix}"
    path.write_text(text)
    expected = [Found(f"my rows{suffix}{where}", {"prompt": "a fox"})]
    assert list(rows.read(str(path))) == expected
    assert next(rows.read(str(path), kind="txt")).where == f"my rows{suffix}:1"


def test_paths_are_relative_to_the_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {name: f"~/{name}/ü.png" for name in PATHS} | {"prompt": "a/b", "model": "a/b"}
    whole = {name: f"/{name}.png" for name in PATHS}
    text = "\n".join(map(json.dumps, (asked, whole, {"plan": {"image": "a.png"}, "image": ""})))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "rows.jsonl").write_text(text)
    monkeypatch.chdir(tmp_path)
    for folder in ("in", f"{tmp_path}/in"):
        moved = asked | {name: os.path.join(folder, asked[name]) for name in PATHS}
        found = [one.values for one in rows.read(f"{folder}/rows.jsonl") if isinstance(one, Found)]
        assert found == [moved, whole, {"plan": {"image": "a.png"}, "image": ""}]
    monkeypatch.chdir(tmp_path / "in")
    assert next(rows.read("rows.jsonl")) == Found("rows.jsonl:1", asked)
    parts = {"defaults": asked, "rows": [{"prompt": "a/b"}], "matrix": {"image": ["a", "/b"]}}
    (tmp_path / "in" / "rows.yaml").write_text(yaml.safe_dump(parts))
    monkeypatch.chdir(tmp_path)
    moved = asked | {name: os.path.join("in", asked[name]) for name in PATHS}
    found = [one.values for one in rows.read("in/rows.yaml") if isinstance(one, Found)]
    assert found == [moved, moved | {"image": "in/a"}, moved | {"image": "/b"}]


@pytest.mark.parametrize("kind", [None, *KINDS])
@pytest.mark.parametrize("content", [b"", b"\n", b"\xef\xbb\xbf", b"\r\n\n"])
def test_an_empty_input_is_refused(content: bytes, kind: str | None) -> None:
    with pytest.raises(BadInput, match="has no rows") as raised:
        list(rows.read("-", io.BytesIO(content), kind))
    one_line(str(raised.value))


EMPTY = {
    "txt": "# a comment\n",
    "csv": "prompt,seed\n",
    "yaml": "defaults: {seed: 1}\nrows: []\nzip:\n",
}


@pytest.mark.parametrize("kind", EMPTY)
def test_an_input_without_rows_is_refused(kind: str) -> None:
    with pytest.raises(BadInput, match="has no rows"):
        list(rows.read("-", io.BytesIO(EMPTY[kind].encode()), kind))


@pytest.mark.parametrize(
    ("source", "kind", "says"),
    [
        ("nowhere.txt", None, "No such file"),
        ("nowhere\n.txt", None, "No such file"),
        ("a\0b.txt", None, "null byte"),
        ("folder", None, "is a folder"),
        ("folder", "txt", "is a folder"),
        ("rows.docx", None, "suffix"),
        ("rows", None, "suffix"),
        ("rows.docx", "json", "'json' is unknown: give txt, csv, jsonl, yaml"),
    ],
)
def test_no_input(
    source: str, kind: str | None, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    for name in ("rows.docx", "rows"):
        Path(name).write_text("a fox")
    with pytest.raises(BadInput) as raised:
        rows.read(source, kind=kind)
    one_line(str(raised.value))
    assert says in str(raised.value)


def test_an_input_that_breaks_off() -> None:
    class Broken(io.BytesIO):
        def readline(self, size: int | None = -1) -> bytes:
            raise OSError(5, "Input/output error")

    with pytest.raises(BadInput, match="Input/output error"):
        list(rows.read("-", Broken(), "txt"))


def test_yaml_has_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(yaml_rows, "LARGEST", 5)
    assert values(b"- fox", "yaml") == [{"prompt": "fox"}]
    with pytest.raises(BadInput, match="jsonl"):
        list(rows.read("-", io.BytesIO(b"- foxy"), "yaml"))


@settings(max_examples=200)
@given(FRAGMENTS)
def test_both_parsers_of_yaml_say_the_same(content: bytes) -> None:
    """Where PyYAML has no part in C, its own parser is used: rows are the same."""
    with pytest.MonkeyPatch.context() as patch:
        with_c = judged(content, "yaml")
        patch.setattr(yaml_rows, "_LOADER", yaml.SafeLoader)
        without = judged(content, "yaml")
    if all(isinstance(one, Found) for one in (*with_c, *without)):
        assert with_c == without
