"""A processor for models without tokenizer and processor files; each byte of a text is a token."""

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
    """Processor for a model with random weights, for which the choice of token ids does not matter.

    Args:
        model: a model with at least 256 token ids that are neither placeholders nor special tokens, and with one fixed
            image size.

    Raises:
        ConfigError: a smaller vocabulary, audio, or a model that does not process an image as one tile of fixed size.
    """

    chat_template = None

    def __init__(self, model: Any) -> None:
        config = model.config
        self.model, excluded = model, {*placeholders(config), *_special_tokens(config.get_text_config())}
        size = config.get_text_config().vocab_size
        self._byte_to_id = [token for token in range(size) if token not in excluded][:BYTES]
        if len(self._byte_to_id) < BYTES:
            raise _unsupported(f"a vocabulary of {size} tokens")
        self._id_to_byte = {token: byte for byte, token in enumerate(self._byte_to_id)}

    def __call__(
        self, text: Sequence[str] | str, *, images: Sequence[Image.Image] | None = None, audio: Any = None, **_: Any
    ) -> dict[str, Tensor]:
        text = text if isinstance(text, str) else text[0]
        ids = torch.tensor([[self._byte_to_id[byte] for byte in text.encode()]])
        media: dict[str, Tensor] = {}
        if audio is not None:
            raise _unsupported("audio")
        if images:
            media["pixel_values"] = self._pixels(images[0])
            image = next(iter(placeholders(self.model.config)))
            ids = torch.cat([torch.full((1, self._count_tokens(media["pixel_values"])), image), ids], dim=1)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **media}

    def convert_ids_to_tokens(self, number: int) -> str:
        return self.decode([number])

    def decode(self, ids: Any, **_: Any) -> str:
        """Decodes bytes to text; other tokens are shown as ``<id>``."""
        tokens = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        parts = (bytes([self._id_to_byte[t]]) if t in self._id_to_byte else f"<{t}>".encode() for t in tokens)
        return b"".join(parts).decode(errors="backslashreplace")

    def _pixels(self, image: Image.Image) -> Tensor:
        size = getattr(getattr(self.model.config, "vision_config", None), "image_size", None)
        if not size:
            raise _unsupported("images of any size")
        height, width = (int(side) for side in (size if isinstance(size, (list, tuple)) else (size, size)))
        values = torch.from_numpy(np.array(image.resize((width, height)), dtype=np.float32))
        return (values / 127.5 - 1).permute(2, 0, 1)[None]

    def _count_tokens(self, pixels: Tensor) -> int:
        """Returns the number of image tokens of the model."""
        weight = next(self.model.parameters())
        try:
            output = self.model.get_image_features(pixel_values=pixels.to(weight.device, weight.dtype))
        except (AttributeError, TypeError, ValueError, RuntimeError) as error:
            raise _unsupported(f"{type(self.model).__name__}, which splits images into tiles") from error
        features = getattr(output, "pooler_output", output)
        return sum(part.numel() // part.shape[-1] for part in features)


def _special_tokens(config: Any) -> set[int]:
    tokens: set[int] = set()
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(config, name, None)
        tokens |= set(value) if isinstance(value, (list, tuple)) else set() if value is None else {value}
    return tokens


def _unsupported(got: str) -> ConfigError:
    return ConfigError(
        "look", expected="an input that is supported without the files of a tokenizer and processor", got=got,
        fix="Put the model's tokenizer and processor files next to its config.json; they are small.",
    )  # fmt: skip
