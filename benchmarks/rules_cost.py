"""What a step of the learned optimizers of others with kernels costs at ten million parameters.

python benchmarks/rules_cost.py [--threads 1]

Seconds of CPU time of this process, and the ratio to torch's fused AdamW in the same run, as constant_cost.py has them.
Thetas are random.
"""

import argparse

import torch
from constant_cost import Optimizers, measure

from lopt import LearnedOptimizer, Theta
from lopt.benchmark.variants import RULES

MODELS = {
    "one matrix": ((4096, 2442),),
    "a transformer's layer and a half": (
        (2304, 768),
        (768, 768),
        (3072, 768),
        (768, 3072),
        (3072,),
        (768,),
        (3072, 1000),
    ),
    "convolutions": ((512, 512, 3, 3),) * 4 + ((256, 256, 3, 3),),
    "one vector": ((10_000_000,),),
}


def of_rule(name: str) -> Optimizers:
    return {name: lambda params: LearnedOptimizer(params, Theta.init(name), total_steps=1000)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    makers: dict[str, object] = {"AdamW fused": lambda params: torch.optim.AdamW(params, fused=True)}
    for name in RULES:
        makers |= of_rule(name)
    for model, shapes in MODELS.items():
        seconds = measure(shapes, 2, arguments.repeats, makers)  # type: ignore[arg-type]
        fused = seconds["AdamW fused"]
        for name, value in seconds.items():
            print(f"{model:34} {name:14} {1e3 * value:8.1f} ms  {value / fused:6.2f} of fused AdamW", flush=True)


if __name__ == "__main__":
    main()
