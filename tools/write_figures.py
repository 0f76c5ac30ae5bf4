"""Write assets/figures.json: what was measured of the presets, made from benchmarks/results.

python tools/write_figures.py

Taken is each result of a bundled model whose plan equals a preset's; of several of one model that
of the most captions. A result does not say which weights it is of: it is taken to be of the
bundled ones, and refused where they were trained anew after this file was first made from it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import accel
from accel.expected import ASSET, Figures, Measured
from accel.plan import PRESETS
from accel.tuned import Network, numbers_of

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
FILES = ("presets-{model}.json", "caches-{model}.json", "guidance-{model}.json")
MODELS = ("scenes-flux", "scenes-unet", "scenes-wan")


def figures() -> tuple[Figures, ...]:
    """The best result of each preset and model."""
    found: dict[tuple[str, str], Figures] = {}
    for model in MODELS:
        for one in _all(model):
            known = found.get((model, one.plan))
            if known is None or one.captions > known.captions:
                found[model, one.plan] = one
    return tuple(found.values())


def sources(found: tuple[Figures, ...]) -> dict[str, str]:
    """By file, a digest of the results that were used."""
    names = sorted({one.source for one in found})
    return {name: hashlib.sha256((RESULTS / name).read_bytes()).hexdigest()[:16] for name in names}


def _all(model: str) -> Iterator[Figures]:
    presets = {accel.Plan.preset(name) for name in PRESETS}
    for path in (RESULTS / name.format(model=model) for name in FILES):
        if not path.is_file():
            continue
        result = json.loads(path.read_text())
        for row in _rows(result):
            plan = None if row.get("plan") is None else accel.Plan.from_dict(row["plan"])
            if plan in presets and row.get("package", "diffusers-accel") == "diffusers-accel":
                yield _figures(model, plan, row, result, path.name)


def _rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The settings of a result, without stock itself."""
    if "rows" in result:
        return list(result["rows"])
    return [row for name, row in result["variants"].items() if name != "stock"]


def _figures(
    model: str, plan: accel.Plan, row: dict[str, Any], result: dict[str, Any], source: str
) -> Figures:
    speedup, machine = row["speedup"], result["machine"]
    return Figures(
        model=model,
        plan=plan.digest,
        speedup=speedup["median"],
        low=speedup["low"],
        high=speedup["high"],
        ssim=row["ssim"],
        ssim_worst=row.get("ssim_worst"),
        psnr=row["psnr"],
        nfe=row.get("nfe"),
        stock_nfe=result["variants"]["stock"]["nfe"] if "variants" in result else None,
        captions=len(result["captions"]) if "captions" in result else speedup["repeats"],
        call=dict(numbers_of(result["call"])),
        machine=f"{machine['device']}, {machine['processor']}, {machine['threads']} threads",
        date=machine["date"],
        source=source,
    )


def networks(found: tuple[Figures, ...]) -> dict[str, Network]:
    """What the bundled models are."""
    models = dict.fromkeys(one.model for one in found)
    return {model: Network.of(accel.load(model)[0]) for model in models}


def check(before: dict[str, Any], now: dict[str, Network], used: dict[str, str]) -> None:
    """Refuse results that are older than the weights."""
    from accel.seams.identity import difference

    for name, network in now.items():
        known = before["networks"].get(name)
        stale = [
            file
            for file, digest in used.items()
            if name in file and before["sources"].get(file) == digest
        ]
        if known and stale and difference(known["identity"], network.identity):
            raise SystemExit(
                f"{name} was trained anew since {', '.join(stale)} was measured: run that "
                "benchmark again, or remove the result."
            )


def main() -> None:
    """Write the asset."""
    from pydantic import TypeAdapter

    path = ROOT / "assets" / ASSET
    found = figures()
    document = Measured(networks(found), found, sources(found))
    if path.is_file():
        check(json.loads(path.read_text()), document.networks, document.sources)
    text = TypeAdapter(Measured).dump_json(document, indent=1).decode()
    path.write_text(text + "\n")
    print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
