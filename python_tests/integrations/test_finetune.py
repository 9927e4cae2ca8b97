"""examples/finetune_hf.py, as it is, at toy size."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLE = Path(__file__).parents[2] / "examples/finetune_hf.py"
MISSING = [name for name in ("transformers", "accelerate") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)}"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]


@pytest.fixture
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("finetune_hf", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.py"
    path.write_text(Path(os.__file__).with_name("argparse.py").read_text(encoding="utf-8"), encoding="utf-8")
    return path


def test_it_learns_and_goes_on_from_a_checkpoint(example: ModuleType, text: Path, tmp_path: Path) -> None:
    """Better than the distribution of single bytes, whose entropy is known; resumed in the middle, to the same bits."""
    counts = torch.frombuffer(bytearray(text.read_bytes()), dtype=torch.uint8).bincount(minlength=256).double()
    entropy = torch.special.entr(counts / counts.sum()).sum().item()
    out = tmp_path / "out"
    loss = example.main(str(out), 16, 8, text=str(text))
    assert loss < entropy - 0.2
    model = (out / "model.safetensors").read_bytes()
    shutil.rmtree(out / "checkpoint-16")
    (out / "model.safetensors").unlink()
    assert example.main(str(out), 16, 8, text=str(text)) == loss
    assert (out / "model.safetensors").read_bytes() == model


def test_a_model_and_its_tokenizer_from_a_folder(example: ModuleType, text: Path, tmp_path: Path) -> None:
    """Its weights are where training begins: a step later they are near, as those of another model would not be."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train([str(text)], trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False))
    given = tmp_path / "given"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(given)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=300, max_position_embeddings=128, **sizes))
    model.save_pretrained(given)
    example.main(str(tmp_path / "out"), 1, 1, model=str(given), text=str(text))
    trained = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert trained.config.vocab_size == 300
    moved = (trained.lm_head.weight - model.lm_head.weight).norm() / model.lm_head.weight.norm()
    assert 0.0 < float(moved.detach()) < 0.3


def test_as_a_script(text: Path, tmp_path: Path) -> None:
    options = ["--out", str(tmp_path / "out"), "--text", str(text), "--steps", "2", "--evaluate-every", "1"]
    done = subprocess.run([sys.executable, str(EXAMPLE), *options], capture_output=True, text=True, check=True)
    assert "\n2 steps: validation loss " in done.stdout
    assert "Warning" not in done.stderr
