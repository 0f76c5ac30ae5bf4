"""The gallery: finds what was made, gives it back, deletes and restores, and shows it safely."""

import json
from dataclasses import replace
from types import SimpleNamespace

import gradio as gr
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pages import HOSTILE, Memory, Reader, drawn, job, request, result, same_shape, speedup

from app.serve.jobs import Spec
from app.ui import endpoints, events, gallery, records
from app.ui.browser import is_here, refusals
from app.ui.records import ANY, Filter

MODELS, KINDS = ("scenes-flux", "scenes-wan"), ("generate", "compare", "measure")


def spec(prompt="a circle", model="scenes-flux", kind="generate", **changes):
    request = {"model": model, "prompt": prompt, "seed": 7}
    return Spec(kind=kind, request=request, title="balanced", **changes)


JOBS = st.lists(
    st.builds(
        dict,
        spec=st.builds(
            spec,
            st.sampled_from(["a circle", "a Square", "two circles"]),
            st.sampled_from(MODELS),
            st.sampled_from(KINDS),
        ),
        state=st.sampled_from(["queued", "running", "done", "stopped", "failed"]),
        deleted=st.none() | st.just(3.0),
        picture=st.booleans(),
    ),
    max_size=30,
)
FILTERS = st.builds(
    Filter,
    st.sampled_from(["", "circle", "CIRCLE two", "nothing"]),
    st.sampled_from([ANY, "generate", "compare"]),
    st.sampled_from([ANY, *MODELS]),
    st.booleans(),
)


def filled(found):
    service = Memory()
    for index, one in enumerate(found):
        made = job(
            str(index),
            one["state"],
            one["spec"],
            deleted=one["deleted"],
            result=result() if one["picture"] and one["state"] in ("done", "stopped") else None,
        )
        service.jobs.append(replace(made, created=float(index // 4)))
    return service


# finding


@given(JOBS, FILTERS, st.integers(1, 40))
def test_a_page_is_the_newest_jobs_that_the_filter_takes(found, wanted, count):
    service = filled(found)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "READ", 5)
        shown = records.page(service, "local", wanted, count)
    expected = [
        one
        for one in reversed(service.jobs)
        if one.ended is not None
        and one.spec.kind != "measure"
        and wanted.kind in (ANY, one.spec.kind)
        and wanted.model in (ANY, one.spec.request["model"])
        and (one.deleted is not None) == wanted.deleted
        and all(word in str(one.spec).lower() for word in wanted.search.lower().split())
    ]
    assert [one.id for one in shown] == [one.id for one in expected[:count]]


@given(JOBS, st.integers(1, 40))
def test_every_job_is_a_picture_or_says_why_not(found, count):
    service = filled(found)
    shown = gallery.view(service, "local", Filter(), count, "en")
    wanted = records.page(service, "local", Filter(), 1000)
    assert shown.more == (len(wanted) > count)
    assert len(shown.cards) == len(shown.ids)
    pictured = [one.id for one in wanted[:count] if one.result is not None]
    assert shown.ids == pictured
    rows = Reader(shown.rest).tags.count("tr") - 1 if "<table" in shown.rest else 0
    assert rows == len(wanted[:count]) - len(pictured)
    assert ("Nothing here" in shown.rest) == (not wanted)


@pytest.mark.parametrize(
    ("files", "role"),
    [
        ({"picture": "p.png", "timeline": "t.png"}, "picture"),
        ({"sheet": "s.png", "baseline": "b.png", "accelerated": "a.png"}, "sheet"),
        ({"sheet": "s.png", "film": "f.mp4"}, "film"),
        ({"report": "r.json"}, None),
    ],
)
def test_the_file_that_stands_for_a_job(files, role):
    service = Memory()
    service.jobs = [job("a", result=result(files=files)), job("b", result=None)]
    assert [records.role(service, one) for one in service.jobs] == [role, None]


@given(st.lists(st.sampled_from(["picture", "sheet", "report"]), unique=True), st.data())
def test_a_file_that_is_gone_is_as_if_there_were_none_and_its_name_is_told(roles, data):
    service = Memory()
    service.jobs = [job("a", result=result(files={role: f"{role}.png" for role in roles}))]
    lost = data.draw(st.sets(st.sampled_from(roles))) if roles else set()
    service.missing = {("a", role) for role in lost}
    (one,) = service.jobs
    assert set(records.files(service, one)) == set(roles) - lost
    assert records.gone(service, one) == [f"{role}.png" for role in roles if role in lost]
    left = [role for role in records.SHOWN if role in roles and role not in lost]
    assert records.role(service, one) == next(iter(left), None)


@given(JOBS, st.sets(st.integers(0, 30)))
def test_a_file_that_is_gone_takes_no_other_picture_with_it(found, lost):
    service = filled(found)
    whole = gallery.view(service, "local", Filter(), 100, "en")
    service.missing = {(str(index), "picture") for index in lost}
    view = gallery.view(service, "local", Filter(), 100, "en")
    assert view.ids == [id for id in whole.ids if int(id) not in lost]
    assert view.rest.count("Its file is gone") == len(whole.ids) - len(view.ids)


@pytest.mark.parametrize(("language", "says"), [("en", "deleted"), ("de", "gelöscht")])
def test_a_picture_that_goes_while_it_is_shown_says_so_and_keeps_its_settings(language, says):
    service, events = page()
    here = request(accept_language=language)
    ids = shown(events)[1]
    service.missing = {(id, "picture") for id in ids}
    chosen, details, download = events.choose(ids, SimpleNamespace(index=0), here)
    assert chosen == ids[0] and download["value"] is None
    assert says in details and "picture.png" in details and "scenes-flux" in details
    assert says in events.open(chosen, here)
    assert events.restore(chosen, here)["request"]["model"] == "scenes-flux"


SERVER = "/srv/accel/uploads/somebody-0a/"


def test_nothing_that_is_told_of_a_job_names_a_folder_of_the_server():
    asked = {"prompt": "a circle", "model": "/models/mine/flux", "seed": 7}
    made = job(
        spec=Spec(request={**asked, "image": f"{SERVER}start.png"}),
        result=result(
            notes=[f"{SERVER}a.png is small"],
            verdicts={"a.B": {"state": "INACTIVE", "detail": f"{SERVER}t.json has none"}},
        ),
        error=f"{SERVER}b.png is gone: give another.",
    )
    told = records.told(made)
    assert told.spec.request == {**asked, "image": "start.png"}, "the rest is as it was typed"
    shown = [
        records.details(made, "en"),
        records.without([made], "en"),
        *(str(events.of_job(made, "en")[name]) for name in ("badge", "banner", "timeline")),
        json.dumps(endpoints.as_json(made)),
    ]
    for name in ("start.png", "a.png", "b.png", "t.json"):
        assert any(name in text for text in shown)
    assert not [text for text in shown if SERVER in text]
    assert made.spec.request["image"] == f"{SERVER}start.png", "its settings can be restored"


# showing


@given(st.text(min_size=1) | st.just(HOSTILE))
def test_no_text_of_a_job_becomes_markup(text):
    def shown(text):
        made = job(
            "a",
            "failed",
            Spec(
                request={"prompt": text, "model": text},
                title=text[:200],
                plan={"cache": {text: {text: text}}},
            ),
            result=result(notes=[text], quality={"ssim": f"is {text}"}),
            error=text,
        )
        return records.details(made, "en") + records.without([job("b", "failed", error=text)], "en")

    assert text in same_shape(shown(text), shown("plain")).text


@given(st.text(max_size=3000))
def test_a_caption_is_short_and_begins_as_the_prompt(prompt):
    made = job(spec=spec(prompt), result=result(speedup=speedup()))
    text = records.caption(made, "en")
    assert len(text) < records.CAPTION + 60 and "2.00×" in text
    assert text.startswith(prompt[: records.CAPTION - 1])


def test_details_tell_every_setting_and_field():
    plan = {"plan": 1, "cache": {"EasyCache": {"threshold": 0.125, "warmup": 4}}}
    made = job(spec=spec("two circles", plan=plan), result=result())
    text = Reader(records.details(made, "en")).text
    for told in (
        "two circles",
        "scenes-flux",
        "cache.EasyCache",
        "threshold = 0.125",
        "warmup = 4",
    ):
        assert told in text


# doing


def page():
    service = Memory()
    service.jobs = [job("a", result=result(), spec=spec("a circle")), job("b", result=result())]
    return service, gallery.Events(service)


def shown(events, trash=False, **headers):
    return events.show("", ANY, ANY, trash, records.PAGE, request(**headers))


def test_a_picture_is_chosen_deleted_and_brought_back():
    service, events = page()
    ids = shown(events)[1]
    for index, id in enumerate(ids):
        chosen, details, download = events.choose(ids, SimpleNamespace(index=index), request())
        assert chosen == id and "a circle" in details
        assert download["value"].endswith(f"{id}/picture.png")
        assert Spec(**events.restore(chosen, request())) == service.job("local", id).spec
    events.delete("a", request())
    assert shown(events)[1] == ["b"] and shown(events, trash=True)[1] == ["a"]
    events.undelete("a", request())
    assert set(shown(events)[1]) == {"a", "b"} and shown(events, trash=True)[1] == []
    events.delete("b", request())
    assert "1 deleted for good" in events.purge(request())
    assert shown(events)[1] == ["a"] and shown(events, trash=True)[1] == []


@pytest.mark.parametrize("trash", [False, True])
def test_only_the_trash_is_emptied_and_brought_back_from(trash):
    *_, delete, undelete, purge, _ = shown(page()[1], trash=trash)
    assert delete["visible"] == (not trash) and undelete["visible"] == purge["visible"] == trash


@pytest.mark.parametrize("name", ["restore", "delete", "undelete", "open"])
def test_nothing_happens_where_nothing_is_chosen(name):
    service, events = page()
    before = list(service.jobs)
    with pytest.raises(gr.Error, match="Choose"):
        getattr(events, name)("", request())
    assert service.jobs == before


@pytest.mark.parametrize("name", ["restore", "delete", "undelete", "open"])
def test_another_owners_job_is_not_there(name):
    service, events = page()
    before = list(service.jobs)
    other = request()
    other.username = "somebody"
    with pytest.raises(gr.Error, match="no job"):
        getattr(events, name)("a", other)
    assert service.jobs == before and shown(events)[1]


@pytest.mark.parametrize("language", ["en-GB", "de-DE"])
def test_a_page_speaks_the_language_of_its_browser(language):
    events = gallery.Events(Memory())
    rest = shown(events, accept_language=language)[3]
    assert ("Noch nichts" in rest) == (language == "de-DE")


# this machine


@pytest.mark.parametrize(
    ("host", "here"),
    [
        ("127.0.0.1", True),
        ("127.8.9.1", True),
        ("::1", True),
        ("10.0.0.4", False),
        ("203.0.113.7", False),
        ("testclient", False),
        ("", False),
    ],
)
@pytest.mark.parametrize("proxy", [None, "x-forwarded-for", "x-real-ip", "forwarded"])
def test_a_browser_is_here_only_on_loopback_and_behind_no_proxy(host, here, proxy):
    asked = request(**({proxy: "203.0.113.7"} if proxy else {}))
    asked.client.host = host
    assert is_here(asked) == (here and proxy is None)


def test_without_a_client_nobody_is_here():
    asked = request()
    asked.client = None
    assert not is_here(asked) and not is_here(None)


def test_a_folder_opens_only_for_a_browser_on_this_machine(monkeypatch):
    opened = []
    monkeypatch.setattr(gallery.typer, "launch", lambda *a, **k: opened.append((a, k)) or 0)
    _, events = page()
    far = request()
    far.client.host = "203.0.113.7"
    assert "Download" in events.open("a", far) and not opened
    assert not shown(events, x_forwarded_for="1.2.3.4")[-1]["visible"]
    assert events.open("a", request()) == ""
    assert opened == [(("/outputs/a/picture.png",), {"locate": True})]
    monkeypatch.setattr(gallery.typer, "launch", lambda *a, **k: 1)
    assert "/outputs/a/picture.png" in events.open("a", request())


def test_an_error_is_told_in_its_own_words_and_escaped():
    from accel.errors import BadInput

    with pytest.raises(gr.Error) as error, refusals():
        raise BadInput(f"{SERVER}b.png is gone")
    assert error.value.message == "b.png is gone"
    with pytest.raises(gr.Error) as error, refusals():
        raise BadInput(HOSTILE)
    assert "<" not in error.value.message and "alert(1)" in error.value.message
    with pytest.raises(ZeroDivisionError), refusals():
        raise ZeroDivisionError


def test_the_page_has_what_browser_tests_look_for():
    ids = drawn(lambda: gallery.tab(Memory(), gr.State(None), gr.State(None)))
    assert {"gallery-grid", "gallery-search", "gallery-restore", "gallery-delete"} <= ids


def test_empty_widgets_give_no_text_and_filter_nothing():
    _, events = page()
    assert events.show(None, None, None, None, records.PAGE, request())[1] == ["b", "a"]
