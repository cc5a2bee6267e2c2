"""WatchCallback of Lightning and of transformers: logged values equal direct measurements, and training is
unchanged.
"""

import copy
import csv
import warnings

import lightning.pytorch as pl
import pytest
import torch
import transformers
from lightning.pytorch.loggers import CSVLogger

import equipoise as eq
from equipoise.errors import ConfigError
from equipoise.training.run import quiet_lightning
from helpers import own_models
from helpers.vlms import llava

NAMES = ("audio", "image")


def batches(count=6):
    return [own_models.batch(seed) for seed in range(count)]


def fusion_model(**options):
    torch.manual_seed(0)
    encoders = {"audio": torch.nn.Linear(5, 8), "image": torch.nn.Linear(7, 8)}
    fusion = eq.fusion.JointAttention(8, heads=2, depth=2, **{"dropout": 0.2, **options})
    return eq.FusionModel(encoders, fusion, 3)


def adapted_model():
    torch.manual_seed(0)
    return eq.adapt(own_models.EncoderNet(), encoders={"audio": "wave", "image": "pixels"}, example=batches(1)[0])


class Module(pl.LightningModule):
    def __init__(self, model, *balancers):
        super().__init__()
        self.model, self.balancing = model, eq.BalancerList(model, balancers)

    def training_step(self, batch, index):
        return self.balancing.loss(self.model(batch), batch["target"])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(module, *callbacks, logger=False, data=None, **options):
    torch.manual_seed(1)
    with quiet_lightning():
        trainer = pl.Trainer(
            max_epochs=2, accelerator="cpu", logger=logger, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, callbacks=list(callbacks), **options,
        )  # fmt: skip
        trainer.fit(module, torch.utils.data.DataLoader(data or batches(), batch_size=None))
    return trainer


def logged(folder):
    """step -> values under watch/ in a CSV file of Lightning."""
    result = {}
    with open(folder / "metrics.csv", newline="") as file:
        for row in csv.DictReader(file):
            values = {name: float(text) for name, text in row.items() if name.startswith("watch/") and text}
            if values:
                result[int(row["step"])] = values
    return result


def norm(module):
    return float(torch.cat([p.grad.flatten() for p in module.parameters()]).norm())


@pytest.mark.parametrize("build", [fusion_model, adapted_model])
@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}])
def test_weights_are_equal_with_and_without(build, options, tmp_path):
    modules = [Module(build()) for _ in range(2)]
    fit(modules[0], **options)
    callback = eq.lightning.WatchCallback(every_n_steps=2)
    fit(modules[1], callback, logger=CSVLogger(tmp_path, name="", version=""), **options)
    assert {name.split("/")[1] for name in callback.last} == {"share", "gradient"}
    for one, other in zip(modules[0].parameters(), modules[1].parameters(), strict=True):
        assert torch.equal(one, other)


def test_values_are_those_of_a_direct_measurement(tmp_path):
    model = fusion_model(dropout=0.0)
    module = Module(model, eq.balance.RollingQ(model.fusion.attention, tail=None))
    twin, data = copy.deepcopy(module), batches()
    fit(
        module, eq.lightning.WatchCallback(every_n_steps=4), eq.lightning.BalancerCallback(module.balancing),
        logger=CSVLogger(tmp_path, name="", version="", flush_logs_every_n_steps=1), data=data,
    )  # fmt: skip
    values = logged(tmp_path)
    assert sorted(values) == [0, 4, 8]
    torch.manual_seed(1)
    with eq.watch(twin.model) as record:
        twin.training_step(data[0], 0).backward()
    rows = record.table()
    for name in NAMES:
        mean = sum(row[name] for row in rows) / len(rows)
        assert values[0][f"watch/share/{name}"] == pytest.approx(mean, rel=1e-6)
        assert values[0][f"watch/gradient/{name}"] == pytest.approx(norm(twin.model.encoders[name]), rel=1e-5)
        # RollingQ counts a batch when the optimizer steps on it: there is none before the first step.
        assert f"watch/air/{name}" not in values[0]
        assert -2 <= values[4][f"watch/air/{name}"] <= 2
    assert values[4]["watch/air/audio"] == pytest.approx(-values[4]["watch/air/image"], abs=1e-5)


def test_layers_are_logged_one_by_one(tmp_path):
    callback = eq.lightning.WatchCallback(every_n_steps=5, per_layer=True, gradients=False)
    module = Module(fusion_model())
    fit(module, callback, logger=CSVLogger(tmp_path, name="", version=""))
    with eq.watch(module) as record:
        module.model(batches(1)[0])
    assert set(callback.last) == {f"watch/share/{layer}/{name}" for layer in record.layers for name in NAMES}


def test_no_recording_in_other_steps(tmp_path, monkeypatch):
    from equipoise.integrations import step_watcher

    opened = []
    real = step_watcher.watch
    monkeypatch.setattr(step_watcher, "watch", lambda *given, **options: opened.append(1) or real(*given, **options))
    fit(Module(fusion_model()), eq.lightning.WatchCallback(every_n_steps=5), logger=CSVLogger(tmp_path))
    assert len(opened) == 3  # steps 0, 5 and 10 of 12


def test_unmeasured_layers_warn_once(tmp_path):
    class Static(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.audio, self.image = torch.nn.Linear(5, 3), torch.nn.Linear(7, 3)

        def training_step(self, batch, index):
            logits = self.audio(batch["audio"]).mean(1) + self.image(batch["image"]).mean(1)
            return torch.nn.functional.cross_entropy(logits, batch["target"])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    callback = eq.lightning.WatchCallback(every_n_steps=1)
    with warnings.catch_warnings(record=True) as messages:
        warnings.simplefilter("always")
        fit(Static(), callback)
    texts = [str(w.message) for w in messages if "WatchCallback" in str(w.message)]
    assert len(texts) == 3, texts
    for part in ("no logger", "no shares", "no gradient norms: the encoders are unknown"):
        assert sum(part in text for text in texts) == 1
    named = eq.lightning.WatchCallback(share=False, encoders={"audio": "audio", "image": ["image"]})
    with pytest.warns(UserWarning, match="no logger"):
        fit(Static(), named)
    assert set(named.last) == {"watch/gradient/audio", "watch/gradient/image"}


def test_options_are_checked():
    for number in (0, -1, 1.5, True):
        with pytest.raises(ConfigError, match="every_n_steps >= 1"):
            eq.lightning.WatchCallback(number)
        with pytest.raises(ConfigError, match="every_n_steps >= 1"):
            eq.hf.WatchCallback(number)
    with pytest.raises(TypeError, match="every_steps"):
        eq.lightning.WatchCallback(every_steps=3)
    unknown = eq.lightning.WatchCallback(encoders={"audio": "ears"}, share=False)
    with (
        pytest.warns(UserWarning, match="no logger"),
        pytest.raises(ConfigError, match=r"encoders\['audio'\], got 'ears'"),
    ):
        fit(Module(fusion_model()), unknown)


def test_an_exception_in_a_measured_step_restores_the_model(tmp_path):
    class Broken(Module):
        def training_step(self, batch, index):
            super().training_step(batch, index)
            raise RuntimeError("out of memory")

    module = Broken(fusion_model())
    before = len(torch.nn.modules.module._global_forward_hooks)
    with pytest.raises(RuntimeError, match="out of memory"):
        fit(module, eq.lightning.WatchCallback(1), logger=CSVLogger(tmp_path))
    assert len(torch.nn.modules.module._global_forward_hooks) == before


# transformers


def vlm():
    torch.manual_seed(0)
    model, inputs = llava()
    model.config.text_config.attention_dropout = 0.2
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    samples = [{name: value[i] for name, value in inputs.items()} for _ in range(4) for i in range(2)]
    return model, samples


def hf_trainer(folder, model, samples, *callbacks, **options):
    options = {
        "num_train_epochs": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.1,
        "optim": "sgd",
        "report_to": "none",
        "logging_strategy": "no",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
        **options,
    }
    args = transformers.TrainingArguments(str(folder), **options)
    return transformers.Trainer(model, args, train_dataset=samples, callbacks=list(callbacks))


@pytest.fixture
def calm():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(deprecated|pytree|use_reentrant|pin_memory).*")
        yield


@pytest.mark.parametrize(
    "options",
    [pytest.param({}, marks=pytest.mark.slow), {"gradient_accumulation_steps": 2}, {"gradient_checkpointing": True}],
)
def test_a_vision_language_model_under_trainer_is_unchanged(options, tmp_path, calm):
    plain, samples = vlm()
    hf_trainer(tmp_path, plain, samples, **options).train()
    watched, _ = vlm()
    callback = eq.hf.WatchCallback(every_n_steps=2)
    trainer = hf_trainer(tmp_path, watched, samples, callback, **options)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "watch/share/image" in entry]
    steps = trainer.state.global_step
    assert [entry["step"] for entry in entries] == list(range(0, steps, 2))
    assert {f"watch/{kind}/{name}" for kind in ("share", "gradient") for name in ("text", "image")} <= set(
        callback.last
    )
    for entry in entries:
        assert entry["watch/share/image"] + entry["watch/share/text"] == pytest.approx(1.0, abs=1e-5)
    for one, other in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(one, other)


def test_values_under_trainer_are_those_of_a_direct_measurement(tmp_path, calm):
    model, samples = vlm()
    model.config.text_config.attention_dropout = 0.0
    twin = copy.deepcopy(model).train()
    callback = eq.hf.WatchCallback(100)
    hf_trainer(
        tmp_path, model, samples[:2], callback, max_steps=1, max_grad_norm=0.0, train_sampling_strategy="sequential"
    ).train()
    batch = {name: torch.stack([sample[name] for sample in samples[:2]]) for name in samples[0]}
    with eq.watch(twin) as record:
        twin(**batch).loss.backward()
    for name in ("text", "image"):
        mean = sum(row[name] for row in record.table()) / len(record.layers)
        assert callback.last[f"watch/share/{name}"] == pytest.approx(mean, rel=1e-5)
    assert callback.last["watch/gradient/image"] == pytest.approx(norm_of(twin.model.vision_tower), rel=1e-4)


def norm_of(module):
    return float(torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None]).norm())


def test_an_attached_callback_logs_to_tensorboard(tmp_path, calm):
    pytest.importorskip("tensorboard")
    warnings.filterwarnings("ignore")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model, samples = vlm()
    trainer = hf_trainer(tmp_path / "out", model, samples, report_to="tensorboard")
    callback = eq.hf.WatchCallback(every_n_steps=3).attach(trainer)
    assert callback.attach(trainer) is callback
    assert trainer.callback_handler.callbacks.count(callback) == 1
    trainer.train()
    events = {}
    for file in tmp_path.rglob("events.out*"):
        accumulator = EventAccumulator(str(file))
        accumulator.Reload()
        events |= {tag: accumulator.Scalars(tag) for tag in accumulator.Tags()["scalars"]}
    result = {tag: [event.step for event in values] for tag, values in events.items() if "watch/" in tag}
    assert len(result) >= 4
    assert all(steps == [0, 3, 6] for steps in result.values())
    assert any("watch/share/image" in entry for entry in trainer.state.log_history)
