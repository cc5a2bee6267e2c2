"""BalancerList in the Hugging Face Trainer, whose saving, resuming and evaluation work unchanged."""

import sys
import tempfile

import torch
from transformers import Trainer, TrainingArguments

import equipoise as eq

EPOCHS = int(sys.argv[1]) if len(sys.argv) > 1 else 8
digits = eq.data.load_dataset("digits")


def samples(split: str) -> list[dict[str, torch.Tensor]]:
    """Returns one dict per sample, with the target under ``"labels"``, as Trainer expects."""
    data = digits.split(split)
    return [
        {**{name: value[i] for name, value in data.inputs.items()}, "labels": data.target[i]} for i in range(len(data))
    ]


def accuracy(result) -> dict[str, float]:
    return {"accuracy": float((result.predictions.argmax(-1) == result.label_ids).mean())}


torch.manual_seed(0)
encoders = {
    "audio": eq.encoders.SequenceEncoder(40, dim=32, depth=1, heads=4, stride=4, max_length=64),
    "image": eq.encoders.PatchEncoder(1, (8, 8), dim=32, depth=1, heads=4, patch=2),
}
inner = eq.FusionModel(encoders, eq.fusion.JointAttention(32), num_outputs=10, unimodal="train")
balancers = [
    eq.balance.OGM(inner, alpha=0.3),
    eq.balance.RollingQ(inner.fusion.attention, beta=0.0, warmup_epochs=EPOCHS // 2),
]
model = eq.hf.BalancedModel(inner, eq.BalancerList(inner, balancers))

with tempfile.TemporaryDirectory() as folder:
    args = TrainingArguments(
        folder,
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=64,
        learning_rate=0.03,
        optim="sgd",  # Adam normalizes away the factors of OGM
        optim_args="momentum=0.9",
        max_grad_norm=0.0,  # the callback clips gradients after the balancers
        remove_unused_columns=False,  # the modalities are not named arguments of forward
        use_cpu=True, report_to="none", disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    callback = eq.hf.BalancerCallback(model.balancing, clip=5.0)
    trainer = Trainer(
        model, args, train_dataset=samples("train"), eval_dataset=samples("test"),
        compute_metrics=accuracy, callbacks=[callback],
    )  # fmt: skip
    trainer.train()
    print(f"last epoch: {callback.last}")
    print(f"accuracy: {trainer.evaluate()['eval_accuracy']:.3f}")
