"""Law 7: round trip. A plan written down and read again is the same plan."""

import json
import math
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Literal, Union, get_args, get_origin

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError
from roster import ROSTER

from accel import Plan, cache, guidance

TRIPS = {
    "toml": lambda plan: Plan.from_toml(plan.to_toml()),
    "json": lambda plan: Plan.from_json(plan.to_json()),
    "dict": lambda plan: Plan.from_dict(plan.to_dict()),
    "json of the dict": lambda plan: Plan.from_dict(json.loads(json.dumps(plan.to_dict()))),
    "toml of the json": lambda plan: Plan.from_toml(Plan.from_json(plan.to_json()).to_toml()),
}


def values(kind, metadata=()):
    """Values of a type, within the range that pydantic's metadata give."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        known = [more for meta in inner[1:] for more in (meta, *getattr(meta, "metadata", ()))]
        return values(inner[0], known)
    makers = {
        Literal: lambda: st.sampled_from(inner),
        Union: lambda: st.one_of(*map(values, inner)),
        UnionType: lambda: st.one_of(*map(values, inner)),
        NoneType: st.none,
        Path: lambda: st.text("ab/", min_size=1, max_size=4).map(Path),
        tuple: lambda: tuples(inner),
        bool: st.booleans,
        str: lambda: st.text("01", min_size=4, max_size=4),  # a line of a table
    }
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return st.fixed_dictionaries(fields_of(kind))  # checked where it is put into a method
    maker = makers.get(origin or kind)
    return maker() if maker else numbers(kind, metadata)


def fields_of(kind):
    return {
        name: values(info.annotation, info.metadata) for name, info in kind.model_fields.items()
    }


def tuples(inner):
    if inner[-1] is not Ellipsis:
        return st.tuples(*map(values, inner))
    listed = st.lists(values(inner[0]), max_size=3, unique=inner[0] is not str)
    return listed.map(lambda found: tuple(sorted(found)))


def numbers(kind, metadata):
    bounds = {key: value for meta in metadata for key, value in vars_of(meta).items()}
    low, high = bounds.get("ge", bounds.get("gt")), bounds.get("le", bounds.get("lt"))
    if kind is int:
        return st.integers(low, high)
    assert kind is float, f"say in {__name__} how to draw a {kind}"
    return st.floats(
        low, high, exclude_min="gt" in bounds, exclude_max="lt" in bounds, allow_nan=False
    )


def vars_of(meta):
    return {name: getattr(meta, name) for name in ("ge", "gt", "le", "lt") if hasattr(meta, name)}


@st.composite
def methods(draw, kind):
    """A method with any legal fields."""
    fields = draw(st.fixed_dictionaries(fields_of(kind)))
    while True:
        try:
            return kind(**fields)
        except ValidationError:  # fields that do not go together: leave some out
            assume(fields)
            del fields[draw(st.sampled_from(sorted(fields)))]


@st.composite
def plans(draw):
    """Any plan."""
    kinds = [type(row.active) for row in ROSTER.values()]
    return Plan(
        *(draw(methods(kind)) for kind in draw(st.lists(st.sampled_from(kinds), unique=True)))
    )


@pytest.mark.parametrize("trip", TRIPS.values(), ids=TRIPS)
@settings(max_examples=60)
@given(plan=plans())
def test_a_plan_survives_the_trip(trip, plan):
    back = trip(plan)
    assert back == plan
    assert hash(back) == hash(plan)
    assert repr(back) == repr(plan)


@settings(max_examples=60)
@given(plan=plans())
@example(plan=Plan(cache.EasyCache(threshold=math.inf), guidance.Interval(high=math.inf)))
def test_what_is_written_is_json(plan):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    json.loads(plan.to_json(), parse_constant=refuse)
    json.dumps(plan.to_dict(), allow_nan=False)


@pytest.mark.parametrize("row", ROSTER.values(), ids=ROSTER)
def test_what_is_no_number_is_refused(row):
    """A plan with it would equal no plan, not even itself."""
    kind, fields = type(row.active), row.active.model_dump()
    for name, info in kind.model_fields.items():
        if info.annotation is float:
            with pytest.raises(ValidationError, match=name):
                kind(**fields | {name: math.nan})


@settings(max_examples=60)
@given(plan=plans(), data=st.data())
def test_order_does_not_matter(plan, data):
    shuffled = data.draw(st.permutations(plan.methods))
    assert Plan(*shuffled) == plan
    assert hash(Plan(*shuffled)) == hash(plan)
    assert Plan(*shuffled).to_toml() == plan.to_toml()


@pytest.mark.parametrize("row", ROSTER.values(), ids=ROSTER)
def test_every_form_of_the_roster_survives(row):
    for method in (row.active, *row.variants, row.active.off()):
        if method is not None:
            assert all(trip(Plan(method)) == Plan(method) for trip in TRIPS.values())
