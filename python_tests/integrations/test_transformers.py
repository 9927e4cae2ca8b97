"""Runs of a few steps with ``transformers.Trainer``: what the optimizer sees, against a loop by hand; resuming."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from seen_optimizer import Seen
from torch import Tensor, nn

MISSING = [name for name in ("transformers", "accelerate") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)}"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]

STEPS, EVERY = 8, 2
VOCABULARY, LENGTH = 17, 12


def sentences(count: int, seed: int) -> list[dict[str, Tensor]]:
    """Of different lengths: what is padded counts in no loss."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        text = torch.randint(VOCABULARY, (LENGTH,), generator=generator)
        labels = text.clone()
        labels[int(torch.randint(4, LENGTH + 1, (), generator=generator)) :] = -100
        found.append({"input_ids": text, "labels": labels})
    return found


TRAIN, VALID = sentences(48, 0), {"a": sentences(5, 1), "b": sentences(8, 2)}


def language_model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=LENGTH, **sizes))


def trainer_of(
    folder: Path, model: nn.Module | None = None, valid: Any = VALID["a"], callback: Any = None, **changes: Any
) -> tuple[Any, Seen]:
    from transformers import Trainer, TrainingArguments

    from lopt.integrations import TransformersCallback

    model = language_model() if model is None else model
    optimizer = Seen(model)
    more = {name: changes.pop(name) for name in ("compute_loss_func",) if name in changes}
    arguments = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 4,
        "gradient_accumulation_steps": 3,
        "lr_scheduler_type": "constant",
        "eval_strategy": "steps",
        "eval_steps": EVERY,
        "save_steps": EVERY,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **changes,
    }
    trainer = Trainer(
        model,
        TrainingArguments(str(folder), **arguments),
        train_dataset=TRAIN,
        eval_dataset=valid,
        optimizers=(optimizer, None),
        callbacks=[TransformersCallback() if callback is None else callback],
        **more,
    )
    return trainer, optimizer


def batches(trainer: Any) -> list[dict[str, Tensor]]:
    """The minibatches that the trainer takes, in order."""
    found: list[dict[str, Tensor]] = []
    original = trainer.training_step
    trainer.training_step = lambda model, inputs, *args, **kwargs: (
        found.append({name: value.clone() for name, value in inputs.items()}),
        original(model, inputs, *args, **kwargs),
    )[1]
    return found


def token_loss(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
    """The summed cross-entropy of the next tokens, and their number."""
    logits, labels = model(input_ids=batch["input_ids"]).logits[:, :-1], batch["labels"][:, 1:]
    summed = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
    return summed, int((labels != -100).sum())


def stack(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def valid_loss(model: Any, rows: list[dict[str, Tensor]]) -> float:
    """As the trainer has it: the mean over rows of the mean over the tokens of a batch of four."""
    with torch.no_grad():
        groups = [rows[i : i + 4] for i in range(0, len(rows), 4)]
        total = 0.0
        for group in groups:
            summed, count = token_loss(model, stack(group))
            total += float(summed / count) * len(group)
    return total / len(rows)


def by_hand(taken: list[dict[str, Tensor]], valid: list[list[dict[str, Tensor]]], clip: float = 1.0) -> Any:
    """The same run as a loop in plain PyTorch: mean over all tokens of a step."""
    model = language_model()
    optimizer = Seen(model, total_steps=STEPS)
    for step in range(STEPS):
        parts = [token_loss(model, batch) for batch in taken[3 * step : 3 * step + 3]]
        loss = sum(summed for summed, _ in parts) / sum(count for _, count in parts)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.observe(train_loss=loss)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % EVERY == 0:
            optimizer.observe(valid_loss=sum(valid_loss(model, rows) for rows in valid) / len(valid))
    return model, optimizer


@pytest.mark.parametrize("names", ["a", "ab"])
def test_it_sees_what_a_loop_by_hand_sees(names: str, tmp_path: Path) -> None:
    """Accumulated gradients of minibatches with different numbers of tokens; one evaluation set, and two."""
    valid = VALID["a"] if names == "a" else VALID
    trainer, seen = trainer_of(tmp_path, valid=valid, save_strategy="no")
    taken = batches(trainer)
    trainer.train()
    model, expected = by_hand(taken, [VALID[name] for name in names])
    assert seen.total_steps == STEPS
    assert seen.train == pytest.approx(expected.train, rel=2e-6)
    assert [step for step, _ in seen.valid] == [step for step, _ in expected.valid] == [2, 4, 6, 8]
    assert [loss for _, loss in seen.valid] == pytest.approx([loss for _, loss in expected.valid], rel=2e-6)
    for a, b in zip(trainer.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


class Regression(nn.Module):
    """A model that is not one of the library's: it knows nothing of the minibatches of a step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Embedding(VOCABULARY, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": nn.functional.mse_loss(self.layers(input_ids)[..., 0], labels.clamp(min=0).float())}


def test_a_mean_over_minibatches_where_the_trainer_divides_by_their_number(tmp_path: Path) -> None:
    """24 minibatches in groups of 5, of which the last has 4: two epochs of five steps."""
    trainer, seen = trainer_of(tmp_path, Regression(), max_steps=10, gradient_accumulation_steps=5, save_strategy="no")
    taken = batches(trainer)
    trainer.train()
    model = Regression()
    optimizer = Seen(model, total_steps=10)
    groups = [taken[first : min(first + 5, end)] for end in (24, 48) for first in range(end - 24, end, 5)]
    assert [len(group) for group in groups] == [5, 5, 5, 5, 4] * 2
    for step, group in enumerate(groups):
        for batch in group:
            loss = model(**batch)["loss"]
            (loss / len(group)).backward()
            optimizer.observe(train_loss=loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % EVERY == 0:
            with torch.no_grad():
                rows = VALID["a"]
                parts = [(float(model(**stack(rows[i : i + 4]))["loss"]), len(rows[i : i + 4])) for i in (0, 4)]
            optimizer.observe(valid_loss=sum(loss * n for loss, n in parts) / len(rows))
    assert seen.train == pytest.approx(optimizer.train, rel=1e-6)
    assert [loss for _, loss in seen.valid] == pytest.approx([loss for _, loss in optimizer.valid], rel=1e-6)


def squared(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """A loss that the script computes: of the mean logits, so that outputs hold no loss of their own."""
    return outputs["logits"].square().sum() / (num_items_in_batch or 1.0)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"label_smoothing_factor": 0.1}, id="smoothing"),
        pytest.param({"compute_loss_func": squared}, id="compute_loss_func"),
        pytest.param({"bf16": True}, id="bf16"),
        pytest.param({"gradient_accumulation_steps": 1}, id="one"),
    ],
)
def test_it_sees_the_loss_that_the_trainer_reports(changes: dict[str, Any], tmp_path: Path) -> None:
    """Whoever computes it."""
    trainer, seen = trainer_of(tmp_path, logging_steps=1, save_strategy="no", eval_strategy="no", **changes)
    trainer.train()
    reported = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(reported) == STEPS
    assert seen.train == pytest.approx(reported, rel=1e-6)
    assert seen.valid == []


@pytest.mark.parametrize("eval_on_start", [False, True])
def test_a_resumed_run_equals_an_uninterrupted_one(eval_on_start: bool, tmp_path: Path) -> None:
    """To the bit: parameters, all that the optimizer keeps, and what it was told."""
    trainer, whole = trainer_of(tmp_path, valid=VALID, eval_on_start=eval_on_start)
    trainer.train()
    assert [step for step, _ in whole.valid] == [*([0] if eval_on_start else []), 2, 4, 6, 8]
    for later in (6, 8):
        shutil.rmtree(tmp_path / f"checkpoint-{later}")
    again, rest = trainer_of(tmp_path, valid=VALID, eval_on_start=eval_on_start)
    again.train(resume_from_checkpoint=True)
    assert rest.train == whole.train[4:]
    assert [(4 + step, loss) for step, loss in rest.valid] == whole.valid[-2:]
    assert rest.total_steps == whole.total_steps == STEPS
    for a, b in zip(again.model.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(a, b)
    expected = whole.state_dict()["param_groups"][0]
    for name, value in rest.state_dict()["param_groups"][0].items():
        if isinstance(value, Tensor):
            assert torch.equal(value, expected[name])


def test_a_run_that_is_made_longer(tmp_path: Path) -> None:
    """The optimizer is told the new number of steps, by the same trainer and by another one."""
    trainer, seen = trainer_of(tmp_path, max_steps=2)
    trainer.train()
    assert seen.total_steps == 2
    trainer.args.max_steps = 4
    trainer.train(resume_from_checkpoint=True)
    assert (seen.total_steps, len(seen.train)) == (4, 4)
    again, longer = trainer_of(tmp_path, max_steps=5)
    again.train(resume_from_checkpoint=True)
    assert (longer.total_steps, len(longer.train)) == (5, 1)
    assert longer.state_dict()["param_groups"][0]["total_steps"] == 5


def test_one_of_several_evaluation_sets(tmp_path: Path) -> None:
    from lopt.integrations import TransformersCallback

    trainer, seen = trainer_of(tmp_path, valid=VALID, callback=TransformersCallback("eval_b_loss"), save_strategy="no")
    trainer.train()
    reported = [entry["eval_b_loss"] for entry in trainer.state.log_history if "eval_b_loss" in entry]
    assert [loss for _, loss in seen.valid] == reported
    assert len(reported) == 4


def test_outside_of_training_nothing_is_told(tmp_path: Path) -> None:
    """Not by an evaluation before or after, nor by a trainer that broke off; and it is as it was before."""
    trainer, seen = trainer_of(tmp_path, save_strategy="no", eval_strategy="no", logging_steps=1)
    taken = batches(trainer)  # by a method of this trainer's own, which stays
    before = trainer.training_step
    trainer.evaluate()
    trainer.train()
    trainer.evaluate()
    assert seen.valid == []
    assert trainer.training_step is before
    assert len(taken) == 3 * STEPS

    whole = trainer.model.forward
    trainer.model.forward = None
    with pytest.raises(TypeError, match="NoneType"):
        trainer.train()
    trainer.model.forward = whole
    seen.train.clear()
    trainer.train()
    reported = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert seen.train == pytest.approx(reported, rel=1e-6)


def test_two_processes(tmp_path: Path) -> None:
    """Each hands over its own losses, and the step takes their mean: once, as the trainer reports it."""
    script = [str(Path(__file__).with_name("ranks_of_transformers.py")), str(tmp_path)]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *script]
    path = os.pathsep.join(
        [str(Path(__file__).parent), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    )
    subprocess.run(launch, env={**os.environ, "PYTHONPATH": path}, check=True, capture_output=True)
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert ranks[0]["parameters"] == ranks[1]["parameters"]
    for told in ranks:
        assert len(told["train"]) == 3
        assert told["train"] == pytest.approx(ranks[0]["reported"], rel=1e-6)
        assert told["valid"] == pytest.approx(ranks[0]["evaluated"], rel=1e-6)


def test_an_optimizer_that_the_trainer_makes(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    from lopt.integrations import TransformersCallback

    options = {"lr_scheduler_type": "constant", "max_steps": 3, "logging_steps": 1, "dataloader_pin_memory": False}
    trainer = Trainer(
        language_model(),
        TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", save_strategy="no", **options),
        train_dataset=TRAIN,
        optimizer_cls_and_kwargs=(Seen, {}),
        callbacks=[TransformersCallback],
    )
    trainer.train()
    reported = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert trainer.optimizer.optimizer.train == pytest.approx(reported, rel=1e-6)
    assert trainer.optimizer.optimizer.total_steps == 3


def test_what_is_written_for_other_optimizers(tmp_path: Path) -> None:
    """The default schedule is warned about; another optimizer is refused; ``total_steps`` stays as a script says."""
    from transformers import Trainer, TrainingArguments

    from lopt.integrations import TransformersCallback

    trainer, seen = trainer_of(tmp_path, save_strategy="no", lr_scheduler_type="linear", max_steps=1)
    seen.total_steps = 100
    with pytest.warns(UserWarning, match="write lr_scheduler_type='constant'"):
        trainer.train()
    assert seen.total_steps == 100
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", max_steps=1)
    other = Trainer(Regression(), arguments, train_dataset=TRAIN, callbacks=[TransformersCallback()])
    with pytest.raises(TypeError, match=r"expected a LearnedOptimizer, got AdamW; write Trainer\(..., optimizers="):
        other.train()
