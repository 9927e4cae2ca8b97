"""lopt/meta/loggers.py: what TensorBoard and Weights & Biases read back is what metrics.jsonl says."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lopt.cli import main
from lopt.meta.loggers import TensorBoard, WeightsAndBiases, numbers
from lopt.meta.metrics import read_metrics

pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")]

COMMAND = ["meta-train", "--recipe", "tiny", "--workers", "1", "--inner-steps", "600"]
SETTINGS = ["--set", "pairs=2", "validation_tasks=1", "validation_horizons=[10]"]


def meta_train(out: Path, name: str) -> dict[tuple[str, int], float]:
    """Every number that metrics.jsonl has, by name and iteration."""
    assert main([*COMMAND, "--out", str(out), "--log", name, *SETTINGS]) == 0
    lines = read_metrics(out)
    assert lines[-1]["iteration"] >= 2
    return {(key, line["iteration"]): value for line in lines for key, value in numbers(line).items()}


def read_tensorboard(folder: Path) -> dict[tuple[str, int], float]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder)).Reload()
    return {(key, event.step): event.value for key in events.Tags()["scalars"] for event in events.Scalars(key)}


def records_of(content: bytes) -> Iterator[bytes]:
    """The records of a log in LevelDB's format: blocks of 32 KiB, in them parts with checksum, length and kind."""
    assert content[:4] == b":W&B"
    at, whole = 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # all of a record, or its last part
            yield whole
            whole = b""


def read_wandb(folder: Path) -> tuple[dict[tuple[str, int], float], set[str]]:
    """The history and the ids in the files of all runs."""
    pytest.importorskip("wandb").teardown()  # its process writes files when it likes, at the latest when it ends
    records = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    found: dict[tuple[str, int], float] = {}
    ids = set()
    for file in sorted(folder.glob("offline-run-*/*.wandb")):
        for data in records_of(file.read_bytes()):
            record = records.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "run":
                ids.add(record.run.run_id)
            if record.WhichOneof("record_type") == "history":
                for item in record.history.item:
                    key = item.key or "/".join(item.nested_key)
                    if not key.startswith("_"):
                        found[key, record.history.step.num] = json.loads(item.value_json)
    return found, ids


def test_tensorboard_reads_the_metrics(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs the extra tensorboard")
    expected = meta_train(tmp_path, "tensorboard")
    found = read_tensorboard(tmp_path / "tensorboard")
    assert found.keys() == expected.keys()
    assert {key: float(value) for key, value in found.items()} == pytest.approx(expected, rel=1e-6)  # they are float32


def test_tensorboard_takes_a_resumed_run_in_place_of_what_was_lost(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs the extra tensorboard")
    for begin, value in ((0, 1.0), (2, 10.0)):
        logger = TensorBoard(tmp_path)
        for iteration in range(begin, begin + 4):
            logger.update({"iteration": iteration, "meta_loss": value + iteration})
        logger.close()
    found = read_tensorboard(tmp_path / "tensorboard")
    assert [found["meta_loss", step] for step in range(6)] == [1.0, 2.0, 12.0, 13.0, 14.0, 15.0]


def test_weights_and_biases_reads_the_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="needs the extra wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    expected: dict[Any, Any] = meta_train(tmp_path, "wandb")
    found, ids = read_wandb(tmp_path / "wandb")
    assert found == expected
    logger = WeightsAndBiases(tmp_path, {})
    logger.update({"iteration": 100, "meta_loss": 0.5})
    logger.close()
    more, same = read_wandb(tmp_path / "wandb")
    assert more == expected | {("meta_loss", 100): 0.5}
    assert same == ids
    assert len(ids) == 1
