"""Accumulators in 8 bits: a byte for each number and one for the scale of each block (csrc/rule/codes.h).

Of each accumulator, :data:`BLOCK` neighbouring parameters share a scale s. A byte c for each is a momentum
``c^3 2^(s - 99)``, c = -127 .. 127, or a second moment ``c^6 2^(s - 126)``, c = 0 .. 255.
"""

from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 128
SMALLEST_EXPONENT = 48  # of a block's largest number, biased: beneath, second moments could underflow


class Code(NamedTuple):
    """How numbers of one kind are coded."""

    dtype: torch.dtype
    power: int
    levels: int
    unit: int  # exponent of two of code 1 where the scale is 0

    def number(self, code: Tensor) -> Tensor:
        """Codes as numbers of units; a sixth power is rounded once."""
        cube = code * code * code
        return cube if self.power == 3 else cube * cube


MOM = Code(torch.int8, 3, 127, -99)
RMS = Code(torch.uint8, 6, 255, -126)
CODES = {"mom": MOM, "rms": RMS}


def blocks_of(numel: int) -> int:
    """Blocks, and so scales, of so many parameters.

    Example:
        >>> blocks_of(300)
        3
    """
    return -(-numel // BLOCK)


def decode(code: Code, codes: Tensor, scales: Tensor) -> Tensor:
    """The numbers, float32.

    Args:
        codes: ``[K, *shape]``.
        scales: ``[K, blocks]`` uint8.
    """
    flat = code.number(codes.reshape(len(codes), -1).float())
    return (flat * _power_of_two(_each(scales.int(), flat.shape[1]) + code.unit)).reshape(codes.shape)


def _each(of_blocks: Tensor, numel: int) -> Tensor:
    return of_blocks.repeat_interleave(BLOCK, dim=1)[:, :numel]


def _power_of_two(exponent: Tensor) -> Tensor:
    return (exponent + 127 << 23).view(torch.float32)


def encode(code: Code, values: Tensor, random: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Numbers -> codes and scales: of the two codes next to a number, one at random, right on average.

    A positive second moment does not become zero, since a momentum is divided by its root.

    Args:
        values: ``[K, *shape]``; NaN counts as zero.
        random: ``[K, numel]``, numbers below 2^16; without them numbers are rounded to the nearest.

    Example:
        >>> codes, scales = encode(MOM, torch.tensor([[1.0, -0.125, 0.0]]))
        >>> codes.tolist(), scales.tolist()
        ([[102, -51, 0]], [[79]])
        >>> decode(MOM, codes, scales)
        tensor([[ 1.0120, -0.1265,  0.0000]])
    """
    flat = values.reshape(len(values), -1).float()
    bits = flat.abs().contiguous().view(torch.int32)
    blocks = torch.nn.functional.pad(bits, (0, -flat.shape[1] % BLOCK)).reshape(len(flat), -1, BLOCK)
    scales = torch.clamp((blocks.amax(dim=2).long() + 0x5FFFF >> 23) - SMALLEST_EXPONENT, min=0).int()
    flat = torch.where(torch.isnan(flat), 0.0, flat)
    top = float(code.number(torch.tensor(float(code.levels))))
    x = torch.clamp(flat.abs() * _power_of_two(-_each(scales, flat.shape[1]) - code.unit), max=top)
    low = torch.floor(x.double() ** (1.0 / code.power)).float()
    low = torch.where(code.number(low) > x, low - 1, low)
    low = torch.where(code.number(low + 1) > x, low, low + 1)
    share = 0.5 if random is None else (random.float() + 0.5) / 2**16
    up = x - code.number(low) > share * (code.number(low + 1) - code.number(low))
    chosen = torch.where(up, low + 1, low)
    chosen = chosen * flat.sign() if code is MOM else torch.where(flat > 0, torch.clamp(chosen, min=1), 0.0)
    return chosen.to(code.dtype).reshape(values.shape), scales.to(torch.uint8)
