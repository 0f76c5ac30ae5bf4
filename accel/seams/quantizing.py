"""Int8 weights by torchao: put in the place of a network's own, and taken out without trace.

torchao quantizes a weight and computes with it; nothing here multiplies anything. What is added is
which layers there are, and that the very parameters come back: their numbers wait on the CPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from accel.errors import BrokenAttachment, UnsupportedModel
from accel.seams.bare import is_bare
from accel.seams.offload import groups_of

ADAPTERS = "lora_"
"""In the names of what a LoRA adds beside a layer: it stays as it is."""

KINDS = ("cpu", "cuda")
"""Devices with a product of int8 matrices."""

MULTIPLE = 8
"""What both sizes of a layer must be a multiple of for that product on an accelerator; torchao
would carry others to the CPU and back."""

LIBRARIES = ("bitsandbytes", "optimum", "quanto", "torchao", "gguf", "modelopt", "sdnq")
"""Whose layers hold weights that are quantized, or about to be."""

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def linears(core: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers that can be quantized, by path; below a LoRA the layer that it adds to.

    Those are left alone that share their weight with another, or have a single input: torchao takes
    such a weight for one scale of all channels.
    """
    holders = Counter(id(one) for _, one in core.named_parameters(remove_duplicate=False))
    return {
        path: layer
        for path, layer in core.named_modules()
        if type(layer) is nn.Linear
        and layer.in_features > 1
        and holders[id(layer.weight)] == 1
        and ADAPTERS not in path
    }


def convolutions(core: nn.Module) -> int:
    """How many layers are convolutions, for which torchao has no int8."""
    return sum(isinstance(part, CONVOLUTIONS) for part in core.modules())


def unfit(layer: nn.Linear) -> bool:
    """Whether its sizes keep it from the product of int8 matrices on the device that it is on."""
    sizes = (layer.in_features, layer.out_features)
    return layer.weight.device.type != "cpu" and any(size % MULTIPLE for size in sizes)


def check_torchao(owner: str) -> None:
    """Refuse where torchao is missing.

    Raises:
        UnsupportedModel: With what to install.
    """
    if find_spec("torchao") is None:
        raise UnsupportedModel(
            f"{owner} computes by torchao, which is not installed: pip install "
            "'diffusers-accel[int8]', or leave the method out of the plan."
        )


def weight_only() -> Any:
    """Int8 weights, a scale for each output channel; activations as they are."""
    from torchao.quantization import Int8WeightOnlyConfig

    return Int8WeightOnlyConfig(set_inductor_config=False)


def dynamic() -> Any:
    """Int8 weights, and activations quantized as they come, a scale for each token."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    return Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)


def static(scale: Tensor) -> Any:
    """Int8 weights, and activations quantized by a known scale, ``[1, …, 1]`` of their rank."""
    from torchao.quantization import Int8StaticActivationInt8WeightConfig, PerRow, PerTensor

    return Int8StaticActivationInt8WeightConfig(
        act_quant_scale=scale, granularity=[PerTensor(), PerRow()], set_inductor_config=False
    )


def quantized(weight: Tensor, config: Any) -> Any:
    """A weight ``[out, in]`` as torchao quantizes it."""
    from torchao.quantization import quantize_

    shell = nn.Module()  # torchao writes on the module that it is given
    shell.weight = nn.Parameter(weight.detach(), requires_grad=False)
    quantize_(shell, config, filter_fn=lambda *_: True)
    return shell.weight


@dataclass(frozen=True)
class Original:
    """A weight as it was, and what stands in its place.

    Attributes:
        path: Where it is, for an error.
        layer: The layer.
        weight: The parameter.
        value: Its numbers, on the CPU.
        config: How it is quantized, for torchao.
        stand_in: The quantized parameter.
    """

    path: str
    layer: nn.Linear
    weight: Tensor
    value: Tensor
    config: Any
    stand_in: Any

    def set_scale(self, scale: float) -> None:
        """Quantize activations by this scale from now on; no device is read."""
        self.stand_in.act_quant_scale.fill_(scale)

    def restore(self, dtype: torch.dtype) -> bool:
        """Put the parameter back; whether nobody has changed the weight meanwhile.

        Args:
            dtype: What it is to be in.
        """
        present = self.layer.weight
        self.weight.data = self.value.to(present.device, dtype)
        if present is not self.stand_in:
            return False
        same = self._is_untouched()
        if not same:
            self.weight.data = present.dequantize().to(dtype)
        self.layer.weight = self.weight
        return same

    def _is_untouched(self) -> bool:
        """Whether the stand-in is still what comes of the original."""
        expected = quantized(self.value.to(self.stand_in.device), self.config)
        return torch.equal(expected.qdata, self.stand_in.qdata) and torch.equal(
            expected.scale, self.stand_in.scale
        )


@dataclass(frozen=True)
class Quantized:
    """One network with int8 weights.

    Attributes:
        originals: The quantized layers.
        before: Bytes that the network took.
        after: Bytes that it takes.
        kept: Bytes of the originals, on the CPU.
        undo: Puts the originals back.
    """

    originals: tuple[Original, ...]
    before: int
    after: int
    kept: int
    undo: Callable[[], None]


def quantize(name: str, core: nn.Module, configs: Mapping[str, Any]) -> Quantized:
    """Put int8 weights in the place of a network's own.

    Args:
        name: What to call the network in an error.
        core: The network.
        configs: How each layer is quantized, by its path; none is of a network without weights.

    Raises:
        UnsupportedModel: If it is quantized already, offloaded, or on a device without int8.
    """
    check(name, core)
    configs = {} if is_bare(core) else configs
    layers, before = linears(core), size(core)
    originals: list[Original] = []
    weights = {id(layer.weight) for layer in layers.values()}
    witness = next((one for one in core.parameters() if id(one) not in weights), None)
    width = None if witness is None else witness.dtype  # torchao's weights do not follow a cast

    def undo() -> None:
        cast = {} if witness is None or witness.dtype == width else {width: witness.dtype}
        changed = [
            original.path
            for original in originals
            if not original.restore(cast.get(original.value.dtype, original.value.dtype))
        ]
        if changed:
            raise BrokenAttachment(
                f"{name}: {len(changed)} weights ({changed[0]}, …) were changed while the network "
                "was quantized: they stay as changed. Fuse LoRAs and load weights before the plan "
                "is attached."
            )

    try:
        for path, config in configs.items():
            layer = layers[path]
            weight, stand_in = layer.weight, quantized(layer.weight, config)
            originals.append(Original(path, layer, weight, weight.data.cpu(), config, stand_in))
            layer.weight = stand_in
            weight.data = originals[-1].value
    except BaseException:
        undo()
        raise
    kept = sum(original.value.nbytes for original in originals)
    return Quantized(tuple(originals), before, size(core), kept, undo)


def size(core: nn.Module) -> int:
    """Bytes of a network's parameters and buffers, as they are stored."""
    return sum(_bytes(tensor) for tensor in (*core.parameters(), *core.buffers()))


def _bytes(tensor: Tensor) -> int:
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.nbytes
    names, _ = tensor.__tensor_flatten__()
    return sum(_bytes(getattr(tensor, name)) for name in names)


def check(name: str, core: nn.Module) -> None:
    """Refuse a network whose weights are not its own, in floating point, at hand.

    Raises:
        UnsupportedModel: With what was found, and what to do.
    """
    found = next(_quantized_parts(core), None)
    kinds = {weight.device.type for weight in core.parameters()}
    if getattr(core, "hf_quantizer", None) is not None or found is not None:
        how = found or type(core.hf_quantizer).__name__
        problem = f"is quantized already ({how}): load it without a quantization"
    elif groups_of(core):
        problem = "is offloaded in groups, which keep the weights that they know: attach first"
    elif "meta" in kinds and not is_bare(core):
        problem = "has weights that accelerate took away: call pipe.remove_all_hooks() first"
    elif not kinds <= {*KINDS, "meta"}:
        problem = f"is on {', '.join(sorted(kinds))}, and int8 needs one of {', '.join(KINDS)}"
    else:
        return
    raise UnsupportedModel(f"{name} {problem}. Or leave int8 out of the plan.")


def _quantized_parts(core: nn.Module) -> Iterator[str]:
    """What in a network is quantized, in words."""
    for path, part in core.named_modules():
        library = type(part).__module__.partition(".")[0]
        if library in LIBRARIES:
            yield f"{path or 'the network'} is a {type(part).__name__} of {library}"
        yield from (f"{path}.{name} {how}" for name, how in _odd(part))


def _odd(part: nn.Module) -> Iterable[tuple[str, str]]:
    """Weights of a module that are no plain floating point of 16 bits or more."""
    for name, weight in part.named_parameters(recurse=False):
        kinds = [kind for kind in (type(weight), type(weight.data)) if not _is_plain(kind)]
        if kinds:
            yield name, f"is stored as {kinds[0].__name__}"
        elif not weight.is_floating_point() or weight.itemsize < 2:
            yield name, f"is stored in {weight.dtype}"


def _is_plain(kind: type) -> bool:
    return kind in (nn.Parameter, Tensor)
