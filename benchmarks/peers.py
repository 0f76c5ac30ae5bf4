"""Other people's accelerators, as they are called by their own documentation.

`of` are the caches; `every` adds what else there is: tomesd, stock schedulers that need fewer
steps, and `torch.compile` alone. What is not installed, or does not serve a pipeline, is named
with the reason by `absent`.

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
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch

Enter = Callable[[Any, dict[str, Any]], AbstractContextManager[None]]


COMPILED = "torch.compile"
"""Whose pipeline has compiled blocks."""

PACKAGES = {"cache_dit": "cache-dit", "DeepCache": "DeepCache", "tomesd": "tomesd"}
"""By the name that is imported: peers that the extra ``bench`` brings."""

RATIOS = (0.1, 0.25, 0.5, 0.6, 0.75)
"""Shares of tokens that tomesd merges."""

FEWER = (20, 16, 14, 12, 10, 8)
"""Steps of those who take fewer."""

LEVELS = 2
"""Levels of a UNet where tokens are merged: scenes-unet, as SDXL, has no attention at the first."""

MASKS = ("slow", "medium", "fast", "ultra")
"""The presets of cache-dit: which steps of a run are computed."""

PRESETS = "presets from slow, 1, to ultra, 4,"

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
        call: What it asks of the pipeline: fewer steps.
        apart: What it spends once, before anything is timed; it is known after its first entering.
    """

    package: str
    method: str
    knob: float
    enter: Enter
    call: dict[str, Any] = field(default_factory=dict)
    apart: dict[str, float] = field(default_factory=dict)


def of(pipe: Any, call: dict[str, Any]) -> list[Peer]:
    """All settings of all caches that run on a pipeline."""
    if hasattr(pipe, "unet"):
        return list(_deepcache()) if find_spec("DeepCache") else []
    return [*_diffusers(pipe, call), *(_cache_dit() if find_spec("cache_dit") else ())]


def every(pipe: Any, call: dict[str, Any]) -> list[Peer]:
    """All settings of all peers that run on a pipeline."""
    merged = _tomesd_ratios() if hasattr(pipe, "unet") and find_spec("tomesd") else ()
    return [*of(pipe, call), *merged, *_schedulers(call), _compile()]


def scheduled(pipe: Any, call: dict[str, Any]) -> list[Peer]:
    """Those that decide beforehand what they compute: no calibration, no look at an answer."""
    if hasattr(pipe, "unet"):
        merged = _tomesd_ratios() if find_spec("tomesd") else ()
        return [*of(pipe, call), *merged]
    masked = [*_cache_dit()] if find_spec("cache_dit") else []
    return [*_taylor(), *_by_timestep(pipe), *masked]


def absent(pipe: Any) -> dict[str, str]:
    """By peer, why it is left out."""
    found = {
        name: "it is not installed; the extra 'bench' brings it"
        for module, name in PACKAGES.items()
        if find_spec(module) is None
    }
    if hasattr(pipe, "unet"):
        none = "it serves transformers alone; this is a UNet"
        return {"cache-dit": none, "diffusers' caches": none} | found
    none = "it serves UNets alone; this is a transformer"
    return {"DeepCache": none, "tomesd": none} | found


def _native(config: Callable[[Any, dict[str, Any]], Any]) -> Enter:
    @contextmanager
    def enter(pipe: Any, call: dict[str, Any]) -> Iterator[None]:
        pipe.transformer.enable_cache(config(pipe, call))
        try:
            yield
        finally:
            pipe.transformer.disable_cache()

    return enter


def _diffusers(pipe: Any, call: dict[str, Any]) -> Iterator[Peer]:
    from diffusers import FirstBlockCacheConfig, MagCacheConfig

    for knob in (0.02, 0.05, 0.08, 0.12, 0.2, 0.3, 0.5, 0.7, 1.0):
        config = FirstBlockCacheConfig(threshold=knob)
        yield Peer("diffusers", "FirstBlockCache", knob, _native(lambda *_, c=config: c))
    yield from _taylor()
    ratios = _magnitudes(pipe, call)
    for name, skips, knobs in MAG_CURVES:
        for knob in knobs:

            def mag(
                _: Any, call: dict[str, Any], knob: float = knob, skips: int = skips
            ) -> MagCacheConfig:
                return MagCacheConfig(
                    threshold=knob,
                    max_skip_steps=skips,
                    num_inference_steps=call["num_inference_steps"],
                    mag_ratios=ratios,
                )

            yield Peer("diffusers", name, knob, _native(mag))
    yield from _by_timestep(pipe)


def _taylor() -> Iterator[Peer]:
    from diffusers import TaylorSeerCacheConfig

    for every in (2, 3, 4, 5, 6, 8, 10):
        config = TaylorSeerCacheConfig(
            cache_interval=every, disable_cache_before_step=3, max_order=1
        )
        yield Peer("diffusers", "TaylorSeer", every, _native(lambda *_, c=config: c))


def _by_timestep(pipe: Any) -> Iterator[Peer]:
    """Those that ask the pipeline where it is; ranges of timesteps as they come."""
    from diffusers import FasterCacheConfig, PyramidAttentionBroadcastConfig

    for every in (2, 3, 4, 6, 8, 12):

        def broadcast(
            pipe: Any, _: dict[str, Any], every: int = every
        ) -> PyramidAttentionBroadcastConfig:
            return PyramidAttentionBroadcastConfig(
                spatial_attention_block_skip_range=every,
                cross_attention_block_skip_range=every,
                current_timestep_callback=lambda: pipe.current_timestep,
            )

        yield Peer("diffusers", "PyramidAttentionBroadcast", every, _native(broadcast))
    layout = "BCFHW" if _has_frames(pipe) else "BCHW"
    for every in (2, 3, 4, 5, 6, 8):

        def faster(pipe: Any, _: dict[str, Any], every: int = every) -> FasterCacheConfig:
            return FasterCacheConfig(
                spatial_attention_block_skip_range=every,
                unconditional_batch_skip_range=every,
                attention_weight_callback=lambda _: 0.3,
                tensor_format=layout,
                is_guidance_distilled=True,  # two calls a step: it has no batch to split
                current_timestep_callback=lambda: pipe.current_timestep,
            )

        yield Peer("diffusers", "FasterCache", every, _native(faster))


def _has_frames(pipe: Any) -> bool:
    """Whether it draws clips."""
    return hasattr(pipe, "vae_scale_factor_temporal")


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

    for knob in (0.04, 0.08, 0.12, 0.2, 0.3, 0.5, 0.7, 1.0):
        yield Peer("cache-dit", "DBCache F1B0 + DMD", knob, _with_dmd(cache_dit, knob))
    for knob in (0.01, 0.02, 0.04, 0.08, 0.15, 0.3):
        yield Peer("cache-dit", "DBPrune F1B0", knob, _dbprune(cache_dit, knob))
    for policy in ("static", "dynamic"):
        for place, mask in enumerate(MASKS, 1):
            name = f"{PRESETS} {policy}"
            yield Peer("cache-dit", name, place, _masked(cache_dit, mask, policy))


def _put_on(cache_dit: Any, config: Callable[[dict[str, Any]], Any], calibrator: Any) -> Enter:
    @contextmanager
    def enter(pipe: Any, call: dict[str, Any]) -> Iterator[None]:
        cache_dit.enable_cache(pipe, cache_config=config(call), calibrator_config=calibrator)
        try:
            yield
        finally:
            cache_dit.disable_cache(pipe)

    return enter


def _with_dmd(cache_dit: Any, threshold: float) -> Enter:
    def config(call: dict[str, Any]) -> Any:
        return cache_dit.DBCacheConfig(
            Fn_compute_blocks=1,
            residual_diff_threshold=threshold,
            max_warmup_steps=3,
            num_inference_steps=call["num_inference_steps"],
            enable_separate_cfg=True,
        )

    return _put_on(cache_dit, config, cache_dit.DMDCalibratorConfig())


def _dbprune(cache_dit: Any, threshold: float) -> Enter:
    def config(call: dict[str, Any]) -> Any:
        return cache_dit.DBPruneConfig(
            Fn_compute_blocks=1,
            residual_diff_threshold=threshold,
            max_warmup_steps=3,
            num_inference_steps=call["num_inference_steps"],
            enable_separate_cfg=True,
        )

    return _put_on(cache_dit, config, None)


def _masked(cache_dit: Any, mask: str, policy: str) -> Enter:
    """A preset: which steps are computed, and whether the others may be."""

    def config(call: dict[str, Any]) -> Any:
        steps = call["num_inference_steps"]
        return cache_dit.DBCacheConfig(
            Fn_compute_blocks=1,
            max_warmup_steps=0,
            num_inference_steps=steps,
            enable_separate_cfg=True,
            steps_computation_mask=cache_dit.steps_mask(total_steps=steps, mask_policy=mask),
            steps_computation_policy=policy,
        )

    return _put_on(cache_dit, config, cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=1))


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


def _tomesd_ratios() -> Iterator[Peer]:
    for ratio in RATIOS:
        yield Peer("tomesd", "ToMe", ratio, tomesd_at(ratio))


def tomesd_at(ratio: float) -> Enter:
    """Merges that share of the tokens."""

    @contextmanager
    def enter(pipe: Any, call: dict[str, Any]) -> Iterator[None]:  # noqa: ARG001
        import tomesd

        tomesd.apply_patch(pipe, ratio=ratio, max_downsample=LEVELS)
        try:
            yield
        finally:
            tomesd.remove_patch(pipe)

    return enter


def _schedulers(call: dict[str, Any]) -> Iterator[Peer]:
    """Stock schedulers of higher order, which need fewer steps than the pipeline's own."""
    for name in ("DPMSolverMultistep", "UniPCMultistep"):
        for steps in FEWER:
            if steps <= call["num_inference_steps"]:
                fewer = {"num_inference_steps": steps}
                curve = f"{name}, steps"
                yield Peer("diffusers", curve, steps, _scheduler(name), call=fewer)


def _scheduler(name: str) -> Enter:
    @contextmanager
    def enter(pipe: Any, call: dict[str, Any]) -> Iterator[None]:  # noqa: ARG001
        from sampling import stock

        with stock(pipe, name):
            yield

    return enter


def bfloat16() -> Peer:
    """A pipeline in half precision, by one line of PyTorch; it is this peer's own, and stays so."""

    @contextmanager
    def enter(pipe: Any, _call: dict[str, Any]) -> Iterator[None]:
        pipe.to(torch.bfloat16)
        yield

    return Peer("PyTorch", "bfloat16", 0, enter)


def _compile() -> Peer:
    apart: dict[str, float] = {}

    @contextmanager
    def enter(pipe: Any, call: dict[str, Any]) -> Iterator[None]:
        network = getattr(pipe, "unet", None) or pipe.transformer
        if not _is_compiled(network):
            apart["compile_seconds"] = _compiled(pipe, network, call)
        yield  # it stays on: the pipeline is this peer's own

    return Peer(COMPILED, "repeated blocks", 0, enter, apart=apart)


def _is_compiled(network: Any) -> bool:
    return any(module._compiled_call_impl is not None for module in network.modules())


def _compiled(pipe: Any, network: Any, call: dict[str, Any]) -> float:
    """Compile the repeated blocks, all shapes of a call; the seconds beyond those of its steps."""
    few = call | {"num_inference_steps": 2}
    network.compile_repeated_blocks(fullgraph=True)
    seconds = []
    for _ in range(2):
        begin = time.perf_counter()
        pipe("a house", **few)
        seconds.append(time.perf_counter() - begin)
    return max(0.0, seconds[0] - seconds[1])
