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
RESULT = ROOT / "benchmarks" / "results" / "presets-scenes-flux.json"


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


def caches_table() -> str:
    """For each level of SSIM, our fastest cache beside the fastest peer, where there is one."""
    head = "| Model (captions) | SSIM at least | Ours | Best peer | Ours over peer |"
    rows = [head, "|---|---|---|---|---|"]
    for path in sorted(RESULT.parent.glob("caches-*.json")):
        result, name = json.loads(path.read_text()), path.stem.removeprefix("caches-")
        model = f"[{name}](benchmarks/results/{path.stem}.md) ({len(result['captions'])})"
        for level in result["levels"]:
            if level["measure"] == "ssim":
                ours, peer = (_point(level[side]) for side in ("ours", "peer"))
                ratio = f"{level['ratio']:.2f}×" if level["ratio"] else "–"
                ratio += " (peer's sweep ends above)" if level.get("censored") else ""
                rows.append(f"| {model} | {level['level']:g} | {ours} | {peer} | {ratio} |")
    return "\n".join(rows)


def _point(row: dict[str, Any] | None) -> str:
    if row is None:
        return "none"
    return f"{row['package']}: {row['method']} {row['knob']:g} ({row['speedup']:.2f}×)"


def results_table() -> str:
    """The README's table of measured presets."""
    result = json.loads(RESULT.read_text())
    rows = [
        "| Preset | Seconds | Speed-up (quartiles) | NFE | PSNR | SSIM (worst) | Captions right |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in result["variants"].items():
        fast = row["speedup"]
        same = row["psnr"] >= 100
        rows.append(
            f"| {name} | {row['seconds']['median']:.2f} | {fast['median']:.2f}× "
            f"({fast['low']:.2f}–{fast['high']:.2f}) | {row['nfe']:.1f} | "
            f"{'identical' if same else format(row['psnr'], '.1f')} | "
            f"{row['ssim']:.3f} ({row['ssim_worst']:.3f}) | "
            f"{100 * row['caption_accuracy']:.1f} % |"
        )
    machine = result["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    captions = result["variants"]["stock"]["seconds"]["repeats"]
    rows.append(
        f"\n{captions} held-out captions, {result['call']['num_inference_steps']} steps, measured "
        f"{machine['date']} on {machine['processor']}, {machine['threads']} threads "
        f"({versions}) with `{result['command']}`."
    )
    return "\n".join(rows)


def tuned_table() -> str:
    """The README's table of tuned plans: what each promises, on prompts its search never saw."""
    plans = {path: accel.Plan.from_toml(path.read_text()) for path in sorted(TUNED.glob("*.toml"))}
    rows = [
        "| Model | Target | Plan | Times as fast (95 % interval) | SSIM | Prompts that hold |",
        "|---|---|---|---|---|---|",
    ]
    for path, plan in plans.items():
        assert plan.tuned is not None
        fast, near = plan.tuned.figure("speedup"), plan.tuned.figure("ssim")
        model, _, level = path.stem.rpartition("-")
        link = f"[{level}]({path.relative_to(ROOT)})"
        names = " + ".join(method.name for method in plan)
        speed = f"{fast.mean:.2f}× ({fast.low:.2f}–{fast.high:.2f})"
        cells = (model, f"SSIM ≥ {link}", names, speed, f"{near.mean:.3f}", _percent(near.share))
        rows.append(f"| {' | '.join(cells)} |")
    one = next(iter(plans.values())).tuned
    assert one is not None
    counts = sorted({plan.tuned.held_out for plan in plans.values() if plan.tuned})
    rows.append(
        f"\nOn {' or '.join(map(str, counts))} held-out captions; {one.machine}; {one.date}."
    )
    return "\n".join(rows)


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
    readme = fill(readme, "caches", caches_table())
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
