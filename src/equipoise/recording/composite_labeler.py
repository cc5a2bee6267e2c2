"""Labels the attention of a module that contains Hugging Face models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from .attention_call import AttentionCall
from .token_labels import LabeledKeys, UserLabels
from .token_map import TokenMap


class CompositeLabeler:
    """Labeler of a module that contains Hugging Face models.

    Args:
        outside: labeler of the attention outside of them.
        maps: one token map for each Hugging Face model.
    """

    def __init__(self, outside: UserLabels, maps: Sequence[TokenMap]) -> None:
        self._outside, self._maps = outside, maps
        self.names = outside.names or tuple(dict.fromkeys(name for part in maps for name in part.names))

    def labeled(self, call: AttentionCall, module: nn.Module) -> LabeledKeys | str | None:
        for part in self._maps:
            if id(module) in part.parts.paths:
                labels = part.labeled(call, module)
                # A unimodal model inside a larger one is an encoder.
                if isinstance(labels, LabeledKeys) and len(part.parts.modalities) == 1 and part.given is None:
                    return replace(labels, unimodal=True, continues=False)
                return labels
        return self._outside.labeled(call, module)
