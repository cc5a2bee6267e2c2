"""Effect of the order of clipping and balancing on OGM: python benchmarks/clipping_order.py [epochs].

A model is trained on the bundled digits with OGM and without clipping. In every step in which OGM scales an encoder
and the gradient norm exceeds the clipping threshold, the gradients of both orders are compared with clipping alone.
"""

import sys

import torch
from torch import nn

import equipoise as eq


def norm(parameters: list[nn.Parameter]) -> float:
    return float(torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm())


def compare_orders(norms: tuple[float, float], factor: float, clip: float) -> tuple[float, ...]:
    """Returns the factors of the scaled encoder and of the others, and norm / clip: for clipping first, then last."""
    before, after = norms
    first, last = clip / before, min(1.0, clip / after)
    return factor, 1.0, after * first / clip, factor * last / first, last / first, after * last / clip


def main(epochs: int, clips: tuple[float, ...] = (1.0, 2.0)) -> None:
    digits = eq.data.load_dataset("digits")
    torch.manual_seed(0)
    encoders = {
        "audio": eq.encoders.SequenceEncoder(40, dim=32, depth=1, heads=4, stride=4, max_length=64),
        "image": eq.encoders.PatchEncoder(1, (8, 8), dim=32, depth=1, heads=4, patch=2),
    }
    model = eq.FusionModel(encoders, eq.fusion.Concat(32), num_outputs=10)
    balancing = eq.BalancerList(model, [eq.balance.OGM(model, alpha=0.8)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9)
    parameters = list(model.parameters())
    weights = [next(p for p in encoder.parameters() if p.ndim >= 2) for encoder in encoders.values()]
    rows: dict[float, list[tuple[float, ...]]] = {clip: [] for clip in clips}
    for epoch in range(epochs):
        for batch in digits.batches("train", 64, seed=0, epoch=epoch, train=True):
            optimizer.zero_grad()
            balancing.loss(model(batch), batch["target"]).backward()
            before, parts = norm(parameters), [norm([weight]) for weight in weights]
            balancing.before_step()
            factor = min(norm([weight]) / part for weight, part in zip(weights, parts, strict=True))
            for clip in clips:
                if factor < 1 and before > clip:
                    rows[clip].append(compare_orders((before, norm(parameters)), factor, clip))
            optimizer.step()
    print("              clipping first                   clipping last")
    print("clip  steps   scaled  others  norm / clip      scaled  others  norm / clip")
    for clip, found in rows.items():
        means = [f"{mean:6.2f}" for mean in torch.tensor(found).mean(dim=0).tolist()]
        print(f"{clip:4.1f}  {len(found):5d}   {'  '.join(means[:3])}           {'  '.join(means[3:])}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 8)
