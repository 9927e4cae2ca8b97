"""NVRTC, the CUDA compiler as a library: it comes with torch's CUDA wheels and needs no toolkit and no C++ compiler.

It compiles kernels alone, to machine code; who starts them is compiled into ``lopt._C`` (cuda/loaded.cpp).
"""

import ctypes
import json
import os
import sysconfig
from base64 import b64decode, b64encode
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

#: Headers of the standard library that kernels include, for which csrc/rtc/standard.h stands: NVRTC has none.
STANDARD = ("algorithm", "cmath", "cstdint", "cstring", "new", "type_traits", "utility")


class NvrtcError(RuntimeError):
    """What the compiler says of a text that it cannot compile."""


def _paths() -> Iterator[str]:
    """Where it may be: where pip puts it for CUDA 13, and 12; in toolkits; beside torch; where the loader looks."""
    site = Path(sysconfig.get_path("purelib"))
    for pattern in ("nvidia/cu*/lib", "nvidia/cuda_nvrtc/lib"):
        for folder in sorted(site.glob(pattern), reverse=True):
            yield from map(str, sorted(folder.glob("libnvrtc.so.*"), reverse=True))
    for root in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if root:
            yield from map(str, sorted(Path(root, "lib64").glob("libnvrtc.so.*"), reverse=True))
    yield from map(str, sorted((site / "torch" / "lib").glob("libnvrtc-*.so.*")))
    yield from ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so.11.2")


class Nvrtc:
    """The library at ``path``.

    Raises:
        OSError: it cannot be loaded.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        for part in sorted(Path(path).parent.glob("libnvrtc-builtins*.so*")) if "/" in path else ():
            if "alt" not in part.name:
                ctypes.CDLL(str(part))  # NVRTC looks for it by name, not where it is itself
        self._library = ctypes.CDLL(path)
        self._library.nvrtcGetErrorString.restype = ctypes.c_char_p
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        self.version = f"NVRTC {major.value}.{minor.value}"

    def compile(
        self, text: str, headers: Mapping[str, str], names: Sequence[str], options: Sequence[str]
    ) -> tuple[bytes, list[str]]:
        """Machine code, and what the kernels ``names`` are called in it.

        Args:
            headers: texts of those that the compiler would not find.
            names: C++ expressions, such as ``"kernel<float, 8>"``, for which templates are compiled; "" stays "".

        Raises:
            NvrtcError: with the compiler's log.
        """
        program = ctypes.c_void_p()
        texts, called = ([value.encode() for value in part] for part in (headers.values(), headers))
        array = ctypes.c_char_p * len(headers)
        self._call(
            "nvrtcCreateProgram",
            ctypes.byref(program), text.encode(), b"lopt.cu", len(headers), array(*texts), array(*called),
        )  # fmt: skip
        try:
            for name in filter(None, names):
                self._call("nvrtcAddNameExpression", program, name.encode())
            given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
            code = self._library.nvrtcCompileProgram(program, len(options), given)
            if code:
                raise NvrtcError(f"{self._said(code)}\n{self._read(program, 'ProgramLog').decode(errors='replace')}")
            lowered = []
            for name in names:
                found = ctypes.c_char_p()
                if name:
                    self._call("nvrtcGetLoweredName", program, name.encode(), ctypes.byref(found))
                lowered.append((found.value or b"").decode())
            return self._read(program, "CUBIN"), lowered
        finally:
            self._library.nvrtcDestroyProgram(ctypes.byref(program))

    def _read(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self._call(f"nvrtcGet{what}", program, buffer)
        return buffer.raw if what == "CUBIN" else buffer.value

    def _said(self, code: int) -> str:
        return str(self._library.nvrtcGetErrorString(code).decode())

    def _call(self, name: str, *arguments: object) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:
            raise NvrtcError(f"{name}: {self._said(code)}")


@cache
def find() -> Nvrtc | None:
    """The first that there is, of pip's packages, toolkits and torch; None where there is none."""
    for path in _paths():
        try:
            return Nvrtc(path)
        except (OSError, NvrtcError):
            continue
    return None


def write(path: Path, images: Mapping[str, bytes], names: Sequence[str]) -> None:
    """Keep machine code by architecture and the names of its kernels."""
    texts = {arch: b64encode(image).decode() for arch, image in images.items()}
    path.write_text(json.dumps({"names": list(names), "images": texts}))


def read(path: Path) -> tuple[dict[str, bytes], list[str]]:
    """What :func:`write` kept."""
    kept = json.loads(path.read_text())
    return {arch: b64decode(text) for arch, text in kept["images"].items()}, kept["names"]
