"""Where kernels run, and how small tables get there."""

import numpy as np
import torch
from torch import Tensor

from lopt.kernels.extension import module_of


def stream_of(device: torch.device) -> tuple[int, int]:
    """Where kernels run: the device's index and its current stream."""
    if device.type != "cuda":
        return 0, 0
    index = device.index or 0
    if torch.cuda.current_device() != index:
        # Kernels make their device the current one for a while. Going back to a device that is not in use yet would
        # make a context there, of hundreds of megabytes; torch then only remembers it, and leaves the other current.
        with torch.cuda.device(index):
            pass
    return index, torch.cuda.current_stream(device).cuda_stream


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class Table:
    """A NumPy array that kernels read: on the CPU as it is, on a GPU the copy that :meth:`send` makes.

    Args:
        host: contiguous; write to it, then call :meth:`send`.
    """

    def __init__(self, host: np.ndarray, device: torch.device) -> None:
        self.host, self.device = host, device
        self.on_host = device.type == "cpu"
        self.copy: Tensor | None = None
        self.address = self.host_address = host.ctypes.data
        self.send()

    def send(self) -> int:
        """Let kernels see what is in ``host`` now, without waiting for it; the address where they do."""
        if not self.on_host:
            self.copy = _upload(self.host, self.device)
            self.address = self.copy.data_ptr()
        return self.address


def _upload(table: np.ndarray, device: torch.device) -> Tensor:
    if table.nbytes % 8:
        came = f"{table.nbytes} bytes of {table.dtype}"
        raise TypeError(f"table: expected whole words of 8 bytes, got {came}; pad it to a multiple of 8")
    host = torch.from_numpy(table.reshape(-1).view(np.uint8).view(np.int64))  # bits, of whatever dtype
    if host.numel() == 0:
        return host.to(device)
    if is_capturing(device):  # what the host holds now must be part of the graph: kernel arguments are
        words = torch.empty_like(host, device=device)
        module_of("cuda").write_words("cuda", words.data_ptr(), host.tolist(), *stream_of(device))
        return words
    return host.pin_memory().to(device, non_blocking=True)
