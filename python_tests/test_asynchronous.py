"""lopt/meta/asynchronous.py, by simulated workers: which estimates count, of which runs, what a kill leaves."""

import dataclasses
import io
import json
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import meta_cases
import pytest
import torch
from rich.console import Console

from lopt import Theta
from lopt.meta import asynchronous, checkpoint, es, outer, pairs, trainer
from lopt.meta.asynchronous import Estimate, Window
from lopt.meta.config import MetaTrainConfig, Phase
from lopt.meta.executors import Executor, Kept, LocalProcesses, Serial, keeping
from lopt.meta.pairs import Shared
from lopt.meta.simulated import Simulated

SMALL = dataclasses.replace(
    meta_cases.SMALL,
    inner_steps=800,
    phases=(Phase(0.3, (10, 30), "mlp"), Phase(0.7, (20, 40), "all", "pes", window=10)),
    validate_every=300,
    checkpoint_every=2,
    staleness=2,
)


@pytest.fixture(autouse=True)
def one_thread(set_num_threads: Callable[[int], None]) -> None:
    """Tiny tensors are quickest on one thread."""
    set_num_threads(1)


def train(config: MetaTrainConfig, out: Path, executor: Executor, resume: bool = False) -> Theta:
    return trainer.run(config, out, executor=executor, resume=resume, console=Console(file=io.StringIO()))


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


class Recorded(Simulated):
    """Notes every unit that is handed out, when, and what came of it in which order."""

    def flow(self, function: Any, units: Any) -> Generator[tuple[int, Any], None, None]:
        self.given: list[tuple[Shared, Any]] = []
        self.come: list[tuple[int, Any]] = []

        def noted() -> Iterator[tuple[Shared, Any]]:
            for unit in units:
                self.given.append(unit)
                yield unit

        for index, result in super().flow(function, noted()):
            self.come.append((index, result))
            yield index, result


def test_one_worker_does_what_is_done_without_asynchrony(tmp_path: Path) -> None:
    """With one perturbation or sum of them per run: its runs are those of the groups, in turn. The same bits."""
    for out, staleness in (("waits", None), ("not", 0)):
        train(dataclasses.replace(SMALL, staleness=staleness), tmp_path / out, Serial())
    states = [checkpoint.load(tmp_path / out / "checkpoint.pt")[2] for out in ("waits", "not")]
    assert states[0].iteration > 8
    assert torch.equal(states[0].theta, states[1].theta)
    assert torch.equal(states[0].average, states[1].average)
    assert states[0].validation == states[1].validation
    assert torch.equal(states[0].best, states[1].best)


def test_an_iteration_takes_the_first_estimates_that_are_young_enough(tmp_path: Path) -> None:
    """Against the rule, written down again: a fourth worker takes as long as five iterations of the others."""
    config = dataclasses.replace(SMALL, phases=(Phase(1.0, (10, 10), "mlp"),), validate_every=10**6)
    executor = Recorded(4, lambda worker, index: 5.5 if worker == 3 else 1.0 + 0.01 * worker)
    train(config, tmp_path, executor)
    theta = Theta.init_adam("compact", config.seed, stop_early=1.0)
    scale, flat = outer.scales(theta.spec, "prior", "mlp"), theta.flatten()
    moments, lines, fresh, dropped = outer.Moments.zeros(len(flat)), metrics(tmp_path)[1:], [], 0
    made = iteration = 0
    for index, found in executor.come:
        if not isinstance(found, Estimate):
            continue
        shared, window = executor.given[index]
        made += found.result.inner_steps
        if iteration - shared.iteration > 2:
            dropped += 1
            continue
        fresh.append((shared.iteration, window.group, found.result))
        if len(fresh) < config.pairs:
            continue
        fresh.sort(key=lambda entry: entry[:2])
        eps = torch.stack([pairs.perturbation(config, *key, len(flat)) for *key, _ in fresh])
        delta = torch.tensor([result.deltas[0] for *_, result in fresh])
        gradient = es.es_gradient(eps, delta, config.sigma) * (scale > 0)
        moments, direction = outer.adam(moments, gradient.clamp(-1.0, 1.0), scale > 0, config.betas)
        flat = flat - config.lr_at(lines[iteration - 1]["inner_steps"] if iteration else 0) * scale * direction
        ages = [iteration - begun for begun, *_ in fresh]
        line = lines[iteration]
        assert (line["dropped"], line["staleness_max"], line["inner_steps"]) == (dropped, max(ages), made)
        assert line["staleness"] == pytest.approx(sum(ages) / 3)
        assert line["workers"] == len({result.worker for *_, result in fresh})
        iteration, fresh, dropped = iteration + 1, [], 0
        if iteration == len(lines):
            break
    assert torch.equal(flat, checkpoint.load(tmp_path / "checkpoint.pt")[2].theta)
    assert sum(line["dropped"] for line in lines) >= 2
    assert {1} < {line["staleness_max"] for line in lines}
    keys = [(shared.iteration, item.group) for shared, item in executor.given if isinstance(item, Window)]
    assert len(set(keys)) == len(keys)  # no two units are of the same perturbation
    assert len(lines) * 1.0 < executor.now < (len(lines) + 6) * 1.1  # nobody waited for the slow one


@pytest.mark.parametrize("estimator", ["pes", "nres", "truncated_es"])
def test_runs_stay_with_the_worker_that_began_them(estimator: es.EstimatorName, tmp_path: Path) -> None:
    """Every window goes on from the state that its worker's last but ``slots`` window left, as a carry that travels."""
    phase = Phase(1.0, (20, 40), "mlp", estimator, window=10)
    config = dataclasses.replace(SMALL, phases=(phase,), pairs=4, validate_every=10**6)
    executor = Recorded(2, lambda worker, index: 1.0 + 0.3 * worker)
    train(config, tmp_path, executor)
    own: dict[str, list[pairs.Carry | None]] = {}
    went_on = 0
    for index, found in executor.come:
        if not isinstance(found, Estimate):
            continue
        shared, window = executor.given[index]
        waiting = own.setdefault(found.result.worker, [])
        carry = waiting.pop(0) if len(waiting) >= window.slots else None
        expected = pairs.unroll_group(shared, (window.group, carry))
        assert found.result.keys == expected.keys
        assert found.result.deltas == expected.deltas
        waiting += [expected.carry] if expected.carry is not None or len(waiting) < window.slots else []
        went_on += carry is not None
    assert went_on > 10
    assert len(own) == 2
    assert {len(waiting) for waiting in own.values()} <= {1, 2}  # of four groups of pairs between two workers


class Mortal(Recorded):
    """The second worker dies and is replaced: what it kept is gone."""

    def flow(self, function: Any, units: Any) -> Generator[tuple[int, Any], None, None]:
        for index, result in super().flow(function, units):
            if index == 20:
                self._kept[1] = Kept("simulated anew")
            yield index, result


def test_runs_of_a_worker_that_dies_begin_anew(tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, phases=(Phase(1.0, (200, 200), "mlp", "nres", window=10),), pairs=4)
    executor = Mortal(2, lambda worker, index: 1.0)
    train(config, tmp_path, executor)
    results = [found.result for _, found in executor.come if isinstance(found, Estimate)]
    begun = {result.keys[0] for result in results if result.worker == "simulated anew"}
    others = {result.keys[0] for result in results if result.worker != "simulated anew"}
    assert begun
    assert not begun & others
    assert metrics(tmp_path)[-1]["iteration"] == checkpoint.load(tmp_path / "checkpoint.pt")[2].iteration


class Killed(BaseException):
    """Stands for the end of the process."""


class KilledAfter(Recorded):
    """Ends when so many units have come."""

    limit = 30

    def flow(self, function: Any, units: Any) -> Generator[tuple[int, Any], None, None]:
        for index, result in super().flow(function, units):
            if function is asynchronous.work and index >= self.limit:
                raise Killed
            yield index, result


@pytest.mark.parametrize("keep", [False, True])
def test_a_killed_run_resumes_with_its_runs_where_checkpoints_keep_them(keep: bool, tmp_path: Path) -> None:
    phase = Phase(1.0, (200, 200), "mlp", "nres", window=10)
    config = dataclasses.replace(SMALL, phases=(phase,), pairs=4, inner_steps=1500, keep_runs=keep)
    first = KilledAfter(2, lambda worker, index: 1.0 + 0.1 * worker)
    with pytest.raises(Killed):
        train(config, tmp_path, first)
    state = checkpoint.load(tmp_path / "checkpoint.pt")[2]
    reached = max(shared.iteration for shared, item in first.given if isinstance(item, Window))
    assert reached - config.checkpoint_every <= state.iteration <= reached
    sent = [found for _, found in first.come if isinstance(found, Estimate) and found.runs is not None]
    assert (len(sent) > 2) == keep
    known = {carry.keys[0]: carry.step for carry in state.carries if carry is not None}
    assert bool(known) == keep
    again = Recorded(3, lambda worker, index: 1.0)
    train(config, tmp_path, again, resume=True)
    results = [found.result for _, found in again.come if isinstance(found, Estimate)]
    assert {result.keys[0] for result in results} >= known.keys()
    if not keep:
        assert all(result.keys[0][0] >= state.iteration for result in results)
    lines = [line["iteration"] for line in metrics(tmp_path)]
    assert lines == list(range(len(lines)))


def test_while_a_validation_lasts_theta_goes_on(tmp_path: Path) -> None:
    """The units of validations take a hundred times as long."""
    executor = Recorded(3, lambda worker, index: 100.0 if validates(executor, index) else 1.0)
    config = dataclasses.replace(SMALL, phases=(Phase(1.0, (10, 10), "mlp"),), validate_every=250, inner_steps=1200)
    train(config, tmp_path, executor)
    state, lines = checkpoint.load(tmp_path / "checkpoint.pt")[2], metrics(tmp_path)
    validated = [line for line in lines[1:] if "validation" in line]
    assert len(validated) >= 3
    assert any(line["iteration"] - line["validated"] > 2 for line in validated)
    assert {(line["validated"], line["validation"]) for line in validated} <= set(state.validation.items())
    assert lines[-1]["validated"] == lines[-1]["iteration"] == state.iteration


def validates(executor: Recorded, index: int) -> bool:
    return index < len(executor.given) and isinstance(executor.given[index][1], int)


def test_that_most_estimates_are_too_old_is_said(tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, phases=(Phase(1.0, (1, 1), "mlp"),), pairs=1, staleness=1, inner_steps=400)
    with pytest.warns(UserWarning, match=r"staleness: more estimates were dropped \(\d+\) than used \(\d+\); have"):
        train(config, tmp_path, Simulated(8, lambda worker, index: 1.0 + 0.01 * worker))


def test_local_processes_take_part(tmp_path: Path) -> None:
    two = LocalProcesses(2)
    train(SMALL, tmp_path, two)
    two.close()
    lines = metrics(tmp_path)[1:]
    assert max(line["workers"] for line in lines) == 2
    assert all(line["staleness_max"] <= 2 for line in lines)
    assert Theta.load(tmp_path / "theta.safetensors").provenance["config"]["staleness"] == 2


def test_a_worker_keeps_the_runs_of_one_training() -> None:
    theta = Theta.init_adam("compact", 0)
    config = dataclasses.replace(SMALL, phases=(Phase(1.0, (20, 20), "mlp", "nres", window=10),))
    shared = Shared(config, theta.spec, theta.flatten(), outer.scales(theta.spec, "prior", "mlp"), 0, 0, 3)
    with keeping(Kept("here")) as _:
        keys = [
            asynchronous.work(shared, Window(run, group, 1, None, None)).result.keys for group, run in enumerate("aab")
        ]
    assert keys == [((3, 0),), ((3, 0),), ((3, 2),)]


def test_settings() -> None:
    with pytest.raises(ValueError, match="staleness: expected None or a number of iterations, got -1"):
        dataclasses.replace(SMALL, staleness=-1)
    with pytest.raises(ValueError, match="keep_runs: expected staleness with it"):
        dataclasses.replace(SMALL, staleness=None, keep_runs=True)
