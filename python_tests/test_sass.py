"""benchmarks/sass.py: what it reads out of SASS, and that the built kernels pass it."""

import dataclasses
import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

from lopt import _C
from lopt.kernels import nvrtc, own
from lopt.rule.features import FEATURE_SETS


@pytest.fixture(scope="module")
def sass() -> ModuleType:
    path = Path(__file__).parent.parent / "benchmarks" / "sass.py"
    spec = importlib.util.spec_from_file_location("sass", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["sass"] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


# A prologue with a loop; a loop that moves 16 or 4 bytes, may call, and has a loop of four trips within.
LINES = """
    Function : toy
/*0000*/ MOV R1, c[0x0][0x28] ;
/*0010*/ LDG.E R2, desc[UR4][R2.64] ;
/*0020*/ @P0 BRA 0x10 ;
/*0030*/ ISETP.NE.AND P1, PT, R1, RZ, PT ;
/*0040*/ @P1 BRA 0x70 ;
/*0050*/ LDG.E.128.STRONG.GPU R4, desc[UR4][R2.64] ;
/*0060*/ BRA 0x80 ;
/*0070*/ LDG.E R4, desc[UR4][R2.64] ;
/*0080*/ @!P2 BRA 0xa0 ;
/*0090*/ CALL.REL.NOINC 0x120 ;
/*00a0*/ LDSM.16.M88.4 R8, [R3] ;
/*00b0*/ HMMA.16816.F32 R8, R8, R4, RZ ;
/*00c0*/ @P3 BRA 0xa0 ;
/*00d0*/ @P5 LDG.E.U16 R5, desc[UR4][R2.64] ;
/*00e0*/ STG.E.128 desc[UR4][R2.64], R4 ;
/*00f0*/ @P4 BRA 0x30 ;
/*0100*/ EXIT ;
/*0110*/ BRA 0x110;
/*0120*/ RET.REL.NODEC R6 0x0 ;
"""


def test_counts(sass: ModuleType) -> None:
    counts = sass.count(sass.parse(LINES)["toy"])
    assert {word: counts[word] for word in ("LDG", "LDG.128", "STG", "STG.128", "HMMA", "LDL", "all")} == {
        "LDG": 4, "LDG.128": 1, "STG": 1, "STG.128": 1, "HMMA": 1, "LDL": 0, "all": 19
    }  # fmt: skip


def test_main_path(sass: ModuleType) -> None:
    """Without the narrow load, the call and the prologue; four times the inner loop."""
    path = [one.address for one in sass.main_path(sass.parse(LINES)["toy"], 4)]
    inner = [0xA0, 0xB0, 0xC0]
    assert path == [0x30, 0x40, 0x50, 0x60, 0x80, *inner * 4, 0xD0, 0xE0, 0xF0]


def test_main_path_without_float16(sass: ModuleType) -> None:
    """Around what float16 parameters need, not around what all do."""
    lines = """
    Function : toy
/*0000*/ LDG.E.128 R4, desc[UR4][R2.64] ;
/*0010*/ @P0 BRA 0x50 ;
/*0020*/ ISETP.NE.AND P1, PT, R1, 0x2, PT ;
/*0030*/ @!P1 HADD2.F32 R4, -RZ, R4.H0_H0 ;
/*0040*/ @!P1 HADD2.F32 R5, -RZ, R5.H0_H0 ;
/*0050*/ HADD2.F32 R6, -RZ, R4.H0_H0 ;
/*0060*/ @P2 BRA 0x80 ;
/*0070*/ FADD R6, R6, R5 ;
/*0080*/ @P4 BRA 0x0 ;
/*0090*/ EXIT ;
"""
    path = [one.address for one in sass.main_path(sass.parse(lines)["toy"], 4)]
    assert path == [0x0, 0x10, 0x50, 0x60, 0x70, 0x80]


@pytest.fixture(scope="module")
def arch(request: pytest.FixtureRequest, sass: ModuleType) -> str:
    if not _C.has_cuda:
        pytest.skip("lopt was built without CUDA")
    if sass.tool() is None or shutil.which("c++filt") is None:
        pytest.skip("needs cuobjdump: pip install 'lopt[sass]'")
    if request.param not in sass.architectures():
        pytest.skip(f"lopt was built for {_C.cuda_archs}")
    return str(request.param)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"], indirect=True)
def test_kernels(sass: ModuleType, arch: str) -> None:
    """Two of accumulate, six of apply, and twelve on tensor cores, for all three dtypes of the state; for those that
    are not in 8 bits, as many of a sweep."""
    kernels = sass.kernels(arch)
    operations = [kernel.operation for kernel in kernels]
    names = "accumulate", "apply", "apply_mma", "sweep", "sweep_mma"
    assert [operations.count(name) for name in names] == [6, 18, 36, 12, 24]
    assert [problem for kernel in kernels for problem in kernel.problems()] == []


@pytest.mark.parametrize("arch", ["sm_90"], indirect=True)
def test_predicted_time(sass: ModuleType, arch: str) -> None:
    """Bytes as counted by hand; accumulate is bound by memory, and `high` beats plain float by far where it matters."""
    predicted = {kernel.name: kernel.predict() for kernel in sass.kernels(arch) if kernel.predictable}
    for name, accumulated, applied in (("Paper", 88, 52), ("Compact", 48, 32)):
        accumulate = predicted[f"accumulate_kernel<{name}Features>"]
        assert accumulate["bytes"] == accumulated
        for device, rate in (("h100", 3.35e12), ("h200", 4.8e12)):
            assert accumulate["issue_ps"] < accumulate[f"{device}_memory_ps"] == accumulated / (0.8 * rate) * 1e12
        for width in (8, 16, 32):
            plain = predicted[f"apply_kernel<{name}Features, {width}>"]
            high = predicted[f"apply_mma_kernel<{name}Features, {width}, 2>"]
            fast = predicted[f"apply_mma_kernel<{name}Features, {width}, 1>"]
            assert plain["bytes"] == high["bytes"] == applied
            assert fast["instructions"] < high["instructions"] < plain["instructions"]
            assert high["tensor_ps"] > 2 * fast["tensor_ps"]
            sweep = predicted[f"sweep_mma_kernel<{name}Features, {width}, 2>"]
            assert sweep["bytes"] == predicted[f"sweep_kernel<{name}Features, {width}>"]["bytes"] == accumulated + 4
            assert sweep["tensor_ps"] == pytest.approx(high["tensor_ps"])
            assert sweep["instructions"] > high["instructions"]
            narrow = predicted[f"sweep_mma_kernel<bfloat16, {name}Features, {width}, 2>"]
            assert narrow["bytes"] == (accumulated - 8) / 2 + 12
            assert narrow["instructions"] > sweep["instructions"]  # unpacks and rounds


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_90"], indirect=True)
def test_kernels_of_width_64(sass: ModuleType, arch: str, kept_kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made where they are needed, and too wide for their weights to stay in registers: nothing spills either. Of a
    float32 state; how accumulators are read is nothing that the width changes."""
    monkeypatch.setenv("XDG_CACHE_HOME", kept_kernels)
    library = own.compiled(FEATURE_SETS["compact"], 64, 2, "cuda", (arch.removeprefix("sm_"),))
    kernels = {kernel.name: kernel for kernel in sass.kernels(arch, str(library))}
    assert [name for name, kernel in kernels.items() if kernel.counts["LDL"] or kernel.counts["STL"]] == []
    # Of 16 rows: two blocks of inputs and eight of hidden units, three products each for `high`, eight tiles; two
    # parameters of a quad at a time, or one. `fast` has four products for the outputs, too.
    products = {("apply_mma", 2): 240, ("sweep_mma", 2): 480, ("apply_mma", 1): 88, ("sweep_mma", 1): 88}
    for (operation, parts), count in products.items():
        assert kernels[f"{operation}_kernel<OwnFeatures, 64, {parts}>"].counts["HMMA"] == count


@pytest.mark.slow
def test_what_nvrtc_makes_passes_too(
    sass: ModuleType, kept_kernels: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of the text of `compact`, for the architecture whose instructions are bounded: the limits of what nvcc makes."""
    if sass.tool() is None or shutil.which("c++filt") is None or nvrtc.find() is None:
        pytest.skip("needs cuobjdump and NVRTC: pip install 'lopt[sass]'")
    monkeypatch.setenv("XDG_CACHE_HOME", kept_kernels)
    monkeypatch.setattr(own, "_nvcc", lambda: None)
    images, _ = nvrtc.read(own.compiled(FEATURE_SETS["compact"], 8, 2, "cuda", ("90",)))
    (tmp_path / "made.cubin").write_bytes(images["90"])
    kernels = sass.kernels("sm_90", str(tmp_path / "made.cubin"))
    assert len(kernels) == 12
    named = [dataclasses.replace(one, name=one.name.replace("OwnFeatures", "CompactFeatures")) for one in kernels]
    assert [problem for kernel in named for problem in kernel.problems()] == []
    assert {one.name for one in named} >= {name for name in sass.INSTRUCTIONS if "Compact" in name and "bf" not in name}


def test_main_path_of_a_narrow_state(sass: ModuleType) -> None:
    """Over accesses of 8 bytes, but of 16 where there is a choice."""
    lines = """
    Function : toy
/*0000*/ @P0 BRA 0x30 ;
/*0010*/ LDG.E.128 R4, desc[UR4][R2.64] ;
/*0020*/ BRA 0x50 ;
/*0030*/ LDG.E.64 R4, desc[UR4][R2.64] ;
/*0040*/ FADD R6, R6, R5 ;
/*0050*/ @P1 BRA 0x80 ;
/*0060*/ LDG.E.64 R8, desc[UR4][R2.64] ;
/*0070*/ BRA 0xa0 ;
/*0080*/ LDG.E.U16 R8, desc[UR4][R2.64] ;
/*0090*/ FADD R6, R6, R5 ;
/*00a0*/ @P4 BRA 0x0 ;
/*00b0*/ EXIT ;
"""
    path = [one.address for one in sass.main_path(sass.parse(lines)["toy"], 1, 64)]
    assert path == [0x0, 0x10, 0x20, 0x50, 0x60, 0x70, 0xA0]


def test_widths(sass: ModuleType) -> None:
    """Of what the path is chosen by."""
    code = sass.parse(LINES)["toy"]
    of = {one.address: (one.width(128), one.width(32)) for one in code if one.width(128)}
    assert of == {0x10: (-1, 1), 0x50: (1, 1), 0x70: (-1, 1), 0x90: (-1, -1), 0xE0: (1, 1)}
