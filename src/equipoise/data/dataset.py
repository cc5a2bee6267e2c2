"""What every data set has in common: splits held in memory, and batches that repeat exactly."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..errors import ConfigError, ShapeError, unknown_name
from .counter_rng import CounterRNG
from .resumable_sampler import ResumableBatchSampler

EVALUATION_SEED = 20_250_000
"""Noise of evaluation batches hangs on this seed, never on the run's: every run is judged on the same samples."""


@dataclass(frozen=True, eq=False)
class Split:
    """One split, held in memory.

    Args:
        inputs: name -> (sample, ...), standardized with the statistics of the training split, before augmentation.
        target: (sample,) long for classes; (sample,) or (sample, output) float for regression and multi-label.

    Raises:
        ShapeError: parts of unequal length.

    Example:
        >>> len(Split({"audio": torch.zeros(3, 7, 5)}, torch.tensor([0, 1, 1])))
        3
    """

    inputs: dict[str, Tensor]
    target: Tensor

    def __post_init__(self) -> None:
        for name, values in self.inputs.items():
            if len(values) != len(self.target):
                raise ShapeError(
                    f"Split '{name}'", expected=f"as many samples as targets = {len(self.target)}", got=f"{len(values)}"
                )

    def __len__(self) -> int:
        return len(self.target)


class Dataset(ABC):
    """Splits, names and augmentation of one data set; the base of the classes that ``load`` finds by name.

    A subclass sets the attributes in its constructor and says in ``augment`` what is done to a batch.

    Attributes:
        names: modality names.
        num_outputs: classes, or outputs of a regression.
        task: "classification", "multilabel" or "regression" for fusions; another word for data that other models read.
        train, val, test: Split.
        noise: name -> (mean, standard deviation) of the standardized training inputs: the statistics of the noise
            that replaces a whole modality (spec 8.3).
        vocabulary: name -> number of token ids, for inputs that are ids of words or characters; 0 pads.
        outside: the test split's samples of classes that are held out, targets as they were; None where none is.
    """

    names: tuple[str, ...]
    num_outputs: int
    task: str = "classification"
    train: Split
    val: Split
    test: Split
    noise: dict[str, tuple[float, float]]
    vocabulary: dict[str, int] = {}  # noqa: RUF012
    outside: Split | None = None

    @abstractmethod
    def augment(self, inputs: dict[str, Tensor], draw: CounterRNG, *, train: bool) -> dict[str, Tensor]:
        """What is done to the inputs of a batch; noise that belongs to the task is added in evaluation too."""

    def foreign(
        self, pictures: Float[Tensor, "sample height width"], sounds: Float[Tensor, "sample 5120"]
    ) -> dict[str, Tensor]:
        """Inputs out of pictures, gray from 0 to 1, and sounds at 8 kHz of another task, made as this data set's are.

        Raises:
            ConfigError: data that are no pictures and sounds.
        """
        raise ConfigError(
            "outside", expected="a data set of pictures and sounds", got=type(self).__name__,
            fix="Choose av_digits or digits.",
        )  # fmt: skip

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """name -> shape of one sample's input."""
        return {name: tuple(values.shape[1:]) for name, values in self.train.inputs.items()}

    def split(self, name: str) -> Split:
        """The split of that name.

        Raises:
            ConfigError: a name other than train, val and test.
        """
        splits = {"train": self.train, "val": self.val, "test": self.test}
        if name not in splits:
            raise unknown_name(type(self).__name__, "split", name, splits)
        return splits[name]

    def batch(
        self, split: str, index: Int[Tensor, " batch"], *, seed: int, epoch: int, train: bool
    ) -> dict[str, Tensor]:
        """The samples at these positions as a model gets them.

        Args:
            split: "train", "val" or "test".
            index: (batch,) positions in the split.
            seed, epoch: of the augmentation; without effect unless ``train``.
            train: augment; otherwise every sample looks the same in every epoch and every run.

        Returns:
            name -> (batch, ...) for every modality, "target" (batch,), "index" (batch,).
        """
        held = self.split(split)
        draw = CounterRNG(seed, epoch, index, split) if train else CounterRNG(EVALUATION_SEED, 0, index, split)
        inputs = self.augment({name: values[index] for name, values in held.inputs.items()}, draw, train=train)
        return {**inputs, "target": held.target[index], "index": index}

    def batches(
        self, split: str, batch_size: int, *, seed: int, epoch: int, train: bool
    ) -> Iterator[dict[str, Tensor]]:
        """All batches of one epoch, as ``batch`` makes them; shuffled when ``train``."""
        order = ResumableBatchSampler(len(self.split(split)), batch_size, seed=seed, shuffle=train)
        order.set_epoch(epoch)
        for _, index in order:
            yield self.batch(split, index, seed=seed, epoch=epoch, train=train)


def standardize(values: Tensor, reference: Tensor) -> Tensor:
    """``values`` less the mean of ``reference``, over its standard deviation: one mean and one deviation for all.

    Example:
        >>> standardized(torch.tensor([7.0]), torch.tensor([1.0, 3.0]))
        tensor([5.])
    """
    return (values - reference.mean()) / reference.std(correction=0).clamp(min=torch.finfo(torch.float32).eps)


def split_statistics(inputs: Mapping[str, Tensor]) -> dict[str, tuple[float, float]]:
    """name -> (mean, standard deviation) over all samples and positions.

    Example:
        >>> statistics({"audio": torch.tensor([[1.0, 3.0]])})
        {'audio': (2.0, 1.0)}
    """
    return {name: (values.mean().item(), values.std(correction=0).item()) for name, values in inputs.items()}
