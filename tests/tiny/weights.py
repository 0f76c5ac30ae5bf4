"""Weights for networks that were never trained, such that the networks behave.

The default initialisation of a diffusion network zeroes its last layer, its gates and the joints
of its ControlNet: nothing that a method does would show. Here every parameter is drawn anew, so
that an output of order 1 depends on every block, on the prompt and on the time. The time enters
through its slow frequencies alone: neighbouring steps then see nearly the same network, which is
what caches and multistep samplers live from.
"""

import re

import torch
from torch import nn

# Turns that a time frequency may make over a whole run before it is damped.
TURNS = 0.5
# The range of times that a network is asked for: thousandths of the run, but for
TIMES = {"Lumina2Transformer2DModel": 1.0, "UNetSpatioTemporalConditionModel": 3.3}
# Spread of attention logits: few keys then matter, as in a trained network.
SHARPNESS = 2.0
QUERY_KEY_NORM = re.compile(r"(norm_q|norm_k|norm_added_q|norm_added_k)$")
QUERY = re.compile(r"(to_q|add_q_proj)$")
# What text tokens add to image tokens; at 1 a prompt of ten letters would hardly show.
TEXT_VALUE = re.compile(r"add_v_proj$")
TEXT_GAIN = 3.0
TIME_MLP = re.compile(r"(time_embedding|time_embedder|timestep_embedder|t_embedder)$")
# Chroma's stands for time (a quarter of its inputs), guidance and the place of a modulation.
APPROXIMATOR = re.compile(r"distilled_guidance_layer$")


def behave(network: nn.Module, *, seed: int, gain: float = 1.0) -> nn.Module:
    """Draw every parameter of `network` anew, in place, and return it in evaluation mode.

    Args:
        network: Any network, or a text encoder.
        seed: Of the draw: equal seeds and structures give equal bits.
        gain: Standard deviation of a layer's output for inputs of standard deviation 1.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for owner in network.modules():
            for name, parameter in owner.named_parameters(recurse=False):
                parameter.copy_(_draw(owner, name, parameter, generator, gain))
        times = TIMES.get(type(network).__name__, 1000.0)
        for name, module in network.named_modules():
            if TIME_MLP.search(name):
                _slow_down(module, times, share=1)
            elif APPROXIMATOR.search(name):
                _slow_down(module, times, share=4)
        _sharpen(network)
    return network.eval().requires_grad_(False)


def _draw(
    owner: nn.Module, name: str, parameter: torch.Tensor, generator: torch.Generator, gain: float
) -> torch.Tensor:
    noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
    if isinstance(owner, nn.Embedding):
        return noise
    if name == "gamma" or (name == "weight" and parameter.ndim == 1):  # of a normalisation
        return 1.0 + 0.1 * noise
    if parameter.ndim == 1 or not isinstance(owner, (nn.Linear, nn.modules.conv._ConvNd)):
        return 0.1 * noise
    return noise * gain / parameter[0].numel() ** 0.5


def _slow_down(time_mlp: nn.Module, times: float, *, share: int) -> None:
    first = next(module for module in time_mlp.modules() if isinstance(module, nn.Linear))
    half = first.in_features // share // 2
    frequencies = 10000.0 ** (-torch.arange(half) / half)
    turns = frequencies * times / (2 * torch.pi)
    damping = 1.0 / (1.0 + (turns / TURNS) ** 2)
    damping /= damping.square().mean().sqrt()
    first.weight[:, : 2 * half].mul_(torch.cat([damping, damping]))


def _sharpen(network: nn.Module) -> None:
    for name, module in network.named_modules():
        if QUERY_KEY_NORM.search(name) and getattr(module, "weight", None) is not None:
            module.weight.mul_(SHARPNESS**0.5)
        elif QUERY.search(name) and isinstance(module, nn.Linear):
            module.weight.mul_(SHARPNESS)
        elif TEXT_VALUE.search(name):
            module.weight.mul_(TEXT_GAIN)
