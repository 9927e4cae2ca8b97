"""Rows of benchmark results: where and by what they were measured, and comparison with older ones."""

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lopt import kernels
from lopt.provenance import commit, cpu_info, cpu_name, versions
from lopt.tables import read_csv

Row = dict[str, Any]

#: Columns that say what a row measured; rows that agree in them can be compared.
IDENTITY = (
    *("benchmark", "name", "preset", "stats", "state_dtype", "precision", "layout", "problem"),
    *("dtype", "device", "threads", "machine", "simd"),
)
#: What rows without such a column measured.
USUAL = {"stats": "current", "state_dtype": "float32", "precision": "high"}


def environment(device: torch.device) -> Row:
    """Machine, clock, load, time, commit and versions."""
    on_cuda = device.type == "cuda"
    return {
        "machine": torch.cuda.get_device_name(device) if on_cuda else cpu_name(),
        "simd": "" if on_cuda else kernels.simd_selected(),
        "clock_mhz": gpu_clock(device) if on_cuda else cpu_clock(),
        "load": round(_load(), 2),
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        **{f"version_{name}": version for name, version in versions().items()},
    }


def gpu_clock(device: torch.device) -> int | None:
    """Clock in MHz as NVML reports it now; None where it or its Python package, nvidia-ml-py, is missing or refuses."""
    try:
        return round(torch.cuda.clock_rate(device))
    except Exception:  # of a package that is no requirement
        return None


def cpu_clock() -> int | None:
    """Clock in MHz as the system reports it now, of the quickest core; None where it does not."""
    clocks = [float(value) for value in cpu_info("cpu MHz")]
    return round(max(clocks)) if clocks else None


def _load() -> float:
    try:
        return float(Path("/proc/loadavg").read_text().split()[0])
    except OSError:
        return float("nan")


def read_timings(path: Path) -> list[dict[str, str]]:
    """Rows that can be compared with others, see :func:`lopt.tables.read_csv`."""
    rows = read_csv(path)
    for number, row in enumerate(rows, 2):
        try:
            seconds_of(row)
        except (ValueError, TypeError, KeyError, ZeroDivisionError) as error:
            raise ValueError(
                f"{path}, row {number}: not of lopt bench, or damaged ({error!r}); name another file"
            ) from error
    return rows


@dataclass(frozen=True)
class Comparison:
    """One row against an older one: ``ratio`` is the time now divided by the time then."""

    what: str
    ratio: float
    then: str  # when and at which commit


def compare(rows: Sequence[Row], old: Sequence[Mapping[str, Any]]) -> list[Comparison]:
    """Every row that was measured before, on the same machine, against the last time it was."""
    latest = {identity(row): row for row in old}
    found = []
    for row in rows:
        before = latest.get(identity(row))
        if before is not None:
            then = f"{before.get('time', '')} at {str(before.get('commit', ''))[:10] or 'no commit'}"
            found.append(Comparison(describe(row), seconds_of(row) / seconds_of(before), then))
    return found


def identity(row: Mapping[str, Any]) -> tuple[str, ...]:
    """What the row measured, the same for numbers and for text from a file."""
    return tuple(str(row.get(name) or USUAL.get(name, "")) for name in IDENTITY)


def describe(row: Mapping[str, Any]) -> str:
    """What the row measured, for people."""
    unusual = [row[name] for name, usual in USUAL.items() if row.get(name) not in (None, "", usual)]
    words = [row.get("preset"), *unusual, *(row.get(name) for name in ("name", "layout", "problem"))]
    return " ".join(str(word) for word in words if word)


def seconds_of(row: Mapping[str, Any]) -> float:
    """Time of what the row measured, per parameter or per inner step."""
    return float(row["ns_per_param"]) * 1e-9 if row.get("ns_per_param") else 1.0 / float(row["steps_per_second"])
