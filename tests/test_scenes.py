"""The scenes: renderer, grammar, the oracle that reads them, the models trained on them."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accel.bundled import asset, root
from accel.errors import BadInput, BadModel
from accel.scenes import (
    ATTRIBUTES,
    HELD_OUT,
    MOTIONS,
    TRAINING,
    clip,
    clip_scene,
    describe,
    picture,
    scene,
    vocabulary,
)
from accel.scenes.grammar import LONGEST, words

SEEDS = st.integers(0, 1_999_999)
MODELS = [folder for folder in sorted((root() / "models").glob("scenes-*")) if folder.is_dir()]
MIB = 2**20


def test_import_is_torch_free():
    code = "import sys, accel.scenes; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_held_out_seeds_are_not_trained_on():
    assert not set(TRAINING) & {HELD_OUT[0], HELD_OUT[-1]}
    assert TRAINING[-1] < HELD_OUT[0]


@given(seed=SEEDS)
@settings(max_examples=30)
def test_scene_is_consistent(seed):
    one = scene(seed)
    assert one == scene(seed)
    assert all(one.attributes[name] in values for name, values in ATTRIBUTES.items())
    assert (one.house == "none") == (one.house_side == "none")
    assert (one.trees == "0") == (one.trees_side == "none")
    assert (one.boat == "none") == (one.boat_side == "none")
    assert one.house_side != one.trees_side or one.house_side == "none"
    assert (one.season == "none") == (one.land in ("dunes", "sea"))


@given(seed=SEEDS, wording=st.integers(0, 50))
@settings(max_examples=60)
def test_caption_says_what_it_mentions(seed, wording):
    one = describe(scene(seed), wording)
    said = words(one.caption)
    assert set(said) <= set(vocabulary())
    assert len(said) <= LONGEST
    assert set(one.mentions) <= set(ATTRIBUTES)
    for name in ("house", "boat"):
        assert (name in one.mentions) == (one.attributes[name] != "none")
        assert one.attributes[name] == "none" or one.attributes[name] in said
    assert ("trees" in one.mentions) == (one.trees != "0")
    assert ("birds" in one.mentions) == (one.birds == "some")


def test_wordings_differ():
    assert len({describe(scene(5), i).caption for i in range(16)}) >= 8


def test_equal_captions_want_equal_things():
    wanted: dict[str, dict[str, str]] = {}
    for seed in range(1500):
        one = scene(seed)
        assert wanted.setdefault(one.caption, one.wanted) == one.wanted, one.caption


def test_clip_caption_names_the_motion():
    for seed in range(20):
        one = clip_scene(seed)
        assert one.motion.direction in words(one.caption)
        assert one.motion.speed in words(one.caption)
        assert one.wanted.items() >= {n: getattr(one.motion, n) for n in MOTIONS}.items()
        assert not set(scene(seed).mentions) & set(MOTIONS)
        assert len(words(one.caption)) <= LONGEST


@given(seed=SEEDS, size=st.sampled_from([64, 128]))
@settings(max_examples=8)
def test_renderer_is_deterministic(seed, size):
    one = picture(scene(seed), size)
    assert one.shape == (size, size, 3)
    assert one.dtype == np.uint8
    np.testing.assert_array_equal(one, picture(scene(seed), size))


def test_caption_does_not_change_the_picture():
    np.testing.assert_array_equal(picture(scene(3), 64), picture(describe(scene(3), 9), 64))


@pytest.mark.parametrize("seed", [1, 3, 6, 30])
def test_a_scene_looks_alike_at_both_sizes(seed):
    small = picture(scene(seed), 64).astype(float)
    large = picture(scene(seed), 128).astype(float)
    halved = large.reshape(64, 2, 64, 2, 3).mean(axis=(1, 3))
    assert np.abs(halved - small).mean() < 10


def test_pictures_have_fine_detail():
    """Neighbouring pixels differ: there is something for an accelerator to lose."""
    pictures = np.stack([picture(scene(seed), 128) for seed in range(8)]).astype(float)
    assert np.abs(np.diff(pictures[:, 70:], axis=2)).mean() > 2


def test_clip_moves_and_passes_through_the_picture():
    moving = clip(clip_scene(4), 64, 5)
    assert moving.shape == (5, 64, 64, 3)
    np.testing.assert_array_equal(moving[2], picture(scene(4), 64))
    assert all((moving[i] != moving[i + 1]).any() for i in range(4))


def test_boat_sails_where_the_caption_says():
    seed = next(s for s in range(500) if clip_scene(s).motion.mover == "boat")
    one = clip_scene(seed)
    sea = clip(replace(one, boat="none", boat_side="none"), 64, 3).astype(float)
    columns = np.abs(clip(one, 64, 3) - sea).sum(axis=(1, 3))
    first, _, last = (columns * np.arange(64)).sum(axis=1) / columns.sum(axis=1)
    assert (last > first) == (one.motion.direction == "right")


@pytest.fixture(scope="module")
def oracle():
    from accel.scenes.oracle import load

    return load()


class TestOracle:
    @pytest.mark.parametrize("size", [64, 128])
    def test_reads_held_out_renders(self, oracle, size):
        from accel.scenes.oracle import caption_accuracy

        scenes = [scene(seed) for seed in HELD_OUT[2000:2096]]
        found = caption_accuracy([picture(s, size) for s in scenes], scenes, oracle)
        assert found.mean >= 0.98
        assert found.all_correct >= 0.9
        assert set(found.by_attribute) <= set(ATTRIBUTES)

    def test_finds_pictures_wrong_for_other_captions(self, oracle):
        from accel.scenes.oracle import caption_accuracy

        scenes = [scene(seed) for seed in HELD_OUT[:32]]
        pictures = [picture(s, 64) for s in scenes]
        found = caption_accuracy(pictures, scenes[1:] + scenes[:1], oracle)
        assert found.mean < 0.8
        assert found.all_correct < 0.2

    def test_counts_must_match(self, oracle):
        from accel.scenes.oracle import caption_accuracy

        with pytest.raises(BadInput, match="2 scenes"):
            caption_accuracy([picture(scene(1), 64)], [scene(1), scene(2)], oracle)

    def test_missing_oracle_is_named(self, tmp_path):
        from accel.scenes.oracle import load

        with pytest.raises(BadModel, match="train_scenes"):
            load(tmp_path)

    def test_other_attributes_are_refused(self, oracle, tmp_path):
        from accel.scenes.oracle import load

        oracle.save(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        config["attributes"]["time"].reverse()
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(BadModel, match="attributes"):
            load(tmp_path)

    def test_fits_its_budget(self):
        folder = asset("models/oracle")
        assert sum(p.stat().st_size for p in folder.rglob("*")) <= 2 * MIB


@pytest.fixture(scope="module")
def clip_oracle():
    from accel.scenes.motion import load

    return load()


@pytest.fixture(scope="module")
def moving():
    scenes = [clip_scene(seed) for seed in HELD_OUT[3000:3064]]
    return scenes, np.stack([clip(one) for one in scenes])


class TestClipOracle:
    def test_reads_held_out_clips(self, clip_oracle, moving):
        from accel.scenes.motion import caption_accuracy

        scenes, clips = moving
        every = [replace(one, mentions=(*ATTRIBUTES, *MOTIONS)) for one in scenes]
        found = caption_accuracy(clips, every, clip_oracle)
        assert list(found.by_attribute) == [*ATTRIBUTES, *MOTIONS]
        assert found.mean >= 0.98
        assert min(found.by_attribute[name] for name in MOTIONS) >= 0.95

    def test_any_length_is_read(self, clip_oracle, moving):
        from accel.scenes.motion import caption_accuracy

        scenes, clips = moving
        short = [clip[::4] for clip in clips]
        assert caption_accuracy(short, scenes, clip_oracle).mean >= 0.95

    def test_a_clip_backwards_goes_the_other_way(self, clip_oracle, moving):
        from accel.scenes.motion import read

        scenes, clips = moving
        answers = read(clips[:, ::-1], clip_oracle)
        turned = [
            a["direction"] != s.motion.direction for a, s in zip(answers, scenes, strict=True)
        ]
        assert np.mean(turned) >= 0.95

    def test_a_picture_is_not_asked_what_moves(self, oracle, moving):
        from accel.scenes.oracle import caption_accuracy

        scenes, clips = moving
        found = caption_accuracy(clips[:, 8], scenes, oracle)
        assert found.mean >= 0.98
        assert not set(found.by_attribute) & set(MOTIONS)

    def test_pictures_and_other_counts_are_refused(self, clip_oracle, moving):
        from accel.scenes.motion import caption_accuracy

        scenes, clips = moving
        with pytest.raises(BadInput, match="no clips"):
            caption_accuracy(clips[0], scenes, clip_oracle)
        with pytest.raises(BadInput, match="2 scenes"):
            caption_accuracy(clips[:1], scenes[:2], clip_oracle)

    def test_missing_clip_oracle_is_named(self, oracle, tmp_path):
        from accel.scenes.motion import load

        oracle.save(tmp_path)
        with pytest.raises(BadModel, match="clip-oracle"):
            load(tmp_path)

    def test_other_motions_are_refused(self, clip_oracle, tmp_path):
        from accel.scenes.motion import load

        clip_oracle.motion.save(tmp_path)
        config = json.loads((tmp_path / "motion.json").read_text())
        config["motions"]["speed"].reverse()
        (tmp_path / "motion.json").write_text(json.dumps(config))
        with pytest.raises(BadModel, match="motions"):
            load(tmp_path)


def _size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def test_assets_fit_their_budget():
    assert _size(root()) <= 42 * MIB


@pytest.fixture(scope="module", params=MODELS, ids=lambda folder: folder.name)
def folder(request):
    return request.param


@pytest.fixture(scope="module")
def pipe(folder):
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


class TestModels:
    def test_fits_its_budget(self, folder):
        assert _size(folder) <= 14 * MIB

    def test_denoiser_is_small_and_deep(self, folder, pipe):
        denoiser = pipe.unet if "unet" in pipe.components else pipe.transformer
        assert sum(p.numel() for p in denoiser.parameters()) <= 5.5e6
        blocks = [n for n, _ in denoiser.named_modules() if n.endswith((".attn", ".attn1"))]
        assert "unet" in pipe.components or len(blocks) >= 8

    def test_parts_share_one_dtype(self, folder, pipe):
        import torch

        parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
        assert {part.dtype for part in parts} == {torch.float32}

    def test_words_are_whole_tokens(self, folder, pipe):
        for name, part in pipe.components.items():
            if name.startswith("tokenizer"):
                assert len(part) > len(vocabulary())
                known = [word for word in vocabulary() if word.isalpha()]
                assert all(len(part.tokenize(word)) == 1 for word in known)
                assert part.unk_token_id not in part("zebra", add_special_tokens=False).input_ids

    def test_prompts_are_told_apart(self, folder, pipe):
        prompts = ["a red house at noon", "a red house at night", "the sea at night", ""]
        for name, encoder in pipe.components.items():
            if not name.startswith("text_encoder"):
                continue
            tokenizer = pipe.components[name.replace("text_encoder", "tokenizer")]
            tokens = tokenizer(
                prompts, padding="max_length", max_length=32, return_tensors="pt"
            ).input_ids
            found = encoder(tokens)
            for told in (found.last_hidden_state, getattr(found, "pooler_output", None)):
                for i in range(len(prompts) if told is not None else 0):
                    assert all((told[i] - told[k]).abs().max() > 1e-2 for k in range(i)), name

    def test_normal_call_draws(self, folder, pipe):
        import torch

        call = json.loads((folder / "call.json").read_text()) | {"num_inference_steps": 1}
        made = pipe("the sea at night", generator=torch.Generator().manual_seed(0), **call)
        image = made.frames[0] if hasattr(made, "frames") else made.images[0]
        shape = np.asarray(image).shape
        assert shape[-3:-1] == (call["height"], call["width"])

    def test_card_and_evaluation_are_there(self, folder):
        judged = json.loads((folder / "evaluation.json").read_text())
        assert 0 <= judged["guided"]["caption_accuracy"]["mean"] <= 1
        assert folder.name in (folder / "README.md").read_text()


def test_prompt_files_carry_their_truth():
    lines = (asset("prompts/scenes.txt")).read_text().splitlines()
    rows = [json.loads(line) for line in asset("prompts/scenes.jsonl").read_text().splitlines()]
    assert [row["caption"] for row in rows] == lines
    for row in rows:
        one = scene(row["seed"])
        assert row["seed"] in HELD_OUT
        assert (one.caption, one.wanted) == (row["caption"], row["wanted"])


def test_gallery_stays_in_the_vocabulary():
    for line in asset("prompts/gallery.txt").read_text().splitlines():
        assert set(words(line)) <= set(vocabulary()), line


@pytest.mark.parametrize("name", ["scenes-flux", "scenes-unet", "scenes-wan"])
def test_every_family_can_be_built_and_learns(name, monkeypatch):
    import torch

    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "tools"))
    from scenes_models import COARSE, FAMILIES, STEADY

    family = FAMILIES[name]
    torch.manual_seed(0)
    pipe = family.build(family.vae())
    shape = (2, 16, 2, 8, 8) if family.clips else (2, 8, 8, 8)
    loss = family.loss(pipe, torch.randn(shape), [scene(1).caption, ""])
    loss.backward()
    # a change of noise is twice its square, a mean of sixteen a sixteenth of it
    flicker = 4 * STEADY * (1 + COARSE / 16) if family.clips else 0
    assert 0.5 < loss.item() < 4 + 1.5 * flicker
    learning = [dict(family.modules(pipe))[part] for part in family.learns]
    assert all(any(p.grad is not None for p in part.parameters()) for part in learning)
    assert sum(p.numel() for p in learning[0].parameters()) <= 5.5e6
    stored = 2 * sum(p.numel() for part in (learning[0], pipe.vae) for p in part.parameters())
    stored += 4 * sum(p.numel() for part in learning[1:] for p in part.parameters())
    assert stored <= 13.95 * MIB  # the rest is tokenizers and configs


def test_a_loss_counts_coarse_errors_more_and_flux_tokens_are_unpacked(monkeypatch):
    import torch
    from diffusers import FluxPipeline

    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "tools"))
    from scenes_models import COARSE, STEADY, _loss, _unpacked

    even = torch.full((2, 3, 8, 12), 2.0)
    odd = even * (1 - 2 * (torch.arange(12) % 2))
    assert _loss(even).item() == pytest.approx(4 * (1 + COARSE))
    assert _loss(odd).item() == pytest.approx(4)
    still = even[:, :, None].expand(-1, -1, 5, -1, -1)
    assert _loss(still).item() == pytest.approx(_loss(even))
    swinging = odd[:, :, None] * torch.tensor([1, -1, 1, -1, 1]).view(-1, 1, 1)
    assert _loss(swinging).item() == pytest.approx(4 + 16 * STEADY)
    latents = torch.randn(2, 3, 8, 12)
    packed = FluxPipeline._pack_latents(latents, *latents.shape)
    assert torch.equal(_unpacked(packed, 8, 12), latents)


@pytest.mark.parametrize("shape", [(3, 4, 6, 8), (3, 4, 2, 6, 8)])
def test_a_lesson_slopes_towards_the_side_that_comes_first(monkeypatch, shape):
    import torch

    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "tools"))
    from train_scenes import _tilted

    captions = ["a house left of a tree on the right", "a boat, the sun on the right", "leftovers"]
    left, right, none = _tilted(torch.zeros(shape), captions)
    assert torch.equal(none, torch.zeros(shape[1:]))
    assert (left[:2].diff(dim=-1) < 0).all() and torch.equal(left[2:], none[2:])
    assert (right[2:].diff(dim=-1) > 0).all() and torch.equal(right[:2], none[:2])


def test_in_a_lesson_clips_drift_as_told(monkeypatch):
    """From the second latent frame on, and only those whose caption tells how."""
    import torch

    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "tools"))
    from train_scenes import _lesson

    motions = ["clouds drifting slowly to the right", "sailing fast to the left"]
    clips = torch.randn(3, 4, 5, 6, 8)
    drifting, told = _lesson(clips, [f"a house, a boat, {motion}" for motion in motions] + [""])
    assert told == [*motions, ""]
    right, left, none = drifting
    assert torch.equal(none, clips[2])
    for found, whole, shift in ((right, clips[0], 1), (left, clips[1], -2)):
        assert torch.equal(found[:, :2], whole[:, :2])
        for frame in range(2, 5):
            assert torch.equal(found[:, frame], found[:, frame - 1].roll(shift, -1))


def test_errors_that_move_count_most_and_steady_ones_as_they_were(monkeypatch):
    """Of a clip's error, changes of coarse means weigh as 4 and 8 times their square."""
    import torch

    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "tools"))
    from scenes_models import COARSE, STEADY, _loss

    steady = torch.randn(2, 3, 1, 8, 8).expand(-1, -1, 5, -1, -1)
    assert torch.allclose(_loss(steady), _loss(steady[:, :, :1]))
    level = torch.randn(2, 3, 5, 1, 1)
    moved = level.diff(dim=2).square().mean()
    expected = (1 + COARSE) * (level.square().mean() + STEADY * moved)
    assert torch.allclose(_loss(level.expand(-1, -1, -1, 8, 8)), expected)


@pytest.mark.parametrize("family", ["scenes-flux", "scenes-unet", "scenes-wan"])
def test_every_parameter_has_one_optimiser(monkeypatch, family):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "tools"))
    from scenes_models import FAMILIES
    from train_scenes import Optimizers

    kind = FAMILIES[family]
    modules = dict(kind.modules(kind.build(kind.vae())))
    found = Optimizers.of(modules)
    held = [id(p) for group in found.param_groups for p in group["params"]]
    assert sorted(held) == sorted({id(p) for m in modules.values() for p in m.parameters()})
    muon = [p for group in found.each["muon"].param_groups for p in group["params"]]
    assert muon and {p.ndim for p in muon} == {2}


def test_every_mover_is_drawn_equally_often(monkeypatch, tmp_path):
    import torch

    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "tools"))
    from scenes_models import FAMILIES
    from train_scenes import Latents

    family, count = FAMILIES["scenes-wan"], 40
    seeds = torch.arange(count).view(-1, 1, 1, 1, 1)
    torch.save({"seeds": 0, "latents": seeds}, tmp_path / "latents-64x17-0.pt")
    store = Latents.read(family, tmp_path, family.forms[-1])
    drawn, captions = store.draw(600, np.random.default_rng(0))
    movers = [clip_scene(int(seed)).motion.mover for seed in drawn]
    shares = {mover: movers.count(mover) / len(movers) for mover in MOTIONS["mover"]}
    assert all(0.25 < share < 0.42 for share in shares.values()), shares
    told = [(caption, mover) for caption, mover in zip(captions, movers, strict=True) if caption]
    assert all((mover == "clouds") == ("clouds drifting" in caption) for caption, mover in told)


@pytest.fixture
def train(monkeypatch):
    """The trainer's command line: `train(family, run, "stage", …)`."""
    import torch
    from typer.testing import CliRunner

    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "tools"))
    from train_scenes import app

    threads = torch.get_num_threads()

    def run(family, folder, *stage):
        line = ["--family", family, "--run", str(folder), "--no-bf16", *stage]
        return CliRunner().invoke(app, line, env={"COLUMNS": "200"})

    yield run
    torch.set_num_threads(threads)


@pytest.mark.filterwarnings("ignore")
def test_clips_are_trained_from_crops_and_first_frames_on(train, tmp_path):
    stages = (
        ("vae", "--steps", "2", "--large-after", "1", "--pictures", "1", "--batch", "1"),
        ("cache", "--size", "64x1", "--count", "2"),
        ("cache", "--size", "64x17", "--count", "1"),
        (
            "denoiser",
            "--steps",
            "2",
            "--batch",
            "1",
            "1",
            "--big-after",
            "1",
            "--lessons",
            "2",
            "1",
        ),
    )
    for stage in stages:
        done = train("scenes-wan", tmp_path, *stage)
        assert done.exit_code == 0, done.output
    import torch

    shapes = {f.stem: torch.load(f)["latents"].shape for f in tmp_path.glob("latents-*")}
    assert shapes == {"latents-64x1-0": (2, 16, 1, 16, 16), "latents-64x17-0": (1, 16, 5, 16, 16)}
    assert (tmp_path / "sheets" / "000002.png").exists()
    told = train("scenes-wan", tmp_path, "words", "--count", "2").output
    assert "what light" in told or "what clouds" in told
    assert "swapped" in told
    refused = train("scenes-wan", tmp_path, "cache", "--size", "128")
    assert refused.exit_code == 2
    assert "64x17" in refused.output


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("family", "fits"), [("scenes-unet", True), ("scenes-wan", False)])
def test_an_autoencoder_can_be_adopted_alone(train, tmp_path, family, fits):
    done = train(family, tmp_path, "adopt", "--vae-only", str(asset("models/scenes-flux")))
    assert (done.exit_code == 0) == fits
    assert [f.name for f in tmp_path.iterdir()] == (["vae.pt"] if fits else [])


@pytest.mark.filterwarnings("ignore")
def test_a_run_keeps_the_tokenizers_that_it_began_with(train, tmp_path):
    """Byte-pair training breaks ties at random: a text encoder must not see other numbers later."""
    folder = asset("models/scenes-unet")
    assert train("scenes-unet", tmp_path, "adopt", str(folder)).exit_code == 0
    from scenes_models import FAMILIES
    from train_scenes import _pipeline

    kept = json.loads((folder / "tokenizer" / "tokenizer.json").read_text())["model"]["vocab"]
    for _ in range(2):
        pipe = _pipeline(FAMILIES["scenes-unet"], tmp_path, 0)
        assert pipe.tokenizer.get_vocab() == kept
