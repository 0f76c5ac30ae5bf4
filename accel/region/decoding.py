"""The decoder of an edit: only what the changed latents reach is decoded anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from accel.region.active import Active
from accel.region.desk import Desk, Edit
from accel.region.masks import dilated, onto
from accel.region.pictures import Pictures, Sparse, written
from accel.region.recording import Answer, Kept, Place, Recording
from accel.seams.blocks import wrap_call
from accel.seams.denoisers import Row

if TYPE_CHECKING:
    from torch import Tensor

    from accel.attach import Undo
    from accel.region.sige import SIGE

NAME = "decoder"


class Decoder:
    """Records what a decoder does, and decodes edits in part.

    Rows of its calls are the samples in their order, in one call or, sliced, in several.

    Args:
        core: The decoder.
        method: The fields of the method.
        desk: What the runs are for.
        inside: Says what of a sample's latents may differ, ``[F, H, W]``.

    Raises:
        UnsupportedModel: For a decoder with parts that are not known.
    """

    def __init__(
        self,
        core: Any,
        method: SIGE,
        desk: Desk,
        inside: Callable[[int], Tensor | None],
    ) -> None:
        recomputed = method.statistics == "recomputed"
        self._core = core
        self._method = method
        self._desk = desk
        self._inside = inside
        self._pictures = Pictures(core, method.name, recomputed, method.keep)
        self._count = 0

    def attach(self) -> Iterator[Undo]:
        """Put it around the decoder and its parts."""
        yield from self._pictures.attach()
        yield wrap_call(self._core, self._decode)

    def reset(self) -> None:
        """A run starts: the next sample is the first."""
        self._count = 0
        self._pictures.reset()

    def _decode(
        self, inner: Callable[..., Tensor], latents: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        desk, first = self._desk, self._count
        rows = tuple(Row("decode", first + index) for index in range(len(latents)))
        self._count += len(latents)
        run = partial(_called, inner, args, kwargs)
        if desk.under_way is not None:
            return self._recorded(desk.under_way, rows, latents, run)
        if desk.edit is not None and desk.recording is not None:
            parts = [
                self._edited(desk.recording, desk.edit, row, latents[index : index + 1], run)
                for index, row in enumerate(rows)
            ]
            return torch.cat(parts) if len(parts) > 1 else parts[0]
        return run(latents)

    def _recorded(
        self,
        recording: Recording,
        rows: tuple[Row, ...],
        latents: Tensor,
        run: Callable[[Tensor], Tensor],
    ) -> Tensor:
        kept = Kept(rows)
        with self._pictures.recording(kept, latents):
            result = run(latents)
        recording.add(NAME, 0, kept)
        places = [Place(NAME, 0, row) for row in rows]
        answers = [Answer(value.clone(), True) for value in result]
        recording.answered(dict(zip(places, answers, strict=True)))
        return result

    def _edited(
        self,
        recording: Recording,
        edit: Edit,
        row: Row,
        latents: Tensor,
        run: Callable[[Tensor], Tensor],
    ) -> Tensor:
        place, inside = Place(NAME, 0, row), self._inside(row.sample)
        before, kept = recording.answers.get(place), recording.kept.get(place)
        if before is None or kept is None or inside is None:
            return run(latents)
        if not bool(inside.any()):
            return before.value[None].to(latents.device)
        mask = onto(inside[0], (latents.shape[-2], latents.shape[-1]))
        mask = dilated(mask, self._method.decoder_dilate)
        if float(mask.float().mean()) > self._method.most:
            return self._whole(edit, place, latents, run)
        active = Active(mask, self._method.pyramid, latents.device)
        sparse = Sparse(kept, kept.places([row]), active, edit.changes)
        with self._pictures.computing(sparse):
            answer = run(latents)
        result = written(answer, before.value[None], active)
        self._carry(recording, edit, place, result)
        return result

    def _whole(
        self, edit: Edit, place: Place, latents: Tensor, run: Callable[[Tensor], Tensor]
    ) -> Tensor:
        recording = self._desk.recording
        if edit.changes is None or recording is None:
            return run(latents)
        kept = Kept((place.row,))
        with self._pictures.recording(kept, latents):
            result = run(latents)
        edit.changes.put(recording.kept, place, kept)
        self._carry(recording, edit, place, result)
        return result

    def _carry(self, recording: Recording, edit: Edit, place: Place, result: Tensor) -> None:
        if edit.changes is not None:
            edit.changes.put(recording.answers, place, Answer(result[0].clone(), True))


def _called(
    inner: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any], latents: Tensor
) -> Tensor:
    return inner(latents, *args, **kwargs)
