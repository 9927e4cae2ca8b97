"""Colours and labels that the figures of all experiments share."""

from lopt.figures import COLOURS

#: Of the optimizers in every figure of the experiments.
LOPT, ADAM, UNTOLD, OTHER, MORE = COLOURS[0], COLOURS[1], COLOURS[4], COLOURS[2], COLOURS[3]

#: Label and colour of the learned optimizer, told the number of steps or not.
LEARNED = {"lopt": ("lopt", LOPT), "lopt-untold": ("lopt, untold", UNTOLD)}
