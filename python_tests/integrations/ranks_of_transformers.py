"""One of the processes of test_transformers.py: a few steps with transformers' Trainer on its share of the data.

Writes to FOLDER/RANK.json what the optimizer saw, what the trainer reported, and the sum of all parameters' bits.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

from test_transformers import trainer_of


def main(folder: Path) -> None:
    rank = os.environ["RANK"]
    options = {"max_steps": 3, "eval_steps": 1, "logging_steps": 1, "save_strategy": "no"}
    trainer, seen = trainer_of(folder / rank, **options)
    trainer.train()
    digest = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in trainer.model.parameters()))
    history = trainer.state.log_history
    told = {
        "train": seen.train,
        "valid": [loss for _, loss in seen.valid],
        "reported": [entry["loss"] for entry in history if "loss" in entry],
        "evaluated": [entry["eval_loss"] for entry in history if "eval_loss" in entry],
        "parameters": digest.hexdigest(),
    }
    (folder / f"{rank}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
