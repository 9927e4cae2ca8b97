"""Train a small transformer to continue text, with gradients of several minibatches in a step and validation losses.

python examples/train_text.py --steps 600 [--text FILE] [--device cuda] [--history run.csv]
"""

import argparse
import pydoc_data.topics
from pathlib import Path

import torch
from torch import Tensor, nn

from lopt import History, LearnedOptimizer

LENGTH, ROWS, ACCUMULATED = 64, 16, 2  # bytes of a window, windows of a minibatch, minibatches of a step


class Transformer(nn.Module):
    """Bytes in, logits of the next byte out."""

    def __init__(self, width: int = 64, layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.position = nn.Parameter(0.02 * torch.randn(LENGTH, width))
        block = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, 256)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(LENGTH), persistent=False)

    def forward(self, text: Tensor) -> Tensor:
        hidden = self.embedding(text) + self.position[: text.shape[1]]
        mask = self.mask[: text.shape[1], : text.shape[1]]
        logits: Tensor = self.head(self.blocks(hidden, mask=mask, is_causal=True))
        return logits


def help_topics() -> bytes:
    """A text that is everywhere."""
    return "\n".join(pydoc_data.topics.topics.values()).encode()


def windows(text: Tensor, rows: int) -> Tensor:
    """``[rows, LENGTH + 1]`` stretches of ``text``, from anywhere in it."""
    begin = torch.randint(len(text) - LENGTH, (rows, 1), device=text.device)
    return text[begin + torch.arange(LENGTH + 1, device=text.device)]


def loss_of(model: nn.Module, rows: Tensor) -> Tensor:
    """Mean cross-entropy of the next byte, in nats."""
    return nn.functional.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())


def main(steps: int, text: str | None = None, device: str = "cpu", history: str | None = None, seed: int = 0) -> float:
    """Train for ``steps`` steps and return the loss on the last tenth of the text, which is not trained on."""
    torch.manual_seed(seed)
    content = Path(text).read_bytes() if text else help_topics()
    everything = torch.frombuffer(bytearray(content), dtype=torch.uint8).long().to(device)
    split = len(everything) * 9 // 10
    train, valid = everything[:split], everything[split:]

    model = Transformer().to(device)
    # The model itself, so that embedding and head are known to be such. For a large model: state_dtype=torch.bfloat16
    # halves the optimizer's memory; model.compile() works as usual.
    optimizer = LearnedOptimizer(model, total_steps=steps)
    kept = History(optimizer, model, every=5)  # what it does to every tensor, for those who want to see it
    for step in range(steps):
        optimizer.zero_grad()
        for _ in range(ACCUMULATED):
            loss = loss_of(model, windows(train, ROWS))
            (loss / ACCUMULATED).backward()
            optimizer.observe(train_loss=loss)  # the step sees the mean of what it was told since the last one
        if step % 20 == 0:
            with torch.no_grad():
                valid_loss = loss_of(model, windows(valid, 256))  # many rows, as noise looks like overfitting
            optimizer.observe(valid_loss=valid_loss)
            print(f"step {step}: training loss {loss.item():.3f}, validation loss {valid_loss.item():.3f}")
        optimizer.step()

    if history is not None:
        kept.save(history)  # lopt plot draws it
    with torch.no_grad():
        final = loss_of(model, windows(valid, 1024)).item()
    print(f"{steps} steps: validation loss {final:.3f} nats per byte")
    return final


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--text", help="a file to train on; Python's help topics if none is given")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--history", help="a CSV file for what the optimizer did to every tensor")
    arguments = parser.parse_args()
    main(arguments.steps, arguments.text, arguments.device, arguments.history)
