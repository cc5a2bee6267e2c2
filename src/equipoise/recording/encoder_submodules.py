"""Finds the unimodal encoders of equipoise models."""

from __future__ import annotations

from torch import nn


def unimodal_encoders(model: nn.Module) -> dict[int, str | None]:
    """Finds the modules inside the encoders of a ``FusionModel``, a ``DualEncoder`` or a ``CrossModalMatcher``.

    A module qualifies if its ``encoders`` is an ``nn.ModuleDict`` with one encoder for each of its ``names``. The model
    classes are not imported, because they depend on this package.

    Returns:
        id of each module -> its modality, or None for an encoder that several modalities share.
    """
    modality: dict[int, str | None] = {}
    for part in model.modules():
        encoders = getattr(part, "encoders", None)
        if isinstance(encoders, nn.ModuleDict) and tuple(encoders) == getattr(part, "names", None):
            for name, encoder in encoders.items():
                for module in encoder.modules():
                    modality[id(module)] = name if modality.get(id(module), name) == name else None
    return modality
