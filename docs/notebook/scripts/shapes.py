"""Does the optimizer keep up on tensors of other shapes than meta-training had?

Trains, 200 steps each and told total_steps, (a) perceptrons of torch.nn.Linear, whose weights are ``[out, in]`` where
the tasks of meta-training have ``[in, out]``, on classes drawn by a random perceptron, and (b) autoencoders by the
sampler of TaskSet with layers of 384 units or more on generated images. Nothing is held out here. Prints a row per
optimizer: the loss on 4,000 new rows for each width, mean over three seeds, and over the autoencoders the mean of
log(final training loss / initial loss + .01).

    python docs/notebook/scripts/shapes.py lopt adam adam-tuned:2 adam-tuned:4
"""

import math
import sys
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lopt.evaluation.opponents import make_optimizer
from lopt.evaluation.processes import in_processes
from lopt.evaluation.runs import train_task
from lopt.meta.executors import usable_cores
from lopt.tasks import sample_task
from lopt.tasks.task import Task

STEPS, SEEDS, WIDTHS = 200, (0, 1, 2), (64, 512)
INPUTS, CLASSES, ROWS, NEW_ROWS = 256, 10, 128, 4000
AUTOENCODERS, WIDE, MOST_PARAMS = 10, 384, 180_000


def optimizer_of(name: str, params: list[Tensor], steps: int) -> torch.optim.Optimizer:
    """NAME:k is trial k."""
    name, _, trial = name.partition(":")
    return make_optimizer(name, params, steps, int(trial or 0))


def modules(name: str, width: int, seed: int) -> float:
    """Cross entropy on new rows of a perceptron of torch modules."""
    torch.manual_seed(seed)
    teacher = nn.Sequential(nn.Linear(INPUTS, 64), nn.ReLU(), nn.Linear(64, CLASSES))
    for param in teacher.parameters():
        param.data.mul_(2.0 if param.dim() == 2 else 1.0)
    model = nn.Sequential(nn.Linear(INPUTS, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
    model.append(nn.Linear(width, CLASSES))

    def loss(rows: int) -> Tensor:
        inputs = torch.randn(rows, INPUTS)
        with torch.no_grad():
            classes = teacher(inputs).argmax(dim=1)
        return nn.functional.cross_entropy(model(inputs), classes)

    optimizer = optimizer_of(name, list(model.parameters()), STEPS)
    for _ in range(STEPS):
        optimizer.zero_grad()
        now = loss(ROWS)
        now.backward()  # type: ignore[no-untyped-call]
        optimizer.step(**({"loss": now.detach()} if hasattr(optimizer, "observe") else {}))
    with torch.no_grad():
        return float(loss(NEW_ROWS))


def autoencoders() -> Iterator[Task]:
    """The first from seed 400 on that are wide and not too large."""
    found = 0
    for seed in range(400, 1000):
        task = sample_task(seed, ["mlp_ae"], ["textures", "templates"])
        wide = max(max(value.shape) for value in task.init(0).values()) >= WIDE
        if wide and task.num_params <= MOST_PARAMS:
            yield task
            found += 1
        if found == AUTOENCODERS:
            return


def autoencoder(name: str, task: Task) -> float:
    """Logarithm of the final over the initial training loss."""
    curve = train_task(task, lambda params, steps: optimizer_of(name, params, steps), 0, STEPS)
    first, last = curve.initial["train"], curve.final["train"]
    return math.log((min(last, 10 * first) / first if math.isfinite(last) else 10.0) + 0.01)


def run(job: tuple[str, int | Task, int]) -> float:
    """One run."""
    name, what, seed = job
    return modules(name, what, seed) if isinstance(what, int) else autoencoder(name, what)


def main() -> None:
    names = sys.argv[1:] or ["lopt", "adam"]
    kinds: dict[str, list[tuple[int | Task, int]]] = {f"width {w}": [(w, seed) for seed in SEEDS] for w in WIDTHS}
    kinds["autoencoders"] = [(task, 0) for task in autoencoders()]
    jobs = [(name, what, seed) for name in names for runs in kinds.values() for what, seed in runs]
    found = {(name, str(what), seed): value for (name, what, seed), value in in_processes(run, jobs, usable_cores())}
    print("| optimizer |", " | ".join(kinds), "|\n|---" + "|---" * len(kinds) + "|")
    for name in names:
        means = [sum(found[name, str(what), seed] for what, seed in runs) / len(runs) for runs in kinds.values()]
        print(f"| {name} |", " | ".join(f"{mean:.3f}" for mean in means), "|")


if __name__ == "__main__":
    main()
