"""FactoredPlan: steps of the learned optimizers of others.

Two operations over one list of tensors, each one call for any number of them (csrc/api/factored.h): ``accumulate``
updates the accumulators, rows and columns, and finds what the MLP's inputs are divided by; ``apply`` writes the
parameters, or directions of matrices, which a third one, ``write``, takes to the parameters after they were treated as
wholes. Equivalent to ``lopt.rule.published``, with two exact rewrites: root mean squares of columns and inputs that
are constant in a tensor are folded into the first layer of its MLP.
"""

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lopt.kernels.devices import Table, stream_of
from lopt.kernels.directions import ALIGNED
from lopt.kernels.extension import _C, NOT_BUILT, module_of
from lopt.kernels.operands import DTYPES, check_length, check_operand
from lopt.kernels.structs import FACTORED, FACTORED_TENSOR, PIECE, TILE
from lopt.rule.matrices import Kind
from lopt.rule.published import Celo2, MLPLOpt, NNAdam, Rule, SmallFC, VeLO, parts
from lopt.rule.published.step import source_order

#: A rule with kernels of this kind.
FactoredRule = SmallFC | VeLO | MLPLOpt | NNAdam | Celo2
#: Those that have them now, and what the kernels know them by (enum FactoredRule in csrc/api/factored.h).
RULE_INDEX: dict[type[Rule], int] = {SmallFC: 0, VeLO: 1, MLPLOpt: 2, NNAdam: 3, Celo2: 4}
#: What is measured of a tensor before a step; struct Measure in csrc/api/factored.h.
MEASURES = ("nonfinite", "param_square", "grad_size", *(f"{of}{i}" for of in ("mean", "var") for i in range(4)))
#: Of a step by Adam; struct AdamControl in csrc/rule/factored.h.
ADAM_CONTROLS = ("mom_decay", "rms_decay", "gain", "rms_gain", "inside", "epsilon")
#: Elements of a line, lines and elements of a tile, at least; tiles at most that share a line's place.
TILE_WIDTH, TILE_LINES, TILE_SIZE, TILES_HIGH = 1024, 16, 16384, 128
#: Inverse roots and factors, for each decay; for each unit of the first layer there is another one.
FACTOR_PLANES = 2 * 3


class Sizes(NamedTuple):
    """Of a rule's kernels, zeros where there are none."""

    weights: int  # floats in one row of MLP weights,
    own_weights: int  # and in a tensor's own
    columns: int
    measures: int  # of a tensor
    piece: int  # entries


@cache
def sizes_of(rule: Rule) -> Sizes:
    """What lopt._C says."""
    layers = rule.mlp_layers if isinstance(rule, SmallFC | MLPLOpt) else 2
    if NOT_BUILT or not isinstance(rule, FactoredRule) or type(rule) not in RULE_INDEX or layers != 2:
        return Sizes(0, 0, 0, 0, 0)
    return Sizes(*_C.factored_sizes(RULE_INDEX[type(rule)], width_of(rule)))


def width_of(rule: Rule) -> int:
    """Width of a rule's MLP, 0 where it has none."""
    return 0 if isinstance(rule, NNAdam) else int(getattr(rule, "mlp_width", 0))


def num_mom(rule: Rule, by_adam: bool = False) -> int:
    """Number of momenta that the kernels of a rule have of a tensor."""
    return 1 if by_adam else 6 if isinstance(rule, MLPLOpt) else 3


def why_no_kernels(rule: Rule, backend: str) -> str:
    """Why a back end has no kernels for a rule; empty where it has.

    Raises:
        RuntimeError, ValueError: as :func:`lopt.kernels.module_of`.
    """
    if not module_of(backend).has_factored(backend) or type(rule) not in RULE_INDEX:
        return f"rule {rule.name!r} has no kernels for {backend!r}"
    if not sizes_of(rule).weights:
        fields = ", ".join(f"{name}={x}" for name, x in rule.to_json().items() if name.startswith("mlp_"))
        return f"rule {rule.name!r} has no kernels for {fields}"
    expected = num_mom(rule)
    if isinstance(rule, SmallFC | MLPLOpt) and len(rule.mom_decays) != expected:
        return f"rule {rule.name!r} has kernels for {expected} momenta, got {len(rule.mom_decays)}"
    return ""


def pack_factored(rule: FactoredRule, weights: Mapping[str, Tensor]) -> Tensor:
    """The MLP ``mlp.*`` as the kernels read it, ``[..., size]`` float32 (FactoredMlp in csrc/rule/factored.h).

    The columns that all elements of a row or column have in common come behind the others there, before the times.
    """
    lead = weights["mlp.b1"].shape[:-1]
    names = (f"mlp.{kind}{i}" for i in (1, 2, 3) for kind in "wb")
    columns, inputs = sizes_of(rule).columns, weights["mlp.w1"].shape[-2]
    if not isinstance(rule, MLPLOpt):
        moved = [*range(columns - 15), *range(columns - 3, columns), *range(columns - 15, columns - 3)]
        order = torch.tensor([*moved, *range(columns, inputs)], device=weights["mlp.b1"].device)
        weights = {**weights, "mlp.w1": weights["mlp.w1"].index_select(-2, order)}
    used = (weights[name] if name[-1] != "3" else weights[name][..., :2] for name in names)  # VeLO has a third output
    flat = torch.cat([value.reshape(*lead, -1) for value in used], dim=-1).float()
    return torch.nn.functional.pad(flat, (0, sizes_of(rule).weights - flat.shape[-1])).contiguous()


class Lines(NamedTuple):
    """How a tensor lies: ``[outer, lines, groups, length, inner]``, with means over ``length`` (along) and ``lines``
    (across); of less than two dimensions one line, without means.

    ``matrices``: how many matrices of the source's layout it has; element i is in matrix ``i // stride % matrices``.
    """

    outer: int
    lines: int
    groups: int
    length: int
    inner: int
    factored: bool
    along_is_row: bool = True
    matrices: int = 1
    stride: int = 1

    @classmethod
    def of(cls, shape: Sequence[int], kind: Kind, factored: bool = True) -> "Lines":
        """Of a tensor in torch's layout; of a rule without factored moments one line."""
        order = source_order(shape, kind)
        dims = parts.factored_dims([shape[dim] for dim in order])
        if dims is None or not factored:
            return cls(1, 1, 1, math.prod(shape), 1, False)
        second, largest = (order[dim] for dim in dims)
        a, b = sorted((second, largest))
        sizes = (math.prod(shape[:a]), shape[a], math.prod(shape[a + 1 : b]), shape[b], math.prod(shape[b + 1 :]))
        matrices = math.prod(shape[dim] for dim in order[:-2])
        stride = shape[-2] * shape[-1] if order[-1] == len(shape) - 1 else 1
        return cls(*sizes, True, a == second, matrices, stride)

    @property
    def size(self) -> int:
        """Elements of a line."""
        return self.groups * self.length * self.inner

    @property
    def num_along(self) -> int:
        """Number of means over ``length``."""
        return self.outer * self.lines * self.groups * self.inner

    @property
    def tile(self) -> tuple[int, int]:
        """Lines and elements of each in a tile, at most."""
        if not self.factored:
            return 1, min(self.size, TILE_SIZE)
        width = min(self.size, max(TILE_WIDTH, self.groups * self.inner))
        return min(self.lines, max(TILE_LINES, TILE_SIZE // width, -(-self.lines // TILES_HIGH))), width

    @property
    def grid(self) -> tuple[int, int]:
        """Tiles of the lines of one ``outer``, and of a line."""
        lines, width = self.tile
        return -(-self.lines // lines), -(-self.size // width)

    @property
    def num_sums(self) -> int:
        """Sums of squares that all tiles make."""
        high, wide = self.grid
        return self.num_along * wide + self.outer * high * self.size if self.factored else 0

    def num_factors(self, width: int) -> int:
        """What is made of rows and columns, for an MLP of that width."""
        return (FACTOR_PLANES + width) * (self.num_along + self.outer * self.size) if self.factored else 0

    def tiles(self) -> np.ndarray:
        """``[N, 2]``: first line, and first element of it, of every tile."""
        (lines, width), (high, wide) = self.tile, self.grid
        firsts = np.arange(self.outer)[:, None] * self.lines + np.arange(high)[None] * lines
        grid = np.meshgrid(firsts.reshape(-1), np.arange(wide) * width, indexing="ij")
        return np.stack([axis.reshape(-1) for axis in grid], axis=1)

    def pieces(self, piece: int) -> np.ndarray:
        """``[N, 2]``: whether of means along, and the first of them, of every piece of that many entries."""
        if not self.factored:
            return np.zeros((0, 2), dtype=np.int64)
        counts = ((1, self.num_along), (0, self.outer * self.size))
        return np.concatenate(
            [np.array([(along, i) for i in range(0, count, piece)], dtype=np.int64) for along, count in counts]
        )


class FactoredSelection(NamedTuple):
    """Some of a plan's tensors, with the tables over them that kernels read."""

    rows: list[int]
    tables: dict[str, Table]


class FactoredPlan:
    """Addresses, sizes and scratch memory for the kernels over one list of R tensors.

    Args:
        backend: ``"cpu"``, ``"cuda"`` or ``"sim"``.
        rule: one for which :func:`why_no_kernels` says nothing.
        decays: of momenta, second moments and factored ones.
        shapes, kinds: of the tensors, none empty.
        device: of everything.
        state_dtype: of ``mom`` and ``rms``, float32 or bfloat16, which is rounded stochastically by bits that depend on
            step, row and element.

    Attributes:
        weights: ``[R, size]`` of :func:`pack_factored`, ``[1, size]`` where a rule has one for all tensors, to be
            written before :meth:`apply`.
        controls: ``[R, len(ADAM_CONTROLS)]`` of tensors that Adam steps, to be written before :meth:`accumulate`.
        step_size, keep: ``[R]``, likewise: of the step, and what is left of the parameter after weight decay.
        stats: ``[R, len(MEASURES)]`` written by :meth:`accumulate`: number of gradient elements that are not finite;
            mean square of the parameter before the step, NaN where it rests; of VeLO means and variances of ``mom`` and
            ``rms`` before the step; of nn_adam of gradient, parameter, and the next ``mom`` and ``rms``, and the mean
            of ``|grad|``.
        directions: by row, in the shape of the parameter, of matrices that are treated as wholes: written by
            :meth:`apply`, to be treated before :meth:`write`.
    """

    def __init__(
        self,
        backend: str,
        rule: FactoredRule,
        decays: Sequence[Sequence[float]],
        shapes: Sequence[Sequence[int]],
        kinds: Sequence[Kind],
        device: torch.device,
        state_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.module, self.backend, self.device, self.rule = module_of(backend), backend, device, rule
        pairs = list(zip(shapes, kinds, strict=True))
        self.by_adam = [
            isinstance(rule, NNAdam) or (isinstance(rule, Celo2) and not rule.is_matrix(*pair)) for pair in pairs
        ]
        factored = not isinstance(rule, MLPLOpt)
        self.lines = [Lines.of(*pair, factored and not alone) for pair, alone in zip(pairs, self.by_adam, strict=True)]
        self.num_rows = len(shapes)
        sizes = sizes_of(rule)
        self.all_entries = entries = np.zeros(self.num_rows, FACTORED_TENSOR)
        entries["numel"], entries["row"] = [math.prod(shape) for shape in shapes], np.arange(self.num_rows)
        for name in ("outer", "lines", "groups", "length", "inner", "along_is_row"):
            entries[name] = [getattr(lines, name) for lines in self.lines]
        for i, name in enumerate(("tile_lines", "tile_width")):
            entries[name] = [lines.tile[i] for lines in self.lines]
        whole = isinstance(rule, Celo2)
        entries["adam"], entries["matrices"], entries["matrix_stride"] = self.by_adam, 1, 1
        if whole:  # the columns of other rules are those of tensors
            entries["matrices"], entries["matrix_stride"] = (
                zip(*(lines[7:9] for lines in self.lines), strict=True) if (self.lines) else ([], [])
            )
        tiles = np.array([lines.outer * math.prod(lines.grid) for lines in self.lines], dtype=np.int64)
        columns = sizes.columns * entries["matrices"].astype(np.int64) * (entries["adam"] == 0)
        totals = {}
        of_each: dict[str, Any] = {"sums": [lines.num_sums for lines in self.lines]}
        of_each["factors"] = [lines.num_factors(width_of(rule)) for lines in self.lines]
        of_each |= {"squares": tiles * columns, "scales": np.where(entries["matrices"] > 1, columns, 0)}
        kept = entries["numel"] * (whole & (entries["adam"] == 0))
        of_each["direction"] = -(-kept // ALIGNED) * ALIGNED
        for name, counts in of_each.items():
            entries[name], totals[name] = np.cumsum([0, *counts])[:-1], int(np.sum(counts))

        def table(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, device=device, dtype=dtype)

        self.stats = table(self.num_rows, sizes.measures)
        self.step_size, self.keep = table(self.num_rows), table(self.num_rows)
        self.weights = table(self.num_rows if isinstance(rule, VeLO) else 1, sizes.weights)  # one for all, or for each
        self.controls = table(self.num_rows, len(ADAM_CONTROLS))
        memory, self.directions = table(totals["direction"]), {}
        for row in np.flatnonzero(kept).tolist():
            first, shape = int(entries["direction"][row]), tuple(shapes[row])
            self.directions[row] = memory[first : first + math.prod(shape)].view(shape)
            entries["direction"][row] = self.directions[row].data_ptr()
        entries["direction"][kept == 0] = 0
        self._tables = {
            "measures": table(int(tiles.sum()), sizes.measures, dtype=torch.float64),
            "sums": table(totals["sums"], dtype=torch.float64),
            "factors": table(totals["factors"]),
            "squares": table(totals["squares"], dtype=torch.float64),
            "scales": table(totals["scales"]),
            "controls": self.controls,
            "own_weights": table(self.num_rows, sizes.own_weights),
            "stats": self.stats,
            "step_size": self.step_size,
            "keep": self.keep,
            "weights": self.weights,
        }
        self.record = np.zeros((), FACTORED)
        for name, value in self._tables.items():
            self.record[name] = value.data_ptr()
        self.record["weight_stride"] = sizes.weights if isinstance(rule, VeLO) else 0
        self.state_dtype, self.record["state_dtype"] = state_dtype, DTYPES[state_dtype]
        self.record["rule"], self.record["width"] = RULE_INDEX[type(rule)], width_of(rule)
        self.record["magnitude_rate"] = getattr(rule, "magnitude_rate", 0.0)
        for name, values in zip(("mom", "rms", "factored"), decays, strict=True):
            self.record[f"{name}_decay"][: len(values)] = values
        self.address = self.record.ctypes.data
        self.keep_alive: dict[int, list[Tensor]] = {}
        self.selected = FactoredSelection([], {})
        self._operands: list[Tensor] = []

    @property
    def rests(self) -> Tensor:
        """``[R]``: tensors with parameters that are not finite, which are left as they are."""
        return torch.isnan(self.stats[:, MEASURES.index("param_square")])

    def hold(self, row: int, state: Mapping[str, Tensor]) -> None:
        """Give tensor ``row`` its accumulators: ``mom``, where the rule has them ``rms``, and ``row`` and ``column`` or
        ``diagonal``."""
        lines, entry = self.lines[row], self.all_entries[row]
        numel, across = int(entry["numel"]), lines.outer * lines.size
        by_adam = self.by_adam[row]
        named, expected = {"mom": "mom"}, {"mom": (num_mom(self.rule, by_adam), numel)}
        if not isinstance(self.rule, MLPLOpt):
            named["rms"], expected["rms"] = "rms", (1, numel)
        if not isinstance(self.rule, MLPLOpt) and not by_adam:
            sides = ("row", "column") if lines.along_is_row else ("column", "row")
            if lines.factored:
                named |= dict(zip(("along", "across"), sides, strict=True))
                expected |= {sides[0]: (3, lines.num_along), sides[1]: (3, across)}
            else:
                named["along"], expected["diagonal"] = "diagonal", (3, numel)
        for name, (planes, count) in expected.items():
            dtype = self.state_dtype if name in ("mom", "rms") else torch.float32
            check_operand(f"{name}[{row}]", state[name], (dtype,), planes * count, self.device)
        for field, name in named.items():
            entry[field] = state[name].data_ptr()
        self.keep_alive[row] = [state[name] for name in expected]

    def selection(self, rows: Sequence[int]) -> "FactoredSelection":
        """What :meth:`use` takes: these tensors, each of which was given its accumulators."""
        entries, piece = self.all_entries[list(rows)], sizes_of(self.rule).piece
        tiles, pieces = ([self.lines[row].tiles() for row in rows], [self.lines[row].pieces(piece) for row in rows])
        counts = [len(part) for part in tiles]
        entries["first_tile"], entries["num_tiles"] = np.cumsum([0, *counts[:-1]])[: len(counts)], counts
        tables = {"tiles": np.zeros(sum(counts), TILE), "pieces": np.zeros(sum(map(len, pieces)), PIECE)}
        for record, found in zip(tables.values(), (tiles, pieces), strict=True):
            record["tensor"] = np.repeat(np.arange(len(rows)), [len(part) for part in found])
            for i, field in enumerate((record.dtype.names or ())[1:]):
                record[field] = np.concatenate([part[:, i] for part in found]) if found else 0
        tables |= {"tensors": entries, "grads": np.zeros(len(rows), dtype=np.int64)}
        return FactoredSelection(list(rows), {name: Table(value, self.device) for name, value in tables.items()})

    def use(self, selection: "FactoredSelection") -> None:
        """Let the operations work on these tensors."""
        self.selected = selection
        for name, table in selection.tables.items():
            self.record[name] = table.address
        for name in ("tensors", "tiles", "pieces"):
            self.record[f"num_{name}"] = len(selection.tables[name].host)

    def select(self, rows: Sequence[int]) -> None:
        """Let the operations work on these tensors, each of which was given its accumulators."""
        self.use(self.selection(rows))

    def set_tensors(self, params: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
        """Check this step's parameters and gradients of the selected tensors, contiguous ones, and point to them; they
        are kept alive until :meth:`apply` is done."""
        entries = self.selected.tables["tensors"].host
        for name, tensors in (("params", params), ("grads", grads)):
            check_length(name, len(tensors), len(self.selected.rows))
            for i, (tensor, numel) in enumerate(zip(tensors, entries["numel"].tolist(), strict=True)):
                check_operand(f"{name}[{i}]", tensor, tuple(DTYPES), numel, self.device)
            entries[f"{name.removesuffix('s')}_dtype"] = [DTYPES[tensor.dtype] for tensor in tensors]
        entries["param"] = list(map(Tensor.data_ptr, params))
        self.selected.tables["grads"].host[:] = list(map(Tensor.data_ptr, grads))
        for name in ("tensors", "grads"):
            self.record[name] = self.selected.tables[name].send()
        self._operands = [*params, *grads]

    def accumulate(self, step: Tensor) -> Tensor:
        """The next accumulators, in place, and what ``apply`` needs of this step; ``stats``.

        Args:
            step: ``[]`` int64, steps so far; :meth:`apply` reads it too.
        """
        self.record["step"], self._step = step.data_ptr(), step
        self.module.factored_accumulate(self.backend, self.address, torch.get_num_threads(), *stream_of(self.device))
        return self.stats

    def apply(self) -> None:
        """The next parameters, by ``weights``, ``step_size`` and ``keep``, or ``directions`` in their place; after
        :meth:`accumulate`."""
        self.module.factored_apply(self.backend, self.address, torch.get_num_threads(), *stream_of(self.device))
        if not self.directions:
            self._operands = []  # zero_grad frees their memory

    def write(self) -> None:
        """The next parameters where there are ``directions``, by them; after :meth:`apply`."""
        if self.directions:
            self.module.factored_write(self.backend, self.address, torch.get_num_threads(), *stream_of(self.device))
            self._operands = []
