"""`generated`: synthetic data with three modalities, for any task; generated from a seed."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ...errors import ConfigError, unknown_name
from ..augmentation import check_deviations
from ..counter_rng import CounterRNG
from ..dataset import Dataset, Split, split_statistics, standardize

TASKS = ("classification", "multilabel", "regression")
SHAPES = {"audio": (24, 8), "image": (1, 8, 8), "sensor": (32, 3)}
CAUSE_WEIGHTS = {
    "audio": (1.0, 1.0, 0.5, 0.0, 0.0),
    "image": (0.0, 0.5, 1.0, 1.0, 0.0),
    "sensor": (0.5, 0.0, 0.0, 0.5, 1.0),
}
"""Modality -> its weight for each of the five causes; no modality depends on all of them."""

FAILED = 1e6
"""Standard deviation of the noise of a modality that has failed: the input is noise alone."""


class Generated(Dataset):
    """Synthetic samples of five standard normal causes; each modality depends on some of them::

        clean_m = standardize(sum_k weight_mk cause_k pattern_mk)
        input_m = (clean_m + d noise) / sqrt(1 + d^2),   d uniform in [0, noise] for each sample and modality

    With probability ``failures``, a modality of a sample has failed: its input is noise alone.

    In one sample, one modality may be clean and another almost pure noise. The target is the largest cause in
    classification, the signs of the causes in multilabel, and the causes in regression. Training noise is drawn anew in
    each epoch; its standard deviation d is fixed per sample. See docs/data/generated.md.

    Args:
        task: ``"classification"``, ``"multilabel"`` or ``"regression"``.
        samples: size of the training split; validation is 0.3 and test 0.5 times as large.
        noise: largest standard deviation d; that of clean inputs is 1.
        failures: probability that a modality of a sample is noise alone, independent of the other modalities.
        seed: seed of patterns, causes and noise.

    Raises:
        ConfigError: an unknown task, fewer than 10 samples, negative noise, or failures outside [0, 1].

    Example:
        >>> data = Generated(task="regression", samples=100)
        >>> data.shapes, len(data.train), len(data.val), len(data.test)
        ({'audio': (24, 8), 'image': (1, 8, 8), 'sensor': (32, 3)}, 100, 30, 50)
    """

    names = tuple(SHAPES)
    num_outputs = 5

    def __init__(
        self, *, task: str = "classification", samples: int = 1000, noise: float = 6.0, failures: float = 0.0,
        seed: int = 0,
    ) -> None:  # fmt: skip
        if task not in TASKS:
            raise unknown_name("Generated", "task", task, TASKS)
        if samples < 10:
            raise ConfigError("Generated", expected="samples >= 10", got=f"samples = {samples}")
        check_deviations("Generated", noise=noise)
        if not 0 <= failures <= 1:
            raise ConfigError("Generated", expected="failures between 0 and 1", got=f"failures = {failures}")
        self.task, self._most, self._failures, self._seed = task, noise, failures, seed
        sizes = {"train": samples, "val": samples * 3 // 10, "test": samples // 2}
        causes = {
            name: CounterRNG(seed, 0, torch.arange(size), name).normal("causes", self.num_outputs)
            for name, size in sizes.items()
        }
        clean = {name: {split: self._clean_inputs(name, values) for split, values in causes.items()} for name in SHAPES}
        splits = {
            split: Split(
                {name: standardize(parts[split], parts["train"]) for name, parts in clean.items()},
                _target(values, task),
            )
            for split, values in causes.items()
        }
        self.train, self.val, self.test = splits["train"], splits["val"], splits["test"]
        self.noise = split_statistics(self.train.inputs)

    def deviations(self, split: str, index: Tensor) -> Float[Tensor, "batch modality"]:
        """Returns the standard deviations of the noise, modalities in the order of ``names``."""
        draw = CounterRNG(self._seed, 0, index, split)
        deviations = self._most * draw.uniform("deviations", len(SHAPES))
        return deviations.masked_fill(draw.uniform("failures", len(SHAPES)) < self._failures, FAILED)

    def augment(self, inputs: dict[str, Tensor], draw: CounterRNG, *, train: bool) -> dict[str, Tensor]:
        deviations = self.deviations(draw.salt, draw.index)
        noisy = {}
        for column, (name, values) in enumerate(inputs.items()):
            d = deviations[:, column].reshape(-1, *(1 for _ in values.shape[1:]))
            noisy[name] = (values + d * draw.normal(f"noise/{name}", *values.shape[1:])) / (1 + d.square()).sqrt()
        return noisy

    def _clean_inputs(self, name: str, causes: Float[Tensor, "sample cause"]) -> Tensor:
        """Returns the weighted sum of the patterns of one modality."""
        which = torch.arange(self.num_outputs)
        patterns = CounterRNG(self._seed, 0, which, "patterns").normal(name, *SHAPES[name])
        return torch.einsum("sk,k,k...->s...", causes, torch.tensor(CAUSE_WEIGHTS[name]), patterns)


def _target(causes: Tensor, task: str) -> Tensor:
    if task == "classification":
        return causes.argmax(dim=1)
    return (causes > 0).float() if task == "multilabel" else causes
