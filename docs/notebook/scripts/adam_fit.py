"""Which combination of the `paper` columns is nearest to Adam's direction? Theta.init_adam uses the answer.

Random gradients of many parameters: scales log-uniform in [1e-2, 10], a drifting mean of relative size .3, normal
noise. At several steps the columns mom_k / sqrt(rms_k + 1e-6), each divided by its root mean square over the tensor as
the optimizer does, are fitted by least squares to Adam's direction (betas .9, .999), divided by its own too.
"""

import torch

from lopt.rule.features import FEATURE_SETS

DECAYS = torch.tensor(FEATURE_SETS["paper"].mom_decays, dtype=torch.float64)[:, None]


def normalise(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(1e-5 + x.square().mean(dim=-1, keepdim=True))


def samples(seed: int, numel: int = 4000, steps: int = 2000) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns [5, n] and Adam's direction [n], over several steps of one stream of gradients."""
    generator = torch.Generator().manual_seed(seed)
    scale = 10 ** (3 * torch.rand(numel, generator=generator, dtype=torch.float64) - 2)
    mean = torch.randn(numel, generator=generator, dtype=torch.float64) * 0.3
    mom, rms = torch.zeros(5, numel, dtype=torch.float64), torch.zeros(5, numel, dtype=torch.float64)
    columns, targets = [], []
    for step in range(1, steps + 1):
        noise = torch.randn(numel, 2, generator=generator, dtype=torch.float64)
        mean = 0.99 * mean + (1 - 0.99**2) ** 0.5 * 0.3 * noise[:, 0]
        grad = scale * (mean + noise[:, 1])
        mom = DECAYS * mom + (1 - DECAYS) * grad
        rms = DECAYS * rms + (1 - DECAYS) * grad**2
        if step in (10, 30, 100, 300, 1000, 2000):
            corrected = mom[1] / (1 - 0.9**step), rms[3] / (1 - 0.999**step)
            columns.append(normalise(mom * torch.rsqrt(rms + 1e-6)))
            targets.append(normalise(corrected[0] / (corrected[1].sqrt() + 1e-8)))
    return torch.cat(columns, dim=1), torch.cat(targets)


def main() -> None:
    columns, target = samples(seed=0)
    coefficients = torch.linalg.lstsq(columns.T, target).solution
    held_out, held_out_target = samples(seed=1)

    def cosine(weights: torch.Tensor) -> float:
        return torch.cosine_similarity(weights @ held_out, held_out_target, dim=0).item()

    for k in range(5):
        alone = cosine(torch.eye(5, dtype=torch.float64)[k])
        print(f"mom{k}_over_rms{k}  coefficient {coefficients[k]:+.4f}  alone: cosine {alone:.4f}")
    print(f"combination: cosine {cosine(coefficients):.4f}")


if __name__ == "__main__":
    main()
