"""Directions of matrices as a whole: Newton-Schulz against singular values, the stage in a step, the gate when shut."""

import copy
import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import BF16, F16, F32, Backend
from optimizer_cases import (
    IMPLS,
    assert_same_bits,
    copies,
    make_grads,
    make_loss,
    make_params,
    make_theta,
    run,
    same_bits,
    set_grads,
    snapshot,
)
from torch import Tensor
from torch.nn import Parameter

from lopt import LearnedOptimizer, Theta, kernels
from lopt.kernels import directions
from lopt.kernels.directions import Directions
from lopt.rule import PRESETS, reference
from lopt.rule.constants import LARGEST_PARAM, LEAST_ROW, MAX_ASPECT, NEWTON_SCHULZ_1, NEWTON_SCHULZ_3, NEWTON_SCHULZ_5
from lopt.rule.inputs import Shapes
from lopt.rule.matrices import Kind, Matrix, matrices_of
from lopt.rule.orthogonal import newton_schulz, orthogonalise

F64 = torch.float64
SPECTRAL = PRESETS["spectral"]
every_impl = pytest.mark.parametrize("impl", IMPLS)

#: Most of them treated as a whole: two of one shape next to each other and apart, wide, tall, of two numbers in a row.
SHAPES = ((6, 5), (5,), (16, 4), (4, 16), (2, 3, 2, 2), (16, 4), (), (4, 16), (30, 20), (3, 2))
LONG = ((5, 6), (150, 130), (7,), (70, 130), (6, 6))  # two of more than one chunk, one larger than the CPU kernels do


@pytest.fixture(autouse=True)
def _one_thread(set_num_threads: Callable[[int], None]) -> None:
    set_num_threads(1)  # the tensors are tiny


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ---- Newton-Schulz ---------------------------------------------------------------------------------------------------


def polynomial(values: Tensor, iterations: int) -> Tensor:
    """What the iterations make of singular values."""
    for _ in range(iterations):
        values = NEWTON_SCHULZ_1 * values + NEWTON_SCHULZ_3 * values**3 + NEWTON_SCHULZ_5 * values**5
    return values


def even(x: Tensor, turned: bool = False) -> Tensor:
    """A matrix with its rows of one norm, but for those far below the others; ``turned``: its columns."""
    if turned:
        return even(x.mT).mT
    rows = x.square().sum(-1, keepdim=True).sqrt()
    typical = rows.square().mean(-2, keepdim=True).sqrt()
    return x / torch.maximum(rows, LEAST_ROW * typical).clamp(min=1e-300)


def by_singular_values(direction: Tensor, gate: Tensor, iterations: int, turned: bool = False) -> tuple[Tensor, Tensor]:
    """What ``orthogonalise`` is: between a direction and the same singular vectors with other values and even rows, of
    one size; what was zero is zero."""
    u, values, v = torch.linalg.svd(direction, full_matrices=False)
    norm = torch.linalg.vector_norm(values, dim=-1, keepdim=True)
    new = polynomial(values / norm, iterations)
    size = torch.linalg.vector_norm(new, dim=-1, keepdim=True)
    mixed = even(torch.where(direction == 0, 0.0, u @ torch.diag_embed(new) @ v), turned)
    mixed = mixed * (norm / torch.linalg.vector_norm(mixed, dim=(-2, -1))[..., None])[..., None]
    share = gate[..., None, None]
    return (1 - share) * direction + share * mixed, size[..., 0] ** 2 / values.shape[-1]


WHOLE = [(1, 1), (2, 2), (1, 7), (7, 1), (5, 5), (3, 40), (40, 3), (33, 129), (2, 4, 3), (2, 3, 3, 8)]


@pytest.mark.parametrize("iterations", [0, 1, 3, 5])
@pytest.mark.parametrize("shape", WHOLE)
def test_newton_schulz_is_a_polynomial_of_the_singular_values(shape: tuple[int, ...], iterations: int) -> None:
    x = normal(*shape)
    x = x / torch.linalg.matrix_norm(x, keepdim=True)
    u, values, v = torch.linalg.svd(x, full_matrices=False)
    expected = u @ torch.diag_embed(polynomial(values, iterations)) @ v
    torch.testing.assert_close(newton_schulz(x, iterations), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("shape", WHOLE)
def test_orthogonalise_against_the_singular_value_decomposition(shape: tuple[int, ...], turned: bool) -> None:
    direction, gates = (
        3e-4 * normal(*shape),
        torch.rand(shape[:-2], generator=torch.Generator().manual_seed(1)).double(),
    )
    for gate in (torch.zeros_like(gates), gates, torch.ones_like(gates)):
        new, rank = orthogonalise(direction, gate, 3, turned=turned)
        expected, expected_rank = by_singular_values(direction, gate, 3, turned)
        torch.testing.assert_close(new, expected, rtol=0, atol=1e-15)
        torch.testing.assert_close(rank, expected_rank, rtol=1e-12, atol=0)
    torch.testing.assert_close(new.square().mean((-2, -1)), direction.square().mean((-2, -1)), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 0.03)])
def test_products_of_less_precision(dtype: torch.dtype, tolerance: float) -> None:
    """The largest error as a share of the largest element; the size is kept whatever the products are computed in."""
    direction, gate = normal(3, 48, 80), torch.tensor([1.0, 0.5, 0.0]).double()
    expected, expected_rank = by_singular_values(direction, gate, 3)
    new, rank = orthogonalise(direction.float(), gate.float(), 3, dtype)
    assert float((new - expected).abs().max()) <= tolerance * float(expected.abs().max())
    torch.testing.assert_close(rank.double(), expected_rank, rtol=tolerance, atol=0)
    torch.testing.assert_close(new[0].norm().double(), direction[0].norm(), rtol=1e-6, atol=0)
    assert same_bits(new[2], direction[2].float())


def test_singular_values_of_one_size_stay() -> None:
    """Orthogonal rows and columns, and partial isometries: the direction is what it was, but for even rows."""
    q = torch.linalg.qr(normal(8, 8)).Q
    for direction, rank in ((q, 8), (q[:5], 5), (q[:, :3], 3), (q[:, :2] @ q[:, 5:7].T, 2), (q[:, :1] @ q[:1], 1)):
        for gate in (0.0, 0.4, 1.0):
            new, found = orthogonalise(7.0 * direction, torch.tensor(gate, dtype=F64), 3)
            evened = even(direction) * (direction.norm() / even(direction).norm())
            torch.testing.assert_close(new, 7.0 * torch.lerp(direction, evened, gate), rtol=0, atol=1e-13)
            value = float(polynomial(torch.tensor(1 / math.sqrt(rank), dtype=F64), 3))
            assert float(found) == pytest.approx(rank * value**2 / min(direction.shape), rel=1e-12)


def test_a_direction_of_deficient_rank() -> None:
    """Its null space stays null: only singular values that were there are brought towards one size."""
    direction = normal(12, 2, seed=1) @ torch.diag(torch.tensor([1.0, 0.05], dtype=F64)) @ normal(2, 9, seed=2)
    new, rank = orthogonalise(direction, torch.tensor(1.0, dtype=F64), 3)
    expected, expected_rank = by_singular_values(direction, torch.tensor(1.0, dtype=F64), 3)
    torch.testing.assert_close(new, expected, rtol=0, atol=1e-12)
    assert float(rank) == pytest.approx(float(expected_rank), rel=1e-12)
    values = torch.linalg.svdvals(new)
    assert float(values[2:].max()) < 1e-12
    before = torch.linalg.svdvals(direction)
    assert float(values[1] / values[0]) > 5 * float(before[1] / before[0])


def test_zero_and_one_of_many() -> None:
    """A direction of zeros stays zero, of rank 0, and those beside it are as if alone."""
    direction = normal(3, 4, 6).float()
    direction[1] = 0.0
    new, rank = orthogonalise(direction, torch.ones(3), 3)
    assert not new[1].any()
    assert float(rank[1]) == 0.0
    for i in (0, 2):
        alone, rank_alone = orthogonalise(direction[i], torch.tensor(1.0), 3)
        torch.testing.assert_close(new[i], alone, rtol=0, atol=1e-5)
        torch.testing.assert_close(rank[i], rank_alone, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_vector_keeps_its_direction(dtype: torch.dtype) -> None:
    """1 x n and n x 1 have one singular value; of one row, or of one column that is an output's."""
    for shape in ((1, 9), (9, 1)):
        direction = normal(*shape, dtype=dtype)
        new, _ = orthogonalise(direction, torch.tensor(1.0, dtype=dtype), 3, turned=shape[1] == 1)
        torch.testing.assert_close(new, direction, rtol=1e-5, atol=0)


def test_outputs_move_alike() -> None:
    """Rows of one norm however unlike they were, but for those that hardly move: these stay below the others."""
    direction = normal(20, 6) * torch.linspace(1.0, 30.0, 20, dtype=F64)[:, None]
    new, _ = orthogonalise(direction, torch.tensor(1.0, dtype=F64), 3)
    rows = new.norm(dim=1)
    torch.testing.assert_close(rows[5:], torch.full_like(rows[5:], float(rows[-1])), rtol=1e-12, atol=0)
    still, _ = orthogonalise(torch.cat([direction, 1e-9 * direction[:1]]), torch.tensor(1.0, dtype=F64), 3)
    assert float(still[-1].norm()) < 1e-6 * float(rows[-1])
    turned, _ = orthogonalise(direction.mT, torch.tensor(1.0, dtype=F64), 3, turned=True)
    torch.testing.assert_close(turned.mT, new, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (33, 129)])
@pytest.mark.parametrize("turned", [False, True])
def test_what_rests_stays(shape: tuple[int, int], turned: bool) -> None:
    """Entries that are zero, of a mask or of an output or input without gradient, stay and do not count in the size."""
    direction = normal(*shape).tril()
    direction[2], direction[:, 3] = 0.0, 0.0
    new, rank = orthogonalise(direction, torch.tensor(0.75, dtype=F64), 3, turned=turned)
    expected, expected_rank = by_singular_values(direction, torch.tensor(0.75, dtype=F64), 3, turned)
    torch.testing.assert_close(new, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(rank, expected_rank)
    assert torch.equal(new == 0, direction == 0)
    whole, _ = orthogonalise(direction, torch.tensor(1.0, dtype=F64), 3, turned=turned)
    torch.testing.assert_close(whole.norm(), direction.norm())


@every_impl
def test_masked_weights_do_not_move(impl: str) -> None:
    """Not one bit, of matrices that torch orthogonalises and of those that the kernels do, whose gates are open."""
    params = make_params([(70, 130), (12, 10), (10, 12), (5,)])
    start = copies(params)
    opt = LearnedOptimizer(params, spectral(gate=1.0), impl=impl)
    for step in range(4):
        grads = make_grads(params, step)
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.tril() if grad.ndim == 2 else grad
        opt.step(loss=make_loss(step))
    for param, before in zip(params[:3], start[:3], strict=True):
        mask = torch.ones_like(param).tril() == 0
        assert torch.equal(param[mask], before[mask])
        assert not torch.isclose(param[~mask], before[~mask], rtol=0, atol=1e-7).all()


numbers = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(
    values=st.lists(
        numbers | st.sampled_from([0.0, 1e-45, 1e-30, 1e-20, 1e18, 2e19, 3.3e38]), min_size=12, max_size=12
    ),
    gate=st.floats(0.0, 1.0, width=32),
    scale=st.sampled_from([1.0, 1e-30, 1e-10]),
)
def test_any_direction_whatever_its_size(values: list[float], gate: float, scale: float) -> None:
    """Where nothing over- or underflows, as in float64; else what is written is finite or not written at all."""
    direction = torch.tensor(values).clamp(-LARGEST_PARAM, LARGEST_PARAM).reshape(3, 4) * scale
    new, rank = orthogonalise(direction, torch.tensor(gate), 3)
    written = reference.write(torch.ones(12), new.reshape(-1), torch.tensor(0.01), torch.tensor(1.0))
    assert bool(torch.isfinite(written).all())
    largest = float(direction.abs().max())
    if 1e-15 < largest < 1e18:
        exact, exact_rank = orthogonalise(direction.double(), torch.tensor(gate).double(), 3)
        assert float((new - exact).abs().max()) <= 1e-5 * float(exact.abs().max())
        assert float(rank) == pytest.approx(float(exact_rank), rel=1e-4)


# ---- Memory and batches ----------------------------------------------------------------------------------------------


def matrices_like(shapes: Sequence[tuple[int, ...]]) -> list[Matrix]:
    """Hidden matrices, of which the first, and every fifth after it, is stored as [in, out]."""
    return matrices_of(shapes, [Kind("hidden", shape[0] if i % 5 == 0 else None) for i, shape in enumerate(shapes)])


def held(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype = F32, seed: int = 0) -> tuple[Directions, list[Tensor]]:
    """Memory for the directions of matrices of these shapes, with random numbers in it; and views of these."""
    matrices = matrices_like(shapes)
    memory = Directions(matrices, 3, dtype, torch.device("cpu"), exact=True)
    start = memory.memory.data_ptr()
    views = []
    for matrix, address in zip(matrices, memory.addresses, strict=True):
        assert (address != 0) == matrix.whole
        if matrix.whole:
            offset = (address - start) // memory.memory.element_size()
            views.append(
                memory.memory[offset : offset + matrix.rows * matrix.columns].view(matrix.rows, matrix.columns)
            )
    for i, view in enumerate(views):
        view.copy_(normal(*view.shape, seed=seed + i))
    return memory, views


BATCHED = ((6, 5), (16, 4), (6, 5), (1, 6), (5, 6), (6, 5), (4, 4, 4), (6, 5), (7, 3))


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_places_in_memory_are_apart_and_aligned(dtype: torch.dtype) -> None:
    """Kernels load 16 bytes at a time."""
    memory, views = held(BATCHED, dtype)
    addresses = [address for address in memory.addresses if address]
    assert all(address % 16 == 0 for address in addresses)
    ends = [view.data_ptr() + view.numel() * view.element_size() for view in views]
    order = sorted(range(len(views)), key=lambda i: addresses[i])
    assert all(ends[a] <= addresses[b] for a, b in itertools.pairwise(order))
    assert max(ends) <= memory.memory.data_ptr() + memory.memory.numel() * memory.memory.element_size()


@pytest.mark.parametrize("at_once", [1, 60, 1 << 26])
@pytest.mark.parametrize("selected", [range(9), [0, 5], [2, 5, 7], [0, 2, 7, 8], [5], [3], []])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_batches_are_their_matrices_one_by_one(
    dtype: torch.dtype, selected: Sequence[int], at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For any selection and number at once; what is not selected stays to the bit."""
    monkeypatch.setattr(directions, "AT_ONCE", at_once)
    memory, views = held(BATCHED, dtype)
    before = [view.clone() for view in views]
    rows = [row for row, address in enumerate(memory.addresses) if address]
    gate = torch.linspace(0.0, 1.0, len(BATCHED))
    rank, step_size = torch.full((len(BATCHED),), 7.0), torch.ones(len(BATCHED))
    step_size[5] = math.nan  # a tensor that rests keeps its rank, as one whose gate is shut
    memory.select(selected)
    memory.orthogonalise(gate, rank, step_size)
    for row, view, old in zip(rows, views, before, strict=True):
        if row not in selected:
            assert same_bits(view, old)
            assert float(rank[row]) == 7.0
            continue
        turned = matrices_like(BATCHED)[row].turned
        new, expected = orthogonalise(old.double(), gate[row].double(), 3, turned=turned)
        tolerance = 2e-6 if dtype == F32 else 2.0**-8
        assert float((view.double() - new).abs().max()) <= tolerance * float(new.abs().max())
        assert float(rank[row]) == pytest.approx(7.0 if row in (0, 5) else float(expected), rel=1e-5)
    assert float(rank[3]) == 7.0  # one row only: not treated


@pytest.mark.parametrize("size", [1e-40, 2.6e-23, 1.0, 1e15, 1e30])
def test_squares_that_float32_does_not_hold(size: float) -> None:
    """A direction of any size is treated as one of size 1, of which it is a multiple."""
    memory, views = held(((64, 64), (64, 64)))
    views[0].copy_(size * views[1])
    like = (views[0].double() / size).clone()
    rank = torch.full((2,), 7.0)
    memory.orthogonalise(torch.ones(2), rank, torch.ones(2))
    new, expected = orthogonalise(like, torch.tensor(1.0, dtype=F64), 3)
    assert float((views[0].double() / size - new).abs().max()) <= 1e-4 * float(new.abs().max())
    assert float(rank[0]) == pytest.approx(float(expected), rel=1e-4)


# ---- A step ----------------------------------------------------------------------------------------------------------


def spectral(**gate: float) -> Theta:
    """Random meta-parameters; with ``gate=...`` it has this value for all tensors, and adds nothing to the step."""
    theta = make_theta("spectral")
    if gate:
        tensors = {**theta.tensors, "gate.w": torch.zeros_like(theta.tensors["gate.w"])}
        tensors |= {"gate.b": torch.tensor(gate["gate"] - 0.5), "gate.step": torch.tensor(0.0)}
        theta = Theta(theta.spec, tensors, theta.provenance)
    return theta


def without_stage(theta: Theta) -> Theta:
    """The same theta in a spec that has no direction stage."""
    spec = dataclasses.replace(theta.spec, newton_schulz=0)
    return Theta(spec, {name: theta.tensors[name] for name in spec.shapes()})


def blind_to_rank(theta: Theta) -> Theta:
    """The rank of directions, which only the stage knows, counts in nothing."""
    spec, tensors = theta.spec, {name: value.clone() for name, value in theta.tensors.items()}
    index = spec.lstm_index("rank")
    tensors["lstm.w"][index] = 0.0
    tensors["step.w"][spec.lstm_width + index] = 0.0
    return Theta(spec, tensors, theta.provenance)


class Exact:
    """The reference in float64, of tensors of which more may be known than their shapes."""

    def __init__(self, theta: Theta, params: Sequence[Tensor], kinds: Sequence[Kind] | None = None) -> None:
        self.spec, self.weights = theta.spec, theta.to(dtype=F64).tensors
        self.params = [param.detach().double() for param in params]
        self.state = reference.init_state(self.spec, self.weights, self.params)
        self.shapes = Shapes.of(self.spec, [tuple(p.shape) for p in params], self.weights["initial_h"], kinds)
        self.before: Tensor | None = None
        if self.spec.stats == "lagged":
            self.before = torch.zeros(len(params), self.spec.features.num_stats, dtype=F64)

    def step(self, grads: Sequence[Tensor], loss: float, **options: Any) -> None:
        self.params, self.state, self.trace = reference.update(
            self.spec,
            self.weights,
            self.state,
            self.params,
            [grad.double() for grad in grads],
            torch.tensor(loss, dtype=F64),
            before=self.before,
            shapes=self.shapes,
            **options,
        )
        self.before = self.trace["kept"] if self.before is not None else None

    def assert_close(self, params: Sequence[Tensor], start: Sequence[Tensor], tolerance: float) -> None:
        """Errors within ``tolerance`` of the largest update of any tensor."""
        pairs = zip(self.params, start, strict=True)
        moved = max(float((x - y.detach().double()).abs().max()) for x, y in pairs)
        for i, (param, x) in enumerate(zip(params, self.params, strict=True)):
            error = float((param.detach().cpu().double() - x).abs().max())
            assert error <= tolerance * moved, f"tensor {i}: {error / moved:.1e} of the largest update"


def test_a_step_by_hand() -> None:
    """Of every tensor: elementwise direction, singular values, gate, size of the step, decay."""
    theta = spectral().to(dtype=F64)
    spec, weights = theta.spec, theta.tensors
    params = [param.detach().double() for param in make_params(SHAPES)]
    kinds = [Kind() for _ in SHAPES]
    kinds[7] = Kind("output")
    shapes = Shapes.of(spec, SHAPES, weights["initial_h"], kinds)
    state = reference.init_state(spec, weights, params)
    seen = []
    for step in range(3):
        before = state.rows
        update = reference.update(
            spec, weights, state, params, [g.double() for g in make_grads(params, step)], torch.tensor(1.0, dtype=F64),
            lr=0.5, weight_decay=0.3, shapes=shapes,
        )  # fmt: skip
        x, conditioning = update.trace["lstm_input"], update.trace["conditioning"]
        controlled = torch.cat([update.state.rows.h, x], dim=1)
        whole = torch.tensor([t in (0, 2, 3, 4, 5, 8, 9) for t in range(len(SHAPES))])
        gate = torch.where(whole, (0.5 + controlled @ weights["gate.w"] + weights["gate.b"]).clamp(0, 1), 0.0)
        torch.testing.assert_close(conditioning.gate, gate, rtol=0, atol=1e-14)
        log_step = controlled @ weights["step.w"] + weights["step.b"] + weights["gate.step"] * gate
        fans = {0: 5, 2: 4, 3: 16, 4: 12, 5: 4, 7: 16, 8: 20, 9: 2}
        mean = math.exp(-0.5 * sum(math.log(fan) for fan in fans.values()) / len(fans))
        size = [1 / math.sqrt(fans[t]) if t in fans else mean for t in range(len(SHAPES))]
        expected = 0.5 * spec.step_multiplier * (step + 1) / 10 * torch.tensor(size, dtype=F64) * log_step.exp()
        torch.testing.assert_close(update.trace["step_size"], expected, rtol=1e-12, atol=0)
        for t, (param, output) in enumerate(zip(params, update.trace["mlp_output"], strict=True)):
            columns = update.trace["mlp_input"][t][:, : len(spec.features.columns)]
            direction = output[:, 0] + columns @ weights["skip"]
            direction = direction * torch.exp(spec.magnitude_rate * output[:, 1])
            rank = before.rank[t]
            if bool(whole[t]):
                matrix = direction.reshape(SHAPES[t][0], -1)
                matrix, rank = by_singular_values(matrix, gate[t], 3)
                direction = matrix.reshape(-1)
            new = param.reshape(-1) * (1 - 0.3 * expected[t]) - expected[t] * direction
            torch.testing.assert_close(update.params[t].reshape(-1), new, rtol=0, atol=1e-13)
            torch.testing.assert_close(update.state.rows.rank[t], rank, rtol=1e-11, atol=0)
        params, state = update.params, update.state
        seen.append(gate)
    assert float(torch.stack(seen).std()) > 0.01  # it does depend on something


CASES: list[Any] = [
    (None, "current", SHAPES, 30),
    (1.0, "current", SHAPES, 30),
    (None, "lagged", SHAPES, 30),
    (1.0, "current", LONG, 3),
    (0.5, "lagged", LONG, 3),
]


@pytest.mark.parametrize(("gate", "stats", "shapes", "steps"), CASES)
def test_steps_agree_with_the_float64_reference(
    backend: Backend, gate: float | None, stats: Literal["current", "lagged"], shapes: Any, steps: int
) -> None:
    """With decay and rates that change; errors within 2e-4 of the largest update."""
    theta = (spectral() if gate is None else spectral(gate=gate)).with_spec(stats=stats)
    start = make_params(shapes)
    params = [Parameter(param.detach().to(backend.device, copy=True)) for param in start]
    opt = LearnedOptimizer(params, theta, impl=backend.name, weight_decay=0.1, total_steps=30)
    exact = Exact(theta, start)
    for step in range(steps):
        opt.param_groups[0]["lr"] = 1.0 if step % 7 else 0.25
        set_grads(params, step)
        opt.step(loss=make_loss(step))
        exact.step(
            make_grads(start, step), make_loss(step), lr=opt.param_groups[0]["lr"], weight_decay=0.1, total_steps=30.0
        )
    exact.assert_close(params, start, 2e-4)
    ranks = torch.stack([opt.state[param]["lstm"]["rank"].cpu() for param in params])
    torch.testing.assert_close(ranks.double(), exact.state.rows.rank, rtol=1e-3, atol=0)


@every_impl
@pytest.mark.parametrize("param_dtype", [F32, BF16, F16])
def test_a_bfloat16_state_is_near_a_float32_one(impl: str, param_dtype: torch.dtype) -> None:
    """Directions are kept in the dtype of the state."""
    results = []
    for dtype in (F32, BF16):
        params = [Parameter(param.detach().to(param_dtype)) for param in make_params(SHAPES)]
        start = [param.detach().double() for param in params]
        opt = LearnedOptimizer(params, spectral(gate=1.0), impl=impl, state_dtype=dtype)
        run(opt, params, 10)
        results.append(torch.cat([(p.detach().double() - s).reshape(-1) for p, s in zip(params, start, strict=True)]))
        if impl != "reference":
            assert opt._stepper.plan.directions.memory.dtype == dtype  # type: ignore[union-attr]
    found, expected = results[1], results[0]
    assert float((found - expected).norm()) <= (0.03 if param_dtype == F32 else 0.06) * float(expected.norm())


@every_impl
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_parameters_in_16_bits_are_written_as_rounded_float32(impl: str, dtype: torch.dtype) -> None:
    """Each step from the same start, to the bit."""
    halves = [Parameter(param.detach().to(dtype)) for param in make_params(SHAPES)]
    singles = [Parameter(param.detach().float()) for param in halves]
    opt, other = (LearnedOptimizer(params, spectral(gate=1.0), impl=impl) for params in (halves, singles))
    for step in range(6):
        for half, single, grad in zip(halves, singles, make_grads(halves, step), strict=True):
            single.data, half.grad, single.grad = half.detach().float(), grad.to(dtype), grad.to(dtype).float()
        opt.step(loss=make_loss(step))
        other.step(loss=make_loss(step))
        assert_same_bits([half.detach() for half in halves], [single.detach().to(dtype) for single in singles])
    assert sum(float(opt.state[param]["lstm"]["rank"]) != 1.0 for param in halves) >= 2  # they were treated as wholes


@pytest.mark.parametrize(
    ("stats", "decay", "dtype"),
    [("current", 0.0, F32), ("lagged", 0.2, F32), ("current", 0.2, BF16), ("lagged", 0.0, BF16)],
)
def test_shut_it_is_not_there(
    backend: Backend, stats: Literal["current", "lagged"], decay: float, dtype: torch.dtype
) -> None:
    """Bits of parameters and state on the same kernels; also the rank stays."""
    theta = blind_to_rank(spectral(gate=-5.0)).with_spec(stats=stats)
    results = []
    for each in (theta, without_stage(theta)):
        params = [Parameter(param.detach().to(backend.device, copy=True)) for param in make_params(SHAPES)]
        opt = LearnedOptimizer(params, each, impl=backend.name, weight_decay=decay, state_dtype=dtype)
        run(opt, params, 12)
        states = [{**opt.state[param], "lstm": {**opt.state[param]["lstm"]}} for param in params]
        ranks = [float(state["lstm"].pop("rank")) for state in states]  # type: ignore[attr-defined]
        shared = {name: opt.param_groups[0][name] for name in ("step", "train_loss", "clip", "from_lstm")}
        results.append((copy.deepcopy([p.detach() for p in params]), copy.deepcopy(states), shared, ranks))
    (params, states, shared, ranks), (other_params, other_states, other_shared, other_ranks) = results
    if backend.name == "cuda":  # fused otherwise
        torch.testing.assert_close(params, other_params, rtol=1e-5, atol=1e-6)
        return
    assert_same_bits(params, other_params)
    assert_same_bits(states, other_states)
    assert_same_bits(shared, other_shared)
    assert ranks == other_ranks == [1.0] * len(SHAPES)


def test_shut_in_the_reference_it_is_not_there() -> None:
    theta = blind_to_rank(spectral(gate=-5.0))
    results = []
    for each in (theta, without_stage(theta)):
        exact = Exact(each, make_params(SHAPES))
        for step in range(5):
            exact.step(make_grads(exact.params, step), make_loss(step))
        results.append([*exact.params, *exact.state.mom, exact.state.rows.h])
    assert_same_bits(results[0], results[1])


def test_open_it_makes_a_difference(backend: Backend) -> None:
    """To every matrix that is treated as a whole and to no other tensor, in a first step."""
    results = []
    for gate in (0.0, 1.0):
        params = [Parameter(param.detach().to(backend.device, copy=True)) for param in make_params(SHAPES)]
        run(LearnedOptimizer(params, spectral(gate=gate), impl=backend.name), params, 1)
        results.append([param.detach().cpu() for param in params])
    differ = [not torch.equal(x, y) for x, y in zip(*results, strict=True)]
    assert differ == [matrix.whole for matrix in matrices_of(SHAPES)]
    assert sum(differ) == 8


@pytest.mark.parametrize("stats", ["current", "lagged"])
def test_lr_0_changes_no_bit(backend: Backend, stats: Literal["current", "lagged"]) -> None:
    params = [Parameter(param.detach().to(backend.device, copy=True)) for param in make_params(SHAPES)]
    with torch.no_grad():
        params[0][0] = torch.tensor([0.0, -0.0, 1e-45, -1e-40, 3e38])
    start = [param.detach().clone() for param in params]
    opt = LearnedOptimizer(params, spectral().with_spec(stats=stats), impl=backend.name, lr=0.0, weight_decay=0.5)
    run(opt, params, 4)
    assert_same_bits([param.detach() for param in params], start)
    assert float(opt.state[params[8]]["mom"].abs().max()) > 0.0


ACTIVE = (range(10), (0, 2), (2, 3, 5, 7), (5, 8), (1,), range(10), (3, 5, 7), (2, 7, 9))


@every_impl
@pytest.mark.parametrize("stats", ["current", "lagged"])
def test_gradients_that_come_and_go(impl: str, stats: Literal["current", "lagged"]) -> None:
    """Selections of matrices of one shape, next to each other and apart: steps of the float64 reference for each."""
    theta = spectral().with_spec(stats=stats)
    params = make_params(SHAPES)
    start = copies(params)
    opt = LearnedOptimizer(params, theta, impl=impl)
    exact = Exact(theta, start)
    every = exact.shapes
    for step, active in enumerate(ACTIVE * 3):
        grads = make_grads(params, step)
        for i, param in enumerate(params):
            param.grad = grads[i] if i in active else None
        opt.step(loss=make_loss(step))
        index, state, values = torch.tensor(list(active)), exact.state, exact.params
        rows = type(state.rows)(*(value[index] for value in state.rows))
        exact.state = reference.State(
            state.globals, rows, [state.mom[i] for i in active], [state.rms[i] for i in active]
        )
        exact.params, exact.shapes = [values[i] for i in active], every.of_rows(list(active))
        before = exact.before
        exact.before = None if before is None else before[index]
        exact.step([grads[i] for i in active], make_loss(step))
        for old, new in zip(state.rows, exact.state.rows, strict=True):
            old.index_copy_(0, index, new)
        if before is not None:
            assert exact.before is not None
            exact.before = before.index_copy(0, index, exact.before)
        for k, i in enumerate(active):
            values[i], state.mom[i], state.rms[i] = exact.params[k], exact.state.mom[k], exact.state.rms[k]
        exact.params, exact.state = values, state._replace(globals=exact.state.globals)
    exact.assert_close(params, start, 1e-4)


@pytest.mark.parametrize("impl", ["cpu", "sim"])
def test_parameters_that_are_not_contiguous(impl: str) -> None:
    """Bits of contiguous ones: what the layout of the memory is does not count."""
    params = make_params(((6, 5), (8, 3, 2, 2), (4, 6), (6, 4)))
    others = [
        Parameter(params[0].detach().T.contiguous().T),
        Parameter(params[1].detach().contiguous(memory_format=torch.channels_last)),
        Parameter(torch.stack([params[2].detach()] * 2, dim=-1)[..., 1]),
        Parameter(params[3].detach().clone()),
    ]
    assert not any(other.is_contiguous() for other in others[:3])
    for these in (params, others):
        run(LearnedOptimizer(these, spectral(gate=0.7), impl=impl), these, 5)
    assert_same_bits([param.detach().contiguous() for param in others], [param.detach() for param in params])


@every_impl
def test_what_groups_say(impl: str) -> None:
    """``role`` and ``transposed``, for a group or for each parameter, are those of the reference."""
    params = make_params(SHAPES)
    start = copies(params)
    groups: list[dict[str, Any]] = [
        {"params": params[:3], "role": ["hidden", None, "input"], "lr": 0.5},
        {"params": params[3:6], "transposed": True, "role": "hidden", "weight_decay": 0.1},
        {"params": params[6:], "transposed": [False, True, False, False]},
    ]
    opt = LearnedOptimizer(groups, spectral(), impl=impl)
    kinds = [Kind("hidden"), Kind(), Kind("input"), Kind("hidden", 4), Kind("hidden"), Kind("hidden", 16)]
    exact = Exact(spectral(), start, [*kinds, Kind(), Kind(None, 4), Kind(), Kind()])
    lr, decay = [0.5] * 3 + [1.0] * 7, [0.0] * 3 + [0.1] * 3 + [0.0] * 4
    for step in range(8):
        set_grads(params, step)
        opt.step(loss=make_loss(step))
        options = {"lr": torch.tensor(lr, dtype=F64), "weight_decay": torch.tensor(decay, dtype=F64)}
        exact.step(make_grads(start, step), make_loss(step), **options)
    exact.assert_close(params, start, 1e-4)
    opt.param_groups[0]["role"] = "output"  # no state depends on it: it may change
    exact.shapes = Shapes.of(
        exact.spec,
        SHAPES,
        exact.weights["initial_h"],
        [Kind("output"), Kind("output"), Kind("output"), *kinds[3:], Kind(), Kind(None, 4), Kind(), Kind()],
    )
    for step in range(8, 12):
        set_grads(params, step)
        opt.step(loss=make_loss(step))
        exact.step(make_grads(start, step), make_loss(step), **options)
    exact.assert_close(params, start, 1e-4)


@every_impl
def test_resume_in_mid_run_is_never_having_stopped(impl: str) -> None:
    """Bits, of a state with ranks, after steps in which only some matrices had gradients, by another optimizer."""
    for stats, dtype in (("current", F32), ("lagged", F32), ("current", BF16)):
        theta = spectral().with_spec(stats=stats)
        params = make_params(SHAPES)
        opt = LearnedOptimizer(params, theta, impl=impl, state_dtype=dtype)
        run(opt, params, 2)
        for param in params[2:6]:
            param.grad = None
        opt.step(loss=0.3)
        others = copies(params)
        other = LearnedOptimizer(others, theta, impl=impl, state_dtype=dtype)
        other.load_state_dict(copy.deepcopy(opt.state_dict()))
        for these, optimizer in ((params, opt), (others, other)):
            run(optimizer, these, 3, first=3)
        assert_same_bits(snapshot(other), snapshot(opt))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite(backend: Backend, bad: float) -> None:
    """In gradients it is clipped, or counts as none; a matrix with such a parameter rests, rank and all."""
    params = [Parameter(param.detach().to(backend.device, copy=True)) for param in make_params(SHAPES)]
    with torch.no_grad():
        params[2][1, 1] = bad
    first = params[2].detach().clone()
    opt = LearnedOptimizer(params, spectral(gate=1.0), impl=backend.name)
    for step in range(4):
        set_grads(params, step)
        assert params[0].grad is not None
        params[0].grad[0, 0] = bad
        opt.step(loss=make_loss(step))
    assert_same_bits(params[2].detach(), first)
    assert float(opt.state[params[2]]["lstm"]["rank"]) == 1.0
    for i, param in enumerate(params):
        if i != 2:
            assert bool(torch.isfinite(param).all()), i
        for name, value in opt.state[param]["lstm"].items():
            assert bool(torch.isfinite(value).all()), (i, name)
    assert float(opt.state[params[0]]["lstm"]["rank"]) != 1.0


@every_impl
def test_long_matrices_are_left_as_they_are(impl: str) -> None:
    """Up to MAX_ASPECT times as long as short; beyond, and for one row or column, the gate is nothing."""
    limit = int(MAX_ASPECT)
    shapes = ((2, 2 * limit), (2, 2 * limit + 1), (2 * limit, 2), (2 * limit + 1, 2), (1, 5), (5, 1), (3, 3))
    results = []
    for gate in (0.0, 1.0):
        params = make_params(shapes)
        run(LearnedOptimizer(params, spectral(gate=gate), impl=impl), params, 1)
        results.append([param.detach() for param in params])
    differ = [not torch.equal(x, y) for x, y in zip(*results, strict=True)]
    assert differ == [True, False, True, False, False, False, True]


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_same_bits_for_any_number_of_threads(set_num_threads: Callable[[int], None], dtype: torch.dtype) -> None:
    """Of what the CPU kernels orthogonalise; torch's products may add up in another order."""
    small, large = ((128, 100), (100, 128), (9, 5), (128, 100), (64,), (128, 300)), ((150, 129), (129, 150))
    for shapes in (small, large):
        results = []
        for threads in (1, 2, 3):
            set_num_threads(threads)
            params = make_params(shapes)
            run(LearnedOptimizer(params, spectral(gate=0.8), impl="cpu", state_dtype=dtype), params, 3)
            results.append([param.detach() for param in params])
        for other in results[1:]:
            if shapes is small:
                assert_same_bits(other, results[0])
            tolerance = 1e-6 if dtype == F32 else 1e-3
            torch.testing.assert_close(other, results[0], rtol=10 * tolerance, atol=tolerance)


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_gates_shut_and_open_of_matrices_large_and_small(backend: Backend, first: int, dtype: torch.dtype) -> None:
    """Each parameter is written once, whoever orthogonalises: of the first and the last matrix the gate is shut."""
    theta = spectral(gate=1.0).with_spec(step_multiplier=0.2)  # so that rounding of the parameters is small beside it
    for name in ("is_input", "is_output"):
        theta.tensors["gate.w"][theta.spec.lstm_width + theta.spec.lstm_index(name)] = -2.0
    shapes = [((130, 129), (5,), (128, 128), (129, 131), (7, 6), (6, 7)), ((6, 7), (130, 129), (7, 6), (129, 200))][
        first
    ]
    start = make_params(shapes)
    params = [Parameter(param.detach().to(backend.device, copy=True)) for param in start]
    opt = LearnedOptimizer(params, theta, impl=backend.name, state_dtype=dtype, weight_decay=0.2)
    exact = Exact(theta, start)
    for step in range(2):
        set_grads(params, step)
        opt.step(loss=make_loss(step))
        exact.step(make_grads(start, step), make_loss(step), weight_decay=0.2)
    gate = exact.trace["conditioning"].gate
    assert gate.tolist() == [0.0, *([0.0, 1.0, 1.0, 1.0] if first == 0 else [1.0, 1.0]), 0.0]
    exact.assert_close(params, start, 1e-4 if dtype == F32 else 0.03)
    ranks = torch.stack([opt.state[param]["lstm"]["rank"].cpu() for param in params]).double()
    torch.testing.assert_close(ranks, exact.state.rows.rank, rtol=1e-3 if dtype == F32 else 0.03, atol=0)
    assert (ranks == 1.0).tolist() == (gate == 0.0).tolist()


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("exact", [False, True])
def test_products_of_large_matrices(quick: bool, exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16 where that is quicker and nobody asked for exact ones, from a shorter side of 256 on."""
    monkeypatch.setattr(directions, "quick_bfloat16", lambda device: quick)
    shapes = ((256, 260), (255, 260))
    memory = Directions(matrices_of(shapes, [Kind("hidden")] * 2), 3, F32, torch.device("cpu"), exact)
    (_, first, _, _), (_, second, _, _) = memory.batches
    for view in (first, second):
        view.copy_(normal(*view.shape))
    expected = [orthogonalise(view.double(), torch.ones(1, dtype=F64), 3)[0] for view in (first, second)]
    memory.orthogonalise(torch.ones(2), torch.ones(2), torch.ones(2))
    for view, x, coarse in zip((first, second), expected, (quick and not exact, False), strict=True):
        error = float((view.double() - x).norm() / x.norm())
        assert (1e-4 < error < 0.03) if coarse else error < 1e-5
        assert float(view.norm()) == pytest.approx(float(x.norm()), rel=1e-5)


@pytest.mark.parametrize("number", [3, 40])
def test_operations_whatever_the_number_of_matrices(number: int) -> None:
    """One launch more, that writes; the products of matrices of one shape are batched."""
    params = make_params([(6, 5)] * number)
    opt = LearnedOptimizer(params, spectral(), impl="sim")
    run(opt, params, 1)
    before = kernels.module_of("sim").launches()
    run(opt, params, 1, first=1)
    assert kernels.module_of("sim").launches() - before == 6
    assert opt._stepper is not None
    assert len(opt._stepper.plan.directions.batches) == 1  # type: ignore[union-attr]


def test_without_matrices_there_is_no_stage() -> None:
    params = make_params([(5,), (), (1, 4)])
    opt = LearnedOptimizer(params, spectral(), impl="cpu")
    run(opt, params, 1)
    assert opt._stepper is not None
    assert opt._stepper.plan.directions is None  # type: ignore[union-attr]


# ---- Any numbers -----------------------------------------------------------------------------------------------------

EDGES = [0.0, 1e-45, 1.2e-38, 1e-30, 1e-20, 1e-12, 1e-4, 1.0, 1e4, 1e8, 1e12, 1e18, 1.9e19, 1e30, 3e38]
finite = st.one_of(st.sampled_from([*EDGES, *(-x for x in EDGES)]), numbers)
matrix = st.lists(finite, min_size=12, max_size=12) | finite.map(lambda x: [x] * 12)
MIXTURES = ((3, 4), (4, 3), (2, 6))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [F32, BF16])
@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(
    start=st.lists(matrix, min_size=3, max_size=3),
    steps=st.lists(st.lists(matrix, min_size=3, max_size=3), min_size=1, max_size=3),
    decay=st.sampled_from([0.0, 0.1]),
)
@pytest.mark.parametrize("kind", ["open", "random", "unbounded"])
def test_parameters_and_state_stay_finite(
    kind: str, impl: str, dtype: torch.dtype, start: list[Any], steps: list[Any], decay: float
) -> None:
    """Over the whole range of float32, also where directions are not bounded: no column is clipped."""
    theta = spectral() if kind == "random" else spectral(gate=1.0)
    if kind == "unbounded":
        tensors = {**theta.tensors, "skip": 1e6 * theta.tensors["skip"]}
        theta = Theta(theta.spec, tensors).with_spec(feature_clip=None, magnitude_rate=10.0, clip_multiplier=1e30)
    params = [
        Parameter(torch.tensor(x).reshape(shape).clamp(-LARGEST_PARAM, LARGEST_PARAM).to(dtype))
        for x, shape in zip(start, MIXTURES, strict=True)
    ]
    opt = LearnedOptimizer(params, theta, impl=impl, state_dtype=dtype, weight_decay=decay)
    for grads in steps:
        for param, grad in zip(params, grads, strict=True):
            param.grad = torch.tensor(grad).reshape(param.shape).to(dtype)
        opt.step(loss=1.0)
        for param in params:
            assert bool(torch.isfinite(param).all()), param
            for name, value in opt.state[param]["lstm"].items():
                assert bool(torch.isfinite(value).all()), name
            assert float(opt.state[param]["lstm"]["rank"]) >= 0.0
