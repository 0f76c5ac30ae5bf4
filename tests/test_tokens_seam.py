"""Where tokens lie: one place of the latents is changed, and the query that follows is the one."""

from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from tiny import PIPELINES

from accel import Plan
from accel.attach import Accelerator
from accel.errors import UnsupportedModel
from accel.seams.attention import answer_attention
from accel.seams.modules import find_modules
from accel.seams.tokens import FRAMES_SECOND, layout_of

TOLD = (
    "sd3", "sd35_skip_layer", "flux", "flux_cfg", "flux_img2img", "chroma", "qwenimage",
    "pixart_sigma", "cogview4", "dit", "wan21", "wan22", "ltx", "cogvideox", "hunyuanvideo",
    "mochi",
)  # fmt: skip
"""Transformers whose tokens are known; nothing mixes them before the first attention."""

UNTOLD = ("flux_kontext", "lumina2", "hunyuanimage", "zimage")
UNETS = {"sd15": {16, 8, 4}, "sdxl": {8, 4}, "animatediff": {12, 6, 3}, "svd": {12, 6}}
"""By UNet, the sides of the levels that it attends to."""


class Probe(Accelerator):
    """Runs the network with one place changed, and compares the first queries."""

    name: ClassVar[str] = "test.Probe"
    layer: ClassVar[str] = "attention"
    seam: ClassVar[str] = "attention"
    supports: ClassVar[str] = "tests"
    source: ClassVar[str] = "here"

    @classmethod
    def off(cls):
        return None

    def why_off(self):
        return None

    def attach(self, site) -> Iterator:
        site.tally.change = "probed"
        for denoiser in site.denoisers:
            found = FOUND.setdefault(denoiser.name, {"queries": [], "layouts": [], "changed": []})
            modules = [module for module in find_modules(denoiser) if module.kind == "self"]

            def answer(asked, found=found):
                found["queries"].append(asked.query)
                return asked.dense()

            yield answer_attention(modules[0], answer)
            yield site.around(denoiser, lambda call, inner, found=found: look(call, inner, found))


FOUND: dict[str, dict] = {}


def look(call, inner, found):
    found["queries"].clear()
    result = inner(call)
    plain = found["queries"][0]
    layout = layout_of(call, plain.shape[2])
    for place in places(layout):
        found["queries"].clear()
        inner(
            replace(
                call,
                arguments=call.arguments | {call.denoiser.sample_name: moved(call, place, layout)},
            )
        )
        apart = (found["queries"][0] - plain).abs().amax(dim=(0, 1, 3))
        token = (
            layout.image_span.start
            + (place[0] * layout.height + place[1]) * layout.width
            + place[2]
        )
        found["changed"].append((apart.nonzero().flatten().tolist(), token))
    found["layouts"].append(layout)
    return result


def places(layout):
    """A place near the start, and one near the end on every axis."""
    return {(0, 1, 2), tuple(length - 1 for length in layout.grid)}


def moved(call, place, layout):
    """The latents with one patch changed."""
    sample = call.sample.clone()
    if sample.ndim == 3:
        sample[:, (place[0] * layout.height + place[1]) * layout.width + place[2]] += 1.0
        return sample
    rows, columns = sample.shape[-2] // layout.height, sample.shape[-1] // layout.width
    if sample.ndim == 5 and type(call.denoiser.core).__name__ in FRAMES_SECOND:
        sample[:, place[0], :, place[1] * rows, place[2] * columns] += 1.0
    elif sample.ndim == 5:
        sample[:, :, place[0], place[1] * rows, place[2] * columns] += 1.0
    else:
        sample[:, :, place[1] * rows, place[2] * columns] += 1.0
    return sample


@pytest.fixture
def found():
    FOUND.clear()
    yield FOUND
    FOUND.clear()


@pytest.mark.parametrize("name", TOLD)
def test_the_query_of_a_place_is_where_the_layout_says(found, name):
    tiny = PIPELINES[name]
    pipe = tiny.build()
    with Plan(Probe()).attach(pipe), torch.no_grad():
        tiny.call(pipe, steps=4)
    seen = [pair for one in found.values() for pair in one["changed"]]
    assert len(seen) >= 2
    assert all(changed == [token] for changed, token in seen), seen


@pytest.mark.parametrize("name", UNETS)
def test_a_level_of_a_unet_has_the_shape_of_its_latents(name):
    tiny = PIPELINES[name]
    pipe = tiny.build()
    layouts = []

    class Levels(Probe):
        name: ClassVar[str] = "test.Levels"

        def attach(self, site):
            calls = []
            site.tally.change = "looked"
            for denoiser in site.denoisers:
                yield site.around(
                    denoiser, lambda call, inner: (calls.append(call), inner(call))[1]
                )
                for module in find_modules(denoiser):
                    if module.kind == "self":
                        yield answer_attention(
                            module,
                            lambda asked: (
                                layouts.append(layout_of(calls[-1], asked.query.shape[2]))
                                or asked.dense()
                            ),
                        )

    with Plan(Levels()).attach(pipe), torch.no_grad():
        tiny.call(pipe, steps=4)
    assert layouts and all(layout.text == 0 and layout.frames == 1 for layout in layouts)
    assert {layout.grid[1:] for layout in layouts} == {(side, side) for side in UNETS[name]}


@pytest.mark.parametrize("name", UNTOLD)
def test_an_order_that_is_not_known_is_refused_by_name(found, name):
    tiny = PIPELINES[name]
    pipe = tiny.build()
    with (
        Plan(Probe()).attach(pipe),
        torch.no_grad(),
        pytest.raises(UnsupportedModel, match="order is not known"),
    ):
        tiny.call(pipe, steps=4)
