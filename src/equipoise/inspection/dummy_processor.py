"""In place of a processor, where there is a configuration alone: every byte of a text is a token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import ConfigError
from .prompt_inputs import placeholders

BYTES = 256


class DummyProcessor:
    """Makes inputs for a model with random weights, to which all words are alike.

    Args:
        model: whose configuration has a vocabulary of some more than 256 words, and pictures of one size.

    Raises:
        ConfigError: a smaller vocabulary; a sound; pictures that this model does not read as one square.
    """

    chat_template = None

    def __init__(self, model: Any) -> None:
        config = model.config
        self.model, barred = model, {*placeholders(config), *_special(config.get_text_config())}
        self._words = [word for word in range(config.get_text_config().vocab_size) if word not in barred][:BYTES]
        if len(self._words) < BYTES:
            raise _impossible(f"a vocabulary of {config.get_text_config().vocab_size} words")
        self._byte = {word: byte for byte, word in enumerate(self._words)}

    def __call__(
        self, text: Sequence[str] | str, *, images: Sequence[Image.Image] | None = None, audio: Any = None, **_: Any
    ) -> dict[str, Tensor]:
        text = text if isinstance(text, str) else text[0]
        ids = torch.tensor([[self._words[byte] for byte in text.encode()]])
        made: dict[str, Tensor] = {}
        if audio is not None:
            raise _impossible("a sound")
        if images:
            made["pixel_values"] = self._pixels(images[0])
            image = next(iter(placeholders(self.model.config)))
            ids = torch.cat([torch.full((1, self._count(made["pixel_values"])), image), ids], dim=1)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **made}

    def convert_ids_to_tokens(self, number: int) -> str:
        return self.decode([number])

    def decode(self, ids: Any, **_: Any) -> str:
        """Bytes as text; other words by their numbers."""
        numbers = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        parts = (bytes([self._byte[n]]) if n in self._byte else f"<{n}>".encode() for n in numbers)
        return b"".join(parts).decode(errors="backslashreplace")

    def _pixels(self, image: Image.Image) -> Tensor:
        size = getattr(getattr(self.model.config, "vision_config", None), "image_size", None)
        if not size:
            raise _impossible("pictures of any size")
        height, width = (int(side) for side in (size if isinstance(size, (list, tuple)) else (size, size)))
        values = torch.from_numpy(np.array(image.resize((width, height)), dtype=np.float32))
        return (values / 127.5 - 1).permute(2, 0, 1)[None]

    def _count(self, pixels: Tensor) -> int:
        """How many tokens the model makes of the picture."""
        weight = next(self.model.parameters())
        try:
            found = self.model.get_image_features(pixel_values=pixels.to(weight.device, weight.dtype))
        except (AttributeError, TypeError, ValueError, RuntimeError) as error:
            raise _impossible(f"{type(self.model).__name__}, which reads pictures in pieces") from error
        parts = getattr(found, "pooler_output", found)
        return sum(part.numel() // part.shape[-1] for part in parts)


def _special(config: Any) -> set[int]:
    found: set[int] = set()
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(config, name, None)
        found |= set(value) if isinstance(value, (list, tuple)) else set() if value is None else {value}
    return found


def _impossible(got: str) -> ConfigError:
    return ConfigError(
        "look", expected="something that can be read without the files of a tokenizer and processor", got=got,
        fix="Put the model's tokenizer and processor files beside its config.json; they are small.",
    )  # fmt: skip
