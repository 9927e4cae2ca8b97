"""What does the size of an embedding do to the steps of a transformer?

Trains the model of examples/train_text.py on the first 1.5 MB of the modules of Python's library, which nothing here
holds out: with the embedding as PyTorch makes it (deviation 1) or smaller (.02), seeds 0 and 1. Prints a row per
optimizer: the validation loss in nats per byte after STEPS:DEVIATION. ``grouped`` is a param group with lr=0.25
for the embedding; ``geometric`` measures the steps of a matrix by the geometric mean of its own root mean square and
those of all matrices, which the library does not (by the reference, with another
:func:`lopt.rule.tensor_lstm.tensor_scale`).

    python docs/notebook/scripts/embedding.py 300:1 300:.02 1000:1
"""

import os
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[3] / "examples"))
from train_text import ACCUMULATED, ROWS, Transformer, loss_of, windows

from lopt import LearnedOptimizer
from lopt.evaluation.processes import in_processes
from lopt.meta.executors import usable_cores
from lopt.rule import tensor_lstm
from lopt.rule.tensor_lstm import SMALLEST_SCALE, Shapes

NAMES = ("lopt", "lopt geometric", "lopt grouped", "untold", "untold geometric", "untold grouped")
RATES = ("1e-3", "3e-3", "1e-2")  # of AdamW without decay
SEEDS, BYTES = (0, 1), 1_500_000


def geometric_scale(rms: Tensor, shapes: Shapes, initial: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`lopt.rule.tensor_lstm.tensor_scale`, with geometric means."""
    matrices = (shapes.is_matrix > 0) & (rms > 0)
    mean = rms[matrices].log().mean().exp()
    bounded = torch.maximum(rms, SMALLEST_SCALE * mean)
    scale = torch.where(shapes.is_matrix > 0, torch.sqrt(bounded * mean), torch.minimum(bounded, mean))
    initial = torch.where(initial > 0, initial, scale)
    return initial, torch.minimum(torch.maximum(scale, 0.5 * initial), 2.0 * initial)


def make(name: str, model: Transformer, steps: int) -> torch.optim.Optimizer:
    """An optimizer by its name in the table."""
    if name in RATES:
        return torch.optim.AdamW(model.parameters(), float(name), weight_decay=0.0)
    kind, _, variant = name.partition(" ")
    others = [param for key, param in model.named_parameters() if key != "embedding.weight"]
    groups = [{"params": [model.embedding.weight], "lr": 0.25 if variant == "grouped" else 1.0}, {"params": others}]
    impl = "reference" if variant == "geometric" else "auto"
    return LearnedOptimizer(groups, total_steps=steps if kind == "lopt" else None, impl=impl)


def run(job: tuple[str, int, float, int]) -> float:
    """Validation loss at the end."""
    name, steps, deviation, seed = job
    text = b"".join(path.read_bytes() for path in sorted(Path(os.__file__).parent.glob("*.py")))[:BYTES]
    everything = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    train, valid = everything.tensor_split([len(everything) * 9 // 10])
    torch.manual_seed(seed)
    model = Transformer()
    nn.init.normal_(model.embedding.weight, std=deviation)
    optimizer = make(name, model, steps)
    kept = tensor_lstm.tensor_scale
    tensor_lstm.tensor_scale = geometric_scale if name.endswith("geometric") else kept
    try:
        for step in range(steps):
            optimizer.zero_grad()
            for _ in range(ACCUMULATED):
                loss = loss_of(model, windows(train, ROWS))
                (loss / ACCUMULATED).backward()  # type: ignore[no-untyped-call]
                if isinstance(optimizer, LearnedOptimizer):
                    optimizer.observe(train_loss=loss)
            if step % 20 == 0:
                with torch.no_grad():
                    valid_loss = loss_of(model, windows(valid, 256))
                if isinstance(optimizer, LearnedOptimizer):
                    optimizer.observe(valid_loss=valid_loss)
            optimizer.step()
    finally:
        tensor_lstm.tensor_scale = kept
    with torch.no_grad():
        return loss_of(model, windows(valid, 1024)).item()


def main() -> None:
    asked = [one.partition(":") for one in sys.argv[1:] or ["300:1"]]
    columns = [(int(steps), float(deviation or 1)) for steps, _, deviation in asked]
    jobs = [(name, *column, seed) for column in columns for name in (*NAMES, *RATES) for seed in SEEDS]
    found = dict(in_processes(run, jobs, usable_cores()))
    print("| optimizer |", " | ".join(f"{steps} steps, deviation {size:g}" for steps, size in columns), "|")
    print("|---" * (1 + len(columns)) + "|")
    for name in (*NAMES, *RATES):
        cells = [", ".join(f"{found[(name, *column, seed)]:.3f}" for seed in SEEDS) for column in columns]
        print(f"| {name} |", " | ".join(cells), "|")


if __name__ == "__main__":
    main()
