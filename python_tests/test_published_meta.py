"""Rules of others in meta-training and evaluation: vmapped steps are those of LearnedOptimizer; a run resumes."""

import dataclasses
import io
import math
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import meta_cases
import pytest
import torch
from optimizer_cases import assert_same_bits
from rich.console import Console
from torch import Tensor

from lopt import LearnedOptimizer, Theta, kernels
from lopt.commands.weights import describe_theta
from lopt.evaluation.jobs import Learned
from lopt.evaluation.opponents import make_optimizer
from lopt.meta import trainer
from lopt.meta.config import MetaTrainConfig, Phase
from lopt.meta.inner import join, select
from lopt.meta.unroll import Run, RunState, bytes_per_run, start, unroll
from lopt.rule import RULES, Rule, unflatten
from lopt.rule.published import MLPLOpt, NNAdam, VeLO
from lopt.tasks.synthetic import Perceptron

TASK = Perceptron(seed=0, data="teacher", regression=True, inputs=6, hidden=(6,), outputs=3, batch_size=8)
SMALL: dict[str, Rule] = {"velo": VeLO(lstm_width=6, bank_size=5), "nn_adam": NNAdam(lstm_width=6)}


@pytest.fixture(autouse=True)
def one_thread(set_num_threads: Callable[[int], None]) -> None:
    """Tiny tensors are quickest on one thread."""
    set_num_threads(1)


def population(name: str, rows: int) -> tuple[Theta[Any], Tensor]:
    """A theta, and ``[rows, P]`` thetas around it."""
    theta = Theta.init(SMALL.get(name, RULES[name]()), seed=1)
    noise = torch.randn(rows, theta.num_floats, generator=torch.Generator().manual_seed(1))
    return theta, theta.flatten() + 0.05 * noise


@pytest.mark.parametrize("total_steps", [0, 12])
@pytest.mark.parametrize("name", RULES)
def test_unroll_is_the_learned_optimizer_in_a_plain_loop(name: str, total_steps: int) -> None:
    """In two windows, with the state as plain data between them; VeLO is told the horizon in place of nothing."""
    theta, thetas = population(name, rows=3)
    run = Run(TASK, seed=5, horizon=12, total_steps=total_steps)
    weights = unflatten(theta.spec, thetas)
    state, first = unroll(theta.spec, weights, run, start(theta.spec, weights, run), 7)
    packed = join([select(state.pack(), [row]) for row in range(3)])
    state, second = unroll(theta.spec, weights, run, RunState.unpack(7, packed), 5)
    losses = torch.cat([first.train, second.train], dim=1)
    close = partial(torch.testing.assert_close, rtol=2e-4, atol=2e-5)
    for row in range(3):
        params = {key: value.requires_grad_() for key, value in TASK.init(5).items()}
        told = total_steps or (12 if name == "velo" else None)
        optimizer = LearnedOptimizer([TASK.group(params.values())], theta.unflatten(thetas[row]), total_steps=told)
        train = TASK.batches(5, "train")
        for step in range(12):
            optimizer.zero_grad()
            loss = TASK.loss(params, next(train))
            loss.backward()
            optimizer.step(loss=loss.detach())
            close(losses[row, step], loss.detach())
        for key, value in params.items():
            close(state.params[key][row], value.detach())
    assert float(losses[:, -1].std()) > 1e-6  # the thetas do differ


@pytest.mark.parametrize("name", RULES)
def test_memory_of_a_run_counts_its_state(name: str) -> None:
    theta, thetas = population(name, rows=1)
    run = Run(TASK, seed=5, horizon=1)
    state = start(theta.spec, unflatten(theta.spec, thetas), run)
    floats = sum(value.numel() for tensor in state.optimizer.tensors for value in tensor.values())
    less = dataclasses.replace(MLPLOpt(), mom_decays=(0.9,))  # whose state is one momentum
    assert bytes_per_run(theta.spec, TASK) - bytes_per_run(less, TASK) == 8 * (floats - TASK.num_params)


def train(config: MetaTrainConfig, out: Path, **options: Any) -> Theta[Any]:
    return trainer.run(config, out, console=Console(file=io.StringIO()), **options)


def test_meta_training_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the theta file of a rule; stopping in between changes no bit. Groups of tensors are trained as always."""
    begin = Theta.init(MLPLOpt(mlp_width=8, step_multiplier=0.01), seed=1)
    begin.save(tmp_path / "start.safetensors")
    config = dataclasses.replace(
        meta_cases.SMALL,
        init=str(tmp_path / "start.safetensors"),
        inner_steps=120,
        phases=(Phase(0.5, (5, 5), "all"), Phase(0.5, (10, 10), "all", "pes", window=5)),
        tasks=("teacher",),
        pairs=2,
        validation_tasks=1,
        validation_horizons=(5,),
        validate_every=60,
        warmup_from_file=0,
        checkpoint_every=1,
    )
    monkeypatch.setattr(trainer, "draw", lambda *_: None)
    theta = train(config, tmp_path / "whole")
    assert theta.spec == begin.spec
    last = Theta.load(tmp_path / "whole/theta_last.safetensors")
    assert all(bool((last.tensors[name] != value).any()) for name, value in begin.tensors.items())
    assert math.isfinite(theta.provenance["validation"]["best"])
    again = Theta.load(tmp_path / "whole/theta.safetensors")
    assert again.spec == theta.spec
    assert_same_bits(again.tensors, theta.tensors)

    save, calls = trainer._save, []

    def stop(*arguments: Any) -> None:
        save(*arguments)
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "_save", stop)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "parts")
    monkeypatch.setattr(trainer, "_save", save)
    train(config, tmp_path / "parts", resume=True)
    assert_same_bits(Theta.load(tmp_path / "parts/theta_last.safetensors").tensors, last.tensors)


@pytest.mark.parametrize("name", RULES)
def test_rules_are_opponents(name: str) -> None:
    """``lopt`` is told the number of steps; untold, VeLO says what it lacks."""
    theta = population(name, 1)[0]
    for who in ("lopt", "lopt-untold"):
        params = {key: value.requires_grad_() for key, value in TASK.init(5).items()}
        optimizer = make_optimizer(who, params.values(), 10, task=TASK, theta=theta)
        loss = TASK.loss(params, next(TASK.batches(5, "train")))
        loss.backward()
        if name == "velo" and who == "lopt-untold":
            with pytest.raises(ValueError, match="total_steps: rule 'velo' has a schedule over the whole run"):
                optimizer.step(loss=loss.detach())  # type: ignore[call-arg]
            continue
        optimizer.step(loss=loss.detach())  # type: ignore[call-arg]
        assert math.isfinite(float(TASK.loss(params, next(TASK.batches(5, "train"))).detach()))
        assert theta.spec.horizon_input == (name == "velo")


@pytest.mark.parametrize("name", RULES)
def test_evaluation_takes_the_file_of_a_rule(name: str, tmp_path: Path) -> None:
    """Also in another process."""
    theta = population(name, 1)[0]
    theta.save(tmp_path / "theta.safetensors")
    learned = pickle.loads(pickle.dumps(Learned.load(tmp_path / "theta.safetensors")))
    assert learned.impl == ("reference" if kernels.why_no_kernels(theta.spec, "cpu") else "cpu")
    assert learned.theta.spec == theta.spec
    assert_same_bits(learned.theta.tensors, theta.tensors)
    assert f"{theta.num_floats:,} floats, {name}, init" in describe_theta("theta", learned.theta)
