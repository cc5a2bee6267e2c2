"""Rows of the table in docs/own_models.md for training frameworks: an own model under Lightning and under Trainer."""

import warnings

import lightning.pytorch as pl
import pytest
import torch
import transformers

import equipoise as eq
from equipoise.training.run import quiet_lightning
from helpers.own_models import MultiheadNet, batch, matrix

DATA = [batch(seed) for seed in range(3)]
LABELS = torch.tensor([-1, 0, 0, 0, 0, 1, 1, 1])


def adapted():
    torch.manual_seed(0)
    return eq.adapt(MultiheadNet(), encoders={"audio": "audio", "image": "image"}, unimodal="train", example=DATA[0])


class Module(pl.LightningModule):
    def __init__(self, make):
        super().__init__()
        self.model = adapted()
        self.balancing = eq.BalancerList(self.model, make(self.model))

    def training_step(self, batch, index):
        return self.balancing.loss(self.model(batch), batch["target"])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def under_lightning(make, folder, *callbacks, epochs=2, resume=None, save=None):
    module = Module(make)
    torch.manual_seed(0)
    with quiet_lightning():
        trainer = pl.Trainer(
            max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, callbacks=[eq.lightning.BalancerCallback(module.balancing), *callbacks],
        )  # fmt: skip
        trainer.fit(module, torch.utils.data.DataLoader(DATA, batch_size=None), ckpt_path=resume, weights_only=True)
        if save is not None:
            trainer.save_checkpoint(save)
    return module.model, module.balancing.balancers


def under_trainer(make, folder, *callbacks, epochs=2, resume=None, save=None):
    samples = [{"labels" if n == "target" else n: v[i] for n, v in data.items()} for data in DATA for i in range(6)]
    model = adapted()
    balanced = eq.hf.BalancedModel(model, eq.BalancerList(model, make(model)))
    args = transformers.TrainingArguments(
        str(folder),
        num_train_epochs=2,
        per_device_train_batch_size=6,
        learning_rate=0.1,
        optim="sgd",
        report_to="none",
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        remove_unused_columns=False,
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="epoch",
        logging_strategy="no",
    )
    callback = eq.hf.BalancerCallback(balanced.balancing)
    trainer = transformers.Trainer(balanced, args, train_dataset=samples, callbacks=[callback, *callbacks])
    trainer.train(resume_from_checkpoint=resume)
    return model, balanced.balancing.balancers


FRAMEWORKS = {
    "own model in a `LightningModule`": under_lightning,
    "own model under `transformers.Trainer`": under_trainer,
}


def ogm(model):
    return [eq.balance.OGM(model, alpha=0.5)]


def watched(fit, folder):
    lightning = fit is under_lightning
    callback = (eq.lightning if lightning else eq.hf).WatchCallback(every_n_steps=2)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="WatchCallback: the Trainer has no logger")
        fit(ogm, folder, callback)
    assert {"watch/share/audio", "watch/share/image", "watch/gradient/audio"} <= set(callback.last)


def rotated(fit, folder):
    def make(model):
        rolling = eq.balance.RollingQ(model.model.attention, names=model.names, beta=0.0)
        rolling.layout(LABELS)
        return [rolling]

    model, (rolling,) = fit(make, folder)
    assert int(rolling.rotations) == 1
    before = model.eval().output_of(model(DATA[0])).logits
    eq.merge_rotations(model)
    torch.testing.assert_close(model.output_of(model(DATA[0])).logits, before, rtol=1e-4, atol=1e-5)


def trained(name):
    def train(fit, folder):
        model, _ = fit(lambda model: [getattr(eq.balance, name)(model)], folder)
        assert any(
            not torch.equal(one, other) for one, other in zip(model.parameters(), adapted().parameters(), strict=True)
        )

    return train


def resumed(fit, folder):
    """One epoch, saving and one epoch equal two epochs."""
    full, balancers = fit(ogm, folder)
    if fit is under_lightning:
        fit(ogm, folder, epochs=1, save=folder / "one.ckpt")
        first = str(folder / "one.ckpt")
    else:
        first = str(folder / "checkpoint-3")
    again, others = fit(ogm, folder / "again", resume=first)
    for one, other in zip(full.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    assert int(balancers[0].epoch) == int(others[0].epoch) == 2


def responded(fit, folder):
    eq.diagnostics.noise_response(fit(ogm, folder)[0], DATA)


def diagnosed(fit, folder):
    assert not eq.diagnose(fit(ogm, folder)[0], DATA, tests=["score", "noise", "masking", "gradients"]).skipped


METHODS = {
    "watch": watched, "RollingQ": rotated, "OGM": trained("OGM"), "MMPareto": trained("MMPareto"),
    "ModalityCorruption": trained("ModalityCorruption"), "noise_response": responded, "diagnose": diagnosed,
    "save/resume": resumed,
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", FRAMEWORKS)
def test_each_method_works_in_a_training_framework(kind, method, tmp_path):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(pytree|pin_memory|weights_only).*")
        warnings.filterwarnings("ignore", message="noise_response: ")
        METHODS[method](FRAMEWORKS[kind], tmp_path)
    assert matrix()[kind][method] == "works"
