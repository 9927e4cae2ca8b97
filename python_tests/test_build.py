"""What the build says of an environment that does not fit: setup.py, cmake/nvcc.cmake. Nothing is compiled here."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

import lopt
from lopt.kernels import own

SOURCE = Path(__file__).resolve().parents[1]
CMAKE = shutil.which("cmake", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
Configure = Callable[..., "subprocess.CompletedProcess[str]"]

needs_cmake = pytest.mark.skipif(CMAKE is None, reason="needs CMake")


@pytest.fixture
def configure(tmp_path: Path) -> Configure:
    """``configure(LOPT_CUDA, nvcc)``: CMake's first step, with a script in nvcc's place; its messages and exit code."""

    def run(cuda: str, nvcc: str | None = None, **environment: str) -> "subprocess.CompletedProcess[str]":
        pybind11 = pytest.importorskip("pybind11")
        if nvcc is not None:
            script = tmp_path / "nvcc"
            script.write_text(f"#!/bin/sh\n{nvcc}\n")
            script.chmod(0o755)
            environment["CUDACXX"] = str(script)
        options = {
            "LOPT_CUDA": cuda,
            "LOPT_PREBUILT": environment.pop("LOPT_PREBUILT", ""),
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": str(tmp_path / "out"),
        }
        flags = [f"-D{name}={value}" for name, value in options.items()]
        command = [str(CMAKE), "-S", str(SOURCE), "-B", str(tmp_path / "build"), *flags]
        return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)

    return run


def said(done: "subprocess.CompletedProcess[str]") -> str:
    """What was printed, in one line: CMake breaks messages."""
    return " ".join((done.stdout + done.stderr).split())


BROKEN = {
    "too old": (
        "echo 'Cuda compilation tools, release 10.1, V10.1.243'",
        "is of CUDA 10.1, 11.8 or newer is needed. Point CUDACXX or CUDA_HOME to another CUDA toolkit, or build "
        "without CUDA: LOPT_CUDA=OFF.",
    ),
    "broken": (
        'case "$1" in --version) echo "Cuda compilation tools, release 12.4, V12.4.131";; '
        '*) echo "fatal error: cuda_runtime.h: No such file or directory" >&2; exit 1;; esac',
        "(CUDA 12.4) does not compile a small program: fatal error: cuda_runtime.h: No such file or directory",
    ),
    "something else": ("echo hello", "does not say its version: hello . Point CUDACXX or CUDA_HOME to another"),
}


@needs_cmake
@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_cuda_toolchain_is_left_out_and_named(configure: Configure, kind: str) -> None:
    script, reason = BROKEN[kind]
    done = configure("AUTO", script)
    assert done.returncode == 0, done.stderr
    assert "lopt is built WITHOUT CUDA: " in said(done)
    assert reason in said(done)
    assert "lopt: without CUDA" in done.stdout


@needs_cmake
@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_cuda_toolchain_fails_where_cuda_is_required(configure: Configure, kind: str) -> None:
    script, reason = BROKEN[kind]
    done = configure("ON", script)
    assert done.returncode != 0
    assert "LOPT_CUDA=ON, but" in said(done)
    assert reason in said(done)


@needs_cmake
def test_a_cuda_compiler_that_is_named_but_not_there(configure: Configure) -> None:
    done = configure("ON", CUDACXX="/absent/nvcc")
    assert done.returncode != 0
    assert "LOPT_CUDA=ON, but /absent/nvcc was not found (looked at CUDACXX" in said(done)


@needs_cmake
def test_prebuilt_kernels_must_be_there_and_of_these_sources(configure: Configure, tmp_path: Path) -> None:
    done = configure("ON", LOPT_PREBUILT=str(tmp_path / "none"))
    assert done.returncode != 0
    assert f"LOPT_PREBUILT: no kernels in {tmp_path}/none; `python benchmarks/gpu.py build` makes them." in said(done)
    (tmp_path / "facts.cmake").write_text(
        'set(with_cuda "1")\nset(archs_string "90-real")\nset(prebuilt_sha256 0123)\n'
    )
    done = configure("ON", LOPT_PREBUILT=str(tmp_path))
    assert done.returncode != 0
    assert f"the kernels in {tmp_path} are of other sources (csrc, cuda, CMakeLists.txt) than these" in said(done)


@needs_cmake
def test_prebuilt_kernels_need_no_compiler_for_cuda(configure: Configure, tmp_path: Path) -> None:
    """Of these sources, whose hash a build without them tells; what was built elsewhere is said here."""
    assert configure("OFF").returncode == 0
    facts = (tmp_path / "build/facts.cmake").read_text()
    assert 'set(with_cuda "0")' in facts
    (tmp_path / "facts.cmake").write_text(facts.replace('with_cuda "0"', 'with_cuda "1"'))
    done = configure("ON", "exit 1", LOPT_PREBUILT=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert f"lopt: kernels of {tmp_path}" in said(done)


def setup_py(tmp_path: Path, *arguments: str, **versions: str) -> "subprocess.CompletedProcess[str]":
    """setup.py where packages seem to have other versions; an empty one: it is missing."""
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(SOURCE / name, tmp_path)
    lines = ["import sys, shutil"]
    for name, version in versions.items():
        if not version:
            lines.append(f"sys.modules[{name!r}] = None")
        else:
            lines += [f"import {name}", f"{name}.__version__ = {version!r}"]
    lines += [f"sys.argv = ['setup.py', *{arguments!r}]", "exec(compile(open('setup.py').read(), 'setup.py', 'exec'))"]
    program = "\n".join(["__file__ = 'setup.py'", *lines])
    environment = {**os.environ, "PATH": str(tmp_path)}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)


def test_all_requirements_of_the_build_are_named_at_once(tmp_path: Path) -> None:
    pytest.importorskip("pybind11")
    pytest.importorskip("setuptools")
    (tmp_path / "cmake").write_text("#!/bin/sh\necho cmake version 3.18.4\n")
    (tmp_path / "cmake").chmod(0o755)
    done = setup_py(tmp_path, "--version", pybind11="", setuptools="65.5.0")
    if (Path(sys.executable).parent / "cmake").is_file():  # this environment's own come first, so only two are wrong
        expected = "setuptools>=77 (found 65.5.0), pybind11>=2.13 (found none)"
        remedy = "run: pip install 'setuptools>=77' 'pybind11>=2.13'"
    else:
        expected = "pybind11>=2.13 (found none), cmake>=3.21 (found 3.18.4), ninja (found none)"
        remedy = "run: pip install 'setuptools>=77' 'pybind11>=2.13' 'cmake>=3.21' 'ninja'"
    assert done.returncode == 1
    assert f"lopt: the build needs {expected}" in done.stderr
    assert remedy in done.stderr


# bdist_wheel, with CMake left out: it touches the modules that CMake would build.
WHEEL = """
import sys
from pathlib import Path

import setuptools

setup = setuptools.setup

def without_cmake(**options):
    class Touch(options["cmdclass"]["build_ext"]):
        def build_extensions(self):
            for ext in self.extensions:
                path = Path(self.get_ext_fullpath(ext.name))
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()

    options["cmdclass"]["build_ext"] = Touch
    setup(**options)

setuptools.setup = without_cmake
__file__ = "setup.py"
exec(compile(open("setup.py").read(), "setup.py", "exec"))
"""


def test_a_wheel_holds_neither_sim_nor_tests_nor_what_is_no_more(tmp_path: Path) -> None:
    for name in ("setuptools", "pybind11"):
        pytest.importorskip(name)
    if CMAKE is None or shutil.which("ninja", path=str(Path(sys.executable).parent)) is None:
        pytest.skip("needs CMake and Ninja")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "CMakeLists.txt"):
        shutil.copy(SOURCE / name, tmp_path)
    for name in ("lopt", "csrc", "cuda", "cmake"):
        shutil.copytree(SOURCE / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (tmp_path / "python_tests").mkdir()
    (tmp_path / "python_tests/test_nothing.py").touch()
    environment = {**os.environ, "LOPT_SIM": "ON"}  # as in an environment in which tests were run
    for arguments in (["build"], ["bdist_wheel"]):
        command = [sys.executable, "-c", WHEEL, "--quiet", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        if arguments == ["build"]:
            (built,) = (tmp_path / "build").glob("lib*/lopt")
            assert len(list(built.glob("_sim.*.so"))) == 1
            (built / "removed.py").touch()
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert len([name for name in names if name.startswith("lopt/_C.") and name.endswith(".so")]) == 1
    assert [name for name in names if "_sim" in name or "removed" in name] == []
    assert [name for name in names if not name.startswith(("lopt/", "lopt-"))] == []
    zipfile.ZipFile(wheel).extractall(tmp_path / "there")  # where lopt/kernels/own.py compiles what its sources are
    assert own.sources_sha256(tmp_path / "there/lopt/csrc") == own.sources_sha256(SOURCE / "csrc")


def test_a_source_distribution_is_small_and_whole(tmp_path: Path) -> None:
    """Below 2 MB, and with every file of the repository's folders but those that MANIFEST.in names."""
    for name in ("setuptools", "pybind11"):
        pytest.importorskip(name)
    if not (SOURCE / "python_tests/golden").is_dir():
        pytest.skip("this is a source distribution")
    command = [sys.executable, "setup.py", "--quiet", "egg_info", f"--egg-base={tmp_path}", "sdist", f"-d{tmp_path}"]
    done = subprocess.run(command, cwd=SOURCE, capture_output=True, text=True, check=False)
    if "the build needs" in done.stderr:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    assert archive.stat().st_size < 2e6
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    assert not any(name.startswith(("benchmarks/results", "python_tests/golden", ".ci", ".git")) for name in names)
    assert not any(name.endswith((".so", ".pyc")) for name in names)
    folders = ("lopt", "csrc", "cuda", "cmake", "docs", "examples", "python_tests")
    there = [path for folder in folders for path in (SOURCE / folder).rglob("*.*") if path.is_file()]
    there = [path for path in there if path.suffix not in (".so", ".pyc", ".npz")]
    assert {str(path.relative_to(SOURCE)) for path in there} <= names


def test_the_repository_is_small() -> None:
    """All that git tracks, without history, is below 8 MB: large rows are kept packed (benchmarks/pack.py)."""
    git = ["git", "-C", str(SOURCE), "ls-files", "-z"]
    listed = subprocess.run(git, capture_output=True, text=True, check=False) if shutil.which("git") else None
    names = listed.stdout.split("\0")[:-1] if listed is not None else []
    if "python_tests/test_build.py" not in names:
        pytest.skip("this is no checkout")
    sizes = {name: (SOURCE / name).stat().st_size for name in names if (SOURCE / name).is_file()}
    largest = sorted(sizes, key=lambda name: -sizes[name])[:10]
    assert sum(sizes.values()) < 8e6, {name: sizes[name] for name in largest}


def test_the_citation_is_of_this_version() -> None:
    assert re.findall(r"^version: (.+)$", (SOURCE / "CITATION.cff").read_text(), re.MULTILINE) == [lopt.__version__]


# build_ext, with CMake left out altogether.
BUILD = """
import subprocess

subprocess.call = lambda command: 0
__file__ = "setup.py"
exec(compile(open("setup.py").read(), "setup.py", "exec"))
"""


def test_a_build_folder_of_another_compiler_or_place_is_made_anew(tmp_path: Path) -> None:
    for name in ("setuptools", "pybind11"):
        pytest.importorskip(name)
    if CMAKE is None or shutil.which("ninja", path=str(Path(sys.executable).parent)) is None:
        pytest.skip("needs CMake and Ninja")
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(SOURCE / name, here)
    (here / "lopt").mkdir()
    (here / "lopt/__init__.py").write_text('__version__ = "0"\n')

    def kept(source: Path, **environment: str) -> bool:
        """Whether what lies in the build folder is still there after a build."""
        command = [sys.executable, "-c", BUILD, "--quiet", "build_ext"]
        variables = {**os.environ, **environment}
        done = subprocess.run(command, cwd=source, env=variables, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        folder = source / "build" / str(sys.implementation.cache_tag)
        before = (folder / "object.o").is_file()
        (folder / "object.o").touch()
        return before

    assert not kept(here)
    assert kept(here)
    assert not kept(here, CXX="another-compiler")
    assert kept(here, CXX="another-compiler")
    assert not kept(here, CXX="another-compiler", CUDACXX="/absent/nvcc")
    assert not kept(here)
    shutil.move(here, there)
    assert not kept(there)
    assert kept(there)
