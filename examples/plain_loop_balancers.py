"""Two balancers in a plain PyTorch loop: OGM scales the gradients of an encoder, RollingQ rotates the query."""

import sys

import torch

import equipoise as eq

EPOCHS = int(sys.argv[1]) if len(sys.argv) > 1 else 8
digits = eq.data.load_dataset("digits")
torch.manual_seed(0)
encoders = {
    "audio": eq.encoders.SequenceEncoder(40, dim=32, depth=1, heads=4, stride=4, max_length=64),
    "image": eq.encoders.PatchEncoder(1, (8, 8), dim=32, depth=1, heads=4, patch=2),
}
model = eq.FusionModel(encoders, eq.fusion.JointAttention(32), num_outputs=10, unimodal="train")
balancing = eq.BalancerList(
    model,
    [
        eq.balance.OGM(model, alpha=0.3),
        eq.balance.RollingQ(model.fusion.attention, beta=0.0, warmup_epochs=EPOCHS // 2),
    ],
)
# SGD, since Adam normalizes away the factors of OGM; attach_optimizer warns about Adam.
optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9)
balancing.attach_optimizer(optimizer)

for epoch in range(EPOCHS):
    for batch in digits.batches("train", 64, seed=0, epoch=epoch, train=True):
        loss = balancing.loss(model(batch), batch["target"])
        optimizer.zero_grad()
        loss.backward()
        balancing.before_step()
        optimizer.step()
    log = balancing.end_epoch()
    print(f"epoch {epoch + 1}: " + ", ".join(f"{name} {value:.2f}" for name, value in log.items()))

model.eval()
batches = list(digits.batches("test", 256, seed=0, epoch=0, train=False))
with torch.no_grad():
    correct = sum(int((model(batch).logits.argmax(dim=1) == batch["target"]).sum()) for batch in batches)
print(f"accuracy: {correct / sum(len(batch['target']) for batch in batches):.3f}")
