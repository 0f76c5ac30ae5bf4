"""Which denoisers of diffusers are served: blocks found by structure, and left out."""

import importlib.util
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from accel import errors
from accel.cache.block_range import BlockRangeCache, Spans
from accel.guard.gate import OPEN
from accel.report import Tally
from accel.seams.blocks import Block, crosses_long_skips, returned_streams

ROOT = Path(__file__).resolve().parents[1]
NO_INPUT = "has no input named hidden_states, sample, x: its calls cannot be followed"
NO_RESIDUALS = "does not hand one skip residual to each layer of its up path: .* does not fit"
REFUSED = {
    "Cosmos3OmniTransformer": NO_INPUT,
    "ErnieImageTransformer2DModel": r"gives its ErnieImage\w+Block 71 rows where the call has 2",
    "Kandinsky3UNet": NO_RESIDUALS,
    "LatteTransformer3DModel": "folds frames and tokens into its rows in turns",
    "RFD4ProteinaTransformer": NO_INPUT,
    "StableCascadeUNet": NO_RESIDUALS,
    "T5FilmDecoder": NO_INPUT,
    "UNet1DModel": NO_RESIDUALS,
    "UVit2DModel": NO_INPUT,
}
"""Denoisers that are refused, and what the refusal says behind their name."""


def load():
    """The tool that examines them (`coverage` is also the name of a package)."""
    spec = importlib.util.spec_from_file_location("accel_coverage", ROOT / "tools" / "coverage.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


coverage = load()


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("name", sorted(coverage.TOYS.keys() - REFUSED.keys()))
@torch.no_grad()
def test_blocks_left_out_with_what_they_gave_are_the_network_itself(name):
    finding = coverage.examine(name)
    assert not finding.reason
    assert finding.error <= coverage.CLOSE  # 2e-5 for SanaWM with AVX2 kernels, else below 1e-6
    assert finding.effect > 10 * finding.error, "the blocks that were left out do not matter"
    assert row(name)[4] == (finding.modules or "–")


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("name", REFUSED)
@torch.no_grad()
def test_a_denoiser_that_is_not_served_is_refused_by_name_with_the_reason(name):
    finding = coverage.examine(name)
    assert not finding.served
    assert re.match(f"{name} {REFUSED[name]}", finding.reason)
    assert row(name)[-2] == f"no: {finding.reason}"


def row(name):
    """The cells of a denoiser on the page, between empty ones."""
    page = (ROOT / "docs" / "coverage.md").read_text()
    (line,) = re.findall(rf"^\| {name} \|.*$", page, re.MULTILINE)
    return [cell.strip() for cell in line.split("|")]


def test_nothing_else_is_refused_on_the_page():
    page = (ROOT / "docs" / "coverage.md").read_text()
    assert set(re.findall(r"^\| (\w+) \|.*\| no: ", page, re.MULTILINE)) == set(REFUSED)


def test_the_page_has_every_denoiser_of_the_installed_diffusers():
    page = (ROOT / "docs" / "coverage.md").read_text()
    listed = set(re.findall(r"^(?:\| |\* )([A-Z]\w+)", page, re.MULTILINE))
    assert listed == set(coverage.classes())
    served = page.count("| yes |")
    assert f"{served} of " in page
    assert served >= 66


# What a block gives back is read from its own return.


class Plain(nn.Module):
    def forward(self, hidden_states, temb):
        return hidden_states + temb


class EncoderFirst(nn.Module):
    def forward(self, hidden_states, encoder_hidden_states=None, temb=None):
        if encoder_hidden_states is None:
            return hidden_states
        return encoder_hidden_states, hidden_states


class Sound(nn.Module):
    def forward(self, hidden_states, audio_hidden_states):
        return hidden_states, audio_hidden_states


class Opaque(nn.Module):
    def forward(self, hidden_states, encoder_hidden_states):
        return hidden_states + 1, encoder_hidden_states + 1


class Handing(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, hidden_states, encoder_hidden_states):
        return self.block(hidden_states, encoder_hidden_states=encoder_hidden_states)


@pytest.mark.parametrize(
    ("block", "streams"),
    [
        (Plain(), ()),
        (EncoderFirst(), ("encoder_hidden_states", "hidden_states")),
        (Sound(), ("hidden_states", "audio_hidden_states")),
        (Opaque(), ()),
        (Handing(EncoderFirst()), ("encoder_hidden_states", "hidden_states")),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_return_names_the_streams(block, streams):
    assert returned_streams(block) == streams


def test_streams_go_in_and_come_out_by_name():
    block, picture, sound = Block(0, Sound()), torch.zeros(2, 3, 4), torch.ones(2, 5, 4)
    streams = block.inputs(block.bind((picture,), {"audio_hidden_states": sound}))
    assert streams == {"hidden": picture, "audio_hidden_states": sound}
    assert block.outputs(block.module(picture, sound)) == streams
    assert block.returns(streams) == (picture, sound)


def test_a_return_that_names_nothing_is_refused_where_it_is_a_tuple():
    block = Block(0, Opaque())
    with pytest.raises(errors.UnsupportedModel, match=r"Opaque returns 2 values.*do not fit"):
        block.outputs(block.module(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3)))


# What does not fit is refused, not served wrongly.


class Skipping(nn.Module):
    def forward(self, hidden_states, skip=None):
        return hidden_states if skip is None else hidden_states + skip


@pytest.mark.parametrize(
    ("span", "crosses"),
    [(range(1, 6), False), (range(3, 6), False), (range(3), True), (range(1, 5), False)],
    ids=str,
)
def test_long_skips_may_not_cross_a_range(span, crosses):
    """Of six blocks the last takes in what the first gave, and so on inwards."""
    blocks = [Block(index, Skipping()) for index in range(6)]
    assert crosses_long_skips(blocks, span) == crosses
    plain = [Block(index, Plain()) for index in range(6)]
    assert not crosses_long_skips(plain, span)


def test_a_cache_refuses_a_range_that_long_skips_cross():
    blocks = [Block(index, Skipping()) for index in range(6)]
    denoiser = SimpleNamespace(name="transformer")
    site = SimpleNamespace(
        tally=Tally("cache.Some"),
        denoisers=[denoiser],
        blocks=lambda _: blocks,
        on_start=lambda reset: lambda: None,
        gate=lambda saving: OPEN,
    )
    decisions = SimpleNamespace(conditions=SimpleNamespace(attach=lambda _: ()))
    cache = BlockRangeCache(site.tally, decisions, lambda count: Spans((range(3),)), None)
    with pytest.raises(errors.UnsupportedModel, match=r"Skipping has long skips.*does not fit"):
        list(cache.attach(site))
