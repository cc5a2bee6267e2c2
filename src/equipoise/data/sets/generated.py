"""`generated`: three modalities and any task, made from a seed; nothing is stored and nothing is downloaded."""

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
SHOWS = {
    "audio": (1.0, 1.0, 0.5, 0.0, 0.0),
    "image": (0.0, 0.5, 1.0, 1.0, 0.0),
    "sensor": (0.5, 0.0, 0.0, 0.5, 1.0),
}
"""How clearly each modality shows each of the five causes; none shows all of them."""


class Generated(Dataset):
    """Samples with five hidden causes, each a standard normal number, of which every modality shows some::

        input_m = standardized(sum_k shows_mk cause_k pattern_mk)
        seen_m  = (input_m + d noise) / sqrt(1 + d^2),   d uniform in [0, noise] for each sample and modality

    So one modality may be clear and another worthless in the same sample. Classification asks which cause is largest,
    multilabel which ones are positive, regression for all five. The noise of training is new in each epoch, how much
    there is of it belongs to the sample. See docs/data/generated.md.

    Args:
        task: ``"classification"``, ``"multilabel"`` or ``"regression"``.
        samples: of the training split; validation has 3 for every 10 of them, the test 5.
        noise: the largest deviation d; standardized inputs have deviation 1.
        seed: of patterns, causes and noise.

    Raises:
        ConfigError: an unknown task, fewer than 10 samples, noise that is negative.

    Example:
        >>> data = Generated(task="regression", samples=100)
        >>> data.shapes, len(data.train), len(data.val), len(data.test)
        ({'audio': (24, 8), 'image': (1, 8, 8), 'sensor': (32, 3)}, 100, 30, 50)
    """

    names = tuple(SHAPES)
    num_outputs = 5

    def __init__(self, *, task: str = "classification", samples: int = 1000, noise: float = 6.0, seed: int = 0) -> None:
        if task not in TASKS:
            raise unknown_name("Generated", "task", task, TASKS)
        if samples < 10:
            raise ConfigError("Generated", expected="samples >= 10", got=f"samples = {samples}")
        check_deviations("Generated", noise=noise)
        self.task, self._most, self._seed = task, noise, seed
        sizes = {"train": samples, "val": samples * 3 // 10, "test": samples // 2}
        causes = {
            name: CounterRNG(seed, 0, torch.arange(size), name).normal("causes", self.num_outputs)
            for name, size in sizes.items()
        }
        shown = {name: {split: self._shown(name, values) for split, values in causes.items()} for name in SHAPES}
        splits = {
            split: Split(
                {name: standardize(parts[split], parts["train"]) for name, parts in shown.items()},
                _target(values, task),
            )
            for split, values in causes.items()
        }
        self.train, self.val, self.test = splits["train"], splits["val"], splits["test"]
        self.noise = split_statistics(self.train.inputs)

    def deviations(self, split: str, index: Tensor) -> Float[Tensor, "batch modality"]:
        """How much noise there is on these samples of a split, modality by modality in the order of ``names``."""
        return self._most * CounterRNG(self._seed, 0, index, split).uniform("deviations", len(SHAPES))

    def augment(self, inputs: dict[str, Tensor], draw: CounterRNG, *, train: bool) -> dict[str, Tensor]:
        deviations = self.deviations(draw.salt, draw.index)
        seen = {}
        for place, (name, values) in enumerate(inputs.items()):
            d = deviations[:, place].reshape(-1, *(1 for _ in values.shape[1:]))
            seen[name] = (values + d * draw.normal(f"noise/{name}", *values.shape[1:])) / (1 + d.square()).sqrt()
        return seen

    def _shown(self, name: str, causes: Float[Tensor, "sample cause"]) -> Tensor:
        """What a modality shows of the causes: a pattern for each, all of them added."""
        which = torch.arange(self.num_outputs)
        patterns = CounterRNG(self._seed, 0, which, "patterns").normal(name, *SHAPES[name])
        return torch.einsum("sk,k,k...->s...", causes, torch.tensor(SHOWS[name]), patterns)


def _target(causes: Tensor, task: str) -> Tensor:
    if task == "classification":
        return causes.argmax(dim=1)
    return (causes > 0).float() if task == "multilabel" else causes
