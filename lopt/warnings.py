"""Warnings that point to the caller's line, and who that is."""

import os
import sys
import warnings
from pathlib import Path

import torch

_PLACES = tuple(str(Path(module.__file__ or "").parent) + os.sep for module in (torch, sys.modules["lopt"]))


def warn(message: str) -> None:
    """Warn about the line of the caller's that led here, through the wrappers that torch puts around a step."""
    depth, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PLACES):
        depth, frame = depth + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=depth)


def called_from(file_name: str, depth: int = 16) -> bool:
    """Whether one of the last ``depth`` callers is code of a file of this name."""
    frame = sys._getframe(1)
    for _ in range(depth):
        if frame.f_code.co_filename.endswith(file_name):
            return True
        if frame.f_back is None:
            return False
        frame = frame.f_back
    return False
