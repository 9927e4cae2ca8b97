"""The meta-trainer: inner runs under perturbed thetas -> meta-gradient -> Adam on theta -> checkpoint.

One iteration::

    gradient = mean over lanes of the estimates (lopt.meta.lanes, lopt.meta.es)
    theta    = Adam(theta, clamp(gradient, -gradient_clip, gradient_clip))

Everything runs in one thread: the tensors are so small that more threads cost time, and sums are then the same
whatever the number of cores.

Source: arXiv:2009.11243, section 3 and appendix B (Adam, and a clip of every component of the meta-gradient).
"""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from lopt.meta import checkpoint, lanes, plots
from lopt.meta.checkpoint import TrainState
from lopt.meta.config import MetaTrainConfig
from lopt.meta.progress import Reporter, say
from lopt.meta.provenance import commit, versions
from lopt.theta import Theta, ThetaSpec, unflatten

__all__ = ["MetaTrainConfig", "run"]

#: Settings that may differ between a run and its continuation.
EXTENSIBLE = ("iterations", "checkpoint_every")


def run(
    config: MetaTrainConfig, out: str | os.PathLike[str], resume: bool = False, console: Console | None = None
) -> Theta:
    """Meta-train and leave everything about it in a folder.

    Args:
        out: gets theta.safetensors, metrics.jsonl, meta_loss.png, config.json and checkpoint.pt; made if missing.
        resume: go on from the checkpoint in ``out``; ``iterations`` and ``checkpoint_every`` may differ from before.
        console: where progress is shown; standard error by default.

    Returns:
        theta after the last iteration; its provenance holds the configuration and what the run cost.

    Raises:
        FileExistsError: ``out`` holds a run and ``resume`` is off.
        FileNotFoundError: ``resume`` is on and there is no checkpoint.
        ValueError: the checkpoint is damaged or belongs to another configuration.

    Example:
        >>> import io, tempfile
        >>> config = MetaTrainConfig(iterations=1, pairs=2, horizon=(3, 3), validation_runs=1)
        >>> theta = run(config, tempfile.mkdtemp(), console=Console(file=io.StringIO()))
        >>> theta.provenance["inner_steps"]
        12
    """
    out, console = Path(out), console or Console(stderr=True)
    with _one_thread():
        spec, state = _continue(config, out) if resume else _begin(config, out)
        with Reporter(console, state.iteration, state.inner_steps, config.iterations) as reporter:
            while state.iteration < config.iterations:
                clock = time.process_time()
                metrics = _iterate(config, spec, state)
                due = state.iteration % config.checkpoint_every == 0 or state.iteration == config.iterations
                if due:
                    metrics["validation"] = _validate(config, spec, state)
                state.cpu_seconds += time.process_time() - clock
                _append(out, {**metrics, "cpu_seconds": round(state.cpu_seconds, 2)})
                reporter.update(metrics)
                if due:
                    _theta(config, spec, state).save(out / "theta.safetensors")
                    checkpoint.save(out / "checkpoint.pt", config, spec, state)  # last: what it covers is complete
    _draw(out, console)
    return _theta(config, spec, state)


def _begin(config: MetaTrainConfig, out: Path) -> tuple[ThetaSpec, TrainState]:
    if (out / "checkpoint.pt").exists() or (out / "metrics.jsonl").exists():
        raise FileExistsError(
            f"out: {str(out)!r} holds a meta-training run already; resume it or choose another folder"
        )
    out.mkdir(parents=True, exist_ok=True)
    theta = (Theta.init_adam if config.init == "adam" else Theta.init)(config.preset, config.seed)
    state = TrainState(theta.flatten(), config.lr, [None] * config.tasks_per_iteration)
    header = {"config": config.to_json(), "spec": theta.spec.to_json(), "versions": versions()}
    (out / "config.json").write_text(json.dumps(header, indent=1) + "\n")
    _append(out, {"iteration": 0, "validation": _validate(config, theta.spec, state)})
    checkpoint.save(out / "checkpoint.pt", config, theta.spec, state)
    return theta.spec, state


def _continue(config: MetaTrainConfig, out: Path) -> tuple[ThetaSpec, TrainState]:
    before, spec, state = checkpoint.load(out / "checkpoint.pt")
    old, new = before.to_json(), config.to_json()
    for name in old:
        if old[name] != new[name] and name not in EXTENSIBLE:
            raise ValueError(
                f"{name}: the run in {str(out)!r} was begun with {old[name]!r}, cannot go on with {new[name]!r}"
            )
    metrics = [line for line in read_metrics(out) if line["iteration"] <= state.iteration]
    partial = out / "metrics.jsonl.partial"
    partial.write_text("".join(json.dumps(line) + "\n" for line in metrics))
    os.replace(partial, out / "metrics.jsonl")
    return spec, state


def _iterate(config: MetaTrainConfig, spec: ThetaSpec, state: TrainState) -> dict[str, Any]:
    """One outer iteration: advances ``state`` and returns its line of metrics."""
    theta = state.theta.detach()
    results = [lanes.estimate(config, spec, theta, lane, i, state.iteration) for i, lane in enumerate(state.lanes)]
    estimates = [result[1] for result in results]
    gradient = torch.stack([estimate.gradient for estimate in estimates]).mean(dim=0)
    state.theta.grad = torch.clamp(gradient, -config.gradient_clip, config.gradient_clip)
    state.adam.step()
    state.lanes = [result[0] for result in results]
    state.iteration += 1
    state.inner_steps += sum(estimate.inner_steps for estimate in estimates)
    state.divergences += sum(estimate.divergences for estimate in estimates)
    return {
        "iteration": state.iteration,
        "meta_loss": sum(estimate.meta_loss for estimate in estimates) / len(estimates),
        "gradient_norm": float(gradient.norm()),
        "gradient_clipped": float((gradient.abs() > config.gradient_clip).float().mean()),
        "inner_steps": state.inner_steps,
        "divergences": state.divergences,
    }


def _validate(config: MetaTrainConfig, spec: ThetaSpec, state: TrainState) -> float:
    """Mean meta-loss on the validation runs."""
    thetas = state.theta.detach()[None]
    loss = float(lanes.evaluate(spec, thetas, lanes.validation_set(config), config.loss_limit).double().mean())
    state.validation[state.iteration] = loss
    return loss


def _theta(config: MetaTrainConfig, spec: ThetaSpec, state: TrainState) -> Theta:
    first, last = min(state.validation), max(state.validation)
    provenance = {
        "method": "meta_train",
        "config": config.to_json(),
        "iterations": state.iteration,
        "inner_steps": state.inner_steps,
        "divergences": state.divergences,
        "cpu_seconds": round(state.cpu_seconds, 1),
        "validation": {"first": state.validation[first], "last": state.validation[last]},
        "versions": versions(),
        "commit": commit(),
    }
    return Theta(spec, unflatten(spec, state.theta.detach().clone()), provenance)


def read_metrics(out: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl up to the first that is not whole."""
    lines: list[dict[str, Any]] = []
    for text in (out / "metrics.jsonl").read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def _append(out: Path, metrics: dict[str, Any]) -> None:
    with (out / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(metrics) + "\n")


def _draw(out: Path, console: Console) -> None:
    try:
        plots.meta_loss(read_metrics(out), out / "meta_loss.png")
    except ModuleNotFoundError as error:
        say(console, f"no meta_loss.png: {error.name} is missing; pip install matplotlib")


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
