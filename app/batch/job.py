"""A job: its rows, checked, each with its id, seed, hash and file, before any weights are read.

What rows have in common besides their words and seeds is a `Form`. Rows mostly share a few of
them, so that thousands of rows cost no more than their words: a form is checked once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

from accel.errors import AccelError, BadInput
from accel.plan import Plan
from app import metadata, models
from app.batch import naming
from app.batch.rows import Found, Problem
from app.call import picture_size
from app.exits import say
from app.files import slug
from app.plans import chosen
from app.request import Batch, Choice, Preset, Request, make

SHOWN = 20
"""Problems of an input that are named; of the others, the number."""

PLANNING = ("plan", "preset", "goal", "set")
WORDS = ("prompt", "negative", "seed", "id")


@dataclass(frozen=True, slots=True)
class Form:
    """What some rows have in common: all but words and seed.

    Attributes:
        request: With no prompt, no seed, and an empty negative prompt where the rows have one.
        plan: The methods.
        model: SHA-256 of the model's files.
        group: Digest of what rows of one call have in common; pictures may differ in it.
        digest: Of all of it: of what a picture depends on but words and seed.
    """

    request: Request
    plan: Plan
    model: str
    group: str
    digest: str


@dataclass(frozen=True, slots=True)
class Row:
    """A row that can be made.

    Attributes:
        index: Its place in the input, from 0.
        where: The same for a person: file and line.
        id: Unique within the job.
        form: What it shares with others.
        prompt: What to draw.
        negative: The negative prompt.
        seed: The noise.
        hash: Of all that the picture depends on but the machine.
        file: Its name below the output folder; empty until the type of file is known.
    """

    index: int
    where: str
    id: str
    form: Form
    prompt: str
    negative: str | None
    seed: int
    hash: str
    file: str = ""

    @property
    def request(self) -> Request:
        """All that is asked for."""
        return replace(
            self.form.request, prompt=self.prompt, negative=self.negative, seed=self.seed
        )


@dataclass(frozen=True)
class Ways:
    """What holds for all rows of a job.

    Attributes:
        options: Of the job.
        defaults: Options of a picture that were typed, by name; a row's own come first.
        choice: The plan of rows that name none.
        seed: That the others follow from.
    """

    options: Batch
    defaults: Mapping[str, Any]
    choice: Choice
    seed: int


def rows(found: Iterable[Found | Problem], ways: Ways) -> tuple[list[Row], list[Problem]]:
    """Check all rows of an input.

    Args:
        found: As the input has them.
        ways: What holds for all of them.

    Returns:
        The rows that are right, and what is wrong with the others.
    """
    checker, made, problems = _Checker(ways), list[Row](), list[Problem]()
    for one in found:
        if isinstance(one, Problem):
            problems.append(one)
            continue
        try:
            made.append(checker.row(one))
        except AccelError as error:
            problems.append(Problem(one.where, str(error)))
    return made, problems


def refuse(problems: Sequence[Problem]) -> None:
    """Raise what is wrong with an input, if anything is.

    Raises:
        BadInput: How many there are; the first ones are said before, a line each.
    """
    for one in problems[:SHOWN]:
        say(f"{one.where}: {one.text}")
    if problems:
        more = len(problems) - SHOWN
        others = f" ({more} more than are named here)" if more > 0 else ""
        raise BadInput(
            f"{len(problems)} row{'s' * (len(problems) > 1)} cannot be made{others}: correct the "
            "input. Nothing was run."
        )


@dataclass
class _Checker:
    """Makes rows of what was found; knows what came before."""

    ways: Ways
    _forms: dict[str, Form | AccelError] = field(default_factory=dict)
    _ids: dict[str, str] = field(default_factory=dict)
    _seen: dict[str, int] = field(default_factory=dict)
    _prints: dict[tuple[str, str | None], str] = field(default_factory=dict)
    _count: int = 0

    def row(self, found: Found) -> Row:
        """A row.

        Raises:
            AccelError: What is wrong with it.
        """
        values = {**self.ways.defaults, **found.values}
        words = {name: values.pop(name, None) for name in WORDS}
        form = self._form(values, words["negative"] is not None)
        asked = make(
            Request,
            {name: words[name] for name in WORDS[:3] if words[name] is not None},
            where="",
        )
        id = self._id(words["id"], asked, found.where)
        index, self._count = self._count, self._count + 1
        own = found.values.get("seed") is not None
        seed = (
            asked.seed
            if own and asked.seed is not None
            else naming.seed(self.ways.options.seeds, self.ways.seed, index, id)
        )
        text = "\0".join((form.digest, asked.prompt, asked.negative or "", str(seed)))
        return Row(
            index,
            found.where,
            id,
            form,
            asked.prompt,
            asked.negative,
            seed,
            hashlib.sha256(text.encode()).hexdigest(),
        )

    def _id(self, given: Any, asked: Request, where: str) -> str:
        if given is None:
            shown = naming.identity(asked.prompt, asked.negative, 0)
            occurrence = self._seen.get(shown, 0)
            self._seen[shown] = occurrence + 1
            id = naming.identity(asked.prompt, asked.negative, occurrence)
        else:
            id = str(given)
            if not 0 < len(id) <= naming.LONGEST_ID or not id.isprintable():
                raise BadInput(
                    f"id {id[:40]!r}: give 1 to {naming.LONGEST_ID} characters that can be printed."
                )
        if id in self._ids:
            raise BadInput(f"id {id!r} is that of {self._ids[id]} already: ids have to differ.")
        self._ids[id] = where
        return id

    def _form(self, values: dict[str, Any], negative: bool) -> Form:
        key = json.dumps([values, negative], sort_keys=True, default=str)
        known = self._forms.get(key)
        if known is None:
            try:
                known = self._checked(values, negative)
            except AccelError as error:
                known = error
            self._forms[key] = known
        if isinstance(known, AccelError):
            raise known
        return known

    def _checked(self, values: dict[str, Any], negative: bool) -> Form:
        planning = {name: values.pop(name) for name in PLANNING if name in values}
        request = make(Request, {**values, "negative": "" if negative else None}, where="")
        plan = self._plan(planning)
        sizes = [picture_size(path) for path in request.pictures.values()]
        inputs = metadata.digests(request)
        source = request.source
        model = self._print(source.model, source.controlnet, request)
        shared = {
            "request": metadata.words(request.to_dict()),
            "model": model,
            "device": source.device,
            "dtype": source.dtype,
            "lora": inputs.get("lora"),
            "plan": plan.to_dict(),
        }
        group = _digest({**shared, "pictures": sorted(request.pictures), "sizes": sizes})
        return Form(request, plan, model, group, _digest({**shared, "inputs": inputs}))

    def _print(self, name: str, controlnet: str | None, request: Request) -> str:
        key = (name, controlnet)
        if key not in self._prints:
            folders = [models.check(request.source)]
            if controlnet is not None:
                folders.append(models.controlnet_folder(request.source))
            self._prints[key] = models.fingerprint(folders)
        return self._prints[key]

    def _plan(self, planning: dict[str, Any]) -> Plan:
        """The row's own plan, else the job's; with the row's own changes."""
        base, choice = planning.get("plan"), self.ways.choice
        preset, goal = planning.get("preset"), planning.get("goal")
        if sum(one is not None for one in (base, preset, goal)) > 1:
            raise BadInput(
                "plan, preset and goal: more than one of them is given; choose one, and change it "
                "by set."
            )
        changes = _changes(planning.get("set"))
        if goal is not None:
            goals = [goal] if isinstance(goal, str) else goal
            if not isinstance(goals, list) or not all(isinstance(one, str) for one in goals):
                raise BadInput("goal: give such as ssim>=0.95, or a list of such texts.")
            return chosen(Choice(goal=goals, tuned=choice.tuned, changes=changes))
        if isinstance(base, dict):
            return chosen(Choice(changes=changes), Plan.from_dict({"plan": 1, **base}).to_dict())
        if base is not None:
            return chosen(Choice(plan=Path(str(base)), changes=changes))
        if preset is not None:
            if preset not in get_args(Preset):
                raise BadInput(f"preset {preset!r}: choose {', '.join(get_args(Preset))}.")
            return chosen(Choice(preset=preset, changes=changes))
        return chosen(replace(choice, changes=[*choice.changes, *changes]))


def _changes(given: Any) -> list[str]:
    if given is None:
        return []
    if isinstance(given, str):
        given = given.replace(";", "\n").splitlines()
    if not isinstance(given, list) or not all(isinstance(one, str) for one in given):
        raise BadInput("set: give METHOD.FIELD=VALUE, or a list of such texts.")
    return [one.strip() for one in given if one.strip()]


def _digest(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def named(made: Sequence[Row], suffixes: Mapping[str, str], template: str) -> list[Row]:
    """The rows with the names of their files.

    Args:
        made: The rows.
        suffixes: Type of file by the group of a row.
        template: Of names.

    Raises:
        BadInput: If two rows would have one file.
    """
    taken: dict[str, Row] = {}
    found, problems = [], []
    for row in made:
        request = row.form.request
        values = {
            "index": row.index,
            "id": row.id,
            "slug": slug(row.prompt),
            "seed": row.seed,
            "model": Path(request.model).name,
            **{
                name: getattr(request, name) or 0 for name in ("width", "height", "steps", "frames")
            },
        }
        name = naming.filled(template, values, suffixes[row.form.group])
        other = taken.setdefault(name.casefold(), row)
        if other is not row:
            problems.append(
                Problem(
                    row.where,
                    f"its file {name} is that of {other.where}: add {{index}} or {{id}} to --name.",
                )
            )
        found.append(replace(row, file=name))
    refuse(problems)
    return found
