"""Types of the compiled module; see csrc/api/bindings.cpp."""

from collections.abc import Sequence
from typing import Any

has_cuda: bool
why_not_cuda: str
cuda_archs: str
cuda_version: str
source_sha256: str
compiler: str
build_type: str
sanitizer: str
chunk: int

def rule_tables() -> dict[str, Any]: ...
def theta_layout(spec: int) -> list[tuple[str, int, int]]: ...
def factored_sizes(rule: int, width: int) -> list[int]: ...
def has_factored(backend: str) -> bool: ...
def factored_accumulate(backend: str, params: int, num_threads: int, device: int, stream: int) -> None: ...
def factored_apply(backend: str, params: int, num_threads: int, device: int, stream: int) -> None: ...
def factored_write(backend: str, params: int, num_threads: int, device: int, stream: int) -> None: ...
def packed_weights(feature_set: int, width: int) -> int: ...
def cuda_driver_version() -> int: ...
def simd_available() -> list[str]: ...
def simd_selected() -> str: ...
def simd_select(name: str) -> bool: ...
def multiply_add_rate(num_threads: int, seconds: float) -> float: ...
def struct_fields() -> dict[str, dict[str, Any]]: ...
def write_words(backend: str, to: int, words: Sequence[int], device: int, stream: int) -> None: ...
def begin(backend: str, params: int, device: int, stream: int) -> None: ...
def advance(backend: str, params: int, device: int, stream: int) -> None: ...
def finish(backend: str, params: int, device: int, stream: int) -> None: ...
def start_run(spec: int, problem: int, theta: int, init: int, state: int) -> int: ...
def unroll_scratch(backend: str, spec: int, host_problems: int, num_problems: int, device: int) -> int: ...
def unroll(
    backend: str,
    spec: int,
    problems: int,
    host_problems: int,
    runs: int,
    host_runs: int,
    num_runs: int,
    theta: int,
    theta_stride: int,
    scratch: int,
    scratch_stride: int,
    num_threads: int,
    device: int,
    stream: int,
) -> None: ...
def loss_and_gradient(
    backend: str,
    problem: int,
    host_problem: int,
    split: int,
    key: int,
    step: int,
    param: int,
    loss: int,
    grad: int,
    scratch: int,
    device: int,
    stream: int,
) -> None: ...
def accumulate(backend: str, feature_set: int, params: int, num_threads: int, device: int, stream: int) -> None: ...
def add_backend(name: str, backend: int) -> None: ...
def native_side(backend: str) -> int: ...
def write(backend: str, params: int, orthogonalised: bool, num_threads: int, device: int, stream: int) -> bool: ...
def apply(
    backend: str, feature_set: int, width: int, params: int, num_threads: int, device: int, stream: int
) -> None: ...
def sweep(
    backend: str,
    feature_set: int,
    width: int,
    accumulating: int,
    applying: int,
    num_threads: int,
    device: int,
    stream: int,
) -> None: ...
def step(
    backend: str,
    levels: int,
    num_levels: int,
    accumulating: int,
    applying: int,
    lagged: bool,
    num_threads: int,
    device: int,
    stream: int,
) -> bool: ...
def is_number(tensor: object, like: Any) -> bool: ...

class Seen:
    """As lopt.kernels.seen._Seen."""

class Operands:
    """As lopt.kernels.seen._Operands."""
