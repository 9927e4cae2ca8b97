"""Types of the compiled module for tests; see csrc/sim/sim.cpp."""

from lopt._C import accumulate as accumulate
from lopt._C import add_backend as add_backend
from lopt._C import advance as advance
from lopt._C import apply as apply
from lopt._C import begin as begin
from lopt._C import chunk as chunk
from lopt._C import finish as finish
from lopt._C import loss_and_gradient as loss_and_gradient
from lopt._C import sanitizer as sanitizer
from lopt._C import source_sha256 as source_sha256
from lopt._C import step as step
from lopt._C import sweep as sweep
from lopt._C import unroll as unroll
from lopt._C import unroll_scratch as unroll_scratch
from lopt._C import write_words as write_words

def reverse_order(reverse: bool) -> None: ...
def use_tensor_cores(of: str) -> None: ...
def tensor_core_sum(a: list[float], b: list[float], d: float) -> float: ...
def estimate(of: str, x: float) -> float: ...
def launches() -> int: ...
def devices() -> tuple[int, int]: ...
