"""BalancerList in a custom LightningModule, and custom balancers in Training."""

import runpy
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

import equipoise as eq
from equipoise.errors import ConfigError, NonFiniteError
from equipoise.integrations.lightning_callbacks import _Moved
from equipoise.training import BalancedTraining, execute_run
from equipoise.training.recipes import TrainOptions
from equipoise.training.run import quiet_lightning
from equipoise.training.run_evaluation import evaluate_run
from helpers.runs import RandomData, loaders, recipe, run_spec
from helpers.tolerance import TOL

EXAMPLES = Path(__file__).parents[2] / "examples"
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}


class CustomModule(pl.LightningModule):
    def __init__(self, source):
        super().__init__()
        self.net = build_model(source)

    def training_step(self, batch, index):
        return self.net.loss(self.net(batch).logits, batch["target"])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def build_model(source, fusion=None, seed=0, **options):
    torch.manual_seed(seed)
    encoders = {name: nn.Linear(shape[-1], 8) for name, shape in source.shapes.items()}
    fusion = fusion or eq.fusion.JointAttention(8, dropout=0.0)
    return eq.FusionModel(encoders, fusion, source.num_outputs, task=source.task, **options)


def fit(module, source, *callbacks, epochs=2, **options):
    with quiet_lightning():
        trainer = pl.Trainer(
            max_epochs=epochs, callbacks=list(callbacks), enable_checkpointing=False, num_sanity_val_steps=0,
            use_distributed_sampler=False, **QUIET, **options,
        )  # fmt: skip
        trainer.fit(module, *loaders(source)[: 2 if isinstance(module, BalancedTraining) else 1])
    return trainer


@pytest.mark.parametrize("statistics", ["tail", "full_pass"])
def test_callback_in_a_custom_module(statistics):
    source = RandomData()
    mine = CustomModule(source)
    if statistics == "full_pass":
        mine.model = mine.net
    balancer = eq.balance.RollingQ(
        mine.net.fusion.attention, beta=0.0, max_rotations=1, warmup_epochs=1, statistics=statistics
    )
    callback = eq.lightning.BalancerCallback(balancer)
    trainer = fit(mine, source, callback, epochs=3)
    assert int(balancer.rotations) == 1
    assert callback.last["rotations"] == float(trainer.callback_metrics["balance/rotations"]) == 1.0
    assert int(balancer.epochs) == 3


def test_callback_saves_the_balancer_state():
    one, other, third = (eq.balance.RollingQ(build_model(RandomData()).fusion.attention) for _ in range(3))
    one.epochs += 5
    state = eq.lightning.BalancerCallback(one).state_dict()
    eq.lightning.BalancerCallback([other]).load_state_dict(state)
    assert int(other.epochs) == 5
    with pytest.raises(
        ConfigError, match=r"BalancerCallback: expected the state of as many balancers = 2, got 1\. Resume with"
    ):
        eq.lightning.BalancerCallback(other, third).load_state_dict(state)


def test_unused_balancer_raises():
    model = build_model(RandomData())
    with pytest.raises(
        ConfigError, match=r"the BalancerList of OGM, which acts in training steps, got OGM alone\. Return"
    ):
        eq.lightning.BalancerCallback(eq.balance.OGM(model))
    assert len(eq.lightning.BalancerCallback(eq.BalancerList(model, [eq.balance.OGM(model)])).balancers) == 1


def test_data_of_unknown_length_is_reviewed():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([torch.ones(2)])

    loader = torch.utils.data.DataLoader(Stream(), batch_size=None)
    assert len(list(_Moved(loader, pl.LightningModule()))) == 1
    assert len(list(_Moved([loader, loader], pl.LightningModule()))) == 2
    assert list(_Moved(None, pl.LightningModule())) == []


class Probe(eq.balance.Balancer):
    """A balancer that records the calls of all hooks."""

    def __init__(self, factors=None, weight=None):
        super().__init__()
        self.factors, self.weight, self.seen = factors, weight, []

    def observe(self, output, target):
        self.seen.append((output.logits.shape, target.shape))

    def penalty(self, output, target):
        return None if self.weight is None else self.weight * output.logits.square().mean()

    def gradient_scale(self, output, target):
        return self.factors


class Gradients(pl.Callback):
    def on_train_batch_end(self, trainer, pl_module, *batch):
        self.found = {name: p.grad.clone() for name, p in pl_module.named_parameters() if p.grad is not None}


def recorded_gradients(balancer, fusion=None):
    source, keep = RandomData(), Gradients()
    module = BalancedTraining(build_model(source, fusion), TrainOptions(epochs=1), balancers=[balancer])
    fit(module, source, keep, epochs=1, limit_train_batches=1)
    return keep.found


@pytest.mark.parametrize("fusion", [None, lambda: eq.fusion.Concat(8)])
def test_gradient_scale_affects_only_encoder_weights(fusion):
    plain, scaled = (
        recorded_gradients(Probe(factors), fusion and fusion())
        for factors in (None, {"audio": torch.tensor(0.25), "image": 3.0})
    )
    for name, gradient in plain.items():
        factor = {"model.encoders.audio.weight": 0.25, "model.encoders.image.weight": 3.0}.get(name, 1.0)
        torch.testing.assert_close(scaled[name], factor * gradient, **TOL[torch.float32])
    assert float(plain["model.encoders.audio.weight"].abs().max()) > 1e-4


def test_penalty_is_added_and_observe_gets_every_batch():
    probe = Probe(weight=2.0)
    with_penalty, without = recorded_gradients(probe), recorded_gradients(Probe())
    source = RandomData()
    model = build_model(source)
    batch = next(iter(loaders(source)[0]))
    (2.0 * model(batch).logits.square().mean()).backward()
    name = "head.weight"
    expected = without[f"model.{name}"] + dict(model.named_parameters())[name].grad
    torch.testing.assert_close(with_penalty[f"model.{name}"], expected, **TOL[torch.float32])
    assert probe.seen == [(torch.Size([16, 3]), torch.Size([16]))]


@pytest.mark.parametrize("task", ["classification", "multilabel", "regression"])
def test_tasks_with_three_modalities(task):
    source = RandomData(("audio", "image", "text"), task)
    model = build_model(source)
    balancer = eq.balance.RollingQ(model.fusion.attention, beta=0.0, max_rotations=1)
    options = TrainOptions(epochs=2, unimodal="train")
    fit(BalancedTraining(model, options, balancers=[balancer]), source, eq.lightning.BalancerCallback(balancer))
    assert int(balancer.rotations) == 1
    result = evaluate_run(model, source, recipe())
    score = "negative_error" if task == "regression" else "accuracy"
    names = {f"{score}_noise/{name}" for name in source.names} | {f"share/{name}" for name in source.names}
    assert names | {score, "noise_attention_r", "noise_attention_r_own", "air", "parameters", "flops"} == set(
        result["metrics"]
    )
    logits = model.eval()({**source.test.inputs}).logits.detach()
    if task == "regression":
        expected = -float((logits - source.test.target).abs().mean())
    elif task == "multilabel":
        expected = float(((logits > 0) == source.test.target.bool()).float().mean())
    else:
        expected = float((logits.argmax(dim=1) == source.test.target).float().mean())
    assert result["metrics"][score] == pytest.approx(expected, abs=1e-5)


def test_non_finite_target_raises():
    source = RandomData(task="regression")
    source.train.target[5] = torch.inf
    with pytest.raises(NonFiniteError, match=r"training, epoch 1, batch \d, target: expected finite values.*index 5\."):
        fit(BalancedTraining(build_model(source), TrainOptions(epochs=1)), source)


def masked_batch(source, *, mask_of):
    """Returns a training batch in which the audio of sample 5 is NaN where ``mask_of`` masks it."""
    values = dict(source.train.inputs)
    mask = mask_of(values["audio"])
    hidden = ~mask.reshape(*mask.shape, *[1] * (3 - mask.ndim)).expand(values["audio"].shape)
    assert bool(hidden[5].any())
    batch = {**values, "audio": values["audio"].masked_fill(hidden, torch.nan), "mask": {"audio": mask}}
    return {**batch, "target": source.train.target, "index": torch.arange(len(mask))}


class Encoder(nn.Linear):
    """An encoder that uses the mask of its tokens."""

    def forward(self, x, mask=None):
        return super().forward(x)


def without_sample(values):
    return torch.arange(len(values)) != 5


def without_tokens(values):
    return torch.arange(values.shape[1]).expand(values.shape[:2]) < values.shape[1] - 2


@pytest.mark.parametrize("encoder", [nn.Linear, Encoder])
@pytest.mark.parametrize("mask_of", [without_sample, without_tokens])
def test_masked_values_are_not_checked(mask_of, encoder):
    source = RandomData()
    options = TrainOptions(epochs=1, optimizer="sgd", learning_rate=0.1)
    batch = masked_batch(source, mask_of=mask_of)

    def train(batch):
        model = build_model(source)
        model.encoders["audio"] = encoder(source.shapes["audio"][-1], 8)
        model._takes_mask["audio"] = encoder is Encoder
        fit_batches(BalancedTraining(model, options), [batch])

    train(batch)
    # The error names the invalid values, not the masked ones.
    image = batch["image"].clone()
    image[7] = torch.inf
    with pytest.raises(NonFiniteError, match=r"modality 'image': .* in 1 of 61 samples, the first has index 7"):
        train({**batch, "image": image})
    audio = batch["audio"].clone()
    audio[9, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"modality 'audio': .* in 1 of 61 samples, the first has index 9"):
        train({**batch, "audio": audio})


def fit_batches(module, batches):
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    with quiet_lightning():
        trainer = pl.Trainer(max_epochs=1, limit_val_batches=0, enable_checkpointing=False, **QUIET)
        trainer.fit(module, loader, loader)


def test_non_finite_loss_raises():
    source = RandomData()
    options = TrainOptions(epochs=9, optimizer="sgd", learning_rate=1e30, warmup=0.0)
    with pytest.raises(NonFiniteError, match=r"although all inputs are finite\. Lower train\.learning_rate"):
        fit(BalancedTraining(build_model(source), options), source, epochs=9)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("plain_loop", "attention-noise r: "),
        ("plain_loop_balancers", "rotations 1.00"),
        ("lightning_balance", "rotations: 1"),
        ("hf_trainer", "'rotations': 1.0"),
    ],
)
def test_examples_run(name, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "2"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert message in capsys.readouterr().out


@pytest.mark.parametrize("name", ["OGM", "RollingQ"])
def test_sharding_strategy_raises(name):
    """Their constructor asks for a GPU, so that the strategies are created here without a Trainer."""
    source = RandomData()
    model = build_model(source)
    layer = {"RollingQ": model.fusion.attention}.get(name, model)
    callback = eq.lightning.BalancerCallback(eq.BalancerList(model, [getattr(eq.balance, name)(layer)]))
    for strategy in (pl.strategies.FSDPStrategy(), pl.strategies.ModelParallelStrategy()):
        trainer = SimpleNamespace(strategy=strategy)
        with pytest.raises(ConfigError, match=f"{name}: expected a strategy .* as ddp, got {type(strategy).__name__}"):
            callback.setup(trainer, model, "fit")
        eq.lightning.BalancerCallback().setup(trainer, model, "fit")


@pytest.mark.parametrize("strategy", ["fsdp", "deepspeed_stage_3"])
def test_run_with_sharding_raises(strategy, tmp_path):
    with pytest.raises(ConfigError, match=f"train: expected a strategy .* got {strategy}, under which a process has a"):
        execute_run(run_spec("joint"), tmp_path / "run", trainer_options={"strategy": strategy})
    assert not (tmp_path / "run").exists()
