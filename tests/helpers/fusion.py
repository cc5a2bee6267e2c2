"""Small fusion models and batches for the tests of the balancers."""

import torch
from torch import nn

import equipoise as eq

FEATURES = {"audio": 3, "image": 5, "text": 2, "depth": 7, "touch": 1}
LENGTHS = {"audio": 7, "image": 5, "text": 3, "depth": 2, "touch": 4}
NAMES = tuple(FEATURES)
DIM, OUTPUTS = 12, 3


def joint_model(names=("audio", "image"), *, heads=2, depth=1, dtype=torch.float64, seed=0, **options):
    """Returns linear encoders and joint attention; different biases separate the modalities and create an imbalance."""
    torch.manual_seed(seed)
    encoders = {name: nn.Linear(FEATURES[name], DIM) for name in names}
    options = {"dropout": 0.0, **options}
    model = eq.FusionModel(encoders, eq.fusion.JointAttention(DIM, heads=heads, depth=depth, **options), OUTPUTS)
    with torch.no_grad():
        model.fusion.cls.normal_()
        for encoder in encoders.values():
            encoder.bias.normal_()
    return model.to(dtype)


def batch(names=("audio", "image"), *, size=5, seed=0, dtype=torch.float64, missing=()):
    """Returns inputs and targets; each of ``missing`` is absent in some samples, which have another modality."""
    random = torch.Generator().manual_seed(seed)
    result = {
        name: torch.randn(size, LENGTHS[name], FEATURES[name], generator=random, dtype=torch.float64).to(dtype)
        for name in names
    }
    result["target"] = torch.randint(OUTPUTS, (size,), generator=random)
    if missing:
        gone = torch.arange(size) % 3
        result["mask"] = {name: gone != index for index, name in enumerate(missing)}
    return result


def split_batch(full, *sizes):
    """Splits a batch into smaller ones."""
    start, parts = 0, []
    for size in sizes:
        here = slice(start, start + size)
        part = {name: value[here] for name, value in full.items() if name != "mask"}
        if "mask" in full:
            part["mask"] = {name: value[here] for name, value in full["mask"].items()}
        parts.append(part)
        start += size
    return parts


def oracle_samples(model, batches, rotation=None):
    """Returns the inputs of the oracle: query rows, keys, labels, valid keys and rows of each sample."""
    layer, result = model.fusion.attention, []
    heads = (layer.heads, layer.head_dim)
    with torch.no_grad():
        for inputs in batches:
            packed = eq.pack(model.encode(inputs), cls=model.fusion.cls)
            query = layer.query(packed.values[:, :1]).unflatten(-1, heads).transpose(1, 2)
            key = layer.key(packed.values).unflatten(-1, heads).transpose(1, 2)
            if rotation is not None:
                query = query @ rotation
            rows = torch.ones(query.shape[0], 1, dtype=torch.bool)
            labels = eq.pack({n: t.values for n, t in model.encode(inputs).items()}, cls=model.fusion.cls).modality
            parts = (query, key, labels, packed.valid(), rows)
            result += zip(*(part.numpy() for part in parts), strict=True)
    return result


def run_forward(model, batches):
    """Runs a forward pass in training mode."""
    model.train()
    for inputs in batches:
        model(inputs)
