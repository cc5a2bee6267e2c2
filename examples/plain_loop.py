"""RollingQ in a plain PyTorch loop: measures whether attention moves away from noise, with and without RollingQ."""

import sys

import torch

import equipoise as eq
from equipoise.diagnostics.noise_test import noise_response

EPOCHS = int(sys.argv[1]) if len(sys.argv) > 1 else 12
digits = eq.data.load_dataset("digits")


def response(model: eq.FusionModel) -> float:
    loader = eq.data.loader(digits, "test", 256, seed=0, train=False)
    return noise_response(model, loader, modality="audio", noise=digits.noise).r


def train(balanced: bool) -> eq.FusionModel:
    torch.manual_seed(0)
    encoders = {
        "audio": eq.encoders.SequenceEncoder(40, dim=32, depth=1, heads=4, stride=4, max_length=64),
        "image": eq.encoders.PatchEncoder(1, (8, 8), dim=32, depth=1, heads=4, patch=2),
    }
    model = eq.FusionModel(encoders, eq.fusion.JointAttention(32, heads=1), num_outputs=10)
    balancer = (
        eq.balance.RollingQ(model.fusion.attention, rho=1.0, beta=0.0, warmup_epochs=EPOCHS // 4) if balanced else None
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for epoch in range(EPOCHS):
        for batch in digits.batches("train", 64, seed=0, epoch=epoch, train=True):
            loss = model.loss(model(batch).logits, batch["target"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if balancer is not None:
            balancer.end_epoch()
    return model


print(f"attention-noise r: {response(train(False)):+.2f} without RollingQ, {response(train(True)):+.2f} with it")
