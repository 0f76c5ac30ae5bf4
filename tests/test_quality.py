"""The measures: exact values on made-up pictures, every input form, and refusals."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis.extra.numpy import arrays
from PIL import Image, ImageFilter

from accel.errors import AccelError, BadInput
from accel.quality import difference, flicker, frechet, kernel, perceptual, psnr, ssim
from accel.scenes import HELD_OUT, clip, clip_scene, picture, scene
from accel.scenes.oracle import load

PICTURES = arrays(np.uint8, (12, 13, 3))


@pytest.fixture(scope="module")
def oracle():
    return load()


@pytest.fixture(scope="module")
def real():
    return np.stack([picture(scene(seed), 64) for seed in HELD_OUT[:96]])


def _blur(pictures, radius=1.0):
    flat = pictures.reshape(-1, *pictures.shape[-3:])
    soft = [Image.fromarray(p).filter(ImageFilter.GaussianBlur(radius)) for p in flat]
    return np.stack([np.asarray(p) for p in soft]).reshape(pictures.shape)


@pytest.fixture(scope="module")
def clips():
    return np.stack([clip(clip_scene(seed), 64, 9) for seed in HELD_OUT[:64]])


def test_uint8_does_not_wrap_around():
    white, black = np.full((16, 16, 3), 255, np.uint8), np.zeros((16, 16, 3), np.uint8)
    assert psnr(white, black) == 0
    assert psnr(black, white) == 0
    one = np.full((16, 16, 3), 1, np.uint8)
    assert psnr(black, one) == pytest.approx(20 * np.log10(255), abs=1e-4)
    assert psnr(one, black) == psnr(black, one)


@given(one=PICTURES, other=PICTURES)
@settings(max_examples=40)
def test_psnr_is_its_definition(one, other):
    error = np.square(one.astype(float) / 255 - other.astype(float) / 255).mean()
    expected = np.inf if error == 0 else -10 * np.log10(error)
    assert psnr(one, other) == pytest.approx(expected, abs=1e-4)
    assert psnr(one, one) == np.inf


@given(one=PICTURES, other=PICTURES)
@settings(max_examples=25)
def test_every_form_gives_the_same_figures(one, other):
    forms = [
        lambda x: x,
        Image.fromarray,
        lambda x: [Image.fromarray(x)],
        lambda x: x[None],
        lambda x: x.astype(np.float64) / 255,
        lambda x: torch.from_numpy(x.astype(np.float32) / 255).permute(2, 0, 1),
        lambda x: torch.from_numpy(x)[None],
    ]
    for measure in (psnr, ssim):
        values = [measure(form(one), form(other)) for form in forms]
        np.testing.assert_allclose(values, values[0], atol=1e-5)


@given(one=PICTURES, other=PICTURES)
@settings(max_examples=25)
def test_ssim_is_symmetric_and_bounded(one, other):
    assert ssim(one, one) == pytest.approx(1.0)
    assert ssim(one, other) == pytest.approx(ssim(other, one), abs=1e-9)
    assert -1 <= ssim(one, other) <= 1 + 1e-9


def test_clips_are_judged_by_frame(real):
    clip, noisy = real[:3], _blur(real[:3])
    by_frame = [psnr(a, b) for a, b in zip(clip, noisy, strict=True)]
    assert psnr(clip, noisy) == pytest.approx(np.mean(by_frame))
    assert psnr(clip[None], noisy[None]) == pytest.approx(np.mean(by_frame))
    frames = [Image.fromarray(frame) for frame in clip]
    assert psnr(frames, [Image.fromarray(frame) for frame in noisy]) == psnr(clip, noisy)


def test_half_precision_tensors_are_taken():
    one = torch.rand(2, 3, 16, 16, dtype=torch.float64).to(torch.bfloat16)
    assert psnr(one, one) == np.inf


@pytest.mark.parametrize(
    ("one", "other", "word"),
    [
        (np.zeros((16, 16, 3), np.uint8), np.zeros((16, 17, 3), np.uint8), "shapes"),
        (np.zeros((2, 16, 16, 3), np.uint8), np.zeros((3, 16, 16, 3), np.uint8), "shapes"),
        (np.zeros((16, 16, 3), np.uint8), np.zeros((16, 16, 3)), "dtypes"),
        (np.zeros((16, 16, 3), np.int64), np.zeros((16, 16, 3), np.int64), "dtype"),
        (np.zeros((16, 16)), np.zeros((16, 16)), "RGB"),
        (np.full((16, 16, 3), 255.0), np.full((16, 16, 3), 255.0), "range|0, 1"),
        (np.full((16, 16, 3), np.nan), np.zeros((16, 16, 3)), "0, 1"),
        ([], [], "no pictures"),
    ],
)
def test_refusals_are_ours_and_value_errors(one, other, word):
    for measure in (psnr, ssim, perceptual, difference):
        with pytest.raises(BadInput, match=word) as caught:
            measure(one, other)
        assert isinstance(caught.value, AccelError)
        assert isinstance(caught.value, ValueError)


def test_sets_of_mixed_sizes_are_refused():
    with pytest.raises(BadInput, match="differ"):
        psnr([np.zeros((8, 8, 3), np.uint8), np.zeros((9, 8, 3), np.uint8)], [])


def test_ssim_needs_its_window():
    with pytest.raises(BadInput, match="11"):
        ssim(np.zeros((8, 8, 3)), np.zeros((8, 8, 3)))


def test_perceptual_grows_with_damage(oracle, real):
    values = [perceptual(real[:8], _blur(real[:8], r), oracle) for r in (0.0, 0.5, 1.0, 2.0)]
    assert values[0] == pytest.approx(0, abs=1e-9)
    assert values == sorted(values)
    assert perceptual(real[:8], real[8:16], oracle) > values[1]


def test_set_distances_tell_blur_from_other_scenes(oracle, real):
    other, blurred = real[48:], _blur(real[:48])
    for distance in (frechet, kernel):
        assert distance(blurred, other, oracle) > distance(real[:48], other, oracle)
        assert distance(real, real, oracle) < distance(real[:48], other, oracle)
        ordered = distance(real[:48], blurred, oracle)
        assert distance(blurred, real[:48], oracle) == pytest.approx(ordered, rel=1e-6, abs=1e-6)


def test_clip_sets_are_judged_by_their_motion(clips):
    """Frozen clips are made of perfect pictures: only what looks at motion tells them."""
    still = np.repeat(clips[:32, 4:5], 9, axis=1)
    for distance in (frechet, kernel):
        floor = distance(clips[:32], clips[32:])
        assert distance(still, clips[32:]) > floor
        assert distance(_blur(clips[:32]), clips[32:]) > floor
        assert distance(clips, clips) < floor
    assert perceptual(clips[:4], still[:4]) > perceptual(clips[:4], clips[:4]) == 0


def test_an_oracle_for_pictures_judges_frames(oracle, clips):
    flat = clips.reshape(-1, *clips.shape[-3:])
    assert frechet(clips[:8], clips[8:16], oracle) == frechet(flat[:72], flat[72:144], oracle)


def test_every_form_of_clips_gives_the_same_figures(clips):
    forms = [
        lambda x: x,
        list,
        lambda x: x.astype(np.float64) / 255,
        lambda x: torch.from_numpy(x).permute(0, 1, 4, 2, 3),
        lambda x: [[Image.fromarray(frame) for frame in one] for one in x],
    ]
    values = [frechet(form(clips[:3]), form(clips[3:6])) for form in forms]
    np.testing.assert_allclose(values, values[0], rtol=1e-4)


def test_clips_of_mixed_lengths_are_refused(clips):
    with pytest.raises(BadInput, match="clips of one set differ"):
        frechet([clips[0], clips[1][:5]], clips[:2])


def test_one_clip_is_no_set(clips):
    with pytest.raises(BadInput, match="at least two"):
        frechet(clips[:1], clips)


def test_frechet_of_equal_sets_is_nought(oracle, real):
    assert frechet(real, real, oracle) == pytest.approx(0, abs=1e-5)


def test_one_picture_is_no_set(oracle, real):
    with pytest.raises(BadInput, match="at least two"):
        frechet(real[:1], real, oracle)


def test_difference_amplifies():
    grey = np.full((16, 16, 3), 100, np.uint8)
    brighter = grey + np.uint8(10)
    shown = np.asarray(difference(brighter, grey, gain=8))
    assert (shown == 80).all()
    np.testing.assert_array_equal(shown, np.asarray(difference(grey, brighter, gain=8)))
    assert difference(np.stack([grey] * 3), np.stack([brighter] * 3)).size == (48, 16)


def test_flicker_is_what_comes_and_goes():
    clip = np.random.default_rng(0).random((4, 16, 16, 3)).astype(np.float32) * 0.5
    assert flicker(clip, clip) == 0
    assert flicker(clip, clip + 0.25) == pytest.approx(0, abs=1e-7)
    blinking = clip + np.array([0.0, 0.2, 0.0, 0.2], np.float32)[:, None, None, None]
    assert flicker(clip, blinking) == pytest.approx(0.2, rel=1e-5)
    assert flicker(blinking, clip) == pytest.approx(0.2, rel=1e-5)
    with pytest.raises(BadInput, match="at least 2 frames, found 1"):
        flicker(clip[:1], clip[:1])
