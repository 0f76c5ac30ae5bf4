"""The public API is frozen: what users write stays true."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import accel
import parallel
import samplers
from accel import errors
from accel.plan import PRESETS

ROOT = Path(__file__).parent.parent


def test_names():
    assert set(accel.__all__) == {
        "Accelerator",
        "Guard",
        "Plan",
        "Report",
        "Run",
        "Site",
        "asset",
        "attention",
        "cache",
        "edit",
        "errors",
        "explain",
        "guidance",
        "load",
        "loop",
        "memory",
        "methods",
        "prove",
        "region",
        "resolution",
        "tokens",
        "tune",
        "weights",
    }
    assert all(hasattr(accel, name) for name in accel.__all__)
    assert sorted(accel.cache.__all__) == [
        "Custom",
        "DBCache",
        "DMD",
        "DeepCache",
        "DeltaDiT",
        "EasyCache",
        "FORA",
        "FirstBlock",
        "FoCa",
        "HiCache",
        "MagCache",
        "PAB",
        "SADA",
        "StepRehash",
        "Table",
        "TaylorSeer",
        "TeaCache",
        "TextKV",
        "ZEUS",
    ]
    assert accel.guidance.__all__ == [
        "Adaptive",
        "CFGCache",
        "Interval",
        "LinearAG",
        "Residual",
        "SkipAtOne",
    ]
    assert accel.attention.__all__ == [
        "GRAT",
        "SVG",
        "SVG2",
        "AdaSpa",
        "Backend",
        "Neighbourhood",
        "Pattern",
        "Radial",
        "Searched",
        "SpargeAttn",
    ]
    assert accel.memory.__all__ == [
        "FeatureSlicing",
        "GroupOffload",
        "LayerwiseCasting",
        "OperatorGrouping",
    ]
    assert accel.tokens.__all__ == ["SADA", "Importance", "ToDo", "ToMA", "ToMe", "Transforming"]
    assert samplers.__all__ == [
        "DEIS",
        "OLSS",
        "DEISScheduler",
        "DPMSolverPP",
        "DPMSolverPPScheduler",
        "DPMSolverPPSingle",
        "DPMSolverPPSingleScheduler",
        "DPMSolverV3",
        "DPMSolverV3Scheduler",
        "DualFast",
        "OLSSScheduler",
        "PseudoCorrector",
        "PseudoCorrectorScheduler",
        "RhoRK",
        "RhoRKScheduler",
        "SASolver",
        "SASolverScheduler",
        "Schedule",
        "Steps",
        "UniPC",
        "UniPCScheduler",
    ]


APART = {"samplers": samplers, "parallel": parallel}
"""Families that are packages of their own."""


def test_every_method_is_reached_by_its_name():
    for name, kind in accel.methods().items():
        family, method = name.split(".")
        home = APART.get(family) or getattr(accel, family)
        assert getattr(home, method) is kind
        assert kind.name == name


def test_presets():
    assert PRESETS == ("exact", "balanced", "fast", "fastest")
    plans = [accel.Plan.preset(name) for name in PRESETS]
    assert len(plans[0]) == 0
    assert len(set(plans)) == len(plans)
    with pytest.raises(errors.PlanError, match="exact, balanced, fast, fastest"):
        accel.Plan.preset("warp")


def test_every_error_is_ours_and_in_the_tree():
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    for kind in kinds:
        if issubclass(kind, Exception) and not issubclass(kind, Warning):
            assert issubclass(kind, errors.AccelError)
            assert kind.__name__ in errors.__doc__


def test_importing_is_light():
    code = (
        "import sys, accel, samplers; accel.methods(); accel.Plan.preset('fast');"
        "sys.exit(any(name in sys.modules for name in ('torch', 'diffusers', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_wheel_carries_the_assets(tmp_path):
    """Installed from a wheel, away from the checkout, the bundled model and presets are found."""
    from hatchling.builders.wheel import WheelBuilder

    (wheel,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r}); import accel;"
        "folder = accel.asset('models/scenes-flux');"
        "accel.Plan.preset('balanced');"
        f"assert str(folder).startswith({str(site)!r}), folder;"
        "from accel.bundled import call_of, check_folder; check_folder(folder);"
        "assert call_of(folder)['num_inference_steps'] == 28"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
