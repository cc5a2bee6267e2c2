"""A model that brings its own loss and its own judgment: what a recipe trains that is not a fusion of one target."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

if TYPE_CHECKING:
    from typing import Self


class SelfContainedModel(nn.Module, ABC):
    """Base of the models that a recipe names under ``model``: a shared space, a small vision-language model.

    The training loop asks it for losses, and after the last epoch for figures, and for nothing else; what a batch
    holds is a matter of the model and its data set alone.

    Attributes:
        name: in recipes; the class's own name in lower case by default.
        names: modality names, as in the batch; an input of one that is NaN is told by its name.
        score: the metric of ``evaluate`` that tells how good the model is; higher is better.
    """

    names: tuple[str, ...]
    score: ClassVar[str] = "accuracy"

    @classmethod
    @abstractmethod
    def for_data(cls, source: Any, encoders: Mapping[str, nn.Module], **options: Any) -> Self:
        """The model that reads this data set.

        Args:
            source: a ``data.Dataset``: its ``names`` and ``shapes``, and what else the model needs to know of it.
            encoders: modality -> encoder, those that the recipe lists.
            options: the recipe's, under ``model``, with those of the variant over them.

        Raises:
            ConfigError: an option or a modality that does not exist; data of another kind.
        """

    @abstractmethod
    def losses(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """name -> scalar; their sum is minimized, each is logged by its name.

        Args:
            batch: as the data set's ``batch`` makes it.
        """

    @abstractmethod
    def evaluate(self, source: Any) -> dict[str, Any]:
        """The figures on the test split, as a row of ``results.json`` holds them: ``{"metrics": {name: number}}``.

        Other keys are kept beside the metrics, such as examples to show. The model is in evaluation mode and no
        gradient is wanted.
        """
