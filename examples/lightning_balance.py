"""RollingQ in a custom LightningModule: one callback."""

import logging
import sys
import warnings

import lightning
import torch

import equipoise as eq

digits = eq.data.load_dataset("digits")


class DigitClassifier(lightning.LightningModule):
    """A module with its own training step."""

    def __init__(self) -> None:
        super().__init__()
        encoders = {
            "audio": eq.encoders.SequenceEncoder(40, dim=32, depth=1, heads=4, stride=4, max_length=64),
            "image": eq.encoders.PatchEncoder(1, (8, 8), dim=32, depth=1, heads=4, patch=2),
        }
        self.model = eq.FusionModel(encoders, eq.fusion.JointAttention(32, heads=1), num_outputs=10)

    def training_step(self, batch: dict, index: int) -> torch.Tensor:
        return self.model.loss(self.model(batch).logits, batch["target"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


lightning.seed_everything(0, verbose=False)
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message=".*(LeafSpec|many workers|tensorboardX|GPU available).*")
module = DigitClassifier()
balancer = eq.balance.RollingQ(module.model.fusion.attention, rho=1.0, beta=0.0, max_rotations=1, warmup_epochs=1)
trainer = lightning.Trainer(
    max_epochs=int(sys.argv[1]) if len(sys.argv) > 1 else 5,
    callbacks=[eq.lightning.BalancerCallback(balancer)],
    accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    use_distributed_sampler=False,
)  # fmt: skip
trainer.fit(module, eq.data.loader(digits, "train", 64, seed=0, train=True))
print(f"rotations: {int(balancer.rotations)}, imbalance: {float(trainer.callback_metrics['balance/air']):+.3f}")
