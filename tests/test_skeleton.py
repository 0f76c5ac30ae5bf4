"""A pipeline without weights refuses what the one with weights refuses, in the same words."""

import warnings

import pytest
import torch
from saved import Folders

from accel.errors import AccelError
from accel.plan import Plan, methods
from app import models
from app.batch.checking import LATER
from app.request import Source
from app.skeleton import skeleton

NAMES = ("scenes-flux", "scenes-unet", "scenes-wan")


def refusal(pipe, kind):
    try:
        Plan(kind()).attach(pipe).detach()
    except AccelError as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", NAMES)
def test_every_method_answers_the_skeleton_as_it_answers_the_model(name):
    kinds = [kind for kind in methods().values() if kind.layer not in LATER]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bare, whole = (make(Source(name)).pipe for make in (skeleton, models.load))
        for kind in kinds:
            assert refusal(bare, kind) == refusal(whole, kind), kind.name
    assert any(refusal(bare, kind) for kind in kinds)
    assert not all(refusal(bare, kind) for kind in kinds)


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
