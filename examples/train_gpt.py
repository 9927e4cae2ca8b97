"""Train a small GPT on the text of Python's own help: in one process, or in several with DDP or FSDP2.

Stop it at any time, even with SIGKILL, start it again with the same --out, and it goes on where the last checkpoint is.

python examples/train_gpt.py --steps 300 --out out/gpt
torchrun --nproc-per-node 2 examples/train_gpt.py --parallel fsdp --out out/gpt
"""

import argparse
import math
import os
import pydoc_data.topics
import shutil
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from lopt import LearnedOptimizer

LENGTH = 64  # characters of a window
VALIDATE_EVERY, VALID_WINDOWS = 10, 32


# ---- Model ----------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Causal attention and a perceptron, each added to its input."""

    def __init__(self, width: int, dropout: float, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.attend, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        split = self.attend(self.norms[0](hidden)).unflatten(-1, (3, self.heads, -1))
        query, key, value = split.permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.dropout(self.project(seen.transpose(1, 2).flatten(-2)))
        result: Tensor = hidden + self.dropout(self.down(functional.gelu(self.up(self.norms[1](hidden)))))
        return result


class Gpt(nn.Module):
    """Characters in, logits of the next one out."""

    def __init__(self, characters: int, width: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(characters, width), nn.Embedding(LENGTH, width)
        self.blocks = nn.ModuleList(Block(width, dropout) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, characters, bias=False)
        for name, param in self.named_parameters():
            if param.dim() >= 2:
                inner = name.endswith(("project.weight", "down.weight"))
                nn.init.normal_(param, std=0.02 / math.sqrt(2 * layers) if inner else 0.02)

    def forward(self, text: Tensor) -> Tensor:
        hidden = self.embedding(text) + self.position(torch.arange(text.shape[1], device=text.device))
        for block in self.blocks:
            hidden = block(hidden)
        logits: Tensor = self.head(self.norm(hidden))
        return logits


# ---- Ranks ----------------------------------------------------------------------------------------------------------


def start_ranks() -> torch.device:
    """Meet the ranks that torchrun started, or be a group of one; the device of this rank."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return device


def parallelised(model: Gpt, parallel: str, bf16: bool) -> nn.Module:
    """The model on all ranks: copies (ddp), or parts of every parameter (fsdp)."""
    if parallel == "ddp":
        return DistributedDataParallel(model)
    if parallel == "fsdp":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        options: dict[str, Any] = {"mp_policy": policy} if bf16 else {}
        for block in model.blocks:
            fully_shard(block, **options)
        fully_shard(model, **options)
    return model


def gradients_stay_here(model: nn.Module, stay: bool) -> AbstractContextManager[None]:
    """A context for a minibatch; only in the last one of a step do gradients have to meet those of other ranks."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(not stay)
    return model.no_sync() if isinstance(model, DistributedDataParallel) and stay else nullcontext()


def mean_over_ranks(value: Tensor) -> float:
    """The mean of a number of each rank."""
    total = value.detach() / dist.get_world_size()
    dist.all_reduce(total)
    return total.item()


# ---- Checkpoints ----------------------------------------------------------------------------------------------------


class Run(Stateful):
    """What a checkpoint holds; data and dropout follow from the number of the step, and have no state."""

    def __init__(self, model: nn.Module, optimizer: LearnedOptimizer) -> None:
        self.model, self.optimizer, self.step = model, optimizer, 0

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "step": self.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        saved = {"model_state_dict": state_dict["model"], "optim_state_dict": state_dict["optimizer"]}
        set_state_dict(self.model, self.optimizer, **saved)
        self.step = state_dict["step"]


def save(run: Run, out: Path) -> None:
    """A new checkpoint beside the one before, which is given up when the new one is whole: whenever a rank is killed,
    ``latest`` names a whole one."""
    new = out / f"step-{run.step}"
    dcp.save({"run": run}, checkpoint_id=new)  # comes back when all ranks have written
    if dist.get_rank() == 0:
        (out / "latest.new").write_text(new.name)
        os.replace(out / "latest.new", out / "latest")
        for old in out.glob("step-*"):
            if old != new:
                shutil.rmtree(old)


def resume(run: Run, out: Path) -> None:
    """Take up the latest checkpoint, if there is one; this may be done by another number of ranks."""
    if (out / "latest").exists():
        dcp.load({"run": run}, checkpoint_id=out / (out / "latest").read_text())
        say(f"goes on after step {run.step}")


def say(text: str) -> None:
    """Print once, not on every rank."""
    if dist.get_rank() == 0:
        print(text, flush=True)


# ---- Training -------------------------------------------------------------------------------------------------------


def windows(text: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Stretches of ``text``, and the same one character further, ``[rows, LENGTH]`` each."""
    begin = torch.randint(len(text) - LENGTH, (rows, 1))
    both = text[(begin + torch.arange(LENGTH + 1)).to(text.device)]
    return both[:, :-1], both[:, 1:]


def train(options: argparse.Namespace, device: torch.device) -> float:
    """Train, and return the loss on the last tenth of the text."""
    content = "\n".join(pydoc_data.topics.topics.values())
    characters = {character: i for i, character in enumerate(sorted(set(content)))}
    text = torch.tensor([characters[character] for character in content], device=device)
    training, validation = text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]

    torch.manual_seed(options.seed)  # all ranks begin with the same parameters
    gpt = Gpt(len(characters), options.width, options.layers, options.dropout).to(device)
    model = parallelised(gpt, options.parallel, options.bf16)
    optimizer = LearnedOptimizer(model, total_steps=options.steps)
    run = Run(model, optimizer)
    resume(run, options.out)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=options.bf16 and options.parallel != "fsdp")

    def loss_of(batch: tuple[Tensor, Tensor]) -> Tensor:
        with autocast:
            logits = model(batch[0])
        return functional.cross_entropy(logits.flatten(0, 1).float(), batch[1].flatten())

    def validation_loss(rows: int) -> Tensor:
        model.eval()
        with torch.no_grad():
            loss = loss_of(windows(validation, rows))
        model.train()
        return loss

    while run.step < options.steps:
        # Everything random in a step depends on its number and the rank alone.
        torch.manual_seed(hash((options.seed, run.step, dist.get_rank())))
        for part in range(options.accumulate):
            with gradients_stay_here(model, part + 1 < options.accumulate):
                loss = loss_of(windows(training, options.batch))
                (loss / options.accumulate).backward()
            optimizer.observe(train_loss=loss)  # this rank's; the step takes the mean over minibatches and ranks
        if run.step % VALIDATE_EVERY == 0:
            optimizer.observe(valid_loss=validation_loss(VALID_WINDOWS))
        optimizer.step()
        optimizer.zero_grad()
        run.step += 1
        if run.step % options.print_every == 0:
            say(f"step {run.step}: training loss {mean_over_ranks(loss):.3f}")
        if run.step % options.checkpoint_every == 0 or run.step == options.steps:
            save(run, options.out)

    torch.manual_seed(hash((options.seed, dist.get_rank())))
    final = mean_over_ranks(validation_loss(256))
    say(f"{run.step} steps: validation loss {final:.6f} nats")
    return final


def main() -> None:
    """Read the command line, and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--parallel", choices=["none", "ddp", "fsdp"], help="default: ddp where there are several ranks"
    )
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--batch", type=int, default=8, help="windows of a minibatch, on each rank")
    parser.add_argument("--accumulate", type=int, default=1, help="minibatches of a step")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    parser.add_argument("--checkpoint-every", type=int, default=100)
    parser.add_argument("--print-every", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/gpt"), help="folder of the checkpoints")
    options = parser.parse_args()
    device = start_ranks()
    options.parallel = options.parallel or ("ddp" if dist.get_world_size() > 1 else "none")
    options.out.mkdir(parents=True, exist_ok=True)
    train(options, device)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
