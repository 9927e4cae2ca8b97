#!/usr/bin/env python3
"""Everything that needs a GPU, in two calls of a few minutes without network, and what is prepared for them elsewhere.

    python benchmarks/gpu.py build      without a GPU: kernels for sm_90 -> build/gpu/prebuilt, to be taken along
    python benchmarks/gpu.py check      at most 150 s: are results right?
    python benchmarks/gpu.py measure    at most 240 s: how quick is it?

`check`: only the bindings are compiled, and linked with build/gpu/prebuilt (where there is none, all is compiled).
Each kernel is launched once, blocking, and compared with those of the CPU; a small step is compared with the reference.
Where something fails, compute-sanitizer's memcheck comes at once, with torch's allocator out of the way, which hides
most from it. Then all GPU tests, a process for each file.
`measure`: whole steps of ViT-B/16, GPT-2 355M and one tensor of 1e8, then the kernels by themselves, inner runs of
meta-training (benchmarks/unroll_gpu.py), racecheck last.

A step that fails or runs past its limit is written down, and the next one begins; rows are written when they are
measured. Five files are left in --out: summary.txt, which is printed too, log.txt with all output, step.csv,
kernel.csv and unroll.csv. The exit code counts what failed. `--device cpu` tries out every step in small, without a
GPU. This file needs nothing but Python, the rest what `check` names when it is missing.
"""

import argparse
import csv
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[1]
PREBUILT = {"cuda": Path("build/gpu/prebuilt"), "cpu": Path("build/gpu-dry/prebuilt")}
LINES = "-lineinfo"  # for compute-sanitizer to name lines; the code is the same
LIMITS = {"build": 3600.0, "check": 150.0, "measure": 240.0}  # seconds
SHORTEST = 5.0  # what is left must be more, or a step is left out
#: What benchmarks/sass.py wrote, and the MLP widths of the presets in it.
PREDICTED = SOURCE / "benchmarks/results/cuda_predicted.csv"
WIDTHS = {"compact": 8, "paper": 32}
#: Test files with the kernels by themselves come first; of others those that mention a GPU.
FIRST = ("test_ops", "test_lagged", "test_tensor_level", "test_devices", "test_state_dtype")
VISIBLE = """
import sys, torch
if not torch.cuda.is_available():
    why = "is built without CUDA" if torch.version.cuda is None else "finds no GPU, or no driver that fits it"
    sys.exit(f"torch {torch.__version__} {why}")
from lopt import kernels
kernels.check_gpu(torch.device("cuda", 0))
facts = torch.cuda.get_device_properties(0)
print(f"{facts.name}, {facts.multi_processor_count} multiprocessors, {facts.total_memory / 2**30:.0f} GiB, "
      f"torch {torch.__version__}, lopt for {kernels.module_of('cuda').cuda_archs}")
"""


@dataclass
class Result:
    """How a step ended."""

    name: str
    code: int  # 124 where it ran past its limit, 125 where it was left out
    seconds: float = 0.0
    output: str = ""

    @property
    def ok(self) -> bool:
        return self.code == 0

    @property
    def last(self) -> str:
        """Its last line."""
        lines = [line.strip() for line in self.output.splitlines() if line.strip()]
        return lines[-1][:300] if lines else "it printed nothing"

    def __str__(self) -> str:
        if self.code == 0:
            return f"{self.name}: ok, {self.seconds:.0f} s; {self.last}"
        if self.code == 124:
            return f"{self.name}: PAST ITS LIMIT of {self.seconds:.0f} s; {self.last}"
        if self.code == 125:
            return f"{self.name}: LEFT OUT, {self.output}"
        how = f"signal {signal.Signals(-self.code).name}" if self.code < 0 else f"exit code {self.code}"
        return f"{self.name}: FAILED, {how} after {self.seconds:.0f} s; {self.last}"


@dataclass
class Script:
    """Steps with limits, one after another or side by side, and what they left."""

    out: Path
    device: str
    python: str
    seconds: float
    results: list[Result] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.start, self.prebuilt = time.monotonic(), PREBUILT[self.device]
        self.out.mkdir(parents=True, exist_ok=True)
        self.summary, self.log = self.out / "summary.txt", self.out / "log.txt"
        self.summary.write_text("")
        self.log.write_text("")
        self.lock = threading.Lock()
        path = [str(SOURCE), *filter(None, [os.environ.get("PYTHONPATH")])]
        programs = [str(Path(self.python).parent), os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"]
        self.environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path),
            "PATH": os.pathsep.join(programs),
            "PYTHONUNBUFFERED": "1",
        }

    @property
    def left(self) -> float:
        """Seconds."""
        return self.start + self.seconds - time.monotonic()

    @property
    def failed(self) -> int:
        return sum(not result.ok for result in self.results)

    def note(self, text: str) -> None:
        """Print a line, and keep it."""
        with self.lock, self.summary.open("a") as file:
            file.write(text + "\n")
        print(text, flush=True)

    def run(self, name: str, limit: float, command: Sequence[str], **environment: str) -> Result:
        """Run a command with its own limit and that of the whole script; what it started ends with it."""
        limit = min(limit, self.left)
        if limit < SHORTEST:
            return self._keep(Result(name, 125, output="no time is left"))
        start = time.monotonic()
        process = subprocess.Popen(
            command,
            cwd=SOURCE,
            env={**self.environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        code, output = 0, ""
        try:
            output, _ = process.communicate(timeout=limit)
            code = process.returncode
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            code = 124
        return self._keep(Result(name, code, time.monotonic() - start, output))

    def side_by_side(self, steps: Sequence[tuple[str, float, Sequence[str]]], at_once: int) -> list[Result]:
        """Several steps, some at a time."""
        with ThreadPoolExecutor(at_once) as pool:
            return list(pool.map(lambda step: self.run(*step), steps))

    def _keep(self, result: Result) -> Result:
        with self.lock, self.log.open("a") as file:
            file.write(f"\n==== {result.name}\n{result.output}\n")
        self.results.append(result)
        self.note(str(result))
        return result

    # ---- Steps -------------------------------------------------------------------------------------------------------

    def module(self) -> bool:
        """The compiled module, of this machine's Python: linked with prebuilt kernels, or else all compiled here."""
        build = [self.python, "setup.py", "--quiet", "build_ext", "--inplace"]
        cuda = "ON" if self.device == "cuda" else "OFF"
        if (SOURCE / self.prebuilt / "facts.cmake").is_file():
            if self.run("link", 90, build, LOPT_PREBUILT=str(self.prebuilt)).ok:
                return True
        else:
            self.note(f"link: no kernels in {self.prebuilt}, which `gpu.py build` makes; all are compiled here")
        return self.run("compile", 140, build, LOPT_CUDA=cuda, LOPT_PREBUILT="", CUDAFLAGS=LINES).ok

    def visible(self) -> bool:
        """Whether there is a GPU that the kernels run on."""
        if self.device != "cuda":
            return True
        if shutil.which("nvidia-smi"):
            self.run(
                "nvidia-smi", 20, ["nvidia-smi", "--query-gpu=name,driver_version,clocks.sm", "--format=csv,noheader"]
            )
        return self.run("GPU", 60, [self.python, "-c", VISIBLE]).ok

    def sanitizer(self, tool: str, name: str, limit: float, command: Sequence[str]) -> None:
        """A command under compute-sanitizer; without a GPU just the command."""
        if self.device == "cuda":
            if shutil.which("compute-sanitizer", path=self.environment["PATH"]) is None:
                self.note(f"{tool}: left out, compute-sanitizer is not installed")
                return
            command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", *command]
        self.run(f"{tool} of {name}", limit, command, PYTORCH_NO_CUDA_MEMORY_CACHING="1")

    def launches(self) -> list[str]:
        """One of each kernel; names of those that ended the process or gave wrong results."""
        script = [self.python, "benchmarks/one_launch.py", "--device", self.device]
        bad: list[str] = []
        after: list[str] = []
        while True:
            result = self.run("launches", 60, [*script, *after], CUDA_LAUNCH_BLOCKING="1")
            found = re.findall(r"^((?:accumulate|apply|sweep) [^:\n]*):(.*)$", result.output, re.MULTILINE)
            bad += [name for name, said in found if said.strip() != "ok"]
            ended = (
                bool(found) and found[-1][0] in bad and result.code not in (0, 125) and "kernels ok" not in result.last
            )
            if not ended or len(bad) > 3:
                return bad or ["launches"] * (not result.ok)
            after = ["--after", found[-1][0]]

    def small_step(self) -> list[str]:
        return [self.python, "benchmarks/small_step.py", "--device", self.device]

    def tests(self) -> None:
        """All GPU tests, each file in a process of its own; the first that fails again under memcheck."""
        files, at_once = gpu_tests(SOURCE / "python_tests"), 4
        chosen = ["-m", "gpu"]
        if self.device != "cuda":
            files, chosen = files[:1], ["-k", "test_is_compiled or (test_exponential and cpu)"]
        threads = max(1, (os.cpu_count() or 1) // at_once)
        # A warning of another package is no error here.
        pytest = [self.python, "-m", "pytest", "-q", "-W", "default", "-p", "no:cacheprovider", "--tb=short"]
        command = ["env", f"OMP_NUM_THREADS={threads}", *pytest, *chosen]
        steps = [(file.stem, 100.0, [*command, str(file.relative_to(SOURCE))]) for file in files]
        results = self.side_by_side(steps, at_once)
        for result in results:
            found = re.search(r"^(?:FAILED|ERROR) (\S+\.py::\S+)", result.output, re.MULTILINE)
            if found and self.device == "cuda":
                self.sanitizer("memcheck", found[1], 45, [*command, found[1]])
                return

    # ---- The two calls, and what comes before ------------------------------------------------------------------------

    def build(self) -> None:
        """Kernels for the machine with the GPU."""
        cuda = ["-DLOPT_CUDA=ON", "-DLOPT_CUDA_ARCHS=90-real", f"-DCMAKE_CUDA_FLAGS={LINES}"]
        cuda = cuda if self.device == "cuda" else ["-DLOPT_CUDA=OFF"]
        where = [self.python, "-m", "pybind11", "--cmakedir"]
        pybind11 = subprocess.run(where, capture_output=True, text=True, check=True).stdout.strip()
        folder = self.prebuilt.parent
        cmake = shutil.which("cmake", path=self.environment["PATH"]) or "cmake"
        facts = [f"-DPython_EXECUTABLE={self.python}", f"-Dpybind11_DIR={pybind11}", "-DLOPT_SIM=OFF"]
        shutil.rmtree(SOURCE / self.prebuilt, ignore_errors=True)
        configure = [cmake, "-G", "Ninja", "-S", ".", "-B", str(folder), *facts, *cuda]
        if self.run("configure", 120, configure).ok:
            self.run("kernels", 3600, [cmake, "--build", str(folder), "--target", "lopt_prebuilt"])
            files = sorted((SOURCE / self.prebuilt).glob("*"))
            self.note(
                f"{self.prebuilt}: {sum(file.stat().st_size for file in files) / 2**20:.1f} MiB in {len(files)} files"
            )

    def check(self) -> None:
        """Whether results are right."""
        if not self.module() or not self.visible():
            return
        bad = self.launches()
        step = self.run("small step", 60, self.small_step(), CUDA_LAUNCH_BLOCKING="1")
        if bad and bad[0] != "launches":
            self.note(f"kernels that failed: {', '.join(bad)}")
            one = [self.python, "benchmarks/one_launch.py", "--device", self.device, "--only", bad[0]]
            self.sanitizer("memcheck", bad[0], 45, one)
        elif not step.ok or self.device != "cuda":
            self.sanitizer("memcheck", "small step", 45, self.small_step())
        self.tests()

    def measure(self) -> None:
        """How quick it is, what matters most first."""
        if not self.module() or not self.visible():
            return
        small = self.device != "cuda"
        ways = ["--stats", "current", "lagged", "--state-dtypes", "float32", "bfloat16"]
        models = ["--models", "vit-b16"] if small else ["--models", "vit-b16", "gpt2-355m"]
        scale = ["--scale", "0.1", "--repeats", "1"] if small else []
        one = ["--sizes", "1000" if small else "100000000", "--tensors", "1"]
        many = ["--sizes", "1000"] if small else ["--sizes", "10000", "100000", "1000000", "10000000"]
        precisions = ["--precisions", "high", "fast"]

        def bench(name: str, what: str, limit: float, *options: str) -> None:
            device = ["--device", self.device, "--out", str((self.out / f"{what}.csv").resolve())]
            self.run(name, limit, [self.python, "-m", "lopt.benchmark", what, *device, *options, *scale])

        for what in ("kernel", "step", "unroll"):
            (self.out / f"{what}.csv").unlink(missing_ok=True)
        bench("steps", "step", 90, *models, *one, *ways, *precisions)
        bench("kernels", "kernel", 60, *one, *ways, *precisions)
        bench("steps, directions of matrices", "step", 40, *models, "--presets", "spectral", "--no-peers")
        bench("steps, bfloat16 parameters", "step", 40, *models, *ways, "--dtype", "bfloat16", "--no-peers")
        rows = str((self.out / "unroll.csv").resolve())
        unroll = [self.python, "benchmarks/unroll_gpu.py", "--backend", self.device, "--out", rows]
        self.run("inner runs", 40, [*unroll, *(["--runs", "2", "--steps", "20"] if small else [])])
        bench("kernels, small", "kernel", 40, *many, "--tensors", "1")
        bench("steps, small", "step", 40, *many, "--tensors", "1", *(["10"] if small else ["1000"]))
        self.sanitizer("racecheck", "small step", 60, self.small_step())
        for what in ("step", "kernel"):
            for line in shortened(self.out / f"{what}.csv", predictions(PREDICTED)):
                self.note(line)


def gpu_tests(folder: Path) -> list[Path]:
    """Test files that may have tests for a GPU, those of the kernels first."""
    marks = re.compile(r"mark\.gpu\b|\b(backend|place): Backend\b|\bdevice: torch\.device\b")
    files = [file for file in sorted(folder.rglob("test_*.py")) if marks.search(file.read_text(encoding="utf-8"))]
    return sorted(files, key=lambda file: FIRST.index(file.stem) if file.stem in FIRST else len(FIRST))


def predictions(path: Path) -> dict[str, dict[str, float]]:
    """Kernel -> name of a GPU in lower case, "" where none is said -> predicted picoseconds per parameter."""
    if not path.is_file():
        return {}
    found: dict[str, dict[str, float]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            times = {
                re.fullmatch(r"predicted_(?:(\w+)_)?memory_ps", name): value for name, value in row.items() if value
            }
            others = [float(row.get(f"predicted_{name}_ps") or 0) for name in ("issue", "tensor")]
            memory = {(match[1] or ""): float(value) for match, value in times.items() if match}
            if row["arch"] == "sm_90" and memory:
                found[row["kernel"]] = {device: max(value, *others) for device, value in memory.items()}
    return found


def predicted(row: Mapping[str, str], of: Mapping[str, Mapping[str, float]]) -> float | None:
    """Picoseconds per parameter of what a row measured on this GPU; None where nothing was predicted."""
    if row["benchmark"] != "kernel" or row["dtype"] != "float32" or row["preset"] not in WIDTHS:
        return None
    state = "bfloat16, " * (row["state_dtype"] == "bfloat16")
    arguments = f"{state}{row['preset'].title()}Features"
    name = "accumulate_kernel"
    if row["name"] != "accumulate":
        name = f"{row['name']}_mma_kernel"
        arguments += f", {WIDTHS[row['preset']]}, {2 if row['precision'] == 'high' else 1}"
    times = of.get(f"{name}<{arguments}>", {})
    return next((time for device, time in times.items() if device and device in row["machine"].lower()), None)


def shortened(path: Path, of: Mapping[str, Mapping[str, float]]) -> list[str]:
    """The rows that :mod:`lopt.benchmark` left, in columns, with what was predicted of kernels."""
    if not path.is_file():
        return [f"{path.name}: no rows"]
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    lines = [["", "layout", "ms", "GB/s", "of copy", "x AdamW", "host us", "predicted ms", ""]]
    for row in rows:
        usual = {"stats": "current", "state_dtype": "float32", "precision": "high"}
        words = [row["preset"], *(row[name] for name in usual if row[name] != usual[name]), row["name"]]
        words += [row["dtype"]] * (row["dtype"] != "float32")
        ahead = predicted(row, of)
        lines.append(
            [
                " ".join(word for word in words if word),
                row["layout"],
                f"{1e3 * float(row['seconds']):.3f}",
                _number(row, "gb_per_s", ".0f"),
                _number(row, "copy_share", ".0%"),
                _number(row, "times_adamw", ".2f"),
                _number(row, "host_seconds", ".0f", 1e6),
                "" if ahead is None else f"{1e-9 * ahead * float(row['parameters']):.3f}",
                "waits for the host" if row["device_alone"] == "False" else "",
            ]
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    form = [
        "  ".join(
            cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    return [
        f"{path.name}, {rows[0]['machine']}" if rows else f"{path.name}: no rows",
        *(line.rstrip() for line in form),
    ]


def _number(row: Mapping[str, str], name: str, form: str, factor: float = 1.0) -> str:
    return format(factor * float(row[name]), form) if row[name] else ""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=tuple(LIMITS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "out/gpu")))
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--seconds", type=float, help="limit of the whole call")
    options = parser.parse_args(arguments)
    script = Script(options.out, options.device, options.python, options.seconds or LIMITS[options.what])
    try:
        getattr(script, options.what)()
    except Exception as error:
        script.note(f"{options.what}: {type(error).__name__}: {error}")
        script.results.append(Result(options.what, 1))
    bad = [result.name for result in script.results if not result.ok]
    script.note(f"{options.what}: {len(bad)} of {len(script.results)} steps failed{': ' * bool(bad)}{', '.join(bad)}")
    script.note(f"{time.monotonic() - script.start:.0f} s; summary.txt, log.txt and rows in {options.out}")
    return min(len(bad), 99)


if __name__ == "__main__":
    sys.exit(main())
