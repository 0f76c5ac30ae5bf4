"""Schedulers of predictor-corrector solvers: a step is redone once its end has been evaluated.

The evaluation at the predicted point serves twice, as the corrector's new node and as the next
predictor's newest one: no evaluation is added.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from torch import Tensor

from samplers.base import Settings
from samplers.multistep import Update
from samplers.multistep_scheduler import MultistepScheduler
from samplers.prediction import Level


class PredictorCorrectorScheduler(MultistepScheduler):
    """A linear multistep solver on the data that corrects each step at the start of the next.

    Predictor and corrector give the sample and the noise of a step the same weights, so that the
    correction is a sum of predictions alone. It is added to the sample as the pipeline hands it
    over: what an inpainting pipeline pasted into it stays.
    """

    def __init__(self, solver: Settings, model: Settings) -> None:
        self._uncorrected: Sequence[int] | None = ()
        super().__init__(solver, model)

    @abstractmethod
    def corrected(self, levels: Sequence[Level], index: int) -> list[Update]:
        """The steps from level ``index`` to the next with a prediction at their end.

        By the number of earlier predictions at hand, as in `updates`; the weight of the new
        prediction comes first. Empty where nothing is corrected.

        Args:
            levels: All N + 1 levels of the run.
            index: Where the sample was, below N − 1: the end of a run is not evaluated.
        """

    def skip_corrector(self, rows: Sequence[int] | None = None) -> None:
        """Do not correct at the next ``step``: the output that it gets was not computed there.

        Args:
            rows: Which samples of the batch that concerns; all of them where ``None``.
        """
        self._uncorrected = rows

    def _prepare(self, levels: Sequence[Level]) -> None:
        super()._prepare(levels)
        self._uncorrected = ()
        inner = range(len(levels) - 2)
        self._corrections = [self._differences(i, self.corrected(levels, i)) for i in inner]

    def _differences(self, index: int, redone: Sequence[Update]) -> list[Update]:
        """What is added to a predicted sample, by the number of earlier predictions at hand."""
        if not redone:
            return []
        found = []
        for count in range(1, self._longest([self._choices[index], redone]) + 1):
            before = _at(self._choices[index], count).history
            after = _at(redone, count).history
            padded = [0.0, *before, *[0.0] * len(after)]
            kept = max(len(after), 1 + len(before))
            weights = [a - b for a, b in zip([*after, *[0.0] * kept], padded, strict=False)]
            found.append(Update(1.0, tuple(weights[:kept])))
        return found

    @staticmethod
    def _longest(choices: Sequence[Sequence[Update]]) -> int:
        return max(len(options) for options in choices)

    def _depth(self) -> int:
        return max(super()._depth(), self._longest([[], *self._corrections]))

    def _revise(self, index: int, prediction: Tensor, sample: Tensor) -> Tensor:
        rows, self._uncorrected = self._uncorrected, ()
        choices = self._corrections[index - 1] if self.history and index else []
        if rows is None or not choices:
            return sample
        chosen = _at(choices, len(self.history))
        revised = chosen.apply(sample, [prediction, *self.history])
        for row in rows:
            revised[row] = sample[row]
        return revised


def _at(choices: Sequence[Update], count: int) -> Update:
    """The choice for so many predictions at hand."""
    return choices[min(count, len(choices)) - 1]
