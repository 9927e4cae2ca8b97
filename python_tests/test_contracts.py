"""What Python and C++ both define cannot drift: a field, column or tensor of theta elsewhere fails the import."""

import copy
import dataclasses
import math
import re

import numpy as np
import pytest

from lopt import _C
from lopt.kernels import structs
from lopt.kernels.structs import build_dtypes, check_same, check_theta, spec_record
from lopt.rule import PRESETS, ThetaSpec


def layout_of(spec: ThetaSpec) -> list[tuple[str, int, int]]:
    return _C.theta_layout(spec_record(spec).ctypes.data)


def test_dtypes_are_those_of_the_compiled_structs() -> None:
    """A moved field moves in the dtype too: what is written by name is read under that name."""
    told = _C.struct_fields()
    swapped = copy.deepcopy(told)
    fields = swapped["ApplyParams"]["fields"]
    scale, shift = (next(i for i, field in enumerate(fields) if field[0] == name) for name in ("scale", "shift"))
    fields[scale], fields[shift] = ("shift", *fields[scale][1:]), ("scale", *fields[shift][1:])
    ours, theirs = build_dtypes(told)["ApplyParams"], build_dtypes(swapped)["ApplyParams"]
    assert ours.fields is not None
    assert theirs.fields is not None
    assert theirs.fields["scale"][1] == ours.fields["shift"][1] != ours.fields["scale"][1]
    for name, struct in told.items():
        dtype = build_dtypes(told)[name]
        assert dtype.itemsize == struct["size"]
        end = 0
        for field, form, offset, count in struct["fields"]:  # fields follow each other, with at most padding between
            assert end <= offset < end + 8
            end = offset + np.dtype(form).itemsize * max(count, 1)
            assert dtype[field] == np.dtype((form, count) if count else form)
        assert end <= struct["size"] < end + 8


@pytest.mark.parametrize("struct", sorted(structs.FILLED))
def test_a_field_that_python_does_not_know_fails(struct: str) -> None:
    told = copy.deepcopy(_C.struct_fields())
    name, *rest = told[struct]["fields"][0]
    told[struct]["fields"][0] = (f"new_{name}", *rest)
    with pytest.raises(ImportError, match=rf"{struct} has the fields \['new_{name}'\].*lacks \['{name}'\].*rebuild"):
        build_dtypes(told)


def test_a_struct_that_is_not_there_fails() -> None:
    told = copy.deepcopy(_C.struct_fields())
    del told["Run"]
    with pytest.raises(ImportError, match=r"no struct \['Run'\]"):
        build_dtypes(told)


def test_check_same_finds_the_end_of_the_shorter_list() -> None:
    check_same("x", [1, 2], (1, 2))
    with pytest.raises(ImportError, match=re.escape("x: at position 2 lopt._C has None, Python has 3")):
        check_same("x", [1, 2], [1, 2, 3])
    with pytest.raises(ImportError, match=re.escape("x: at position 2 lopt._C has 3, Python has None")):
        check_same("x", [1, 2, 3], [1, 2])


def specs() -> list[ThetaSpec]:
    compact = PRESETS["compact"]
    sizes = {"mlp_width": 16, "lstm_width": 5, "from_mlp": 3, "lstm_to_mlp": 2, "from_lstm": 7}
    return [
        *PRESETS.values(),
        dataclasses.replace(compact, **sizes),
        dataclasses.replace(compact, linear_skip=False),
        dataclasses.replace(compact, step_control=False),
        dataclasses.replace(compact, horizon_input=False),
        dataclasses.replace(PRESETS["paper"], **sizes),
    ]


@pytest.mark.parametrize("spec", specs())
def test_thetas_layout_is_the_compiled_one(spec: ThetaSpec) -> None:
    check_theta(spec, layout_of(spec))
    name, offset, count = layout_of(spec)[-1]
    assert name == "gate_step"
    assert offset + count == spec.num_floats == sum(math.prod(shape) for shape in spec.shapes().values())


def test_swapped_tensors_of_theta_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also two of the same size, which no check of sizes could tell apart."""
    spec = PRESETS["paper"]
    layout, shapes = layout_of(spec), spec.shapes()
    names = list(shapes)
    a, b = names.index("initial_h"), names.index("initial_c")
    names[a], names[b] = names[b], names[a]
    monkeypatch.setattr(ThetaSpec, "shapes", lambda self: {name: shapes[name] for name in names})
    message = r"at position 2 lopt._C has \('initial_h', 34, 64\), Python has \('initial_c', 34, 64\)"
    with pytest.raises(ImportError, match=message):
        check_theta(spec, layout)


@pytest.mark.parametrize("part", ["scalars", "facts", "natural"])
def test_another_natural_table_stops_the_import(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two names of a table exchanged, of which no check of sizes knows; or steps in shares of other sizes."""
    told = copy.deepcopy(_C.rule_tables())
    table = told[f"input set natural: {part}"]
    if part == "natural":
        told[f"input set natural: {part}"] = not table
    else:
        table[-1], table[-2] = table[-2], table[-1]
    monkeypatch.setattr(_C, "rule_tables", lambda: told)
    with pytest.raises(ImportError, match=rf"input set natural: {part}"):
        structs.check_contracts()


@pytest.mark.parametrize("name", ["NEWTON_SCHULZ_1", "NEWTON_SCHULZ_3", "NEWTON_SCHULZ_5", "LEAST_ROW", "MAX_ASPECT"])
def test_other_constants_of_the_direction_stage_stop_the_import(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    told = copy.deepcopy(_C.rule_tables())
    told[name] = told[name] + 1.0
    monkeypatch.setattr(_C, "rule_tables", lambda: told)
    with pytest.raises(ImportError, match=name):
        structs.check_contracts()


def test_the_import_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the functions above find stops the import of lopt."""
    structs.check_contracts()
    told = _C.rule_tables()
    told["feature set paper: columns"].reverse()
    monkeypatch.setattr(_C, "rule_tables", lambda: told)
    with pytest.raises(ImportError, match=r"lopt\._C has feature set paper: columns = "):
        structs.check_contracts()
