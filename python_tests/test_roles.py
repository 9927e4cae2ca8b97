"""Which matrices are a model's input or output, as models, names, groups and lists say it."""

import copy
from typing import Any

import pytest
import torch
from optimizer_cases import assert_same_bits, make_theta, snapshot
from torch import nn
from torch.distributed.checkpoint import state_dict as distributed

from lopt import LearnedOptimizer
from lopt.roles import kinds_of_groups, role_of_name, roles_of_model
from lopt.rule.matrices import Kind

NAMES = {
    "input": [
        "wte.weight",
        "transformer.wpe.weight",
        "model.embed_tokens.weight",
        "bert.embeddings.word_embeddings.weight",
        "embedding.weight",
        "embed",
        "tok_emb.weight",
        "position_embeddings",
        "patch_embed.proj.weight",
        "blocks.emb_0",
    ],
    "output": [
        "lm_head.weight",
        "head.weight",
        "heads.head.weight",
        "classifier.weight",
        "classifier.1.weight",
        "unembed",
    ],
    None: [
        "h.0.mlp.c_fc.weight",
        "layers.3.self_attn.out_proj.weight",
        "multihead_attn.in_proj_weight",  # torch's own decoder layers
        "layers.0.multihead_attn.out_proj.weight",
        "attention.multihead.in_proj_weight",
        "blocks.0.sa.heads.1.key.weight",
        "ahead_of.weight",
        "header.weight",
        "member.weight",
        "",
        "0.weight",
        "conv1.weight",
    ],
}


@pytest.mark.parametrize("role", NAMES)
def test_names(role: str | None) -> None:
    assert {name: role_of_name(name) for name in NAMES[role]} == dict.fromkeys(NAMES[role], role)  # type: ignore[index]


class Language(nn.Module):
    """Embeddings of symbols and places, blocks, norm and head, in an order in which the head is registered first."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.lm_head = nn.Linear(8, 30, bias=False)
        self.parts = nn.ModuleDict({"wte": nn.Embedding(30, 8), "wpe": nn.Embedding(5, 8)})
        self.blocks = nn.ModuleList([nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(2)])
        self.norm = nn.LayerNorm(8)
        if tied:
            self.lm_head.weight = self.parts["wte"].weight  # type: ignore[assignment]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.parts["wte"](x) + self.parts["wpe"](torch.arange(x.shape[1]))
        for block in self.blocks:
            hidden = block(hidden)
        out: torch.Tensor = self.lm_head(self.norm(hidden))
        return out


def matrices_with(roles: dict[str, Any], role: str | None, model: nn.Module) -> set[str]:
    return {name for name, param in model.named_parameters() if param.dim() >= 2 and roles[name] == role}


def test_a_model_with_tied_weights() -> None:
    """The shared table is input, wherever its name was found first; of the rest nothing is output but by type."""
    model = Language(tied=True)
    roles = roles_of_model(model)
    assert matrices_with(roles, "input", model) == {"lm_head.weight", "parts.wpe.weight"}
    assert matrices_with(roles, None, model) == set()


def test_a_model_with_a_head_of_its_own() -> None:
    """The head is output wherever it was registered; the last block is not."""
    model = Language(tied=False)
    roles = roles_of_model(model)
    assert matrices_with(roles, "input", model) == {"parts.wte.weight", "parts.wpe.weight"}
    assert matrices_with(roles, "output", model) == {"lm_head.weight"}
    assert len(matrices_with(roles, "hidden", model)) == 2 * 4


def test_other_models() -> None:
    bag = nn.Sequential(nn.EmbeddingBag(30, 8), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    assert roles_of_model(bag) == {
        "0.weight": "input",
        "1.weight": "hidden",
        "1.bias": "hidden",
        "3.weight": "output",
        "3.bias": "hidden",
    }
    vision = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 10))
    assert set(roles_of_model(vision).values()) == {None}  # the gate judges
    lstm = nn.ModuleDict({"embed": nn.Embedding(30, 8), "lstm": nn.LSTM(8, 8), "decoder": nn.Linear(8, 30)})
    assert roles_of_model(lstm)["lstm.weight_hh_l0"] == "hidden"
    assert roles_of_model(lstm)["decoder.weight"] == "output"
    learned = nn.ModuleDict({"tokens": nn.Embedding(30, 8), "head": nn.Linear(8, 8)})
    learned.register_parameter("pos_embed", nn.Parameter(torch.zeros(1, 5, 8)))
    assert roles_of_model(learned)["pos_embed"] == "input"
    assert roles_of_model(nn.ReLU()) == {}


def kinds(opt: LearnedOptimizer, model: nn.Module) -> dict[str, str | None]:
    """Roles of the matrices by name."""
    params = [param for group in opt.param_groups for param in group["params"]]
    found = dict(zip(params, kinds_of_groups(opt.param_groups), strict=True))
    return {name: found[param].role for name, param in model.named_parameters() if param.dim() >= 2}


def test_what_the_optimizer_is_given() -> None:
    """A model, named parameters, parameters, groups of either: what each tells about the same model."""
    model, theta = Language(tied=False), make_theta("spectral")
    told = kinds(LearnedOptimizer(model, theta), model)
    assert told == {name: role for name, role in roles_of_model(model).items() if name in told}
    assert {"hidden", "input", "output"} == set(told.values())
    named = kinds(LearnedOptimizer(model.named_parameters(), theta), model)
    assert named == {name: role_of_name(name) for name in told}
    assert {name for name, role in named.items() if role} == {"lm_head.weight", "parts.wte.weight", "parts.wpe.weight"}
    assert set(kinds(LearnedOptimizer(model.parameters(), theta), model).values()) == {None}
    params = list(model.parameters())
    opt = LearnedOptimizer([{"params": params[:3], "role": "input"}, {"params": params[3:]}], theta)
    assert [kind.role for kind in kinds_of_groups(opt.param_groups)][:3] == ["input"] * 3


def test_kinds_of_groups() -> None:
    """A key says more than a name; of vectors nothing is known; only what has two dimensions can be transposed."""
    shapes = [(4, 6), (6,), (3, 2, 2), (5, 7)]
    params = [torch.nn.Parameter(torch.ones(shape)) for shape in shapes]
    names = ["lm_head.weight", "lm_head.bias", "wte.weight", "x"]
    assert kinds_of_groups([{"params": params, "param_names": names}]) == [
        *(Kind("output"), Kind(), Kind("input"), Kind())
    ]
    assert kinds_of_groups([{"params": params, "param_names": names, "role": "hidden", "transposed": True}]) == [
        *(Kind("hidden", 4), Kind(), Kind("hidden"), Kind("hidden", 5))
    ]
    lists = {"role": ["input", "input", None, "output"], "transposed": [False, True, True, True]}
    assert kinds_of_groups([{"params": params, "param_names": names, **lists}]) == [
        *(Kind("input"), Kind(), Kind("input"), Kind("output", 5))
    ]
    assert kinds_of_groups([{"params": params[:1]}, {"params": params[3:], "role": "input"}]) == [Kind(), Kind("input")]


BAD_GROUPS: list[tuple[dict[str, Any], str]] = [
    (
        {"role": "embedding"},
        r"role: expected one of \('input', 'hidden', 'output', None\), or a list of these, got 'embed",
    ),
    ({"role": ["input"]}, "role: expected one for each of the 2 parameters of the group, got 1"),
    ({"role": ["input", 3]}, "role: expected one of .*, got 3"),
    ({"transposed": "yes"}, r"transposed: expected one of \(True, False\), or a list of these, got 'yes'"),
    ({"transposed": [True, None]}, "transposed: expected one of .*, got None"),
    ({"transposed": [True] * 3}, "transposed: expected one for each of the 2 parameters of the group, got 3"),
]


@pytest.mark.parametrize(("group", "message"), BAD_GROUPS)
def test_what_is_no_role_is_refused(group: dict[str, Any], message: str) -> None:
    params = [torch.nn.Parameter(torch.ones(2, 3)) for _ in range(4)]
    with pytest.raises(ValueError, match=message):
        LearnedOptimizer([{"params": params[:2], **group}], make_theta("spectral"))
    opt = LearnedOptimizer(params[2:], make_theta("spectral"))
    with pytest.raises(ValueError, match=message):
        opt.add_param_group({"params": params[:2], **group})
    assert len(opt.param_groups) == 1


def train(model: nn.Module, opt: LearnedOptimizer, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        x = torch.randint(30, (4, 5), generator=generator)
        loss = nn.functional.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
        opt.zero_grad()
        loss.backward()
        opt.step(loss=loss.detach())


@pytest.fixture
def language() -> Language:
    torch.manual_seed(0)
    return Language(tied=True).eval()  # without dropout


def test_a_model_trains_as_its_groups_say(language: Language) -> None:
    """The same bits as of parameters with the same roles in a list, and others than of bare parameters."""
    others = [copy.deepcopy(language) for _ in range(2)]
    role = list(roles_of_model(language).values())
    given: list[Any] = [
        language,
        [{"params": list(others[0].parameters()), "role": role}],
        others[1].parameters(),
    ]
    for model, params in zip((language, *others), given, strict=True):
        train(model, LearnedOptimizer(params, make_theta("spectral")), 3)
    first, second, third = ([param.detach() for param in model.parameters()] for model in (language, *others))
    assert_same_bits(first, second)
    assert not torch.equal(first[0], third[0])


def test_roles_are_in_state_dicts(language: Language) -> None:
    """So bare parameters go on as the model did; also through torch's distributed state dicts."""
    opt = LearnedOptimizer(language, make_theta("spectral"))
    train(language, opt, 2)
    for through_dcp in (False, True):
        model = copy.deepcopy(language)
        other = LearnedOptimizer(model if through_dcp else model.parameters(), make_theta("spectral"))
        if through_dcp:
            saved = distributed.get_optimizer_state_dict(language, opt)
            distributed.set_optimizer_state_dict(model, other, copy.deepcopy(saved))
        else:
            other.load_state_dict(copy.deepcopy(opt.state_dict()))
        going_on = copy.deepcopy((language, opt))
        for each, optimizer in (going_on, (model, other)):
            train(each, optimizer, 2, first=2)
        expected, found = (snapshot(optimizer) for optimizer in (going_on[1], other))
        assert_same_bits(found["params"], expected["params"])
        assert_same_bits(found["state"], expected["state"])


def test_roles_are_shown_in_short(language: Language) -> None:
    """Not one for each of hundreds of parameters."""
    shown = repr(LearnedOptimizer(language, make_theta("spectral")))
    assert "role: 2 input, 26 hidden" in shown
    assert len(shown.splitlines()) < 12
