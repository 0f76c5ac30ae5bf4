"""Schedulers of linear multistep solvers: a ring of predictions, and weights for each step."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from accel.seams.seeding import Generator, seeded, seeds_of, standard_normal
from samplers.base import Settings, SolverScheduler
from samplers.multistep import Update
from samplers.prediction import Conversion, Level

Space = Literal["data", "noise", "velocity"]


class MultistepScheduler(SolverScheduler):
    """A solver that steps by ``a·x + Σ_k b_k·p_{−k} + c·z`` with predictions ``p`` it has kept.

    A concrete scheduler says in which ``space`` it predicts and gives the weights of a step; the
    weights are computed once per schedule.

    Attributes:
        space: What is kept: ``data``, the x0-prediction, ``noise``, the ε-prediction, or, of flows
            alone, ``velocity``, ε − x0. With ``noise`` the first step of a flow, from pure noise,
            where ε is the sample itself and says nothing of the data, is one of first order on
            the data.
        history: The predictions kept from earlier steps, the newest first.
    """

    space: Space = "data"

    def __init__(self, solver: Settings, model: Settings) -> None:
        self.history: list[Tensor] = []
        super().__init__(solver, model)

    @property
    def follows_ode(self) -> bool:
        """Whether no setting adds noise."""
        return not self.config.get("eta")

    @abstractmethod
    def updates(self, levels: Sequence[Level], index: int) -> list[Update]:
        """The steps from level ``index`` to the next, by the number of predictions at hand.

        The first uses one prediction, the second two, and so on to the solver's order.

        Args:
            levels: All N + 1 levels of the run.
            index: Where the sample is, below N.
        """

    def reset_history(self) -> None:
        """Forget earlier predictions: the next step is of first order, the one after of second.

        For when the predictions jump, as where guidance is switched.
        """
        self.history.clear()

    def _prepare(self, levels: Sequence[Level]) -> None:
        self.history.clear()
        self._seeds: list[int] = []
        self._choices = [self._weights(levels, i) for i in range(len(levels) - 1)]
        self._noisy = any(update.noise for choices in self._choices for update in choices)

    def _weights(self, levels: Sequence[Level], index: int) -> list[Update]:
        if self.space == "noise" and levels[index].alpha == 0.0:
            return [Update(levels[index + 1].sigma, (levels[index + 1].alpha,))]
        return self.updates(levels, index)

    def _advance(self, index: int, output: Tensor, sample: Tensor, generator: Generator) -> Tensor:
        level = self._levels[index]
        if self._noisy and generator is None and not self._seeds:
            self._seeds = seeds_of(sample)
        if self.space == "noise" and level.alpha == 0.0:
            data = self._conversion.data(output, sample, level)
            self._keep(sample / level.sigma)
            return self._choices[index][0].apply(sample, [data])
        prediction = self._predict(output, sample, level)
        sample = self._revise(index, prediction, sample)
        self._keep(prediction)
        choices = self._choices[index]
        chosen = choices[min(len(self.history), len(choices)) - 1]
        noise = self._draw(index, sample, generator) if chosen.noise else None
        return chosen.apply(sample, self.history, noise)

    def _revise(self, index: int, prediction: Tensor, sample: Tensor) -> Tensor:  # noqa: ARG002
        """The sample to step from, once there is a prediction at it: where a corrector acts."""
        return sample

    def _predict(self, output: Tensor, sample: Tensor, level: Level) -> Tensor:
        conversion: Conversion = self._conversion
        if self.space == "velocity":
            return conversion.velocity(output, sample, level)
        read = conversion.data if self.space == "data" else conversion.noise
        return read(output, sample, level)

    def _keep(self, prediction: Tensor) -> None:
        self.history.insert(0, prediction)
        del self.history[self._depth() :]

    def _depth(self) -> int:
        """How many predictions are kept."""
        return max(len(choices) for choices in self._choices)

    def _draw(self, index: int, sample: Tensor, generator: Generator) -> Tensor:
        if generator is None:
            generator = seeded(self._seeds, index, sample.device)
        return standard_normal(sample, generator)
