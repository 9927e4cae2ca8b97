"""Tasks: what an optimizer is trained on and judged by (data sets, models, losses)."""
