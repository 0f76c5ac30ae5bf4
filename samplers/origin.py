"""Reading the config of any stock diffusers scheduler as settings of ours.

What a config says about the *model* (its process, its table, what it predicts) is kept even where
it is a default of the class that wrote it. What it says about *how to sample* (spacing, ramps,
thresholding) is kept where somebody set it, as diffusers does between its own schedulers. What
only concerns the solver of the other class stays in the config unread.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from accel.errors import BadInput

MODEL_FACTS = frozenset(
    {
        "num_train_timesteps",
        "beta_start",
        "beta_end",
        "beta_schedule",
        "trained_betas",
        "rescale_betas_zero_snr",
        "snr_shift_scale",
        "timestep_type",
        "prediction_type",
        "variance_type",
        "shift",
        "flow_shift",
        "use_flow_sigmas",
        "use_dynamic_shifting",
        "time_shift_type",
        "base_shift",
        "max_shift",
        "base_image_seq_len",
        "max_image_seq_len",
        "shift_terminal",
        "invert_sigmas",
    }
)

READ_HERE = frozenset({"use_flow_sigmas", "flow_shift", "final_sigmas_type", "use_lu_lambdas"})
"""Names of stock settings that are translated rather than taken over."""

SAID = frozenset({"use_lu_lambdas"})
"""Those of them that one of ours says as well to the stock: both would be a ramp too many."""


def settings_from(config: Mapping[str, Any], **replaced: Any) -> dict[str, Any]:
    """Translate a scheduler's config; one of ours comes back as it is.

    Args:
        config: ``scheduler.config``, or the content of a ``scheduler_config.json``.
        **replaced: Settings that replace those of ``config``.

    Returns:
        Settings under our names, and the entries that are left over.

    Raises:
        BadInput: If the process is neither variance-preserving nor a rectified flow.
    """
    import diffusers

    import samplers

    name = str(config.get("_class_name", "given"))
    source = getattr(diffusers, name, None)
    unset = set(config.get("_use_default_values", ())) - set(replaced)
    written = {key: value for key, value in config.items() if not key.startswith("_")} | replaced
    chosen = {key: value for key, value in written.items() if key not in unset}
    if name in samplers.__all__:
        return chosen
    everything = _defaults(source) | written
    facts = {key: value for key, value in everything.items() if key in MODEL_FACTS}
    settings = facts | chosen
    if "shift" in settings and not {"beta_schedule", "flow_shift"} & set(settings):
        return _flow(name, settings)
    if settings.get("use_flow_sigmas") or settings.get("prediction_type") == "flow_prediction":
        kept = {key: value for key, value in replaced.items() if key not in READ_HERE}
        return _shared_flow(name, settings) | kept
    if "beta_schedule" not in settings:
        raise BadInput(
            f"The {name} config describes a process that is neither variance-preserving with a β "
            "table nor a rectified flow. Keep the pipeline's own scheduler, or pass the config of "
            "a scheduler that has either."
        )
    _even_in_lambda(settings)
    return settings


def _even_in_lambda(settings: dict[str, Any]) -> None:
    """Lu's steps, even in λ, under the name that they have here."""
    if settings.pop("use_lu_lambdas", False):
        settings["use_exponential_sigmas"] = True


def _defaults(source: Any) -> dict[str, Any]:
    """The defaults of a stock class: a config file may leave them out."""
    if source is None:
        return {}
    parameters = inspect.signature(source.__init__).parameters
    return {
        key: parameter.default
        for key, parameter in parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }


def _flow(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of a flow, whatever kind of scheduler described it."""
    settings = {"prediction_type": "flow_prediction"} | settings
    if settings["prediction_type"] != "flow_prediction":
        raise BadInput(
            f"The {name} config describes a flow with prediction_type="
            f"{settings['prediction_type']!r}; only flow_prediction is served. Keep the "
            "pipeline's own scheduler if its network predicts something else."
        )
    return settings


def _shared_flow(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Flow settings of the schedulers that serve both processes (DPM-Solver, UniPC, DEIS, …).

    A ramp (``use_karras_sigmas``, …) becomes that of the flow scheduler: between the ends of the
    flow's own grid. These classes make theirs between the ends of a table of β, which is no part of
    a flow, so that a run does not start from pure noise.
    """
    if not settings.get("use_flow_sigmas"):
        raise BadInput(
            f"The {name} config has prediction_type='flow_prediction' without "
            "use_flow_sigmas=True; it needs both to describe a flow. Pass use_flow_sigmas=True."
        )
    end = settings.pop("final_sigmas_type", "zero")
    if end != "zero":
        raise BadInput(
            f"The {name} config ends at final_sigmas_type={end!r}; a flow ends at zero. Pass "
            "final_sigmas_type='zero'."
        )
    del settings["use_flow_sigmas"]
    _even_in_lambda(settings)
    for key in ("sigma_min", "sigma_max"):  # σ/α in these classes
        if settings.get(key) is not None:
            settings[key] = settings[key] / (1.0 + settings[key])
    theirs = {"shift": settings.pop("flow_shift", 1.0), "timestep_spacing": "trailing"}
    return _flow(name, settings | theirs)
