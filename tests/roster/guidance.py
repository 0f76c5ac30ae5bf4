"""Methods that drop the unconditional branch."""

from tiny import PIPELINES

from accel import guidance
from roster.row import Row

AGAIN = (-1.0, 1.0, 1.0)  # û = c + (the last u − c)
FROM_A_PICTURE = frozenset({"sd_img2img"})

ROWS = {
    "guidance.Adaptive": Row(
        engine="guidance",
        active=guidance.Adaptive(threshold=-1.0, min_steps=2, min_guided=0.0),
        variants=(
            guidance.Adaptive(threshold=-1.0, min_steps=1, min_guided=0.0, space="x0"),
            guidance.Adaptive(threshold=-1.0, min_steps=0, min_guided=0.5, space="v"),
        ),
        branches=True,
        leads="uncond",
        dial=lambda threshold: guidance.Adaptive(threshold=threshold, min_steps=2, min_guided=0.0),
    ),
    "guidance.Interval": Row(
        engine="guidance",
        active=guidance.Interval(low=0.5, high=4.0),
        variants=(
            guidance.Interval(low=1.5, reset_history=True),
            guidance.Interval(low=0.0, high=1.5),
        ),
        branches=True,
    ),
    "guidance.CFGCache": Row(
        engine="guidance",
        active=guidance.CFGCache(interval=2, start=5000.0),
        variants=(
            guidance.CFGCache(interval=3, start=5000.0, low=1.0, high=0.7),
            guidance.CFGCache(interval=4, start=980.0, low_range=(0.0, 1000.0)),
        ),
        branches=True,
        answers=frozenset({"predicted"}),
    ),
    "guidance.LinearAG": Row(
        engine="guidance",
        active=guidance.LinearAG(coefficients=(AGAIN,)),
        variants=(
            guidance.LinearAG(every=1),
            guidance.LinearAG(
                guided=0.9,
                coefficients=(
                    AGAIN,
                    (0.0, 0.0, -1.0, 1.0, 0.0, 1.0),
                    (0.0, 0.1, 0.0, 0.0, -0.9, 0.9, 0.0, -0.1, 1.0),
                ),
            ),
        ),
        branches=True,
        answers=frozenset({"predicted", "reused"}),
    ),
    "guidance.Residual": Row(
        engine="residual",
        active=guidance.Residual(),
        variants=(guidance.Residual(delta=0.8),),
        branches=True,
        answers=frozenset({"predicted"}),
        idle=frozenset(PIPELINES) - FROM_A_PICTURE,
    ),
    "guidance.SkipAtOne": Row(
        engine="guidance",
        active=guidance.SkipAtOne(),
        branches=True,
        idle=frozenset(PIPELINES),  # whose calls have no scale of 1; see test_guidance.py
    ),
}
