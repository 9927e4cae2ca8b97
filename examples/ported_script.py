"""A training loop as it is written for AdamW, with one line changed: a warm-up and a cosine of a learning rate that the
loop writes into the groups, weight decay for matrices, clipped gradients, several minibatches in a step.

python examples/ported_script.py --steps 300 [--optimizer adamw] [--peak-lr 0 --weight-decay 0]
"""

import argparse
import math
import pydoc_data.topics

import torch
from torch import Tensor, nn
from torch.nn import functional

from lopt import LearnedOptimizer

LENGTH, ROWS, ACCUMULATED = 64, 6, 2  # characters of a window, windows of a minibatch, minibatches of a step


class Block(nn.Module):
    """Causal attention and a perceptron, each added to its input."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.attend, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        split = self.attend(self.norms[0](hidden)).unflatten(-1, (3, self.heads, -1))
        query, key, value = split.permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.project(seen.transpose(1, 2).flatten(-2))
        result: Tensor = hidden + self.down(functional.gelu(self.up(self.norms[1](hidden))))
        return result


class Gpt(nn.Module):
    """Characters in, logits of the next one out; the embedding is also the last matrix."""

    def __init__(self, characters: int, width: int, layers: int) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(characters, width), nn.Embedding(LENGTH, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        for name, param in self.named_parameters():
            if param.dim() >= 2:
                inner = name.endswith(("project.weight", "down.weight"))
                nn.init.normal_(param, std=0.02 / math.sqrt(2 * layers) if inner else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(param)

    def forward(self, text: Tensor) -> Tensor:
        hidden = self.embedding(text) + self.position.weight[: text.shape[1]]
        return functional.linear(self.norm(self.blocks(hidden)), self.embedding.weight)


def windows(text: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Stretches of ``text`` from anywhere in it, and the same one character further, ``[rows, LENGTH]`` each."""
    begin = torch.randint(len(text) - LENGTH, (rows, 1))
    both = text[begin + torch.arange(LENGTH + 1)]
    return both[:, :-1], both[:, 1:]


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean cross-entropy of the next character, in nats."""
    return functional.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


def rate(step: int, steps: int, peak: float) -> float:
    """A learning rate that rises in a tenth of the steps and falls to a tenth of its peak."""
    warmup = steps // 10
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    return 0.1 * peak + 0.45 * peak * (1.0 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def main(
    steps: int,
    optimizer: str = "lopt",
    peak_lr: float = 1e-3,
    weight_decay: float = 0.1,
    width: int = 128,
    layers: int = 4,
    seed: int = 0,
) -> float:
    """Train, and return the loss on the last tenth of the text; ``peak_lr=0`` leaves ``lr`` alone."""
    torch.manual_seed(seed)
    content = "\n".join(pydoc_data.topics.topics.values())
    characters = {character: i for i, character in enumerate(sorted(set(content)))}
    text = torch.tensor([characters[character] for character in content])
    train, valid = text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]

    model = Gpt(len(characters), width, layers)
    groups = [
        {"params": [param for param in model.parameters() if param.dim() >= 2], "weight_decay": weight_decay},
        {"params": [param for param in model.parameters() if param.dim() < 2], "weight_decay": 0.0},
    ]
    if optimizer == "adamw":
        opt: torch.optim.Optimizer = torch.optim.AdamW(groups, lr=peak_lr, betas=(0.9, 0.99))
    else:
        opt = LearnedOptimizer(groups)  # the line that changes
    for step in range(steps):
        for group in opt.param_groups:
            if peak_lr > 0.0:
                group["lr"] = rate(step, steps, peak_lr)
        for _ in range(ACCUMULATED):
            loss = loss_of(model, windows(train, ROWS))
            (loss / ACCUMULATED).backward()
            if isinstance(opt, LearnedOptimizer):
                opt.observe(train_loss=loss)  # may be left out, too
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        opt.zero_grad(set_to_none=True)
        if step % 20 == 0:
            print(f"step {step}: training loss {loss.item():.3f}")

    torch.manual_seed(0)
    with torch.no_grad():
        final = sum(loss_of(model, windows(valid, 64)).item() for _ in range(4)) / 4
    print(f"{steps} steps: validation loss {final:.3f} nats")
    return final


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--optimizer", choices=["lopt", "adamw"], default="lopt")
    parser.add_argument("--peak-lr", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    main(given.steps, given.optimizer, given.peak_lr, given.weight_decay, seed=given.seed)
