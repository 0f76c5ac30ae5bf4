"""A session: one load, many runs, none of which sees another."""

from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from rich.console import Console
from saved import Folders, picture
from tiny import PIPELINES

from accel import Plan, Run, cache
from accel.errors import AccelWarning
from app import metadata, models
from app.call import arguments
from app.progress import Bar, skipped
from app.request import Request, Source
from app.session import Session

CACHE = Plan(cache.EasyCache(threshold=1e6))


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders(tmp_path_factory.getbasetemp() / "saved-models")


@pytest.fixture(scope="session")
def sessions(folders: Folders) -> dict[str, Session]:
    names = ("sd15", "flux_cfg")
    return {name: Session.open(Source(model=folders(name), device="cpu")) for name in names}


def request(session: Session, **more: Any) -> Request:
    source = session.model.source
    asked = {"prompt": "a red fox", "seed": 3, "steps": 6} | more
    return Request(model=source.model, device=source.device, **asked)


def pixels(session: Session, plan: Plan, **more: Any) -> str:
    return metadata.pixels(session.run(request(session, **more), plan).pictures)


@pytest.mark.parametrize("name", ["sd15", "flux_cfg"])
def test_runs_see_nothing_of_each_other(name: str, sessions: dict[str, Session]) -> None:
    session = sessions[name]
    stock, fast = pixels(session, Plan()), pixels(session, CACHE)
    assert stock != fast
    assert pixels(session, Plan(), seed=4) != stock
    assert (pixels(session, CACHE), pixels(session, Plan())) == (fast, stock)
    assert metadata.pixels(session.bare(request(session)).pictures) == stock


@pytest.mark.parametrize("name", ["sd15", "flux_cfg", "ltx"])
def test_a_warmed_session_draws_what_a_fresh_one_draws(name: str, folders: Folders) -> None:
    fresh, warm = (Session.open(Source(model=folders(name), device="cpu")) for _ in range(2))
    warm.warm()
    assert pixels(warm, CACHE) == pixels(fresh, CACHE)


def test_a_run_that_was_cancelled_at_any_step_leaves_nothing(sessions: dict[str, Session]) -> None:
    session = sessions["flux_cfg"]
    before = pixels(session, CACHE)

    class Cancelled(Exception):
        pass

    for at in range(6):

        def watch(run: Run, at: int = at) -> None:
            def observe(step: Any, _result: Any) -> None:
                if step.index == at:
                    raise Cancelled

            run.trajectory.observers.append(observe)

        with pytest.raises(Cancelled):
            session.run(request(session), CACHE, watch)
        assert pixels(session, CACHE) == before


def test_the_watch_sees_every_step_and_what_was_skipped(sessions: dict[str, Session]) -> None:
    seen: list[tuple[int, int | None, int]] = []

    def watch(run: Run) -> None:
        run.trajectory.observers.append(
            lambda step, _result: seen.append((step.index, step.total, skipped(run)))
        )

    sessions["sd15"].run(request(sessions["sd15"]), CACHE, watch)
    assert [index for index, _, _ in seen] == list(range(6))
    assert {total for _, total, _ in seen} == {6}
    assert [count for _, _, count in seen] == [0, 0, 0, 1, 2, 2]


def test_an_idle_method_warns(sessions: dict[str, Session]) -> None:
    session = sessions["sd15"]
    with pytest.warns(AccelWarning, match="did nothing"):
        session.run(request(session, steps=2), CACHE)


def test_the_model_s_own_call_arguments_hold_unless_asked(sessions: dict[str, Session]) -> None:
    session = sessions["flux_cfg"]
    call = session.run(request(session, steps=None), Plan()).call
    assert call["num_inference_steps"] == 4 and call["true_cfg_scale"] == 3.5
    call = session.run(request(session, steps=2, guidance=2.0, width=64), Plan()).call
    assert (call["num_inference_steps"], call["width"], call["height"]) == (2, 64, 32)
    assert call["true_cfg_scale"] == 2.0 and "guidance_scale" not in call


def test_guidance_goes_where_the_network_takes_it(sessions: dict[str, Session]) -> None:
    embedded, plain = PIPELINES["flux_cfg"].build(), PIPELINES["qwenimage"].build()
    asked = Request(prompt="fox", guidance=4.0)
    true = {"true_cfg_scale": 4.0, "negative_prompt": "", "prompt": "fox"}
    assert arguments(plain, asked, {}) == true
    assert arguments(embedded, asked, {}) == {"guidance_scale": 4.0, "prompt": "fox"}
    assert arguments(embedded, asked, {"true_cfg_scale": 3.5}) == true
    assert arguments(sessions["sd15"].model.pipe, asked, {})["guidance_scale"] == 4.0


def test_a_picture_gives_the_size_where_nothing_else_does(
    sessions: dict[str, Session], tmp_path: Path
) -> None:
    start = picture(tmp_path / "start.png", side=50)
    asked = Request(prompt="fox", image=start)
    from app.modes import pipeline_for

    flux = pipeline_for(sessions["flux_cfg"].model.pipe, asked)
    call = arguments(flux, asked, {})
    assert (call["height"], call["width"]) == (48, 48)
    assert arguments(flux, asked, {"height": 32})["height"] == 32
    sd15 = pipeline_for(sessions["sd15"].model.pipe, asked)
    assert arguments(sd15, asked, {"height": 32})["image"].size == (50, 50)
    sized = Request(prompt="fox", image=start, height=64, width=32)
    assert arguments(sd15, sized, {})["image"].size == (32, 64)


def test_all_modes_share_the_networks(sessions: dict[str, Session], tmp_path: Path) -> None:
    from app.modes import pipeline_for

    pipe = sessions["sd15"].model.pipe
    other = pipeline_for(pipe, Request(prompt="fox", image=picture(tmp_path / "start.png")))
    assert type(other) is not type(pipe) and other.unet is pipe.unet


def test_lora_is_put_on_and_taken_off(
    folders: Folders, tmp_path: Path, sessions: dict[str, Session]
) -> None:
    session = sessions["sd15"]
    lora = save_lora(folders("sd15"), tmp_path)
    stock, fast = pixels(session, Plan()), pixels(session, CACHE)
    with_lora = pixels(session, Plan(), lora=lora)
    assert with_lora != stock
    assert pixels(session, CACHE, lora=lora) not in (with_lora, fast)
    assert (pixels(session, Plan()), pixels(session, CACHE)) == (stock, fast)


def save_lora(model: str, folder: Path) -> Path:
    pipe = models.load(Source(model=model, device="cpu")).pipe
    torch.manual_seed(0)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    layers = get_peft_model_state_dict(pipe.unet)
    pipe.save_lora_weights(folder, unet_lora_layers=layers, weight_name="style.safetensors")
    return folder / "style.safetensors"


def test_dtype_is_that_of_the_source(folders: Folders) -> None:
    session = Session.open(Source(model=folders("sd15"), device="cpu", dtype="bfloat16"))
    assert session.model.pipe.unet.dtype == torch.bfloat16
    outcome = session.run(
        Request(model=folders("sd15"), device="cpu", dtype="bfloat16", prompt="fox", seed=1), Plan()
    )
    assert outcome.pictures[0].size == (32, 32)


def test_the_fingerprint_of_a_model_is_that_of_its_files(tmp_path: Path, folders: Folders) -> None:
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(folders("sd15"), folder)
    before = models.fingerprint([Path(folders("sd15"))])
    assert models.fingerprint([folder]) == before
    weights = next((folder / "unet").glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert models.fingerprint([folder]) != before


def test_the_fingerprint_of_large_files_reads_windows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "WHOLE", 1000)
    monkeypatch.setattr(models, "WINDOWS", 4)
    monkeypatch.setattr(models, "WINDOW", 100)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(bytes(5000))
    before = models.fingerprint([tmp_path])
    weights.write_bytes(bytes(4999) + b"1")
    assert models.fingerprint([tmp_path]) != before


def test_the_bar_shows_steps_skips_and_counts_on_a_terminal_only(
    sessions: dict[str, Session],
) -> None:
    shown = {}
    for terminal in (True, False):
        console = Console(file=StringIO(), force_terminal=terminal, width=100)
        with Bar(console) as bar:
            sessions["sd15"].run(request(sessions["sd15"]), CACHE, bar.follow)
            done = bar.count("timed runs", 2)
            done()
        shown[terminal] = console.file.getvalue()
    assert shown[False] == ""
    assert all(text in shown[True] for text in ("6/6", "2 skipped", "timed runs", "1/2"))


def test_another_size_than_asked_for_is_a_warning(
    sessions: dict[str, Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    session = sessions["sd15"]
    postprocess = session.model.pipe.image_processor.postprocess
    monkeypatch.setattr(
        session.model.pipe.image_processor,
        "postprocess",
        lambda *args, **more: [image.resize((8, 8)) for image in postprocess(*args, **more)],
    )
    with pytest.warns(AccelWarning, match="asked for 32x32, the pipeline made 8x8"):
        session.run(request(session), Plan())


@pytest.mark.parametrize("name", ["wan21", "ltx"])
def test_clips_are_frames_whatever_the_pipeline_gives_by_itself(name: str) -> None:
    pipe = PIPELINES[name].build()
    pipe.set_progress_bar_config(disable=True)
    call = {"height": 32, "width": 32, "num_frames": 9, "max_sequence_length": 48}
    session = Session(models.Model(Source(), pipe, call, ""))
    outcome = session.run(Request(prompt="fox", seed=1, steps=2), Plan())
    assert outcome.clip and [frame.size for frame in outcome.pictures] == [(32, 32)] * 9
