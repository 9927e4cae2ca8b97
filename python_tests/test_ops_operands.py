"""lopt.kernels: errors that name the operand, and the operations registered with torch.library."""

from collections.abc import Callable

import pytest
import torch
from kernel_cases import BF16, F32, SHORT, Backend, Run, outputs, problem_of, same, spec_of
from torch import Tensor

from lopt import kernels
from lopt.rule.features import FEATURE_SETS

SETS = pytest.mark.parametrize("feature_set", FEATURE_SETS)

# ---- Wrong operands -------------------------------------------------------------------------------------------------


def plan_of(**changes: object) -> kernels.Plan:
    """A plan over two tensors with some of its arguments replaced."""
    arguments = {
        "backend": "cpu",
        "feature_set": "compact",
        "params": [torch.zeros(4), torch.zeros(2, 3)],
        "mom": [torch.zeros(3, 4), torch.zeros(3, 6)],
        "rms": [torch.zeros(2, 4), torch.zeros(2, 6)],
    }
    return kernels.Plan(**{**arguments, **changes})  # type: ignore[arg-type]


Z = torch.zeros
BAD_PLANS = [
    ({"backend": "tpu"}, ValueError, r"backend: expected one of \('cpu', 'cuda', 'sim'\), got 'tpu'"),
    ({"feature_set": "large"}, ValueError, r"feature_set: expected one of \['compact', 'paper'\], got 'large'"),
    ({"precision": "double"}, ValueError, r"precision: expected one of \('exact', 'high', 'fast'\), got 'double'"),
    ({"params": []}, ValueError, "params: expected at least one tensor, got none"),
    ({"params": [Z(4), Z(0)]}, ValueError, r"params\[1\]: empty; leave empty tensors out"),
    ({"params": [Z(4), Z(2, 3).double()]}, TypeError, r"params\[1\]: expected torch.float32 or torch.bfloat16 "
     "or torch.float16, got torch.float64; convert it or use impl='reference'"),
    ({"params": [Z(4), Z(3, 2).T]}, ValueError, r"params\[1\]: expected a contiguous tensor, got strides \(1, 2\)"),
    ({"params": [Z(4), Z(2, 3, device="meta")]}, ValueError, r"params\[1\]: expected device cpu, got meta"),
    ({"params": [Z(4, device="meta"), Z(6)]}, ValueError, r"params\[0\]: on meta, which back end 'cpu' cannot reach"),
    ({"mom": [Z(3, 4)]}, ValueError, "mom: expected 2 entries, one for each tensor, got 1"),
    ({"mom": [Z(3, 4), Z(3, 6).bfloat16()]}, TypeError, r"mom\[1\]: expected torch.float32, got torch.bfloat16"),
    ({"mom": [Z(3, 4).half(), Z(3, 6).half()]}, TypeError, r"mom\[0\]: expected torch.float32 or torch.bfloat16 "
     "or torch.int8, got torch.float16"),
    ({"mom": [Z(3, 5), Z(3, 6)]}, ValueError, r"mom\[0\]: expected 12 elements, got 15"),
    ({"rms": [Z(2, 4), Z(6, 2).T]}, ValueError, r"rms\[1\]: expected a contiguous tensor"),
    ({"rms": [Z(3, 4), Z(2, 6)]}, ValueError, r"rms\[0\]: expected 8 elements, got 12"),
    ({"theta_index": [0]}, ValueError, "theta_index: expected 2 entries, one for each tensor, got 1"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "kind", "message"), BAD_PLANS)
def test_plan_names_what_is_wrong(changes: dict[str, object], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        plan_of(**changes)


BAD_GRADS = [
    ([Z(4)], ValueError, "grads: expected 2 entries, one for each tensor, got 1"),
    ([Z(4), Z(6).double()], TypeError, r"grads\[1\]: expected torch.float32 or torch.bfloat16 or torch.float16, got "),
    ([Z(4), Z(5)], ValueError, r"grads\[1\]: expected 6 elements, got 5"),
    (
        [Z(4), Z(3, 2).T],
        ValueError,
        r"grads\[1\]: expected a contiguous tensor, got strides \(1, 2\); pass x.contiguous",
    ),
    ([Z(4), Z(6, device="meta")], ValueError, r"grads\[1\]: expected device cpu, got meta; all tensors must share one"),
]


@pytest.mark.parametrize(("grads", "kind", "message"), BAD_GRADS)
def test_set_tensors_names_what_is_wrong(grads: list[Tensor], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        plan_of().set_tensors([Z(4), Z(2, 3)], grads)


SWAPS = [
    (lambda x: x.T, ValueError, "expected a contiguous tensor, got strides"),
    (lambda x: x[:1], ValueError, "expected 6 elements, got 3"),
    (
        lambda x: x.view(torch.int32),
        TypeError,
        "expected .* or torch.float16, got torch.int32",
    ),
    (lambda x: Z(2, 3, device="meta"), ValueError, "expected device cpu, got meta"),
]


@pytest.mark.parametrize("operand", ["params", "grads"])
@pytest.mark.parametrize(("swap", "kind", "message"), SWAPS)
def test_what_was_good_is_looked_at_again(
    operand: str, swap: Callable[[Tensor], Tensor], kind: type[Exception], message: str
) -> None:
    """Also where memory and number of tensors stay the same; and a plan that refused works on."""
    tensors = {"params": [Z(4), Z(2, 3)], "grads": [Z(4), Z(2, 3)]}
    plan = plan_of(params=tensors["params"])
    plan.set_tensors(**tensors)
    for _ in range(2):
        bad = {**tensors, operand: [tensors[operand][0], swap(tensors[operand][1])]}
        with pytest.raises(kind, match=rf"{operand}\[1\]: {message}"):
            plan.set_tensors(**bad)
    plan.set_tensors(**tensors)


def test_operations_need_gradients_first() -> None:
    with pytest.raises(RuntimeError, match="grads: not known yet; call"):
        plan_of().accumulate(torch.ones(2))


BAD_ACCUMULATE = [
    (
        {"clip_limit": torch.ones(1)},
        r"clip_limit: expected float32 of shape \(2,\) on cpu, got torch.float32 of shape \(1,\)",
    ),
    ({"clip_limit": torch.ones(2).double()}, "clip_limit: expected float32 .* got torch.float64"),
    ({"clip_limit": torch.ones(2), "mom_decays": (0.9,)}, "mom_decays: expected 3 decays, got 1"),
    ({"clip_limit": torch.ones(2), "rms_decays": (0.9, 0.9, 0.9)}, "rms_decays: expected 2 decays, got 3"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_ACCUMULATE)
def test_accumulate_names_what_is_wrong(arguments: dict[str, object], message: str) -> None:
    plan = plan_of()
    plan.set_tensors([Z(4), Z(2, 3)], [Z(4), Z(2, 3)])
    with pytest.raises(ValueError, match=message):
        plan.accumulate(**arguments)  # type: ignore[arg-type]


SIZE = kernels._C.packed_weights(kernels.FEATURE_SET_INDEX["compact"], 8)
BAD_APPLY = [
    (
        {"clip_limit": Z(3)},
        None,
        r"clip_limit: expected float32 of shape \(2,\) on cpu, got torch.float32 of shape \(3,\)",
    ),
    ({"scale": Z(2, 11)}, None, r"scale: expected float32 of shape \(2, 12\)"),
    ({"shift": Z(12)}, None, r"shift: expected float32 of shape \(2, 12\)"),
    ({"bias": Z(2, 7)}, None, r"bias: kernels exist for MLP widths \(8, 16, 32\), got 7; use impl='reference'"),
    ({"bias": Z(1, 8)}, None, r"bias: expected float32 of shape \(2, 8\)"),
    ({"step_size": Z(())}, None, r"step_size: expected float32 of shape \(2,\)"),
    ({"keep": Z(2).double()}, None, "keep: expected float32 .* got torch.float64"),
    ({"weights": Z(1, SIZE - 4)}, None, rf"weights: expected float32 \[num_theta, {SIZE}\] on cpu"),
    ({"weights": Z(1, SIZE).bfloat16()}, None, "weights: expected float32 .* got torch.bfloat16"),
    ({}, [0, 2], "theta_index: out of range for 2 rows of weights"),
    ({}, [-1, 0], "theta_index: out of range for 2 rows of weights"),
]


@pytest.mark.parametrize(("changes", "theta_index", "message"), BAD_APPLY)
def test_apply_names_what_is_wrong(changes: dict[str, Tensor], theta_index: list[int] | None, message: str) -> None:
    plan = plan_of(theta_index=theta_index)
    plan.set_tensors([Z(4), Z(2, 3)], [Z(4), Z(2, 3)])
    operands = {"clip_limit": Z(2), "scale": Z(2, 12), "shift": Z(2, 12), "bias": Z(2, 8), "step_size": Z(2)}
    inputs = {**operands, "keep": Z(2), **changes}
    weights = inputs.pop("weights", Z(2, SIZE))
    with pytest.raises(ValueError, match=message):
        plan.apply(inputs, weights, magnitude_rate=0.1, feature_clip=None)


def test_cuda_needs_a_build_with_cuda_and_tensors_there() -> None:
    kind, message = RuntimeError, "backend 'cuda': lopt was built without CUDA; rebuild with LOPT_CUDA=ON"
    if kernels._C.has_cuda:
        kind, message = ValueError, r"params\[0\]: on cpu, which back end 'cuda' cannot reach; use impl='auto'"
    with pytest.raises(kind, match=message):
        plan_of(backend="cuda")


def test_is_compiled() -> None:
    for feature_set in FEATURE_SETS:
        compiled = [width for width in range(1, 65) if kernels.is_compiled(spec_of(feature_set, width))]
        assert tuple(compiled) == kernels.WIDTHS


# ---- torch.library --------------------------------------------------------------------------------------------------

Operands = tuple[object, ...]


def library_operands(feature_set: str, device: torch.device) -> tuple[Operands, Operands]:
    """Fresh arguments of ``torch.ops.lopt.accumulate`` and ``torch.ops.lopt.apply``."""
    problem = problem_of(feature_set, 8, SHORT, BF16, F32)
    spec, conditioning = problem.spec, problem.conditioning
    state = [[x.to(device, copy=True) for x in getattr(problem, name)] for name in ("params", "grads", "mom", "rms")]
    limit = problem.clip_limit.to(device)
    rows = conditioning.scale, conditioning.shift, problem.bias, problem.step_size, problem.keep, conditioning.gate
    rows = (*rows, kernels.pack_mlp(spec, problem.weights)[None])
    index = [0] * len(SHORT)
    constants = (index, spec.magnitude_rate, spec.feature_clip)
    return (feature_set, *state, limit), (feature_set, *state, limit, *(x.to(device) for x in rows), *constants)


@SETS
def test_opcheck(device: torch.device, feature_set: str) -> None:
    """Schema, fake tensors, autograd registration and AOT dispatch."""
    accumulate, apply = library_operands(feature_set, device)
    torch.library.opcheck(torch.ops.lopt.accumulate.default, accumulate)
    torch.library.opcheck(torch.ops.lopt.apply.default, apply)


@SETS
def test_library_operations_are_the_plan(device: torch.device, feature_set: str) -> None:
    accumulate, apply = library_operands(feature_set, device)
    stats = torch.ops.lopt.accumulate(*accumulate)
    hidden = torch.ops.lopt.apply(*apply)
    run = Run(problem_of(feature_set, 8, SHORT, BF16, F32), Backend(device.type, device))
    expected = outputs(run)
    _, params, _, mom, rms, *_ = apply
    assert same([stats, hidden, *params, *mom, *rms], expected)  # type: ignore[misc]


@SETS
def test_library_accumulates_in_bfloat16(device: torch.device, feature_set: str) -> None:
    """Bits of the plan, which rounds by the number of the step."""
    found = []
    for step in (0, 7):
        (_, params, grads, mom, rms, limit), _ = library_operands(feature_set, device)
        at = torch.tensor(step, device=device)
        mine, theirs = ([[x.to(BF16) for x in state] for state in (mom, rms)] for _ in range(2))  # type: ignore[attr-defined]
        operands = (feature_set, params, grads, *mine, limit, at)
        plan = kernels.Plan(device.type, feature_set, params, *theirs)  # type: ignore[arg-type]
        plan.set_tensors(params, grads)  # type: ignore[arg-type]
        expected = plan.accumulate(limit, step=at)  # type: ignore[arg-type]
        stats = torch.ops.lopt.accumulate(*operands)
        assert same([stats, *mine[0], *mine[1]], [expected, *theirs[0], *theirs[1]])
        found.append(mine[0])
        torch.library.opcheck(torch.ops.lopt.accumulate.default, operands)
    assert not same(*found)
    with pytest.raises(ValueError, match=r"step: a narrow state needs one int64 on .*, got nothing"):
        torch.ops.lopt.accumulate(*operands[:-1])


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compile(device: torch.device, compiler: str) -> None:
    """One graph, the same bits as without a compiler."""

    def both(accumulate: Operands, apply: Operands) -> tuple[Tensor, Tensor]:
        stats = torch.ops.lopt.accumulate(*accumulate)
        return stats * 2.0, torch.ops.lopt.apply(*apply) + stats[:, :1]

    compiled = torch.compile(both, fullgraph=True, backend=compiler)
    results = []
    for function in (both, compiled):
        accumulate, apply = library_operands("compact", device)
        results.append([*function(accumulate, apply), *apply[1], *apply[3], *apply[4]])  # type: ignore[misc]
    assert same(*results)
