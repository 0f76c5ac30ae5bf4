"""A plan: a frozen set of methods, the same in Python, TOML, JSON, metadata and the CLI."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Self, TypeVar, cast, get_args

from pydantic import BaseModel, ValidationError

from accel.attach import LAYERS, Accelerator, Run
from accel.errors import Conflict, PlanError, UnknownMethod
from accel.guard import Guard
from accel.tuned import Tuned, digest_of

GROUP = "diffusers_accel.methods"
FORMAT = 1
GUARD, TUNED = "guard", "tuned"
RESERVED = ("plan", GUARD, TUNED)
"""Keys of a document that are no family of methods."""
Preset = Literal["exact", "balanced", "fast", "fastest"]
PRESETS: tuple[Preset, ...] = get_args(Preset)
M = TypeVar("M", bound=BaseModel)


class Plan:
    """A set of methods. Hashable; the order in which they are written does not matter.

    Args:
        *methods: At most one of each kind.
        guard: A budget of error over all of them, or none.
        tuned: What `accel.tune` or `accel.prove` has found out about these methods: the plan then
            knows which pipeline it is for, and what it promises there.

    Raises:
        Conflict: If a method is there twice.
        PlanError: If something is no method, the guard is none, or the evidence is of another plan.
    """

    def __init__(
        self, *methods: Accelerator, guard: Guard | None = None, tuned: Tuned | None = None
    ) -> None:
        for method in methods:
            if not isinstance(method, Accelerator):
                raise PlanError(
                    f"A plan holds methods, not {type(method).__name__}: write for example "
                    "Plan(accel.cache.EasyCache(threshold=0.05))."
                )
        ordered = sorted(methods, key=lambda method: (LAYERS.index(method.layer), method.name))
        for first, second in pairwise(ordered):
            if first.name == second.name:
                raise Conflict(f"{first.name} is in the plan twice: keep one of the two.")
        if not isinstance(guard, Guard | None):
            raise PlanError(
                f"guard is a {type(guard).__name__}: write for example accel.Guard(max_error=0.05)."
            )
        self._methods = tuple(ordered)
        self._guard = guard
        self._tuned = tuned
        if tuned is not None:
            tuned.check_methods(self.digest)

    @property
    def guard(self) -> Guard | None:
        """The budget of error, where there is one."""
        return self._guard

    @property
    def tuned(self) -> Tuned | None:
        """The evidence of a plan that was tuned."""
        return self._tuned

    @property
    def digest(self) -> str:
        """Of the methods, the guard, and all their fields."""
        return digest_of(self._tables())

    @property
    def methods(self) -> tuple[Accelerator, ...]:
        """The methods, outermost layer first."""
        return self._methods

    def __iter__(self) -> Iterator[Accelerator]:
        return iter(self._methods)

    def __len__(self) -> int:
        return len(self._methods)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self._parts == other._parts

    def __hash__(self) -> int:
        return hash(self._parts)

    def __repr__(self) -> str:
        named = {"guard": self._guard, "tuned": self._tuned}
        more = [f"{name}={value!r}" for name, value in named.items() if value is not None]
        return f"Plan({', '.join([*map(repr, self._methods), *more])})"

    @property
    def _parts(self) -> tuple[Any, ...]:
        return self._methods, self._guard, self._tuned

    def attach(self, pipe: Any) -> Run:
        """Put the plan on a stock diffusers pipeline.

        Returns:
            The run: a context manager that takes the plan off at its end, and the report.

        Raises:
            Conflict: If two methods cannot go together, or the pipeline already carries a plan.
            UnsupportedModel: If a method cannot serve this pipeline, or the plan was tuned for
                another one. Nothing is left behind.
        """
        if self._tuned is None:
            return Run(self._methods, pipe, self._guard)
        self._tuned.check(pipe)
        run = Run(self._methods, pipe, self._guard)
        self._tuned.watch(run)
        return run

    def beside(self, folder: Path) -> Plan:
        """The plan with the relative paths among its fields taken from a folder.

        For a plan that was read from a file there, which refers to files beside it.
        """
        guard = self._guard and self._guard.beside(folder)
        there = Plan(*(_beside(method, folder) for method in self._methods), guard=guard)
        return there if self._tuned is None else there.proven(self._tuned)

    def proven(self, tuned: Tuned) -> Plan:
        """The plan with evidence of it."""
        found = tuned.model_copy(update={"methods": self.digest})
        return Plan(*self._methods, guard=self._guard, tuned=found)

    def to_dict(self) -> dict[str, Any]:
        """``{"plan": 1, family: {method: fields}}``, every field written out.

        The guard is the table ``guard``, the evidence of a tuned plan the table ``tuned``.
        """
        document = {"plan": FORMAT, **self._tables()}
        if self._tuned is not None:
            document[TUNED] = self._tuned.model_dump(mode="json", exclude_none=True)
        return document

    def _tables(self) -> dict[str, Any]:
        tables: dict[str, Any] = {}
        for method in self._methods:
            family, kind = method.name.split(".")
            tables.setdefault(family, {})[kind] = method.model_dump(mode="json")
        if self._guard is not None:
            tables[GUARD] = self._guard.model_dump(mode="json")
        return tables

    def to_toml(self) -> str:
        """The plan as TOML; ``from_toml`` gives an equal plan."""
        import tomli_w

        return tomli_w.dumps(_without_none(self.to_dict()))

    def to_json(self) -> str:
        """The plan as JSON; ``from_json`` gives an equal plan."""
        import json

        return json.dumps(self.to_dict())

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Self:
        """The plan that ``to_dict`` wrote.

        Raises:
            PlanError: If the format is another, or a field is unknown or out of range.
            UnknownMethod: If no installed package offers a method of that name.
        """
        version = document.get("plan", FORMAT)
        if version != FORMAT:
            raise PlanError(
                f"This plan has format {version!r}; this version reads format {FORMAT}. Install "
                "the version of diffusers-accel that wrote it."
            )
        methods = []
        for family, kinds in document.items():
            if family in RESERVED:
                continue
            if not isinstance(kinds, Mapping):
                raise PlanError(
                    f"'{family} = {kinds!r}' is no method: a plan is made of tables such as "
                    "[cache.EasyCache]."
                )
            if not kinds:
                _refuse_unknown_family(family)
            methods += [build(f"{family}.{kind}", fields) for kind, fields in kinds.items()]
        guard, tuned = guarding(document.get(GUARD)), evidence(document.get(TUNED))
        return cls(*methods, guard=guard, tuned=tuned)

    @classmethod
    def from_toml(cls, text: str) -> Self:
        """The plan that ``to_toml`` wrote; see ``from_dict`` for errors."""
        try:
            return cls.from_dict(tomllib.loads(text))
        except tomllib.TOMLDecodeError as error:
            raise PlanError(
                f"The plan is no TOML ({error}). `accel methods --toml` prints one to start from."
            ) from error

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The plan that ``to_json`` wrote; see ``from_dict`` for errors."""
        import json

        try:
            document = json.loads(text)
        except json.JSONDecodeError as error:
            raise PlanError(f"The plan is no JSON ({error}).") from error
        if not isinstance(document, dict):
            raise PlanError(f"The plan is JSON, but a {type(document).__name__}, not an object.")
        return cls.from_dict(document)

    @classmethod
    def preset(cls, name: str) -> Self:
        """One of the presets ``exact``, ``balanced``, ``fast``, ``fastest``.

        The last three held an SSIM to the stock picture of 0.95, 0.9 and 0.8 at 95 % of held-out
        captions of each bundled model, one by one (``benchmarks/deriving.py``). What they do to
        another pipeline is measured by ``accel compare``.

        Raises:
            PlanError: If there is no such preset.
        """
        from accel.bundled import asset

        if name not in PRESETS:
            raise PlanError(f"There is no preset '{name}': choose one of {', '.join(PRESETS)}.")
        return cls.from_toml(asset(f"plans/{name}.toml").read_text())


@cache
def entry_points_by_name() -> dict[str, EntryPoint]:
    """The entry points of all methods, ours and those of other packages."""
    found = entry_points(group=GROUP)
    return {point.name: point for point in sorted(found, key=lambda point: point.name)}


def methods() -> dict[str, type[Accelerator]]:
    """Every installed method by name. Imports the method files, but not torch."""
    return {name: method_class(name) for name in entry_points_by_name()}


def method_class(name: str) -> type[Accelerator]:
    """The class of a method.

    Raises:
        UnknownMethod: If no installed package offers it.
    """
    point = entry_points_by_name().get(name)
    if point is None:
        from difflib import get_close_matches

        known = list(entry_points_by_name())
        close = get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}."
        raise UnknownMethod(f"There is no method '{name}': {hint}")
    return cast("type[Accelerator]", point.load())


def build(name: str, fields: Any) -> Accelerator:
    """A method from its name and fields.

    Raises:
        UnknownMethod: If no installed package offers it.
        PlanError: If a field is unknown or out of range.
    """
    return _validated(name, method_class(name), fields, f"Run `accel methods {name}`.")


def guarding(fields: Any) -> Guard | None:
    """A guard from its fields; none from ``None``.

    Raises:
        PlanError: If a field is unknown or out of range.
    """
    return None if fields is None else _validated(GUARD, Guard, fields, "See accel.Guard.")


def _validated(name: str, kind: type[M], fields: Any, way_out: str) -> M:
    if not isinstance(fields, Mapping):
        raise PlanError(f"{name}: expected a table of fields, found {fields!r}.")
    try:
        return kind.model_validate(dict(fields))
    except ValidationError as error:
        raise PlanError(_explain(name, kind, error, way_out)) from error


def _explain(name: str, kind: type[BaseModel], error: ValidationError, way_out: str) -> str:
    first = error.errors()[0]
    field = ".".join(map(str, first["loc"]))
    known = ", ".join(kind.model_fields)
    if first["type"] == "extra_forbidden":
        return f"{name} has no field '{field}': it has {known}."
    found = f"{name}.{field} = {first['input']!r}" if field else name
    needed = first["msg"].removeprefix("Value error, ").rstrip(".")
    return f"{found}: {needed}. {way_out}"


def _refuse_unknown_family(family: str) -> None:
    """An empty table asks for nothing, but its name must be that of some methods."""
    known = sorted({name.partition(".")[0] for name in entry_points_by_name()})
    if family not in known:
        raise PlanError(
            f"There is no family of methods '{family}': known are {', '.join(known)}. A method of "
            "a family is a table inside of it, {family: {method: fields}}."
        )


def evidence(table: Any) -> Tuned | None:
    """The evidence of a tuned plan from its table; none from ``None``.

    Raises:
        PlanError: If it is none.
    """
    if table is None:
        return None
    try:
        return Tuned.model_validate(table)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, ("tuned", *first["loc"])))
        raise PlanError(
            f"{where}: {first['msg'].rstrip('.')}. Remove the table [tuned], or tune again "
            "(`accel tune`)."
        ) from error


def _beside(method: Accelerator, folder: Path) -> Accelerator:
    paths = {name: value for name, value in method if isinstance(value, Path)}
    return method.model_copy(update={name: folder / path for name, path in paths.items()})


def _without_none(document: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_none(value) if isinstance(value, dict) else value
        for key, value in document.items()
        if value is not None
    }
