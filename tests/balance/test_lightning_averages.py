"""RollingQ under Lightning's weight averaging, which swaps weights and buffers for each validation."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch.optim.swa_utils import get_ema_avg_fn

import equipoise as eq
from equipoise.training.run import quiet_lightning
from helpers.fusion import batch, joint_model

OPTIONS = {"swa": {}, "ema": {"avg_fn": get_ema_avg_fn(0.5)}, "ema of weights": {
    "avg_fn": get_ema_avg_fn(0.5), "use_buffers": False,
}}  # fmt: skip


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = joint_model()
        self.rolling = eq.balance.RollingQ(self.net.fusion.attention, beta=0.0, max_rotations=None)
        self.balancing = eq.BalancerList(self.net, [self.rolling])
        self.validated = []

    def training_step(self, inputs, index):
        return self.balancing.loss(self.net(inputs), inputs["target"])

    def validation_step(self, inputs, index):
        state = {name: value.clone() for name, value in self.net.state_dict().items()}
        self.validated.append((self.net(inputs).logits, state))

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), lr=0.1)


def fit(*callbacks):
    module = Module()
    logs = []

    class Log(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            logs.append(dict(balance.last))

    balance = eq.lightning.BalancerCallback(module.balancing)
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    with quiet_lightning():
        trainer = pl.Trainer(
            max_epochs=3, callbacks=[balance, Log(), *callbacks], enable_checkpointing=False, num_sanity_val_steps=0,
            **options,
        )  # fmt: skip
        train, val = ([batch(seed=s) for s in seeds] for seeds in ((0, 1, 2), (9,)))
        trainer.fit(
            module,
            torch.utils.data.DataLoader(train, batch_size=None),
            torch.utils.data.DataLoader(val, batch_size=None),
        )
    return module, logs


@pytest.mark.parametrize("kind", OPTIONS)
def test_lightning_weight_averaging(kind):
    _, alone = fit()
    module, logs = fit(WeightAveraging(**OPTIONS[kind]))
    assert [log["rotated"] for log in logs] == [1.0] * 3
    for log, expected in zip(logs, alone, strict=True):
        assert log == pytest.approx(expected, rel=0, abs=0)
    fresh = joint_model(seed=5)
    eq.balance.RollingQ(fresh.fusion.attention)
    for logits, state in [*module.validated, (module.net.eval()(batch(seed=9)).logits, module.net.state_dict())]:
        fresh.load_state_dict(state)
        assert torch.equal(fresh.eval()(batch(seed=9)).logits, logits)
