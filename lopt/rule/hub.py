"""Thetas on the Hugging Face Hub: a repository of type model with the theta file and a card (extra ``hub``)."""

import hashlib
import json
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lopt.rule.theta import Theta

FILE = "theta.safetensors"
CARD = "README.md"


def push(
    theta: "Theta[Any]",
    repo_id: str,
    *,
    scores: Mapping[str, float] | None,
    revision: str | None,
    token: str | bool | None,
    private: bool | None,
    commit_message: str,
) -> str:
    """See :meth:`lopt.Theta.push_to_hub`."""
    package = require()
    content = theta.to_bytes()
    api = package.HfApi(token=token)
    name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id  # with the user's name, if it had none
    if revision is not None:
        api.create_branch(name, branch=revision, exist_ok=True)
    files = {FILE: content, CARD: card(theta, name, scores, hashlib.sha256(content).hexdigest()).encode()}
    operations = [package.CommitOperationAdd(path, file) for path, file in files.items()]
    done = api.create_commit(name, operations, commit_message=commit_message, revision=revision)
    return str(done.commit_url)


def pull(
    repo_id: str, *, filename: str, revision: str | None, token: str | bool | None, local_files_only: bool
) -> Path:
    """The file of a repository, in the cache of the hub's library; see :meth:`lopt.Theta.from_hub`."""
    wanted: dict[str, Any] = {"revision": revision, "token": token, "local_files_only": local_files_only}
    return Path(require().hf_hub_download(repo_id, filename, **wanted))


def require() -> Any:
    """The hub's library.

    Raises:
        ModuleNotFoundError: it is not installed; with the extra that brings it.
    """
    try:
        return import_module("huggingface_hub")
    except ModuleNotFoundError as error:
        text = f"hub: {error.name} is missing; pip install 'lopt[hub]'"
        raise ModuleNotFoundError(text, name=error.name) from error


def card(theta: "Theta[Any]", repo_id: str, scores: Mapping[str, float] | None, sha256: str) -> str:
    """The model card: what it is, how to use it, how it was made, and its scores."""
    made = theta.provenance
    config = made.get("config") or {}
    validation = made.get("validation") or {}
    facts = {
        "meta-parameters": f"{theta.num_floats:,}",
        "rule": getattr(theta.spec, "name", None),
        "feature set": getattr(theta.spec, "feature_set", None),
        "sha256 of the file": sha256,
        "made by": made.get("method"),
        "recipe": config.get("recipe"),
        "begun from": config.get("init", made.get("preset")),
        "tasks": _names(config.get("tasks")),
        "inner steps": f"{made['inner_steps']:,}" if "inner_steps" in made else None,
        "CPU hours": f"{made['cpu_seconds'] / 3600:.2f}" if "cpu_seconds" in made else None,
        "versions": ", ".join(f"{name} {version}" for name, version in made.get("versions", {}).items()),
        "commit of lopt": made.get("commit"),
    }
    told = {
        "validation at the start (mean log of final loss / initial loss)": validation.get("first"),
        "validation of this theta": validation.get("best"),
        **(scores or {}),
    }
    return f"""---
library_name: lopt
tags:
- learned-optimizer
- meta-learning
- pytorch
---
# {repo_id}

The weights of a learned optimizer for PyTorch, to be used with `lopt`.

```python
from lopt import LearnedOptimizer, Theta

optimizer = LearnedOptimizer(model, Theta.from_hub("{repo_id}"))
```

## How it was made

{_table(("", "value"), {name: value for name, value in facts.items() if value})}

## Scores

{_table(("score", "value"), {name: f"{value:.4g}" for name, value in told.items() if value is not None}) or "None."}

## Provenance

```json
{json.dumps(made, indent=1)}
```
"""


def _names(tasks: Any) -> str:
    """What the tasks of a configuration are called."""
    if isinstance(tasks, Mapping):
        tasks = tasks.get("own", tasks.get("families", []))
    return ", ".join(str(task["name"] if isinstance(task, Mapping) else task) for task in tasks or [])


def _table(header: tuple[str, str], rows: Mapping[str, Any]) -> str:
    if not rows:
        return ""
    lines = [header, ("---", "---"), *((name, str(value).replace("|", "\\|")) for name, value in rows.items())]
    return "\n".join(f"| {name} | {value} |" for name, value in lines)
