"""Base class for models that define their own loss and evaluation (as opposed to ``FusionModel``)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from .sharing import HubMethods

if TYPE_CHECKING:
    from typing import Self


class SelfContainedModel(HubMethods, nn.Module, ABC):
    """Base class of the models that a recipe selects with ``model``: dual encoder, vision-language model, matcher.

    The training loop calls ``losses`` for every batch and ``evaluate`` after the last epoch; the content of a batch is
    defined by the model and its data set.

    Attributes:
        name: name in recipes; the class name in lower case by default.
        names: modality names, as in the batch; errors about NaN inputs use them.
        score: the metric of ``evaluate`` by which models are compared; higher is better.
    """

    names: tuple[str, ...]
    score: ClassVar[str] = "accuracy"

    @classmethod
    @abstractmethod
    def for_data(cls, source: Any, encoders: Mapping[str, nn.Module], **options: Any) -> Self:
        """Builds the model for a data set.

        Args:
            source: a ``data.Dataset`` with ``names``, ``shapes`` and whatever else the model requires.
            encoders: modality -> encoder, as listed in the recipe.
            options: options under ``model`` in the recipe, overridden by those of the variant.

        Raises:
            ConfigError: an unknown option or modality, or an unsupported data set.
        """

    @abstractmethod
    def losses(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Computes the losses of a batch: name -> scalar. Their sum is minimized; each is logged under its name.

        Args:
            batch: a batch of the data set.
        """

    @abstractmethod
    def evaluate(self, source: Any) -> dict[str, Any]:
        """Evaluates the test split; returns a row of ``results.json``: ``{"metrics": {name: number}}``.

        Other keys, such as examples, are stored next to the metrics. Called in evaluation mode without gradients.
        """
