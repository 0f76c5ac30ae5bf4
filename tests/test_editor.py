"""Edits in a row on a server, and their page."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from pages import request
from PIL import Image
from tiny import PIPELINES
from ui_service import Fake, drawn, informed

from accel import Plan
from accel.errors import BadInput
from app import metadata
from app.editor import Editor, Made, Stopped, Subject, subject_of
from app.request import Request, Source
from app.serve.fitting import Fits
from app.ui import edit as page

CALL = {"width": 32, "height": 32, "num_inference_steps": 2, "guidance_scale": 5.0}
SUBJECT = Subject(Request(model="tiny", prompt="a fox", seed=3), Plan(), "other")
CORNER = (0.0, 0.0, 0.25, 0.25)


@pytest.fixture
def editor():
    loaded = []

    def load(source: Source):
        loaded.append(source)
        pipe = PIPELINES["sd15"].build()
        pipe.set_progress_bar_config(disable=True)
        return SimpleNamespace(source=source, pipe=pipe, call=CALL, fingerprint="tiny")

    found = Editor(load)
    found.loaded = loaded
    yield found
    found.free()


def pixels(picture):
    return np.asarray(picture.convert("RGB")).astype(int)


def stays_outside(made):
    differs = (pixels(made.before) != pixels(made.picture)).any(-1)
    return differs.any() and not differs[24:].any()


def mask(size=(32, 32), box=(0, 0, 8, 8)):
    found = Image.new("L", size)
    found.paste(255, box)
    return found


def test_edits_in_a_row_reuse_the_recording_and_keep_the_rest(editor):
    assert not editor.holds("a", SUBJECT)
    first = editor.edit("a", SUBJECT, "two boats", CORNER)
    assert stays_outside(first) and first.same is False
    assert (first.count, first.painted) == (1, 1 / 16) and first.computed < 1
    assert editor.holds("a", SUBJECT) and not editor.holds("b", SUBJECT)
    second = editor.edit("a", SUBJECT, "two boats", mask())
    assert second.count == 2 and second.dense == first.dense
    assert (pixels(second.picture) == pixels(first.picture)).all()
    assert editor.edit("b", SUBJECT, "two boats", CORNER).count == 1
    assert editor.edit("a", SUBJECT, "two boats", CORNER).count == 1
    assert len(editor.loaded) == 1


def test_a_recording_goes_with_whoever_made_it(editor):
    editor.edit("a", SUBJECT, "two boats", CORNER)
    editor.end("b")
    assert editor.holds("a", SUBJECT)
    editor.end("a")
    assert not editor.holds("a", SUBJECT)
    editor.free()
    editor.edit("a", SUBJECT, "two boats", CORNER)
    assert len(editor.loaded) == 2


def test_a_picture_without_a_record_is_painted_into(editor, tmp_path):
    file = tmp_path / "photo.png"
    Image.new("RGB", (32, 32), "teal").save(file)
    subject = subject_of(file, Request(model="tiny", strength=1.0, steps=2))
    made = editor.edit("a", subject, "two boats", CORNER)
    assert made.same is None and stays_outside(made)
    again = editor.edit("a", subject, "a fox", (0.0, 0.0, 0.3, 0.3))
    assert again.count == 2 and stays_outside(again)


def test_a_size_that_the_model_cannot_make_is_refused(editor, tmp_path):
    file = tmp_path / "photo.png"
    Image.new("RGB", (31, 32), "teal").save(file)
    with pytest.raises(BadInput, match="multiples of"):
        editor.edit("a", subject_of(file, Request(model="tiny")), "two boats", CORNER)


def test_the_file_of_an_edit_can_be_edited(editor, tmp_path):
    file = tmp_path / "edit.png"
    made = editor.edit("a", SUBJECT, "two boats", CORNER)
    file.write_bytes(made.file)
    found = subject_of(file, Request())
    assert (found.request.prompt, found.request.seed) == ("two boats", 3)
    assert found.pixels == metadata.pixels([made.picture])
    assert metadata.record_of(file).result.edited == made.computed
    assert editor.edit("a", found, "a fox", CORNER).count == 1


@pytest.mark.parametrize(
    ("prompt", "where", "match"),
    [
        (" ", CORNER, "prompt is empty"),
        ("boats", mask((16, 32)), "mask is 16×32"),
        ("boats", Image.new("L", (32, 32)), "Nothing is painted"),
        ("boats", (0.5, 0.5, 0.6, 0.1), "does not lie in"),
    ],
)
def test_what_cannot_be_edited_loses_nothing(editor, prompt, where, match):
    editor.edit("a", SUBJECT, "two boats", CORNER)
    with pytest.raises(BadInput, match=match):
        editor.edit("a", SUBJECT, prompt, where)
    assert editor.edit("a", SUBJECT, "two boats", CORNER).count == 2


def test_a_stopped_edit_loses_nothing_either(editor):
    first = editor.edit("a", SUBJECT, "two boats", CORNER)
    pipe = editor._session.model.pipe
    for who, stops in (("b", False), ("a", True)):
        hook = pipe.unet.register_forward_pre_hook(lambda *_, who=who: editor.stop(who))
        if stops:
            with pytest.raises(Stopped):
                editor.edit("a", SUBJECT, "two boats", CORNER)
        else:
            editor.edit("a", SUBJECT, "two boats", CORNER)
        hook.remove()
    last = editor.edit("a", SUBJECT, "two boats", CORNER)
    assert last.count == 3 and (pixels(last.picture) == pixels(first.picture)).all()


# the page


def painted(box=None):
    layer = Image.new("RGBA", (32, 32))
    if box:
        layer.paste((255, 0, 0, 255), box)
    return {"background": None, "layers": [layer], "composite": None}


def test_paint_or_a_region_says_where():
    found = page._where(painted((0, 0, 8, 8)), "")
    assert found.getbbox() == (0, 0, 8, 8)
    assert page._where(painted(), "0, 0, 0.5, 0.5") == (0, 0, 0.5, 0.5)
    for canvas, text, match in (
        (painted(), " ", "Nothing is painted"),
        (None, None, "Nothing is painted"),
        (painted((0, 0, 8, 8)), "0,0,1,1", "paint and a region"),
        (painted(), "1,2", "left,top,width,height"),
    ):
        with pytest.raises(BadInput, match=match):
            page._where(canvas, text)


@pytest.mark.parametrize(
    ("language", "words"),
    [
        ("en", ("1.50 s saved: 4.00×", "took 0.50 s", "took 2.00 s", "6.2 %", "11.0 %", "Edit 2")),
        ("de", ("1,50 s gespart", "dauerte 0,50 s", "dauerte 2,00 s", "6,2 %", "11,0 %")),
    ],
)
def test_the_figures_are_told_in_words(language, words):
    made = Made(None, None, b"", 0.5, 2.0, 2.4, 0.0625, 0.11, 2, True)
    told = page.figures(made, language)
    assert all(word in told for word in words) and "accel-faster" in told
    slow = page.figures(Made(None, None, b"", 2.5, 2.0, 2.4, 0.1, 0.6, 1, True), language)
    assert "accel-slower" in slow and ("0.50 s longer" in slow or "0,50 s länger" in slow)


def test_the_page_edits_what_was_brought_and_says_what_is_wrong(editor, tmp_path, monkeypatch):
    monkeypatch.setattr("app.serve.catalogue.call", lambda _name: CALL)
    service = Fake(tmp_path / "service", [informed("tiny")], Fits(methods={}))
    drawing, _ = drawn(lambda: page.tab(service))
    drawing = replace(drawing, editor=editor)
    shown, canvas = drawing.shown, drawing.fields["canvas"]
    asked = SimpleNamespace(**vars(request()), session_hash="a")

    def run(chosen, prompt="two boats", region="0,0,0.2,0.2"):
        values = (painted(), region, prompt, "tiny", 0.9, 2)
        drawing.begin(chosen, asked, *values)
        return drawing.run(chosen, asked, *values)

    told = run(None)
    assert "There is no picture" in told[shown["progress"]]
    file = tmp_path / "photo.png"
    Image.new("RGB", (32, 32), "teal").save(file)
    brought = drawing.bring(str(file), asked)
    assert "no record" in brought[shown["picture"]] and canvas in brought
    chosen = brought[drawing.chosen]
    for wrong, match in (({"region": ""}, "Nothing is painted"), ({"prompt": ""}, "is empty")):
        assert match in run(chosen, **wrong)[shown["progress"]]
    made = run(chosen)
    assert made[shown["progress"]] == "" and "was recorded" in made[shown["figures"]]
    assert Image.open(made[shown["after"]]).size == Image.open(made[shown["before"]]).size
    assert "Edit 2" in run(chosen)[shown["figures"]]
    drawing.leave(asked)
    assert "was recorded" in run(chosen)[shown["figures"]]
    unfit = drawing.bring(str(tmp_path / "none.txt"), asked)
    assert "neither" in unfit[shown["picture"]]
