"""Counts instructions in the machine code (SASS) of lopt's CUDA kernels, one row per kernel; needs no GPU.

    python benchmarks/sass.py [architecture, such as sm_90] [file.csv]

What to look for: memory moves 16 bytes at a time (`.128`), tensor cores are used where they should be (HMMA),
and nothing lives in local memory (LDL, STL; otherwise the exit code is 1). cuobjdump and nvdisasm come
with the CUDA toolkit or from lopt's extra `sass`.
"""

import collections
import csv
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from lopt import _C

COLUMNS = ["LDG", "LDG.128", "STG", "STG.128", "LDS", "LDS.128", "HMMA", "FFMA", "MUFU", "LDL", "STL", "all"]
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")


def count(sass: str) -> dict[str, collections.Counter[str]]:
    """Kernel name -> number of instructions by first word; those that move 16 bytes also as word + `.128`."""
    kernels: dict[str, collections.Counter[str]] = {}
    for line in sass.splitlines():
        if "Function :" in line:
            counts = kernels.setdefault(line.split(":", 1)[1].strip(), collections.Counter())
        elif found := INSTRUCTION.search(line):
            parts = found[1].split(".")
            counts.update(["all", parts[0], *([f"{parts[0]}.128"] if "128" in parts else [])])
    return kernels


def readable(symbols: list[str]) -> list[str]:
    """Mangled names -> such as `apply_kernel<PaperFeatures, 32>`."""
    names = subprocess.run(["c++filt", *symbols], check=True, capture_output=True, text=True).stdout
    short = (re.sub(r"lopt::|\(anonymous namespace\)::|^void |\(int\)", "", name) for name in names.splitlines())
    return [name.split("(")[0] for name in short]


def main() -> int:
    arch = sys.argv[1] if len(sys.argv) > 1 else "sm_90"
    tools = [str(path) for path in Path(sysconfig.get_path("purelib")).glob("nvidia/cu*/bin")]
    os.environ["PATH"] = os.pathsep.join([*tools, os.environ["PATH"]])
    if not _C.has_cuda or shutil.which("cuobjdump") is None:
        sys.exit("sass: needs lopt built with CUDA (LOPT_CUDA=ON) and cuobjdump: pip install 'lopt[sass]'")
    command = ["cuobjdump", "-sass", "-arch", arch, _C.__file__]
    kernels = count(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    if not kernels:
        sys.exit(f"sass: no kernel for {arch}; lopt._C was built for {_C.cuda_archs}")

    counted = zip(readable(list(kernels)), kernels.values(), strict=True)
    rows = sorted([arch, name, *(kernel[column] for column in COLUMNS)] for name, kernel in counted)
    print(f"{arch:48}" + "".join(f"{column:>9}" for column in COLUMNS))
    for _, name, *numbers in rows:
        print(f"{name:48}" + "".join(f"{number:9}" for number in numbers))
    if len(sys.argv) > 2:
        with open(sys.argv[2], "w", newline="") as file:
            csv.writer(file).writerows([["arch", "kernel", *COLUMNS], *rows])
    return int(any(kernel["LDL"] + kernel["STL"] for kernel in kernels.values()))


if __name__ == "__main__":
    sys.exit(main())
