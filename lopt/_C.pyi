"""Types of the compiled module; see csrc/bindings.cpp."""

from collections.abc import Sequence

has_cuda: bool
cuda_archs: str
cuda_version: str
compiler: str
build_type: str
sanitizer: str
chunk: int

def feature_sets() -> list[dict[str, str | int]]: ...
def packed_weights(feature_set: int, width: int) -> int: ...
def simd_available() -> list[str]: ...
def simd_selected() -> str: ...
def simd_select(name: str) -> bool: ...
def multiply_add_rate(num_threads: int, seconds: float) -> float: ...
def sim_reverse_order(reverse: bool) -> None: ...
def struct_sizes() -> dict[str, int]: ...
def sim_launches() -> int: ...
def write_words(backend: str, to: int, words: Sequence[int], device: int, stream: int) -> None: ...
def begin(backend: str, params: int, device: int, stream: int) -> None: ...
def advance(backend: str, params: int, device: int, stream: int) -> None: ...
def finish(backend: str, params: int, device: int, stream: int) -> None: ...
def start_run(spec: int, problem: int, theta: int, init: int, state: int) -> int: ...
def unroll(
    spec: int, problems: int, runs: int, num_runs: int, theta: int, theta_stride: int, num_threads: int
) -> None: ...
def accumulate(
    backend: str,
    feature_set: int,
    tensors: int,
    grads: int,
    chunks: int,
    num_tensors: int,
    num_chunks: int,
    clip_limit: int,
    mom_decays: Sequence[float],
    rms_decays: Sequence[float],
    partials: int,
    finished: int,
    stats: int,
    num_threads: int,
    device: int,
    stream: int,
) -> None: ...
def apply(
    backend: str,
    feature_set: int,
    width: int,
    tensors: int,
    grads: int,
    chunks: int,
    num_tensors: int,
    num_chunks: int,
    clip_limit: int,
    scale: int,
    shift: int,
    bias: int,
    step_size: int,
    keep: int,
    weights: int,
    magnitude_rate: float,
    feature_clip: float,
    precision: int,
    partials: int,
    finished: int,
    hidden: int,
    num_threads: int,
    device: int,
    stream: int,
) -> None: ...
