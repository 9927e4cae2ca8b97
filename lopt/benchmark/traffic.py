"""Bytes moved and held per parameter, and arithmetic per parameter, counted from the feature set."""

from dataclasses import dataclass

from lopt.rule import ThetaSpec
from lopt.rule.published import SmallFC, VeLO


@dataclass(frozen=True)
class Traffic:
    """What one step of an optimizer moves between memory and processor, and what it holds, per parameter.

    Args:
        name: of the optimizer.
        accumulate: bytes read and written by ``accumulate``; 0 for an optimizer of one sweep.
        apply: bytes read and written by ``apply``, or by the only sweep.
        state: bytes of optimizer state.
        held: bytes of parameter, gradient and state.
        single_sweep: bytes moved when what the second sweep reads again is still in a cache.
        flops: floating-point operations of the small MLP, a multiply-add counted as two.
    """

    name: str
    accumulate: int
    apply: int
    state: int
    held: int
    single_sweep: int
    flops: int

    @property
    def step(self) -> int:
        """Bytes moved by a whole step."""
        return self.accumulate + self.apply


def learned(name: str, spec: ThetaSpec, param_bytes: int = 4, grad_bytes: int = 4, state_bytes: int = 4) -> Traffic:
    """Counted for the learned optimizer.

    ``accumulate`` reads parameter, gradient and state and writes the state; ``apply`` reads all of them again and
    writes the parameter. With lagged statistics both are one sweep. Accumulators take 4 bytes, 2
    with ``state_dtype=torch.bfloat16``, or 1 with ``torch.int8``, whose scales, a 128th of that, are not counted; on a
    GPU it has no kernel of one sweep. The MLP has ``columns * width + width^2 + 2 * width`` multiply-adds, ``width^2``
    less with one hidden layer, and for the skip ``columns`` more.

    Example:
        >>> from lopt.rule.theta import PRESETS
        >>> learned("paper", PRESETS["paper"]).step
        140
    """
    state = state_bytes * (len(spec.mom_decays) + len(spec.rms_decays))
    columns, width = len(spec.features.columns), spec.mlp_width
    read = param_bytes + grad_bytes + state
    lagged, one_sweep = spec.stats == "lagged", read + state + param_bytes
    between, skip = (spec.mlp_layers - 1) * width * width, columns if spec.linear_skip else 0
    multiply_adds = columns * width + between + 2 * width + skip
    return Traffic(
        name,
        accumulate=0 if lagged else read + state,
        apply=one_sweep if lagged else read + param_bytes,
        state=state,
        held=read,
        single_sweep=one_sweep,
        flops=2 * multiply_adds,
    )


def factored(
    name: str, rule: SmallFC | VeLO, param_bytes: int = 4, grad_bytes: int = 4, state_bytes: int = 4
) -> Traffic:
    """Counted for a rule of others with factored second moments, whose rows and columns are left out.

    One pass reads parameter and gradient, of VeLO momenta and the second moment too; one reads all of them and writes
    the latter; one reads all again and writes the parameter.

    Example:
        >>> from lopt.rule.published import SmallFC
        >>> factored("small_fc_lopt", SmallFC()).step
        76
    """
    state, velo = 4 * state_bytes, isinstance(rule, VeLO)
    read = param_bytes + grad_bytes + state
    measured = read if velo else param_bytes + grad_bytes
    columns, width = (30 if velo else 28), rule.mlp_width
    return Traffic(
        name,
        accumulate=measured + read + state,
        apply=read + param_bytes,
        state=state,
        held=read,
        single_sweep=read + state + param_bytes,
        flops=2 * (columns * width + width * width + 2 * width),
    )


def adamw(param_bytes: int = 4, grad_bytes: int = 4) -> Traffic:
    """Counted for torch's fused AdamW, whose two moments have the dtype of the parameter."""
    state = 2 * param_bytes
    moved = param_bytes + grad_bytes + state + param_bytes + state
    return Traffic("AdamW fused", 0, moved, state, param_bytes + grad_bytes + state, moved, flops=0)
