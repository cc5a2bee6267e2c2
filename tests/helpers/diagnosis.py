"""Models with known use of their modalities, from weights that are set by hand, and matching data."""

import torch
from torch import nn

import equipoise as eq

CLASSES = 3


def linear_layer(weight):
    """Returns a linear layer without bias and with the given weights."""
    weight = torch.as_tensor(weight, dtype=torch.float32)
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    with torch.no_grad():
        layer.weight.copy_(weight)
    return layer


def weighted_model(**weights):
    """Returns a static model with logits = sum over modalities of weight x mean token."""
    model = eq.FusionModel(
        {name: nn.Identity() for name in weights}, eq.fusion.Concat(CLASSES), CLASSES, unimodal="none"
    )
    with torch.no_grad():
        model.head.weight.copy_(torch.cat([weight * torch.eye(CLASSES) for weight in weights.values()], dim=1))
        model.head.bias.zero_()
    return model


def labeled_batches(model, *, sizes=(211, 97), seed=0, wrong=0.0):
    """Returns batches of random inputs whose targets are the predictions of the model, except for a fraction of
    them.
    """
    random = torch.Generator().manual_seed(seed)
    batches = []
    for size in sizes:
        batch = {
            name: torch.randn(size, 5 + index, CLASSES, generator=random) for index, name in enumerate(model.names)
        }
        with torch.no_grad():
            target = model(batch).logits.argmax(dim=1)
        luck = torch.rand(size, generator=random) < wrong
        batches.append({**batch, "target": torch.where(luck, (target + 1) % CLASSES, target)})
    return batches


def quality_attention(sharpness):
    """Returns joint attention whose class token prefers tokens with a large first feature (the quality).

    Values equal the tokens, so the prediction depends on the selected tokens.
    """
    model = eq.FusionModel(
        {"audio": nn.Identity(), "image": nn.Identity()}, eq.fusion.JointAttention(CLASSES, dropout=0.0), CLASSES,
        unimodal="none",
    )  # fmt: skip
    layer, one = model.fusion.attention, torch.zeros(CLASSES, CLASSES)
    one[0, 0] = 1.0
    with torch.no_grad():
        model.fusion.cls.copy_(torch.tensor([1.0, 0.0, 0.0]))
        for part, weight in (
            (layer.query, one), (layer.key, sharpness * one), (layer.value, torch.eye(CLASSES)),
            (layer.out, torch.eye(CLASSES)), (model.head, torch.eye(CLASSES)),
        ):  # fmt: skip
            part.weight.copy_(weight)
            part.bias.zero_()
    return model


def quality_batches(model, *, sizes=(211, 97), seed=0):
    """Returns batches whose tokens have their quality, about 1, in the first feature and the class in the others."""
    batches = labeled_batches(model, sizes=sizes, seed=seed)
    random = torch.Generator().manual_seed(seed + 1)
    for batch in batches:
        for name in model.names:
            batch[name][..., 0] = 1 + 0.1 * torch.randn(batch[name].shape[:2], generator=random)
        with torch.no_grad():
            batch["target"] = model(batch).logits.argmax(dim=1)
    return batches
