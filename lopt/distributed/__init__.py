"""Training on several ranks: which part of every parameter lies where, and what ranks tell each other in a step.

The cases. One rank: nothing here is used. Replicated parameters (DistributedDataParallel): ranks differ in their
losses alone, which are averaged (:class:`Ranks`). Sharded parameters (DTensors: ``fully_shard``, tensor parallelism):
every rank steps its part of every tensor, and the statistics of whole tensors are summed over ranks once in a step
(:class:`Exchange`); matrices whose directions are treated as wholes go to one rank each and come back
(:class:`ShardedDirections`). Replicated parameters with a sharded state (:class:`Shares`) are taken as sharded, and
whole again after the step.
"""

from lopt.distributed.directions import ShardedDirections
from lopt.distributed.exchange import Exchange
from lopt.distributed.layout import Box, Layout
from lopt.distributed.operands import PartOperands
from lopt.distributed.parts import is_sharded, local_gradient, local_of, part_like, place_like, whole_of
from lopt.distributed.ranks import Ranks, check_same, refuse_zero
from lopt.distributed.shares import Shares

__all__ = [
    "Box",
    "Exchange",
    "Layout",
    "PartOperands",
    "Ranks",
    "ShardedDirections",
    "Shares",
    "check_same",
    "is_sharded",
    "local_gradient",
    "local_of",
    "part_like",
    "place_like",
    "refuse_zero",
    "whole_of",
]
