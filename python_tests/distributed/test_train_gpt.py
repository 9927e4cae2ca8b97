"""examples/train_gpt.py in one process and in several, stopped and started again."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

SCRIPT = Path(__file__).parents[2] / "examples/train_gpt.py"
SMALL = ["--width", "16", "--layers", "1", "--batch", "2", "--dropout", "0.1"]


def command(out: Path, *options: str, ranks: int = 1) -> list[str]:
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    return [sys.executable, *launch, str(SCRIPT), *SMALL, "--out", str(out), *options]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONFAULTHANDLER": "1"}


def run(out: Path, *options: str, ranks: int = 1) -> str:
    """What it prints."""
    asked = command(out, *options, ranks=ranks)
    done = subprocess.run(asked, capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def final_loss(text: str) -> str:
    found = re.search(r"^\d+ steps: validation loss (\S+) nats$", text, re.MULTILINE)
    assert found is not None, text
    return found[1]


def checkpoint(out: Path, folder: Path) -> dict[str, Any]:
    """The tensors and numbers of the latest checkpoint, whole."""
    dcp_to_torch_save(out / (out / "latest").read_text(), folder / "whole.pt")
    return dict(leaves("", torch.load(folder / "whole.pt", weights_only=True)))


def leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        yield name, value
        return
    for key, item in items:
        yield from leaves(f"{name}.{key}", item)


def unequal(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    assert found.keys() == expected.keys()
    same = {k: torch.equal(v, found[k]) if torch.is_tensor(v) else v == found[k] for k, v in expected.items()}
    return [name for name, value in same.items() if not value]


def test_stopped_alone_and_gone_on(tmp_path: Path) -> None:
    """In one process: killed after six steps, gone on after five, the same losses and state to the bit."""
    options = ["--steps", "8", "--checkpoint-every", "5", "--accumulate", "2", "--print-every", "1"]
    whole = run(tmp_path / "whole", *options)
    assert re.findall(r"^step (\d+): training loss", whole, re.MULTILINE) == [str(step) for step in range(1, 9)]
    assert run(tmp_path / "whole", *options).startswith("goes on after step 8\n8 steps: ")
    with subprocess.Popen(
        command(tmp_path / "half", *options), stdout=subprocess.PIPE, text=True, env=environment()
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step 6"):
                process.kill()
                break
    rest = run(tmp_path / "half", *options)
    assert rest.startswith("goes on after step 5\n")
    assert rest.splitlines()[1:] == whole.splitlines()[5:]
    assert unequal(checkpoint(tmp_path / "half", tmp_path), checkpoint(tmp_path / "whole", tmp_path)) == []


def test_two_ranks_with_fsdp_then_one(tmp_path: Path) -> None:
    """A run of two ranks, of which one goes on alone, and learns."""
    text = run(tmp_path, "--parallel", "fsdp", "--steps", "4", "--bf16", "--accumulate", "2", ranks=2)
    assert final_loss(text)
    alone = run(tmp_path, "--steps", "6")
    assert alone.startswith("goes on after step 4\n")
    assert float(final_loss(alone)) < float(final_loss(text))


def descendants(pid: int) -> list[int]:
    """The processes that a process started, and theirs."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # it has ended
    found, new = [], [pid]
    while new:
        new = [child for child, parent in parents.items() if parent in new]
        found += new
    return found


def killed(out: Path, options: list[str], chance: random.Random) -> bool:
    """Start two ranks, and kill everything that was started after some steps and a moment; whether it ran then."""
    asked = command(out, *options, ranks=2)
    with subprocess.Popen(
        asked, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment()
    ) as top:
        assert top.stdout is not None
        for _ in range(chance.randint(1, 12)):
            top.stdout.readline()
        time.sleep(chance.uniform(0.0, 0.1))
        running = top.poll() is None
        everything = [top.pid, *descendants(top.pid)] if running else []
        for pid in everything:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
    while any(Path(f"/proc/{pid}").exists() for pid in everything):  # nobody writes any more
        time.sleep(0.05)
    return running


@pytest.mark.distributed
@pytest.mark.parametrize("parallel", ["fsdp", "ddp"])
def test_killed_five_times(parallel: str, tmp_path: Path) -> None:
    """At random times: the same loss and state as undisturbed, to the bit."""
    options = ["--parallel", parallel, "--steps", "100", "--checkpoint-every", "2", "--print-every", "1"]
    undisturbed = run(tmp_path / "undisturbed", *options, ranks=2)
    chance, kills = random.Random(), 0
    for _ in range(5):
        kills += killed(tmp_path / "killed", options, chance)
        print((tmp_path / "killed/latest").read_text() if (tmp_path / "killed/latest").exists() else "none")
    text = run(tmp_path / "killed", *options, ranks=2)
    assert kills == 5
    assert final_loss(text) == final_loss(undisturbed)
    assert unequal(checkpoint(tmp_path / "killed", tmp_path), checkpoint(tmp_path / "undisturbed", tmp_path)) == []


DYING = """
import os, runpy, signal, sys
from torch.distributed.checkpoint.filesystem import FileSystemWriter

write = FileSystemWriter.write_data

def dying(self, plan, planner):
    result = write(self, plan, planner)  # its files are there, those of the other rank and what lists them may not be
    if os.environ["RANK"] == "1" and "step-4" in str(self.path):
        os.kill(os.getpid(), signal.SIGKILL)
    return result

FileSystemWriter.write_data = dying
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_rank_that_dies_while_it_writes_a_checkpoint(tmp_path: Path) -> None:
    """The checkpoint before is whole, and the run goes on from it."""
    options = ["--parallel", "fsdp", "--steps", "5", "--checkpoint-every", "2"]
    wrapper = tmp_path / "dying.py"
    wrapper.write_text(DYING)
    asked = command(tmp_path / "killed", *options, ranks=2)
    asked.insert(asked.index(str(SCRIPT)), str(wrapper))
    done = subprocess.run(asked, capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode != 0
    assert (tmp_path / "killed/latest").read_text() == "step-2"
    assert (tmp_path / "killed/step-4").exists()
    text = run(tmp_path / "killed", *options, ranks=2)
    assert text.startswith("goes on after step 2\n")
    assert final_loss(text) == final_loss(run(tmp_path / "undisturbed", *options, ranks=2))
