"""Samplers."""

from roster.row import STEPS, Row
from samplers import (
    DEIS,
    OLSS,
    DPMSolverPP,
    DPMSolverPPSingle,
    DPMSolverV3,
    DualFast,
    PseudoCorrector,
    RhoRK,
    SASolver,
    Schedule,
    Steps,
    UniPC,
)
from samplers.ems_numbers import Scalars

STATISTICS = Scalars(
    low=-9.0, high=9.0, l=(1.0, 0.9, 0.4, 0.1), s=(0.1, -0.2, -0.4, -0.6), b=(0.0, 0.2, -0.1, 0.0)
)
"""Made up, and for any model: the solver is of the same order with whatever statistics."""

FITTED = OLSS(noise=(1.0,) * STEPS, outputs=tuple((-1.0 / STEPS,) * (k + 1) for k in range(STEPS)))
"""Euler's steps on even levels of a flow, taken for whatever model."""

NO_LISTS = frozenset({"sd15", "sd15_v", "sd_controlnet", "sd_img2img", "sd_inpaint", "animatediff"})
"""Pipelines with a DDIM scheduler, which takes no list of noise levels; so do some others."""

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
    "samplers.DEIS": Row(
        engine="sampler",
        active=DEIS(),
        variants=(DEIS(order=4, form="iPNDM"), DEIS(order=3, form="lambdaAB")),
    ),
    "samplers.RhoRK": Row(
        engine="sampler",
        active=RhoRK(),
        variants=(RhoRK(order=2), RhoRK(order=4)),
    ),
    "samplers.UniPC": Row(
        engine="corrector",
        active=UniPC(order=2),
        variants=(UniPC(order=3, variant="bh1"), UniPC(order=2, corrector=False)),
    ),
    "samplers.PseudoCorrector": Row(
        engine="corrector",
        active=PseudoCorrector(),
        variants=(PseudoCorrector(heun=2),),
    ),
    "samplers.SASolver": Row(
        engine="corrector",
        active=SASolver(),
        variants=(SASolver(predictor_order=3, corrector_order=4, tau=0.0),),
    ),
    "samplers.OLSS": Row(
        engine="fitted",
        active=FITTED,
        variants=(
            FITTED.model_copy(
                update={
                    "path_timesteps": (900.0, 800.0, 600.0, 500.0, 300.0, 100.0),
                    "path_sigmas": (0.9, 0.8, 0.6, 0.5, 0.3, 0.1, 0.0),
                }
            ),
        ),
        idle=frozenset({"sd_img2img", "flux_img2img"}),  # they start in the middle
        fixed=True,
    ),
    "samplers.DPMSolverV3": Row(
        engine="statistics",
        active=DPMSolverV3(numbers=STATISTICS),
        variants=(
            DPMSolverV3(numbers=STATISTICS, order=3, corrector="same"),
            DPMSolverV3(numbers=STATISTICS, order=4, pseudo=True, corrector="none"),
        ),
        unready=frozenset({"*"}),
    ),
    "samplers.Schedule": Row(
        engine="schedule",
        active=Schedule(),
        variants=(Schedule(kind="uniform_lambda"), Schedule(kind="polynomial", rho=4.0)),
        refused=NO_LISTS | {"svd", "sana", "dit", "cogvideox"},  # svd chooses a Karras ramp
    ),
    "samplers.Steps": Row(
        engine="steps",
        active=Steps(share=0.5),
        variants=(Steps(share=0.7),),
    ),
    "samplers.DualFast": Row(
        engine="noise prediction",
        active=DualFast(c=0.5, target="all"),  # that of every scheduler, UniPC's too
        variants=(DualFast(c=0.5, target="all", reference="first", ramp="none"),),
        unready=frozenset({"wan21", "wan22"}),  # whose stock solver is UniPC
    ),
}
