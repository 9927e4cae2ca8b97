"""A theta of `compact` carried over to `spectral`, with the few numbers that set sizes and the gate by hand.

python benchmarks/carry_over.py compact lopt/weights/default.safetensors

What the LSTM and the small MLP have learned stays. The numbers are added to the linear maps of gate and step; they were
chosen on language models of three kinds (docs/notebook/whole-matrices.md), and meta-training goes on from here.
"""

import argparse
import dataclasses
import json
from pathlib import Path

from lopt import Theta

#: Added to the map of the gate: open for hidden matrices, shut for the first and the last one.
GATE = {"is_input": -1.0, "is_output": -1.0}
GATE_BIAS = 0.5

#: Added to the map of the logarithm of the step.
STEP = {
    "is_matrix": 0.1,
    "is_table": 0.7,  # embeddings move further
    "param_growth": 0.5,  # with the root of how far a tensor has grown
    "vector_start": 0.24,  # biases that start at zero move less than gains that start at one
    "told": 0.3,
    "log_left": -0.4,  # not so soon towards nothing
    "log_step_told": 0.3,
}


def carried_over(theta: Theta) -> Theta:
    """The theta in the spec with matrices as wholes."""
    spec = dataclasses.replace(theta.spec, tensor_inputs="natural", newton_schulz=3)
    new = theta.carried(spec)
    new.tensors["gate.b"] += GATE_BIAS
    for tensor, added in (("gate.w", GATE), ("step.w", STEP)):
        for name, value in added.items():
            new.tensors[tensor][spec.lstm_width + spec.lstm_index(name)] += value
    return new


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    theta = Theta.load(arguments.source)
    new = carried_over(theta)
    added = {"gate.w": GATE, "gate.b": GATE_BIAS, "step.w": STEP}
    command = f"python benchmarks/carry_over.py {arguments.source} {arguments.out}"
    provenance = {"method": "carried over", "command": command, "added": added, "start": theta.provenance}
    Theta(new.spec, new.tensors, provenance).save(arguments.out)
    arguments.out.with_suffix(".json").write_text(json.dumps(provenance, indent=1) + "\n")


if __name__ == "__main__":
    main()
