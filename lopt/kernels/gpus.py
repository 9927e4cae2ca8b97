"""Whether a GPU and its driver can run the kernels that were compiled, asked before the first launch fails."""

import re

import torch

from lopt.kernels.extension import module_of

OLDEST = (8, 0)  # mma.sync of float16 halves with these shapes, and conversions of bfloat16
#: The oldest driver that runs programs of a CUDA release, by its major number.
DRIVERS = {11: 450, 12: 525, 13: 580}


def why_unsupported(capability: tuple[int, int], archs: str, toolkit: str, driver: int) -> str:
    """What keeps kernels from running, and what to do; empty where nothing does.

    Machine code of X.Y runs on GPUs of capability X.Z, Z >= Y (with a letter, as 90a: on X.Y only); PTX of X.Y is
    compiled by the driver for any capability from X.Y on, if the driver is as new as the toolkit. The CUDA runtime is
    part of the extension and needs a driver of its major version or newer.

    Args:
        capability: of the GPU, as (9, 0).
        archs: what was compiled, as CMake's CMAKE_CUDA_ARCHITECTURES with commas: ``80-real,90-virtual,100``.
        toolkit: version of nvcc.
        driver: newest CUDA version that it supports, 1000 major + 10 minor; 0 where there is none.

    Example:
        >>> why_unsupported((9, 0), "80-real,90", "13.0.88", 13010)
        ''
    """
    version = tuple(int(number) for number in toolkit.split(".")[:2])
    found = driver // 1000, driver % 1000 // 10
    runs = f"it runs programs of CUDA {found[0]}.{found[1]}" if driver else "there is none"
    if found[0] < version[0]:
        least = f" (from {DRIVERS[version[0]]} on)" if version[0] in DRIVERS else ""
        return (
            f"the driver is too old: lopt was built with CUDA {toolkit}, which needs a driver for CUDA {version[0]}"
            f"{least}; {runs}. Update it, or build lopt with an older toolkit (CUDACXX), or use impl='reference'"
        )
    name = f"compute capability {capability[0]}.{capability[1]}"
    if capability < OLDEST:
        return f"{name}: kernels need {OLDEST[0]}.{OLDEST[1]} or newer (Ampere); use impl='reference'"
    ptx = False
    for arch in archs.split(","):
        parts = re.fullmatch(r"(\d+)(\d)([a-z]?)(-real|-virtual)?", arch)
        if parts is None:  # one of CMake's names for several
            return ""
        of, kind = (int(parts[1]), int(parts[2])), parts[4]
        if of > capability or (parts[3] == "a" and of != capability):
            continue
        if kind != "-virtual" and of[0] == capability[0]:
            return ""
        ptx = ptx or kind != "-real"
    build = f"rebuild: LOPT_CUDA_ARCHS={capability[0]}{capability[1]} pip install --no-build-isolation --no-deps -e ."
    if not ptx:
        return f"{name}: lopt was built for {archs} only; {build} in its source folder, or use impl='reference'"
    if found < version:
        return (
            f"{name}: lopt was built for {archs}, of which the driver would have to compile PTX of CUDA {toolkit}, but "
            f"{runs}. Update it, or {build} in the source folder, or use impl='reference'"
        )
    return ""


def check_gpu(device: torch.device) -> None:
    """Raise RuntimeError where the kernels cannot run on this GPU, with what to do."""
    module = module_of("cuda")
    capability = torch.cuda.get_device_capability(device)
    why = why_unsupported(capability, module.cuda_archs, module.cuda_version, module.cuda_driver_version())
    if why:
        raise RuntimeError(f"impl='cuda': {torch.cuda.get_device_name(device)}: {why}")
