"""BalancerList in the Trainer of transformers: equal to a plain loop; accumulation, resuming, order of clipping."""

import copy
import json
import os
import re
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
import transformers
from torch import nn

import equipoise as eq
from equipoise.errors import ConfigError
from equipoise.training.run import quiet_lightning
from helpers.fusion import batch, joint_model
from helpers.processes import process_group
from helpers.tolerance import TOL

CLOSE = TOL[torch.float32]
SIZE, PER_STEP, EPOCHS = 20, 4, 3


def samples(size=SIZE, seed=0):
    """Returns one dict per sample, as data sets do."""
    full = batch(size=size, seed=seed, dtype=torch.float32)
    full["labels"] = full.pop("target")
    return [{name: value[i] for name, value in full.items()} for i in range(size)]


def build_model(fusion=None, **options):
    torch.manual_seed(0)
    if fusion is None:
        return joint_model(dtype=torch.float32, **options)
    encoders = {"audio": nn.Linear(3, 12), "image": nn.Linear(5, 12)}
    return eq.FusionModel(encoders, fusion, 3, unimodal="train")


def build_ogm(model):
    return [eq.balance.OGM(model, alpha=0.5)]


def build_both(model):
    return [
        *build_ogm(model),
        eq.balance.RollingQ(model.fusion.attention, beta=0.0, tail=None, max_rotations=None, warmup_epochs=1),
    ]


def training_arguments(folder, **options):
    options = {
        "num_train_epochs": EPOCHS, "per_device_train_batch_size": PER_STEP, "learning_rate": 0.1, "optim": "sgd",
        "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "remove_unused_columns": False, "save_strategy": "no",
        "report_to": "none", "disable_tqdm": True, "use_cpu": True, "logging_strategy": "no", **options,
    }  # fmt: skip
    return transformers.TrainingArguments(str(folder), **options)


class InOrder(transformers.Trainer):
    """A Trainer without shuffling, for comparison with plain loops."""

    def _get_train_sampler(self, *given):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def build_trainer(folder, model, balancers, *, callback=None, data=None, evaluation=None, in_order=False, **options):
    balanced = eq.hf.BalancedModel(model, eq.BalancerList(model, balancers))
    return (InOrder if in_order else transformers.Trainer)(
        balanced, training_arguments(folder, **options), train_dataset=data or samples(), eval_dataset=evaluation,
        callbacks=[eq.hf.BalancerCallback(balanced.balancing, **(callback or {}))],
    )  # fmt: skip


def train(*given, resume=None, **options):
    result = build_trainer(*given, **options)
    with warnings.catch_warnings():
        # A warning of torch's loaders about pinned memory without an accelerator.
        warnings.filterwarnings("ignore", message=".*pin_memory.*")
        result.train(resume_from_checkpoint=resume)
    return result


def assert_same_state(one, other):
    one, other = one.model.state_dict(), other.model.state_dict()
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=0, equal_nan=True)


def test_trainer_equals_a_plain_loop(tmp_path):
    net = build_model()
    result = train(tmp_path, net, build_both(net), in_order=True)
    plain = build_model()
    balancing = eq.BalancerList(plain, build_both(plain))
    optimizer, data = torch.optim.SGD(plain.parameters(), lr=0.1), samples()
    plain.train()
    for _ in range(EPOCHS):
        for start in range(0, SIZE, PER_STEP):
            part = torch.utils.data.default_collate(data[start : start + PER_STEP])
            target = part.pop("labels")
            optimizer.zero_grad()
            balancing.loss(plain(part), target).backward()
            balancing.before_step()
            optimizer.step()
        message = balancing.end_epoch()
    for (name, actual), expected in zip(net.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(actual, expected, **CLOSE, equal_nan=True, msg=name)
    callback = next(c for c in result.callback_handler.callbacks if isinstance(c, eq.hf.BalancerCallback))
    assert callback.last == pytest.approx(message, rel=1e-4)
    assert message["rotations"] > 0
    assert message["scale/audio"] != message["scale/image"]
    logged = [entry for entry in result.state.log_history if "balance/air" in entry]
    assert [entry["step"] for entry in logged] == [5, 10, 15]


def test_accumulated_batches_equal_one_large_batch(tmp_path):
    options = {"num_train_epochs": 2, "in_order": True}
    large, parts = build_model(), build_model()
    train(tmp_path, large, build_both(large), **options)
    train(
        tmp_path,
        parts,
        build_both(parts),
        per_device_train_batch_size=PER_STEP // 2,
        gradient_accumulation_steps=2,
        **options,
    )
    for (name, result), expected in zip(parts.state_dict().items(), large.state_dict().values(), strict=True):
        if "rolling" not in name or name.endswith("rotation"):
            torch.testing.assert_close(result, expected, **CLOSE, msg=name)
    assert int(parts.fusion.attention.core.rolling.rotations) == 1


@pytest.mark.parametrize(
    ("balancers", "step", "options"),
    [
        pytest.param(build_both, 5, {"dropout": 0.2}, marks=pytest.mark.slow),
        (build_both, 7, {"dropout": 0.2}),
        pytest.param(
            lambda made: [eq.balance.GradientBlending(made, every=1)],
            5,
            {"fusion": eq.fusion.Concat},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            lambda made: [eq.balance.ProgressiveRollingQ(made.fusion, epochs=EPOCHS, beta=0.0, tail=None)],
            7,
            {"depth": 2},
            marks=pytest.mark.slow,
        ),
        (
            lambda made: [
                eq.balance.RollingQ(made.fusion.attention, statistics="full_pass"),
                eq.balance.PMR(made, fraction=0.5),
            ],
            7,
            {},
        ),
    ],
)
def test_resumed_run_equals_an_uninterrupted_run(balancers, step, options, tmp_path):
    options = {name: value(12) if name == "fusion" else value for name, value in options.items()}
    val = torch.utils.data.DataLoader(samples(7, seed=1), 7)

    def run(folder, **given):
        result = copy.deepcopy(build_model(**options))
        return train(folder, result, balancers(result), callback={"val": val}, **given)

    saved = run(tmp_path, save_strategy="steps", save_steps=step)
    # Another output folder: the balancer state is loaded together with the weights.
    resumed = run(tmp_path / "other", resume=str(tmp_path / f"checkpoint-{step}"))
    assert_same_state(resumed, saved)
    logs = [
        [json.dumps(entry, sort_keys=True) for entry in result.state.log_history if "train_runtime" not in entry]
        for result in (saved, resumed)
    ]
    assert len(logs[0]) == EPOCHS
    assert logs[0] == logs[1]


def test_incomplete_epoch_does_not_call_end_epoch(tmp_path):
    model = build_model()
    balancers = build_both(model)
    train(tmp_path, model, balancers, max_steps=7)
    assert int(balancers[0].epoch) == 1


class Stream(torch.utils.data.IterableDataset):
    """An iterable data set without a length."""

    def __iter__(self):
        return iter(samples(8))


def test_data_of_unknown_length(tmp_path):
    model = build_model()
    balancers = build_both(model)
    train(tmp_path, model, balancers, data=Stream(), max_steps=5)
    assert int(balancers[0].epoch) == 2


def test_evaluation_uses_the_task_loss_and_updates_no_balancer(tmp_path):
    model = build_model()
    balancers = build_both(model)
    run = build_trainer(tmp_path, model, balancers, evaluation=samples(11, seed=2), per_device_eval_batch_size=11)
    before = [balancer.state_dict() for balancer in balancers]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*pin_memory.*")
        result = run.evaluate()
    full = batch(size=11, seed=2, dtype=torch.float32)
    expected = model.loss(model.eval()(full).logits, full["target"])
    assert result["eval_loss"] == pytest.approx(float(expected.detach()), rel=1e-5)
    for old, balancer in zip(before, balancers, strict=True):
        assert all(torch.equal(old[name], value) for name, value in balancer.state_dict().items() if "air" not in name)
    assert set(run.model(**{name: full[name] for name in ("audio", "image")})) == {"logits"}


def test_best_model_is_loaded_with_its_balancers(tmp_path):
    model = build_model()
    balancers = build_both(model)
    options = {"save_strategy": "epoch", "eval_strategy": "epoch", "load_best_model_at_end": True}
    # Select the worst model as the best, so that it is not the last one.
    run = train(tmp_path, model, balancers, evaluation=samples(), greater_is_better=True, **options)
    assert run.state.best_global_step < EPOCHS * SIZE // PER_STEP
    assert int(balancers[0].epoch) == run.state.best_global_step // (SIZE // PER_STEP)
    assert int(balancers[1].epochs) == int(balancers[0].epoch)


def test_half_precision(tmp_path):
    model = build_model()
    balancers = build_both(model)
    run = train(tmp_path, model, balancers, bf16=True)
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert int(balancers[1].rotations) > 0
    assert run.state.log_history[0]["balance/scale/audio"] != run.state.log_history[0]["balance/scale/image"]


@pytest.mark.parametrize("page", ["hugging_face.md", "methods/encoders.md"])
def test_documentation_pages_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[2] / "docs" / page).read_text(encoding="utf-8")
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*pin_memory.*")
            exec(compile(block, page, "exec"), {"__name__": "page"})


def gradient_norms(tmp_path, balancers, **options):
    """Returns the gradient norms of every encoder's matrix in one step with Trainer."""
    model = build_model(eq.fusion.Concat(12))
    before = {name: encoder.weight.detach().clone() for name, encoder in model.encoders.items()}
    train(tmp_path, model, balancers(model), max_steps=1, in_order=True, **options)
    return {name: float((model.encoders[name].weight.detach() - before[name]).norm()) for name in before}


class GradientScaler(eq.balance.Balancer):
    """A balancer that scales the gradient of one encoder."""

    def gradient_scale(self, output, target):
        return {"audio": 0.25}


def test_clipping_after_the_balancers(tmp_path):
    full = gradient_norms(tmp_path, lambda model: [])
    clip = 0.1
    model = build_model(eq.fusion.Concat(12))
    part = torch.utils.data.default_collate(samples()[:PER_STEP])
    target = part.pop("labels")
    eq.BalancerList(model).loss(model(part), target).backward()
    squares = {name: float(p.grad.square().sum()) for name, p in model.named_parameters() if p.grad is not None}
    norm = sum(squares.values()) ** 0.5
    after = (norm**2 - (1 - 0.25**2) * squares["encoders.audio.weight"]) ** 0.5
    assert after > 2 * clip
    ours = gradient_norms(tmp_path, lambda model: [GradientScaler()], callback={"clip": clip})
    assert ours["audio"] == pytest.approx(0.25 * clip / after * full["audio"], rel=1e-4)
    assert ours["image"] == pytest.approx(clip / after * full["image"], rel=1e-4)
    with pytest.warns(
        UserWarning, match=r"clips gradients before GradientScaler changes them.*BalancerCallback\(clip=0\.1\)"
    ):
        theirs = gradient_norms(tmp_path, lambda model: [GradientScaler()], max_grad_norm=clip)
    assert theirs["audio"] == pytest.approx(0.25 * clip / norm * full["audio"], rel=1e-4)
    assert theirs["image"] == pytest.approx(clip / norm * full["image"], rel=1e-4)


class LightningStep(pl.LightningModule):
    """The same step in Lightning, which clips after the balancers."""

    def __init__(self, model, balancing):
        super().__init__()
        self.made, self.balancing = model, balancing

    def training_step(self, part, index):
        return self.balancing.loss(self.made(part), part["labels"])

    def configure_optimizers(self):
        return torch.optim.SGD(self.made.parameters(), lr=0.1)


def test_lightning_clips_in_the_same_order(tmp_path):
    ours = gradient_norms(tmp_path, lambda model: [GradientScaler()], callback={"clip": 0.1})
    model = build_model(eq.fusion.Concat(12))
    before = {name: encoder.weight.detach().clone() for name, encoder in model.encoders.items()}
    lit = LightningStep(model, eq.BalancerList(model, [GradientScaler()]))
    with quiet_lightning():
        pl.Trainer(
            max_steps=1,
            gradient_clip_val=0.1,
            callbacks=[eq.lightning.BalancerCallback(lit.balancing)],
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(lit, torch.utils.data.DataLoader(samples(), PER_STEP))
    for name, expected in ours.items():
        result = float((model.encoders[name].weight.detach() - before[name]).norm())
        assert result == pytest.approx(expected, rel=1e-4)


def test_missing_transformers_raises(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "equipoise.integrations.huggingface")
    with pytest.raises(
        eq.errors.MissingExtraError,
        match=r"eq\.hf: expected the package 'transformers', got none installed\. Install it: pip install "
        r"'equipoise\[hf",
    ):
        _ = eq.hf


class CustomModel(transformers.PreTrainedModel):
    """A Hugging Face model that computes its own loss."""

    config_class = transformers.PreTrainedConfig
    accepts_loss_kwargs = False

    def __init__(self, config):
        super().__init__(config)
        self.net = build_model()
        self.balancing = eq.BalancerList(self.net, build_both(self.net))
        eq.hf.keep_state(self, self.balancing)
        self.post_init()

    def _init_weights(self, module):
        pass

    def forward(self, audio, image, labels):
        output = self.net({"audio": audio, "image": image})
        return {"loss": self.balancing.loss(output, labels), "logits": output.logits}


def test_custom_model_keeps_the_balancer_state(tmp_path):
    def run(folder, resume=None):
        result = CustomModel(transformers.PreTrainedConfig())
        args = training_arguments(folder, save_strategy="steps", save_steps=7, remove_unused_columns=True)
        callbacks = [eq.hf.BalancerCallback(result.balancing)]
        own = transformers.Trainer(result, args, train_dataset=samples(), callbacks=callbacks)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*pin_memory.*")
            own.train(resume_from_checkpoint=resume)
        return own

    straight = run(tmp_path)
    assert int(straight.model.state_dict()["balance.0.epoch"]) == EPOCHS
    assert_same_state(run(tmp_path / "other", resume=str(tmp_path / "checkpoint-7")), straight)


def test_state_dict_reports_missing_and_unexpected_keys():
    def balanced(balancers):
        model = build_model()
        return eq.hf.BalancedModel(model, eq.BalancerList(model, balancers(model)))

    one = balanced(build_ogm)
    one.balancing.balancers[0].epoch += 5
    state = one.state_dict()
    assert {name for name in state if not name.startswith("model.")} == {"balance.0.epoch", "balance.0.used"}
    other = balanced(build_ogm)
    other.load_state_dict(state)
    assert int(other.balancing.balancers[0].epoch) == 5
    plain = {name: value for name, value in state.items() if name != "balance.0.used"}
    assert other.load_state_dict(plain, strict=False).missing_keys == ["balance.0.used"]
    with pytest.raises(RuntimeError, match=r"Missing key\(s\).*balance\.0\.used"):
        other.load_state_dict(plain)
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\).*balance\.0\.odd"):
        other.load_state_dict({**state, "balance.0.odd": torch.zeros(())})
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\).*balance\.0\.epoch"):
        balanced(lambda made: []).load_state_dict(state)


def test_wrapped_models_restore_their_state():
    model = build_model()
    one = eq.hf.BalancedModel(model, eq.BalancerList(model, build_ogm(model)))
    state = copy.deepcopy(nn.Sequential(one).state_dict())
    assert "0.balance.0.epoch" in state
    one.balancing.balancers[0].epoch += 3
    nn.Sequential(one).load_state_dict(state)
    assert int(one.balancing.balancers[0].epoch) == 0


ARGUMENTS = {
    "world_size": 1, "n_gpu": 0, "fp16": False, "deepspeed": None, "fsdp": [], "ddp_find_unused_parameters": None,
    "max_grad_norm": 0.0, "remove_unused_columns": False, "save_strategy": "epoch",
}  # fmt: skip


def worker(rank, folder):
    index = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}
    os.environ.update({name: str(value) for name, value in index.items()})
    # Initialize the process group first, so that Trainer does not search for a free port.
    with process_group(rank, folder):
        model = build_model()
        options = {"per_device_train_batch_size": PER_STEP // 2, "ddp_backend": "gloo", "num_train_epochs": 2}
        run = train(folder, model, build_both(model), in_order=True, save_strategy="epoch", **options)
        assert run.args.world_size == 2
        torch.save(run.model.state_dict(), f"{folder}/{rank}.pt")


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_equal_one_with_the_doubled_batch(tmp_path):
    torch.multiprocessing.spawn(worker, args=(str(tmp_path),), nprocs=2)
    model = build_model()
    alone = train(tmp_path / "alone", model, build_both(model), in_order=True, num_train_epochs=2)
    result = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for name, expected in alone.model.state_dict().items():
        if name != "model.fusion.attention.core.rolling._extra_state":
            torch.testing.assert_close(result[0][name], expected.to(result[0][name]), **CLOSE, msg=name)
            assert torch.equal(result[0][name], result[1][name])
    assert int(result[0]["model.fusion.attention.core.rolling.rotations"]) == 1


class MultiStep(eq.balance.Balancer):
    steps_per_batch = 2


class PartialGraph(eq.balance.Balancer):
    partial_graph = True


def begin_training(balancers=build_ogm, wrapped=True, clip=None, **options):
    model = build_model()
    balancing = eq.BalancerList(model, balancers(model))
    callback = eq.hf.BalancerCallback(balancing, clip=clip)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    given = eq.hf.BalancedModel(model, balancing) if wrapped else model
    args = SimpleNamespace(**{**ARGUMENTS, **options})
    callback.on_train_begin(args, None, None, model=given, optimizer=optimizer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"balancers": lambda made: [MultiStep()]}, r"one that takes several\. Use equipoise's own"),
        ({"fsdp": ["full_shard"]}, "got FSDP, under which a process has a part of each parameter"),
        ({"deepspeed": "zero.json"}, "got DeepSpeed, which steps inside backward. Use DistributedDataParallel"),
        ({"n_gpu": 3}, "one device for each process, got 3 under DataParallel.*torchrun"),
        (
            {"balancers": lambda made: [PartialGraph()], "world_size": 2},
            "expected ddp_find_unused_parameters=True, since some parameters .* got None",
        ),
        ({"remove_unused_columns": True}, "BalancerCallback: expected remove_unused_columns=False, .* got True"),
        ({"clip": 0.5, "max_grad_norm": 1.0}, r"max_grad_norm=0 in TrainingArguments .* got 1\.0\. .* clipped twice"),
        ({"fp16": True}, r"expected max_grad_norm=float\('inf'\) under fp16, since Trainer unscales .* got 0\.0\."),
        ({"fp16": True, "max_grad_norm": None}, "got None"),
        ({"wrapped": False}, r"contain the state of the balancers, got FusionModel\. Train eq\.hf\.Balanced"),
        ({"clip": 0.0}, r"BalancerCallback: expected clip > 0 or None, got clip = 0\.0"),
    ],
)
def test_errors_before_training(options, message):
    with pytest.raises(ConfigError, match=message):
        begin_training(**options)


def test_allowed_configurations():
    begin_training()
    begin_training(clip=0.5, max_grad_norm=None)
    begin_training(clip=0.5, max_grad_norm=float("inf"), fp16=True)
    begin_training(balancers=lambda made: [PartialGraph()], world_size=2, ddp_find_unused_parameters=True)
    begin_training(wrapped=False, save_strategy="no", remove_unused_columns=True)
    begin_training(
        balancers=lambda made: [eq.balance.RollingQ(made.fusion.attention)], wrapped=False, max_grad_norm=1.0
    )


def test_balancer_list_of_another_model_raises():
    model = build_model()
    callback = eq.hf.BalancerCallback(eq.BalancerList(model, build_ogm(model)))
    wrapped = eq.hf.BalancedModel(model, eq.BalancerList(model, build_ogm(model)))
    with pytest.raises(ConfigError, match=r"expected the balancing of the trained model, .* model\.balancing"):
        callback.on_train_begin(SimpleNamespace(**ARGUMENTS), None, None, model=wrapped, optimizer=None)


def test_adam_and_other_balancer_lists_warn():
    model = build_model()
    callback = eq.hf.BalancerCallback(eq.BalancerList(model, build_ogm(model)))
    args = SimpleNamespace(**ARGUMENTS)
    optimizer = SimpleNamespace(optimizer=torch.optim.AdamW(model.parameters()))
    with pytest.warns(UserWarning, match="OGM only changes the scale of gradients, which AdamW normalizes away"):
        callback.on_train_begin(
            args, None, None, model=eq.hf.BalancedModel(model, callback.balancing), optimizer=optimizer
        )
    with pytest.raises(
        ConfigError, match="BalancedModel: expected a BalancerList of this model, got one of another FusionModel"
    ):
        eq.hf.BalancedModel(build_model(), eq.BalancerList(model))
