"""Where kernels run and how small tables get there."""

import numpy as np
import torch
from torch import Tensor

from lopt.kernels.extension import module_of


def stream_of(device: torch.device) -> dict[str, int]:
    """Where kernels run: the device's index and its current stream."""
    if device.type != "cuda":
        return {"device": 0, "stream": 0}
    return {"device": device.index or 0, "stream": torch.cuda.current_stream(device).cuda_stream}


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def upload(table: np.ndarray, device: torch.device) -> Tensor:
    """A copy of ``table`` on the device, without waiting for it."""
    host = torch.from_numpy(np.ascontiguousarray(table))
    if device.type == "cpu" or host.numel() == 0:
        return host.to(device, copy=True)
    if is_capturing(device):  # what the host holds now must be part of the graph: kernel arguments are
        words = torch.empty_like(host, device=device)
        module_of("cuda").write_words("cuda", words.data_ptr(), host.reshape(-1).tolist(), **stream_of(device))
        return words
    return host.pin_memory().to(device, non_blocking=True)
