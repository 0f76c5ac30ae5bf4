"""Write what is generated: docs/methods.md and the tables in README.md.

python tools/write_docs.py [--check]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import accel
from accel.attach import LAYERS, Accelerator

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
METHODS = ROOT / "docs" / "methods.md"
TUNED = ROOT / "benchmarks" / "tuned"
RESULTS = ROOT / "benchmarks" / "results"


def ordered() -> list[type[Accelerator]]:
    """Every method of this project in the order of the onion."""
    kinds = accel.methods().values()
    ours = (
        kind for kind in kinds if kind.__module__.split(".")[0] in ("accel", "samplers", "parallel")
    )
    return sorted(ours, key=lambda kind: (LAYERS.index(kind.layer), kind.name))


def summary(kind: type[Accelerator]) -> str:
    """First line of a method's docstring."""
    return (kind.__doc__ or "").strip().splitlines()[0]


def methods_table() -> str:
    """The README's table of methods."""
    rows = ["| Method | Layer | What it does | Serves |", "|---|---|---|---|"]
    rows += [
        f"| `{kind.name}` | {kind.layer} | {summary(kind)} | {kind.supports} |"
        for kind in ordered()
    ]
    return "\n".join(rows)


def limits(schema: dict[str, Any]) -> str:
    """A field's range in words."""
    if "anyOf" in schema:
        return "; ".join(filter(None, map(limits, schema["anyOf"])))
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    signs = {
        "minimum": "≥",
        "exclusiveMinimum": ">",
        "maximum": "≤",
        "exclusiveMaximum": "<",
    }
    return ", ".join(f"{sign} {schema[key]:g}" for key, sign in signs.items() if key in schema)


def section(kind: type[Accelerator]) -> str:
    """One method in docs/methods.md."""
    rows = ["| Field | Default | Range | Meaning |", "|---|---|---|---|"]
    properties = kind.model_json_schema()["properties"]
    for name, field in kind.model_fields.items():
        default = field.default
        rows.append(
            f"| `{name}` | `{default}` | {limits(properties[name])} | {field.description or ''} |"
        )
    body = "\n".join(line.strip() for line in (kind.__doc__ or "").strip().splitlines())
    return (
        f"## {kind.name}\n\n{body}\n\n* layer: {kind.layer}; seam: {kind.seam}\n"
        f"* serves: {kind.supports}\n* source: {kind.source}\n\n" + "\n".join(rows) + "\n"
    )


def methods_page() -> str:
    """docs/methods.md."""
    head = (
        "# Methods\n\nWritten by `python tools/write_docs.py` from the methods themselves, "
        "outermost layer first.\n\n"
    )
    return head + "\n".join(section(kind) for kind in ordered())


def honest_table() -> str:
    """For each level of SSIM the fastest of each class that holds it on captions unseen."""
    sides = "Ours alone | Ours together | Best peer | Stock in fewer steps"
    rows = [
        f"| Model | SSIM at least | {sides} | Ours over peer |",
        "|---|---|---|---|---|---|---|",
    ]
    paths = sorted(RESULTS.glob("table-*.json"))
    for path in paths:
        result = json.loads(path.read_text())
        model = f"[{result['model']}](benchmarks/results/{path.stem}.md)"
        for level in (_further(result) or result)["levels"]:
            best = level["best"]
            held = (_held(best[side]) for side in ("single", "composed", "peer", "steps"))
            cells = (model, f"{level['level']:g}", *held, _over_peer(level))
            rows.append(f"| {' | '.join(cells)} |")
    told = (json.loads(path.read_text()) for path in paths)
    rows += [f"\n{' '.join(_measured(one) for one in told)}"]
    return "\n".join(rows)


def _further(result: dict[str, Any]) -> dict[str, Any] | None:
    """What more captions say of a table's fastest, where they were drawn."""
    path = RESULTS / f"further-{result['model']}.json"
    found: dict[str, Any] | None = json.loads(path.read_text()) if path.exists() else None
    return found


def _held(best: dict[str, Any] | None) -> str:
    """A row as the README tells it: its name, what it is made of, and how fast it is."""
    if best is None:
        return "none"
    speed, made = f"{best['speedup']['median']:.2f}×", ()
    if best["package"] == "stock":
        return f"{best['knob']:g} steps {speed}"
    if best["method"].startswith(("preset ", "tuned ")):
        made = best["made_of"]
    parts = [
        *([f"{best['package']}:"] if best["package"] != "diffusers-accel" else []),
        best["method"],
        *([f"{best['knob']:g}"] if best["knob"] else []),
        *([f"({' + '.join(made)})"] if made else []),
        speed,
    ]
    return " ".join(parts)


def _over_peer(level: dict[str, Any]) -> str:
    best = level["best"]
    ours = [one["speedup"]["median"] for one in (best["single"], best["composed"]) if one]
    if best["peer"] is None or not ours:
        return "–"
    ratio = f"{max(ours) / best['peer']['speedup']['median']:.2f}×"
    return f"{ratio} (a peer's sweep ends above)" if level["censored"] else ratio


def _measured(result: dict[str, Any]) -> str:
    machine, drawn = result["machine"], result["stock"]
    counts = f"{drawn['sweep']['captions']} captions in the sweep"
    if all(level["verified"] for level in result["levels"]):
        counts += f", {drawn['held-out']['captions']} that it had not seen for the fastest"
    else:
        counts += " alone, on captions that it had not seen nobody is verified to the end"
    where = f"{machine['date']}, {machine['processor']}, {_threads(machine)}"
    return f"{result['model']}: {counts}; {where}{_more(result)}."


def _more(result: dict[str, Any]) -> str:
    further = _further(result)
    if further is None:
        return ""
    told = f"further-{result['model']}.md"
    return (
        f"; their fidelity is of [{sum(further['captions'].values())} captions]"
        f"(benchmarks/results/{told}), the further ones drawn untimed on "
        f"{further['machine']['processor']}"
    )


def _threads(machine: dict[str, Any]) -> str:
    return "1 thread" if machine["threads"] == 1 else f"{machine['threads']} threads"


def results_table() -> str:
    """The README's table of measured presets."""
    results = {
        path: json.loads(path.read_text()) for path in sorted(RESULTS.glob("presets-scenes-*.json"))
    }
    levels = list(next(iter(results.values()))["variants"]["stock"]["share"])
    heads = ("Model", "Preset", "Seconds", "Speed-up (quartiles)", "NFE", "PSNR", "SSIM (worst)")
    heads += (*(f"≥ {level}" for level in levels), "Captions right")
    rows = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for path, result in results.items():
        model = path.stem.removeprefix("presets-")
        rows += [_preset(model, name, row) for name, row in result["variants"].items()]
    return "\n".join([*rows, *(f"\n{_how_presets(result)}" for result in results.values())])


def _preset(model: str, name: str, row: dict[str, Any]) -> str:
    """A line of the table of presets."""
    fast = row["speedup"]
    cells = [model, name, f"{row['seconds']['median']:.2f}"]
    cells += [f"{fast['median']:.2f}× ({fast['low']:.2f}–{fast['high']:.2f})", f"{row['nfe']:.1f}"]
    cells += ["identical" if row["psnr"] >= 100 else f"{row['psnr']:.1f}"]
    cells += [f"{row['ssim']:.3f} ({row['ssim_worst']:.3f})"]
    cells += [_percent(share) for share in row["share"].values()]
    return f"| {' | '.join(cells)} | {100 * row['caption_accuracy']:.1f} % |"


def _how_presets(result: dict[str, Any]) -> str:
    """How presets were measured."""
    machine = result["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    captions = result["variants"]["stock"]["seconds"]["repeats"]
    return (
        f"{captions} held-out captions, {result['call']['num_inference_steps']} steps, measured "
        f"{machine['date']} on {machine['processor']}, {_threads(machine)} "
        f"({versions}) with `{result['command']}`."
    )


def tuned_table() -> str:
    """The README's table of tuned plans: what each promises, on prompts its search never saw."""
    plans = {path: accel.Plan.from_toml(path.read_text()) for path in sorted(TUNED.glob("*.toml"))}
    rows = [
        "| Model | Target | Plan | Times as fast (95 %) | SSIM | Prompts that hold | Others |",
        "|---|---|---|---|---|---|---|",
    ]
    for path, plan in plans.items():
        assert plan.tuned is not None
        fast, near = plan.tuned.figure("speedup"), plan.tuned.figure("ssim")
        model, _, level = path.stem.rpartition("-")
        link = f"[{level}]({path.relative_to(ROOT)})"
        names = " + ".join(method.name for method in plan)
        speed = f"{fast.mean:.2f}× ({fast.low:.2f}–{fast.high:.2f})"
        shares = (_percent(near.share), _percent(_elsewhere(model, level, plan)))
        cells = (model, f"SSIM ≥ {link}", names, speed, f"{near.mean:.3f}", *shares)
        rows.append(f"| {' | '.join(cells)} |")
    told = [plan.tuned for plan in plans.values() if plan.tuned]
    counts = " or ".join(map(str, sorted({one.held_out for one in told})))
    days: dict[str, set[str]] = {}
    for one in told:
        days.setdefault(one.machine, set()).add(one.date)
    where = "; ".join(f"{name} ({', '.join(sorted(days[name]))})" for name in sorted(days))
    rows.append(
        f"\nOn {counts} held-out captions. {where}. "
        "*Others*: how many hold of those that the table below holds out."
    )
    return "\n".join(rows)


def _elsewhere(model: str, level: str, plan: accel.Plan) -> float | None:
    """The share of the honest table's held-out captions at which a plan holds its level."""
    path = RESULTS / f"table-{model}.json"
    if not path.exists():
        return None
    result = json.loads(path.read_text())
    rows = (_further(result) or result)["rows"]["held-out"]
    shares = (row["meets"][level] for row in rows if row["tuned"] == plan.digest)
    return next(shares, None)


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.0f} %"


def fill(text: str, name: str, content: str) -> str:
    """Replace what stands between ``<!-- name -->`` and ``<!-- /name -->``."""
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, rest = text.split(start)
    _, after = rest.split(end)
    return f"{before}{start}\n{content}\n{end}{after}"


def pages() -> dict[Path, str]:
    """Every generated page."""
    readme = fill(README.read_text(), "methods", methods_table())
    readme = fill(readme, "table", honest_table())
    readme = fill(readme, "tuned", tuned_table())
    return {METHODS: methods_page(), README: fill(readme, "results", results_table())}


def main() -> None:
    """Write the pages, or say which are stale."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if stale")
    check = parser.parse_args().check
    stale = [
        path for path, text in pages().items() if not path.exists() or path.read_text() != text
    ]
    if check and stale:
        names = ", ".join(str(path.relative_to(ROOT)) for path in stale)
        sys.exit(f"{names}: not what the methods and results say now. Run `make docs`.")
    for path, text in pages().items():
        if not check:
            path.write_text(text)


if __name__ == "__main__":
    main()
