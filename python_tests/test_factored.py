"""Kernels of learned optimizers of others against float64, bit for bit where order may not count.

The rule is that of test_ops.py: ``error <= 2 * error of the float32 reference + one ulp``, of the largest element.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from kernel_cases import Backend
from optimizer_cases import assert_same_bits, clone_tree, set_grads, snapshot
from test_ops import check_rule, error
from torch import Tensor
from torch.nn import Parameter

from lopt import LearnedOptimizer, Theta, kernels
from lopt.kernels.factored import Lines, sizes_of
from lopt.rule.matrices import Kind
from lopt.rule.published import Celo2, MLPLOpt, NNAdam, Rule, SmallFC, VeLO, parts

Params = list[Parameter]

#: By name: those that have kernels.
RULES: dict[str, Rule] = {
    "small_fc": SmallFC(),
    "small_fc32": SmallFC(mlp_width=32),
    "velo": VeLO(lstm_width=8, bank_size=6),
    "mlp_lopt": MLPLOpt(),
    "nn_adam": NNAdam(lstm_width=8, output_scale=0.3),
    "celo2": Celo2(),
}
every_rule = pytest.mark.parametrize("name", RULES)

RANKS = ((), (5,), (9, 3), (3, 9), (4, 4), (2, 3, 4), (3, 2, 3, 3), (2, 1, 3, 2, 2))
#: Several tiles of lines, of elements, and of both; kernels of convolutions; lines that are short, or one alone.
TILED = (
    (70, 300),
    (40, 1100),
    (2100, 9),
    (3, 2500),
    (17_000,),
    (20, 24, 3, 3),
    (8, 16, 9, 9),
    (1, 1),
    (16, 3, 7, 7),
    (6, 4, 12, 12),
)
SHAPES = (*RANKS, *TILED)
#: Fewer and smaller, for the simulator.
SHORT = (*RANKS, (30, 40), (3, 1100), (1100, 3), (6, 8, 3, 3), (3, 2, 12, 12))


@cache
def theta_of(name: str) -> Theta[Any]:
    """Random meta-parameters, none of them zero, with steps that are large enough to be seen."""
    theta = Theta.init(RULES[name], seed=1)
    generator = torch.Generator().manual_seed(2)
    tensors = {k: x + 0.05 * torch.randn(x.shape, generator=generator) for k, x in theta.tensors.items()}
    theta = Theta(theta.spec, tensors, theta.provenance)
    if name == "velo":  # its step sizes are shares of the parameters
        return theta.with_spec(step_multiplier=0.01, magnitude_rate=0.1)
    if name == "nn_adam":
        theta.tensors["initial_controls"][0] = 0.1 * math.log(0.03)
        return theta
    if name == "celo2":
        return theta.with_spec(learning_rate=0.05, magnitude_rate=1.0)
    return theta.with_spec(step_multiplier=0.05, magnitude_rate=1.0)


@pytest.fixture(autouse=True)
def _has_kernels(request: pytest.FixtureRequest) -> None:
    if "backend" in request.fixturenames:
        backend = request.getfixturevalue("backend")
        if kernels.why_no_kernels(SmallFC(), backend.name):
            pytest.skip(f"no kernels for {backend.name}")


def shapes_of(backend: Backend) -> Sequence[tuple[int, ...]]:
    return SHORT if backend.name == "sim" else SHAPES


def random_params(shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [0.3 * torch.randn(shape, generator=generator) for shape in shapes]


def make(
    name: str,
    values: Sequence[Tensor],
    impl: str,
    state: Any = None,
    device: torch.device | None = None,
    **options: Any,
) -> tuple[LearnedOptimizer, Params]:
    """An optimizer over copies of the values."""
    params = [Parameter(value.detach().to(device, copy=True)) for value in values]
    opt = LearnedOptimizer(params, theta_of(name), impl=impl, weight_decay=0.1, total_steps=20, **options)
    if state is not None:
        opt.load_state_dict(clone_tree(state))
    return opt, params


@cache
def begun(name: str, shapes: Sequence[tuple[int, ...]]) -> tuple[list[Tensor], Any]:
    """Parameters and state after three steps of the float32 reference."""
    opt, params = make(name, random_params(shapes), "reference")
    for step in range(3):
        set_grads(params, step)
        opt.step(loss=1.0 + step)
    return [param.detach().clone() for param in params], opt.state_dict()


@cache
def stepped(name: str, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> tuple[list[Tensor], list[Any]]:
    """Parameters and states one step later, by the reference."""
    values, state = begun(name, shapes)
    opt, params = make(name, [value.to(dtype) for value in values], "reference", state)
    return step_on(opt, params)


def step_on(opt: LearnedOptimizer, params: Params) -> tuple[list[Tensor], list[Any]]:
    set_grads(params, 7)
    opt.step(loss=0.5)
    return [param.detach() for param in params], [dict(opt.state[param]) for param in params]


@every_rule
def test_step_error(backend: Backend, name: str) -> None:
    """Of parameters and of every accumulator."""
    shapes = shapes_of(backend)
    values, state = begun(name, shapes)
    opt, params = make(name, values, backend.name, state, backend.device)
    assert opt.implementation == backend.name
    found, exact, single = (
        step_on(opt, params),
        *(stepped(name, shapes, dtype) for dtype in (torch.float64, torch.float32)),
    )
    moved = [
        [bool((new.cpu() != old).any()) for new, old in zip(news[0], values, strict=True)] for news in (found, single)
    ]
    assert moved[0] == moved[1]
    assert sum(moved[0]) > len(shapes) - 3  # a ReLU may be shut for the one number that a tensor has
    check_rule("params", error(found[0], exact[0]), error(single[0], exact[0]))
    compared = {"mom", "rms", "row", "column", "diagonal", "controls", "updates"}
    for part in sorted({name for state in exact[1] for name in state} & compared):
        rows = [i for i, of_tensor in enumerate(exact[1]) if part in of_tensor]
        ours, theirs, alone = ([states[i][part] for i in rows] for states in (found[1], exact[1], single[1]))
        check_rule(part, error(ours, theirs), error(alone, theirs))


@every_rule
def test_update_error(backend: Backend, name: str) -> None:
    """Of what is added to the parameters, which otherwise is seen through their rounding: to parameters of zero.

    One ulp more, as the exponential has an error of its own.
    """
    shapes = shapes_of(backend)
    values, state = begun(name, shapes)
    updates = []
    for impl, dtype in ((backend.name, torch.float32), ("reference", torch.float64), ("reference", torch.float32)):
        device = backend.device if impl != "reference" else None
        opt, params = make(name, [torch.zeros_like(value, dtype=dtype) for value in values], impl, state, device)
        updates.append(step_on(opt, params)[0])
    check_rule("update", error(updates[0], updates[1]), error(updates[2], updates[1]), ulps=2.0)


@every_rule
def test_accumulators_in_bfloat16(backend: Backend, name: str) -> None:
    """Rounded by the same bits as in the reference; where accumulators are the same, parameters are by the rule.

    One that is off by a rounding of float32 may become the other neighbour, once in 2^15 or so; in float64, where
    decays are other numbers, more of them. Celo2 without Newton-Schulz, which makes much of one that is.
    """
    values, state = begun(name, SHORT)
    theta = theta_of(name).with_spec(newton_schulz=0) if name == "celo2" else theta_of(name)
    found: list[tuple[list[Tensor], list[Any]]] = []
    runs = ((backend.name, torch.float32), ("reference", torch.float64), ("reference", torch.float32))
    for impl, dtype in runs:
        params = [Parameter(value.to(backend.device if impl == backend.name else None, dtype)) for value in values]
        opt = LearnedOptimizer(params, theta, impl=impl, weight_decay=0.1, total_steps=20, state_dtype=torch.bfloat16)
        assert opt.implementation == impl
        wide = clone_tree(state)
        for group in wide["param_groups"]:
            group.update({key: opt.param_groups[0][key] for key in ("theta", "theta_checksum")})
        opt.load_state_dict(wide)
        found.append(step_on(opt, params))
    others, errors = 0, []
    for i in range(len(SHORT)):
        alike = torch.ones(SHORT[i], dtype=torch.bool)
        for part in RULES[name].per_param:
            ours, exact, single = (states[i][part].cpu() for _, states in found)
            assert ours.dtype == exact.dtype == single.dtype == torch.bfloat16
            others += int((ours != single).sum())
            assert bool(((ours.double() - single.double()).abs() <= 2.0**-7 * single.double().abs()).all())
            alike &= ((ours == exact) & (single == exact)).all(dim=0)
        errors.append([error([params[i][alike]], [found[1][0][i][alike]]) for params, _ in (found[0], found[2])])
    assert others <= 4
    check_rule("params", *(max(column) for column in zip(*errors, strict=True)))


@every_rule
def test_bits_do_not_depend_on_threads_order_or_company(name: str, set_num_threads: Callable[[int], None]) -> None:
    values = random_params(SHAPES)

    def result(threads: int, order: Sequence[int]) -> list[Any]:
        set_num_threads(threads)
        opt, params = make(name, [values[i] for i in order], "cpu")
        found: list[Any] = [None] * len(values)
        for step in range(3):
            set_grads(in_order := [Parameter(value.clone()) for value in values], step)
            for param, i in zip(params, order, strict=True):
                param.grad = in_order[i].grad
            opt.step(loss=1.0)
        for param, i in zip(params, order, strict=True):
            found[i] = [param.detach(), dict(opt.state[param])]
        return found

    one = result(1, range(len(values)))
    for threads in (1, 3):
        assert_same_bits(one, result(threads, range(len(values))))
    if RULES[name].tensors_alone:  # VeLO's LSTM sees the largest over all tensors
        assert_same_bits(one, result(2, range(len(values))[::-1]))
        for i in (0, 3, 6, 9, 13):
            assert_same_bits(one[i], result(2, [i])[i])


def test_orders_of_threads_and_blocks_do_not_count(backend: Backend) -> None:
    """The simulator's, and instruction sets agree to rounding."""
    values, state = begun("small_fc", SHORT)
    opt, params = make("small_fc", values, backend.name, state, backend.device)
    again, others = make("small_fc", values, backend.name, state, backend.device)
    assert_same_bits(step_on(opt, params), step_on(again, others))


def test_kernels_and_reference_take_up_each_other(backend: Backend) -> None:
    """State dicts are the same: after a step of one, one of the other is that of either alone, to rounding."""
    values, state = begun("small_fc", SHORT)
    opt, params = make("small_fc", values, backend.name, state, backend.device)
    step_on(opt, params)
    other, copies = make("small_fc", [param.detach().cpu() for param in params], "reference", opt.state_dict())
    exact, doubles = make("small_fc", [value.double() for value in values], "reference", state)
    step_on(exact, doubles)
    found, expected = step_on(other, copies), step_on(exact, doubles)
    for x, y in zip(found[0], expected[0], strict=True):
        assert float((x.double() - y).abs().max()) < 2e-6 * float(y.abs().max())


@every_rule
def test_extreme_values_stay_finite_and_near_the_reference(backend: Backend, name: str) -> None:
    """Gradients from subnormal to the largest, NaN and infinite; parameters that are zero or huge. One tensor rests."""
    shapes = ((7,), (6, 40), (40, 6), (4, 3, 3, 3), (5, 5))
    picks = torch.tensor([0.0, 1e-45, 1e-30, -1e-10, 1.0, -1e3, 1e10, 3e38, torch.nan, -torch.inf])
    generator = torch.Generator().manual_seed(3)
    results = []
    for impl, device in ((backend.name, backend.device), ("reference", None)):
        generator.manual_seed(3)
        values = random_params(shapes)
        values[0][2], values[1][0, 0], values[2][1] = 1e20, 0.0, 0.0
        values[4][1, 1] = torch.inf
        opt, params = make(name, values, impl, device=device)
        for _ in range(3):
            for param in params:
                grad = picks[torch.randint(len(picks), param.shape, generator=generator)]
                param.grad = grad.to(param.device)
            opt.step(loss=1.0)
        states = [{k: x.cpu() for k, x in opt.state[param].items()} for param in params]
        assert all(bool(x.isfinite().all()) for of_tensor in states for x in of_tensor.values())
        assert all(bool(param.isfinite().all()) for param in params[:4])
        assert torch.equal(params[4].detach().cpu(), values[4])
        fresh = opt._initial(params[4])
        assert all(torch.equal(x, fresh[name].cpu()) for name, x in states[4].items())
        control = opt.controls()
        assert bool(control[params[4]].step_size.isnan())
        results.append([[p.detach().cpu() for p in params], states, opt.nonfinite_gradients, opt.nonfinite_parameters])
    assert [int(x) for x in results[0][2:]] == [int(x) for x in results[1][2:]]
    assert int(results[0][3]) == 3
    bound = 1e-3 if name == "velo" else 1e-4  # its parameters have grown to 1e35
    for x, y in zip(results[0][0][:4], results[1][0][:4], strict=True):
        assert float((x - y).abs().max()) < bound * float(y.abs().max())


def test_a_step_is_at_most_eight_launches_whatever_the_model() -> None:
    """Counted in the simulator; without rows and columns, of which vectors have none, one less."""
    sim = kernels.module_of("sim")
    of_matrices = {"mlp_lopt": 6, "nn_adam": 3, "celo2": 8}
    of_vectors = {"nn_adam": 3}
    for name in RULES:
        for shapes in ((), (3, 2)):
            expected = of_matrices.get(name, 7) if shapes else of_vectors.get(name, 6)
            for count in (1, 30):
                opt, params = make(name, [torch.ones(shapes)] * count, "sim")
                set_grads(params, 0)
                before = sim.launches()
                opt.step(loss=1.0)
                assert sim.launches() - before == expected


def test_celo2_knows_the_matrices_of_a_tensor(backend: Backend) -> None:
    """Of embeddings and vectors none, of tensors that are stored ``[.., in, out]`` the last two dimensions.

    Without Newton-Schulz, which makes much of rounding where a singular value is small.
    """
    shapes = ((40, 6), (30,), (3, 20, 5), (2, 2, 70, 9), (20, 3, 5))
    group = {"role": ["input", None, None, None, None], "transposed": [False, False, True, True, False]}

    def step(impl: str, dtype: torch.dtype, device: torch.device | None = None) -> list[Tensor]:
        params = [Parameter(value.to(device, dtype)) for value in random_params(shapes)]
        theta = theta_of("celo2").with_spec(newton_schulz=0)
        opt = LearnedOptimizer([{"params": params, **group}], theta, impl=impl)
        assert opt.implementation == impl
        for number in range(2):
            set_grads(params, number)
            opt.step()
        return [param.detach() for param in params]

    exact, single = step("reference", torch.float64), step("reference", torch.float32)
    found = step(backend.name, torch.float32, backend.device)
    check_rule("params", error(found, exact), error(single, exact))


# ---- Steps in the backward pass -------------------------------------------------------------------------------------


def test_steps_in_the_backward_pass_are_the_usual_ones() -> None:
    """Bit for bit, also of a parameter without a gradient, in two groups, of which one moves half as far."""
    values = random_params(RANKS)

    def train(in_backward: bool) -> tuple[Any, list[bool]]:
        params = [Parameter(value.clone()) for value in values]
        groups = [{"params": params[:3]}, {"params": params[3:], "lr": 0.5}]
        opt = LearnedOptimizer(groups, theta_of("small_fc"), impl="cpu", weight_decay=0.1)
        handle = opt.step_in_backward() if in_backward else None
        for step in range(4):
            loss = torch.stack(
                [(param * (step + 1.0)).sin().sum() for i, param in enumerate(params) if (i, step) != (4, 2)]
            ).sum()
            if step != 1:
                opt.observe(train_loss=loss.detach())
            loss.backward()
            freed = [param.grad is None for param in params]
            opt.step()
            opt.zero_grad()
        if handle is not None:
            handle.remove()
        return snapshot(opt), freed

    usual, kept = train(False)
    swept, freed = train(True)
    assert_same_bits(usual, swept)
    assert not any(kept)
    assert all(freed)


# ---- How tensors lie ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if len(shape) >= 2])
def test_lines_are_the_two_largest_dimensions(shape: tuple[int, ...], transposed: bool) -> None:
    """Every element has the entries of row and column that the rule's means say, and every entry is in one piece."""
    kind = Kind(fan_in=shape[0]) if transposed else Kind()
    lines = Lines.of(shape, kind)
    order = tuple(range(len(shape))) if transposed else (*range(2, len(shape)), 1, 0)
    dims = parts.factored_dims([shape[dim] for dim in order])
    assert dims is not None
    second, largest = (order[dim] for dim in dims)
    assert (shape[second], shape[largest]) == tuple(sorted((lines.lines, lines.length)))
    square = torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    seen = square.reshape(lines[:5])
    row, column = (square.mean(dim=dim) for dim in (largest, second))
    along, across = (row, column) if lines.along_is_row else (column, row)
    assert torch.allclose(seen.mean(dim=3).reshape(-1), along.reshape(-1))
    assert torch.allclose(seen.mean(dim=1).reshape(-1), across.reshape(-1))
    (height, width), seen_at = lines.tile, torch.zeros(lines.outer * lines.lines, lines.size)
    for line, begin in lines.tiles().tolist():
        last = min(line + height, (line // lines.lines + 1) * lines.lines)
        seen_at[line:last, begin : begin + width] += 1
    assert bool((seen_at == 1).all())


# ---- What is refused, and what is left to the reference -------------------------------------------------------------


def test_what_has_no_kernels_is_left_to_the_reference() -> None:
    params = [Parameter(torch.ones(3, 2))]
    assert LearnedOptimizer(params, theta_of("small_fc")).implementation == "cpu"
    assert LearnedOptimizer([Parameter(torch.ones(3).double())], theta_of("small_fc")).implementation == "reference"
    for spec in (SmallFC(mlp_width=5), SmallFC(mlp_layers=1), MLPLOpt(mlp_width=16), Celo2(mlp_width=4)):
        theta = Theta.init(spec)
        assert LearnedOptimizer(params, theta).implementation == "reference"
        with pytest.raises(ValueError, match=r"impl='cpu': rule '.*' has no kernels for .*; use impl='auto'"):
            LearnedOptimizer(params, theta, impl="cpu")
    with pytest.raises(TypeError, match=r"expected float32, .* got torch\.float64; use impl='reference'"):
        LearnedOptimizer([Parameter(torch.ones(3).double())], theta_of("small_fc"), impl="cpu")


def test_operands_that_do_not_fit_are_named() -> None:
    rule, theta, device = SmallFC(), theta_of("small_fc"), torch.device("cpu")
    decays = [x.tolist() for x in rule.decays(theta.tensors)]
    plan = kernels.FactoredPlan("cpu", rule, decays, [(3, 2)], [Kind()], device)
    assert kernels.pack_factored(rule, theta.tensors).shape == plan.weights.shape[1:] == (sizes_of(rule).weights,)
    with pytest.raises(ValueError, match=r"mom\[0\]: expected 18 elements, got 12"):
        plan.hold(0, {"mom": torch.zeros(2, 6), "rms": torch.zeros(1, 6)})
    state = {"mom": torch.zeros(3, 6), "rms": torch.zeros(1, 6), "row": torch.zeros(3, 2), "column": torch.zeros(3, 3)}
    plan.hold(0, state)
    plan.select([0])
    with pytest.raises(ValueError, match=r"grads\[0\]: expected 6 elements, got 5"):
        plan.set_tensors([torch.zeros(3, 2)], [torch.zeros(5)])
