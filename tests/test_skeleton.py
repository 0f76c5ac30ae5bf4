"""A pipeline without weights refuses what the one with weights refuses, in the same words."""

import warnings
from functools import partial

import pytest
import torch
from saved import Folders

from accel.plan import methods
from app import models
from app.request import Source
from app.serve.fitting import examine, refusals
from app.skeleton import skeleton

NAMES = ("scenes-flux", "scenes-unet", "scenes-wan")


def asked(source, ask):
    """What the skeleton of a source answers, and what the model does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [ask(make(source).pipe) for make in (skeleton, models.load)]


@pytest.mark.parametrize("name", NAMES)
def test_every_method_answers_the_skeleton_as_it_answers_the_model(name):
    groups = [(kind,) for kind in methods()]
    bare, whole = asked(Source(name), partial(refusals, groups=groups))
    assert dict(zip(groups, bare, strict=True)) == dict(zip(groups, whole, strict=True))
    assert any(bare) and not all(bare)


@pytest.mark.parametrize("family", ["sd15", "flux_cfg", "ltx"])
def test_every_two_methods_answer_the_skeleton_as_they_answer_the_model(family, tmp_path_factory):
    folder = Folders(tmp_path_factory.getbasetemp() / "saved-models")(family)
    bare, whole = asked(Source(folder), lambda pipe: examine(partial(refusals, pipe)))
    assert bare == whole and whole.pairs


def test_no_weights_are_read(monkeypatch):
    def read(*_args, **_options):
        raise AssertionError("weights were read")

    monkeypatch.setattr("safetensors.torch.load_file", read)
    monkeypatch.setattr("safetensors.safe_open", read)
    monkeypatch.setattr("diffusers.models.model_loading_utils.load_state_dict", read)
    pipe = skeleton(Source("scenes-unet")).pipe
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        assert all(one.device == torch.device("meta") for one in part.parameters())


def test_a_controlnet_comes_with_it(tmp_path_factory):
    folders = Folders(tmp_path_factory.mktemp("models"))
    source = Source(folders("sd15"), controlnet=folders.controlnet())
    assert type(skeleton(source).pipe) is type(models.load(source).pipe)
