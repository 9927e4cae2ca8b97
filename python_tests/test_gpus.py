"""Which GPUs and drivers the compiled CUDA kernels run on: lopt/kernels/gpus.py, with made-up GPUs."""

import re
from types import SimpleNamespace

import pytest
import torch

from lopt import kernels
from lopt.implementations import choose_implementation
from lopt.kernels import gpus
from lopt.kernels.gpus import check_gpu, why_unsupported
from lopt.rule import PRESETS

RELEASE = "80-real,90-real,100"


@pytest.mark.parametrize(
    ("capability", "archs", "toolkit", "driver"),
    [
        ((8, 0), RELEASE, "13.0.88", 13000),
        ((8, 6), RELEASE, "13.0.88", 13000),  # machine code of 8.0
        ((8, 9), "80-real", "12.4", 12040),
        ((9, 0), RELEASE, "13.0.88", 13000),
        ((9, 0), "90a-real", "12.4", 12040),
        ((10, 3), RELEASE, "13.0.88", 13000),
        ((12, 0), RELEASE, "13.0.88", 13000),  # PTX of 10.0
        ((12, 0), "90", "12.4", 12080),
        ((9, 0), "80-real,90", "12.8", 12020),  # an older driver of the same major version, machine code
        ((9, 0), "90", "12.4", 13010),
        ((8, 6), "80-virtual", "12.4", 12040),
    ],
)
def test_what_runs(capability: tuple[int, int], archs: str, toolkit: str, driver: int) -> None:
    assert why_unsupported(capability, archs, toolkit, driver) == ""


@pytest.mark.parametrize(
    ("capability", "archs", "toolkit", "driver", "reason", "remedy"),
    [
        ((7, 5), RELEASE, "12.4", 12040, r"compute capability 7\.5: kernels need 8\.0", "use impl='reference'"),
        ((8, 0), "90", "13.0", 13000, r"capability 8\.0: lopt was built for 90 only", "LOPT_CUDA_ARCHS=80 pip"),
        ((12, 0), "80-real,90-real", "13.0", 13000, "was built for 80-real,90-real only", "LOPT_CUDA_ARCHS=120 pip"),
        ((10, 0), "90a", "13.0", 13000, "was built for 90a only", "LOPT_CUDA_ARCHS=100 pip"),
        ((8, 0), "86-real", "13.0", 13000, "was built for 86-real only", "LOPT_CUDA_ARCHS=80 pip"),
        (
            (9, 0),
            RELEASE,
            "13.0.88",
            12080,
            r"driver is too old: lopt was built with CUDA 13\.0\.88, .* for CUDA 13 \(from 580 on\); .* of CUDA 12\.8",
            r"Update it, or build lopt with an older toolkit \(CUDACXX\)",
        ),
        ((9, 0), RELEASE, "12.4", 0, "driver is too old: .* 525 on.; there is none", "use impl='reference'"),
        ((12, 0), "90", "12.8", 12040, r"PTX of CUDA 12\.8, but it runs programs of CUDA 12\.4", "LOPT_CUDA_ARCHS=120"),
    ],
)
def test_what_does_not_run_and_the_remedy(
    capability: tuple[int, int], archs: str, toolkit: str, driver: int, reason: str, remedy: str
) -> None:
    why = why_unsupported(capability, archs, toolkit, driver)
    assert re.search(reason, why), why
    assert re.search(remedy, why), why


@pytest.mark.parametrize("impl", ["auto", "cuda"])
def test_it_is_asked_when_an_optimizer_is_made(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    built = SimpleNamespace(has_cuda=True, cuda_archs="90", cuda_version="13.0.88", cuda_driver_version=lambda: 13000)
    for module in (kernels, gpus):
        monkeypatch.setattr(module, "module_of", lambda backend: built)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    device, spec = torch.device("cuda", 0), PRESETS["compact"]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(RuntimeError, match=r"impl='cuda': Tesla T4: compute capability 7\.5: kernels need 8\.0"):
        choose_implementation(impl, device, spec)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    check_gpu(device)
