"""What a download will bring is known before it, and no page waits for the hub."""

import time
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from types import SimpleNamespace

import pytest
from huggingface_hub import constants
from serve_toy import opener

from app.serve.downloads import Downloads
from app.serve.jobs import ModelInfo
from app.serve.limits import Limits
from app.serve.service import Service
from app.ui.generate import _named

ABSENT = "owner/model"
FILES = {"model_index.json": 100, "unet/model.safetensors": 2_000_000, "unet/model.bin": 9_000_000}


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Service]:
    """A service that offers a bundled model and one of the hub; start it in the test."""
    service = Service(
        tmp_path / "served",
        opener=opener(tmp_path),
        limits=Limits(models=("scenes-flux", ABSENT)),
    )
    yield service
    service.close()


def answers(monkeypatch: pytest.MonkeyPatch, asked: list[str] | None = None) -> None:
    def model_info(_api: object, name: str, **_options: object) -> SimpleNamespace:
        if asked is not None:
            asked.append(name)
        files = [SimpleNamespace(rfilename=file, size=size) for file, size in FILES.items()]
        return SimpleNamespace(siblings=files)

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", model_info)


def seen(service: Service) -> ModelInfo:
    return next(info for info in service.models() if info.name == ABSENT)


def test_the_size_is_there_once_the_hub_has_told_it(
    desk: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    answers(monkeypatch, asked)
    before = seen(desk)
    assert (before.here, before.bytes) == (False, None)
    desk.start()
    until = time.monotonic() + 30
    while seen(desk).bytes is None:
        assert time.monotonic() < until
        time.sleep(0.02)
    assert (seen(desk).here, seen(desk).bytes) == (False, 2_000_100)
    assert asked == [ABSENT]  # what is here needs no network


def test_without_a_network_it_stays_unknown_and_nobody_waits(
    desk: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, answer = Event(), Event()

    def unreachable(*_args: object, **_options: object) -> None:
        asked.set()
        answer.wait(30)
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", unreachable)
    desk.start()
    assert asked.wait(30)
    assert seen(desk).bytes is None  # while the question is under way
    answer.set()
    assert seen(desk).bytes is None


def test_nothing_is_kept_after_it_was_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, answer = Event(), Event()

    def late(_name: str) -> int:
        asked.set()
        answer.wait(30)
        return 5

    monkeypatch.setattr("app.hub.size", late)
    kept: list[tuple[str, str]] = []
    downloads = Downloads([ABSENT, "another/one"], lambda name, value: kept.append((name, value)))
    downloads.start()
    assert asked.wait(30)
    downloads.close()
    answer.set()
    downloads._thread.join(30)
    assert not downloads._thread.is_alive() and kept == []


@pytest.mark.parametrize(
    ("info", "told"),
    [
        (ModelInfo("scenes-flux", "image", {}, (), 12_000_000), "scenes-flux (12 MB)"),
        (ModelInfo(ABSENT, "image", {}, (), 5_200_000_000, here=False), "downloads 5200 MB"),
        (ModelInfo(ABSENT, "image", {}, (), None, here=False), "has not told how much"),
    ],
)
def test_a_person_sees_it_before_choosing(info: ModelInfo, told: str) -> None:
    assert told in _named(info, "en")
