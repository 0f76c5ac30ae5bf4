"""The engine of region methods: records a run, and computes of an edit what it changes.

It sits twice in the onion. At the depth of its layer it sees what every row is answered, computed
or filled in by a cache below, and gives what lies outside of the region as it was. Innermost it
sees the calls that are computed, and lets the network compute the region alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch

from accel.errors import BadInput, UnsupportedModel
from accel.region import pictures, tokens
from accel.region.active import Active
from accel.region.decoding import Decoder
from accel.region.desk import Desk, Edit
from accel.region.masks import changed, dilated, onto
from accel.region.recording import Answer, Changes, Input, Kept, Place, Recording
from accel.report import State
from accel.seams.denoisers import Call, Denoiser, Inner, Result
from accel.seams.layout import Layout
from accel.seams.offload import check_whole
from accel.seams.rows import scatter
from accel.seams.spatial import RESIDUALS, decoder_of, is_unet
from accel.seams.token_stream import pictures_of
from accel.seams.tokens import patches_of, span_of

if TYPE_CHECKING:
    from torch import Tensor

    from accel.attach import Site, Undo
    from accel.region.sige import SIGE

TEXT = "encoder_hidden_states"


@dataclass(eq=False)
class Chosen:
    """What of one mask is computed.

    Attributes:
        share: Of the picture.
        inside: What may differ from the original, ``[F, H, W]`` on the network's own grid.
        outside: What keeps the original, laid out as one row of an answer; ``None``: all of it,
            and nothing is computed.
        active: The places, for a network of convolutions.
        image: Numbers of the tokens, for a transformer.
    """

    share: float
    inside: Tensor
    outside: Tensor | None
    active: Active | None = None
    image: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Part:
    """What a call of some rows is computed against.

    Attributes:
        kept: What the network's parts had in the original.
        before: What the rows were answered then, ``[rows, …]``.
        changes: Where to note what the edit changes; ``None``: nowhere.
        chosen: What is computed.
    """

    kept: Kept
    before: Tensor
    changes: Changes | None
    chosen: Chosen


class Network(Protocol):
    """A network that can be recorded, and computed in part."""

    def attach(self) -> Iterator[Undo]:
        """Put it around the network's parts."""
        ...

    def reset(self) -> None:
        """A run starts."""
        ...

    def recording(self, kept: Kept, call: Call) -> AbstractContextManager[None]:
        """While it is entered, a dense pass is kept."""
        ...

    def grid(self, call: Call) -> tuple[int, int, int]:
        """Frames, rows and columns of what it computes."""
        ...

    def choose(self, mask: Tensor, call: Call) -> Chosen:
        """What is computed for a mask ``[F, H, W]``."""
        ...

    def run(self, call: Call, inner: Inner, part: Part) -> Result:
        """Compute a call of some rows in part; the answer is whole."""
        ...


class Unet:
    """A UNet, whose places are the pixels of its latents."""

    def __init__(self, denoiser: Denoiser, method: SIGE) -> None:
        recomputed = method.statistics == "recomputed"
        self._pictures = pictures.Pictures(denoiser.core, method.name, recomputed, method.keep)
        self._method = method

    def attach(self) -> Iterator[Undo]:
        """Put it around the network's parts."""
        yield from self._pictures.attach()

    def reset(self) -> None:
        """A run starts: weights may be others."""
        self._pictures.reset()

    def recording(self, kept: Kept, call: Call) -> AbstractContextManager[None]:
        """While it is entered, a dense pass is kept."""
        return self._pictures.recording(kept, call.sample)

    def grid(self, call: Call) -> tuple[int, int, int]:
        """One frame of latents."""
        return 1, call.sample.shape[-2], call.sample.shape[-1]

    def choose(self, mask: Tensor, call: Call) -> Chosen:
        """The active blocks of a mask."""
        active = Active(mask[0], self._method.pyramid, call.sample.device)
        computed = active.finest
        outside = computed.logical_not().to(call.sample.device)
        return Chosen(float(computed.float().mean()), computed[None], outside, active)

    def run(self, call: Call, inner: Inner, part: Part) -> Result:
        """Compute a call of some rows in part; the answer is whole."""
        active = part.chosen.active
        assert active is not None
        arguments = {
            name: _places(value, active) if name in RESIDUALS else value
            for name, value in call.arguments.items()
        }
        rows = part.kept.places(call.rows)
        with self._pictures.computing(pictures.Sparse(part.kept, rows, active, part.changes)):
            result = inner(replace(call, arguments=arguments))
        return Result(pictures.written(result.value, part.before, active), result.fresh)


class Transformer:
    """A transformer over tokens of latents."""

    def __init__(self, denoiser: Denoiser, method: SIGE) -> None:
        self._tokens = tokens.Tokens(denoiser, method.name, method.keep)

    def attach(self) -> Iterator[Undo]:
        """Put it around the network's blocks."""
        yield from self._tokens.attach()

    def reset(self) -> None:
        """A run starts: tokens may lie elsewhere."""
        self._tokens.reset()

    def recording(self, kept: Kept, call: Call) -> AbstractContextManager[None]:
        """While it is entered, a dense pass is kept."""
        return self._tokens.recording(kept, call)

    def grid(self, call: Call) -> tuple[int, int, int]:
        """Frames, rows and columns of its tokens."""
        return patches_of(call)

    def choose(self, mask: Tensor, call: Call) -> Chosen:
        """The tokens of a mask."""
        outside = _spread(mask, call).logical_not().to(call.sample.device)
        image = mask.flatten().nonzero()[:, 0].to(call.sample.device)
        return Chosen(float(mask.float().mean()), mask, outside, image=image)

    def run(self, call: Call, inner: Inner, part: Part) -> Result:
        """Compute a call of some rows in part; the answer is whole."""
        chosen = part.chosen
        assert chosen.image is not None
        assert chosen.outside is not None
        rows = part.kept.places(call.rows)
        sparse = tokens.Sparse(part.kept, rows, chosen.image, part.changes)
        with self._tokens.computing(sparse, call):
            result = inner(call)
        value = torch.where(chosen.outside, part.before.to(result.value), result.value)
        return Result(value, result.fresh)


class Editing:
    """Records the runs of one pipeline, and computes its edits in part.

    Args:
        method: Its fields.
        site: What it is attached to.
        desk: What the runs are for.
    """

    def __init__(self, method: SIGE, site: Site, desk: Desk) -> None:
        self._method = method
        self._pipe = site.pipe
        self._tally = site.tally
        self._desk = desk
        self._networks: dict[str, Network] = {}
        self._resets: list[Callable[[], None]] = []
        self._chosen: dict[tuple[str, int], Chosen] = {}
        self._alike: dict[tuple[str, bytes], Chosen] = {}
        self._dense: set[tuple[str, int]] = set()

    def attach(self, site: Site) -> Iterator[Undo]:
        """Put it around every network of the pipeline.

        Raises:
            UnsupportedModel: For a network that is offloaded layer by layer.
        """
        for seam in ("blocks", "attention", "tokens", "size of the picture"):
            yield site.claim(seam)
        self._tally.memory = self._bytes
        self._tally.reason = self._why_idle
        yield site.on_start(self._reset)
        if self._method.decoder and decoder_of(site.pipe) is not None:
            yield site.claim("decoder")
            with site.beside("places of weights"):
                check_whole("vae", decoder_of(site.pipe))
            yield from self._decoder(site).attach()
        for denoiser in site.denoisers:
            kind = Unet if is_unet(denoiser.core) else Transformer
            if kind is Unet:
                with site.beside("places of weights"):
                    check_whole(denoiser.name, denoiser.core)
            network: Network = kind(denoiser, self._method)
            self._networks[denoiser.name] = network
            self._resets.append(network.reset)
            yield from network.attach()
            yield site.around(denoiser, self._outer)
            yield site.around(denoiser, self._inner, at="weights")

    def inside(self, sample: int) -> Tensor | None:
        """What of a sample's latents may differ, ``[F, H, W]``; ``None`` where it is not known."""
        found = [one for (_, number), one in self._chosen.items() if number == sample]
        return found[0].inside if found else None

    def _decoder(self, site: Site) -> Decoder:
        decoder = Decoder(decoder_of(site.pipe), self._method, self._desk, self.inside)
        self._resets.append(decoder.reset)
        return decoder

    def _reset(self) -> None:
        self._tally.change = None
        self._chosen.clear()
        self._alike.clear()
        self._dense.clear()
        for reset in self._resets:
            reset()

    def _bytes(self) -> int:
        desk = self._desk
        recordings = [one for one in (desk.recording, desk.under_way) if one is not None]
        changes = desk.edit.changes if desk.edit is not None else None
        return sum(one.bytes for one in recordings) + (changes.bytes if changes else 0)

    def _why_idle(self) -> str:
        if self._desk.under_way is not None or self._desk.recording is not None:
            return "the original is recorded: edits of it compute less"
        return "nothing is recorded and edited here: use accel.edit.sparse"

    # At the depth of the layer: what every row is answered.

    def _outer(self, call: Call, inner: Inner) -> Result:
        desk = self._desk
        if desk.under_way is not None:
            return self._watched(desk.under_way, call, inner)
        if desk.edit is not None and desk.recording is not None:
            return self._edited(desk.recording, desk.edit, call, inner)
        return inner(call)

    def _watched(self, recording: Recording, call: Call, inner: Inner) -> Result:
        self._note(recording, call)
        result = inner(call)
        recording.answered(_answers(call, result))
        self._tally.record(call.step.index, call.rows, "computed")
        return result

    def _note(self, recording: Recording, call: Call) -> None:
        recording.timesteps[call.step.index] = call.step.timestep
        if call.step.index == 1:
            for row, sample in zip(call.rows, call.sample, strict=True):
                recording.seconds[call.denoiser.name, row] = sample.clone()
        recording.size = _picture_size(self._pipe, self._networks[call.denoiser.name], call)
        for row, given in zip(call.rows, _inputs(call), strict=True):
            recording.given(call.denoiser.name, row, given)

    def _edited(self, recording: Recording, edit: Edit, call: Call, inner: Inner) -> Result:
        self._check(recording, call)
        places = [Place(call.denoiser.name, call.step.index, row) for row in call.rows]
        chosen = [self._choose(recording, edit, call, index) for index in range(len(call.rows))]
        same = [
            index
            for index, (place, one) in enumerate(zip(places, chosen, strict=True))
            if one.outside is None and place in recording.answers
        ]
        rest = [index for index in range(len(call.rows)) if index not in same]
        parts, fresh = [], [True] * len(call.rows)
        if rest:
            result = inner(call.take(rest))
            before = [recording.answers.get(places[index]) for index in rest]
            masks = [chosen[index].outside for index in rest]
            value = torch.stack([*map(_outside, before, masks, result.value)])
            parts.append((rest, value))
            for index, computed in zip(rest, result.fresh, strict=True):
                fresh[index] = computed
        if same:
            answers = [recording.answers[places[index]] for index in same]
            like = call.sample
            parts.append((same, torch.stack([one.value.to(like.device) for one in answers])))
            for index, answer in zip(same, answers, strict=True):
                fresh[index] = answer.fresh
        result = Result(scatter(parts, len(call.rows)), tuple(fresh))
        self._follow(recording, call, chosen)
        self._tell(edit, call, chosen)
        self._carry(recording, edit, call, result)
        return result

    def _check(self, recording: Recording, call: Call) -> None:
        step, found = call.step, recording.timesteps.get(call.step.index)
        if found != step.timestep:
            raise BadInput(
                f"The original was recorded along {len(recording.timesteps)} other evaluations: "
                f"number {step.index} was at timestep {found}, and here it is at {step.timestep}. "
                "Edit with the steps, strength and scheduler of the recording, or record again. "
                "Nothing was lost."
            )
        for row in call.rows:
            given = recording.inputs.get((call.denoiser.name, row))
            if given is not None and given.sample.shape != call.sample.shape[1:]:
                raise BadInput(
                    f"The original has latents of {tuple(given.sample.shape)}, and this run "
                    f"{tuple(call.sample.shape[1:])}: edit at the size of the recording, or record "
                    "again. Nothing was lost."
                )

    def _choose(self, recording: Recording, edit: Edit, call: Call, index: int) -> Chosen:
        row = call.rows[index]
        key = (call.denoiser.name, row.sample)
        if key not in self._chosen:
            mask = self._mask(recording, edit, call, index)
            same = (call.denoiser.name, mask.numpy().tobytes())
            if same not in self._alike:
                network = self._networks[call.denoiser.name]
                nothing = Chosen(0.0, mask, None)
                self._alike[same] = network.choose(mask, call) if bool(mask.any()) else nothing
            self._chosen[key] = self._alike[same]
        return self._chosen[key]

    def _mask(self, recording: Recording, edit: Edit, call: Call, index: int) -> Tensor:
        """What of a sample changes, ``[F, H, W]`` over the grid of the network."""
        network, row = self._networks[call.denoiser.name], call.rows[index]
        frames, height, width = network.grid(call)
        before = recording.inputs.get((call.denoiser.name, row))
        if before is None:
            return torch.ones(frames, height, width, dtype=torch.bool)
        after = _inputs(call)[index]
        differs = self._difference(before, after, call, (frames, height, width))
        if edit.region is not None:
            mask = onto(edit.region, (height, width)).expand(frames, -1, -1)
            mask = dilated(mask, self._method.dilate)
            if bool((differs & ~mask).any()):
                self._tally.advise(
                    "the input differs from the original's outside of the region as well, which "
                    "stays as it was: draw a larger region, or none, to follow the input"
                )
            return mask.contiguous()
        if not bool(differs.any()) and self._says_another(recording, call, row.sample):
            self._tally.advise(
                "the prompt changed and no region was given, so all of the picture was computed: "
                "draw the region that is to change"
            )
            return torch.ones_like(differs)
        return dilated(differs, self._method.dilate).contiguous()

    def _says_another(self, recording: Recording, call: Call, sample: int) -> bool:
        """Whether the conditioning of a branch of a sample differs from the original's."""
        pairs = [
            (recording.inputs.get((call.denoiser.name, row)), after)
            for row, after in zip(call.rows, _inputs(call), strict=True)
            if row.sample == sample
        ]
        return any(before is not None and _text_differs(before, after) for before, after in pairs)

    def _difference(
        self, before: Input, after: Input, call: Call, grid: tuple[int, int, int]
    ) -> Tensor:
        a, b = (
            pictures_of(call, given.sample[None].to(call.sample))[0] for given in (before, after)
        )
        if a.ndim == 2:  # tokens
            return changed(a.T, b.T, self._method.threshold).view(grid)
        mask = changed(a, b, self._method.threshold)
        flat = mask[None] if mask.ndim == 2 else mask
        return torch.nn.functional.adaptive_max_pool3d(flat[None].float(), grid)[0] > 0

    def _follow(self, recording: Recording, call: Call, chosen: Sequence[Chosen]) -> None:
        """Look once, at the second evaluation, whether the edit leaves the original outside."""
        if call.step.index != 1:
            return
        for row, one, now in zip(call.rows, chosen, call.sample, strict=True):
            then = recording.seconds.get((call.denoiser.name, row))
            if then is None or one.outside is None or then.shape != now.shape:
                continue
            apart = ((then.to(now) - now).abs() > self._method.threshold) & one.outside
            if bool(apart.any()):
                self._tally.advise(
                    "outside of the region the edit leaves the original, whose answers it is given "
                    "there: call it with the guidance, the noise and the masks of the recording"
                )

    def _tell(self, edit: Edit, call: Call, chosen: Sequence[Chosen]) -> None:
        for row, one in zip(call.rows, chosen, strict=True):
            dense = (call.denoiser.name, row.sample) in self._dense
            share = 1.0 if dense and one.outside is not None else one.share
            edit.shares.append(share)
            state: State = "computed" if share == 1 else "reused"
            left_out = ("outside of the region",) if share < 1 else ()
            self._tally.record(call.step.index, [row], state, left_out)
        if edit.share < 1:
            self._tally.change = f"computed {edit.share:.1%} of the picture"

    def _carry(self, recording: Recording, edit: Edit, call: Call, result: Result) -> None:
        """Note what the edit answers, for edits that start from it."""
        if edit.changes is None:
            return
        for place, answer in _answers(call, result).items():
            edit.changes.put(recording.answers, place, answer)
        if call.step.index == 1:
            for row, sample in zip(call.rows, call.sample, strict=True):
                edit.changes.put(recording.seconds, (call.denoiser.name, row), sample.clone())
        if call.step.index == 0:
            for row, given in zip(call.rows, _inputs(call), strict=True):
                edit.changes.put(recording.inputs, (call.denoiser.name, row), given)

    # Innermost: what is computed.

    def _inner(self, call: Call, inner: Inner) -> Result:
        desk = self._desk
        if desk.under_way is not None:
            result, kept = self._recorded(call, inner)
            desk.under_way.add(call.denoiser.name, call.step.index, kept)
            return result
        if desk.edit is None or desk.recording is None:
            return inner(call)
        groups = self._groups(desk.recording, call)
        parts = [
            (rows, self._part(desk.edit, desk.recording, call.take(rows), inner, kept))
            for rows, kept in groups
        ]
        value = scatter([(rows, result.value) for rows, result in parts], len(call.rows))
        return Result(value, (True,) * len(call.rows))

    def _groups(self, recording: Recording, call: Call) -> list[tuple[list[int], Kept | None]]:
        """Rows that run together: of one mask, and recorded in one call."""
        groups: dict[tuple[int, int], tuple[list[int], Kept | None]] = {}
        for index, row in enumerate(call.rows):
            kept = recording.kept.get(Place(call.denoiser.name, call.step.index, row))
            chosen = self._chosen[call.denoiser.name, row.sample]
            groups.setdefault((id(kept), id(chosen)), ([], kept))[0].append(index)
        return list(groups.values())

    def _part(
        self, edit: Edit, recording: Recording, call: Call, inner: Inner, kept: Kept | None
    ) -> Result:
        chosen = self._chosen[call.denoiser.name, call.rows[0].sample]
        if kept is not None and chosen.share <= self._method.most:
            places = [Place(call.denoiser.name, call.step.index, row) for row in call.rows]
            before = torch.stack([recording.answers[place].value for place in places])
            network = self._networks[call.denoiser.name]
            return network.run(call, inner, Part(kept, before, edit.changes, chosen))
        self._dense |= {(call.denoiser.name, row.sample) for row in call.rows}
        if edit.changes is None:
            return inner(call)
        result, kept = self._recorded(call, inner)
        for row in call.rows:
            place = Place(call.denoiser.name, call.step.index, row)
            edit.changes.put(recording.kept, place, kept)
        return result

    def _recorded(self, call: Call, inner: Inner) -> tuple[Result, Kept]:
        kept = Kept(call.rows)
        with self._networks[call.denoiser.name].recording(kept, call):
            result = inner(call)
        return result, kept


def _picture_size(pipe: Any, network: Network, call: Call) -> tuple[int, int]:
    """Height and width in pixels of what a call makes."""
    frames, height, width = network.grid(call)
    span = span_of(pipe, call, Layout(0, frames, height, width))
    if span is None:
        raise UnsupportedModel(
            f"{type(pipe).__name__} does not say how many pixels a place of its latents has, so "
            "that a region cannot be laid over them: leave region.SIGE out of the plan."
        )
    return height * span.height, width * span.width


def _answers(call: Call, result: Result) -> dict[Place, Answer]:
    return {
        Place(call.denoiser.name, call.step.index, row): Answer(value.clone(), fresh)
        for row, value, fresh in zip(call.rows, result.value, result.fresh, strict=True)
    }


def _inputs(call: Call) -> list[Input]:
    text = call.arguments.get(TEXT)
    rows = isinstance(text, torch.Tensor) and len(text) == len(call.rows)
    texts: Any = text if rows else [None] * len(call.rows)
    return [
        Input(sample.clone(), None if one is None else one.clone())
        for sample, one in zip(call.sample, texts, strict=True)
    ]


def _text_differs(before: Input, after: Input) -> bool:
    if before.text is None or after.text is None:
        return before.text is not after.text
    return not torch.equal(before.text, after.text)


def _outside(before: Answer | None, outside: Tensor | None, value: Tensor) -> Tensor:
    """An answer, outside of the region as it was."""
    if before is None or outside is None:
        return value
    return torch.where(outside, before.value.to(value), value)


def _spread(mask: Tensor, call: Call) -> Tensor:
    """A mask over tokens as it lies over an answer ``[C, (F,) H, W]`` or ``[N, C]``."""
    shape = call.sample.shape[1:]
    if len(shape) == 2:
        return mask.flatten()[:, None]
    sides = shape[-2:] if len(shape) == 3 else (*_frames(call), *shape[-2:])
    flat = (mask[:1] if len(shape) == 3 else mask[None])[None].float()
    spread = torch.nn.functional.interpolate(flat, size=sides, mode="nearest")[0] > 0
    return spread if len(shape) == 3 else pictures_of(call, spread[None])[0]


def _frames(call: Call) -> tuple[int]:
    return (pictures_of(call, call.sample).shape[2],)


def _places(value: Any, active: Active) -> Any:
    """Pictures that a UNet is given, at the active places alone."""
    if isinstance(value, torch.Tensor):
        pixels = active.pixels((value.shape[-2], value.shape[-1]))
        return value.flatten(2).index_select(2, pixels).unsqueeze(-1)
    if isinstance(value, tuple | list):
        return type(value)(_places(item, active) for item in value)
    return value
