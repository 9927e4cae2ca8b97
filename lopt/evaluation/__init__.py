"""Evaluation: train models with any optimizer, record curves, compare. Every optimizer is treated alike."""
