"""Which code made a theta."""

import hashlib
import platform
import subprocess
from pathlib import Path

import numpy as np
import torch

import lopt
from lopt.rule import WEIGHTS


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    return {
        "lopt": lopt.__version__,
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def commit() -> str | None:
    """The git commit this file belongs to; None outside a repository, without git, or when git does not track it."""
    file = Path(__file__).resolve()
    git = ["git", "-C", str(file.parent)]
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", file.name], capture_output=True, check=True)
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, check=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip()


def file_checksum(path: str | Path) -> str:
    """SHA-256 of a file, or of the shipped theta of that name."""
    named = WEIGHTS / f"{path}.safetensors"
    file = named if named.is_file() else Path(path)
    return hashlib.sha256(file.read_bytes()).hexdigest()
