"""Kernels of one's own sets by NVRTC: the machine code beside nvcc's, and who starts it, by a driver that only notes.

A GPU is needed for the last test alone.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_own_kernels import check_steps
from test_own_rule import OWN

from lopt import Theta, kernels
from lopt.kernels import nvrtc, own
from lopt.rule import features as tables


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch, kept_kernels: str) -> nvrtc.Nvrtc:
    """NVRTC, where there is no nvcc."""
    found = nvrtc.find()
    if found is None:
        pytest.skip("needs NVRTC: pip install nvidia-cuda-nvrtc")
    monkeypatch.setenv("XDG_CACHE_HOME", kept_kernels)
    monkeypatch.setattr(own, "_nvcc", lambda: None)
    monkeypatch.setattr(tables, "_REGISTERED", {})
    OWN.register()
    return found


@pytest.mark.parametrize(("arch", "state"), [("80", torch.int8), ("90", torch.float32), ("100", torch.bfloat16)])
def test_it_compiles_all_kernels(compiler: nvrtc.Nvrtc, arch: str, state: torch.dtype) -> None:
    """For every architecture of a release and dtype of the state; a state in 8 bits has none of one sweep."""
    path = own.compiled(OWN, 8, 1, "cuda", (arch,), state)
    assert path.suffix == ".json"
    images, names = nvrtc.read(path)
    assert list(images) == [arch]
    assert images[arch].startswith(b"\x7fELF")
    for expression, name in zip(own._CUDA_KERNELS, names, strict=True):
        absent = state == torch.int8 and expression.startswith("sweep")
        assert absent == (name == "")
        assert name.encode() in images[arch]
        assert expression.split("<")[0] in name or absent
    assert b"lopt_dynamic_bytes" in images[arch]
    made = path.stat().st_mtime_ns
    assert own.compiled(OWN, 8, 1, "cuda", (arch,), state) == path  # kept
    assert path.stat().st_mtime_ns == made


def test_an_error_has_the_log(compiler: nvrtc.Nvrtc) -> None:
    with pytest.raises(nvrtc.NvrtcError, match=r'(?s)NVRTC_ERROR_COMPILATION.*identifier "y" is undefined'):
        compiler.compile("__global__ void f(int* x) { *x = y; }", {}, ["f"], ["--gpu-architecture=sm_90"])
    with pytest.raises(kernels.CannotCompile, match=r"NVRTC \d+\.\d+ for sm_1 failed"):
        own.compiled(OWN, 8, 1, "cuda", ("1",))


def test_a_text_and_its_headers(compiler: nvrtc.Nvrtc) -> None:
    text = '#include "mine.h"\ntemplate <int k> __global__ void f(int* x) { *x = k + MINE; }'
    image, names = compiler.compile(text, {"mine.h": "#define MINE 1"}, ["f<3>", ""], ["--gpu-architecture=sm_90"])
    assert image.startswith(b"\x7fELF")
    assert names == ["_Z1fILi3EEvPi", ""]


# A CUDA driver that has two devices, of capability 9.0 and 9.5, notes what it is asked for, and runs nothing.
DRIVER = r"""
#include <stdint.h>
#include <stdio.h>
#include <string.h>
static int current;
static int bytes[12] = {0, 0, 0, 0, 0, 0, 0, 70000, 0, 0, 0, 0};
extern "C" {
int cuInit(unsigned) { return 0; }
int cuGetErrorString(int code, const char** text) {
  *text = code == 7 ? "no such device" : nullptr;
  return 0;
}
int cuDeviceGet(int* handle, int index) {
  *handle = 10 + index;
  return index < 2 ? 0 : 7;
}
int cuDeviceGetAttribute(int* value, int which, int handle) {
  *value = which == 75 ? 9 : which == 76 && handle == 11 ? 5 : 0;
  return 0;
}
int cuDevicePrimaryCtxRetain(void** context, int handle) {
  *context = (void*)(intptr_t)handle;
  return 0;
}
int cuCtxPushCurrent_v2(void* context) {
  current = (int)(intptr_t)context;
  return 0;
}
int cuCtxPopCurrent_v2(void**) {
  current = 0;
  return 0;
}
int cuModuleLoadData(void** module, const void* image) {
  *module = (void*)image;
  printf("on %d load %s\n", current, (const char*)image);
  return 0;
}
int cuModuleGetFunction(void** function, void*, const char* name) {
  *function = strdup(name);
  return 0;
}
int cuModuleGetGlobal_v2(uint64_t* at, size_t* size, void*, const char* name) {
  *at = (uint64_t)bytes, *size = strcmp(name, "lopt_dynamic_bytes") ? 0 : sizeof bytes;
  return 0;
}
int cuMemcpyDtoH_v2(void* to, uint64_t from, size_t size) {
  memcpy(to, (void*)from, size);
  return 0;
}
int cuFuncSetAttribute(void* function, int what, int value) {
  printf("on %d set %s %d %d\n", current, (char*)function, what, value);
  return 0;
}
int cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned block, unsigned, unsigned,
                   unsigned shared, void* stream, void** arguments, void**) {
  printf("on %d start %s %u %u %u %d %lld\n", current, (char*)function, x * y * z, block, shared,
         (int)(intptr_t)stream, *(long long*)arguments[0]);
  fflush(stdout);
  return 0;
}
}
"""

STEPS = """
import ctypes, sys
ctypes.CDLL(sys.argv[1])
import torch
from lopt import LearnedOptimizer, Theta, _C
from lopt.kernels import plan, tensor_level
names = "begin accumulate advance apply apply_high apply_fast sweep sweep_high sweep_fast write finish words".split()
_C.add_kernels("noted", {"90": b"code 90", "95": b"code 95"}, names)
_C.add_kernels("eight bits", {"90": b"code 8"}, ["" if name.startswith("sweep") else name for name in names])
_C.write_words("noted", 0, [5] * 450, 1, 3)
for stats, name in (("current", "noted"), ("lagged", "noted"), ("lagged", "eight bits")):
    plan.resolved = tensor_level.resolved = lambda *key: name
    params = [torch.nn.Parameter(torch.ones(shape)) for shape in ((100, 90), (7,), (3, 3))]
    optimizer = LearnedOptimizer(params, Theta.init("compact", seed=1).with_spec(stats=stats), impl="cpu")
    for param in params:
        param.grad = torch.ones_like(param)
    for _ in range(2):
        print("step", flush=True)
        optimizer.step()
for device in (1, 2):
    try:
        _C.write_words("eight bits", 0, [1], device, 0)
    except RuntimeError as error:
        print(error)
"""


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_who_starts_the_kernels(tmp_path: Path) -> None:
    """Code by the device's capability, once; grids, blocks, shared memory, streams and the first argument of all."""
    (tmp_path / "driver.cpp").write_text(DRIVER)
    library = tmp_path / "libcuda.so.1"
    command = ["c++", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", str(tmp_path / "driver.cpp"), "-o", str(library)]
    subprocess.run(command, check=True)
    run = subprocess.run([sys.executable, "-c", STEPS, str(library)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    spec = Theta.init("compact", seed=1).spec
    begins = 1 + (spec.mlp_width << 32)  # the first two numbers of Spec: the set's and the width
    shared = 4 * (spec.num_lstm_input + 5 * spec.lstm_width + spec.num_constant)
    begin, advance = f"on 10 start begin 1 128 0 0 {begins}", f"on 10 start advance 3 256 {shared} 0 {begins}"
    finish = f"on 10 start finish {-(-3 * spec.from_mlp // 128)} 128 0 0 {begins}"
    accumulate, apply = (f"on 10 start {name} 4 128 0 0" for name in ("accumulate", "apply_high"))
    sweep = "on 10 start sweep_high 4 128 70000 0"
    limit = "on 10 set sweep_high 8 70000"
    lines = run.stdout.splitlines()
    assert [re.sub(r"^(on 10 start (?:accumulate|apply|sweep).*) \d+$", r"\1", line) for line in lines] == [
        "on 11 load code 95", "on 11 set sweep_high 8 70000", *["on 11 start words 1 128 0 3 5"] * 2,
        "step", "on 10 load code 90", limit, begin, accumulate, advance, apply, finish,
        "step", begin, accumulate, advance, apply, finish,
        "step", begin, accumulate, advance, apply, finish,  # nothing is lagged yet
        "step", begin, advance, sweep, finish,
        "step", "on 10 load code 8", begin, accumulate, advance, apply, finish,
        "step", begin, advance, accumulate, apply, finish,
        "device 1: no kernel was compiled for capability 9.5; make the optimizer anew, after the GPU is there",
        "cuDeviceGet failed: no such device",
    ]  # fmt: skip


@pytest.mark.gpu
def test_steps_on_a_gpu_are_those_of_the_reference(compiler: nvrtc.Nvrtc) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    check_steps("cuda", "cuda")
