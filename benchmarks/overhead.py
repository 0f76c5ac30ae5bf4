"""What an attached plan costs that is off: seconds a step, and host–device reads.

    python benchmarks/overhead.py [--model scenes-flux] [--repeats 40]

Stock and attached runs alternate in pairs, in alternating order; two pairs are left out as
warm-up. A read of the device is a call of ``aten::_local_scalar_dense`` (what ``.item()`` and
``bool(tensor)`` are), counted below Python by a dispatch mode; an adaptive plan is counted too, to
show that the counter counts.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from measure import ratio, save, spread
from torch.utils._python_dispatch import TorchDispatchMode

import accel


class Reads(TorchDispatchMode):
    """Counts reads of the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Pass an operator through, counted if it reads."""
        del types
        if func is torch.ops.aten._local_scalar_dense.default:
            self.count += 1
        return func(*args, **(kwargs or {}))


def off_plan() -> accel.Plan:
    """Every method that has an off form, off."""
    forms = [kind.off() for kind in accel.methods().values()]
    return accel.Plan(*(form for form in forms if form is not None))


def run(pipe: Any, call: dict[str, Any]) -> float:
    """Seconds of one run up to its latents."""
    start = time.perf_counter()
    pipe("a boat", generator=torch.Generator().manual_seed(0), output_type="latent", **call)
    return time.perf_counter() - start


def attached(pipe: Any, call: dict[str, Any]) -> float:
    """The same under the plan; attaching is not timed."""
    with off_plan().attach(pipe):
        return run(pipe, call)


def reads(pipe: Any, call: dict[str, Any], plan: accel.Plan | None) -> int:
    """Reads of the device in one run."""
    with Reads() as mode:
        if plan is None:
            run(pipe, call)
        else:
            with plan.attach(pipe):
                run(pipe, call)
    return mode.count


def main() -> None:
    """Measure and write ``results/overhead-MODEL.json``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="scenes-flux")
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pipe, call = accel.load(options.model)
    pipe.set_progress_bar_config(disable=True)
    call["num_inference_steps"] = options.steps
    stock: list[float] = []
    off: list[float] = []
    for turn in range(options.repeats + 2):
        pair = [(stock, run), (off, attached)]
        for seconds, how in pair if turn % 2 else pair[::-1]:
            seconds.append(how(pipe, call) / options.steps)
    stock, off = stock[2:], off[2:]
    result = {
        "steps": options.steps,
        "stock_step_seconds": spread(stock),
        "off_step_seconds": spread(off),
        "off_over_stock": ratio(off, stock),
        "device_reads_stock": reads(pipe, call, None),
        "device_reads_off": reads(pipe, call, off_plan()),
        "device_reads_of_an_adaptive_plan": reads(pipe, call, accel.Plan.preset("balanced")),
    }
    over = result["off_over_stock"]
    print(f"off / stock: {over['median']:.4f} ({over['low']:.4f} to {over['high']:.4f})")
    print("device reads:", {key: n for key, n in result.items() if key.startswith("device")})
    print(save(f"overhead-{options.model}", result))


if __name__ == "__main__":
    main()
