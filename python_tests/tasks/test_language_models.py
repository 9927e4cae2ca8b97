"""Language models as people write them: against torch's own layers, and what attention with rotated positions is."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lopt.tasks import task_from_config
from lopt.tasks.language_models import Decoder, Kind, Start, rotated
from lopt.tasks.text_tasks import TextData

TEXT = TextData("markov", variant=1, vocabulary=128, length=17, batch_size=3)
KINDS: list[Kind] = ["gpt", "llama"]


def task(kind: Kind, start: Start = "torch") -> Decoder:
    return Decoder(data=TEXT, kind=kind, start=start, width=24, heads=3)


@pytest.mark.parametrize("kind", KINDS)
def test_shapes(kind: Kind) -> None:
    """Twelve matrices of width x width a block; the vocabulary twice; gpt also has positions and biases."""
    one = task(kind)
    blocks = sum(math.prod(shape) for name, shape in one.shapes.items() if "blocks" in name and len(shape) == 2)
    assert blocks == 2 * 12 * 24**2
    outside = {name: shape for name, shape in one.shapes.items() if "blocks" not in name}
    expected: dict[str, tuple[int, ...]] = {"embedding.weight": (128, 24), "norm.weight": (24,)}
    if kind == "gpt":
        expected |= {"positions.weight": (16, 24), "norm.bias": (24,), "head.bias": (128,)}
    assert outside == {**expected, "head.weight": (128, 24)}
    assert any(name.endswith("bias") for name in one.shapes) == (kind == "gpt")
    assert {name: tuple(value.shape) for name, value in one.init(0).items()} == one.shapes


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_decides_everything_and_the_global_generator_nothing(kind: Kind) -> None:
    first = task(kind).init(3)
    torch.manual_seed(123)
    before = torch.random.get_rng_state()
    again, other = task_from_config(task(kind).config).init(3), task(kind).init(4)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["embedding.weight"], other["embedding.weight"])
    rows = [next(task(kind).batches(seed, "train")) for seed in (5, 5, 6)]
    assert torch.equal(rows[0].inputs, rows[1].inputs)
    assert not torch.equal(rows[0].inputs, rows[2].inputs)
    assert torch.equal(rows[0].inputs[:, 1:], rows[0].targets[:, :-1])
    assert task_from_config(task(kind).config) == task(kind)


def test_starts() -> None:
    wide = Decoder(data=TEXT, kind="gpt", width=128)
    small, usual = wide.init(0), Decoder(data=TEXT, kind="gpt", width=128, start="torch").init(0)
    for name, value in small.items():
        if value.ndim == 2:
            added = name.endswith(("out.weight", "down.weight"))
            assert value.std().item() == pytest.approx(0.01 if added else 0.02, rel=0.05), name
        else:
            assert value.unique().tolist() == [0.0 if name.endswith("bias") else 1.0], name
    assert usual["embedding.weight"].std().item() == pytest.approx(1.0, rel=0.05)
    for name in ("blocks.0.qkv.weight", "blocks.1.down.weight", "head.weight"):
        bound = 1 / math.sqrt(usual[name].shape[1])
        assert 0.99 * bound < usual[name].abs().max().item() <= bound


def test_gpt_against_torchs_encoder() -> None:
    one = task("gpt")
    params, batch = one.init(0), next(one.batches(0, "train"))
    layer = nn.TransformerEncoderLayer(24, 3, 96, 0.0, "gelu", batch_first=True, norm_first=True)
    x = functional.embedding(batch.inputs, params["embedding.weight"]) + params["positions.weight"]
    names = {
        "norm0": "norm1",
        "norm1": "norm2",
        "qkv.weight": "self_attn.in_proj_weight",
        "qkv.bias": "self_attn.in_proj_bias",
        "out": "self_attn.out_proj",
        "up": "linear1",
        "down": "linear2",
    }
    for block in range(2):
        state = {}
        for name, value in params.items():
            if name.startswith(f"blocks.{block}."):
                inner = name.removeprefix(f"blocks.{block}.")
                part = inner if inner in names else inner.split(".")[0]
                state[inner.replace(part, names[part])] = value
        layer.load_state_dict(state)
        x = layer(x, src_mask=nn.Transformer.generate_square_subsequent_mask(16), is_causal=True)
    x = functional.layer_norm(x, (24,), params["norm.weight"], params["norm.bias"])
    logits = functional.linear(x, params["head.weight"], params["head.bias"])
    expected = functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
    torch.testing.assert_close(one.loss(params, batch), expected, rtol=1e-5, atol=1e-5)


def test_llama_by_hand() -> None:
    one = task("llama")
    params, batch = one.init(0), next(one.batches(0, "train"))

    def norm(x: Tensor, gain: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt() * gain

    x = params["embedding.weight"][batch.inputs]
    for block in range(2):
        p = {name.removeprefix(f"blocks.{block}."): value for name, value in params.items()}
        q, k, v = (norm(x, p["norm0.weight"]) @ p["qkv.weight"].T).reshape(3, 16, 3, 3, 8).permute(2, 0, 3, 1, 4)
        scores = rotated(q) @ rotated(k).transpose(-1, -2) / math.sqrt(8)
        scores = scores.masked_fill(torch.ones(16, 16).triu(1).bool(), -math.inf)
        x = x + (scores.softmax(-1) @ v).transpose(1, 2).flatten(2) @ p["out.weight"].T
        y = norm(x, p["norm1.weight"])
        gate = y @ p["gate.weight"].T
        x = x + (gate * gate.sigmoid() * (y @ p["up.weight"].T)) @ p["down.weight"].T
    logits = norm(x, params["norm.weight"]) @ params["head.weight"].T
    expected = functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
    torch.testing.assert_close(one.loss(params, batch), expected, rtol=1e-5, atol=1e-5)


def test_rotated_positions_count_by_their_difference() -> None:
    q, k = torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(0))
    turned = (rotated(part.expand(12, 8)) for part in (q, k))
    scores = next(turned) @ next(turned).T  # [place of q, place of k]
    for distance in range(12):
        line = scores.diagonal(distance)
        torch.testing.assert_close(line, line[:1].expand_as(line), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scores[0, 0], (q @ k.T).squeeze())
    assert scores[0, 1].item() != pytest.approx(scores[1, 0].item(), rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_character_does_not_see_those_after_it(kind: Kind) -> None:
    one = task(kind)
    params, inputs = one.init(0), next(one.batches(0, "train")).inputs
    changed = inputs.clone()
    changed[:, 9:] = 65
    first, second = one.run(params, inputs), one.run(params, changed)
    torch.testing.assert_close(first[:, :9], second[:, :9])
    assert not torch.allclose(first[:, 9:], second[:, 9:])


@pytest.mark.parametrize("kind", KINDS)
def test_losses_can_be_vmapped(kind: Kind) -> None:
    one = task(kind, "small")
    batch = next(one.batches(0, "train"))
    inits = [one.init(seed) for seed in range(3)]
    stacked = {name: torch.stack([params[name] for params in inits]) for name in inits[0]}
    losses = torch.func.vmap(lambda params: one.loss(params, batch))(stacked)
    torch.testing.assert_close(losses, torch.stack([one.loss(params, batch) for params in inits]))
    assert losses.tolist() == pytest.approx([math.log(128)] * 3, rel=0.05)
