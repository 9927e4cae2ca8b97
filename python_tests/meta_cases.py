"""A meta-training run of a second, which tests of runs change as they need."""

from lopt.meta.config import MetaTrainConfig, Phase

#: Runs begin in the first phase; in the second their states are carried over.
SMALL = MetaTrainConfig(
    inner_steps=500,
    phases=(Phase(0.4, (10, 30), "mlp"), Phase(0.6, (20, 40), "all", "pes", window=10)),
    tasks=("mixture", "teacher"),
    pairs=3,
    warmup=0,
    validation_tasks=2,
    validation_horizons=(20,),
    validate_every=250,
    seed=11,
)
