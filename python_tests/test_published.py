"""Learned optimizers of others: vectors recorded from their authors' code, closed forms, what a torch optimizer owes.

golden/{mlp_lopt,small_fc_lopt,nn_adam,velo}_*.npz were recorded from google/learned_optimization (float32, CPU): 10
steps over the tensors ``b conv s sq w`` in the layout of JAX. Their keys: ``theta|PATH`` the weights; ``params0|T``,
``grads|T``, ``losses`` what went in; ``params|T`` after each step; ``lstm_in`` [10, 5, inputs]; ``norm|step4|T|raw``
what the MLP sees of every parameter, before it is normalised; after steps 0, 4 and 9 ``state_after|stepN|...``.
"""

import copy
import io
import json
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from optimizer_cases import assert_same_bits, clone_tree, copies, make_loss, set_grads, snapshot
from torch import Tensor
from torch.nn import Parameter

from lopt import History, LearnedOptimizer, Theta
from lopt.rule import RULES, Rule
from lopt.rule.matrices import Kind
from lopt.rule.published import Celo2, NNAdam, SmallFC, VeLO, celo2, nn_adam, parts, velo
from lopt.rule.published.rule import Now, Update

Arrays = dict[str, np.ndarray]

TENSORS = ("b", "conv", "s", "sq", "w")
STEPS = 10


class Trace(NamedTuple):
    """A recorded run, and what of its optimizer is in no array."""

    name: str
    constants: dict[str, Any]
    total_steps: float
    bound: float  # of the error of parameters; where one update is large, of that over the largest update
    relative: bool


TRACES = {
    trace.name: trace
    for trace in (
        Trace("mlp_lopt_default", {}, 0.0, 1e-6, False),
        Trace("mlp_lopt_bigstep", {"step_multiplier": 0.1}, 0.0, 1e-4, True),
        Trace("small_fc_lopt_default", {}, 0.0, 1e-6, False),
        Trace("small_fc_lopt_bigstep", {"step_multiplier": 0.1}, 0.0, 1e-4, True),
        Trace("nn_adam_default", {}, 0.0, 1e-6, False),
        Trace("nn_adam_bigscale", {"output_scale": 0.3, "decay_strength": 0.1}, 0.0, 1e-6, False),
        Trace("velo_default", {}, 40.0, 1e-4, True),
        Trace("velo_bugged", {"bugged_losses": True, "bugged_lstm": True}, 40.0, 1e-6, False),
        Trace("velo_validfeat", {"validation_mode": True}, 40.0, 1e-4, True),
    )
}
every_trace = pytest.mark.parametrize("trace", TRACES.values(), ids=TRACES)
every_rule = pytest.mark.parametrize("name", RULES)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])

SHAPES = ((), (5,), (9, 3), (4, 4), (2, 3, 4), (3, 2, 3, 3), (2, 1, 3, 2, 2))  # ranks 0 to 5, and a square


@pytest.fixture(autouse=True)
def _one_thread(set_num_threads: Callable[[int], None]) -> None:
    set_num_threads(1)  # the tensors are tiny


def as_tensor(array: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.from_numpy(np.array(array)).to(dtype)


def theta_of(trace: Trace, arrays: Arrays) -> Theta[Any]:
    return Theta.import_jax(arrays).with_spec(**trace.constants)


def largest_update(arrays: Arrays) -> float:
    """Of any parameter in any step."""
    runs = [np.concatenate([arrays[f"params0|{t}"][None], arrays[f"params|{t}"]]) for t in TENSORS]
    return max(float(np.abs(np.diff(values, axis=0)).max()) for values in runs)


def bound_of(trace: Trace, arrays: Arrays) -> float:
    return trace.bound * (largest_update(arrays) if trace.relative else 1.0)


def replay(trace: Trace, arrays: Arrays, dtype: torch.dtype) -> list[tuple[list[Tensor], Update]]:
    """All steps, each from the recorded parameters, and the rule's own state."""
    theta = theta_of(trace, arrays).to(dtype=dtype)
    rule, weights = theta.spec, theta.tensors
    states = [rule.init_param(weights, arrays[f"params0|{t}"].shape, Kind()) for t in TENSORS]
    shared, steps = rule.init_shared(weights), []
    for number in range(STEPS):
        before = [arrays[f"params|{t}"][number - 1] if number else arrays[f"params0|{t}"] for t in TENSORS]
        params = [as_tensor(value, dtype) for value in before]
        now = Now(
            torch.tensor(number),
            as_tensor(arrays["losses"][number], dtype),
            torch.tensor(trace.total_steps, dtype=dtype),
            torch.zeros(len(TENSORS), dtype=torch.bool),
        )
        grads = [as_tensor(arrays[f"grads|{t}"][number], dtype) for t in TENSORS]
        update = rule.update(weights, shared, params, grads, states, now)
        written = [p - d * s for p, d, s in zip(params, update.directions, update.sizes, strict=True)]
        shared, states = update.shared, update.states
        steps.append((written, update))
    return steps


def error(found: Tensor, expected: np.ndarray) -> float:
    return float((found.double() - as_tensor(expected, torch.float64).reshape(found.shape)).abs().max())


# ---- The traces -----------------------------------------------------------------------------------------------------


@every_dtype
@every_trace
def test_steps_are_those_of_the_authors(trace: Trace, dtype: torch.dtype, golden: Callable[[str], Arrays]) -> None:
    """Every step from the recorded parameters. Measured: 1.2e-7, or 3.9e-6 (VeLO 9.4e-6) of the largest update.

    In float64 decays are no float32 numbers, and a step from a float32 parameter has its rounding.
    """
    arrays = golden(trace.name)
    bound = bound_of(trace, arrays) if dtype == torch.float32 else 1e-4 * largest_update(arrays) + 2e-6
    for number, (params, _) in enumerate(replay(trace, arrays, dtype)):
        for t, param in zip(TENSORS, params, strict=True):
            assert error(param, arrays[f"params|{t}"][number]) <= bound, (number, t)


@every_trace
def test_inputs_are_those_of_the_authors(trace: Trace, golden: Callable[[str], Arrays]) -> None:
    """What the LSTM sees to 2e-6, what the MLP sees to 1e-6 of each column.

    VeLO's loss inputs are ratios of small differences of means that are divided by small numbers: to 1e-3.
    """
    arrays = golden(trace.name)
    steps = replay(trace, arrays, torch.float32)
    assert "lstm_in" in arrays or "norm|step4|w|raw" in arrays
    for number, (_, update) in enumerate(steps if "lstm_in" in arrays else ()):
        off = np.abs(update.trace["lstm_input"].numpy() - arrays["lstm_in"][number])
        losses = slice(9, 18) if trace.name.startswith("velo") else slice(0, 0)
        assert off[:, losses].max(initial=0.0) < 1e-3, number
        assert np.delete(off, losses, axis=1).max() < 2e-6, number
    for t, found in zip(TENSORS, steps[4][1].trace.get("columns", ()), strict=False):
        expected = as_tensor(arrays[f"norm|step4|{t}|raw"]).movedim(-1, 0).reshape(found.shape)
        for c, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert float((one - other).abs().max()) <= 1e-6 * float(other.abs().max()), (t, c)


STATES = {"mom": ("mom_rolling|m", "rolling_features|m"), "rms": ("rms_rolling|rms", "rolling_features|rms")}
FACTORS = {"row": "v_row", "column": "v_col", "diagonal": "v_diag"}
STATES |= {name: (f"fac_rolling|{key}", f"fac_rolling_features|{key}") for name, key in FACTORS.items()}


@every_trace
def test_states_are_those_of_the_authors(trace: Trace, golden: Callable[[str], Arrays]) -> None:
    arrays = golden(trace.name)
    steps = replay(trace, arrays, torch.float32)
    compared = set()
    for number in (0, 4, 9):
        update = steps[number][1]
        prefix = f"state_after|step{number}|"
        for i, t in enumerate(TENSORS):
            for name, value in update.states[i].items():
                keys = [f"{prefix}{path}|{t}" for path in STATES.get(name, ())]
                for key in (key for key in keys if key in arrays):
                    single = value.dim() == arrays[key].ndim + 1  # nn_adam has no dimension of decays
                    expected = arrays[key] if single else np.moveaxis(arrays[key], -1, 0)
                    assert error(value, expected) <= 1e-6 * max(float(np.abs(expected).max()), 1e-12), key
                    compared.add(name)
            for name, key in (("h", "hidden"), ("c", "cell")):
                if f"{prefix}lstm_hidden_state|{key}" in arrays:
                    bound = 1e-4 if trace.name.startswith("velo") else 2e-6  # its loss inputs, see above
                    assert error(update.states[i][name], arrays[f"{prefix}lstm_hidden_state|{key}"][i]) < bound
            for j, control in enumerate(nn_adam.CONTROLS):
                if f"{prefix}per_layer_{control}|{t}" in arrays:
                    assert error(update.states[i]["controls"][j], arrays[f"{prefix}per_layer_{control}|{t}"]) < 1e-6
        for name, key in (("loss_means", "means"), ("loss_lowest", "running_min"), ("loss_updates", "iteration")):
            if f"{prefix}loss_buffer|{key}" in arrays:
                expected = arrays[f"{prefix}loss_buffer|{key}"]
                assert error(update.shared[name], expected) <= 1e-6 * float(np.abs(expected).max())
    expected_names = {"mom"} if "mlp_lopt" in trace.name else {"mom", "rms"}
    assert compared == (expected_names if "mlp" in trace.name or "nn" in trace.name else {*expected_names, *FACTORS})


@pytest.mark.parametrize("name", ["velo_default", "velo_bugged"])
def test_loss_decays_are_those_of_the_authors(name: str, golden: Callable[[str], Arrays]) -> None:
    expected = golden(name)["state_after|step0|loss_buffer|decays"]
    total = 10.0 if TRACES[name].constants else 40.0
    assert error(velo.loss_decays(torch.tensor(total)), expected) < 2e-7
    assert name == "velo_default" or np.allclose(expected, math.exp(-0.1))


#: The reference alone has float64; ``"auto"`` is the kernels.
IMPLS = [("auto", torch.float32), ("reference", torch.float32), ("reference", torch.float64)]


@pytest.mark.parametrize(("impl", "dtype"), IMPLS, ids=["auto", "float32", "float64"])
@every_trace
def test_optimizer_takes_the_steps_of_the_authors(
    trace: Trace, impl: str, dtype: torch.dtype, golden: Callable[[str], Arrays]
) -> None:
    """Ten steps of LearnedOptimizer, in torch's layout, without a look at the recording in between."""
    arrays = golden(trace.name)

    def of_torch(array: np.ndarray) -> Tensor:
        """``[..., in, out]`` -> ``[out, in, ...]``."""
        value = as_tensor(array, dtype)
        return value.permute(3, 2, 0, 1) if value.dim() == 4 else value.T if value.dim() == 2 else value

    params = [Parameter(of_torch(arrays[f"params0|{t}"]).contiguous()) for t in TENSORS]
    assert [tuple(param.shape) for param in params] == [(4,), (4, 2, 3, 3), (), (4, 4), (4, 5)]
    total = int(trace.total_steps) or None
    opt = LearnedOptimizer(params, theta_of(trace, arrays), total_steps=total, impl=impl)
    assert opt.implementation == ("cpu" if impl == "auto" else "reference")
    bound = 3 * bound_of(trace, arrays) if dtype == torch.float32 else 1e-4 * largest_update(arrays) + 2e-6
    for number in range(STEPS):
        for t, param in zip(TENSORS, params, strict=True):
            param.grad = of_torch(arrays[f"grads|{t}"][number])
        opt.step(loss=float(arrays["losses"][number]))
        for t, param in zip(TENSORS, params, strict=True):
            expected = of_torch(arrays[f"params|{t}"][number])
            assert float((param.detach() - expected).abs().max()) <= bound, (number, t)


# ---- Closed forms ---------------------------------------------------------------------------------------------------


def now_of(count: int, loss: float = 1.0, total_steps: float = 100.0, step: int = 0) -> Now:
    like = torch.zeros((), dtype=torch.float64)
    rest = torch.zeros(count, dtype=torch.bool)
    return Now(torch.tensor(step), like + loss, like + total_steps, rest)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5), (2, 7, 3), (3, 3, 4, 6), (3, 1, 2, 5, 4)])
def test_factored_moments_of_a_product_are_exact(shape: tuple[int, ...]) -> None:
    """Squares that are a product over the two largest dimensions, another in each slice of the others, have second
    moments that rows and columns know exactly: ``g / sqrt((1 - d) g^2) = sign(g) / sqrt(1 - d)``."""
    second, largest = parts.factored_dims(shape)
    alone = [[size if dim in keep else 1 for dim, size in enumerate(shape)] for keep in ({second}, {largest})]
    others = [1 if dim in (second, largest) else size for dim, size in enumerate(shape)]
    factors = (random(*size, seed=i).abs() + 0.1 for i, size in enumerate([*alone, others]))
    grad = math.prod(factors, start=torch.sign(random(*shape, seed=9)))
    decays = torch.tensor([0.9, 0.5], dtype=torch.float64)
    factored = parts.next_factored(parts.init_factored(grad, 2, shape), grad, decays)
    expected = torch.sign(grad) / torch.sqrt(1.0 - parts.per_decay(decays, shape))
    assert torch.allclose(factored.precondition(grad[None]), expected, rtol=1e-6)
    assert shape[second] <= shape[largest] == max(shape)
    assert sorted(shape)[-2:] == [shape[second], shape[largest]]
    assert factored.state["row"].shape == (2, *(n for dim, n in enumerate(shape) if dim != largest))
    assert factored.state["column"].shape == (2, *(n for dim, n in enumerate(shape) if dim != second))


def test_nn_adam_without_controls_is_adam() -> None:
    """Its controls start without influence: Adam without bias correction, and epsilon beside the root."""
    theta = Theta.init("nn_adam").to(dtype=torch.float64)
    param, grads = random(4, 3), [random(4, 3, seed=i) for i in range(1, 6)]
    state = theta.spec.init_param(theta.tensors, (4, 3), Kind())
    mom = rms = torch.zeros_like(param)
    for number, grad in enumerate(grads):
        update = theta.spec.update(theta.tensors, {}, [param], [grad], [state], now_of(1, step=number))
        state = update.states[0]
        mom, rms = 0.9 * mom + 0.1 * grad, 0.999 * rms + 0.001 * grad**2
        expected = 1e-4 * (1 + 1e-8) * mom / (1e-8 + torch.sqrt(rms + 1e-10))
        assert torch.allclose(update.directions[0] * update.sizes[0], expected, rtol=2e-6)  # controls are float32
        param = param - expected


def test_nn_adam_keeps_its_controls_within_bounds() -> None:
    controls = torch.tensor([[-9.0, 3.0, 3.0, -9.0], [9.0, -9.0, -9.0, 9.0]], dtype=torch.float64)
    values = nn_adam.meaning(controls)
    low, high = values
    assert torch.allclose(low, torch.tensor([1e-8, 0.0, 0.0, 1e-11], dtype=torch.float64))
    assert torch.allclose(high, torch.tensor([1e3, 1 - math.exp(-10), 1 - math.exp(-10), 1e4], dtype=torch.float64))
    assert torch.allclose(nn_adam.meaning(nn_adam.spelled(values)), values)


def test_velo_mixes_one_mlp_of_its_bank() -> None:
    """A bank whose LSTM gives all shares to one MLP acts as 100 / bank_size of that one."""
    theta = Theta.init(VeLO(lstm_width=3, bank_size=5)).to(dtype=torch.float64)
    weights = {
        name: torch.zeros_like(x) if name.startswith(("controls", "step")) else x for name, x in theta.tensors.items()
    }
    weights["controls.b"][2], weights["step.b"][0] = 1.0, 1.0
    param, grad = random(4, 3), random(4, 3, seed=1)
    rule = theta.spec
    state, shared = rule.init_param(weights, (4, 3), Kind()), rule.init_shared(weights)
    update = rule.update(weights, shared, [param], [grad], [state], now_of(1))
    one = {name.replace("bank", "mlp"): x[2] * 20.0 for name, x in weights.items() if name.startswith("bank")}
    out = parts.mlp(one, parts.normalise(update.trace["columns"][0]))
    assert torch.allclose(update.directions[0], out[0] * torch.exp(1e-3 * out[1]))
    assert float(update.sizes[0]) == pytest.approx(1e-3 * math.sqrt(float(param.square().mean()) + 1e-9))


def test_velo_sees_a_loss_that_stands_still_in_the_middle_of_nothing() -> None:
    """Means of equal losses are equal: none is between its lowest and the next. A missing loss changes nothing."""
    rule = VeLO(lstm_width=3, bank_size=5)
    decays = velo.loss_decays(torch.tensor(1000.0, dtype=torch.float64))
    half_lives = -1.0 / torch.log(decays)
    assert torch.allclose(half_lives, torch.logspace(1, 3, 10, dtype=torch.float64))
    shared = rule.init_shared({"initial_h": torch.zeros(3, dtype=torch.float64)})
    for _ in range(20):
        shared = velo.next_losses(shared, torch.tensor(2.0, dtype=torch.float64), decays)
    assert torch.allclose(shared["loss_means"] / (1 - decays**20), torch.full_like(decays, 2.0))
    same = velo.next_losses(shared, torch.tensor(math.nan, dtype=torch.float64), decays)
    assert_same_bits(shared, same)
    falling = velo.next_losses(shared, torch.tensor(1.0, dtype=torch.float64), decays)
    assert bool((velo.loss_inputs(falling, decays) == -1.0).all())  # quick means are at their lowest


def test_celo2_treats_vectors_and_embeddings_as_adamw() -> None:
    """To the bits of float64 AdamW with its betas, and decay by the same learning rate; a matrix is not."""
    theta = Theta.init(Celo2(learning_rate=0.02))
    tensors = [Parameter(random(5)), Parameter(random(7, 3, seed=1)), Parameter(random(4, 3, seed=2))]
    other = copies(tensors)
    groups = [{"params": tensors[:1]}, {"params": tensors[1:2], "role": "input"}, {"params": tensors[2:]}]
    opt = LearnedOptimizer(groups, theta, weight_decay=0.1)
    adam = torch.optim.AdamW(other, lr=0.02, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for number in range(5):
        set_grads([*tensors], number)
        set_grads([*other], number)
        opt.step()
        adam.step()
    for param, expected in zip(tensors[:2], other, strict=False):
        assert torch.allclose(param, expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(tensors[2], other[2], atol=1e-2)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5), (2, 3, 7)])
def test_celo2_orthogonalises_singular_values(shape: tuple[int, ...]) -> None:
    """The polynomial acts on singular values alone: against the decomposition itself."""
    x = random(*shape)
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    s = s / (torch.linalg.vector_norm(s, dim=-1, keepdim=True) + 1e-8)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    assert torch.allclose(celo2.orthogonalise(x, 5), u * s[..., None, :] @ v, atol=1e-10)


def test_celo2_steps_have_the_size_of_the_learning_rate() -> None:
    """The root mean square of a matrix's step is the learning rate, whatever the gradients' scale."""
    theta = Theta.init(Celo2(learning_rate=0.01))
    for scale in (1e-4, 1.0, 1e2):
        param = Parameter(random(8, 6))
        before = param.detach().clone()
        param.grad = scale * random(8, 6, seed=1)
        LearnedOptimizer([param], theta).step()
        assert float((param.detach() - before).square().mean().sqrt()) == pytest.approx(0.01, rel=1e-6)


@pytest.mark.parametrize("name", ["small_fc_lopt", "velo", "celo2"])
def test_a_matrix_may_be_stored_either_way(name: str) -> None:
    """Stored ``[in, out]`` with ``transposed``, it is stepped as ``[out, in]`` is, square ones too; so are strides."""
    theta = small_theta(name)
    for shape in ((6, 4), (5, 5)):
        one, other = Parameter(random(*shape)), Parameter(random(*shape).T.contiguous())
        turned = Parameter(random(*shape).T.contiguous().T)  # the same tensor, with other strides
        optimizers = [
            LearnedOptimizer([{"params": [param], "transposed": param is other}], theta, total_steps=10)
            for param in (one, other, turned)
        ]
        for number in range(3):
            grad = random(*shape, seed=number)
            one.grad, other.grad, turned.grad = grad, grad.T.contiguous(), grad.T.contiguous().T
            for opt in optimizers:
                opt.step(loss=1.0)
        assert torch.allclose(one, other.T, rtol=1e-9, atol=1e-12)
        assert torch.allclose(one, turned, rtol=1e-9, atol=1e-12)
        assert not torch.equal(one, random(*shape))


def test_channels_last_is_the_same() -> None:
    for name in RULES:
        params = [Parameter(random(4, 3, 3, 2)), Parameter(random(4, 3, 3, 2).to(memory_format=torch.channels_last))]
        for param in params:
            param.grad = random(4, 3, 3, 2, seed=1).to(memory_format=torch.channels_last)
            LearnedOptimizer([param], small_theta(name), total_steps=10).step(loss=1.0)
        assert torch.allclose(params[0], params[1], rtol=1e-12, atol=0.0), name


# ---- As a torch optimizer -------------------------------------------------------------------------------------------


def small_theta(name: str) -> Theta[Any]:
    """Random meta-parameters, none of them zero, with steps that are large enough to be seen."""
    rule: Rule = {"velo": VeLO(lstm_width=8, bank_size=6), "nn_adam": NNAdam(lstm_width=8)}.get(name, RULES[name]())
    theta = Theta.init(rule, seed=1)
    generator = torch.Generator().manual_seed(2)
    tensors = {k: x + 0.05 * torch.randn(x.shape, generator=generator) for k, x in theta.tensors.items()}
    theta = Theta(theta.spec, tensors, theta.provenance)
    return theta.with_spec(step_multiplier=0.05) if hasattr(rule, "step_multiplier") else theta


def make_params(dtype: torch.dtype = torch.float32, shapes: Sequence[Sequence[int]] = SHAPES) -> list[Parameter]:
    return [Parameter((0.3 * random(*shape, seed=i)).to(dtype)) for i, shape in enumerate(shapes)]


def make(name: str, params: Any, **options: Any) -> LearnedOptimizer:
    return LearnedOptimizer(params, small_theta(name), total_steps=20, **options)


def run(opt: LearnedOptimizer, params: Sequence[Tensor], steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        set_grads(params, step)
        opt.step(loss=make_loss(step))


@every_rule
def test_all_ranks_move_and_float32_agrees_with_float64(name: str) -> None:
    params, doubles = make_params(), make_params(torch.float64)
    start = [param.detach().clone() for param in params]
    opt, exact = make(name, params), make(name, doubles)
    assert (opt.implementation, exact.implementation) == ("cpu", "reference")
    for step in range(6):
        set_grads(params, step)
        for param, double in zip(params, doubles, strict=True):
            double.grad = param.grad.double()
        opt.step(loss=make_loss(step))
        exact.step(loss=make_loss(step))
    for param, double, old in zip(params, doubles, start, strict=True):
        moved = float((param.detach() - old).abs().max())
        assert moved > 1e-4, param.shape
        assert float((param.detach().double() - double.detach()).abs().max()) < 5e-4 * moved + 1e-6, param.shape
        assert {x.dtype for x in opt.state[param].values()} == {torch.float32}
        assert {x.dtype for x in exact.state[double].values()} == {torch.float64}
        assert opt.state[param]["mom"].shape[1:] == param.shape


@every_rule
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_a_run_resumes_to_the_bit(name: str, state_dtype: torch.dtype) -> None:
    params = make_params()
    groups = [{"params": params[:3]}, {"params": params[3:], "lr": 0.5, "weight_decay": 0.1}]
    opt = make(name, groups, average=True, state_dtype=state_dtype)
    run(opt, params, 3)
    opt.observe(train_loss=0.25)  # waits in the state
    again = copies(params)
    halves = [{"params": again[:3]}, {"params": again[3:]}]
    resumed = LearnedOptimizer(halves, small_theta(name), average=True, state_dtype=state_dtype)
    resumed.load_state_dict(clone_tree(opt.state_dict()))
    assert resumed.total_steps == 20
    assert {resumed.state[param][part].dtype for param in again for part in opt.theta.spec.per_param} == {state_dtype}
    run(opt, params, 3, first=3)
    run(resumed, again, 3, first=3)
    assert_same_bits(snapshot(opt), snapshot(resumed))


@every_rule
def test_copies_go_on_as_the_original(name: str) -> None:
    params = make_params()
    opt = make(name, params)
    run(opt, params, 2)
    file = io.BytesIO()
    torch.save(opt, file)
    file.seek(0)
    others = [copy.deepcopy(opt), torch.load(file, weights_only=False)]
    run(opt, params, 2, first=2)
    for other in others:
        run(other, other.param_groups[0]["params"], 2, first=2)
        assert_same_bits(snapshot(opt), snapshot(other))


@every_rule
def test_parameters_without_a_gradient_are_saved_as_they_begin(name: str) -> None:
    params = make_params()
    opt = make(name, params)
    set_grads(params, 0)
    params[2].grad = params[3].grad = None
    old = [params[2].detach().clone(), params[3].detach().clone()]
    opt.step(loss=1.0)
    assert_same_bits(old, [params[2].detach(), params[3].detach()])
    state = opt.state_dict()
    assert set(state["state"]) == set(range(len(params)))
    again = copies(params)
    resumed = make(name, again)
    resumed.load_state_dict(state)
    run(opt, params, 2, first=1)
    run(resumed, again, 2, first=1)
    assert_same_bits(snapshot(opt), snapshot(resumed))


@every_rule
def test_a_state_of_another_theta_or_shape_is_refused(name: str) -> None:
    params = make_params(shapes=[(4, 3)])
    opt = make(name, params)
    run(opt, params, 1)
    with pytest.raises(ValueError, match="was written with theta"):
        LearnedOptimizer(copies(params)).load_state_dict(opt.state_dict())
    other = make_params(shapes=[(5, 3)])
    with pytest.raises(ValueError, match=r"state\[0\]\['mom'\] expected shape"):
        make(name, other).load_state_dict(opt.state_dict())


@every_rule
def test_lr_and_weight_decay(name: str) -> None:
    """``param <- (1 - size decay) param - size direction`` with ``size`` proportional to ``lr``; at 0 nothing moves."""
    runs: dict[tuple[float, float], list[Tensor]] = {}
    sizes: dict[float, list[float]] = {}
    for lr, decay in ((1.0, 0.0), (0.5, 0.0), (1.0, 0.2), (0.0, 0.2)):
        params = make_params(torch.float64)
        opt = make(name, params, lr=lr, weight_decay=decay)
        run(opt, params, 1)
        runs[lr, decay] = [param.detach() for param in params]
        sizes[lr] = [float(control.step_size) for control in opt.controls().values()]
    start = make_params(torch.float64)
    for i, param in enumerate(start):
        step = runs[1.0, 0.0][i] - param
        assert torch.allclose(runs[0.5, 0.0][i] - param, 0.5 * step, rtol=1e-9)
        share = 0.2 * sizes[1.0][i] if sizes[1.0][i] > 0 else 0.0
        assert torch.allclose(runs[1.0, 0.2][i], param * (1 - share) + step, rtol=1e-9, atol=1e-12)
        assert torch.equal(runs[0.0, 0.2][i], param)
        assert sizes[0.5][i] == 0.5 * sizes[1.0][i]
        assert sizes[0.0][i] == 0.0


@every_rule
def test_what_is_not_finite_harms_nothing_else(name: str) -> None:
    """NaN in gradients counts as 0; a tensor with such parameters rests, the others step as if it were not there.

    To rounding: products over other numbers of tensors add in another order, and VeLO makes much of it.
    """
    rtol = 1e-4 if name == "velo" else 2e-5
    clean, hurt = make_params(), make_params()
    alone = [param for i, param in enumerate(clean) if i != 3]
    bad, nan = (make(name, hurt), torch.tensor(torch.nan))
    good = make(name, alone)
    with torch.no_grad():
        hurt[3][0, 0] = torch.inf
    for step in range(3):
        set_grads(clean, step)
        for param, other in zip(clean, hurt, strict=True):
            other.grad = param.grad.clone()
        clean[2].grad[0, 0], hurt[2].grad[0, 0] = 0.0, nan
        clean[3].grad = None
        good.step(loss=1.0)
        bad.step(loss=1.0)
    for i, (param, other) in enumerate(zip(clean, hurt, strict=True)):
        if i != 3:
            assert torch.allclose(param, other, rtol=rtol, atol=1e-5), i
    assert hurt[3].isinf().sum() == 1
    assert torch.equal(hurt[3].detach().flatten()[1:], make_params()[3].detach().flatten()[1:])
    assert bad.nonfinite_gradients == 3
    assert bad.nonfinite_parameters == 3
    hurt[0].grad.fill_(-torch.inf)
    bad.step(loss=1.0)
    assert all(bool(x.isfinite().all()) for x in (*bad.state[hurt[0]].values(), hurt[0]))


@every_rule
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_dtypes_are_computed_in_float32(name: str, dtype: torch.dtype) -> None:
    params = make_params(dtype)
    wide = [Parameter(param.detach().float()) for param in params]
    set_grads(params, 0)
    for param, other in zip(params, wide, strict=True):
        other.grad = param.grad.float()
    make(name, params).step(loss=1.0)
    make(name, wide).step(loss=1.0)
    assert_same_bits([param.detach() for param in params], [param.detach().to(dtype) for param in wide])


@every_rule
def test_losses_that_are_missing(name: str) -> None:
    """None before the first, then the last one again: the same as telling it. Validation losses do nothing."""
    params, others = make_params(), make_params()
    opt, told = make(name, params), make(name, others)
    for step, loss in enumerate((None, 2.0, None, None, 1.0)):
        set_grads(params, step)
        set_grads(others, step)
        opt.step(loss=loss)
        told.observe(valid_loss=3.0) if step > 1 else None
        told.step(loss=2.0 if 1 <= step < 4 else loss)
    assert_same_bits([param.detach() for param in params], [param.detach() for param in others])
    assert float(opt.param_groups[0]["step"]) == 5


@every_rule
def test_closures_new_groups_and_a_state_that_is_loaded_twice(name: str) -> None:
    params = make_params()
    opt = make(name, params[:3])
    loss = opt.step(lambda: _backward(params[:3]))
    assert float(loss.detach()) > 0
    assert all("mom" in opt.state[param] for param in params[:3])
    opt.add_param_group({"params": params[3:]})
    run(opt, params, 2)
    state = clone_tree(opt.state_dict())
    for _ in range(2):
        again = copies(params)
        other = make(name, [{"params": again[:3]}, {"params": again[3:]}])
        other.load_state_dict(state)
        run(other, again, 1, first=2)
    run(opt, params, 1, first=2)
    assert_same_bits(snapshot(opt), snapshot(other))


def _backward(params: Sequence[Tensor]) -> Tensor:
    loss = torch.stack([param.square().sum() for param in params]).sum()
    loss.backward()
    return loss


def test_velo_needs_the_number_of_steps() -> None:
    params = make_params()
    opt = LearnedOptimizer(params, small_theta("velo"))
    set_grads(params, 0)
    before = snapshot(opt)
    with pytest.raises(ValueError, match="total_steps: rule 'velo' has a schedule over the whole run; write"):
        opt.step(loss=1.0)
    assert_same_bits(before, snapshot(opt))
    opt.total_steps = 10
    opt.step(loss=1.0)


@every_rule
def test_history_and_empty_tensors(name: str) -> None:
    params = [*make_params(), Parameter(torch.zeros(0, 3))]
    opt = make(name, params)
    with History(opt) as history:
        run(opt, params, 2)
    rows = history.rows
    assert [row.train_loss for row in rows[:: len(SHAPES)]] == pytest.approx([make_loss(0), make_loss(1)])
    assert {row.step for row in rows} == {1, 2}
    assert all(math.isnan(row.gate) for row in rows)


def test_what_is_not_there_is_refused() -> None:
    params, theta = make_params(), small_theta("mlp_lopt")
    refused: list[tuple[dict[str, Any], str]] = [
        (
            {"state_dtype": torch.int8},
            "state_dtype: rule 'mlp_lopt' has its state in float32 or bfloat16, got torch.int8",
        ),
        ({"sharded_state": True}, "sharded_state: rule 'mlp_lopt' keeps whole states"),
        ({"impl": "cuda"}, "impl='cuda': parameters are on cpu, expected cuda; use impl='auto' or 'reference'"),
    ]
    for options, message in refused:
        with pytest.raises(ValueError, match=message):
            LearnedOptimizer(params, theta, **options)
    for name, message in (("velo", "rule 'velo' steps all tensors at once"), ("nn_adam", "rule 'nn_adam' steps all")):
        with pytest.raises(ValueError, match=f"step_in_backward: {message}"):
            LearnedOptimizer(params, small_theta(name)).step_in_backward()
    for call in (lambda: theta.carried(Theta.init("compact").spec), lambda: Theta.init_adam("velo")):
        with pytest.raises(ValueError, match="is there for the hierarchical optimizer alone, got rule"):
            call()


# ---- Theta ----------------------------------------------------------------------------------------------------------


@every_rule
def test_theta_files(name: str, tmp_path: Any) -> None:
    theta = small_theta(name)
    theta.save(tmp_path / "theta.safetensors")
    again = Theta.load(tmp_path / "theta.safetensors")
    assert again.spec == theta.spec
    assert type(again.spec) is RULES[name]
    assert_same_bits(again.tensors, theta.tensors)
    assert again.num_floats == len(again.flatten()) == theta.spec.num_floats
    assert_same_bits(theta.unflatten(theta.flatten()).tensors, theta.tensors)
    assert json.loads(json.dumps(theta.spec.to_json()))["rule"] == name
    half = theta.toward(Theta.init(theta.spec, seed=1), 0.5)
    assert half.spec == theta.spec


def test_num_floats_are_those_of_the_authors() -> None:
    """Measured with their code; of VeLO without the layer that nothing reads."""
    counts = {"mlp_lopt": 1762, "small_fc_lopt": 197, "nn_adam": 6856, "velo": 2320385 - (30 * 512 + 512)}
    assert {name: RULES[name]().num_floats for name in counts} == counts
    assert SmallFC(mlp_width=32).num_floats == 2409


def test_specs_that_cannot_be() -> None:
    for make_spec, message in (
        (lambda: SmallFC(mlp_width=0), "mlp_width: expected a whole number from 1, got 0"),
        (lambda: SmallFC(mom_decays=(0.9, 1.0, 0.5)), r"mom_decays: expected decays in \(0, 1\)"),
        (lambda: SmallFC(rms_decays=(0.9, 0.5)), "decays: expected one of rms"),
        (lambda: Celo2(adam_decays=(0.9,)), "adam_decays: expected 2"),
        (lambda: VeLO(step_multiplier=math.nan), "step_multiplier: expected a finite number"),
        (lambda: Theta.init("unknown"), "preset: expected one of .* or of the rules"),
        (lambda: SmallFC.from_json({"mlp_width": 4}), "spec: unknown fields .* missing fields"),
    ):
        with pytest.raises(ValueError, match=message):
            make_spec()
