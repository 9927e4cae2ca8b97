"""The learner of meta-training: estimates of pairs -> meta-gradient -> outer optimizer -> the next theta.

It knows nothing of where and in which order the estimates were made; that is :mod:`lopt.meta.trainer`'s matter, or
:mod:`lopt.meta.asynchronous`'s.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lopt.meta import backprop, es, outer, pairs
from lopt.meta.checkpoint import TrainState
from lopt.meta.config import MetaTrainConfig
from lopt.meta.executors import Executor
from lopt.meta.pairs import Key, Result, Score, Shared
from lopt.rule import AnySpec


class Learner:
    """Advances ``state``, iteration by iteration: :meth:`begin`, then :meth:`update` by the results of ``shared``.

    Args:
        state: changed in place.
    """

    shared: Shared  # what the units of this iteration have in common

    def __init__(self, config: MetaTrainConfig, spec: AnySpec, state: TrainState) -> None:
        self.config, self.spec, self.state = config, spec, state
        self._scales: dict[int, Tensor] = {}  # of phases
        self._directions: dict[Key, Tensor] = {}  # of results of this iteration
        self._sums: dict[tuple[Key, ...], Tensor] = {}  # of perturbations of the runs that may go on
        self._rows: Tensor | None = None  # [pairs, P] of an iteration; new memory for it costs as much as the sums

    def begin(self) -> None:
        """A new iteration, maybe of a new phase."""
        config, state = self.config, self.state
        number = config.phase_at(state.inner_steps)
        if number != state.phase:  # runs of another kind begin
            state.phase, state.phase_begun, state.carries = number, state.iteration, [None] * config.groups
            self._directions.clear()
            self._sums.clear()
        oldest = state.iteration - 1 - 2 * (config.staleness or 0)  # of a window that the next may still follow
        self._sums = {keys: total for keys, total in self._sums.items() if keys[-1][0] >= oldest}
        if number not in self._scales:
            self._scales[number] = outer.scales(self.spec, config.scaling, config.phases[number].groups)
        scale = self._scales[number]
        self.shared = Shared(config, self.spec, state.theta, scale, number, state.phase_begun, state.iteration)

    def update(self, results: Sequence[Result], made: Iterable[Result]) -> tuple[dict[str, Any], bool]:
        """The next theta.

        Args:
            results: by which theta changes.
            made: all that were made since the last time, which have their cost.

        Returns:
            The iteration's line of metrics, and whether a validation is due.
        """
        config, state, scale = self.config, self.state, self.shared.scale
        trained = scale > 0
        gradient = self.gradient(results) * trained
        clipped = torch.clamp(gradient, -config.gradient_clip, config.gradient_clip)
        meta_loss, lr = sum(result.meta_loss for result in results) / len(results), config.lr_at(state.inner_steps)
        noise = _by_family(results)
        if config.outer in outer.PLAIN:
            warmup = config.warmup_from_file if config.from_file else config.warmup
            state.moments, direction = outer.PLAIN[config.outer](state.moments, clipped, trained, config.betas, warmup)
            state.theta = state.theta - lr * scale * direction
            noise["signal"] = round(outer.signal(state.moments, trained, config.betas), 4)
        else:
            learned = outer.learned(config.outer, state.learned, self.spec, state.theta, clipped, scale, meta_loss)
            state.learned, state.theta = learned
        state.average = torch.lerp(state.average, state.theta, 1.0 - config.average)

        before = state.inner_steps
        state.iteration += 1
        for result in made:
            state.inner_steps += result.inner_steps
            state.divergences += result.divergences
            state.cpu_seconds += result.cpu_seconds
        metrics = {
            "iteration": state.iteration,
            "phase": state.phase,
            "lr": lr,
            "meta_loss": meta_loss,
            "gradient_norm": float(gradient.norm()),
            "gradient_clipped": float((clipped != gradient).sum() / trained.sum()),
            "inner_steps": state.inner_steps,
            "divergences": state.divergences,
            **noise,
        }
        done, every = state.inner_steps >= config.inner_steps, config.validate_every
        return metrics, done or state.inner_steps // every > before // every

    def gradient(self, results: Sequence[Result]) -> Tensor:
        """``[P]``, with respect to ``z``."""
        gradients = [result.gradient * self.shared.scale for result in results if result.gradient is not None]
        if gradients:
            return backprop.mean_direction(torch.stack(gradients))
        self.prepare(results)
        chosen = [self._directions.pop((result.iteration, result.group)) for result in results]
        delta = torch.tensor([delta for result in results for delta in result.deltas])
        if self.config.equalise:
            families = [result.family for result in results for _ in result.deltas]
            delta = es.equalised(delta, families)
        self._rows = rows = torch.cat(chosen, out=self._rows)
        return es.es_gradient(rows, delta, self.config.sigma, out=rows)

    def prepare(self, results: Sequence[Result]) -> None:
        """Do now what :meth:`update` has to do for each of these: so nobody waits while it is done for all."""
        for result in results:
            key = result.iteration, result.group
            if result.gradient is None and key not in self._directions:
                self._directions[key] = self.direction(result)

    def direction(self, result: Result) -> Tensor:
        """``[pairs, P]``, what the differences are multiplied by. The sum over a run is kept for its next window."""
        config, keys, num_floats = self.config, result.keys, len(self.state.theta)
        if config.phases[self.state.phase].estimator != "pes":
            return pairs.perturbations(config, keys[-1], num_floats)
        total = self._sums.pop(keys[:-1], None)
        for key in keys if total is None else keys[-1:]:
            eps = pairs.perturbations(config, key, num_floats)
            total = eps if total is None else total + eps
        assert total is not None
        if not result.ended:
            self._sums[keys] = total
        return total

    def validate(self, executor: Executor) -> dict[str, Any]:
        """Scores of the mean theta on the validation runs, as metrics."""
        found = executor.map(pairs.validate_task, self.validation(), range(self.config.validation_tasks))
        return self.score(self.state.iteration, self.state.average, found)

    def validation(self) -> Shared:
        """What the units of a validation of the mean theta have in common."""
        return Shared(self.config, self.spec, self.state.average, torch.zeros(0), 0, 0, self.state.iteration)

    def score(self, iteration: int, average: Tensor, found: Sequence[tuple[list[Score], float]]) -> dict[str, Any]:
        """Take the scores of the mean theta after ``iteration``, keep it where it is the best so far; as metrics.

        ``validation`` is the mean over all runs of the meta-loss over the last tenth of a run, ``validation_mean`` that
        over the whole run.
        """
        state = self.state
        state.cpu_seconds += sum(seconds for _, seconds in found)
        metrics: dict[str, Any] = {}
        for position, (horizon, told) in enumerate(pairs.settings(self.config)):
            finals = [scores[position].final for scores, _ in found]
            metrics[f"final_{horizon}_{'told' if told else 'untold'}"] = sum(finals) / len(finals)
        score = sum(metrics.values()) / len(metrics)
        state.validation[iteration] = score
        if state.best_iteration == iteration:
            state.best = average
        means = [entry.mean for scores, _ in found for entry in scores]
        return {"validation": score, "validation_mean": sum(means) / len(means), **metrics}


def _by_family(results: Sequence[Result]) -> dict[str, Any]:
    """Of each family its pairs and the root mean square of their differences of meta-loss, or its runs and that of the
    norms of their gradients; and CPU seconds.

    The noise of the meta-gradient is proportional to these squares, so they say what each family adds to it.
    """
    found: dict[str, list[Result]] = {}
    for result in results:
        found.setdefault(result.family, []).append(result)
    lines, seconds = {}, {}
    for family, some in sorted(found.items()):
        deltas = [delta for result in some for delta in _sizes(result)]
        size = math.sqrt(sum(delta * delta for delta in deltas) / len(deltas))
        lines[family] = {"pairs": len(deltas), "delta": round(size, 5)}
        seconds[family] = round(sum(result.cpu_seconds for result in some), 3)
    return {"families": lines, "family_cpu_seconds": seconds}


def _sizes(result: Result) -> tuple[float, ...]:
    """Differences of meta-loss, or the norm of a gradient."""
    return result.deltas if result.gradient is None else (float(result.gradient.norm()),)
