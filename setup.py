"""Builds the extension lopt._C: CMake configures, Ninja compiles. All else about the package is in pyproject.toml."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

OPTIONS = ("LOPT_CUDA", "LOPT_CUDA_ARCHS", "LOPT_SANITIZE", "LOPT_WERROR")  # environment variables, see CMakeLists.txt


def tool(name: str) -> str:
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    return shutil.which(name, path=path) or sys.exit(f"lopt: {name} was not found; run: pip install {name}")


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        source = Path(__file__).resolve().parent
        # One folder per Python and sanitizer, also for editable installs, so that the next build is incremental.
        build = source / "build" / "-".join(filter(None, (sys.implementation.cache_tag, os.environ.get("LOPT_SANITIZE"))))
        # Paths of an isolated build are gone the next time, and a variable unset since must not linger: pass all anew.
        cache = {
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": Path(self.get_ext_fullpath(ext.name)).resolve().parent,
            "CMAKE_MAKE_PROGRAM": tool("ninja"),
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
        } | {name: os.environ.get(name, "") for name in OPTIONS}
        flags = [f"-D{name}={value}" if value else f"-U{name}" for name, value in cache.items()]
        subprocess.run([tool("cmake"), "-G", "Ninja", "-S", source, "-B", build, *flags], check=True)
        subprocess.run([tool("cmake"), "--build", build], check=True)


setup(ext_modules=[Extension("lopt._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
