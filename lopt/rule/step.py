"""The sequence of a step, for phases in Python; csrc/api/step.h is the same sequence, compiled.

::

    begin        losses given with this step; the clip limit
    accumulate   gradients -> accumulators and statistics                       stats [T, S]
      merge      where tensors are sharded: statistics of shards -> of tensors  stats [T, S]
    advance      losses, statistics -> LSTM -> what apply is conditioned on
    apply        features -> small MLP -> direction -> parameters               feedback or hidden units [T, ...]
      direction  where matrices are treated as a whole
      merge      where tensors are sharded: means over shards -> over tensors   feedback or hidden units [T, ...]
    finish       what the next LSTM step sees of the MLP

The reference and the kernels implement :class:`Phases`; an unsharded step of the kernels is one call of the compiled
sequence instead. ``merge`` and ``direction`` are seams: on one device, for a rule without a direction stage, nothing
lies in them (:data:`NOTHING`).
"""

from typing import Protocol

from torch import Tensor


class Phases(Protocol):
    """What a step consists of. T are the tensors with a gradient in this step, S the statistics of a tensor."""

    def begin(self) -> None:
        """Take the losses, and fix the bound of the gradient elements."""

    def accumulate(self) -> Tensor:
        """Update the accumulators; returns ``[T, S]`` statistics of what this process holds of every tensor."""

    def advance(self, stats: Tensor) -> None:
        """The tensor level, from ``[T, S]`` statistics of whole tensors."""

    def apply(self) -> Tensor:
        """Write the parameters; returns ``[T, ...]`` means over what this process holds of every tensor."""

    def finish(self, means: Tensor) -> None:
        """Keep what the next step needs of ``[T, ...]`` means over whole tensors."""


class Seams:
    """What lies between the phases; this class: nothing.

    ``merge_stats`` takes and returns ``[T, S]`` statistics, in the order of :data:`lopt.rule.features.STATS` and the
    moments of the feature set: means over elements, but for ``nonfinite``, a sum. ``merge_means`` takes and returns the
    ``[T, ...]`` means that :meth:`Phases.apply` returned. Sharded tensors weigh both by numbers of elements.
    ``direction`` is called when the directions of matrices are known and before they are written.
    """

    def merge_stats(self, stats: Tensor) -> Tensor:
        """Statistics of this process' shards -> of whole tensors."""
        return stats

    def direction(self) -> None:
        """Treat directions of matrices as a whole."""

    def merge_means(self, means: Tensor) -> Tensor:
        """Means over this process' shards -> over whole tensors."""
        return means


NOTHING = Seams()


def run(phases: Phases, seams: Seams = NOTHING) -> None:
    """One step."""
    phases.begin()
    phases.advance(seams.merge_stats(phases.accumulate()))
    means = phases.apply()
    seams.direction()
    phases.finish(seams.merge_means(means))
