"""Models of the families against torch.nn, and initial values against their variances."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lopt.tasks import sample_task
from lopt.tasks.attention import SMALL, Transformer, VisionTransformer
from lopt.tasks.convolutions import ConvFC, ConvPooling, _same_padding
from lopt.tasks.families import with_batch_size
from lopt.tasks.image_tasks import ImageData
from lopt.tasks.network import attention
from lopt.tasks.perceptrons import MLP, VAE, Autoencoder
from lopt.tasks.pieces import INITIALISERS, Initialiser, initial_values
from lopt.tasks.recurrent import Core, RecurrentClassifier
from lopt.tasks.seeds import generator
from lopt.tasks.task import Batch, NoisyBatch
from lopt.tasks.text_tasks import TextData

HE = Initialiser("he_normal")
DATA = ImageData(name="shapes", variant=1, batch_size=5)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_mlp_against_torch() -> None:
    task = MLP(data=DATA, hidden=(7, 6), activation="leaky_relu2", initialiser=HE, center=True)
    params, batch = task.init(0), next(task.batches(0, "train"))
    model = nn.Sequential(nn.Flatten())
    for layer, (fan_in, fan_out) in enumerate(zip(task.sizes[:-1], task.sizes[1:], strict=True)):
        linear = nn.Linear(fan_in, fan_out)
        linear.weight.data, linear.bias.data = params[f"w{layer}"].T, params[f"b{layer}"]
        model.extend([linear, nn.LeakyReLU(0.2)] if layer < 2 else [linear])
    close(task.loss(params, batch), functional.cross_entropy(model(2 * batch.inputs - 1), batch.targets))


@pytest.mark.parametrize("total", [False, True])
@pytest.mark.parametrize(("output", "error"), [("tanh", "l2"), ("sigmoid", "l1"), ("linear_center", "l2")])
def test_autoencoder_by_hand(output: str, error: str, total: bool) -> None:
    task = Autoencoder(
        data=DATA,
        hidden=(9,),
        activation="cos",
        initialiser=HE,
        output=output,
        error=error,
        total=total,  # type: ignore[arg-type]
    )
    params, batch = task.init(0), next(task.batches(0, "train"))
    x = batch.inputs.flatten(1)
    x = x if output == "sigmoid" else 2 * x - 1
    y = torch.cos(x @ params["w0"] + params["b0"]) @ params["w1"] + params["b1"]
    y = {"tanh": torch.tanh, "sigmoid": torch.sigmoid, "linear_center": lambda v: v}[output](y)
    errors = (y - x) ** 2 if error == "l2" else (y - x).abs()
    close(task.loss(params, batch), errors.sum() / 5 if total else errors.mean())


def test_elbo_of_a_linear_vae_is_the_analytic_value() -> None:
    """With linear maps, the expectation over codes and grey levels is known, and attained by many draws of noise.

    m = W z + b, constant s and t: E (x + u - m)^2 = (x - W mu - b)^2 + sum_j W_j^2 e^2s_j + Var u; KL as it stands.
    """
    data = ImageData(name="mixture", variant=1, batch_size=4000)
    task = VAE(data=data, encoder=(3,), decoder=(), activation="relu", initialiser=Initialiser("glorot_normal"))
    params = {name: value.double() for name, value in task.init(0).items()}
    size = data.size
    params["encoder.w0"][:, 3:] = 0.0
    params["encoder.b0"][3:] = torch.tensor([-1.0, -0.5, 0.2], dtype=torch.float64)
    params["decoder.w0"][:, size:] = 0.0
    params["decoder.b0"][size:] = -0.7
    first = next(task.batches(0, "train"))
    x = first.inputs[:1].double().flatten(1)
    batch = NoisyBatch(first.inputs[:1].double().expand(4000, -1, -1, -1), first.targets, first.noise.double())
    mu, s, weight = x @ params["encoder.w0"][:, :3], params["encoder.b0"][3:], params["decoder.w0"][:, :size]
    squares = (x - mu @ weight - params["decoder.b0"][:size]).square() + torch.exp(2 * s) @ weight.square()
    squares = squares + 1 / 12 / 255**2
    log_p = -squares * math.exp(1.4) / 2 + 0.7 - math.log(2 * math.pi) / 2 - math.log(255)
    kl = (mu.square() + torch.exp(2 * s) - 1 - 2 * s).sum() / 2
    elbo = float(log_p.sum() - kl)
    assert float(task.loss(params, batch)) == pytest.approx(-elbo, rel=0.01)


@pytest.mark.parametrize("pool", ["mean", "max", "squared_mean"])
@pytest.mark.parametrize("bias", [True, False])
def test_conv_pooling_against_torch(pool: str, bias: bool) -> None:
    task = ConvPooling(
        data=DATA,
        channels=(4, 6, 5),
        strides=(1, 2, 1),
        same=(True, False, True),
        activation="elu",
        initialiser=HE,
        bias=bias,
        pool=pool,  # type: ignore[arg-type]
    )
    params, batch = task.init(0), next(task.batches(0, "train"))
    convolutions = nn.Sequential()
    channels = (1, 4, 6, 5)
    for layer, (stride, padding) in enumerate(((1, 1), (2, 0), (1, 1))):
        convolution = nn.Conv2d(channels[layer], channels[layer + 1], 3, stride, padding, bias=bias)
        convolution.weight.data = params[f"conv.w{layer}"]
        if bias:
            params[f"conv.b{layer}"] = torch.linspace(-1, 1, channels[layer + 1])
            convolution.bias.data = params[f"conv.b{layer}"]  # type: ignore[union-attr]
        convolutions.extend([convolution, nn.ELU()])
    x = convolutions(batch.inputs)
    pooled = {
        "mean": nn.AdaptiveAvgPool2d(1)(x),
        "max": nn.AdaptiveMaxPool2d(1)(x),
        "squared_mean": nn.AdaptiveAvgPool2d(1)(x**2),
    }[pool].flatten(1)
    close(task.loss(params, batch), functional.cross_entropy(pooled @ params["w0"] + params["b0"], batch.targets))


@pytest.mark.parametrize(("stride", "side"), [(1, 16), (2, 16), (2, 15), (1, 7), (2, 2), (2, 1)])
def test_same_padding_shrinks_by_the_stride_only(stride: int, side: int) -> None:
    """As in TensorFlow: ceil(side / stride) is left, and a spare row of zeros is at the end."""
    before, after = _same_padding(side, stride)
    assert (side + before + after - 3) // stride + 1 == -(-side // stride)
    assert after - before in (0, 1)


def test_conv_fc_against_torch() -> None:
    task = ConvFC(
        data=DATA,
        channels=(3, 4),
        strides=(1, 1),
        same=(True, False),
        activation="tanh",
        initialiser=HE,
        dense=(11,),
    )
    params, batch = task.init(0), next(task.batches(0, "train"))
    x = batch.inputs
    for layer, padding in enumerate((1, 0)):
        x = torch.tanh(functional.conv2d(x, params[f"conv.w{layer}"], params[f"conv.b{layer}"], padding=padding))
    head = nn.Sequential(nn.Flatten(), nn.Linear(task.top[0], 11), nn.Tanh(), nn.Linear(11, task.data.num_classes))
    for layer, linear in enumerate((head[1], head[3])):
        linear.weight.data, linear.bias.data = params[f"w{layer}"].T, params[f"b{layer}"]
    close(task.loss(params, batch), functional.cross_entropy(head(x), batch.targets))


def core_params(core: Core, inputs: int) -> dict[str, Tensor]:
    random = generator(3)
    params = {name: initial_values(HE, random, shape) for name, (shape, _) in core.layout(inputs).items()}
    params["core.b"] = torch.linspace(-0.5, 0.5, len(params["core.b"]))
    if core.trainable_start:
        params["core.start"].zero_()
    return params


@pytest.mark.parametrize("function", ["tanh", "relu"])
def test_vrnn_against_torch(function: str) -> None:
    core = Core("vrnn", 6, (HE, HE), function)
    params, x = core_params(core, 4), torch.randn(3, 7, 4, generator=torch.Generator().manual_seed(0))
    cell = nn.RNNCell(4, 6, nonlinearity=function)
    cell.weight_ih.data, cell.weight_hh.data = params["core.W"].T, params["core.U"].T
    cell.bias_ih.data, cell.bias_hh.data = params["core.b"], torch.zeros(6)
    compare(core, params, x, lambda inputs, h: cell(inputs, h), torch.zeros(3, 6))


def test_gru_against_torch() -> None:
    """PyTorch's rows are r, z, n; ours z, r, n."""
    core = Core("gru", 6, (HE,) * 6)
    params, x = core_params(core, 4), torch.randn(3, 7, 4, generator=torch.Generator().manual_seed(0))
    cell = nn.GRUCell(4, 6)
    for ours, theirs in (("W", cell.weight_ih), ("U", cell.weight_hh)):
        theirs.data = torch.cat([params[f"core.{ours}{gate}"].T for gate in "rzn"])
    z, r, n = params["core.b"].chunk(3)
    cell.bias_ih.data, cell.bias_hh.data = torch.cat([r, z, n]), torch.zeros(18)
    compare(core, params, x, lambda inputs, h: cell(inputs, h), torch.zeros(3, 6))


def test_lstm_against_torch() -> None:
    """PyTorch's rows are i, f, g, o; ours i, g, f, o, with 1 added to f."""
    core = Core("lstm", 6, (HE,))
    params, x = core_params(core, 4), torch.randn(3, 7, 4, generator=torch.Generator().manual_seed(0))
    cell = nn.LSTMCell(4, 6)
    i, g, f, o = params["core.WU"].T.chunk(4)
    weight = torch.cat([i, f, g, o])
    cell.weight_ih.data, cell.weight_hh.data = weight[:, :4], weight[:, 4:]
    i, g, f, o = params["core.b"].chunk(4)
    cell.bias_ih.data, cell.bias_hh.data = torch.cat([i, f + 1, g, o]), torch.zeros(24)
    state = (torch.zeros(3, 6), torch.zeros(3, 6))
    expected = []
    for at in range(7):
        state = cell(x[:, at], state)
        expected.append(state[0])
    close(core.run(params, x), torch.stack(expected, dim=1))


def compare(core: Core, params: dict[str, Tensor], x: Tensor, cell: object, h: Tensor) -> None:
    expected = []
    for at in range(x.shape[1]):
        h = cell(x[:, at], h)  # type: ignore[operator]
        expected.append(h)
    close(core.run(params, x), torch.stack(expected, dim=1))


@pytest.mark.parametrize("kind", ["vrnn", "gru", "lstm"])
def test_trainable_start_is_the_state_before_the_first_symbol(kind: str) -> None:
    initialisers = {"vrnn": 2, "gru": 6, "lstm": 1}
    plain, core = (Core(kind, 5, (HE,) * initialisers[kind], trainable_start=start) for start in (False, True))  # type: ignore[arg-type]
    params = core_params(core, 3)
    x = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(0))
    close(core.run(params, x), plain.run(params, x))
    if kind == "vrnn":
        params["core.start"] = plain.run(params, x[:1, :1])[0, 0]
        close(core.run(params, x[:1, 1:]), plain.run(params, x[:1])[:, 1:])


@pytest.mark.parametrize("readout", ["last", "avg", "max"])
def test_classifier_reads_the_states(readout: str) -> None:
    task = RecurrentClassifier(
        data=TextData(name="babble", words=True, vocabulary=50, length=6, batch_size=4),
        embedding=5,
        core=Core("vrnn", 6, (HE, HE)),
        initialiser=HE,
        readout=readout,  # type: ignore[arg-type]
    )
    params, batch = task.init(0), next(task.batches(0, "train"))
    states = task.core.run(params, params["embedding"][batch.inputs])
    state = {"last": states[:, -1], "avg": states.mean(1), "max": states.max(1).values}[readout]
    close(task.loss(params, batch), functional.cross_entropy(state @ params["w0"] + params["b0"], batch.targets))


@pytest.mark.parametrize("words", [False, True])
def test_language_model_loss_is_nats_per_symbol(words: bool) -> None:
    """All logits equal: the loss is the logarithm of the vocabulary."""
    family = "word_rnn_language_model" if words else "char_rnn_language_model"
    task = with_batch_size(sample_task(3, [family]), 4, 8)
    params = task.init(0)
    params["w0"].zero_()
    vocabulary = params["b0"].numel()
    assert float(task.loss(params, next(task.batches(0, "test")))) == pytest.approx(math.log(vocabulary), rel=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_against_torch(causal: bool) -> None:
    q, k, v = torch.randn(3, 2, 4, 9, 8, generator=torch.Generator().manual_seed(0))
    close(attention(q, k, v, causal), functional.scaled_dot_product_attention(q, k, v, is_causal=causal))


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_block_against_torch(norm_first: bool, causal: bool) -> None:
    transformer = Transformer(2, 4, 6, 2, "gelu", SMALL, norm_first)
    random = generator(1)
    params = {
        name: initial_values(Initialiser("random_normal", 0.3), random, shape)
        for name, (shape, _) in transformer.layout().items()
    }
    x = torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(0))
    expected = x
    for block in ("block0.", "block1."):
        layer = nn.TransformerEncoderLayer(24, 4, 48, 0.0, "gelu", batch_first=True, norm_first=norm_first)
        layer.self_attn.in_proj_weight.data = params[f"{block}qkv.w0"].T
        layer.self_attn.in_proj_bias.data = params[f"{block}qkv.b0"]
        pairs = (
            (layer.self_attn.out_proj, "out.", 0),
            (layer.linear1, "mlp.", 0),
            (layer.linear2, "mlp.", 1),
        )
        for linear, name, number in pairs:
            linear.weight.data = params[f"{block}{name}w{number}"].T
            linear.bias.data = params[f"{block}{name}b{number}"]
        for norm, name in ((layer.norm1, "norm0."), (layer.norm2, "norm1.")):
            norm.weight.data, norm.bias.data = params[f"{block}{name}gain"], params[f"{block}{name}bias"]
        mask = nn.Transformer.generate_square_subsequent_mask(5) if causal else None
        expected = layer(expected, src_mask=mask)
    expected = functional.layer_norm(expected, (24,), params["norm.gain"], params["norm.bias"])
    torch.testing.assert_close(transformer.run(params, x, causal), expected, rtol=1e-4, atol=1e-4)


def test_squares_of_an_image() -> None:
    task = VisionTransformer(data=DATA, transformer=Transformer(1, 1, 8, 2, "gelu", SMALL), grid=3)
    images = torch.arange(2 * 16 * 16, dtype=torch.float32).reshape(2, 1, 16, 16)
    middle = (images * 2 - 1)[:, :, :15, :15]
    expected = functional.unfold(middle, 5, stride=5).transpose(1, 2)
    assert torch.equal(task.squares(images), expected)


@pytest.mark.parametrize("shape", [(40, 60), (30, 20, 3, 3)])
@pytest.mark.parametrize("name", INITIALISERS)
def test_initial_values_have_the_variance_they_say(name: str, shape: tuple[int, ...]) -> None:
    scale = 2.5
    values = initial_values(Initialiser(name, scale), generator(0), shape).double()
    fan_in, fan_out = (40, 60) if len(shape) == 2 else (180, 270)
    variance = {
        "he_normal": 2 / fan_in,
        "he_uniform": 2 / fan_in,
        "glorot_normal": 2 / (fan_in + fan_out),
        "glorot_uniform": 2 / (fan_in + fan_out),
        "random_uniform": scale**2 / 3,
        "random_normal": scale**2,
        "truncated_normal": scale**2,
        "variance_scaling": scale / fan_in,
        "constant": scale**2,
    }
    if name == "orthogonal":
        flat = values.flatten(1) / scale
        close(flat @ flat.T, torch.eye(len(flat), dtype=torch.float64))
    else:
        assert float(values.square().mean()) == pytest.approx(variance[name], rel=0.08)


def test_batches_of_images_are_rows_of_their_split() -> None:
    data = ImageData(name="shapes", variant=1, batch_size=50, train_share=0.1, just_train=False)
    rows = data.rows("train")
    assert len(rows.targets) == 280
    known = {row.numpy().tobytes() for row in rows.inputs}
    batch: Batch = next(data.batches(0, "train"))
    assert {(255 * row).round().to(torch.uint8).numpy().tobytes() for row in batch.inputs} <= known
    just_train = ImageData(name="shapes", variant=1, just_train=True)
    assert torch.equal(just_train.rows("test").inputs, just_train.rows("train").inputs)
