"""Which parameters are stored transposed: what a task declares, against what its loss does with them."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lopt.tasks import FAMILIES, NETWORK_FAMILIES, SAMPLED_FAMILIES, AugmentedTask, Task, sample_task
from lopt.tasks.convolutions import ConvPooling
from lopt.tasks.families import with_batch_size
from lopt.tasks.image_tasks import ImageData
from lopt.tasks.pieces import Initialiser, dense

PRODUCTS = (torch.Tensor.matmul, torch.Tensor.__matmul__, torch.matmul)


class Factors(TorchFunctionMode):
    """Parameters that are the right factor of a product with a matrix, perhaps masked, cut or joined before."""

    def __init__(self, params: dict[str, Tensor]) -> None:
        super().__init__()
        self.names = {id(value): name for name, value in params.items()}
        self.found: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in PRODUCTS and args[1].dim() == 2:
            self.found |= set(self._parameters(args[1]))
        return func(*args, **(kwargs or {}))

    def _parameters(self, value: Tensor) -> Iterator[str]:
        if id(value) in self.names:
            yield self.names[id(value)]
        waiting = [value.grad_fn]
        while waiting:
            node = waiting.pop()
            if node is not None:
                waiting += [before for before, _ in node.next_functions]
                yield from filter(None, [self.names.get(id(getattr(node, "variable", None)))])


@pytest.mark.parametrize("family", [*SAMPLED_FAMILIES, *NETWORK_FAMILIES, *FAMILIES])
def test_a_loss_multiplies_by_what_its_task_says_is_transposed(family: Any) -> None:
    for seed in range(4):
        task = with_batch_size(sample_task(seed, [family]), 3, 8)
        params = {name: value.requires_grad_() for name, value in task.init(0).items()}
        with Factors(params) as factors:
            task.loss(params, next(task.batches(0, "train")))
        assert factors.found == task.transposed
        assert AugmentedTask(task=task, reparametrise="tensor").transposed == task.transposed


def test_matrices_are_weights_of_torch_modules() -> None:
    task = ConvPooling(
        data=ImageData(name="shapes", variant=1, batch_size=5),
        channels=(4, 6),
        strides=(1, 2),
        same=(True, False),
        activation="relu",
        initialiser=Initialiser("he_normal"),
    )
    params, rows = task.init(0), torch.randn(5, 6)
    linear = nn.Linear(6, task.data.num_classes)
    linear.weight.data, linear.bias.data = task.as_matrix("w0", params["w0"]), params["b0"]
    torch.testing.assert_close(linear(rows).detach(), dense(params, "", rows, torch.relu))
    assert task.as_matrix("conv.w1", params["conv.w1"]).equal(nn.Flatten()(params["conv.w1"]))
    views = {name: tuple(task.as_matrix(name, value).shape) for name, value in params.items() if value.dim() > 1}
    channels = task.data.shape[0]
    assert views == {"conv.w0": (4, 9 * channels), "conv.w1": (6, 36), "w0": (task.data.num_classes, 6)}
    with pytest.raises(ValueError, match="b0: expected a parameter of two or more dimensions"):
        task.as_matrix("b0", params["b0"])


def test_tables_are_as_torch_stores_them() -> None:
    task: Task = sample_task(1, ["transformer_language_model"])
    table = task.init(0)["embedding"]
    embedding = nn.Embedding(*table.shape)
    assert embedding.weight.shape == task.as_matrix("embedding", table).shape == table.shape
