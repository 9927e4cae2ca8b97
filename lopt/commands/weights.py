"""``lopt weights``: look at meta-parameters, convert those of others, take what lies between two thetas."""

import dataclasses
import hashlib
import json
import math
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from lopt.commands.common import Command, Outcome, OutFile, json_settings, say, show_table
from lopt.provenance import commit
from lopt.rule import WEIGHTS, Theta, shipped


@dataclass(frozen=True, kw_only=True)
class Show(Command):
    """Show a theta: spec, tensors, where it comes from. Without an argument, list the shipped ones."""

    theta: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[THETA]")] = None
    """A shipped name or a file."""

    def run(self, console: Console) -> Outcome:
        if self.theta is not None:
            theta = Theta.load(self.theta)
            return Outcome(0, _show(console, _file(self.theta), theta))
        rows = []
        numbers = {}
        for name in shipped():
            path = WEIGHTS / f"{name}.safetensors"
            theta = Theta.load(path)
            rows.append([name, theta.spec.preset, f"{theta.num_floats:,}", provenance_text(theta)])
            numbers[name] = _facts(path, theta)
        show_table(console, ["name", "feature set", "floats", "provenance"], rows)
        return Outcome(0, {"command": "weights show", "shipped": numbers})


@dataclass(frozen=True, kw_only=True)
class Convert(Command):
    """Convert meta-parameters of others to a theta file: of google/learned_optimization (flax, .npz), or PyLO's state
    dicts (.pt, .pth, .bin, .safetensors). The rule is recognised by their arrays."""

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """File to read."""

    dest: Annotated[OutFile, tyro.conf.Positional, tyro.conf.arg(metavar="DEST")]
    """File to write; its name ends in .safetensors."""

    also: tuple[Path, ...] = ()
    """More files of the same optimizer: PyLO has VeLO in two."""

    optimizer: str | None = None
    """Its name in PyLO, where several have the same network: ELO."""

    set: tuple[str, ...] = ()
    """Constants that are in no file, as NAME=VALUE with the value in JSON, for instance step_multiplier=0.01."""

    def run(self, console: Console) -> Outcome:
        _check_dest(self.dest)
        sources = (self.source, *self.also)
        pylo = self.source.suffix in (".pt", ".pth", ".bin", ".safetensors")
        if not pylo and (self.also or self.optimizer):
            raise ValueError(f"also, optimizer: are for state dicts of PyLO, and {self.source} is none by its name")
        theta = Theta.import_pylo(*sources, optimizer=self.optimizer) if pylo else Theta.import_jax(self.source)
        theta = theta.with_spec(**json_settings(self.set))
        origin = {
            "source": ", ".join(path.name for path in sources),
            "source_sha256": ", ".join(map(_sha256, sources)),
        }
        theta = dataclasses.replace(theta, provenance={**theta.provenance, **origin})
        self.dest.parent.mkdir(parents=True, exist_ok=True)
        theta.save(self.dest)
        return Outcome(0, {**_show(console, self.dest, theta), "command": "weights convert"})


@dataclass(frozen=True, kw_only=True)
class Interpolate(Command):
    """Write a theta that is a share of the way from one to another, such as back to where meta-training began."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """A shipped name or a file."""

    other: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OTHER")]
    """Another of the same spec, or adam: the imitation of Adam that meta-training begins with."""

    dest: Annotated[OutFile, tyro.conf.Positional, tyro.conf.arg(metavar="DEST")]
    """File to write; its name ends in .safetensors."""

    share: float = 0.5
    """How far: 0 gives SOURCE, 1 gives OTHER."""

    def run(self, console: Console) -> Outcome:
        _check_dest(self.dest)
        if not math.isfinite(self.share):
            raise ValueError(f"share: expected a number, 0 for SOURCE to 1 for OTHER, got {self.share}")
        theta = Theta.load(self.source)
        adam = self.other == "adam"
        other = Theta.init_adam(theta.spec.preset) if adam else Theta.load(self.other)
        origin = {
            "method": "interpolate",
            "command": shlex.join(["lopt", *sys.argv[1:]]),
            "share": self.share,
            "source_sha256": _sha256(_file(self.source)),
            "other_sha256": None if adam else _sha256(_file(self.other)),
            "source": theta.provenance,
            "other": other.provenance,
            "commit": commit(),
        }
        theta = dataclasses.replace(theta.toward(other, self.share), provenance=origin)
        self.dest.parent.mkdir(parents=True, exist_ok=True)
        theta.save(self.dest)
        return Outcome(0, {**_show(console, self.dest, theta), "command": "weights interpolate"})


def provenance_text(theta: Theta) -> str:
    """Where a theta comes from, in one line: the plain values of its provenance."""
    plain = {name: value for name, value in theta.provenance.items() if isinstance(value, (str, int, float))}
    return ", ".join(f"{name} {value}" for name, value in plain.items()) or "origin not recorded"


def describe_theta(name: str, theta: Theta) -> str:
    """One line that says which theta this is and how it came about; lopt weights show NAME says all of it."""
    method = theta.provenance.get("method", "origin not recorded")
    return f"theta {name} ({theta.num_floats:,} floats, {theta.spec.preset}, {method})"


def _facts(path: Path, theta: Theta) -> dict[str, Any]:
    return {
        "path": path,
        "sha256": _sha256(path),
        "num_floats": theta.num_floats,
        "spec": theta.spec.to_json(),
        "provenance": theta.provenance,
        "shapes": {name: list(shape) for name, shape in theta.spec.shapes().items()},
    }


def _check_dest(dest: Path) -> None:
    if dest.suffix != ".safetensors":
        raise ValueError(f"dest: expected a name that ends in .safetensors, got {str(dest)!r}")


def _file(source: str) -> Path:
    return Path(source) if Path(source).is_file() else WEIGHTS / f"{source}.safetensors"


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _show(console: Console, path: Path, theta: Theta) -> dict[str, Any]:
    facts = _facts(path, theta)
    say(console, f"{path}: {theta.num_floats:,} floats, sha256 {facts['sha256']}")
    say(console, f"provenance: {json.dumps(theta.provenance)}")
    show_table(console, ["spec", "value"], [[name, str(value)] for name, value in facts["spec"].items()])
    rows = [
        [name, " x ".join(map(str, tensor.shape)) or "scalar", f"{tensor.numel():,}", f"{tensor.norm():.4g}"]
        for name, tensor in theta.tensors.items()
    ]
    show_table(console, ["tensor", "shape", "floats", "norm"], rows)
    return {"command": "weights show", **facts}
