"""Which methods fit a model, and which go together: found out by attaching them.

A process of its own does that, so that neither a running job nor a damaged model gets in the way.
On the CPU it attaches them to the model without its weights (`app.skeleton`), so that none are read
for it. What it finds out is kept for as long as model, versions and device stay the same.
"""

from __future__ import annotations

import json
import signal
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import combinations, product
from multiprocessing.connection import Connection
from threading import Lock
from typing import TYPE_CHECKING, Any

from pydantic import Field

from accel import errors
from accel.errors import AccelError, BadModel
from accel.plan import Plan, method_class, methods
from accel.tuned import Network
from app.metadata import Entry
from app.models import device_of
from app.request import Source
from app.serve import catalogue
from app.serve.child import Child
from app.skeleton import skeleton

if TYPE_CHECKING:
    from accel.attach import Accelerator
    from app.serve.store import Store
    from app.serve.worker import Opener

LARGE = 2 * 2**30
"""Bytes of a model's files from which on it is examined on the CPU, in bfloat16."""

IDLE = 120.0
"""Seconds without a question after which the process ends, and its memory is free again."""

MANY = 24
"""Groups in one question of a matrix: a plan that is to be checked waits for no more."""

TURN = 0.02
"""Seconds between two such questions, in which another one gets its turn."""

Group = tuple[str, ...]
"""Names of methods that go into one plan."""

Refusals = Callable[[Sequence[Group]], Sequence[str | None]]
"""For each group why it cannot be put on a model; ``None``: it can."""


class Fits(Entry):
    """The matrix of one model.

    Attributes:
        methods: Why a method does not fit by itself, by name; ``None``: it fits.
        pairs: Why two methods do not go together, by both names in order, joined by a space.
        helped: Pairs, in the same form, in which one fits only because the other is there: a
            schedule of noise levels beside a sampler that takes one.
    """

    methods: dict[str, str | None] = Field(default_factory=dict)
    pairs: dict[str, str] = Field(default_factory=dict)
    helped: frozenset[str] = frozenset()

    def reason(self, chosen: Iterable[str], candidate: str) -> str | None:
        """Why a method cannot be added to those that are chosen; ``None``: it can.

        Args:
            chosen: Names of methods; the candidate itself does not count.
            candidate: Name of a method.
        """
        alone = self.methods.get(candidate, f"{candidate} is no method that is installed.")
        pairs = {" ".join(sorted((name, candidate))) for name in chosen if name != candidate}
        if alone is not None and not pairs & self.helped:
            return alone
        return next((self.pairs[pair] for pair in sorted(pairs) if pair in self.pairs), None)


class Answer(Entry):
    """What the process found out.

    Attributes:
        error: Class name of an error of ours, or ``None``.
        message: What it says.
        refusals: For each group that was asked about, why it cannot be put on; ``None``: it can.
        network: What the model's networks are, if that was asked.
    """

    error: str | None = None
    message: str = ""
    refusals: tuple[str | None, ...] = ()
    network: Network | None = None

    def check(self) -> None:
        """Raise the error that was found, if one was."""
        if self.error is not None:
            raise getattr(errors, self.error)(self.message)


@dataclass
class Subject:
    """A model that is examined; it is loaded when it is first asked for.

    Attributes:
        source: Which one, on what device.
        opener: What loads it.
    """

    source: Source
    opener: Opener

    @cached_property
    def whole(self) -> Any:
        """Its pipeline."""
        return self.opener(self.source).model.pipe

    @cached_property
    def attachable(self) -> Any:
        """A pipeline that refuses what the whole one does: on the CPU one without weights."""
        bare = device_of(self.source.device).type == "cpu"
        return skeleton(self.source).pipe if bare else self.whole


@dataclass(frozen=True)
class Question:
    """Whether a plan fits a model, which groups of default methods do, or what its networks are."""

    source: Source
    plan: dict[str, Any] | None = None
    groups: tuple[Group, ...] = ()
    network: bool = False


class Examiner:
    """Answers which methods fit, from what is kept or through its process.

    Args:
        store: Keeps what was found out.
        opener: What loads a model, in the process.
        device: Where requests run that name none.
    """

    def __init__(self, store: Store, opener: Opener, device: str | None = None) -> None:
        self._store = store
        self._device = device
        self._lock = Lock()
        self._whole = Lock()
        self._child = Child(main, opener)

    def fits(self, model: str) -> Fits:
        """The matrix of a model, with the methods' default fields.

        Raises:
            BadModel: If it is not here, or cannot be loaded.
        """
        name = f"matrix {self._known_as(model)}"
        with self._whole:
            known = self._store.fact(name)
            if known is None:
                known = examine(partial(self._refusals, model)).model_dump_json()
                self._store.keep(name, known)
        return Fits.model_validate_json(known)

    def _refusals(self, model: str, groups: Sequence[Group]) -> list[str | None]:
        """Asked in parts, between which plans can be checked."""
        found: list[str | None] = []
        for start in range(0, len(groups), MANY):
            with self._lock:
                answer = self._ask(model, None, tuple(groups[start : start + MANY]))
            answer.check()
            found += answer.refusals
            time.sleep(TURN)
        return found

    def check(self, model: str, plan: Plan) -> None:
        """Refuse a plan that cannot be put on a model.

        A model that cannot be loaded is let pass: the job that needs it says so.

        Raises:
            Conflict: If two of its methods do not go together.
            UnsupportedModel: If one does not fit.
        """
        if any(method.why_off() is None for method in plan):
            answer = self._answer(model, plan.to_dict())
            if answer.error != BadModel.__name__:
                answer.check()

    def network(self, model: str) -> Network:
        """What a model's networks are, which tuned plans are held against.

        Raises:
            BadModel: If it is not here, or cannot be loaded.
        """
        name = f"network {self._known_as(model)}"
        with self._lock:
            known = self._store.fact(name)
            if known is None:
                answer = self._ask(model, None, network=True)
                answer.check()
                assert answer.network is not None
                known = answer.network.model_dump_json()
                self._store.keep(name, known)
        return Network.model_validate_json(known)

    def close(self) -> None:
        """End the process, whatever it is at."""
        self._child.kill()
        with self._lock:
            self._child.end()

    def _answer(self, model: str, plan: dict[str, Any]) -> Answer:
        name = f"fits {self._known_as(model)} {json.dumps(plan, sort_keys=True)}"
        with self._lock:
            known = self._store.fact(name)
            if known is not None:
                return Answer.model_validate_json(known)
            answer = self._ask(model, plan)
            if answer.error != BadModel.__name__:
                self._store.keep(name, answer.model_dump_json())
            return answer

    def _ask(
        self,
        model: str,
        plan: dict[str, Any] | None,
        groups: tuple[Group, ...] = (),
        network: bool = False,
    ) -> Answer:
        if catalogue.folder(model) is None:
            told = f"{model} is not here yet: make a picture with it, which downloads it."
            return Answer(error=BadModel.__name__, message=told)
        link = self._child.link()
        try:
            link.send(Question(self._source(model), plan, groups, network))
            answer: Answer = link.recv()
        except (EOFError, OSError):
            self._child.end()
            told = f"{model} could not be examined: the process that loads it for that died."
            return Answer(error=BadModel.__name__, message=told)
        return answer

    def _known_as(self, model: str) -> str:
        """What an answer depends on, beside the methods: some are for one kind of device alone."""
        source = self._source(model)
        return f"{catalogue.signature(model)} {source.device} {source.dtype}"

    def _source(self, model: str) -> Source:
        size = sum(path.stat().st_size for path in catalogue.files_of(model))
        if size > LARGE:
            return Source(model, device="cpu", dtype="bfloat16")
        return Source(model, device=self._device)


def main(link: Connection, opener: Opener) -> None:
    """The life of the process: one question after another, until the pipe ends, or none comes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's
    warnings.simplefilter("ignore")
    subject: Subject | None = None
    while link.poll(IDLE):
        try:
            question: Question = link.recv()
        except EOFError:
            return
        if subject is None or subject.source != question.source:
            subject = Subject(question.source, opener)
        try:
            pipe = subject.whole if question.network else subject.attachable
        except AccelError as error:
            answer = Answer(error=BadModel.__name__, message=str(error))
        else:
            answer = _answered(pipe, question)
        link.send(answer)


def _answered(pipe: Any, question: Question) -> Answer:
    if question.network:
        return Answer(network=Network.of(pipe))
    try:
        if question.plan is not None:
            Plan.from_dict(question.plan).attach(pipe).detach()
    except AccelError as error:
        return Answer(error=type(error).__name__, message=str(error))
    return Answer(refusals=tuple(refusals(pipe, question.groups)))


def refusals(pipe: Any, groups: Sequence[Group]) -> list[str | None]:
    """Why groups of methods cannot be put on a pipeline, each with its default fields."""
    return [_refusal(pipe, [method_class(name)() for name in group]) for group in groups]


def _refusal(pipe: Any, chosen: Iterable[Accelerator]) -> str | None:
    try:
        Plan(*chosen).attach(pipe).detach()
    except AccelError as error:
        return str(error)
    return None


def examine(refusals: Refusals) -> Fits:
    """The matrix of a model: methods alone, then every two that fit.

    What does not fit alone is tried beside what gives the pipeline another scheduler.

    Args:
        refusals: Tries groups of methods on the model.
    """
    names = sorted(methods())
    alone = dict(zip(names, refusals([(name,) for name in names]), strict=True))
    fitting = [name for name in names if alone[name] is None]
    pairs = list(combinations(fitting, 2))
    swaps = [name for name in fitting if method_class(name).seam == "scheduler"]
    beside = [
        (min(pair), max(pair)) for pair in product(swaps, names) if alone[pair[1]] is not None
    ]
    return Fits(
        methods=alone,
        pairs={
            " ".join(pair): reason
            for pair, reason in zip(pairs, refusals(pairs), strict=True)
            if reason is not None
        },
        helped=frozenset(
            " ".join(pair)
            for pair, reason in zip(beside, refusals(beside), strict=True)
            if reason is None
        ),
    )
