"""benchmarks/gpu.py without a GPU: what it does where something is missing, crashes, hangs or is wrong.

Its steps are commands of a Python that is given to it; here that is a shell script which says what each of them does.
"""

import importlib.util
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from lopt import tables
from lopt.benchmark import kernels, shapes
from lopt.benchmark.peaks import Peaks
from lopt.benchmark.timing import Timer, Timing
from lopt.benchmark.variants import Variant
from lopt.rule import PRESETS

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    return load("gpu")


Make = Callable[..., Any]


@pytest.fixture
def make(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """``make(cases, device)``: a Script whose Python is a shell script with these cases of its arguments."""
    monkeypatch.setattr(gpu, "SHORTEST", 0.0)
    (tmp_path / "source/build/gpu/prebuilt").mkdir(parents=True)
    (tmp_path / "source/build/gpu/prebuilt/facts.cmake").touch()
    (tmp_path / "source/python_tests").mkdir()
    for name in ("test_b", "test_ops"):
        (tmp_path / f"source/python_tests/{name}.py").write_text("@pytest.mark.gpu\n")
    (tmp_path / "source/python_tests/test_a.py").write_text("def test_nothing_of_a_gpu(): ...\n")
    monkeypatch.setattr(gpu, "SOURCE", tmp_path / "source")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    (tmp_path / "bin").mkdir()

    def script(cases: str = "", device: str = "cuda", seconds: float = 100.0, sanitizer: bool = True) -> Any:
        programs = {"python": f'echo "$*" >>{tmp_path}/ran\ncase "$*" in\n{cases}\n*) echo done;;\nesac'}
        if sanitizer:
            programs["compute-sanitizer"] = f'echo "sanitizer $*" >>{tmp_path}/ran; echo no errors'
        for name, text in programs.items():
            (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
            (tmp_path / "bin" / name).chmod(0o755)
        return gpu.Script(tmp_path / "out", device, str(tmp_path / "bin/python"), seconds)

    return script


def ran(tmp_path: Path) -> list[str]:
    return (tmp_path / "ran").read_text().splitlines()


def summary(tmp_path: Path) -> str:
    return (tmp_path / "out/summary.txt").read_text()


# ---- One step --------------------------------------------------------------------------------------------------------


def test_ends_of_a_step(make: Make, tmp_path: Path) -> None:
    script = make()
    assert script.run("good", 9, ["sh", "-c", "echo one; echo two"]).ok
    assert script.run("bad", 9, ["sh", "-c", "echo before; echo why >&2; exit 3"]).code == 3
    assert script.run("crash", 9, ["sh", "-c", "echo at; kill -ABRT $$"]).code == -6
    script.seconds = -1.0
    assert script.run("late", 9, ["sh", "-c", "echo never"]).code == 125
    said = summary(tmp_path)
    for line in (
        r"good: ok, 0 s; two",
        r"bad: FAILED, exit code 3 after 0 s; why",
        r"crash: FAILED, signal SIGABRT after 0 s; at",
        r"late: LEFT OUT, no time is left",
    ):
        assert line in said
    assert script.failed == 3
    log = (tmp_path / "out/log.txt").read_text()
    assert "==== good\none\ntwo\n" in log
    assert "before" in log
    assert "never" not in log


def test_a_step_past_its_limit_ends_with_all_it_started(make: Make, tmp_path: Path) -> None:
    """A child that holds the output open would be waited for otherwise; what was printed is kept."""
    script, start = make(), time.monotonic()
    result = script.run("hangs", 0.5, ["sh", "-c", "echo measured; sleep 600 & sleep 600"])
    assert result.code == 124
    assert time.monotonic() - start < 300.0
    assert "PAST ITS LIMIT of" in summary(tmp_path)
    assert "measured" in result.output


# ---- check -----------------------------------------------------------------------------------------------------------


def test_check_does_all_in_order(make: Make, tmp_path: Path) -> None:
    script = make('*one_launch*) echo "apply a: ok"; echo "1 of 1 kernels ok";;')
    script.check()
    assert script.failed == 0, summary(tmp_path)
    steps = ran(tmp_path)
    order = ["build_ext", "-c", "one_launch.py", "small_step.py", "test_ops.py", "test_b.py"]
    found = [next(i for i, step in enumerate(steps) if word in step) for word in order]
    assert found[:4] == sorted(found[:4])
    assert min(found[4:]) > found[3]
    assert not any("test_a.py" in step or "sanitizer" in step for step in steps)


def test_without_a_visible_gpu_it_says_so_and_stops(make: Make, tmp_path: Path) -> None:
    script = make("*is_available*) echo 'torch 2.11 finds no GPU, or no driver that fits it' >&2; exit 1;;")
    script.check()
    assert "GPU: FAILED, exit code 1 after 0 s; torch 2.11 finds no GPU, or no driver that fits it" in summary(tmp_path)
    assert not any("one_launch" in step or "-m pytest" in step for step in ran(tmp_path))
    script.measure()
    assert not any("lopt.benchmark" in step for step in ran(tmp_path))


def test_the_real_question_here(gpu: ModuleType, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    script = gpu.Script(tmp_path, "cuda", sys.executable, 100.0)
    assert not script.visible()
    assert "GPU: FAILED, exit code 1" in (tmp_path / "summary.txt").read_text()
    assert f"torch {torch.__version__} " in (tmp_path / "summary.txt").read_text()


def test_prebuilt_kernels_that_do_not_link_are_compiled_anew(make: Make, tmp_path: Path) -> None:
    script = make('*build_ext*) echo "of $LOPT_PREBUILT"; test -z "$LOPT_PREBUILT";;')
    assert script.module()
    assert "link: FAILED, exit code 1 after 0 s; of build/gpu/prebuilt" in summary(tmp_path)
    assert "compile: ok" in summary(tmp_path)


def test_a_kernel_that_crashes_is_named_and_the_others_go_on(make: Make, tmp_path: Path) -> None:
    script = make(
        '*"--only apply b"*) echo "apply b: illegal address"; exit 1;;\n'
        '*"--after apply b"*) echo "sweep c: ok"; echo "1 of 1 kernels ok";;\n'
        '*one_launch*) echo "apply a: ok"; printf "apply b: "; kill -ABRT $$;;'
    )
    script.check()
    assert "launches: FAILED, signal SIGABRT after 0 s; apply b:" in summary(tmp_path)
    assert "kernels that failed: apply b" in summary(tmp_path)
    steps = ran(tmp_path)
    checked = next(step for step in steps if step.startswith("sanitizer"))
    assert checked.startswith("sanitizer --tool memcheck --error-exitcode 1")
    assert checked.endswith("one_launch.py --device cuda --only apply b")
    after = next(i for i, step in enumerate(steps) if "--after apply b" in step)
    assert after < steps.index(checked) < next(i for i, step in enumerate(steps) if "-m pytest" in step)


def test_a_wrong_kernel_is_named_without_going_round(make: Make, tmp_path: Path) -> None:
    script = make('*one_launch*) echo "apply a: error 1e0"; echo "sweep c: ok"; echo "1 of 2 kernels ok"; exit 1;;')
    assert script.launches() == ["apply a"]
    assert len(ran(tmp_path)) == 1


def test_kernels_that_all_crash_are_tried_four_times(make: Make, tmp_path: Path) -> None:
    script = make('*one_launch*) printf "apply $#: "; kill -ABRT $$;;')
    assert len(script.launches()) == 4
    assert len(ran(tmp_path)) == 4


def test_launches_that_do_not_start_are_no_kernel(make: Make, tmp_path: Path) -> None:
    script = make("*one_launch*) echo 'ImportError: no module' >&2; exit 1;;")
    script.check()
    assert "launches: FAILED, exit code 1 after 0 s; ImportError: no module" in summary(tmp_path)
    assert "kernels that failed" not in summary(tmp_path)
    assert any("-m pytest" in step for step in ran(tmp_path))


def test_a_small_step_that_fails_is_looked_at_at_once(make: Make, tmp_path: Path) -> None:
    script = make("*small_step*) echo 'PYTORCH '$PYTORCH_NO_CUDA_MEMORY_CACHING; exit 1;;")
    script.check()
    steps = [step for step in ran(tmp_path) if "small_step" in step or "-m pytest" in step]
    assert steps[1].startswith("sanitizer --tool memcheck")
    assert steps[1].endswith("small_step.py --device cuda")


def test_a_test_file_that_fails_leaves_the_others_and_its_first_test(make: Make, tmp_path: Path) -> None:
    """A package that is missing is the reason that is given."""
    script = make(
        "*test_ops.py*) echo 'FAILED python_tests/test_ops.py::test_x[cuda-8] - Error'; echo '1 failed'; exit 1;;\n"
        """*test_b.py*) echo "ModuleNotFoundError: No module named 'tyro'"; exit 2;;"""
    )
    script.check()
    said = summary(tmp_path)
    assert "test_ops: FAILED, exit code 1 after 0 s; 1 failed" in said
    assert "test_b: FAILED, exit code 2 after 0 s; ModuleNotFoundError: No module named 'tyro'" in said
    again = next(step for step in ran(tmp_path) if step.startswith("sanitizer"))
    assert again.endswith("-m gpu python_tests/test_ops.py::test_x[cuda-8]")  # as before: without sim, for one


def test_without_compute_sanitizer(make: Make, tmp_path: Path) -> None:
    script = make("*small_step*) exit 1;;", sanitizer=False)
    script.check()
    assert "memcheck: left out, compute-sanitizer is not installed" in summary(tmp_path)


# ---- measure ---------------------------------------------------------------------------------------------------------


def test_measure_goes_on_and_shows_what_was_measured(make: Make, tmp_path: Path) -> None:
    timing = Timing(2e-3, 1e-3, 3e-3, 4e-5)
    timer = Timer(torch.device("cpu"), 1)
    timer.device = torch.device("cuda", 0)
    some = kernels.row(
        *("step", "lopt", Variant("compact", "lagged"), shapes.even(100, 1), torch.float32),
        *(timer, timing, Peaks(1e11, 1e12), 52, None, Timing(1e-3, 1e-3, 1e-3)),
    )
    tables.append_csv(tmp_path / "kept.csv", [{**some, "machine": "H999"}])
    script = make(
        f'*"benchmark step"*vit-b16*high*) cp {tmp_path}/kept.csv {tmp_path}/out/step.csv; sleep 600;;\n'
        '*"benchmark kernel"*) echo "out of memory"; exit 1;;'
    )
    run = script.run
    script.run = lambda name, limit, command, **environment: run(
        name, 1.0 if name == "steps" else limit, command, **environment
    )
    script.measure()
    said = summary(tmp_path)
    assert "steps: PAST ITS LIMIT" in said
    assert "kernels: FAILED, exit code 1 after 0 s; out of memory" in said
    assert "racecheck of small step: ok" in said
    assert "step.csv, H999" in said
    (line,) = [line for line in said.splitlines() if line.startswith("compact lagged lopt")]
    assert line.split() == ["compact", "lagged", "lopt", "1", "x", "100", "2.000", "0", "0%", "2.00", "40"]
    assert "kernel.csv: no rows" in said
    assert any("unroll_gpu.py --backend cuda" in step for step in ran(tmp_path))
    order = [step for step in ran(tmp_path) if "lopt.benchmark" in step or step.startswith("sanitizer")]
    assert "vit-b16 gpt2-355m --sizes 100000000" in order[0]
    assert order[-1].startswith("sanitizer --tool racecheck")


def test_predictions_are_those_of_the_kernel_and_the_gpu(gpu: ModuleType, tmp_path: Path) -> None:
    """The longest of memory, instructions and tensor cores, of 1e8 parameters."""
    table = tmp_path / "predicted.csv"
    names = ("arch", "kernel", *(f"predicted_{name}_ps" for name in ("h100_memory", "h200_memory", "issue", "tensor")))
    lines = [
        names,
        ("sm_80", "accumulate_kernel<CompactFeatures>", 1, 1, 1, 1),
        ("sm_90", "accumulate_kernel<CompactFeatures>", 18, 12, 3.5, 0),
        ("sm_90", "apply_mma_kernel<CompactFeatures, 8, 2>", 12, 8, 9, 2),
        ("sm_90", "sweep_mma_kernel<bfloat16, PaperFeatures, 32, 1>", 14, 10, 6, 11),
        ("sm_90", "begin_kernel", "", "", "", ""),
    ]
    table.write_text("".join(",".join(f'"{cell}"' for cell in line) + "\n" for line in lines))
    of = gpu.predictions(table)

    def ask(machine: str, name: str, variant: Variant, dtype: torch.dtype = torch.float32) -> float | None:
        timer = Timer(torch.device("cpu"), 1)
        what = "kernel" if name != "lopt" else "step"
        row = kernels.row(
            what, name, variant, shapes.even(100, 1), dtype, timer, Timing(1.0, 1.0, 1.0), Peaks(1e11, 1e12), 52
        )
        return gpu.predicted({key: str(value) for key, value in {**row, "machine": machine}.items()}, of)

    compact, other = Variant("compact"), Variant("paper", "lagged", "bfloat16", "fast")
    assert ask("NVIDIA H100 80GB HBM3", "accumulate", compact) == 18.0
    assert ask("NVIDIA H200", "accumulate", compact) == 12.0
    assert ask("NVIDIA H200", "apply", compact) == 9.0
    assert ask("NVIDIA H200", "sweep", other) == 11.0
    for machine, name, variant, dtype in (
        ("NVIDIA A100", "apply", compact, torch.float32),
        ("NVIDIA H200", "apply", other, torch.float32),
        ("NVIDIA H200", "apply", compact, torch.bfloat16),
        ("NVIDIA H200", "lopt", compact, torch.float32),
        ("NVIDIA H200", "apply", Variant("spectral"), torch.float32),
    ):
        assert ask(machine, name, variant, dtype) is None
    assert gpu.predictions(tmp_path / "none.csv") == {}


def test_widths_of_presets(gpu: ModuleType) -> None:
    assert {name: PRESETS[name].mlp_width for name in gpu.WIDTHS} == gpu.WIDTHS


def test_main_counts_what_failed(make: Make, gpu: ModuleType, tmp_path: Path) -> None:
    make("*small_step*) exit 1;;\n*test_b*) exit 1;;")
    out, python = tmp_path / "out", tmp_path / "bin/python"
    assert gpu.main(["check", "--out", str(out), "--python", str(python)]) == 2
    said = summary(tmp_path).splitlines()
    assert said[-2].endswith("steps failed: small step, test_b")
    assert said[-1].endswith(f"summary.txt, log.txt and rows in {out}")
    assert len(list(out.iterdir())) <= 4


def test_what_goes_wrong_in_the_script_itself_is_a_failure(make: Make, gpu: ModuleType, tmp_path: Path) -> None:
    make()
    assert gpu.main(["check", "--out", str(tmp_path / "out"), "--python", str(tmp_path / "no-such-python")]) == 1
    assert "check: FileNotFoundError" in summary(tmp_path)


# ---- What it is made of ----------------------------------------------------------------------------------------------


def test_files_with_tests_for_a_gpu(gpu: ModuleType) -> None:
    found = [file.stem for file in gpu.gpu_tests(Path(__file__).parent)]
    assert tuple(found[: len(gpu.FIRST)]) == gpu.FIRST
    assert {"test_directions", "test_float16", "test_places", "test_reference", "test_offload_gpu"} <= set(found)
    assert {"test_ops_operands", "test_optimizer_models"} <= set(found)
    assert not {"test_gpus", "test_theta", "test_optimizer_errors", "test_build"} & set(found)


def test_every_kernel_is_launched_and_wrong_ones_are_named(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU kernels in place of the GPU's, one of which is off by more than it may be."""
    launches = load("one_launch")
    names = [kernel.name for kernel in launches.every_kernel()]
    assert len(names) == len(set(names)) == 2 * 2 * (1 + 2 * 3 * 3)
    launch = launches.launch

    def wrong(kernel: Any, backend: str, device: torch.device) -> Any:
        first, *others = launch(kernel, backend, device)
        off = backend == "sim" and kernel.name == "apply compact bfloat16 8 high"
        return [first * (1.001 if off else 1.00001), *others]

    monkeypatch.setattr(launches, "launch", wrong)
    monkeypatch.setattr(launches, "every_kernel", lambda: iter([k for k in every if "compact bfloat16 8" in k.name]))
    every = [launches.Kernel("apply", "compact", "bfloat16", 8, precision) for precision in ("exact", "high", "fast")]
    monkeypatch.setattr("sys.argv", ["one_launch.py", "--device", "sim"])
    assert launches.main() == 1
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "apply compact bfloat16 8 exact: ok"
    assert said[1].startswith(
        "apply compact bfloat16 8 high: result 0: error 9.9e-04 of the largest value, expected at most"
    )
    assert said[2:] == ["apply compact bfloat16 8 fast: ok", "2 of 3 kernels ok"]
    monkeypatch.setattr("sys.argv", ["one_launch.py", "--device", "sim", "--after", "apply compact bfloat16 8 high"])
    assert launches.main() == 0
    assert capsys.readouterr().out.splitlines()[-1] == "1 of 1 kernels ok"
