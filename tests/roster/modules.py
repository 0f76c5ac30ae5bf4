"""Caches of single modules: attention and feed-forward."""

from accel import cache
from roster.row import Row

ALL = {"low": -1e9, "high": 1e9}  # schedulers differ in what a timestep is

ROWS = {
    "cache.FORA": Row(
        engine="modules",
        active=cache.FORA(interval=2),
        variants=(
            cache.FORA(interval=3, warmup=2, predictor="newton", last=True),
            cache.FORA(interval=3, keep="bfloat16", max_skips=1),
        ),
    ),
    "cache.PAB": Row(
        engine="modules",
        active=cache.PAB(spatial=2, temporal=3, cross=3, mlp=2, **ALL),
        variants=(cache.PAB(spatial=3, cross=1, **ALL),),
    ),
    "cache.TaylorSeer": Row(
        engine="modules",
        active=cache.TaylorSeer(interval=2, warmup=1),
        variants=(
            cache.TaylorSeer(interval=3, warmup=2, order=2, last=True),
            cache.TaylorSeer(interval=2, warmup=1, site="network"),
        ),
    ),
    "cache.HiCache": Row(
        engine="modules",
        active=cache.HiCache(interval=2, warmup=1),
        variants=(cache.HiCache(interval=2, warmup=1, order=1, site="network"),),
    ),
    "cache.FoCa": Row(
        engine="modules",
        active=cache.FoCa(interval=2, warmup=1),
        variants=(cache.FoCa(interval=3, warmup=2, site="network"),),
    ),
    "cache.DMD": Row(
        engine="modules",
        active=cache.DMD(interval=2, site="modules"),
        variants=(cache.DMD(interval=2),),
    ),
    "cache.Table": Row(
        engine="modules",
        active=cache.Table(steps=("1111", "0000", "1010", "0101"), by="kind", stretch=True),
        variants=(cache.Table(steps=("1111", "1011", "0000"), by="kind", stretch=True, last=True),),
    ),
}
