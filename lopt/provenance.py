"""By which code, on which day and machine something was made."""

import ast
import datetime
import hashlib
import json
import platform
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

import lopt
from lopt import kernels
from lopt.rule import WEIGHTS


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    return {
        "lopt": lopt.__version__,
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


@cache
def commit() -> str | None:
    """The git commit this file belongs to; None outside a repository, without git, or when git does not track it.

    It is asked for once: what a process runs is what it began with.
    """
    file = Path(__file__).resolve()
    git = ["git", "-C", str(file.parent)]
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", file.name], capture_output=True, check=True)
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, check=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip()


def package_sha256() -> str:
    """SHA-256 of all of lopt: the sources that were compiled, and the modules as they are."""
    digest = hashlib.sha256(kernels.source_sha256().encode())
    package = Path(lopt.__file__).parent
    for file in sorted(package.rglob("*.py")):
        digest.update(f"{file.relative_to(package).as_posix()}\n".encode() + file.read_bytes())
    return digest.hexdigest()


#: Modules at the top of the package that have no part in a step.
NOT_THE_OPTIMIZER = ("__main__", "cli", "figures", "files", "provenance")


def code_sha256() -> str:
    """SHA-256 of the code of the learned optimizer: the sources that were compiled, and what the modules at the top of
    the package, of rule and of kernels do, whatever their comments and docstrings say."""
    package = Path(lopt.__file__).parent
    parts = [*package.glob("*.py"), *package.glob("rule/*.py"), *package.glob("kernels/*.py")]
    digest = hashlib.sha256(kernels.source_sha256().encode())
    for file in sorted(file for file in parts if file.stem not in NOT_THE_OPTIMIZER):
        digest.update(_meaning(file.read_text(encoding="utf-8")))
    return digest.hexdigest()


@cache
def _meaning(source: str) -> bytes:
    """What a module does."""
    return ast.dump(_without_docstrings(ast.parse(source))).encode()


def _without_docstrings(tree: ast.Module) -> ast.Module:
    """The same program, with ``...`` where a docstring was.

    Example:
        >>> ast.unparse(_without_docstrings(ast.parse("def f(x):\\n    'Twice x.'\\n    return 2 * x")))
        'def f(x):\\n    ...\\n    return 2 * x'
    """
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            node.body[0] = ast.Expr(ast.Constant(...))
    return tree


def file_checksum(path: str | Path) -> str:
    """SHA-256 of a file, or of the shipped theta of that name."""
    named = WEIGHTS / f"{path}.safetensors"
    file = named if named.is_file() else Path(path)
    return hashlib.sha256(file.read_bytes()).hexdigest()


def checksum(config: Any) -> str:
    """SHA-256 of plain JSON values."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def origin() -> dict[str, str]:
    """Day, machine with the instruction set of the CPU kernels, commit and versions, for rows of losses."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "machine": f"{cpu_name()}, {kernels.simd_selected()}",
        "commit": commit() or "",
        **versions(),
    }


def cpu_name() -> str:
    """Model of the processor and number of cores."""
    models = cpu_info("model name")
    return f"{models[0]} x {len(models)}" if models else platform.processor() or platform.machine()


def cpu_info(name: str) -> list[str]:
    """What Linux says of every core under this name; nothing elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
    return [line.split(":", 1)[1].strip() for line in lines if line.startswith(name)]
