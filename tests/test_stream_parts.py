"""What a stream is made of: similarity filter, feature bank, queues."""

import threading
import time
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_stream import call_of, frames, near, streamed
from torch.nn import functional

from accel.errors import BadInput, UnsupportedModel
from accel.loop import RCFG, FeatureBank, Feed, Outlet, SimilarityFilter, Stream, StreamBatch
from accel.loop.bank import Kept, Layer, Scenes, fused, merged
from accel.loop.likeness import cosine
from accel.loop.similarity_filter import Similar
from accel.seams.attention import Asked
from accel.seams.denoisers import Row

# the similarity filter


def skips(method, given, filled=True):
    similar = Similar(method)
    return [similar.skips(frame, filled) for frame in given]


@given(max_skip=st.integers(0, 12), count=st.integers(1, 40), seed=st.integers(0, 9))
def test_of_identical_frames_every_max_skip_plus_second_is_processed(max_skip, count, seed):
    frame = torch.ones(1, 3, 2, 2)
    found = skips(SimilarityFilter(max_skip=max_skip, seed=seed), [frame] * count)
    assert found == [place % (max_skip + 2) != 0 for place in range(count)]


def test_at_or_below_the_threshold_nothing_is_skipped():
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.6, 0.8])  # of cosine 0.6
    assert not any(skips(SimilarityFilter(threshold=0.6, max_skip=99), [a, b] * 50))
    assert any(skips(SimilarityFilter(threshold=0.1, max_skip=99), [a, b] * 50))


def test_chance_is_the_paper_s_and_draws_follow_it():
    method = SimilarityFilter(threshold=0.5, max_skip=10_000)
    similar = Similar(method)
    assert similar.chance(0.75) == pytest.approx(0.5)
    assert similar.chance(0.5) == similar.chance(-1.0) == 0.0
    a = torch.tensor([1.0, 0.0])
    b = torch.tensor([0.75, (1 - 0.75**2) ** 0.5])
    skipped = 0
    for _ in range(2000):
        similar._last = a
        skipped += similar.skips(b, True)
    assert 0.46 < skipped / 2000 < 0.54


def test_draws_have_a_seed():
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.75, (1 - 0.75**2) ** 0.5])
    found = [
        skips(SimilarityFilter(threshold=0.5, max_skip=99, seed=seed), [a, b] * 20)
        for seed in (0, 0, 1)
    ]
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("threshold", [1.0, 1.5, 7.0])
def test_from_one_on_it_is_off(bench, same, threshold):
    pipe, plan = bench.pipe("sd_img2img"), [SimilarityFilter(threshold=threshold)]
    fed = frames(1) * 3
    made, report = streamed(pipe, "sd_img2img", plan, levels=1, fed=fed)
    assert same(made, streamed(pipe, "sd_img2img", levels=1, fed=fed)[0])
    assert report.verdicts["loop.SimilarityFilter"].chosen
    assert report.rows == 2 * 3


def test_it_waits_until_the_stream_is_filled_and_shows_the_picture_before(bench):
    pipe = bench.pipe("sd_img2img")
    plan = [StreamBatch(), RCFG(), SimilarityFilter(max_skip=2)]
    with Stream(pipe, plan, levels=3, **call_of("sd_img2img")) as stream:
        made = [stream.push(frames(1)[0]) for _ in range(8)]
        report = stream.report
        assert [one is None for one in made[:3]] == [True, True, False]
        processed = [0, 1, 2, 6]  # fills with three, then three are skipped, one is forced
        assert (stream.frames, stream.skipped) == (8, 8 - len(processed))
        assert all(made[place] is made[2] for place in (3, 4, 5))
        assert made[7] is made[6]
        assert len(stream.flush()) == 2
        assert stream.pictures == stream.frames
    assert report.rows == 3 * len(processed)
    assert "4 of 8 frames" in report.verdicts["loop.SimilarityFilter"].detail


def test_likeness():
    a = torch.randn(3, 4)
    assert cosine(a, a) == 1.0
    assert cosine(torch.zeros(2), torch.zeros(2)) == 1.0
    assert cosine(torch.zeros(2), torch.ones(2)) == 0.0
    assert cosine(a, -2 * a) == pytest.approx(-1.0)


# the feature bank


def layer(**fields):
    """The banks of an attention of nothing: rows are set by hand."""
    denoiser = SimpleNamespace(rows=(), name="unet")
    module = SimpleNamespace(path="mid_block.attentions.0", denoiser=denoiser)
    return Layer(FeatureBank(**fields), module), denoiser


def asked(rows, seed=0, tokens=5):
    noise = torch.Generator().manual_seed(seed)
    return Asked(*(torch.randn(rows, 2, tokens, 4, generator=noise) for _ in range(3)))


def passed(one, question, output=None):
    attended = one._attend(question)
    given_ = attended.transpose(1, 2).flatten(2) if output is None else output
    return attended, one._after(given_)


def test_the_first_frame_has_no_bank():
    one, denoiser = layer()
    denoiser.rows = (Row("cond", 0), Row("uncond", 0))
    question = asked(2)
    attended, output = passed(one, question)
    assert torch.equal(attended, question.dense())
    assert torch.equal(output, attended.transpose(1, 2).flatten(2))


def test_extended_attention_is_attention_over_both():
    one, denoiser = layer(mix=0.0)
    denoiser.rows = (Row("cond", 0),)
    before, now = asked(1), asked(1, seed=1)
    passed(one, before)
    attended, _ = passed(one, now)
    scores = now.query @ torch.cat([now.key, before.key], 2).transpose(2, 3) / 2.0
    wanted = scores.softmax(-1) @ torch.cat([now.value, before.value], 2)
    torch.testing.assert_close(attended, wanted)


def test_a_frame_like_the_one_before_attends_as_alone():
    """Doubled keys and values leave the mean as it was; a mix of equal outputs too."""
    one, denoiser = layer()
    denoiser.rows = (Row("cond", 0),)
    question = asked(1)
    _, first = passed(one, question)
    attended, second = passed(one, question)
    torch.testing.assert_close(attended, question.dense())
    torch.testing.assert_close(second, first)


def test_rows_with_and_without_a_bank_share_a_call():
    one, denoiser = layer(mix=0.0)
    denoiser.rows = (Row("cond", 0),)
    passed(one, asked(1))
    both = asked(2, seed=2)
    denoiser.rows = (Row("cond", 1), Row("cond", 0))
    attended, _ = passed(one, both)
    torch.testing.assert_close(attended[0], both.dense()[0])
    assert not torch.allclose(attended[1], both.dense()[1], atol=1e-3)


def test_a_mixed_token_is_that_of_the_nearest():
    bank = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    output = torch.tensor([[3.0, 0.1], [0.1, 1.0], [-1.0, -1.0]])
    found = fused(output, bank, mix=0.75, threshold=0.9)
    torch.testing.assert_close(found[0], 0.25 * output[0] + 0.75 * bank[0])
    torch.testing.assert_close(found[1], 0.25 * output[1] + 0.75 * bank[1])
    torch.testing.assert_close(found[2], output[2])


@given(tokens=st.integers(2, 9), seed=st.integers(0, 99))
def test_merging_keeps_the_count_and_every_token_counts_once(tokens, seed):
    noise = torch.Generator().manual_seed(seed)

    def kept():
        return Kept(
            torch.randn(2, tokens, 3, generator=noise),
            torch.randn(2, tokens, 3, generator=noise),
            torch.randn(tokens, 6, generator=noise),
        )

    bank, frame = kept(), kept()
    found = merged(bank, frame, seed)
    assert found.key.shape == bank.key.shape
    assert found.output.shape == bank.output.shape
    again = merged(bank, frame, seed)
    assert torch.equal(found.value, again.value)
    # against the plain loop
    key = torch.cat([bank.key, frame.key], 1).transpose(0, 1).flatten(1)
    output = torch.cat([bank.output, frame.output])
    order = torch.randperm(2 * tokens, generator=torch.Generator().manual_seed(seed)).tolist()
    groups = {target: [target] for target in order[tokens:]}
    for source in order[:tokens]:
        like = {t: float(functional.cosine_similarity(key[source], key[t], dim=0)) for t in groups}
        groups[max(like, key=like.get)].append(source)
    wanted = torch.stack([output[group].mean(0) for group in groups.values()])
    torch.testing.assert_close(found.output, wanted)


def test_banks_are_renewed_every_interval_by_what_was_not_mixed():
    one, denoiser = layer(interval=3, keep="queue", frames=2, threshold=-1.0)
    denoiser.rows = (Row("cond", 0),)
    outputs = [torch.randn(1, 5, 8) for _ in range(8)]
    for seed, output in enumerate(outputs):
        passed(one, asked(1, seed), output)
    kept = one.kept[Row("cond", 0)]
    assert len(kept) == 2  # frames 0, 3 and 6 came in
    assert torch.equal(kept[0].output, outputs[3][0])
    assert torch.equal(kept[1].output, outputs[6][0])


def test_a_bank_of_merged_frames_does_not_grow():
    one, denoiser = layer(interval=1)
    denoiser.rows = (Row("cond", 0),)
    sizes = set()
    for seed in range(5):
        passed(one, asked(1, seed))
        sizes.add(one.bytes)
    assert len(sizes) == 1


@pytest.mark.parametrize("fields", [{}, {"keep": "queue", "frames": 2}, {"mix": 0.0}])
def test_with_banks_frames_that_share_calls_are_what_each_is_alone(bench, fields):
    """The row of a level sees the same frames in the same order either way."""
    pipe = bench.pipe("sd_img2img")
    bank = FeatureBank(interval=2, scene=-1.0, threshold=0.5, **fields)
    alone, one = streamed(pipe, "sd_img2img", [bank], count=4, levels=2)
    torch.testing.assert_close(
        streamed(pipe, "sd_img2img", [bank, StreamBatch()], count=4, levels=2)[0],
        alone,
        atol=1e-3,
        rtol=0,
    )
    plain, _ = streamed(pipe, "sd_img2img", count=4, levels=2)
    near(alone[0], plain[0])
    assert (alone[1:] - plain[1:]).abs().max() > 1e-4
    assert one.verdicts["loop.FeatureBank"].state == "ACTIVE"
    assert one.cached_bytes > 0


def test_a_bank_that_nobody_looks_at_is_off(bench, same):
    pipe = bench.pipe("sd_img2img")
    made, _ = streamed(pipe, "sd_img2img", [FeatureBank(attend=False, mix=0.0)], count=2, levels=1)
    assert same(made, streamed(pipe, "sd_img2img", count=2, levels=1)[0])


def test_another_scene_begins_with_no_bank(bench):
    pipe = bench.pipe("sd_img2img")
    fed = [*frames(2), *frames(2, start=40)]
    always = FeatureBank(scene=1.0, interval=1, threshold=-1.0)  # every other frame is a scene
    made, _ = streamed(pipe, "sd_img2img", [always, StreamBatch()], levels=2, fed=fed)
    near(made, streamed(pipe, "sd_img2img", levels=2, fed=fed)[0])


def test_scenes():
    scenes = Scenes(0.5)
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    assert [scenes.cuts(one) for one in (a, a, b, b, a)] == [False, False, True, False, True]
    scenes.reset()
    assert not scenes.cuts(b)


def test_networks_without_self_attentions_of_a_unet_are_refused(bench):
    with pytest.raises(UnsupportedModel, match=r"loop\.FeatureBank.*FluxTransformer2DModel"):
        Stream(bench.pipe("flux_img2img"), [FeatureBank()], prompt="a fox")


# queues


def test_of_a_file_every_frame_is_kept_in_order():
    with Feed(iter(range(50)), waiting=3) as feed:
        assert list(feed) == list(range(50))
        assert feed.dropped == 0


def test_of_a_live_source_the_newest_frame_counts():
    taken, given_ = threading.Event(), threading.Event()

    def camera():
        yield 0
        taken.wait(5)
        yield from range(1, 6)
        given_.set()

    with Feed(camera(), live=True) as feed:
        found = []
        for frame in feed:
            found.append(frame)
            taken.set()
            given_.wait(5)
    assert found == [0, 5]
    assert feed.dropped == 4


def test_an_error_of_the_source_comes_behind_its_frames():
    def broken():
        yield from range(3)
        raise OSError("camera gone")

    found = []
    with Feed(broken()) as feed, pytest.raises(OSError, match="camera gone"):
        for frame in feed:
            found.append(frame)
    assert found == [0, 1, 2]


def test_a_feed_that_is_left_lets_go_of_its_source():
    closed = threading.Event()

    def endless():
        try:
            while True:
                yield 0
        finally:
            closed.set()

    with Feed(endless()) as feed:
        assert next(iter(feed)) == 0
    assert closed.is_set()


def test_pictures_are_all_handed_on_before_the_outlet_is_left():
    found = []

    def slow(picture):
        time.sleep(0.001)
        found.append(picture)

    with Outlet(slow, waiting=2) as outlet:
        for picture in range(20):
            outlet.put(picture)
    assert found == list(range(20))


def test_an_error_where_pictures_go_is_raised_where_they_are_put():
    def full(picture):
        if picture == 2:
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"), Outlet(full, waiting=1) as outlet:
        for picture in range(50):
            outlet.put(picture)


def test_a_camera_that_goes_loses_no_frame_that_it_gave(bench):
    def camera():
        yield from frames(5)
        raise OSError("camera gone")

    made = []
    with Stream(bench.pipe("sd_img2img"), [StreamBatch()], **call_of("sd_img2img")) as stream:
        with pytest.raises(OSError, match="camera gone"):
            for picture in stream.run(camera()):
                made.append(picture)
        assert stream.pending == 0
    near(torch.stack(made), streamed(bench.pipe("sd_img2img"), "sd_img2img", count=5)[0])


def test_frames_of_another_size_lose_none_of_those_before(bench):
    made = []
    fed = [*frames(5), *frames(1, side=40)]
    stream = Stream(bench.pipe("sd_img2img"), [StreamBatch()], **call_of("sd_img2img"))
    with stream, pytest.raises(BadInput, match="40×40"):
        for picture in stream.run(fed):
            made.append(picture)
    assert len(made) == 5


def test_an_empty_source(bench):
    stream = Stream(bench.pipe("sd_img2img"), **call_of("sd_img2img"))
    with stream, pytest.raises(BadInput, match="no frame"):
        list(stream.run([]))
