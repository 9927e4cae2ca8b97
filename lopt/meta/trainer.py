"""The meta-trainer: inner runs under perturbed thetas -> meta-gradient -> Adam on theta -> checkpoint.

One iteration::

    delta_i  = difference of meta-loss between the runs of pair i          (lopt.meta.pairs, anywhere)
    gradient = mean over pairs of direction_i delta_i / (2 sigma)          (lopt.meta.es, lopt.meta.learner)
    theta   -= lr scale Adam(clamp(gradient, -gradient_clip, gradient_clip))   (lopt.meta.outer; or a learned one)

Everything runs on one thread per process: the tensors are so small that more threads cost time, and sums are then the
same whatever the number of cores. Results depend on the configuration alone, not on the executor, unless it lets
workers go on without waiting for each other (:mod:`lopt.meta.asynchronous`).

Source: arXiv:2009.11243, section 3 and appendix B (Adam, and a clip of every component of the meta-gradient).
"""

import json
import os
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from rich.console import Console

from lopt.files import write_text
from lopt.meta import asynchronous, checkpoint, outer, pairs, plots
from lopt.meta.checkpoint import TrainState
from lopt.meta.config import MetaTrainConfig
from lopt.meta.executors import Executor, Serial
from lopt.meta.learner import Learner
from lopt.meta.loggers import JsonLines, Logger
from lopt.meta.metrics import read_metrics, truncate
from lopt.meta.pairs import Shared
from lopt.meta.progress import Reporter, say
from lopt.provenance import commit, file_checksum, versions
from lopt.rule import AnySpec, Theta, unflatten

__all__ = ["MetaTrainConfig", "measure_speed", "run"]


def run(
    config: MetaTrainConfig,
    out: str | os.PathLike[str],
    *,
    resume: bool = False,
    executor: Executor | None = None,
    loggers: Sequence[Logger] = (),
    console: Console | None = None,
    command: str = "",
) -> Theta:
    """Meta-train and leave everything about it in a folder.

    Args:
        out: gets theta.safetensors (the best by validation) and theta_last.safetensors, each with its provenance as
            JSON beside it, metrics.jsonl, meta_loss.png, config.json and checkpoint.pt; made if missing.
        resume: go on from the checkpoint in ``out``, whose configuration must be the same.
        executor: where inner runs are made; in this process by default. It is not closed.
        loggers: where metrics go beside metrics.jsonl; they are not closed.
        console: where progress is shown; standard error by default.
        command: the command line, for the provenance.

    Returns:
        The best theta; its provenance holds the configuration and what the run cost.

    Raises:
        BlockingIOError: another process is at work in ``out``.
        FileExistsError: ``out`` holds a run and ``resume`` is off.
        FileNotFoundError: ``resume`` is on and there is no checkpoint.
        ValueError: the checkpoint is damaged or belongs to another configuration.

    Example:
        >>> import io, tempfile
        >>> from lopt.meta.recipes import recipe
        >>> config = recipe("tiny", inner_steps=100, pairs=2, validation_tasks=1, validation_horizons=(10,))
        >>> theta = run(config, tempfile.mkdtemp(), console=Console(file=io.StringIO()))
        >>> theta.provenance["iterations"]
        1
    """
    out, console, executor = Path(out), console or Console(stderr=True), executor or Serial()
    loggers = [JsonLines(out), *loggers]
    with _alone(out), one_thread():
        spec, state = _continue(config, out) if resume else _begin(config, out, executor, loggers)
        learner = Learner(config, spec, state)
        iterations = _synchronous if config.staleness is None else asynchronous.iterations
        with (
            Reporter(console, state.inner_steps, config.inner_steps) as reporter,
            closing(iterations(learner, executor)) as lines,
        ):
            clock, begun, counted = time.process_time(), time.monotonic(), state.cpu_seconds
            for metrics in lines:
                own = time.process_time() - clock  # of this process; units have counted theirs
                state.cpu_seconds = counted + own if isinstance(executor, Serial) else state.cpu_seconds + own
                metrics["cpu_seconds"] = round(state.cpu_seconds, 2)
                metrics["seconds"] = round(time.monotonic() - begun, 3)
                for logger in loggers:
                    logger.update(metrics)
                reporter.update(metrics)
                due = state.iteration % config.checkpoint_every == 0 or state.inner_steps >= config.inner_steps
                if due or "validation" in metrics:
                    _save(config, spec, state, out, command)
                clock, begun, counted = time.process_time(), time.monotonic(), state.cpu_seconds
    draw(out, console)
    return _theta(config, spec, state, best=True, command=command)


GRACE = 2.0  # seconds in which what a killed process had begun to start ends, too


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """While inside, no other process meta-trains in the folder; one that was killed lets go, in a moment."""
    out.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(out / ".lock", timeout=GRACE):
            yield
    except Timeout as error:
        raise BlockingIOError(
            f"out: another process is meta-training in {str(out)!r}; wait for its end, or choose another folder"
        ) from error


def check_new(out: Path) -> None:
    """Raises FileExistsError where ``out`` holds a run."""
    if (out / "checkpoint.pt").exists() or (out / "metrics.jsonl").exists():
        raise FileExistsError(
            f"out: {str(out)!r} holds a meta-training run already; resume it or choose another folder"
        )


def _begin(
    config: MetaTrainConfig, out: Path, executor: Executor, loggers: Sequence[Logger]
) -> tuple[AnySpec, TrainState]:
    check_new(out)
    theta = start_theta(config)
    checksum = file_checksum(config.init) if config.from_file else None
    state = TrainState.begin(config, theta.flatten(), checksum)
    header = {"config": config.to_json(), "spec": theta.spec.to_json(), "versions": versions(), "commit": commit()}
    write_text(out / "config.json", json.dumps(header, indent=1) + "\n")
    learner = Learner(config, theta.spec, state)
    validation = learner.validate(executor)
    for logger in loggers:
        logger.update({"iteration": 0, "inner_steps": 0, **validation})
    checkpoint.save(out / "checkpoint.pt", config, theta.spec, state)
    return theta.spec, state


def _continue(config: MetaTrainConfig, out: Path) -> tuple[AnySpec, TrainState]:
    before, spec, state = checkpoint.load(out / "checkpoint.pt")
    old, new = before.to_json(), config.to_json()
    for name in old:
        if old[name] != new[name]:
            raise ValueError(
                f"{name}: the run in {str(out)!r} was begun with {old[name]!r}, cannot go on with {new[name]!r}"
            )
    truncate(out, state.iteration)
    return spec, state


def start_theta(config: MetaTrainConfig) -> Theta[Any]:
    """theta before the first iteration."""
    if config.from_file:
        theta = Theta.load(config.init)
    elif config.init == "random":
        theta = Theta.init(config.preset, config.seed)
    else:
        theta = Theta.init_adam(config.preset, config.seed, stop_early=float(config.objective == "held_out"))
    return theta if config.stats is None else theta.with_spec(stats=config.stats)


def _synchronous(learner: Learner, executor: Executor) -> Generator[dict[str, Any], None, None]:
    """Iterations that wait for all their pairs, as metrics."""
    config, state = learner.config, learner.state
    while state.inner_steps < config.inner_steps:
        learner.begin()
        results = _unroll_pairs(learner.shared, state, executor)
        metrics, due = learner.update(results, results)
        state.carries = [result.carry for result in results]
        yield metrics | (learner.validate(executor) if due else {})


def _unroll_pairs(shared: Shared, state: TrainState, executor: Executor) -> list[pairs.Result]:
    """Results of all pairs; the longest runs are begun first, so that no worker waits long for another."""
    order = list(range(len(state.carries)))
    if shared.config.phases[shared.phase].window is None:
        lengths = [pairs.horizon_of(shared.config, shared.phase, shared.iteration, group) for group in order]
        order.sort(key=lambda group: -lengths[group])
    results = executor.map(pairs.unroll_group, shared, [(group, state.carries[group]) for group in order])
    return sorted(results, key=lambda result: result.group)


def _save(config: MetaTrainConfig, spec: AnySpec, state: TrainState, out: Path, command: str) -> None:
    for name, best in (("theta", True), ("theta_last", False)):
        theta = _theta(config, spec, state, best, command)
        theta.save(out / f"{name}.safetensors")
        write_text(out / f"{name}.json", json.dumps(theta.provenance, indent=1) + "\n")
    checkpoint.save(out / "checkpoint.pt", config, spec, state)  # last: what it covers is complete


def _theta(config: MetaTrainConfig, spec: AnySpec, state: TrainState, best: bool, command: str) -> Theta[Any]:
    of = state.best_iteration
    provenance = {
        "method": "meta_train",
        "command": command,
        "config": config.to_json(),
        "start_sha256": state.start_sha256,
        "outer_sha256": None if config.outer in outer.PLAIN else file_checksum(config.outer),
        "iteration": of if best else state.iteration,
        "iterations": state.iteration,
        "inner_steps": state.inner_steps,
        "divergences": state.divergences,
        "cpu_seconds": round(state.cpu_seconds, 1),
        "validation": {"first": state.validation[0], "best": state.validation[of]},
        "versions": versions(),
        "commit": commit(),
    }
    flat = state.best if best else state.average
    return Theta(spec, unflatten(spec, flat.clone()), provenance)


def _start(shared: Shared, item: int) -> None:
    """A unit without work."""


def measure_speed(config: MetaTrainConfig, executor: Executor, seconds: float = 10.0) -> float:
    """Inner steps per second of this executor on the first iterations of ``config``; nothing is trained."""
    with one_thread():
        theta = start_theta(config)
        scale = outer.scales(theta.spec, config.scaling, config.phases[0].groups)
        shared = Shared(config, theta.spec, theta.flatten(), scale, 0, 0, 0)
        items = [(group, None) for group in range(config.groups)]
        executor.map(_start, shared, range(8))  # processes start
        begun, steps, iteration = time.monotonic(), 0, 0
        while time.monotonic() < begun + seconds:
            results = executor.map(pairs.unroll_group, shared._replace(iteration=iteration), items)
            steps, iteration = steps + sum(result.inner_steps for result in results), iteration + 1
        return steps / (time.monotonic() - begun)


def draw(out: Path, console: Console) -> None:
    """Draw meta_loss.png from metrics.jsonl."""
    try:
        plots.meta_loss(read_metrics(out), out / "meta_loss.png")
    except ModuleNotFoundError as error:
        say(console, f"no meta_loss.png: {error.name} is missing; pip install 'lopt[plot]'")


@contextmanager
def one_thread() -> Iterator[None]:
    """torch on one thread, and back."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
