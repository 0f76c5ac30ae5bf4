"""What the methods share that compute in int8: what they leave alone, and how they attach."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from accel.attach import Accelerator, Site, Undo
from accel.weights.skipping import GROUPS, check_patterns, skipped

if TYPE_CHECKING:
    from accel.seams.denoisers import Denoiser
    from accel.seams.quantizing import Quantized

MIB = 2**20

UNKNOWN = "of unknown activations"
UNFIT = "of sizes that are no multiple of 8"
SAID = (*GROUPS, UNKNOWN, UNFIT)


class Form:
    """How layers are quantized: all in the same way.

    Args:
        config: For torchao.
    """

    def __init__(self, config: Any) -> None:
        self._config = config

    def config(self, _network: str, _path: str) -> Any:
        """How a layer is quantized, for torchao; ``None``: that is not known."""
        return self._config

    def follow(self, _site: Site, _done: Mapping[str, Quantized]) -> Iterator[Undo]:
        """What is to be done during a run: nothing."""
        yield from ()


class Int8(Accelerator):
    """Linear layers computed by torchao in int8.

    Attributes:
        integers: Whether activations are int8 too, which not every size of layer allows.
    """

    layer: ClassVar[str] = "weights"
    seam: ClassVar[str] = "weights"
    supports: ClassVar[str] = (
        "every denoiser on a CPU or CUDA whose weights are 16 or 32 bits wide: not quantized, cast "
        "or offloaded in groups; beside a LoRA the layer that it adds to. Needs the extra int8"
    )
    integers: ClassVar[bool]

    skip: tuple[str, ...] = Field(
        default=("recommended",),
        description="layers that stay as they are: patterns of paths (blocks.3.*), or groups: "
        "embedders, modulation, output, ends (the first and last block), recommended (all of them)",
    )

    @classmethod
    def off(cls) -> None:
        """Leave it out: its off is detached."""

    def why_off(self) -> None:
        """It always acts."""

    def attach(self, site: Site) -> Iterator[Undo]:
        """Quantize the layers of every network.

        Raises:
            BadInput: If a pattern of ``skip`` fits no layer.
            Conflict: Beside another method that changes weights, or moves them.
            UnsupportedModel: If torchao is missing, or a network is quantized already.
        """
        from accel.seams.quantizing import check, check_torchao, quantize

        check_torchao(self.name)
        check_patterns((denoiser.core for denoiser in site.denoisers), self.skip)
        yield site.claim("weights on the CPU")
        with site.beside("places of weights"):
            for denoiser in site.denoisers:
                check(f"pipe.{denoiser.name}", denoiser.core)
        form = self._form(site)
        done: dict[str, Quantized] = {}
        left: Counter[str] = Counter()
        for denoiser in site.denoisers:
            configs, why = self._configs(form, denoiser)
            left.update(one if one in SAID else "named in skip" for one in why.values())
            found = quantize(f"pipe.{denoiser.name}", denoiser.core, configs)
            yield found.undo
            done[denoiser.name] = found
        yield from form.follow(site, done)
        self._tell(site, done, left)

    @abstractmethod
    def _form(self, site: Site) -> Form:
        """How layers are quantized."""

    def _configs(self, form: Form, denoiser: Denoiser) -> tuple[dict[str, Any], dict[str, str]]:
        """How each layer is quantized, by path, and of the others what keeps them as they are."""
        from accel.seams.quantizing import linears, unfit

        layers = linears(denoiser.core)
        why = skipped(denoiser.core, layers, self.skip)
        configs = {}
        for path, layer in layers.items():
            if path in why:
                continue
            config = form.config(denoiser.name, path)
            if self.integers and unfit(layer):
                why[path] = UNFIT
            elif config is None:
                why[path] = UNKNOWN
            else:
                configs[path] = config
        return configs, why

    def _tell(self, site: Site, done: Mapping[str, Quantized], left: Counter[str]) -> None:
        """Say what was quantized, and what was not."""
        from accel.seams.quantizing import convolutions

        layers = sum(len(found.originals) for found in done.values())
        before, after, kept = (
            sum(getattr(found, what) for found in done.values())
            for what in ("before", "after", "kept")
        )
        unserved = sum(convolutions(denoiser.core) for denoiser in site.denoisers)
        if unserved:
            left["convolutions"] = unserved
        rest = ", ".join(f"{count} {what}" for what, count in left.items()) or "none"
        if not layers:
            site.tally.reason = lambda: f"no layer was left to quantize (as they were: {rest})"
            return
        site.tally.memory = lambda: kept
        site.tally.change = (
            f"{layers} linear layers of {', '.join(done)} are int8: {after / MIB:.3g} MiB in place "
            f"of {before / MIB:.3g}; as they were: {rest}; the originals, {kept} bytes, wait on "
            "the CPU"
        )
