"""Fine-tune a causal language model with Hugging Face's Trainer: evaluation, checkpoints, and going on after a stop.

python examples/finetune_hf.py --out out/finetune [--model FOLDER] [--text FILE_OR_FOLDER] [--steps 300]

Without ``--model`` it is a small Llama that reads bytes, made here, so that nothing is downloaded; with it, a model and
tokenizer that ``save_pretrained`` wrote. The text is Python's standard library unless another is given. Started again
with the same ``--out``, it goes on from the last checkpoint, to the same bits as without the stop.

Needs: pip install transformers accelerate
"""

import argparse
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint, set_seed

from lopt import LearnedOptimizer
from lopt.integrations import TransformersCallback

LENGTH = 128  # tokens of a window


def read(text: str | None) -> str:
    """A file, or all Python files of a folder, one after the other."""
    path = Path(text or os.__file__)
    files = [path] if text and path.is_file() else sorted((path if text else path.parent).glob("*.py"))
    return "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files)


def model_and_tokens(folder: str | None, text: str) -> tuple[Any, Tensor]:
    """A model, and the text as its tokens ``[n]``."""
    if folder is not None:
        tokens = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt", verbose=False)["input_ids"][0]
        return AutoModelForCausalLM.from_pretrained(folder), tokens
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=256, max_position_embeddings=LENGTH, bos_token_id=None, eos_token_id=None, **sizes)
    return LlamaForCausalLM(config), torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()


def windows(tokens: Tensor) -> list[dict[str, Tensor]]:
    """The tokens in pieces of ``LENGTH``, as the trainer wants them; the model shifts the labels itself."""
    return [{"input_ids": part, "labels": part} for part in tokens[: len(tokens) // LENGTH * LENGTH].split(LENGTH)]


def main(
    out: str,
    steps: int = 300,
    evaluate_every: int = 50,
    model: str | None = None,
    text: str | None = None,
    seed: int = 0,
) -> float:
    """Train to step ``steps``, and return the loss on the last tenth of the text, which is not trained on."""
    set_seed(seed)
    network, tokens = model_and_tokens(model, read(text))
    split = len(tokens) * 9 // 10
    arguments = TrainingArguments(
        out,
        max_steps=steps,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        per_device_eval_batch_size=64,
        eval_strategy="steps",
        eval_steps=evaluate_every,
        save_steps=evaluate_every,
        save_total_limit=2,
        logging_steps=evaluate_every,
        lr_scheduler_type="constant",  # and no learning rate: steps become shorter by themselves
        max_grad_norm=0.0,  # the optimizer clips by itself
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
        disable_tqdm=True,
        seed=seed,
    )
    trainer = Trainer(
        network,
        arguments,
        train_dataset=windows(tokens[:split]),
        eval_dataset=windows(tokens[split:])[:256],
        optimizers=(LearnedOptimizer(network), None),  # the model itself, so that embedding and head are known
        callbacks=[TransformersCallback()],  # training and validation losses, and the number of steps
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(out) if Path(out).is_dir() else None)
    trainer.save_model()
    loss: float = trainer.evaluate()["eval_loss"]
    print(f"{steps} steps: validation loss {loss:.3f} nats per token")
    return loss


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder of the checkpoints and the model")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--evaluate-every", type=int, default=50)
    parser.add_argument("--model", help="folder of a model with its tokenizer; a small one is made if none is given")
    parser.add_argument("--text", help="a file, or a folder of Python files; the standard library if none is given")
    parser.add_argument("--seed", type=int, default=0)
    main(**vars(parser.parse_args()))
