"""The paper's experiments, and some that it lacks: each a list of runs, a figure, and a text made of numbers."""

from lopt.experiments import (
    axes,
    horizon,
    implicit_regularization,
    normalised_table,
    resnet,
    self_training,
    transformer,
    validation_ablation,
    wall_clock,
)
from lopt.experiments.experiment import Experiment

EXPERIMENTS: dict[str, Experiment] = {
    found.name: found
    for found in (
        implicit_regularization.EXPERIMENT,
        horizon.EXPERIMENT,
        axes.WIDTH,
        axes.BATCH_SIZE,
        axes.DATASET_SIZE,
        wall_clock.EXPERIMENT,
        validation_ablation.EXPERIMENT,
        self_training.EXPERIMENT,
        transformer.EXPERIMENT,
        resnet.EXPERIMENT,
        normalised_table.EXPERIMENT,
    )
}
