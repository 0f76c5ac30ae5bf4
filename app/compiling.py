"""Regional compile: the repeated parts of a model's networks, before a plan is attached.

Caches of modules cannot reach into a compiled block, so under a plan with one the modules are
compiled; under all others, and for the stock pipeline, the blocks.
"""

from __future__ import annotations

from typing import Any, Literal

from accel.errors import BadInput
from accel.plan import Plan
from accel.seams.denoisers import find_denoisers
from accel.seams.modules import compile_modules

Parts = Literal["blocks", "modules"]

OPTIONS: dict[str, Any] = {"fullgraph": True}
"""For `torch.compile`. A graph that breaks is an error: what it costs would go unseen."""


def parts_for(plan: Plan) -> Parts:
    """What to compile under a plan."""
    active = (method for method in plan if method.why_off() is None)
    return "modules" if any(method.seam == "modules" for method in active) else "blocks"


class Regions:
    """The compiled parts of a pipeline's networks, made when first asked for.

    Args:
        pipe: The pipeline; other pipelines that share its networks share this too.
    """

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe
        self._networks = [denoiser.core for denoiser in find_denoisers(pipe)]
        self._graphs: dict[Parts, dict[Any, Any]] = {}
        self._present: Parts | None = None

    def put_on(self, parts: Parts | None) -> None:
        """Compile these parts and no others; ``None``: nothing.

        Raises:
            BadInput: If a network names no repeated blocks.
            UnsupportedModel: If modules are asked for, and a network has none.
        """
        if parts == self._present:
            return
        for module in self._graphs.get(self._present, {}) if self._present else ():
            module._compiled_call_impl = None
        self._present = None
        if parts is not None:
            for module, graph in self._graphs_of(parts).items():
                module._compiled_call_impl = graph
            self._present = parts

    def _graphs_of(self, parts: Parts) -> dict[Any, Any]:
        if parts not in self._graphs:
            self._compile(parts)
            self._graphs[parts] = {
                module: module._compiled_call_impl
                for network in self._networks
                for module in network.modules()
                if module._compiled_call_impl is not None
            }
        return self._graphs[parts]

    def _compile(self, parts: Parts) -> None:
        if parts == "modules":
            compile_modules(self._pipe, **OPTIONS)
            return
        for network in self._networks:
            if not getattr(network, "_repeated_blocks", None):
                raise BadInput(
                    f"--compile: diffusers names no repeated blocks of {type(network).__name__}, "
                    "which could be compiled once for all: leave it out."
                )
        for network in self._networks:
            network.compile_repeated_blocks(**OPTIONS)
