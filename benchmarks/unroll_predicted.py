#!/usr/bin/env python3
"""Inner steps per second of the unroll engine on an H100 or H200, as instruction issue allows; PREDICTED, not measured.

    python benchmarks/unroll_predicted.py FILE.csv

Counted are the instructions of three loops in the machine code (SASS) of `unroll_kernel<CompactFeatures, 8>`, each as
often as a step of a perceptron goes through it: products of matrices by tile, accumulate and apply. A bound from above:
whatever else a step does, and all waiting, for memory and at barriers, comes on top, and that is expected to be several
times as much. Needs lopt built with CUDA for sm_90, and cuobjdump.
"""

import collections
import csv
import itertools
import sys

import sass

from lopt.benchmark.unroll import PROBLEMS

KERNEL = "unroll_kernel<CompactFeatures, 8>"
THREADS, PIECE = 128, 256  # kTeamThreads in cuda/unroll_team.cuh, kPiece in cuda/unroll_block.cuh
#: Tiles of a product, the largest first: rows, columns, and depth of one trip through the loop.
TILES = ((4, 4, 2), (4, 2, 4), (2, 1, 4), (1, 1, 4))
VALID_EVERY = 10


def innermost_loops(code: list[sass.Instruction]) -> list[collections.Counter[str]]:
    """Instructions of every loop without a loop in it, by first word; those of any memory as `load` and `store`."""
    position = {one.address: i for i, one in enumerate(code)}
    found = []
    for i, one in enumerate(code):
        if one.parts[0] == "BRA" and "0x" in one.operands:
            begin = position.get(int(one.operands.split("0x")[-1], 16), i + 1)
            if begin <= i:
                found.append((begin, i))
    loops = []
    for begin, end in found:
        if not any((b, e) != (begin, end) and begin <= b and e <= end for b, e in found):
            counts = sass.count(code[begin : end + 1])
            counts["load"] = sum(counts[word] for word in ("LD", "LDS", "LDG"))
            counts["store"] = sum(counts[word] for word in ("ST", "STS", "STG"))
            loops.append(counts)
    return loops


def costs(loops: list[collections.Counter[str]]) -> dict[object, float]:
    """Instructions of one trip: of each tile, of accumulate and of apply."""
    found: dict[object, float] = {}
    for rows, columns, depth in TILES:
        multiply, load = rows * columns * depth, (rows + columns) * depth
        some = [one["all"] for one in loops if (one["FFMA"], one["load"], one["store"]) == (multiply, load, 0)]
        found[rows, columns, depth] = min(some)
    found["accumulate"] = min(one["all"] for one in loops if (one["load"], one["store"]) == (7, 5))
    found["apply"] = max(loops, key=lambda one: one["FFMA"])["all"]
    return found


def of_product(cost: dict[object, float], rows: int, columns: int, depth: int) -> float:
    """Instructions of all warps, by the tiles that `product` chooses."""
    for tile in TILES:
        count = -(-rows // tile[0]) * -(-columns // tile[1])
        if count >= THREADS or tile is TILES[-1]:
            return -(-count // 32) * depth / tile[2] * cost[tile]
    raise AssertionError


def of_step(cost: dict[object, float], sizes: tuple[int, ...], batch: int) -> float:
    """Instructions of all warps in a step, and in its share of a validation loss."""
    forward = backward = of_tensors = 0.0
    for number, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
        forward += of_product(cost, batch, outputs, inputs)
        backward += of_product(cost, inputs, outputs, batch)
        backward += of_product(cost, batch, inputs, outputs) if number else 0.0
        for numel in (inputs * outputs, outputs):
            pieces = [min(PIECE, numel - begin) for begin in range(0, numel, PIECE)]
            of_tensors += sum(-(-n // 32) * cost["accumulate"] + -(-n // 64) * cost["apply"] for n in pieces)
    return forward * (1 + 1 / VALID_EVERY) + backward + of_tensors


def main() -> None:
    (kernel,) = (one for one in sass.kernels("sm_90") if one.name == KERNEL)
    cost = costs(innermost_loops(kernel.code))
    rows = []
    for sizes, batch in PROBLEMS:
        counted = of_step(cost, sizes, batch)
        name = f"{'-'.join(map(str, sizes))} batch {batch}"
        rows.append([name, "compact", kernel.registers, kernel.shared, round(counted), round(sass.ISSUE / counted), ""])
        print(f"{name}: {counted:,.0f} warp instructions a step, at most {sass.ISSUE / counted:,.0f} steps/s")
    header = ["problem", "preset", "registers", "static_shared", "warp_instructions", "predicted_steps_per_second"]
    with open(sys.argv[1], "w", newline="") as file:
        csv.writer(file).writerows([[*header, "measured_steps_per_second"], *rows])


if __name__ == "__main__":
    main()
