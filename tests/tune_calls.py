"""What tests of tuning ask of tiny pipelines."""

from tiny import PIPELINES
from tiny.base import Ask

NAME = "flux_cfg"
STEPS = 6


def call_of(name=NAME, steps=STEPS):
    """The arguments of a tiny pipeline's call, but for the prompt."""
    asked = PIPELINES[name].inputs(Ask(["a prompt"], [0], guidance=True))
    asked.pop("prompt")
    return {**asked, "num_inference_steps": steps}
