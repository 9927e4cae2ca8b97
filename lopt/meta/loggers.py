"""Where metrics go beside metrics.jsonl, which there always is: TensorBoard, Weights & Biases, or yours."""

import os
import secrets
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, Protocol, get_args

from lopt.files import write_text
from lopt.meta import metrics as lines

LoggerName = Literal["tensorboard", "wandb"]


class Logger(Protocol):
    """Takes the metrics of a run, iteration by iteration; 0 is the start. A resumed run begins after its checkpoint."""

    def update(self, metrics: dict[str, Any]) -> None:
        """Take what metrics.jsonl says of one iteration."""
        ...

    def close(self) -> None:
        """Write what is not written yet."""
        ...


class JsonLines:
    """metrics.jsonl in the folder ``out``; every line is in the file when it is taken."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def update(self, metrics: dict[str, Any]) -> None:
        """See :class:`Logger`."""
        lines.append(self.out, metrics)

    def close(self) -> None:
        """Nothing is left to write."""


class TensorBoard:
    """Scalars of all numbers in the folder ``out``/tensorboard, for ``tensorboard --logdir``.

    Raises:
        ModuleNotFoundError: TensorBoard is not installed.
    """

    def __init__(self, out: Path) -> None:
        require("tensorboard")
        self.folder = out / "tensorboard"
        self._writer: Any = None

    def update(self, metrics: dict[str, Any]) -> None:
        """See :class:`Logger`. The first iteration takes the place of what an interrupted run said of it and later."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.folder), purge_step=metrics["iteration"])
        for name, value in numbers(metrics).items():
            self._writer.add_scalar(name, value, metrics["iteration"])

    def close(self) -> None:
        """See :class:`Logger`."""
        if self._writer is not None:
            self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases, with its files in the folder ``out``/wandb; a resumed run goes on under the same id.

    Its own environment variables hold: ``WANDB_MODE=offline`` keeps it on this machine, ``WANDB_PROJECT`` names the
    project (lopt if not given).

    Args:
        config: shown with the run.

    Raises:
        ModuleNotFoundError: wandb is not installed.
    """

    def __init__(self, out: Path, config: dict[str, Any]) -> None:
        self._wandb = require("wandb")
        self.out, self.config = out, config
        self._run: Any = None

    def update(self, metrics: dict[str, Any]) -> None:
        """See :class:`Logger`."""
        if self._run is None:
            self._run = self._begin()
        self._run.log(numbers(metrics), step=metrics["iteration"])

    def close(self) -> None:
        """See :class:`Logger`."""
        if self._run is not None:
            self._run.finish()

    def _begin(self) -> Any:
        file = self.out / "wandb" / "run-id"
        if not file.is_file():
            write_text(file, secrets.token_hex(8))
        return self._wandb.init(
            project=os.environ.get("WANDB_PROJECT", "lopt"),
            name=self.out.name,
            dir=self.out,
            id=file.read_text(encoding="utf-8"),
            resume="allow",
            config=self.config,
            settings=self._wandb.Settings(console="off", silent=True, disable_git=True, disable_code=True),
        )


def make_logger(name: LoggerName, out: Path, config: dict[str, Any]) -> Logger:
    """The logger of that name for a run in the folder ``out``."""
    return TensorBoard(out) if name == "tensorboard" else WeightsAndBiases(out, config)


def require(name: str) -> ModuleType:
    """The package of a logger.

    Raises:
        ModuleNotFoundError: it is not installed; with the extra that brings it.
    """
    assert name in get_args(LoggerName)
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        text = f"log: {error.name} is missing; pip install 'lopt[{name}]'"
        raise ModuleNotFoundError(text, name=error.name) from error


def numbers(metrics: Mapping[str, Any], within: str = "") -> dict[str, float]:
    """All numbers but the iteration, under names joined by strokes.

    Example:
        >>> numbers({"iteration": 3, "lr": 0.1, "families": {"teacher": {"pairs": 2}}, "note": "none"})
        {'lr': 0.1, 'families/teacher/pairs': 2}
    """
    found: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            found |= numbers(value, f"{within}{name}/")
        elif isinstance(value, (int, float)) and within + name != "iteration":
            found[within + name] = value
    return found
