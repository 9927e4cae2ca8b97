"""Builds the extensions lopt._C and lopt._sim with CMake and Ninja. All else about the package is in pyproject.toml."""

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import setuptools

SOURCE = Path(__file__).resolve().parent
# Environment variables, explained in CMakeLists.txt.
OPTIONS = ("LOPT_CUDA", "LOPT_CUDA_ARCHS", "LOPT_SANITIZE", "LOPT_WERROR", "LOPT_PREBUILT")
# Those that CMake reads when a folder is configured for the first time, and never again.
READ_ONCE = ("CXX", "CXXFLAGS", "LDFLAGS", "CUDACXX", "CUDAFLAGS", "CUDAHOSTCXX", "CMAKE_BUILD_TYPE")
READ_ONCE += ("CMAKE_CXX_COMPILER_LAUNCHER", "CMAKE_CUDA_COMPILER_LAUNCHER")


def tool(name: str) -> str:
    """Path of a program: in this environment, or on PATH; empty where there is none."""
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    return shutil.which(name, path=path) or ""


def version_of(name: str) -> str:
    """Of what [build-system] in pyproject.toml requires; empty where it is missing."""
    if name in ("cmake", "ninja"):
        if not tool(name):
            return ""
        output = subprocess.run([tool(name), "--version"], capture_output=True, text=True).stdout
        return re.search(r"[\d.]+|$", output)[0]
    try:
        return __import__(name).__version__
    except ImportError:
        return ""


def check_requirements() -> None:
    """What pip sees to, but not with --no-build-isolation: all that is missing or too old, before anything starts."""
    lines = (SOURCE / "pyproject.toml").read_text(encoding="utf-8")
    unmet = {}
    for requirement in ast.literal_eval(re.search(r"^requires = (\[.*\])", lines, re.MULTILINE)[1]):
        name, _, least = requirement.partition(">=")
        version = version_of(name)
        numbers = [[int(number) for number in re.findall(r"\d+", text)[:3]] for text in (version, least)]
        if not version or numbers[0] < numbers[1]:
            unmet[requirement] = version or "none"
    if unmet:
        found = ", ".join(f"{requirement} (found {version})" for requirement, version in unmet.items())
        sys.exit(f"lopt: the build needs {found}; run: pip install {' '.join(map(repr, unmet))}")


check_requirements()

from setuptools.command.bdist_wheel import bdist_wheel  # noqa: E402
from setuptools.command.build_ext import build_ext  # noqa: E402
from setuptools.command.build_py import build_py  # noqa: E402


def origin() -> dict[str, str]:
    """What a build folder is made for; CMake does not notice a change of it, or fails."""
    facts = {name: os.environ.get(name, "") for name in READ_ONCE}
    toolkits = [os.path.join(os.environ.get(name, ""), "bin") for name in ("CUDA_HOME", "CUDA_PATH")]
    search = os.pathsep.join([*toolkits, os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"])
    for name, default in (("CXX", "c++"), ("CUDACXX", "nvcc")):
        program = shlex.split(facts[name] or default)[0]
        facts[f"path of {name}"] = os.path.realpath(shutil.which(program, path=search) or program)
    return {**facts, "source": str(SOURCE), "python": sysconfig.get_path("include")}


class CMakeBuild(build_ext):
    def build_extensions(self) -> None:  # all of them at once
        import pybind11

        # One folder per Python and sanitizer, for editable installs too: the next build is incremental.
        build = SOURCE / "build" / (sys.implementation.cache_tag + os.environ.get("LOPT_SANITIZE", ""))
        stamp = build / "origin.json"
        if not stamp.is_file() or json.loads(stamp.read_text()) != origin():
            shutil.rmtree(build, ignore_errors=True)
            build.mkdir(parents=True)
            stamp.write_text(json.dumps(origin(), indent=1))
        # Pass all each time: paths of an isolated build are gone by then, and no old option may linger.
        cache = {
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": Path(self.get_ext_fullpath("lopt._C")).resolve().parent,
            "CMAKE_MAKE_PROGRAM": tool("ninja"),
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "LOPT_SIM": "ON" if any(ext.name == "lopt._sim" for ext in self.extensions) else "",
        } | {name: os.environ.get(name, "") for name in OPTIONS}
        flags = [f"-D{name}={value}" if value else f"-U{name}" for name, value in cache.items()]
        for command in (["-G", "Ninja", "-S", SOURCE, "-B", build, *flags], ["--build", build]):
            if subprocess.call([tool("cmake"), *command]):
                sys.exit("lopt: the extension was not built; CMake's messages above say why")


class CleanBuild(build_py):
    def run(self) -> None:
        if not self.editable_mode:  # a folder of an earlier build may hold modules that are no more
            shutil.rmtree(Path(self.build_lib) / "lopt", ignore_errors=True)
        super().run()
        if not self.editable_mode:  # for lopt/kernels/own.py, which finds them beside the package otherwise
            for folder in ("csrc", "cuda", "cmake"):
                shutil.copytree(SOURCE / folder, Path(self.build_lib) / "lopt" / folder)
            shutil.copy(SOURCE / "CMakeLists.txt", Path(self.build_lib) / "lopt")


class Wheel(bdist_wheel):
    def finalize_options(self) -> None:
        modules = self.distribution.ext_modules
        self.distribution.ext_modules = [ext for ext in modules if ext.name != "lopt._sim"]  # for tests only
        super().finalize_options()


with_sim = os.environ.get("LOPT_SIM", "").upper() in ("ON", "1", "TRUE", "YES")
setuptools.setup(
    ext_modules=[setuptools.Extension(name, sources=[]) for name in ["lopt._C"] + ["lopt._sim"] * with_sim],
    cmdclass={"bdist_wheel": Wheel, "build_ext": CMakeBuild, "build_py": CleanBuild},
)
