"""Other people's caches, as they are called by their own documentation.

Each is put on before a picture and taken off after it, outside of the timed part; what a peer
leaves behind is measured at the end of a benchmark by `leaves_a_trace`. Sweeps go on until the
picture is another one (SSIM below 0.8): at each level of fidelity, then, the best peer is one that
could go no farther.
"""

from __future__ import annotations

import ast
import contextlib
import io
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

Enter = Callable[[Any, dict[str, Any]], AbstractContextManager[None]]


MAG_CURVES = (
    ("MagCache", 5, (0.06, 0.12, 0.24, 0.4, 0.7, 1.0, 2.0)),
    ("MagCache, 10 skips", 10, (0.4, 0.7, 1.0, 2.0)),
)
"""By curve: consecutive skips that are allowed, and thresholds. With 5 skips a threshold soon
changes nothing any more."""


@dataclass(frozen=True)
class Peer:
    """One setting of somebody's cache.

    Attributes:
        package: Whose it is.
        method: Name of the curve.
        knob: Value of what is swept.
        enter: Puts it on a pipeline, given a call's arguments, and off again.
    """

    package: str
    method: str
    knob: float
    enter: Enter


def of(pipe: Any, call: dict[str, Any]) -> list[Peer]:
    """All settings of all peers that run on a pipeline."""
    if hasattr(pipe, "unet"):
        return list(_deepcache())
    return [*_diffusers(pipe, call), *_cache_dit()]


def _native(config: Callable[[dict[str, Any]], Any]) -> Enter:
    @contextmanager
    def enter(pipe: Any, call: dict[str, Any]) -> Iterator[None]:
        pipe.transformer.enable_cache(config(call))
        try:
            yield
        finally:
            pipe.transformer.disable_cache()

    return enter


def _diffusers(pipe: Any, call: dict[str, Any]) -> Iterator[Peer]:
    from diffusers import FirstBlockCacheConfig, MagCacheConfig, TaylorSeerCacheConfig

    for knob in (0.02, 0.05, 0.08, 0.12, 0.2, 0.3, 0.5, 0.7, 1.0):
        config = FirstBlockCacheConfig(threshold=knob)
        yield Peer("diffusers", "FirstBlockCache", knob, _native(lambda _, c=config: c))
    for every in (2, 3, 4, 5, 6, 8, 10):
        taylor = TaylorSeerCacheConfig(
            cache_interval=every, disable_cache_before_step=3, max_order=1
        )
        yield Peer("diffusers", "TaylorSeer", every, _native(lambda _, c=taylor: c))
    ratios = _magnitudes(pipe, call)
    for name, skips, knobs in MAG_CURVES:
        for knob in knobs:

            def mag(call: dict[str, Any], knob: float = knob, skips: int = skips) -> MagCacheConfig:
                return MagCacheConfig(
                    threshold=knob,
                    max_skip_steps=skips,
                    num_inference_steps=call["num_inference_steps"],
                    mag_ratios=ratios,
                )

            yield Peer("diffusers", name, knob, _native(mag))


def _magnitudes(pipe: Any, call: dict[str, Any]) -> torch.Tensor:
    """MagCache's own calibration on one caption: it prints its ratios."""
    from diffusers import MagCacheConfig

    steps = call["num_inference_steps"]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        pipe.transformer.enable_cache(MagCacheConfig(calibrate=True, num_inference_steps=steps))
        pipe("a house on green hills at noon", **call)
        pipe.transformer.disable_cache()
    lists = [line for line in printed.getvalue().splitlines() if line.startswith("[")]
    return torch.tensor(ast.literal_eval(lists[-1]))


def _cache_dit() -> Iterator[Peer]:
    import cache_dit

    logging.disable(logging.WARNING)  # its loggers say the same at every picture
    forms = {"DBCache F1B0": (1, None), "DBCache F3B0": (3, None), "DBCache F1B0 + Taylor": (1, 1)}
    for name, (front, order) in forms.items():
        for knob in (0.04, 0.08, 0.12, 0.2, 0.3, 0.5, 0.7, 1.0):
            yield Peer("cache-dit", name, knob, _dbcache(cache_dit, front, order, knob))


def _dbcache(cache_dit: Any, front: int, order: int | None, threshold: float) -> Enter:
    @contextmanager
    def enter(pipe: Any, call: dict[str, Any]) -> Iterator[None]:
        config = cache_dit.DBCacheConfig(
            Fn_compute_blocks=front,
            Bn_compute_blocks=0,
            residual_diff_threshold=threshold,
            max_warmup_steps=3,
            num_inference_steps=call["num_inference_steps"],
            enable_separate_cfg=True,
        )
        calibrator = order and cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=order)
        cache_dit.enable_cache(pipe, cache_config=config, calibrator_config=calibrator or None)
        try:
            yield
        finally:
            cache_dit.disable_cache(pipe)

    return enter


def _deepcache() -> Iterator[Peer]:
    for branch in (0, 1):
        for every in (2, 3, 4, 5, 7, 10):
            name = f"DeepCache branch {branch}"
            yield Peer("DeepCache", name, every, _deepcache_helper(branch, every))


def _deepcache_helper(branch: int, every: int) -> Enter:
    @contextmanager
    def enter(pipe: Any, call: dict[str, Any]) -> Iterator[None]:  # noqa: ARG001
        from DeepCache import DeepCacheSDHelper

        helper = DeepCacheSDHelper(pipe=pipe)
        helper.set_params(cache_interval=every, cache_branch_id=branch)
        helper.enable()
        try:
            yield
        finally:
            helper.disable()

    return enter
