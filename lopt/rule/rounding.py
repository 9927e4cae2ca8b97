"""Stochastic rounding of accumulators to bfloat16 or codes of 8 bits, by bits that depend on step and position
(csrc/rule/rounding.h)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lopt.rule import codes


@dataclass(frozen=True)
class Rounding:
    """Stochastic rounding of accumulators to bfloat16: up with the probability of the rest, so right on average.

    Rounding to nearest would never move an accumulator of decay .9999, whose steps are smaller than bfloat16's. The
    random bits are a hash of seed, step, tensor, element and accumulator, the same as in csrc/rule/rounding.h.

    Args:
        step: number of steps so far.
        tensor: position of the tensor in the list.
    """

    step: int
    tensor: int
    seed: int = 0

    def bits(self, accumulators: int, numel: int) -> Tensor:
        """``[accumulators, numel]`` int64, random numbers below 2^16."""
        key = _mix_bits(self.seed + 0x9E3779B97F4A7C15)
        key = _mix_bits(_mix_bits(key + self.step) + self.tensor)
        element = torch.arange(numel)

        def words(i: int) -> tuple[Tensor, Tensor]:  # elements beyond 2^32 have others
            word = torch.tensor(
                [_mix_bits(key + high * 16 + i + 1) for high in range(max(numel - 1, 0) // 2**32 + 1)],
                dtype=torch.uint64,
            ).view(torch.int64)[element >> 32]
            return word & 0xFFFFFFFF, (word >> 32) & 0xFFFFFFFF

        first, second = words(0)
        x = element & 0xFFFFFFFF ^ first
        x = _times(x ^ (x >> 16), 0x7FEB352D) + second & 0xFFFFFFFF
        x = _times(x ^ (x >> 15), 0x846CA68B)
        x = x ^ (x >> 16)
        rows = [x & 0xFFFF, x >> 16]
        for i in range(1, accumulators - 1):
            first, second = words(i)
            rows.append((_times(x, first | 1) + second & 0xFFFFFFFF) >> 16)
        return torch.stack(rows[:accumulators])

    def __call__(self, values: Tensor) -> Tensor:
        """``values`` ``[accumulators, numel]``, as float32, rounded to bfloat16 numbers, in their own dtype."""
        bits = self.bits(*values.shape).to(values.device)
        single = values.float()
        rounded = (single.view(torch.int32).long() + bits & -0x10000).to(torch.int32).view(torch.float32)
        return torch.where(torch.isnan(single), single, rounded).to(values.dtype)


class Coding:
    """Stochastic rounding of accumulators to codes of 8 bits (:mod:`lopt.rule.codes`), by the same bits.

    Args:
        rounding: step and tensor.
        num_mom: how many of the accumulators are momenta; the others are second moments.

    After a call, ``stored`` is the state: momenta, second moments, and the scales of both.
    """

    def __init__(self, rounding: Rounding, num_mom: int) -> None:
        self.rounding, self.num_mom = rounding, num_mom
        self.stored: tuple[Tensor, ...] = ()

    def __call__(self, values: Tensor) -> Tensor:
        """``values`` ``[accumulators, numel]``, as float32, rounded to numbers of codes, in their own dtype."""
        self.stored = coded(values, self.num_mom, self.rounding.bits(*values.shape).to(values.device))
        return torch.cat(decoded(*self.stored)).to(values.dtype)


def coded(values: Tensor, num_mom: int, random: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """``num_mom`` momenta, then second moments, ``[K, *shape]``, in 8 bits: codes of either, and the scales of both.

    Args:
        random: ``[K, numel]`` numbers below 2^16; without them numbers are rounded to the nearest.
    """
    parts = (None, None) if random is None else (random[:num_mom], random[num_mom:])
    mom, of_mom = codes.encode(codes.MOM, values[:num_mom], parts[0])
    rms, of_rms = codes.encode(codes.RMS, values[num_mom:], parts[1])
    return mom, rms, torch.cat([of_mom, of_rms])


def decoded(mom: Tensor, rms: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Momenta and second moments ``[K, *shape]`` in 8 bits, with the scales of both -> float32."""
    k = len(mom)
    return codes.decode(codes.MOM, mom, scales[:k]), codes.decode(codes.RMS, rms, scales[k:])


def _mix_bits(x: int) -> int:
    x &= 0xFFFFFFFFFFFFFFFF
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    x = (x ^ x >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return x ^ x >> 31


def _times(x: Tensor, factor: int | Tensor) -> Tensor:
    """Product modulo 2^32, without leaving 63 bits."""
    low, high = (x & 0xFFFF) * factor, (x >> 16) * (factor & 0xFFFF)
    return low + (high << 16) & 0xFFFFFFFF
