"""Kernels of feature sets and MLPs that are not compiled in: written from the table, compiled on this machine, kept.

A set becomes a struct as those of csrc/rule/features.h, with which the sources of ``lopt._C`` are compiled: by the C++
compiler of this machine for its instruction set or for ``sim``; for its GPUs by nvcc, as ``lopt._C`` was, or where
there is none by NVRTC (:mod:`lopt.kernels.nvrtc`). What is made is kept in the user's cache, under a hash of all that
it is made of; of several processes that need it one compiles.
"""

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from filelock import FileLock

from lopt.kernels import nvrtc
from lopt.kernels.extension import _C, NOT_BUILT, module_of, packed_weights
from lopt.rule.features import FeatureSet, feature_set
from lopt.rule.formulas import Writer, literal

WIDTHS = (8, 16, 32, 64)
LAYERS = (1, 2)
#: Inside of the package in a wheel, beside it in a source folder.
SOURCES = next((path for path in (Path(__file__).parents[n] / "csrc" for n in (1, 2)) if path.is_dir()), None)
_FLAGS = ("-std=c++17", "-shared")
_CPU_FLAGS = ("-O3", "-fno-math-errno", "-fno-trapping-math")
_HOST_FLAGS = ("-fopenmp", "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden")
_CPU_UNITS = ("accumulate_cpu.cpp", "advance_cpu.cpp", "apply_cpu.cpp", "own_cpu.cpp")
_CUDA_UNITS = ("accumulate.cu", "advance.cu", "apply.cu", "apply_mma.cu", "sweep.cu", "sweep_mma.cu", "write.cu")
_CUDA_DOOR = ("backend.cpp", "own.cpp")
#: In the order of enum Kernel in cuda/grids.h: kernels with what they are templates of, S for dtype of the state and
#: set, W for the width, 2 or 1 for `high` or `fast`.
_CUDA_KERNELS = (
    "begin_kernel", "accumulate_kernel<S>", "advance_kernel<OwnFeatures>",
    "apply_kernel<S, W>", "apply_mma_kernel<S, W, 2>", "apply_mma_kernel<S, W, 1>",
    "sweep_kernel<S, W>", "sweep_mma_kernel<S, W, 2>", "sweep_mma_kernel<S, W, 1>",
    "write_kernel", "finish_kernel<OwnFeatures>", "write_words_kernel",
)  # fmt: skip
#: The CUDA kernels are compiled for one, the CPU's for all.
_STATES = {torch.float32: "kFloat32", torch.bfloat16: "kBFloat16", torch.int8: "kInt8"}


class CannotCompile(RuntimeError):
    """There are no kernels and none can be made; says why and what to do."""


def header(features: FeatureSet) -> str:
    """C++ text of a feature set, ``struct OwnFeatures``; what it must have csrc/rule/features.h says."""
    num_mom, num_rms = len(features.mom_decays), len(features.rms_decays)
    columns, means = Writer(), Writer()
    of_columns = [f"x[{i}] = {columns.value(tree)};" for i, tree in enumerate(features.trees)]
    of_means = [f"q[{i}] = {means.value(tree)};" for i, tree in enumerate(features.moment_trees)]
    absent = [name for name in ("grad_squared", "param_squared") if name not in features.moments]
    slow = features.slow
    constants = [f"static constexpr int {name} = -1;" for name in absent]
    relative = slow is not None and num_mom == 3 and {f"mom{k}_squared" for k in range(3)} <= set(features.moments)
    constants.append(f"static constexpr bool kRelative = {str(relative).lower()};")
    if slow is not None:
        constants.append(f"static constexpr int kSlowMean = rms{slow};")
    moments = "".join(f"{name}, " for name in features.moments)
    active = "V{} + 1.0f" if slow is None else f"rms[0] > rms[{slow}] * kResting ? V{{}} + 1.0f : V{{}}"
    return "\n".join(
        [
            "// Written by lopt/kernels/own.py.",
            "#pragma once",
            "namespace lopt {",
            "struct OwnFeatures {",
            f'static constexpr const char* kName = "{features.name}";',
            f"static constexpr int kNumMom = {num_mom}, kNumRms = {num_rms}, kSlow = {-1 if slow is None else slow};",
            f"static constexpr float kEpsilon = {literal(features.epsilon)};",
            f"enum Column {{ kNumColumns = {len(features.columns)} }};",
            f"enum Moment {{ {moments}kNumMoments }};",
            *constants,
            f"static constexpr int kFirstShifted = {features.first_shifted};",
            "template <class V>",
            "LOPT_HD static void columns(V grad, V param, const V* mom, const V* rms, V* x) {",
            *columns.lines,
            *of_columns,
            "}",
            "template <class V>",
            "LOPT_HD static V active(const V* rms) {",
            f"return {active};",
            "}",
            "template <class V>",
            "LOPT_HD static void moments(V grad, V param, const V* mom, const V* rms, V* q) {",
            *means.lines,
            *of_means,
            "}",
            "LOPT_HD static void column_map(const float* means, const float* corrections, float* scale,",
            "                               float* shift) {",
            f"const float *mom = corrections, *rms = corrections + {num_mom};",
            *_column_map(features),
            "}",
            "};",
            "}  // namespace lopt",
            "",
        ]
    )


def _column_map(features: FeatureSet) -> list[str]:
    lines = []
    for i, column in enumerate(features.columns):
        mean = f"means[{column.moment}] + kEpsilon" if column.moment else ""
        factors: list[str] = []
        shifts: list[str] = []
        if mean:
            (shifts if column.log else factors).append(
                f"-0.5f * ::logf({mean})" if column.log else f"1.0f / ::sqrtf({mean})"
            )
        if column.log:
            for size in sorted({abs(exponent) for _, exponent in column.debias}):  # one logarithm for each
                above = [_element(name) for name, exponent in column.debias if exponent == -size]
                below = [_element(name) for name, exponent in column.debias if exponent == size]
                ratio = " / ".join([" * ".join(above) or "1.0f", *below])
                shifts.append(f"{literal(size)} * ::logf({ratio})")
        else:
            above = [_power(name, -exponent) for name, exponent in column.debias if exponent < 0]
            below = [_power(name, exponent) for name, exponent in column.debias if exponent > 0]
            if above or below:
                factors.append(" / ".join([" * ".join(above) or "1.0f", *below]))
        scale = " * ".join(f"({factor})" for factor in factors)
        lines += [f"scale[{i}] = {scale or '1.0f'};", f"shift[{i}] = {' + '.join(shifts) or '0.0f'};"]
    return lines


def _element(accumulator: str) -> str:
    return f"{accumulator[:3]}[{accumulator[3:]}]"


def _power(accumulator: str, exponent: float) -> str:
    base = _element(accumulator)
    known = {1.0: base, 0.5: f"::sqrtf({base})"}
    return known.get(exponent, f"::powf({base}, {literal(exponent)})")


def cache_folder() -> Path:
    """Where libraries are kept: ``lopt`` in ``XDG_CACHE_HOME`` or ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lopt"


def _found(names: list[str | None]) -> list[str] | None:
    """The first of these commands that there is."""
    return next((shlex.split(name) for name in names if name and shutil.which(shlex.split(name)[0])), None)


def _compiler() -> list[str]:
    found = _found([os.environ.get("CXX"), "c++", "g++", "clang++"])
    if found is None:
        raise CannotCompile("there is no C++ compiler (CXX, c++, g++, clang++): install one, as with apt install g++")
    return found


def _nvcc() -> list[str] | None:
    """As cmake/nvcc.cmake looks for it, and where pip puts it; None where there is none."""
    folders = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    pip = sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/cu*"), reverse=True)
    named = [os.environ.get("CUDACXX"), *(f"{folder}/bin/nvcc" for folder in folders), "nvcc"]
    return _found([*named, "/usr/local/cuda/bin/nvcc", *(f"{folder}/bin/nvcc" for folder in pip)])


def sources_sha256(folder: Path) -> str:
    """Of what ``lopt._C`` was built from, as CMakeLists.txt computes it."""
    root = folder.parent
    names = [
        f"{path.parent.relative_to(root)}/{path.name}" for path in (*folder.glob("*/*"), *(root / "cuda").glob("*"))
    ]
    hashes = ""
    for name in ("CMakeLists.txt", "cmake/nvcc.cmake", *sorted(names)):
        hashes += f"{name} {hashlib.sha256((root / name).read_bytes()).hexdigest()}\n"
    return hashlib.sha256(hashes.encode()).hexdigest()


def _level() -> tuple[str, list[str]]:
    """Namespace and flags of the instruction set that the kernels use (CMakeLists.txt)."""
    name = _C.simd_selected()
    if name.startswith("x86-64"):
        return name.rpartition("-")[2], [f"-march={name}"]
    return "baseline", ["-march=x86-64"] if "x86-64-v3" in _C.simd_available() else []


def described(name: str, width: int, layers: int) -> str:
    """A feature set and MLP, for messages."""
    return f"feature set {name!r} with MLP width {width}" + " and one hidden layer" * (layers == 1)


@dataclass(frozen=True)
class _Compiler:
    """How a back end becomes a library, by a compiler that is a command."""

    compiler: list[str]
    flags: list[str]
    units: list[Path]
    suffix = ".so"

    @property
    def made_of(self) -> list[str]:
        """Version and options."""
        version = subprocess.run([*self.compiler, "--version"], capture_output=True, text=True, check=False).stdout
        return [version, *self.compiler, *self.flags]

    def make(self, made: Path, features: FeatureSet, defines: list[str]) -> None:
        """Compile to the file ``made``, beside which there may be others."""
        (made.parent / "own_features.h").write_text(header(features))
        include = [f"-I{SOURCES}", f"-I{made.parent}", '-DLOPT_OWN_FEATURES="own_features.h"']
        command = [*self.compiler, *_FLAGS, *self.flags, *defines, *include]
        result = subprocess.run(
            [*command, *map(str, self.units), "-o", str(made)], capture_output=True, text=True, check=False
        )
        if result.returncode:
            raise CannotCompile(f"{shlex.join(command)} failed:\n{(result.stderr or result.stdout)[-2000:]}")


@dataclass(frozen=True)
class _Nvrtc:
    """How kernels for the GPU become machine code, by NVRTC."""

    nvrtc: nvrtc.Nvrtc
    archs: tuple[str, ...]
    state: torch.dtype
    suffix = ".json"

    @property
    def made_of(self) -> list[str]:
        """Version and options."""
        return [self.nvrtc.version, *self.archs, _STATES[self.state]]

    def make(self, made: Path, features: FeatureSet, defines: list[str]) -> None:
        """Compile to the file ``made``."""
        assert SOURCES is not None
        headers = dict.fromkeys(nvrtc.STANDARD, '#include "rtc/standard.h"\n') | {"own_features.h": header(features)}
        template = f"lopt::{_STATES[self.state]}, lopt::OwnFeatures"
        expressions = [
            "lopt::" + name.replace("S", template).replace("W", "LOPT_OWN_WIDTH").replace("<Own", "<lopt::Own")
            if self.state != torch.int8 or not name.startswith("sweep")  # a state in 8 bits has no kernels of one sweep
            else ""
            for name in _CUDA_KERNELS
        ]
        options = ["--std=c++17", "--device-as-default-execution-space", f"-I{SOURCES}", f"-I{SOURCES.parent / 'cuda'}"]
        options += [*defines, f"-DLOPT_STATE={_STATES[self.state]}", '-DLOPT_OWN_FEATURES="own_features.h"']
        images: dict[str, bytes] = {}
        names: list[str] = []
        for arch in self.archs:
            try:
                images[arch], names = self.nvrtc.compile(
                    '#include "own_rtc.cu"\n', headers, expressions, [f"--gpu-architecture=sm_{arch}", *options]
                )
            except nvrtc.NvrtcError as error:
                raise CannotCompile(f"{self.nvrtc.version} for sm_{arch} failed: {str(error)[-2000:]}") from error
        nvrtc.write(made, images, names)


def _maker(backend: str, sources: Path, archs: tuple[str, ...], state: torch.dtype) -> "_Compiler | _Nvrtc":
    cuda, for_state = sources.parent / "cuda", [f"-DLOPT_STATE={_STATES[state]}"]
    if backend == "cpu":
        namespace, flags = _level()
        flags = [*_CPU_FLAGS, *_HOST_FLAGS, *flags, f"-DLOPT_ISA={namespace}"]
        return _Compiler(_compiler(), flags, [sources / "cpu" / name for name in _CPU_UNITS])
    door = [cuda / name for name in _CUDA_DOOR]
    if backend == "sim":
        flags = ["-O1", *_HOST_FLAGS, *for_state, "-Wno-unknown-pragmas"]
        return _Compiler(_compiler(), flags, [sources / "sim" / "own.cpp", *door])
    if not archs:
        raise CannotCompile("there is no GPU")
    if (nvcc := _nvcc()) is None:
        if (found := nvrtc.find()) is None:
            raise CannotCompile(
                "there is no nvcc (CUDACXX, CUDA_HOME, CUDA_PATH, PATH, /usr/local/cuda, pip) and no NVRTC, which "
                "comes with torch's wheels for CUDA: pip install nvidia-cuda-nvrtc, or install a CUDA toolkit"
            )
        return _Nvrtc(found, archs, state)
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    host = ["-Xcompiler", ",".join(_HOST_FLAGS[1:])]  # OpenMP is for the CPU
    if os.environ.get("CUDAHOSTCXX"):
        host += ["-ccbin", os.environ["CUDAHOSTCXX"]]
    flags = ["-O3", "--threads=0", *targets, *for_state, *host]
    return _Compiler(nvcc, flags, [*(cuda / name for name in _CUDA_UNITS), *door])


def gpu_archs() -> tuple[str, ...]:
    """Capabilities of the GPUs that torch sees, such as ``("90",)``."""
    devices = range(torch.cuda.device_count())
    return tuple(sorted({"{}{}".format(*torch.cuda.get_device_capability(device)) for device in devices}))


def compiled(
    features: FeatureSet,
    width: int,
    layers: int = 2,
    backend: str = "cpu",
    archs: tuple[str, ...] = (),
    state: torch.dtype = torch.float32,
) -> Path:
    """The library of a set and MLP, or machine code, compiled where it is not yet there.

    Args:
        backend: ``"cpu"``, for the instruction set in use, ``"cuda"`` or ``"sim"``.
        archs: of ``"cuda"``, as :func:`gpu_archs` has them.
        state: dtype of the accumulators.

    Raises:
        CannotCompile: there is no compiler, it fails, or the sources are not there or others; with the reason.
    """
    if SOURCES is None:
        raise CannotCompile("the sources (csrc) are not there; install lopt from its source folder")
    if sources_sha256(SOURCES) != _C.source_sha256:  # it would read the structs of other sources
        raise CannotCompile(f"the sources in {SOURCES.parent} are not those that lopt._C was built from; build it anew")
    maker = _maker(backend, SOURCES, archs, state)
    defines = [f"-DLOPT_OWN_WIDTH={width}", f"-DLOPT_MLP_LAYERS={layers}"]
    made_of = "\n".join([header(features), _C.source_sha256, *maker.made_of, *defines])
    key = f"{features.name}-{width}x{layers}-{backend}-{hashlib.sha256(made_of.encode()).hexdigest()[:32]}"
    folder = cache_folder()
    library = folder / f"{key}{maker.suffix}"
    if library.is_file():
        return library
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with FileLock(folder / f"{key}.lock"):
            if not library.is_file():
                with tempfile.TemporaryDirectory(dir=folder) as scratch:
                    made = Path(scratch) / f"made{maker.suffix}"
                    maker.make(made, features, defines)
                    os.replace(made, library)  # whole or not at all
    except OSError as error:
        raise CannotCompile(f"{folder} cannot be written ({error}); set XDG_CACHE_HOME to a folder that can") from error
    return library


def resolved(backend: str, name: str, width: int | None, layers: int, state: torch.dtype = torch.float32) -> str:
    """The back end that has the kernels of a feature set and MLP: that one, or one of their own.

    Args:
        width: of the MLP; None where no operation needs it, which only a set that is compiled in allows.
        state: dtype of the accumulators.
    """
    if packed_weights(name, WIDTHS[0] if width is None else width, layers):
        return backend
    if width is None:
        raise CannotCompile(f"feature set {name!r}: its kernels are made for one MLP width, which was not given")
    return own_backend(backend, name, width, layers, state)


def size_of_weights(name: str, width: int, layers: int) -> int:
    """Floats in one packed row of MLP weights (MlpLayout in csrc/rule/mlp.h); 0 where there are no kernels."""
    if width not in WIDTHS:
        return packed_weights(name, width, layers)
    columns = len(feature_set(name).columns)
    size = columns * width + (layers - 1) * (width * width + width) + 2 * width + 2 + columns
    return -(-size // 4) * 4  # padded to 16 bytes


def own_backend(backend: str, name: str, width: int, layers: int = 2, state: torch.dtype = torch.float32) -> str:
    """Back end with kernels that are not compiled in.

    Args:
        backend: as for :class:`lopt.kernels.Plan`.
        name: of the feature set.
        state: dtype of the accumulators.

    Raises:
        CannotCompile: with the reason.
    """
    if NOT_BUILT:
        raise CannotCompile(NOT_BUILT)
    if width not in WIDTHS:
        raise CannotCompile(f"kernels can be made for MLP widths {WIDTHS}, theta has {width}")
    try:
        module_of(backend)
    except (RuntimeError, ValueError) as error:
        raise CannotCompile(str(error)) from error
    targets = {"cpu": (_C.simd_selected(),), "cuda": gpu_archs()}.get(backend, ())
    of_one = state if backend != "cpu" and state in _STATES else torch.float32
    return _made(backend, targets, feature_set(name), width, layers, of_one)


@cache
def _made(
    backend: str, targets: tuple[str, ...], features: FeatureSet, width: int, layers: int, state: torch.dtype
) -> str:
    """Name by which the compiled module knows the back end for these targets."""
    library = compiled(features, width, layers, backend, targets, state)
    name = f"{backend} {library.stem}"
    if library.suffix == _Nvrtc.suffix:
        _C.add_kernels(name, *nvrtc.read(library))
        return name
    loaded = load(library)
    assert loaded.lopt_packed_weights() == size_of_weights(features.name, width, layers)
    module_of(backend).add_backend(name, loaded.lopt_backend())
    return name


def load(library: Path) -> ctypes.CDLL:
    """A library that :func:`compiled` made."""
    loaded = ctypes.CDLL(str(library))
    loaded.lopt_backend.restype = ctypes.c_void_p
    return loaded
