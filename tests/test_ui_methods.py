"""The page of methods: everything that is known of each, found by any of its words."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pages import HOSTILE, Memory, Reader, drawn, request, same_shape

from accel.plan import methods as installed
from app.listing import described
from app.ui import methods

KNOWN = methods.all_methods()
NAMES = [method["name"] for method in KNOWN]


def test_every_installed_method_is_there_once():
    assert sorted(NAMES) == sorted(installed())
    html = methods.listed("")
    assert Reader(html).tags.count("section") == len(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_method_is_found_by_its_name_in_any_case(name):
    for typed in (name, name.upper(), f"  {name.lower()} "):
        assert name in [method["name"] for method in methods.found(typed, KNOWN)]


@given(st.lists(st.sampled_from(["cache", "step", "token", "2507.02860", "zzz", "warmup"])))
def test_more_words_find_less_and_all_of_them_occur(typed):
    before = KNOWN
    for count in range(len(typed) + 1):
        found = methods.found(" ".join(typed[:count]), KNOWN)
        assert all(method in before for method in found)
        before = found
    for method in before:
        assert all(word in str(described(installed()[method["name"]])).lower() for word in typed)


@settings(max_examples=30)
@given(st.text())
def test_any_search_gives_a_page(typed):
    shown = Reader(methods.listed(typed))
    assert shown.tags.count("section") == len(methods.found(typed, KNOWN))


@pytest.mark.parametrize("name", NAMES)
def test_a_method_says_what_it_is(name):
    text = Reader(methods.listed(name)).text
    method = next(one for one in KNOWN if one["name"] == name)
    for told in (method["summary"], method["supports"], method["source"], method["layer"]):
        assert told in text
    for field, values in method["fields"].items():
        assert field in text and values["range"] in text and values["description"] in text


@settings(max_examples=12)
@given(st.sets(st.sampled_from(NAMES)))
def test_what_does_not_fit_says_why(unfit):
    fits = {name: f"because of {name}" if name in unfit else None for name in NAMES}
    shown = Reader(methods.listed("", "scenes-flux", fits))
    for name in NAMES:
        assert (f"because of {name}" in shown.text) == any(name in other for other in unfit)
    classes = " ".join(shown.values("class")).split()
    assert classes.count("accel-unfit") == len(unfit)
    assert classes.count("accel-fits") == len(NAMES) - len(unfit)


def test_without_a_model_nothing_is_said_of_fitting():
    html = methods.listed("")
    assert "accel-fits" not in html and "accel-unfit" not in html


@settings(max_examples=50)
@given(st.text(min_size=1) | st.just(HOSTILE))
def test_neither_reason_nor_model_becomes_markup(text):
    def shown(text):
        return methods.listed("cache.EasyCache", text, {"cache.EasyCache": text})

    assert text in same_shape(shown(text), shown("plain")).text


@pytest.mark.parametrize("search", ["", None])
@pytest.mark.parametrize("model", ["", None, "scenes-flux", "another"])
def test_the_page_says_whether_the_chosen_model_is_served(model, search):
    html = methods.Events(Memory(unfit={"tokens.ToMe": "It has no UNet."})).show(
        search, model, request()
    )
    assert ("It has no UNet." in html) == (model == "scenes-flux")
    assert ("not offered" in html) == (model == "another")


def test_the_page_has_what_browser_tests_look_for():
    assert "methods-table" in drawn(lambda: methods.tab(Memory()))
