"""Runs of a few steps with Lightning's Trainer and with Fabric: what the optimizer sees, against a loop by hand."""

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from seen_optimizer import Seen
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lopt.integrations import watch_loss

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("lightning") is None, reason="needs lightning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:Checkpoint directory"),
]

BATCHES, MICRO = 12, 3  # in an epoch, and in a step


def batch(seed: int, rows: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 4, generator=generator)
    return x, x.prod(dim=1, keepdim=True)


TRAIN = [batch(seed) for seed in range(BATCHES)]
VALID = [[batch(100, 8), batch(101, 8), batch(102, 3)], [batch(103, 5)]]


def loader(batches: Any) -> DataLoader[Any]:
    return DataLoader(batches, batch_size=None)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def valid_loss(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> float:
    with torch.no_grad():
        total = sum(nn.functional.mse_loss(model(x), y) * len(x) for x, y in batches)
        return float(total / sum(len(x) for x, _ in batches))


def module_of(library: Any, **methods: Any) -> Any:
    """A LightningModule, with automatic optimization unless ``methods`` say otherwise."""

    class Module(library.LightningModule):  # type: ignore[name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.network = network()

        def training_step(self, rows: Any, index: int) -> Tensor:
            return nn.functional.mse_loss(self.network(rows[0]), rows[1])

        def validation_step(self, rows: Any, index: int, dataloader_idx: int = 0) -> None:
            loss = nn.functional.mse_loss(self.network(rows[0]), rows[1])
            self.log("val_loss", loss, batch_size=len(rows[0]))

        def configure_optimizers(self) -> Any:
            self.seen = Seen(self)
            return self.seen

    for name, method in methods.items():
        setattr(Module, name, method)
    return Module()


def trainer_of(library: Any, folder: Path, callback: Any = None, **changes: Any) -> Any:
    from lopt.integrations import LightningCallback

    options = {
        "max_epochs": 4,
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "accumulate_grad_batches": MICRO,
        "num_sanity_val_steps": 2,
        "gradient_clip_val": 1.0,
        "default_root_dir": folder,
        **changes,
    }
    callbacks = [*options.pop("callbacks", []), LightningCallback() if callback is None else callback]
    return library.Trainer(callbacks=callbacks, **options)


def by_hand(sets: int, epochs: int = 4) -> tuple[nn.Module, Seen]:
    model = network()
    optimizer = Seen(model, total_steps=epochs * BATCHES // MICRO)
    for _ in range(epochs):
        for index, (x, y) in enumerate(TRAIN):
            loss = nn.functional.mse_loss(model(x), y)
            (loss / MICRO).backward()
            optimizer.observe(train_loss=loss)
            if index % MICRO == MICRO - 1:
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        optimizer.observe(valid_loss=sum(valid_loss(model, rows) for rows in VALID[:sets]) / sets)
    return model, optimizer


@pytest.mark.parametrize("name", ["lightning.pytorch", "pytorch_lightning"])
@pytest.mark.parametrize("sets", [1, 2])
def test_it_sees_what_a_loop_by_hand_sees(name: str, sets: int, tmp_path: Path) -> None:
    """Accumulated gradients, one and two validation sets, sanity checks, and both names of the library."""
    library = importlib.import_module(name)
    module = module_of(library)
    trainer = trainer_of(library, tmp_path)
    trainer.fit(module, loader(TRAIN), [loader(rows) for rows in VALID[:sets]])
    model, expected = by_hand(sets)
    seen = module.seen
    assert seen.total_steps == 16
    assert seen.train == pytest.approx(expected.train, rel=1e-6)
    assert [step for step, _ in seen.valid] == [4, 8, 12, 16]
    assert [loss for _, loss in seen.valid] == pytest.approx([loss for _, loss in expected.valid], rel=1e-6)
    for a, b in zip(module.network.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    trainer.validate(module, loader(VALID[0]), verbose=False)
    assert len(seen.valid) == 4


def test_a_scaled_loss_is_told_without_its_scale(tmp_path: Path) -> None:
    """float16 on the CPU, with a scaler that multiplies by 1024; as the module computed it."""
    import lightning.pytorch as library
    from lightning.pytorch.plugins import MixedPrecision

    computed: list[Tensor] = []

    def training_step(self: Any, rows: Any, index: int) -> Tensor:
        loss = nn.functional.mse_loss(self.network(rows[0]), rows[1])
        computed.append(loss.detach())
        return loss

    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))
    module = module_of(library, training_step=training_step)
    trainer_of(library, tmp_path, max_epochs=1, plugins=[plugin], gradient_clip_val=None).fit(
        module, loader(TRAIN), loader(VALID[0])
    )
    means = torch.stack(computed).float().reshape(-1, MICRO).mean(1).tolist()
    assert module.seen.train == pytest.approx(means, rel=1e-6)


def test_two_optimizers_by_hand(tmp_path: Path) -> None:
    """Each sees its own losses, the shares of minibatches multiplied; a third one, of torch, is let alone."""
    import lightning.pytorch as library

    from lopt.integrations import LightningCallback

    told: list[list[float]] = [[], []]

    def configure_optimizers(self: Any) -> Any:
        self.automatic_optimization = False
        first, _, last = self.network
        self.seen = [Seen(first), Seen(last)]
        return [*self.seen, torch.optim.SGD(self.network.parameters(), lr=0.0)]

    def training_step(self: Any, rows: Any, index: int) -> None:
        *ours, other = self.optimizers()
        for which, optimizer in enumerate(ours):
            losses = [
                (1.0 + which) * nn.functional.mse_loss(self.network(rows[0]), rows[1] + part) for part in range(2)
            ]
            for loss in losses:
                self.manual_backward(loss / 2)
            optimizer.step()
            optimizer.zero_grad()
            told[which].append(sum(loss.item() for loss in losses) / 2)
        self.manual_backward(nn.functional.mse_loss(self.network(rows[0]), rows[1]))
        other.step()
        other.zero_grad()

    module = module_of(library, configure_optimizers=configure_optimizers, training_step=training_step)
    options: dict[str, Any] = {"accumulate_grad_batches": 1, "gradient_clip_val": None, "max_epochs": 1}
    trainer_of(library, tmp_path, LightningCallback(scale=2.0), **options).fit(module, loader(TRAIN), loader(VALID[0]))
    for which, optimizer in enumerate(module.seen):
        assert optimizer.train == pytest.approx(told[which], rel=1e-6)
        assert [step for step, _ in optimizer.valid] == [BATCHES]
        assert optimizer.total_steps is None  # how often a module steps is its own business


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    """To the bit, from a checkpoint that Lightning wrote after a validation; sanity checks run again."""
    import lightning.pytorch as library
    from lightning.pytorch.callbacks import ModelCheckpoint

    def fit(path: Path | None) -> Any:
        saving = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
        module = module_of(library)
        trainer_of(library, tmp_path, callbacks=[saving], enable_checkpointing=True).fit(
            module, loader(TRAIN), loader(VALID[0]), ckpt_path=path
        )
        return module

    whole = fit(None)
    rest = fit(tmp_path / "epoch=1.ckpt")
    assert rest.seen.train == whole.seen.train[8:]
    assert [(8 + step, loss) for step, loss in rest.seen.valid] == whole.seen.valid[2:]
    assert rest.seen.total_steps == 16
    for a, b in zip(rest.parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b)
    expected = whole.seen.state_dict()["param_groups"][0]
    for name, value in rest.seen.state_dict()["param_groups"][0].items():
        if isinstance(value, Tensor):
            assert torch.equal(value, expected[name])


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    import lightning.pytorch as library

    from lopt.integrations import LightningCallback

    module = module_of(library)
    with pytest.warns(UserWarning, match=r"logs no 'loss' in validation, but \['val_loss'\]; write LightningCallback"):
        trainer_of(library, tmp_path, LightningCallback("loss"), max_epochs=1).fit(
            module, loader(TRAIN), loader(VALID[0])
        )
    assert module.seen.valid == []
    other = module_of(library, configure_optimizers=lambda self: torch.optim.Adam(self.parameters()))
    with pytest.raises(TypeError, match="expected a LearnedOptimizer among the module's optimizers, got Adam; return"):
        trainer_of(library, tmp_path).fit(other, loader(TRAIN), loader(VALID[0]))


@pytest.mark.parametrize("divided", [False, True])
def test_fabric(divided: bool, tmp_path: Path) -> None:
    """Its backward is watched, and for validation the model; a checkpoint in the middle is resumed to the bit."""
    import lightning

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network()

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return nn.functional.mse_loss(self.network(x), y)

    def train(epochs: range, resume: Path | None = None, save: Path | None = None) -> tuple[Any, Seen]:
        fabric = lightning.Fabric(accelerator="cpu", devices=1)
        inner = Model()
        seen = Seen(inner)
        model, optimizer = fabric.setup(inner, seen)
        optimizer.total_steps = 16  # through Fabric's wrapper
        if resume is not None:
            fabric.load(resume, {"model": model, "optimizer": optimizer})
        watch_loss(fabric, optimizer, scale=MICRO if divided else 1.0)
        for epoch in epochs:
            for index, (x, y) in enumerate(TRAIN):
                loss = model(x, y)
                fabric.backward(loss / MICRO if divided else loss)
                if index % MICRO == MICRO - 1:
                    fabric.clip_gradients(model, optimizer, max_norm=1.0)
                    optimizer.step()
                    optimizer.zero_grad()
            optimizer.observe(valid_loss=valid_loss(inner.network, VALID[0]))
            if save is not None and epoch == 1:
                fabric.save(save, {"model": model, "optimizer": optimizer})
        return inner.network, seen

    whole_network, whole = train(range(4), save=tmp_path / "half.ckpt")
    rest_network, rest = train(range(2, 4), resume=tmp_path / "half.ckpt")
    assert rest.train == whole.train[8:]
    for a, b in zip(rest_network.parameters(), whole_network.parameters(), strict=True):
        assert torch.equal(a, b)
    if divided:
        _, expected = by_hand(1)
        assert whole.train[:4] == pytest.approx(expected.train[:4], rel=1e-6)
