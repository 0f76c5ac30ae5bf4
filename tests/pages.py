"""A service that keeps its jobs in memory and runs none: what pages are tested with."""

import asyncio
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import gradio as gr

from accel.errors import BadInput
from accel.plan import methods
from app.serve.fitting import Fits
from app.serve.jobs import ENDED, FIRST, Job, ModelInfo, NoSuchJob, Result, Spec, Speedup
from app.serve.limits import Limits

VOID = {"img", "meta", "br", "input"}
HOSTILE = "<script>alert(1)</script> & \"double\" 'single' {value} ${7*7} {{7*7}} </td>"


def request(**headers):
    """What Gradio tells of a browser on this machine."""
    plain = {name.replace("_", "-"): value for name, value in headers.items()}
    return SimpleNamespace(
        username=None, headers=plain, client=SimpleNamespace(host="127.0.0.1", port=1)
    )


def result(**changes):
    values = {
        "files": {"picture": "picture.png", "timeline": "timeline.png"},
        "seed": 7,
        "seconds": 2.0,
        "steps": 3,
        "nfe": 2.0,
        "verdicts": {"cache.EasyCache": {"state": "ACTIVE", "detail": "1/3 predicted"}},
        "events": {
            "cache.EasyCache": [
                [0, "cond", 0, "computed"],
                [1, "cond", 0, "predicted"],
                [2, "cond", 0, "computed"],
            ]
        },
    }
    return Result(**{**values, **changes})


def speedup(ratio=2.0, low=1.8, high=2.2):
    return Speedup(
        ratio=ratio, low=low, high=high, baseline_seconds=4.0, measured="2026-11-29T12:00:00"
    )


def job(id="a", state="done", spec=None, **changes):
    given = spec or Spec(request={"model": "scenes-flux", "prompt": "a circle", "seed": 7})
    made = Job(id, "local", None, given, state, 1, created=1.0)
    ended = 2.0 if state in ENDED else None
    return replace(made, ended=ended, **changes)


class Memory:
    """The part of the service that pages call.

    Attributes:
        missing: (job, role) of files that somebody deleted.
        broken: What a model that cannot be examined raises.
    """

    def __init__(self, folder=Path("/outputs"), unfit=None):
        self.limits = Limits()
        self.paused = None
        self.plans = {}
        self.missing = set()
        self.broken = None
        self.folder = folder
        self.jobs = []
        self.groups = []
        self.calls = []
        self.refusals = []
        self.unfit = unfit or {}

    def models(self):
        return [
            ModelInfo("scenes-flux", "image", {}, ("prompt",), 1),
            ModelInfo("scenes-wan", "video", {}, ("prompt", "frames"), 1),
        ]

    def fits(self, model):
        if model not in [info.name for info in self.models()]:
            raise BadInput(f"model {model} is not offered: choose another one.")
        if self.broken is not None:
            raise self.broken
        return Fits(methods={name: self.unfit.get(name) for name in methods()})

    def figures(self, model):
        return {}

    def tuned(self, model):
        return {}

    def submit(self, owner, specs, group=None):
        refusal = self.refusals.pop(0) if self.refusals else None
        if refusal is not None:
            raise refusal
        ids = [str(len(self.jobs) + i) for i in range(len(specs))]
        named = {FIRST: ids[0]}
        fresh = [
            replace(
                job(id, "queued", spec.model_copy(update={"against": named.get(spec.against)})),
                owner=owner,
                group=group,
            )
            for id, spec in zip(ids, specs, strict=True)
        ]
        self.jobs += fresh
        self.groups.append((group, [one.id for one in fresh]))
        return fresh

    def job(self, owner, id):
        for one in self.jobs:
            if (one.owner, one.id) == (owner, id):
                return one
        raise NoSuchJob(f"There is no job {id}: look into the gallery.")

    def end(self, id, state="done", **changes):
        index = next(i for i, one in enumerate(self.jobs) if one.id == id)
        self.jobs[index] = replace(self.jobs[index], state=state, ended=2.0, **changes)

    def cancel(self, owner, id):
        self.calls.append(("cancel", id))
        if self.job(owner, id).state not in ENDED:
            self.end(id, "stopped")
        return self.job(owner, id)

    def history(self, owner, *, search="", deleted=False, limit=60, before=None):
        found = [
            one
            for one in self.jobs
            if one.owner == owner
            and (one.deleted is not None) == deleted
            and (before is None or one.created < before)
            and all(word in str(one.spec).lower() for word in search.lower().split())
        ]
        return sorted(reversed(found), key=lambda one: -one.created)[:limit]

    def file(self, owner, id, role):
        found = self.job(owner, id)
        there = found.result is not None and role in found.result.files
        if not there or (id, role) in self.missing:
            raise NoSuchJob(f"The job {id} has no file {role}: choose another one.")
        return self.folder / id / found.result.files[role]

    def delete(self, owner, id):
        self.cancel(owner, id)
        self._mark(owner, id, 3.0)

    def restore(self, owner, id):
        self._mark(owner, id, None)

    def _mark(self, owner, id, deleted):
        index = self.jobs.index(self.job(owner, id))
        self.jobs[index] = replace(self.jobs[index], deleted=deleted)

    def purge(self, owner):
        gone = [one for one in self.jobs if one.owner == owner and one.deleted is not None]
        self.jobs = [one for one in self.jobs if one not in gone]
        return len(gone)


class Reader(HTMLParser):
    """Reads HTML strictly: every element is closed where it was opened."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.open = []
        self.tags = []
        self.attributes = []
        self.texts = []
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> in {self.open}"
        self.open.pop()

    def handle_data(self, data):
        self.texts.append(data)

    def handle_comment(self, data):
        raise AssertionError(f"a comment: {data}")

    handle_decl = handle_pi = unknown_decl = handle_comment

    @property
    def text(self):
        return "".join(self.texts)

    def values(self, name):
        return [value for key, value in self.attributes if key == name]


def same_shape(hostile, plain):
    """Both are the same elements with attributes of the same names: no text became markup."""
    one, other = Reader(hostile), Reader(plain)
    assert one.tags == other.tags
    assert [name for name, _ in one.attributes] == [name for name, _ in other.attributes]
    return one


def words_of(html):
    """The words of a text, whatever lies between them."""
    return re.sub(r"\s+", " ", Reader(html).text)


def drawn(draw):
    """The ids of the components that a page draws; Gradio wants an event loop for it."""

    async def inside():
        with gr.Blocks() as demo:
            draw()
        return {getattr(block, "elem_id", None) for block in demo.blocks.values()}

    return asyncio.run(inside())
