"""A transformer that computes the active tokens alone, and all tokens of its text.

Every block runs on the active tokens; its answer is written over what it was given. The tokens
between do not matter: nobody reads them. Attention looks at the recorded keys and values of the
image, the active ones written over them, behind the rotation: each keeps its own position.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from accel.errors import UnsupportedModel
from accel.region.recording import Changes, Keep, Kept, stored
from accel.seams.attention import UNREACHED, Asked, answer_attention
from accel.seams.blocks import Block
from accel.seams.modules import Module, find_modules
from accel.seams.rows import index_rows
from accel.seams.token_stream import parameters_of, stream_of, token_blocks
from accel.seams.tokens import Layouts, refuse_row_by_row, refuse_unknown

if TYPE_CHECKING:
    from torch import Tensor

    from accel.attach import Undo
    from accel.seams.denoisers import Call, Denoiser
    from accel.seams.layout import Layout

INSTEAD = "Leave the method out of the plan: other accelerators fit."


@dataclass(frozen=True, eq=False)
class Chosen:
    """Some tokens in the place of all.

    Attributes:
        index: Their numbers, ``[n]``.
    """

    index: Tensor

    @classmethod
    def beside_text(cls, layout: Layout, image: Tensor) -> Chosen:
        """Some image tokens of a layout and all of its text."""
        span, text = layout.image_span, layout.text_span
        beside = torch.arange(text.start, text.stop, device=image.device)
        parts = [beside, span.start + image]
        return cls(torch.cat(parts if layout.text_first else parts[::-1]))

    def merge(self, x: Tensor) -> Tensor:
        """Those of ``[B, N, …]``."""
        return x.index_select(1, self.index)

    def rows(self, rotary: Tensor, dim: int = 0) -> Tensor:
        """Those along an axis."""
        return rotary.index_select(dim, self.index)


@dataclass(frozen=True)
class Sparse:
    """A pass over some tokens.

    Attributes:
        kept: What the original had.
        rows: Where the rows of this pass are in it.
        image: Numbers of the active image tokens, ``[n]``.
        changes: Where to note what the edit changes; ``None``: nowhere.
    """

    kept: Kept
    rows: list[int]
    image: Tensor
    changes: Changes | None


class Tokens:
    """Records and runs one transformer.

    Args:
        denoiser: The network.
        name: Of the method, for refusals.
        keep: How what is recorded is stored.

    Raises:
        UnsupportedModel: For a network whose order of tokens is not known, or whose blocks do not
            run on some of them.
    """

    def __init__(self, denoiser: Denoiser, name: str, keep: Keep) -> None:
        refuse_unknown(denoiser, name)
        refuse_row_by_row(denoiser, name)
        self._denoiser = denoiser
        self._name = name
        self._keep = keep
        self._blocks = tuple(token_blocks(denoiser, name, INSTEAD))
        self._modules = tuple(m for m in find_modules(denoiser) if m.kind == "self")
        self._layouts = Layouts()
        self._call: Call | None = None
        self._recorded: Kept | None = None
        self._sparse: Sparse | None = None

    def attach(self) -> Iterator[Undo]:
        """Put it around the blocks and their self-attention."""
        for _, block in self._blocks:
            names = parameters_of(block.module)
            yield block.wrap(partial(self._block, block, names))
        for module in self._modules:
            yield answer_attention(module, partial(self._attend, module))

    def reset(self) -> None:
        """Forget where the tokens of the run before lay."""
        self._layouts = Layouts()

    @contextmanager
    def recording(self, kept: Kept, call: Call) -> Iterator[None]:
        """While it is entered, keys and values of a dense pass are kept.

        Raises:
            UnsupportedModel: For attention that does not go through torch's.
        """
        self._recorded, self._call = kept, call
        try:
            yield
        finally:
            self._recorded = self._call = None
        if not kept.values:
            network = type(self._denoiser.core).__name__
            raise UnsupportedModel(f"{self._name}: no attention of {network} {UNREACHED}.")

    @contextmanager
    def computing(self, sparse: Sparse, call: Call) -> Iterator[None]:
        """While it is entered, the blocks compute the active tokens alone."""
        self._sparse, self._call = sparse, call
        try:
            yield
        finally:
            self._sparse = self._call = None

    def _block(
        self,
        block: Block,
        names: tuple[str, ...],
        inner: Callable[..., Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if self._sparse is None or self._call is None:
            return inner(*args, **kwargs)
        stream = stream_of(self._call, self._layouts, names, args, kwargs)
        image = Chosen(self._sparse.image)
        own, joint = (
            Chosen.beside_text(layout, self._sparse.image) for layout in (stream.own, stream.joint)
        )
        args, kwargs = stream.reduced(own, image, joint)
        answer = block.outputs(inner(*args, **kwargs))
        whole = stream.hidden.index_copy(1, own.index, answer["hidden"].to(stream.hidden))
        return block.returns(answer | {"hidden": whole})

    def _attend(self, module: Module, asked: Asked) -> Tensor:
        if self._recorded is not None:
            self._keep_keys(module, self._recorded, asked)
        elif self._sparse is not None and module.path in self._sparse.kept.values:
            asked = self._completed(module, self._sparse, asked)
        elif self._sparse is not None:
            raise UnsupportedModel(
                f"{self._name}: {module.path} was not computed when the original was recorded. "
                "Call the edit with the arguments of the recording."
            )
        return asked.dense()

    def _keep_keys(self, module: Module, kept: Kept, asked: Asked) -> None:
        assert self._call is not None
        span = self._layouts.of(self._call, asked.key.shape[2]).image_span
        both = (asked.key[:, :, span], asked.value[:, :, span])
        kept.values[module.path] = tuple(stored(value, self._keep) for value in both)

    def _completed(self, module: Module, sparse: Sparse, asked: Asked) -> Asked:
        """With the keys and values of all image tokens."""
        assert self._call is not None
        kept = sparse.kept.values[module.path]
        tokens, few = kept[0].shape[2], len(sparse.image)
        text = asked.key.shape[2] - few
        layout = self._layouts.of(self._call, text + tokens)
        found = []
        for place, flowing in enumerate((asked.key, asked.value)):
            ours, image = _split(flowing, layout)
            if sparse.changes is not None:
                sparse.changes.write(kept[place], sparse.rows, 2, sparse.image, image)
            whole = index_rows(kept[place], sparse.rows).to(flowing)
            found.append(_joined(ours, whole.index_copy(2, sparse.image, image), layout))
        mask = asked.attn_mask
        if mask is not None and mask.shape[-1] == text + few:
            mask = _widened(mask, layout)
        return replace(asked, key=found[0], value=found[1], attn_mask=mask)


def _split(x: Tensor, layout: Layout, dim: int = 2) -> tuple[Tensor, Tensor]:
    """The text's part and the image's, however many tokens the latter has."""
    image = x.shape[dim] - layout.text
    starts = (0, layout.text) if layout.text_first else (image, 0)
    return x.narrow(dim, starts[0], layout.text), x.narrow(dim, starts[1], image)


def _joined(text: Tensor, image: Tensor, layout: Layout, dim: int = 2) -> Tensor:
    if not layout.text:
        return image
    return torch.cat([text, image] if layout.text_first else [image, text], dim)


def _widened(mask: Tensor, layout: Layout) -> Tensor:
    """A mask for all image tokens as keys: all are seen alike, for it hides padded text alone."""
    text, image = _split(mask, layout, -1)
    every = image[..., :1].expand(*image.shape[:-1], layout.image)
    return _joined(text, every, layout, -1)
