"""Samplers."""

from roster.row import Row
from samplers import DPMSolverPP, DPMSolverPPSingle, SASolver, UniPC

ROWS = {
    "samplers.DPMSolverPP": Row(
        engine="sampler",
        active=DPMSolverPP(order=2),
        variants=(DPMSolverPP(order=3), DPMSolverPP(order=2, eta=1.0, variant="heun")),
    ),
    "samplers.DPMSolverPPSingle": Row(
        engine="sampler",
        active=DPMSolverPPSingle(order=2),
        variants=(DPMSolverPPSingle(order=3),),
    ),
    "samplers.UniPC": Row(
        engine="corrector",
        active=UniPC(order=2),
        variants=(UniPC(order=3, variant="bh1"), UniPC(order=2, corrector=False)),
    ),
    "samplers.SASolver": Row(
        engine="corrector",
        active=SASolver(),
        variants=(SASolver(predictor_order=3, corrector_order=4, tau=0.0),),
    ),
}
