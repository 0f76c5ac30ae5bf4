"""Rows: ids, seeds, hashes, names and groups depend on what they should, and on nothing else."""

import json
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise, permutations
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accel.errors import BadInput
from app.batch import job, naming
from app.batch.grouping import calls, groups
from app.batch.job import Ways
from app.batch.rows import Found, Problem
from app.request import Batch, Choice

FOX = {"prompt": "a fox"}
WORDS = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=8)
ROWS = st.lists(
    st.fixed_dictionaries(
        {"prompt": WORDS},
        optional={
            "negative": WORDS,
            "steps": st.integers(1, 3),
            "seed": st.integers(0, 5),
            "preset": st.sampled_from(["exact", "fast"]),
        },
    ),
    min_size=1,
    max_size=8,
)


def checked(*values, seed=0, **options):
    found = [
        one if isinstance(one, Problem) else Found(f"rows:{place}", one)
        for place, one in enumerate(values)
    ]
    return job.rows(found, Ways(Batch(**options), {}, Choice(), seed))


def rows(*values, **options):
    made, problems = checked(*values, **options)
    assert not problems, problems
    return made


def problem(*values, **options):
    _, problems = checked(*values, **options)
    return problems[0].text


@settings(max_examples=60, deadline=None)
@given(ROWS, st.randoms())
def test_ids_are_unique_and_a_row_is_the_same_wherever_it_stands(values, random):
    """Of rows that show the same, the order among them decides: that is kept here."""
    made = rows(*values)
    assert len({row.id for row in made}) == len(made)
    unlike = {(v["prompt"], v.get("negative")): v for v in values}
    first = {row.id: row.hash for row in rows(*unlike.values())}
    shuffled = list(unlike.values())
    random.shuffle(shuffled)
    assert {row.id: row.hash for row in rows(*shuffled)} == first


@settings(max_examples=60, deadline=None)
@given(ROWS)
def test_a_row_of_its_own_id_takes_its_seed_from_it(values):
    named = [value | {"id": f"n{place}"} for place, value in enumerate(values)]
    made = rows(*named)
    for row, value in zip(made, named, strict=True):
        assert row.seed == value.get("seed", naming.seed("random", 0, 99, row.id))


def test_seeds():
    fixed, counted, drawn = (rows(*[FOX] * 4, seed=7, seeds=kind) for kind in
                             ("fixed", "increment", "random"))  # fmt: skip
    assert [row.seed for row in fixed] == [7] * 4
    assert [row.seed for row in counted] == [7, 8, 9, 10]
    assert len({row.seed for row in drawn}) == 4
    assert [row.seed for row in rows(*[FOX] * 4, seed=7)] == [row.seed for row in drawn]
    assert [row.seed for row in rows(*[FOX] * 4, seed=8)] != [row.seed for row in drawn]


CHANGES = [
    {"prompt": "an owl"},
    {"negative": "fog"},
    {"negative": ""},
    {"seed": 5},
    {"steps": 5},
    {"width": 64},
    {"guidance": 2.0},
    {"model": "scenes-unet"},
    {"dtype": "bfloat16"},
    {"preset": "fast"},
    {"plan": {"cache": {"EasyCache": {"threshold": 0.1}}}},
    {"set": "cache.EasyCache.threshold=0.17"},
]


def test_the_hash_knows_all_that_a_picture_depends_on():
    found = [rows(FOX | {"seed": 1} | change)[0].hash for change in ({}, *CHANGES)]
    assert len(set(found)) == len(found)


def test_the_hash_does_not_know_where_a_model_or_a_picture_lies(tmp_path):
    from PIL import Image

    from accel.bundled import folder_of

    here, there = tmp_path / "here.png", tmp_path / "there.png"
    for path in (here, there):
        Image.new("RGB", (64, 64), "red").save(path)
    one, other = rows(FOX | {"image": str(here), "id": "a"}, FOX | {"image": str(there), "id": "b"})
    seeded = [replace(row, seed=0) for row in (one, other)]
    assert seeded[0].form.digest == seeded[1].form.digest
    Image.new("RGB", (64, 64), "blue").save(there)
    assert rows(FOX | {"image": str(there)})[0].form.digest != one.form.digest
    named = rows(FOX | {"model": str(folder_of("scenes-flux"))})[0]
    assert named.hash == rows(FOX)[0].hash


def test_rows_of_one_call_differ_in_words_seeds_and_contents_of_pictures_alone(tmp_path):
    from PIL import Image

    paths = [tmp_path / f"{colour}.png" for colour in ("red", "blue")]
    for path in paths:
        Image.new("RGB", (64, 64), path.stem).save(path)
    tall = tmp_path / "tall.png"
    Image.new("RGB", (64, 128)).save(tall)

    def group(change):
        return rows(FOX | change)[0].form.group

    assert group({"prompt": "x", "seed": 3}) == group({})
    assert group({"negative": "a"}) == group({"negative": "b"}) != group({})
    pictures = [group({"image": str(path)}) for path in (*paths, tall)]
    assert pictures[0] == pictures[1] != pictures[2]
    assert group({"steps": 3}) != group({})
    assert group({"preset": "fast"}) != group({"preset": "exact"})


@settings(max_examples=60, deadline=None)
@given(ROWS, st.integers(1, 5))
def test_calls_part_the_rows_and_depend_on_nothing_but_rows_and_sizes(values, size):
    made = rows(*values)
    sizes = dict.fromkeys(groups(made), size)
    found = calls(made, sizes)
    assert sorted(row.index for call in found for row in call.rows) == list(range(len(made)))
    assert all(len(call.rows) <= size for call in found)
    assert all(len({row.form.group for row in call.rows}) == 1 for call in found)
    assert [call.ids for call in calls(rows(*values), sizes)] == [call.ids for call in found]


def test_groups_of_a_model_stand_together():
    values = [FOX | {"model": name, "steps": steps} for steps in (1, 2)
              for name in ("scenes-flux", "scenes-unet")]  # fmt: skip
    for order in permutations(values):
        models = [members[0].form.request.model for members in groups(rows(*order)).values()]
        assert models == sorted(models, key=models.index)
        assert sum(a != b for a, b in pairwise(models)) == 1


@settings(max_examples=200, deadline=None)
@given(WORDS, st.text(max_size=300), st.integers(0, 10**7))
def test_no_id_and_no_prompt_leads_out_of_the_folder(prompt, id, index):
    values = {"index": index, "id": id, "slug": prompt, "seed": 1, "model": "../m", "width": 1,
              "height": 1, "steps": 1, "frames": 1}  # fmt: skip
    for template in ("{id}", "{slug}/{id}", "{model}/{index:05d}", "x{id}"):
        name = naming.filled(template, values, ".png")
        path = (Path("/out") / name).resolve()
        assert path.is_relative_to("/out") and path != Path("/out")
        assert path.suffix == ".png"
        for part in name.split("/"):
            assert part and not part.startswith(".") and len(part.encode()) <= naming.LONGEST


@pytest.mark.parametrize(
    "template", ["../{id}", "/{id}", "a/../{id}", "{id}/", "", "{prompt}", "{id", "{}", "{0}",
                 "{id.x}", "{index:05q}", "a\\b"],
)  # fmt: skip
def test_templates_that_cannot_be_filled_or_lead_out_are_refused(template):
    with pytest.raises(BadInput, match="--name"):
        naming.check_template(template)


def test_two_rows_of_one_file_are_refused_by_name(capsys):
    made = rows(FOX, FOX)
    with pytest.raises(BadInput, match="1 row cannot be made"):
        job.named(made, dict.fromkeys(groups(made), ".png"), "{slug}")
    assert "rows:1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"prompt": "x", "steps": "many"}, "steps 'many'"),
        ({"prompt": "x", "steps": 0}, "steps 0"),
        ({"prompt": "x", "model": "no-such"}, "no-such"),
        ({"prompt": "x", "image": "no-such.png"}, "no-such.png"),
        ({"prompt": "x", "preset": "warp"}, "preset 'warp'"),
        ({"prompt": "x", "preset": "fast", "plan": "p.toml"}, "more than one of them is given"),
        ({"prompt": "x", "preset": "fast", "goal": "ssim>=0.9"}, "more than one of them is given"),
        ({"prompt": "x", "goal": "ssim>=0.9"}, "by --tuned"),
        ({"prompt": "x", "goal": 3}, "a list of such texts"),
        ({"prompt": "x", "plan": {"cache": {"NoSuch": {}}}}, "NoSuch"),
        ({"prompt": "x", "set": "cache.EasyCache.threshold=9e9x"}, "threshold"),
        ({"prompt": "x", "id": ""}, "id ''"),
        ({"prompt": "x", "id": "a\nb"}, "can be printed"),
        ({"prompt": "a\0b"}, "zero character"),
        ({"prompt": 5}, "prompt 5"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_row_is_said_where_it_stands(values, told):
    assert told in problem(values)


def test_ids_that_come_twice_are_refused_with_the_first_ones_place():
    _, problems = checked({"prompt": "x", "id": "a"}, {"prompt": "y", "id": "a"})
    assert [one.where for one in problems] == ["rows:1"]
    assert "rows:0" in problems[0].text


def test_all_problems_are_counted_and_the_first_are_named(capsys):
    _, problems = checked(*[{"prompt": "x", "steps": 0}] * 25, Problem("rows:9", "torn"))
    assert len(problems) == 26
    with pytest.raises(BadInput, match=r"26 rows cannot be made \(6 more"):
        job.refuse(problems)
    assert len(capsys.readouterr().err.splitlines()) == job.SHOWN


def test_a_hundred_thousand_rows_stay_below_300_mib(tmp_path):
    """Read, checked and grouped; the process that does it never imports torch."""
    source = tmp_path / "rows.jsonl"
    with source.open("w") as file:
        for index in range(100_000):
            file.write(
                json.dumps({"prompt": f"a fox number {index}", "steps": 4 + index % 3}) + "\n"
            )
    code = (
        "import re, sys\n"
        "from app.batch import job, rows, grouping\n"
        "from app.request import Batch, Choice\n"
        "ways = job.Ways(Batch(), {}, Choice(), 0)\n"
        f"made, problems = job.rows(rows.read({str(source)!r}), ways)\n"
        "groups = grouping.groups(made)\n"
        "named = job.named(made, dict.fromkeys(groups, '.png'), '{index:05d}_{slug}_{seed}')\n"
        "calls = grouping.calls(named, dict.fromkeys(groups, 8))\n"
        "assert not problems and len(groups) == 3 and len(calls) == 12501, len(calls)\n"
        "assert 'torch' not in sys.modules\n"
        "peak = int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
        "assert peak < 300 * 1024, peak\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=250)
