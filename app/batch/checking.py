"""Whether a form can be made: asked of its pipeline without weights, before any are read."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace

from accel.errors import AccelError
from accel.plan import Plan
from app import clips
from app.batch.job import Form
from app.batch.tasks import Fit
from app.call import arguments, extent
from app.models import Model
from app.modes import parameters, pipeline_for
from app.request import Source
from app.skeleton import skeleton

LATER = ("memory", "parallel")
"""Layers that ask where weights lie, or how many processes there are: what they refuse, they refuse
when a row runs."""


def fits(forms: Sequence[Form]) -> tuple[Fit, ...]:
    """Whether some forms can be made; each model is looked at once."""
    bare: dict[Source, Model | str] = {}
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for form in forms:
            source = replace(form.request.source, device=None)
            if source not in bare:
                bare[source] = _bare(source)
            model = bare[source]
            found.append(_refused(form, model) if isinstance(model, str) else _fit(form, model))
    return tuple(found)


def _bare(source: Source) -> Model | str:
    try:
        return skeleton(source)
    except AccelError as error:
        return str(error)


def _refused(form: Form, reason: str) -> Fit:
    return Fit(form.group, refusal=reason)


def _fit(form: Form, model: Model) -> Fit:
    """By the pipeline, its arguments and the plan."""
    prompted = "prompt" in parameters(model.pipe)
    request = replace(form.request, prompt="a picture" if prompted else "", seed=0)
    try:
        suffix = clips.suffix(request)
        pipe = pipeline_for(model.pipe, request)
        arguments(pipe, request, model.call)
        now = (one for one in form.plan if one.layer not in LATER)
        Plan(*now, guard=form.plan.guard).attach(pipe).detach()
        pixels = extent(request, model.call).pixels
    except AccelError as error:
        return _refused(form, str(error))
    return Fit(form.group, suffix=suffix, prompted=prompted, pixels=pixels)
