"""Builds the extensions lopt._C and lopt._sim with CMake and Ninja. All else about the package is in pyproject.toml."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# Environment variables, explained in CMakeLists.txt.
OPTIONS = ("LOPT_CUDA", "LOPT_CUDA_ARCHS", "LOPT_SANITIZE", "LOPT_SIM", "LOPT_WERROR")
WITH_SIM = os.environ.get("LOPT_SIM", "") not in ("", "0", "OFF")


def tool(name: str) -> str:
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    return shutil.which(name, path=path) or sys.exit(f"lopt: {name} was not found; run: pip install {name}")


class CMakeBuild(build_ext):
    def build_extensions(self) -> None:  # all of them at once
        source = Path(__file__).resolve().parent
        # One folder per Python and sanitizer, for editable installs too: the next build is incremental.
        build = source / "build" / (sys.implementation.cache_tag + os.environ.get("LOPT_SANITIZE", ""))
        # Pass all each time: paths of an isolated build are gone by then, and no old option may linger.
        cache = {
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": Path(self.get_ext_fullpath("lopt._C")).resolve().parent,
            "CMAKE_MAKE_PROGRAM": tool("ninja"),
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
        } | {name: os.environ.get(name, "") for name in OPTIONS}
        flags = [f"-D{name}={value}" if value else f"-U{name}" for name, value in cache.items()]
        for command in (["-G", "Ninja", "-S", source, "-B", build, *flags], ["--build", build]):
            if subprocess.call([tool("cmake"), *command]):
                sys.exit("lopt: the extension was not built; CMake's messages above say why")


modules = ["lopt._C", *(["lopt._sim"] if WITH_SIM else [])]
setup(ext_modules=[Extension(name, sources=[]) for name in modules], cmdclass={"build_ext": CMakeBuild})
