"""The sequence of a step, for phases in Python; csrc/api/step.h is the same sequence, compiled.

::

    begin        losses given with this step; the clip limit
    accumulate   gradients -> accumulators and statistics                       stats [T, S]
      merge      where tensors are sharded: statistics of shards -> of tensors  stats [T, S]
    advance      losses, statistics -> LSTM -> what apply is conditioned on
    apply        features -> small MLP -> directions                            feedback or hidden units [T, ...]
    direction    directions of matrices orthogonalised -> parameters
      merge      where tensors are sharded: means over shards -> over tensors   feedback or hidden units [T, ...]
    finish       what the next LSTM step sees of the MLP

The reference and the kernels implement :class:`Phases`; an unsharded step of the kernels is one call of the compiled
sequence instead. ``merge`` is a seam: on one device nothing lies in it (:data:`NOTHING`). Kernels write the parameters
of tensors that are not treated as a whole in ``apply`` already.
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
        """The directions; returns ``[T, ...]`` means over what this process holds of every tensor."""

    def direction(self) -> None:
        """Orthogonalise directions of matrices, and write the parameters."""

    def finish(self, means: Tensor) -> None:
        """Keep what the next step needs of ``[T, ...]`` means over whole tensors."""


class Seams:
    """What lies between the phases; this class: nothing.

    ``merge_stats`` takes and returns ``[T, S]`` statistics, in the order of :data:`lopt.rule.features.STATS` and the
    moments of the feature set: means over elements, but for ``nonfinite``, a sum. ``merge_means`` takes and returns the
    ``[T, ...]`` means that :meth:`Phases.apply` returned. Sharded tensors weigh both by numbers of elements.
    """

    def merge_stats(self, stats: Tensor) -> Tensor:
        """Statistics of this process' shards -> of whole tensors."""
        return stats

    def merge_means(self, means: Tensor) -> Tensor:
        """Means over this process' shards -> over whole tensors."""
        return means


NOTHING = Seams()


def run(phases: Phases, seams: Seams = NOTHING) -> None:
    """One step."""
    phases.begin()
    phases.advance(seams.merge_stats(phases.accumulate()))
    means = phases.apply()
    phases.direction()
    phases.finish(seams.merge_means(means))
