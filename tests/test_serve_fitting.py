"""One matrix says what fits: it is what attaching says, and what is submitted is held to it."""

from functools import partial
from pathlib import Path
from shutil import copytree
from threading import Event, Thread
from types import SimpleNamespace

import pytest
import serve_toy
import torch
from huggingface_hub import constants
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from saved import Folders
from tiny import PIPELINES

from accel import Plan
from accel.errors import AccelError, BadModel, Conflict, UnsupportedModel
from accel.plan import methods
from app.request import Source
from app.serve import catalogue, fitting
from app.serve.fitting import MANY, Answer, Examiner, Subject, examine, refusals
from app.serve.jobs import Spec
from app.serve.limits import BUNDLED, Limits
from app.serve.service import Service
from app.serve.store import Store

NAMES = sorted(methods())


class Examined:
    """A pipeline and its matrix."""

    def __init__(self):
        self.pipe = PIPELINES["sd15"].build()
        self.fits = examine(partial(refusals, self.pipe))


@pytest.fixture(scope="module")
def matrix():
    return Examined()


def test_the_matrix_is_what_attaching_says(matrix):
    fits = matrix.fits
    assert set(fits.methods) == set(methods())
    fitting = [name for name, reason in fits.methods.items() if reason is None]
    assert fitting and len(fitting) < len(fits.methods) and fits.pairs
    for pair in fits.pairs:
        assert set(pair.split()) <= set(fitting)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pair=st.lists(st.sampled_from(NAMES), min_size=2, max_size=2, unique=True))
def test_a_candidate_is_refused_exactly_if_attaching_it_is(matrix, pair):
    pipe, fits = matrix.pipe, matrix.fits
    one, other = pair
    for name in pair:
        assert fits.reason([], name) == fits.methods[name]
    assert fits.reason([other, one], other) == fits.reason([one], other)
    if fits.methods[one] is not None:
        return
    try:
        Plan(methods()[one](), methods()[other]()).attach(pipe).detach()
    except AccelError as error:
        assert fits.reason([one], other) == (fits.methods[other] or str(error))
    else:
        assert fits.reason([one], other) is None


def test_a_plan_is_checked_between_two_parts_of_a_matrix(tmp_path, monkeypatch):
    """The check comes while the first part is being asked: it has its turn before the last."""
    store = Store(tmp_path / "jobs.sqlite3")
    examiner = Examiner(store, fitting.main)
    asked, begun, waiting = [], Event(), Event()

    def ask(_self, _model, plan, groups=()):
        asked.append(plan)
        if len(asked) == 1:
            begun.set()
            waiting.wait(60)
        assert len(groups) <= MANY
        return Answer(refusals=(None,) * len(groups))

    monkeypatch.setattr(Examiner, "_ask", ask)
    whole = Thread(target=examiner.fits, args=("scenes-unet",))
    check = Thread(target=examiner.check, args=("scenes-unet", Plan.preset("balanced")))
    whole.start()
    begun.wait(60)
    check.start()
    check.join(0.2)  # it stands at the lock by then
    waiting.set()
    for thread in (check, whole):
        thread.join(60)
    [place] = [at for at, plan in enumerate(asked) if plan is not None]
    assert 0 < place < len(asked) - 1
    store.close()


def test_what_is_not_installed_does_not_fit(matrix):
    assert "no method that is installed" in matrix.fits.reason([], "cache.Nonsense")


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fitting")
    models = Folders(tmp_path_factory.getbasetemp() / "saved-models")
    limits = Limits(models=(models("sd15"), "scenes-unet"))
    made = Service(folder, limits=limits)
    yield made, models("sd15")
    made.close()


def refused_pair(fits):
    """A plan of two methods that each fit, and not together."""
    document = {"plan": 1}
    for name in min(fits.pairs).split():
        family, kind = name.split(".")
        document.setdefault(family, {})[kind] = {}
    return document


def test_what_does_not_fit_is_refused_before_it_is_queued(service, matrix):
    served, model = service
    request = {"model": model, "prompt": "fox"}

    def submit(**families):
        return served.submit("ada", [Spec(request=request, plan={"plan": 1} | families)])

    with pytest.raises(UnsupportedModel):
        submit(cache={"TeaCache": {}})
    with pytest.raises(Conflict):
        submit(**refused_pair(matrix.fits))
    [job] = submit(cache={"EasyCache": {}})
    assert job.state == "queued"
    [off] = submit(cache={"EasyCache": {"threshold": 0.0}})  # does nothing, so it is not asked
    assert off.state == "queued"


def test_what_was_found_out_is_kept(service, matrix, monkeypatch):
    served, model = service
    spec = Spec(request={"model": model, "prompt": "fox"}, plan=refused_pair(matrix.fits))
    with pytest.raises(Conflict) as first:
        served.submit("ada", [spec])
    served._examiner.close()
    monkeypatch.setattr(Examiner, "_ask", lambda *_: pytest.fail("asked again"))
    with pytest.raises(Conflict) as second:
        served.submit("ada", [spec])
    assert str(second.value) == str(first.value)


def test_another_version_of_a_model_is_examined_anew(tmp_path):
    folder = Folders(tmp_path).fresh("sd15", tmp_path / "model")
    before = catalogue.signature(str(folder))
    assert catalogue.signature(str(folder)) == before
    weights = next((folder / "unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes())
    assert catalogue.signature(str(folder)) != before


@pytest.mark.parametrize("ask", ["fits", "check"])
def test_what_was_found_out_on_one_device_is_asked_again_on_another(tmp_path, monkeypatch, ask):
    store = Store(tmp_path / "jobs.sqlite3")
    asked = []

    def answer(examiner, _model, _plan, groups=()):
        asked.append(examiner._device)
        return Answer(refusals=(None,) * len(groups))

    monkeypatch.setattr(Examiner, "_ask", answer)
    more = [Plan.preset("balanced")] if ask == "check" else []
    for device in ("cpu", "cuda", "cpu", "cuda"):
        getattr(Examiner(store, fitting.main, device), ask)("scenes-unet", *more)
    assert list(dict.fromkeys(asked)) == ["cpu", "cuda"] == sorted(set(asked), key=asked.index)
    assert asked == sorted(asked)  # none was asked a second time
    store.close()


def test_a_model_that_cannot_be_loaded_is_left_to_its_job(tmp_path, monkeypatch):
    store = Store(tmp_path / "jobs.sqlite3")
    examiner = Examiner(store, fitting.main)
    damaged = Answer(error=BadModel.__name__, message="x.safetensors is truncated")
    monkeypatch.setattr(Examiner, "_ask", lambda *_: damaged)
    examiner.check("scenes-unet", Plan.preset("balanced"))
    with pytest.raises(BadModel, match=r"x\.safetensors"):
        examiner.fits("scenes-unet")
    monkeypatch.setattr(Examiner, "_ask", lambda *_: Answer(error="Conflict", message="both"))
    with pytest.raises(Conflict, match="both"):  # damage is not remembered
        examiner.check("scenes-unet", Plan.preset("balanced"))
    store.close()


def test_a_process_that_dies_is_said_and_started_again(tmp_path):
    store = Store(tmp_path / "jobs.sqlite3")
    examiner = Examiner(store, serve_toy.dies)
    with pytest.raises(BadModel, match="died"):
        examiner.network("scenes-unet")
    examiner.check("scenes-unet", Plan.preset("balanced"))
    examiner.close()
    examiner = Examiner(store, serve_toy.damaged)
    with pytest.raises(BadModel, match="restore the file"):
        examiner.network("scenes-unet")
    examiner.close()
    store.close()


def test_on_the_cpu_a_model_is_examined_without_its_weights(monkeypatch):
    loaded = SimpleNamespace(model=SimpleNamespace(pipe=object()))
    subject = Subject(Source("scenes-unet", device="cpu"), lambda _source: loaded)
    assert subject.attachable.unet.conv_in.weight.is_meta
    assert subject.whole is loaded.model.pipe
    monkeypatch.setattr(fitting, "device_of", torch.device)
    assert Subject(Source("scenes-unet", device="cuda"), lambda _: loaded).attachable is (
        loaded.model.pipe
    )


def test_a_model_whose_configuration_is_damaged_is_said(tmp_path):
    folder = Folders(tmp_path).fresh("sd15", tmp_path / "model")
    (folder / "unet" / "config.json").write_text("{")
    store = Store(tmp_path / "jobs.sqlite3")
    examiner = Examiner(store, fitting.main)
    with pytest.raises(BadModel):
        examiner.fits(str(folder))
    examiner.close()
    store.close()


def test_models_are_described_by_their_folders(service):
    served, model = service
    found = {info.name: info for info in served.models()}
    assert set(found) == {model, "scenes-unet"}
    for info in found.values():
        assert info.kind == "image" and info.bytes > 10_000
        assert info.call["height"] in (32, 128)
        assert set(info.inputs) == {"prompt", "negative", "guidance", "image", "mask", "lora"}
    assert served.models() == list(found.values())


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_models_are_what_they_are(name):
    info = catalogue.info(name, Limits())
    assert info.kind == ("video" if name == "scenes-wan" else "image")
    assert ("frames" in info.inputs) == (info.kind == "video")
    assert info.call["num_inference_steps"] == 28 and "prompt" in info.inputs


def test_a_controlnet_of_the_hub_is_known_once_it_is_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    models = Folders(tmp_path)
    limits = Limits(models=(models("sd15"), "owner/model", "owner/control", "owner/part"))
    assert catalogue.offered(limits) == list(limits.models) and not catalogue.controls(limits)
    assert "control" not in catalogue.info(models("sd15"), limits).inputs
    cached(tmp_path / "hub", "owner/model", Path(models("sd15")))
    cached(tmp_path / "hub", "owner/control", Path(models.controlnet()))
    cached(tmp_path / "hub", "owner/part", Path(models("sd15")) / "unet")
    assert catalogue.offered(limits) == [models("sd15"), "owner/model", "owner/part"]
    assert catalogue.files_of("owner/control") and catalogue.folder("owner/part") is None
    assert "control" in catalogue.info(models("sd15"), limits).inputs


@pytest.mark.parametrize("text", ["", "[]", "5", '{"_class_name": 5}'])
def test_a_config_that_says_nothing_is_that_of_no_controlnet(tmp_path, monkeypatch, text):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "config.json").write_text(text)
    cached(tmp_path / "hub", "owner/some", tmp_path / "some")
    assert catalogue.folder("owner/some") is None


def cached(cache, name, folder):
    """Put a folder into the hub's cache."""
    home = cache / f"models--{name.replace('/', '--')}"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("0" * 40)
    copytree(folder, home / "snapshots" / ("0" * 40))


def test_control_is_offered_where_there_is_a_controlnet(tmp_path):
    models = Folders(tmp_path)
    limits = Limits(models=(models("sd15"), models.controlnet()))
    assert catalogue.offered(limits) == [models("sd15")]
    assert "control" in catalogue.info(models("sd15"), limits).inputs
    assert "control" not in catalogue.info("scenes-wan", limits).inputs
