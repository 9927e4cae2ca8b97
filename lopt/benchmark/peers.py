"""Optimizers of other projects, timed beside ours where they can be imported, left out with a reason where not."""

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any
from unittest import mock

import torch
from torch import Tensor

Step = Callable[[], object]
Build = Callable[[Sequence[Tensor]], Step]


def pylo_adafac(params: Sequence[Tensor]) -> Step:
    """PyLO's small_fc_lopt with its CUDA kernels (github.com/Belilovsky-Lab/pylo); weights are random."""
    models, optim = import_module("pylo.models.Meta_MLP"), import_module("pylo.optim.AdafacLO_cuda")
    with _random_weights(models.MetaMLP, 39, 32, 1):
        optimizer = optim.AdafacLO_CUDA(list(params))
    loss = torch.ones((), device=params[0].device)
    return lambda: optimizer.step(loss)


def pylo_velo(params: Sequence[Tensor]) -> Step:
    """PyLO's VeLO with its CUDA kernels; weights are random."""
    mlp, rnn = import_module("pylo.models.VeLO_MLP"), import_module("pylo.models.VeLO_RNN")
    optim = import_module("pylo.optim.velo_cuda")
    with _random_weights(mlp.VeLOMLP), _random_weights(rnn.VeLORNN):
        optimizer = optim.VeLO_CUDA(list(params))
    loss = torch.ones((), device=params[0].device)
    return lambda: optimizer.step(loss)


def jax_rnn_mlp(params: Sequence[Tensor]) -> Step:
    """The author's port of the paper's optimizer (google/learned_optimization), compiled by XLA; weights are random."""
    jax = import_module("jax")
    lopt = import_module("learned_optimization.learned_optimizers.rnn_mlp_lopt").RNNMLPLOpt()
    key = jax.random.PRNGKey(0)
    opt = lopt.opt_fn(lopt.init(key))
    state = opt.init(
        {str(i): jax.numpy.asarray(p.detach().cpu().numpy()) for i, p in enumerate(params)}, num_steps=1000
    )
    grads = {str(i): jax.numpy.asarray(p.grad.cpu().numpy()) for i, p in enumerate(params) if p.grad is not None}
    update = jax.jit(lambda state, grads: opt.update(state, grads, loss=1.0, key=key))

    def step() -> None:
        nonlocal state
        state = jax.block_until_ready(update(state, grads))

    return step


def _random_weights(model: Any, *arguments: int) -> Any:
    """Build ``model`` where PyLO would download it: the time of a step does not depend on the weights."""
    return mock.patch.object(model, "from_pretrained", side_effect=lambda *_, **__: model(*arguments))


#: Name -> (kind of device it runs on, how to build its step).
PEERS: dict[str, tuple[str, Build]] = {
    "PyLO small_fc": ("cuda", pylo_adafac),
    "PyLO VeLO": ("cuda", pylo_velo),
    "JAX rnn_mlp_lopt": ("cpu", jax_rnn_mlp),
}


def build(name: str, params: Sequence[Tensor]) -> Step | str:
    """The step of a peer, run once; or the reason why there is none."""
    device, make = PEERS[name]
    if params[0].device.type != device:
        return f"timed on {device} only"
    if params[0].dtype != torch.float32:
        return "timed in float32 only"
    try:
        step = make(params)
        step()
    except Exception as error:  # whatever another project raises
        first = str(error).strip().splitlines()[:1]
        return f"{type(error).__name__}: {first[0] if first else 'no message'}"
    return step
