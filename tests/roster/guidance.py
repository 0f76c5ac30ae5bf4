"""Methods that drop the unconditional branch."""

from accel import guidance
from roster.row import Row

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
        variants=(guidance.Interval(low=1.5), guidance.Interval(low=0.0, high=1.5)),
        branches=True,
    ),
}
