"""Balancing under transformers' Trainer: as in a plain loop, accumulated, resumed, clipped after the balancers."""

import json
import warnings
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn

import equipoise as eq
from equipoise.errors import ConfigError
from small_fusion import NAMES, batch, model
from tolerance import TOL

CLOSE = TOL[torch.float32]
SIZE, PER_STEP, EPOCHS = 20, 4, 3


def samples(size=SIZE, seed=0):
    """One dict for each sample, as datasets have them."""
    whole = batch(size=size, seed=seed, dtype=torch.float32)
    whole["labels"] = whole.pop("target")
    return [{name: value[i] for name, value in whole.items()} for i in range(size)]


def small(fusion=None, **options):
    torch.manual_seed(0)
    if fusion is None:
        return model(dtype=torch.float32, **options)
    encoders = {"audio": nn.Linear(3, 12), "image": nn.Linear(5, 12)}
    return eq.FusionModel(encoders, fusion, 3, unimodal="train")


def ogm(made):
    return [eq.OGM(made, alpha=0.5)]


def both(made):
    return [
        *ogm(made),
        eq.RollingQ(made.fusion.attention, beta=0.0, tail=None, max_rotations=None, warmup_epochs=1),
    ]


def arguments(folder, **options):
    options = {
        "num_train_epochs": EPOCHS, "per_device_train_batch_size": PER_STEP, "learning_rate": 0.1, "optim": "sgd",
        "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "remove_unused_columns": False, "save_strategy": "no",
        "report_to": "none", "disable_tqdm": True, "use_cpu": True, "logging_strategy": "no", **options,
    }  # fmt: skip
    return transformers.TrainingArguments(str(folder), **options)


def trainer(folder, made, balancers, *, callback=None, data=None, evaluation=None, **options):
    balanced = eq.hf.Balanced(made, eq.Balancing(made, balancers))
    return transformers.Trainer(
        balanced, arguments(folder, **options), train_dataset=data or samples(), eval_dataset=evaluation,
        callbacks=[eq.hf.BalanceCallback(balanced.balancing, **(callback or {}))],
    )  # fmt: skip


def train(*given, resume=None, **options):
    made = trainer(*given, **options)
    with warnings.catch_warnings():
        # Of torch's loaders, about memory that no accelerator reads.
        warnings.filterwarnings("ignore", message=".*pin_memory.*")
        made.train(resume_from_checkpoint=resume)
    return made


def same(one, other):
    one, other = one.model.state_dict(), other.model.state_dict()
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=0, equal_nan=True)


def test_trainer_does_what_a_plain_loop_does(tmp_path):
    net = small()
    made = train(tmp_path, net, both(net), train_sampling_strategy="sequential")
    plain = small()
    balancing = eq.Balancing(plain, both(plain))
    optimiser, data = torch.optim.SGD(plain.parameters(), lr=0.1), samples()
    plain.train()
    for _ in range(EPOCHS):
        for start in range(0, SIZE, PER_STEP):
            part = torch.utils.data.default_collate(data[start : start + PER_STEP])
            target = part.pop("labels")
            optimiser.zero_grad()
            balancing.loss(plain(part), target).backward()
            balancing.before_step()
            optimiser.step()
        said = balancing.end_epoch()
    for (name, found), wanted in zip(net.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(found, wanted, **CLOSE, equal_nan=True, msg=name)
    callback = next(c for c in made.callback_handler.callbacks if isinstance(c, eq.hf.BalanceCallback))
    assert callback.last == pytest.approx(said, rel=1e-4)
    assert said["rotations"] > 0
    assert said["scale/audio"] != said["scale/image"]
    logged = [entry for entry in made.state.log_history if "balance/air" in entry]
    assert [entry["step"] for entry in logged] == [5, 10, 15]
