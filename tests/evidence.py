"""Plans with the evidence that `accel tune` writes into them, made up."""

from typing import Any

from accel import Plan
from accel.seams.identity import identity
from accel.tuned import Figure, Tuned

FASTER = Figure(measure="speedup", mean=2.5, low=2.25, high=2.75)
NEAR = Figure(measure="ssim", mean=0.97, low=0.96, high=0.98, share=0.95, share_low=0.8)


def proven(plan: Plan, pipe: Any, **more: Any) -> Plan:
    """A plan that was tuned for a pipeline: SSIM 0.95, 2.5 times as fast."""
    evidence = Tuned(
        **more,
        targets=("ssim>=0.95",),
        methods="",
        network=identity(pipe),
        pipeline=type(pipe).__name__,
        scheduler=type(pipe.scheduler).__name__,
        call=(("num_inference_steps", 4.0),),
        machine="one <machine>",
        versions=(("torch", "2"),),
        prompts=8,
        held_out=20,
        texts="0",
        figures=(NEAR, FASTER),
        plans=9,
        minutes=1.0,
        date="2026-11-30",
    )
    return plan.proven(evidence)
