"""Suites: tasks that no meta-training and no selection of a theta has seen, fixed in code.

The small suite is below: perceptrons (:mod:`lopt.tasks.held_out`) with PyTorch's default initialisation. Others sample
architectures (:mod:`lopt.evaluation.sampled_suites`) or are models as people write them
(:mod:`lopt.evaluation.model_suites`). One is not held out, and says so: language-validation, by which to choose.
"""

import hashlib
import itertools
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple, overload

from lopt.evaluation import model_suites, sampled_suites
from lopt.tasks import datasets
from lopt.tasks.data import catalogue
from lopt.tasks.held_out import ALPHABET, CONTEXT, VERSION, HeldOutTask, load
from lopt.tasks.task import SPLITS, Task


class Evaluation(NamedTuple):
    """What losses are measured on where a task has no whole splits: fixed minibatches, drawn by a seed of their own.

    As many as have ``rows`` rows together, but at most ``batches``.
    """

    rows: int = 1024
    batches: int = 32
    seed: int = 20_201_123


EVALUATION = Evaluation()

SuiteName = Literal["small", "families", "images", "text", "language", "language-validation", "vision", "scripts"]


@overload
def suite(name: Literal["small"], folder: Path | None = None) -> tuple[HeldOutTask, ...]: ...


@overload
def suite(name: SuiteName, folder: Path | None = None) -> tuple[Task, ...]: ...


def suite(name: SuiteName, folder: Path | None = None) -> tuple[Task, ...]:
    """The tasks of a suite, available or not; ``folder`` is where Fashion-MNIST's IDX files are.

    Example:
        >>> [task.name for task in suite("small")][:2]
        ['digits-32-10', 'digits-20-20-10-tanh']
    """
    return small(folder) if name == "small" else _SUITES[name]()


def _families() -> tuple[Task, ...]:
    return (*sampled_suites.families(), HeldOutTask(data="diabetes", sizes=(10, 16, 16, 1)))


_SUITES: dict[SuiteName, Callable[[], tuple[Task, ...]]] = {
    "families": _families,
    "images": sampled_suites.images,
    "text": sampled_suites.texts,
    "language": model_suites.language,
    "language-validation": model_suites.language_validation,
    "vision": model_suites.vision,
    "scripts": model_suites.scripts,
}


def family_of(task: Task) -> str:
    """The family a task belongs to: what its name begins with, where it says none."""
    if isinstance(task, HeldOutTask):
        return "mlp_ae" if task.autoencoder else "mlp"
    return str(getattr(task, "family", task.name.partition("-")[0]))


def data_of(task: Task) -> str:
    """The data set of a task; nothing for one of the user's that has no name for it."""
    data = getattr(task, "data", "")
    return data if isinstance(data, str) else str(getattr(data, "name", ""))


def unavailable(task: Task) -> str | None:
    """Why the data of a task cannot be had here; None if it can."""
    if isinstance(task, HeldOutTask):
        return task.unavailable
    remedy = catalogue.missing(data_of(task))
    return None if remedy is None else f"data set {data_of(task)}: not found on this machine; {remedy}"


@cache
def fingerprint(task: Task) -> str:
    """SHA-256 of what a result depends on: the task, its initial parameters, minibatches and evaluation."""
    if isinstance(task, HeldOutTask):
        return task.fingerprint
    digest = hashlib.sha256(json.dumps([VERSION, EVALUATION, task.config]).encode())
    batches = (next(task.batches(seed, split)) for seed in (0, EVALUATION.seed) for split in SPLITS)
    for tensor in (*task.init(0).values(), *itertools.chain(*batches)):
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()


def small(folder: Path | None = None) -> tuple[HeldOutTask, ...]:
    """The perceptrons of the small suite."""
    fashion = folder or datasets.FASHION_MNIST_FOLDER
    return (
        HeldOutTask(data="digits", sizes=(64, 32, 10), batch_size=64),
        HeldOutTask(data="digits", sizes=(64, 20, 20, 10), activation="tanh"),
        HeldOutTask(data="digits", sizes=(64, 32, 64), autoencoder=True),
        HeldOutTask(data="digits", sizes=(64, 32, 8, 32, 64), autoencoder=True),
        HeldOutTask(data="digits", sizes=(64, 16, 16, 16, 10)),
        HeldOutTask(data="digits", sizes=(64, 128, 10)),
        HeldOutTask(data="digits", sizes=(64, 10)),
        HeldOutTask(data="breast-cancer", sizes=(30, 16, 2)),
        HeldOutTask(data="wine", sizes=(13, 16, 3), batch_size=16),
        HeldOutTask(data="diabetes", sizes=(10, 16, 16, 1)),
        HeldOutTask(data="spirals", sizes=(2, 32, 32, 3)),
        HeldOutTask(data="friedman1", sizes=(10, 32, 1)),
        HeldOutTask(data="characters", sizes=(CONTEXT * ALPHABET, 32, ALPHABET), batch_size=64),
        HeldOutTask(data="fashion-mnist-7x7", sizes=(49, 32, 10), batch_size=64, folder=fashion),
        HeldOutTask(data="fashion-mnist", sizes=(784, 32, 10), batch_size=128, folder=fashion),
        HeldOutTask(data="fashion-mnist", sizes=(784, 64, 64, 10), batch_size=128, folder=fashion),
    )


def take_fashion_mnist_from(folder: Path) -> None:
    """From now on this process reads Fashion-MNIST there.

    Raises:
        FileNotFoundError, ValueError: it is not there, or broken; the message names the folder.
    """
    load("fashion-mnist", folder)
    datasets.FASHION_MNIST_FOLDER = folder
