"""Reads the machine code (SASS) of lopt's CUDA kernels: what it must contain, and what time it predicts. Needs no GPU.

    python benchmarks/sass.py [architecture, such as sm_90; all by default] [file.csv]

Checked, with exit code 1 when broken: the main loops move 16 bytes at a time (`.128`), the MLP of `apply_mma_kernel`
and `sweep_mma_kernel` runs on tensor cores (HMMA), nothing lives in local memory (LDL, STL), and enough warps fit on a
multiprocessor.
cuobjdump and nvdisasm come with the CUDA toolkit or from lopt's extra `sass`.

The times are PREDICTED, for float32 parameters and gradients on an H100 SXM or H200 and a tensor that fills it: the
largest of what memory, instruction issue and tensor cores need for one parameter, if each did nothing else.
Instructions are those on the longest path through the main loop that moves 16 bytes at a time, 8 of a bfloat16 state, 4
of one in 8 bits, and calls nothing.
"""

import collections
import csv
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from lopt import _C
from lopt.rule.features import FEATURE_SETS

COLUMNS = ["LDG", "LDG.128", "STG", "STG.128", "LDS", "HMMA", "FFMA", "MUFU", "LDL", "STL", "all"]
FACTS = ["registers", "shared", "warps"]

# At most so many instructions per parameter on sm_90: what is reached, and a little more.
INSTRUCTIONS = {
    "accumulate_kernel<CompactFeatures>": 70,
    "accumulate_kernel<PaperFeatures>": 145,
    "apply_mma_kernel<CompactFeatures, 8, 2>": 275,
    "apply_mma_kernel<CompactFeatures, 8, 1>": 160,
    "apply_mma_kernel<PaperFeatures, 32, 2>": 640,
    "sweep_mma_kernel<CompactFeatures, 8, 2>": 315,
    "sweep_mma_kernel<bfloat16, CompactFeatures, 8, 2>": 360,
    "sweep_mma_kernel<bfloat16, CompactFeatures, 8, 1>": 247,  # what the memory of an H200 takes
}

SWEEPS = "sweep", "sweep_mma"  # accumulate and apply in one
CALLING = "unroll", "gradient"  # with functions that are called, and take some numbers by address: no registers spill
THREADS = 128  # per block, of accumulate and apply: kThreads in cuda/launch.cuh
SHARED = {"sm_80": 164 << 10, "sm_90": 228 << 10, "sm_100": 228 << 10}  # bytes of a multiprocessor

# Memory at four fifths of its peak; multiprocessors times a sustained clock, and per cycle four warp instructions, or
# 2048 multiply-adds of halves, of which mma.sync reaches about 62% (arXiv:2402.13499). The processors are the same.
MEMORY = {"h100": 0.8 * 3.35e12, "h200": 0.8 * 4.8e12}
CLOCK = 132 * 1.755e9
ISSUE = 4 * CLOCK
TENSOR = 0.62 * 2048 * CLOCK

PREDICTED = ["instructions", "bytes", *(f"{device}_memory_ps" for device in MEMORY), "issue_ps", "tensor_ps"]

INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?(U?P\w+)\s+)?([A-Z][A-Z0-9_.]*)([^;]*);")


@dataclass(frozen=True)
class Instruction:
    """One line of SASS."""

    address: int
    predicated: bool
    parts: tuple[str, ...]  # such as ("LDG", "E", "128")
    operands: str

    def width(self, narrowest: int) -> int:
        """What the main path is chosen by: 1 for a global access of 16 bytes, or that always happens and moves
        ``narrowest`` bits or more; -1 for one that always happens and moves less, or a call; 0 for the rest.
        """
        if self.parts[0] in ("LDG", "STG"):
            moved = next((int(part.lstrip("U")) for part in self.parts if part in ("U8", "U16", "64", "128")), 32)
            if moved == 128:
                return 1
            return 0 if self.predicated else 1 if moved >= narrowest else -1
        return -(self.parts[0] in ("CALL", "WARPSYNC"))

    @property
    def of_halves(self) -> bool:
        """Whether it is for parameters or gradients of 16 bits: widens them (the MLP does so always) or moves them."""
        in_case = self.parts[:2] == ("HADD2", "F32") or (self.parts[0] in ("LDG", "STG") and "128" not in self.parts)
        return in_case and self.predicated


@dataclass(frozen=True)
class Kernel:
    """What is known of one kernel on one architecture."""

    arch: str
    name: str  # such as `apply_mma_kernel<PaperFeatures, 32, 2>`
    code: list[Instruction]
    registers: int
    shared: int  # bytes

    @property
    def counts(self) -> collections.Counter[str]:
        """Instructions by first word; those that move 16 bytes also as word + `.128`."""
        return count(self.code)

    @property
    def warps(self) -> int:
        """That fit on a multiprocessor."""
        of_registers = 65536 // (-(-self.registers // 8) * 8 * THREADS)
        return min(of_registers, SHARED[self.arch] // (self.shared + 1024), 2048 // THREADS) * THREADS // 32

    @property
    def operation(self) -> str:
        return self.name.split("_kernel")[0]

    @property
    def predictable(self) -> bool:
        """Whether its time grows with the number of parameters."""
        return self.operation in ("accumulate", "apply", "apply_mma", *SWEEPS)

    @property
    def template(self) -> tuple[str, tuple[int, ...]]:
        """Name of the feature set, width and parts of the halves, as far as the kernel has them."""
        first, *others = re.sub("bfloat16, |int8, ", "", self.name).split("<")[1].rstrip(">").split(", ")
        return first.removesuffix("Features").lower(), tuple(int(other) for other in others)

    @property
    def stagings(self) -> int:
        """Of a quad: two parameters at a time, or one where shared memory is short (cuda/sweep_mma.cu)."""
        return 4 if self.operation == "sweep_mma" and self.template == ("paper", (32, 2)) else 2

    @property
    def trips(self) -> int:
        """Of a loop within the main loop: the parameters of a quad, or those of the rows that a warp stages."""
        if not self.operation.endswith("_mma"):
            return 4
        return 4 * 32 // self.stagings // {8: 32, 16: 32, 32: 16}[self.template[1][0]]

    def predict(self) -> dict[str, float]:
        """See the docstring of this file, per parameter; empty for kernels of the tensor level."""
        if not self.predictable:
            return {}
        state = 2 if "bfloat16" in self.name else 1 if "int8" in self.name else 4  # bytes
        features = FEATURE_SETS[self.template[0]]
        planes = len(features.mom_decays) + len(features.rms_decays)
        path = main_path(self.code, self.trips, 32 * state)
        per_trip = 1 if self.operation == "apply" else 4  # parameters per thread
        flops = {"16816": 2048, "1688": 1024}  # multiply-adds of one HMMA
        mma = sum(flops[part] for one in path for part in one.parts if one.parts[0] == "HMMA" and part in flops)
        moved = (1 if self.operation.startswith("apply") else 2) * state * planes
        moved += 8 if self.operation == "accumulate" else 12
        return {
            "instructions": len(path) / per_trip,
            "bytes": moved,
            **{f"{device}_memory_ps": moved / rate * 1e12 for device, rate in MEMORY.items()},
            "issue_ps": len(path) / (32 * per_trip) / ISSUE * 1e12,
            "tensor_ps": mma / (32 * per_trip) / TENSOR * 1e12,
        }

    def problems(self) -> list[str]:
        """What is not as it should be."""
        most = 4 if self.operation in CALLING else 0
        found = [f"{n} {word}, expected at most {most}" for word in ("LDL", "STL") if (n := self.counts[word]) > most]
        if self.predictable:
            found += self._problems_of_operation()
        return [f"{self.arch} {self.name}: {problem}" for problem in found]

    def _problems_of_operation(self) -> list[str]:
        name, numbers = self.template
        features = FEATURE_SETS[name]
        planes, counts = len(features.mom_decays) + len(features.rms_decays), self.counts
        stored = planes * (self.operation in ("accumulate", *SWEEPS)) + (self.operation != "accumulate")
        least = {"LDG.128": planes + 2, "STG.128": stored}
        if "bfloat16" in self.name:  # four accumulators are 8 bytes
            least = {"LDG.128": 2, "LDG.64": planes, "STG.64": stored}
        if "int8" in self.name:  # and 4
            least = {"LDG.128": 2, "LDG": 2 + planes, "STG": stored}
        warps, products = 12, 0
        if self.operation == "apply":
            least = {}
        if self.operation.endswith("_mma"):
            width, parts = numbers
            blocks, tiles = len(features.columns) // 8 + 1, width // 8
            # A loop over rows per staging; of both layers, two blocks of 8 inputs at a time, of three products or one.
            together = 1 if tiles == 4 else 2  # times 16 rows in one trip
            of_tile = sum((2 * parts - 1) * (inputs // 2) + parts * (inputs % 2) for inputs in (blocks, tiles))
            last = (tiles + 1) // 2 if parts == 1 else 0
            products = self.stagings * together * (of_tile * tiles + last)
            most = 16 if "int8" in self.name else 32
            warps = 8 if name == "paper" and width >= most and parts == 2 else 12
        if self.operation in SWEEPS and (name == "paper" or (self.operation == "sweep" and numbers[0] == 32)):
            warps = 8
        if self.operation == "apply" and (name, numbers[0]) == ("paper", 32):
            warps = 8
        found = [f"{counts[word]} {word}, expected at least {n}" for word, n in least.items() if counts[word] < n]
        found += [f"{n} {word}, expected accesses of global memory" for word in ("LD", "ST") if (n := counts[word])]
        if counts["HMMA"] != products:
            found.append(f"{counts['HMMA']} HMMA, expected {products}")
        if self.arch == "sm_90" and self.name in INSTRUCTIONS:
            instructions, most = self.predict()["instructions"], INSTRUCTIONS[self.name]
            if instructions > most:
                found.append(f"{instructions} instructions per parameter, expected at most {most}")
        if self.warps < warps:
            found.append(f"{self.warps} warps on a multiprocessor, expected at least {warps}")
        return found


def count(code: list[Instruction]) -> collections.Counter[str]:
    """Instructions by first word; those that move 8 or 16 bytes also as word + `.64` or `.128`."""
    counts = collections.Counter(all=len(code))
    for one in code:
        counts.update([one.parts[0], *(f"{one.parts[0]}.{size}" for size in ("64", "128") if size in one.parts)])
    return counts


def parse(sass: str) -> dict[str, list[Instruction]]:
    """Kernel symbol -> its instructions."""
    kernels: dict[str, list[Instruction]] = {}
    for line in sass.splitlines():
        if "Function :" in line:
            code = kernels.setdefault(line.split(":", 1)[1].strip(), [])
        elif found := INSTRUCTION.search(line):
            address, predicate, word, operands = found.groups()
            code.append(Instruction(int(address, 16), predicate is not None, tuple(word.split(".")), operands))
    return kernels


def successors(code: list[Instruction]) -> list[list[int]]:
    """Positions that may follow each position."""
    position = {one.address: i for i, one in enumerate(code)}
    following = []
    for i, one in enumerate(code):
        after = [i + 1] if i + 1 < len(code) else []
        if one.parts[0] in ("EXIT", "RET") and not one.predicated:
            after = []
        elif one.parts[0] == "BRA":
            target = position[int(one.operands.split("0x")[-1], 16)]
            conditional = one.predicated or "DIV" in one.parts or "P" in one.operands.split("0x")[0]
            after = [target, *after] if conditional else [target]
        following.append(after)
    return following


def main_path(code: list[Instruction], trips: int, narrowest: int = 128) -> list[Instruction]:
    """Instructions of one trip through the main loop: that which moves most in wide accesses, or multiplies most.

    The longest path from the loop's head back to it over as few accesses of less than ``narrowest`` bits as may be, of
    others as many of 16 bytes as may be, and of what is for 16-bit operands as little; loops within are repeated.
    """
    following = successors(code)
    back: set[tuple[int, int]] = set()
    finished: list[int] = []  # positions, successors first
    state = [0] * len(code)
    stack = [(0, iter(following[0]))]
    state[0] = 1
    while stack:
        here, rest = stack[-1]
        for after in rest:
            if state[after] == 1:
                back.add((here, after))
            elif state[after] == 0:
                state[after] = 1
                stack.append((after, iter(following[after])))
                break
        else:
            state[here] = 2
            finished.append(here)
            stack.pop()

    best: tuple[tuple[int, int], list[Instruction]] = ((-1, -1), [])
    for head in {head for _, head in back}:
        value: dict[int, tuple[int, int]] = {}  # position -> (value of the best path to the head, next position)
        for here in finished:
            ends = [(0, -1)] if (here, head) in back else []
            ends += [(value[n][0], n) for n in following[here] if (here, n) not in back and n in value]
            if ends:
                most = max(ends)
                one = code[here]
                widest = one.parts[0] in ("LDG", "STG") and "128" in one.parts
                worth = 10**6 * one.width(narrowest) + 10**4 * widest - 100 * one.of_halves
                value[here] = (most[0] + 1 + worth, most[1])
        path, here = [], head
        while here in value:
            path.append(here)
            here = value[here][1]
        for tail, inner in sorted(back):
            if inner != head and inner in path and tail in path:
                first, last = path.index(inner), path.index(tail)
                path[first : last + 1] = path[first : last + 1] * trips
        trip = [code[i] for i in path]
        counts = count(trip)
        best = max(best, ((counts["LDG.128"], counts["FFMA"]), trip), key=lambda item: item[0])
    return best[1]


def readable(symbols: list[str]) -> list[str]:
    """Mangled names -> such as `apply_kernel<PaperFeatures, 32>`, or `accumulate_kernel<bfloat16, PaperFeatures>`."""
    names = subprocess.run(["c++filt", *symbols], check=True, capture_output=True, text=True).stdout
    short = (
        re.sub(r"lopt::|on_gpu::|\(anonymous namespace\)::|^void |\(int\)", "", name) for name in names.splitlines()
    )
    dtypes = {"(Dtype)0, ": "", "(Dtype)1, ": "bfloat16, ", "(Dtype)3, ": "int8, "}
    named = (re.sub(r"\(Dtype\)\d, ", lambda found: dtypes[found[0]], name) for name in short)
    return [name.split("(")[0] for name in named]


def tool() -> str | None:
    """Path of cuobjdump, or None."""
    tools = [str(path) for path in Path(sysconfig.get_path("purelib")).glob("nvidia/cu*/bin")]
    os.environ["PATH"] = os.pathsep.join([*tools, os.environ["PATH"]])
    return shutil.which("cuobjdump")


def architectures() -> list[str]:
    """With machine code in this build, such as `sm_90`."""
    return [f"sm_{arch.split('-')[0]}" for arch in _C.cuda_archs.split(",") if not arch.endswith("virtual")]


def kernels(arch: str, library: str = "") -> list[Kernel]:
    """All of them, by name: of this build, or of a library that lopt/kernels/own.py made."""

    def dump(option: str) -> str:
        command = ["cuobjdump", option, "-arch", arch, library or str(_C.__file__)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    code = parse(dump("-sass"))
    usage = re.findall(r"Function (\w+):\s+REG:(\d+).*?SHARED:(\d+)", dump("-res-usage"))
    found = {symbol: (int(registers), int(shared)) for symbol, registers, shared in usage}
    named = zip(readable(list(code)), code.items(), strict=True)
    return sorted((Kernel(arch, name, lines, *found[symbol]) for name, (symbol, lines) in named), key=lambda k: k.name)


def main() -> int:
    if not _C.has_cuda or tool() is None:
        sys.exit("sass: needs lopt built with CUDA (LOPT_CUDA=ON) and cuobjdump: pip install 'lopt[sass]'")
    archs = [sys.argv[1]] if len(sys.argv) > 1 else architectures()
    rows: list[list[str | float]] = []
    problems: list[str] = []
    for arch in archs:
        found = kernels(arch)
        if not found:
            sys.exit(f"sass: no kernel for {arch}; lopt._C was built for {_C.cuda_archs}")
        print(f"{arch:44}" + "".join(f"{column:>10}" for column in [*COLUMNS, *FACTS]))
        for kernel in found:
            numbers = [*(kernel.counts[column] for column in COLUMNS), *(getattr(kernel, fact) for fact in FACTS)]
            print(f"{kernel.name:44}" + "".join(f"{number:10}" for number in numbers))
            rows.append([arch, kernel.name, *numbers, *(kernel.predict() or dict.fromkeys(PREDICTED, "")).values()])
            problems += kernel.problems()
        print()
    if "sm_90" in archs:
        print("PREDICTED, not measured; per parameter")
        print(f"{'sm_90':44}" + "".join(f"{column:>16}" for column in PREDICTED))
        for row in rows:
            if row[0] == "sm_90" and row[-1] != "":
                print(f"{row[1]:44}" + "".join(f"{number:16.1f}" for number in row[-len(PREDICTED) :]))
    if len(sys.argv) > 2:
        with open(sys.argv[2], "w", newline="") as file:
            predicted = [f"predicted_{column}" for column in PREDICTED]
            header = ["arch", "kernel", *COLUMNS, *FACTS, *predicted, "measured_ps"]
            csv.writer(file).writerows([header, *([*row, ""] for row in rows)])
    print("", *problems, sep="\n")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
