"""The encoders of our own models, in which all keys have the modality that the encoder is for."""

from __future__ import annotations

from torch import nn


def unimodal_encoders(model: nn.Module) -> dict[int, str | None]:
    """Finds the modules inside the encoders of a ``FusionModel``, a ``DualEncoder`` or a ``CrossModalMatcher``.

    Any module counts whose ``encoders`` is an ``nn.ModuleDict`` with one encoder for each of its ``names``; the models
    themselves are not imported, as they are built on top of this package.

    Returns:
        id of a module -> its modality, or None for an encoder that several modalities share.
    """
    found: dict[int, str | None] = {}
    for part in model.modules():
        encoders = getattr(part, "encoders", None)
        if isinstance(encoders, nn.ModuleDict) and tuple(encoders) == getattr(part, "names", None):
            for name, encoder in encoders.items():
                for module in encoder.modules():
                    found[id(module)] = name if found.get(id(module), name) == name else None
    return found
