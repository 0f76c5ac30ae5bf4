"""Samplers."""

from roster.row import Row
from samplers import DPMSolverPP

ROWS = {
    "samplers.DPMSolverPP": Row(
        engine="sampler",
        active=DPMSolverPP(order=2),
        variants=(DPMSolverPP(order=3), DPMSolverPP(order=2, eta=1.0, variant="heun")),
    ),
}
