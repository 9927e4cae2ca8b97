"""Meta-training: learn theta by unrolling inner runs under perturbed thetas and following the gradient so estimated."""
