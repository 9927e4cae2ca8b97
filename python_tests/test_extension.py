"""What lopt does where the compiled modules are missing or do not fit: lopt/kernels/extension.py."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lopt import kernels
from lopt.kernels import extension
from lopt.rule import PRESETS

# Run in a process of its own: three steps of an optimizer and a window of an unroll, and what was said meanwhile.
HIDDEN = """
import json, sys, warnings
sys.modules["lopt._C"] = sys.modules["lopt._sim"] = None  # as if they had not been built

import torch
from optimizer_cases import make_grads, make_params, make_theta
from lopt import LearnedOptimizer
from lopt.meta import inner
from lopt.meta.unroll import Run
from lopt.tasks.synthetic import sample_task

def steps(**options):
    params = make_params()
    opt = LearnedOptimizer(params, make_theta(), **options)
    for step in range(3):
        for param, grad in zip(params, make_grads(params, step)):
            param.grad = grad
        opt.step(loss=2.0 / (1 + step))
    return opt.implementation, [param.detach().flatten().tolist() for param in params]

with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    auto, again = steps(), steps()
    task = sample_task(3, ("mixture",))
    theta, run = make_theta(), Run(task, 0, 4)
    flat = theta.flatten()[None]
    losses = inner.unroll(theta.spec, flat, run, inner.start(theta.spec, flat, run), 0, 4)[1].train.tolist()
errors = []
for impl in ("cpu", "cuda", "sim"):
    try:
        steps(impl=impl)
    except RuntimeError as error:
        errors.append(str(error))
from lopt.cli import main
print(json.dumps({"doctor": main(["doctor"]),
    "warnings": [(str(one.message), one.filename) for one in said], "errors": errors,
    "auto": auto, "reference": steps(impl="reference"), "losses": losses,
}))
"""


@pytest.fixture(scope="module")
def hidden() -> dict[str, Any]:
    """What the program above prints."""
    path = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    done = subprocess.run([sys.executable, "-c", path + HIDDEN], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *page, last = done.stdout.splitlines()
    result: dict[str, Any] = json.loads(last)
    return {**result, "page": " ".join(" ".join(page).split())}


def test_without_the_extension_auto_is_the_reference_and_says_so_once(hidden: dict[str, Any]) -> None:
    assert hidden["auto"] == hidden["reference"]
    assert hidden["auto"][0] == "reference"
    ((message, filename),) = hidden["warnings"]
    assert "lopt was not built" in message
    assert "run: pip install --no-build-isolation --no-deps -e ." in message
    assert filename == "<string>"  # the line that made the optimizer


def test_without_the_extension_an_explicit_choice_is_refused_with_the_remedy(hidden: dict[str, Any]) -> None:
    assert len(hidden["errors"]) == 3
    for impl, message in zip(("cpu", "cuda", "sim"), hidden["errors"], strict=True):
        assert message.startswith(f"backend {impl!r}: lopt was not built")
        assert "run: pip install --no-build-isolation --no-deps -e ." in message


def test_without_the_extension_unrolls_go_by_the_reference(hidden: dict[str, Any]) -> None:
    from optimizer_cases import make_theta

    from lopt.meta import inner
    from lopt.meta.unroll import Run
    from lopt.tasks.synthetic import sample_task

    theta, run = make_theta(), Run(sample_task(3, ("mixture",)), 0, 4)
    flat = theta.flatten()[None]
    _, losses = inner.unroll(theta.spec, flat, run, inner.start(theta.spec, flat, run), 0, 4)  # by the engine
    torch.testing.assert_close(torch.tensor(hidden["losses"]), losses.train, rtol=1e-5, atol=1e-6)


def test_without_the_extension_doctor_says_so(hidden: dict[str, Any]) -> None:
    assert hidden["doctor"] == 0
    assert "kernels: none, impl='auto' is the reference: lopt was not built" in hidden["page"]
    assert hidden["page"].count("not here: lopt was not built") == 3 * len(PRESETS)


def test_sim_is_refused_where_it_is_missing_or_of_other_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "_sim", extension._sim.__wrapped__)  # without its memory
    monkeypatch.setitem(sys.modules, "lopt._sim", None)
    with pytest.raises(RuntimeError, match=r"it was not built .* LOPT_SIM=ON pip install"):
        kernels.module_of("sim")
    monkeypatch.setitem(sys.modules, "lopt._sim", SimpleNamespace(source_sha256="another"))  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r"built from other sources than lopt._C.*LOPT_SIM=ON pip install"):
        kernels.module_of("sim")


def test_the_compiled_modules_serve_their_back_ends_only() -> None:
    for backend, others in (("cpu", ["sim"]), ("sim", ["cpu", "cuda"])):
        module = kernels.module_of(backend)
        for other in others:
            with pytest.raises(ValueError, match=f"back end '{other}' is not part of this build"):
                module.write_words(other, 0, [], 0, 0)


def test_only_the_door_imports_the_compiled_modules() -> None:
    root = Path(kernels.__file__).parents[1]
    importing = re.compile(r"^\s*(from lopt import .*\b_(C|sim)\b|(import|from) lopt\._(C|sim)\b)", re.MULTILINE)
    found = [file for file in root.rglob("*.py") if importing.search(file.read_text())]
    assert found == [root / "kernels/extension.py"]
