"""Weights of others: files as JAX implementations and PyLO write them, made here from recorded weights."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import safetensors.torch
import torch
from optimizer_cases import assert_same_bits
from torch import Tensor, nn

from lopt import Theta
from lopt.rule import RULES
from lopt.rule.published import Celo2, SmallFC, VeLO
from lopt.rule.published.small_fc import PYLO_OFFSETS

Arrays = dict[str, np.ndarray]

GOLDEN = {
    "mlp_lopt": "mlp_lopt_default",
    "small_fc_lopt": "small_fc_lopt_bigstep",
    "nn_adam": "nn_adam_default",
    "velo": "velo_validfeat",
}
GROUPS = (1, 1, 1, 3, 1, 3, 1, 3, 1, 3, 3, 3, 3, 3)  # columns of the groups of VeLO and Celo2


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, last = key.split("|")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree


def flax_bytes(tree: Any) -> bytes:
    """What flax.serialization.to_bytes writes: arrays as extension 1, (shape, dtype name, bytes) in msgpack."""

    def pack(value: Any) -> msgpack.ExtType:
        return msgpack.ExtType(1, msgpack.packb((value.shape, value.dtype.name, value.tobytes()), use_bin_type=True))

    packed: bytes = msgpack.packb(tree, default=pack, use_bin_type=True)
    return packed


def weights_of(arrays: Arrays) -> Arrays:
    return {key.removeprefix("theta|"): value for key, value in arrays.items() if key.startswith("theta|")}


def celo2_arrays(seed: int = 0) -> Arrays:
    """The tree of a Celo2 of 30-8-8-3."""
    generator = np.random.default_rng(seed)
    shapes = {f"w0__{i}": (count, 8) for i, count in enumerate(GROUPS)}
    shapes |= {"b0": (8,), "w1": (8, 8), "b1": (8,), "w2": (8, 3), "b2": (3,)}
    return {f"ff_mod_stack|~|{k}": generator.normal(size=shape).astype(np.float32) for k, shape in shapes.items()}


@pytest.mark.parametrize("name", RULES)
def test_jax_trees_and_files(name: str, golden: Callable[[str], Arrays], tmp_path: Path) -> None:
    """A flat mapping, a nested one, .npz, flax files of theta and of ParameterCheckpoint are the same theta."""
    arrays = celo2_arrays() if name == "celo2" else weights_of(golden(GOLDEN[name]))
    expected = Theta.import_jax(arrays)
    assert type(expected.spec) is RULES[name]
    assert expected.provenance == {"method": "import_jax"}
    np.savez(tmp_path / "theta.npz", **arrays)
    (tmp_path / "theta.state").write_bytes(flax_bytes(nested(arrays)))
    checkpoint = {"params": nested(arrays), "gen_id": "a name", "step": np.array(7)}
    (tmp_path / "params_7").write_bytes(flax_bytes(checkpoint))
    for source in (nested(arrays), tmp_path / "theta.npz", tmp_path / "theta.state", tmp_path / "params_7"):
        found = Theta.import_jax(source)
        assert found.spec == expected.spec
        assert_same_bits(found.tensors, expected.tensors)
    unread = sum(value.size for key, value in arrays.items() if key.startswith("rnn_params|linear|"))
    assert expected.num_floats + unread == sum(value.size for value in arrays.values())


def test_sizes_are_those_of_the_arrays(golden: Callable[[str], Arrays]) -> None:
    specs = {name: Theta.import_jax(golden(file)).spec for name, file in GOLDEN.items()}
    assert specs["small_fc_lopt"] == SmallFC(mlp_width=4)
    assert specs["velo"] == VeLO(lstm_width=16, bank_size=8, validation_input=True)
    assert not Theta.import_jax(golden("velo_default")).spec.validation_input
    assert Theta.import_jax(celo2_arrays()).spec == Celo2()


def test_small_fc_without_learned_decays(golden: Callable[[str], Arrays]) -> None:
    """As of those who train the MLP alone: the decays are those of the spec."""
    arrays = {key: value for key, value in weights_of(golden("small_fc_lopt_bigstep")).items() if key.startswith("nn|")}
    theta = Theta.import_jax({key.replace("nn|~", "nn|module"): value for key, value in arrays.items()})
    assert all(bool((theta.tensors[f"decay.{name}"] == 0).all()) for name in ("mom", "rms", "factored"))
    mom, rms, factored = theta.spec.decays(theta.tensors)
    assert torch.allclose(torch.cat([mom, rms, factored]), torch.tensor([0.9, 0.99, 0.999, 0.999, 0.9, 0.99, 0.999]))


# ---- PyLO -----------------------------------------------------------------------------------------------------------


def pylo_meta_mlp(theta: Theta[Any]) -> dict[str, Tensor]:
    """The state dict of PyLO's MetaMLP: torch's linear layers ``input``, ``linear_0`` ... and ``output``."""
    layers = theta.spec.mlp_layers
    names = ["input", *(f"linear_{i}" for i in range(layers - 1)), "output"]
    module = nn.ModuleDict({"network": nn.Sequential()})
    network: Any = module["network"]
    for i, name in enumerate(names, 1):
        weight = theta.tensors[f"mlp.w{i}"]
        linear = nn.Linear(*weight.shape)
        linear.load_state_dict({"weight": weight.T, "bias": theta.tensors[f"mlp.b{i}"]})
        network.add_module(name, linear)
    return dict(module.state_dict())


def pylo_velo(theta: Theta[Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The state dicts of PyLO's VeLORNN and VeLOMLP, with what nothing reads."""
    t = theta.tensors
    width, inputs = theta.spec.lstm_width, t["mix.w"].shape[0]
    names = {"mix": "mix_layer2", "enter": "final_mix_layer", "lstm": "lstm.linear", "controls": "rnn_to_controls"}
    rnn = {"mix_layer1.weight": torch.ones(width, inputs), "mix_layer1.bias": torch.ones(width)}
    for ours, theirs in {**names, "step": "step_size"}.items():
        rnn |= {f"{theirs}.weight": t[f"{ours}.w"].T, f"{theirs}.bias": t[f"{ours}.b"]}
    rnn |= {"lstm_init_state.0": t["initial_h"][None], "lstm_init_state.1": t["initial_c"][None]}
    mlp: dict[str, Tensor] = {}
    for i, (weights, biases) in enumerate(
        (
            ("input_weights", "input_bias"),
            ("hidden_weights", "hidden_bias"),
            ("output_weights", "output_bias"),
        ),
        1,
    ):
        end = ".0" if i == 2 else ""
        mlp |= {f"{weights}_{end}": t[f"bank.w{i}"].mT, f"{biases}_{end}": t[f"bank.b{i}"]}
        mlp |= {f"{weights}{end}": t[f"bank.w{i}"][0].mT, f"{biases}{end}": t[f"bank.b{i}"][0]}
    return rnn, mlp


def pylo_celo2(arrays: Arrays) -> dict[str, Tensor]:
    flat = {key.rpartition("|")[2]: torch.from_numpy(value) for key, value in arrays.items()}
    state = {f"w0.{i}": flat[f"w0__{i}"] for i in range(len(GROUPS))} | {"b0": flat["b0"]}
    return state | {f"dense_{kind}.{i}": flat[f"{kind}{i + 1}"] for kind in "wb" for i in (0, 1)}


def test_pylo_meta_mlp(golden: Callable[[str], Arrays], tmp_path: Path) -> None:
    """For AdafacLO with the decays and the step of its constructor, for ELO with its own."""
    theta = Theta.import_jax(golden("small_fc_lopt_bigstep"))
    state = pylo_meta_mlp(theta)
    torch.save(state, tmp_path / "net.pt")
    safetensors.torch.save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "model.safetensors")
    for source in (state, tmp_path / "net.pt", tmp_path / "model.safetensors"):
        found = Theta.import_pylo(source)
        assert found.spec == SmallFC(mlp_width=4, step_multiplier=0.01)
        expected = {**theta.tensors, **{name: torch.tensor(offsets) for name, offsets in PYLO_OFFSETS.items()}}
        assert_same_bits(found.tensors, expected)
    elo = Theta.import_pylo(state, optimizer="ELO")
    assert elo.spec == SmallFC(mlp_width=4)
    assert float(elo.tensors["decay.mom"].abs().max()) == 0.0
    decays = torch.cat(found.spec.decays(found.tensors))
    offsets = [offset for values in PYLO_OFFSETS.values() for offset in values]
    before = (0.9, 0.99, 0.999, 0.999, 0.9, 0.99, 0.999)
    expected = [1 - (1 - decay) * math.exp(10 * offset) for decay, offset in zip(before, offsets, strict=True)]
    assert decays.tolist() == pytest.approx(expected, abs=1e-6)


def test_pylo_velo(golden: Callable[[str], Arrays], tmp_path: Path) -> None:
    theta = Theta.import_jax(golden("velo_default"))
    rnn, mlp = pylo_velo(theta)
    torch.save(rnn, tmp_path / "rnn.pt")
    torch.save(mlp, tmp_path / "mlp.pt")
    for sources in ((rnn, mlp), (mlp, rnn), (tmp_path / "rnn.pt", tmp_path / "mlp.pt"), ({"rnn": rnn, "mlp": mlp},)):
        found = Theta.import_pylo(*sources)
        assert found.spec == theta.spec
        assert_same_bits(found.tensors, theta.tensors)
    with pytest.raises(ValueError, match="import_pylo: no array 'input_weights_'"):
        Theta.import_pylo(rnn)


def test_pylo_celo2() -> None:
    theta = Theta.import_jax(celo2_arrays())
    found = Theta.import_pylo(pylo_celo2(celo2_arrays()))
    assert found.spec == theta.spec
    assert_same_bits(found.tensors, theta.tensors)


def test_what_is_not_pylos(tmp_path: Path) -> None:
    (tmp_path / "text.pt").write_text("no file of torch")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save(nn.Linear(2, 2), tmp_path / "module.pt")
    refused: list[tuple[Any, dict[str, Any], str]] = [
        ({"a.weight": torch.zeros(2)}, {}, "import_pylo: expected the state dict of a network of PyLO .*'?a.weight"),
        (pylo_celo2(celo2_arrays()), {"optimizer": "VeLO"}, r"import_pylo: expected the state dict .* \(VeLO\)"),
        ({}, {"optimizer": "Adam"}, "optimizer: expected one of .*'AdafacLO'.* got 'Adam'"),
        (tmp_path / "text.pt", {}, "text.pt is no readable file of torch.save"),
        (tmp_path / "list.pt", {}, "list.pt holds a list, expected a state dict"),
        (tmp_path / "module.pt", {}, "module.pt is no readable file of torch.save"),  # nothing in it is run
    ]
    for source, options, message in refused:
        with pytest.raises(ValueError, match=message):
            Theta.import_pylo(source, **options)
    with pytest.raises(FileNotFoundError):
        Theta.import_pylo(tmp_path / "absent.pt")
    with pytest.raises(ValueError, match="spec: no constant 'lr'; there are mlp_width, "):
        Theta.import_pylo(pylo_celo2(celo2_arrays())).with_spec(lr=0.1)
