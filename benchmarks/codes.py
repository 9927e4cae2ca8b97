"""Which code of 8 bits accumulators are stored in (csrc/rule/codes.h): momenta and second moments of real gradients,
exact and in each code, side by side.

    python benchmarks/codes.py [parameters that share a scale, 128 by default]

The gradients are those of a perceptron on digits, of a recurrent language model over lopt's sources, and of
convolutions on digits, in 400 steps of the shipped theta. Every code is rounded stochastically, with a power of two as
the scale of a block. Printed are, of momenta, the error of mom / sqrt(exact second moment), as a share of its root mean
square, for each decay; of second moments that of log(sqrt(rms)), and the share of parameters whose second moment became
zero.
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lopt import LearnedOptimizer

STEPS, MOM_DECAYS, RMS_DECAYS = 400, (0.9, 0.99, 0.999), (0.99, 0.999)
Code = Callable[[Tensor], Tensor]  # [K, blocks, parameters] -> the same, rounded


def between(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    share = torch.where(high > low, (x - low) / (high - low).clamp_min(1e-300), 0.0)
    return torch.where(torch.rand_like(x) < share, high, low)


def power(exponent: int, levels: int) -> Code:
    """The numbers +-(c / levels)^exponent of the scale, c = 0 .. levels."""

    def code(x: Tensor) -> Tensor:
        scale = torch.exp2(torch.ceil(torch.log2(x.abs().amax(-1, keepdim=True).clamp_min(1e-38))))
        size = x.abs() / scale * levels**exponent
        low = torch.floor(size ** (1 / exponent)).clamp(max=levels)
        chosen = between(size, low**exponent, (low + 1).clamp(max=levels) ** exponent)
        return x.sign() * chosen * scale / levels**exponent

    return code


def floating(exponent_bits: int, mantissa_bits: int) -> Code:
    """Small floating-point numbers, whose exponents end with that of the largest number."""

    def code(x: Tensor) -> Tensor:
        largest = torch.floor(torch.log2(x.abs().amax(-1, keepdim=True).clamp_min(1e-300)))
        own = torch.floor(torch.log2(x.abs().clamp_min(1e-300)))
        spacing = torch.exp2(torch.maximum(own, largest + 2 - 2**exponent_bits) - mantissa_bits)
        low = torch.floor(x.abs() / spacing) * spacing
        return x.sign() * between(x.abs(), low, low + spacing)

    return code


MOM = {
    "linear": power(1, 127),
    "square": power(2, 127),
    "cube": power(3, 127),
    "e3m4": floating(3, 4),
    "e4m3": floating(4, 3),
}
RMS = {
    "linear": power(1, 255),
    "fourth": power(4, 255),
    "sixth": power(6, 255),
    "e4m4": floating(4, 4),
    "e5m3": floating(5, 3),
}


def tasks() -> Iterator[tuple[str, nn.Module, Callable[[], Tensor]]]:
    digits = load_digits()
    images, labels = torch.tensor(digits.data / 16.0).float(), torch.tensor(digits.target)
    text = "".join(path.read_text() for path in sorted(Path(__file__).parents[1].glob("lopt/*.py")))
    symbols = torch.tensor(list(text.encode())).clamp(max=127)

    def of_digits(network: nn.Module, *shape: int) -> Callable[[], Tensor]:
        def loss() -> Tensor:
            rows = torch.randint(len(images), (32,))
            return nn.functional.cross_entropy(network(images[rows].view(-1, *shape)), labels[rows])

        return loss

    perceptron = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    yield "perceptron", perceptron, of_digits(perceptron, 64)
    embedding, recurrent, head = nn.Embedding(128, 32), nn.GRU(32, 64, batch_first=True), nn.Linear(64, 128)

    def of_text() -> Tensor:
        rows = torch.stack([symbols[i : i + 33] for i in torch.randint(len(symbols) - 33, (16,)).tolist()])
        found = head(recurrent(embedding(rows[:, :-1]))[0])
        return nn.functional.cross_entropy(found.reshape(-1, 128), rows[:, 1:].reshape(-1))

    yield "language model", nn.ModuleList([embedding, recurrent, head]), of_text
    layers = nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Flatten()
    convolutions = nn.Sequential(*layers, nn.Linear(512, 10))
    yield "convolutions", convolutions, of_digits(convolutions, 1, 8, 8)


def follow(network: nn.Module, loss_of: Callable[[], Tensor], block: int) -> dict[tuple[str, str], Tensor]:
    """Accumulators after the run, ``[K, parameters]``, exact and in every code."""
    optimizer = LearnedOptimizer(network, total_steps=STEPS)
    everything: dict[tuple[int, str, str], Tensor] = {}
    params = list(network.parameters())
    for _ in range(STEPS):
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(loss=loss)
        for i, param in enumerate(params):
            grad = (torch.zeros_like(param) if param.grad is None else param.grad).double().reshape(-1)
            for kind, codes, decays, value in (("mom", MOM, MOM_DECAYS, grad), ("rms", RMS, RMS_DECAYS, grad * grad)):
                decay = torch.tensor(decays).double()[:, None]
                for name in ("exact", *codes):
                    old = everything.get((i, kind, name), torch.zeros(1).double())
                    new = decay * old + (1 - decay) * value
                    if name != "exact":
                        padded = nn.functional.pad(new, (0, -new.shape[1] % block)).reshape(len(new), -1, block)
                        new = codes[name](padded).reshape(len(new), -1)[:, : new.shape[1]]
                    everything[i, kind, name] = new
    names = {key[1:] for key in everything}
    return {name: torch.cat([everything[(i, *name)] for i in range(len(params))], dim=1) for name in names}


def main() -> None:
    torch.manual_seed(0)
    block = int(sys.argv[1]) if len(sys.argv) > 1 else 128
    for task, network, loss_of in tasks():
        print(f"{task}, blocks of {block}")
        found = follow(network, loss_of, block)
        moved = found["rms", "exact"][-1] > 1e-20
        root = found["rms", "exact"][-1, moved].sqrt()
        for name in MOM:
            off = (found["mom", name] - found["mom", "exact"])[:, moved] / root
            size = found["mom", "exact"][:, moved] / root
            shares = (off.square().mean(1) / size.square().mean(1)).sqrt()
            print(f"  mom {name:7}", " ".join(f"{share:7.3f}" for share in shares.tolist()))
        for name in RMS:
            coded, exact = found["rms", name][:, moved], found["rms", "exact"][:, moved]
            error = 0.5 * torch.log((coded + 1e-24) / (exact + 1e-24))
            errors = " ".join(f"{x:7.3f}" for x in error.square().mean(1).sqrt().tolist())
            print(f"  rms {name:7}", errors, f"zeros {float((coded[-1] == 0).double().mean()):.4f}")


if __name__ == "__main__":
    main()
