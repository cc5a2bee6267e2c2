"""Hugging Face models as encoders: text, vision or audio; trained, frozen or with LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from ..errors import ConfigError, ShapeError, require_extra
from ..nn.transformer import initialize_weights
from ..tokens.masks import bool_mask
from ..tokens.token_batch import Tokens
from .encoder import Encoder
from .pretrained_weights import import_transformers, load_model


class Backbone(Encoder):
    """A Hugging Face model's last hidden states as tokens, with its attention mask.

    ::

        H = model(input)                  (batch, token, hidden); feature maps are flattened
        tokens = H A + a                  without A if dim is the width of the model

    For encoder-decoder models, the encoder is used.

    Args:
        model: a folder, a name on the Hub, or a transformers model. Only safetensors files are loaded, in single
            precision; code from the Hub is never executed.
        frozen: the weights get no gradient, and the model stays in evaluation mode; ``A`` is still trained.
        lora: rank of LoRA matrices of every linear layer, trained instead of its weights; requires peft.
        dim: token width; by default the hidden size of the model.
        cls: whether token 0 is a class token, as in BERT and ViT, which ``pooled`` returns instead of the mean.
        shift: what the data set has added to the ids of the tokenizer. If it is not 0, id 0 is padding: data sets with
            a vocabulary have a shift of 1.

    Raises:
        ConfigError: the model is not a transformers model or has no hidden size, frozen is combined with LoRA, or a
            package is missing.
        DataError: the model cannot be loaded. ShapeError: the shape of the mask is invalid.

    Balancing methods that scale encoder gradients have little effect on a frozen backbone: they only affect ``A``.

    Reference: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (ICLR 2022).
    Differs from the released code in: none; models and LoRA are those of transformers and peft.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        >>> text = Backbone(BertModel(BertConfig(vocab_size=11, **size)), frozen=True, dim=4)
        >>> inputs = {"input_ids": torch.tensor([[1, 5, 2], [1, 2, 0]]), "attention_mask": torch.ones(2, 3)}
        >>> text(inputs).values.shape
        torch.Size([2, 3, 4])
    """

    name = "Backbone"
    reads = "any shape that its model reads"
    takes_ids = None

    def __init__(
        self, model: Any, *, frozen: bool = False, lora: int | None = None, dim: int | None = None, cls: bool = False,
        shift: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        if frozen and lora is not None:
            raise ConfigError(
                "Backbone", expected="frozen=True or a LoRA rank", got=f"both, lora = {lora}",
                fix="LoRA already freezes the original weights; omit frozen.",
            )  # fmt: skip
        if isinstance(model, str):
            model = load_model(import_transformers("Backbone").AutoModel, model, "Backbone")
        if not hasattr(model, "config"):
            raise ConfigError(
                "Backbone", expected="a folder, a name on the hub, or a model of transformers",
                got=type(model).__name__, fix="Any other module can be given to FusionModel as it is.",
            )  # fmt: skip
        if getattr(model.config, "is_encoder_decoder", False):
            model = model.get_encoder()
        self.frozen, self.cls, self.shift = frozen, cls, shift
        hidden = _width(model)
        self.model = _with_lora(model, lora) if lora is not None else model
        self.dim = hidden if dim is None else dim
        self.project = nn.Identity() if self.dim == hidden else nn.Linear(hidden, self.dim)
        initialize_weights(self.project)
        if frozen:
            self.model.requires_grad_(False).eval()

    @classmethod
    def for_data(cls, shape: tuple[int, ...]) -> dict[str, Any] | None:
        return {}

    def train(self, mode: bool = True) -> Backbone:
        """Keeps a frozen model in evaluation mode: no dropout, no running statistics."""
        super().train(mode)
        if self.frozen:
            self.model.eval()
        return self

    def forward(self, inputs: Tensor | Mapping[str, Tensor], mask: Bool[Tensor, "batch token"] | None = None) -> Tokens:
        """Encodes a batch.

        Args:
            inputs: the model's main input (``input_ids``, ``pixel_values``, ``input_values``), or all its inputs by
                name.
            mask: True for valid tokens; combined with the ``attention_mask`` in the inputs, if any (boolean or 0/1).
                Masked ids are replaced by padding and masked values by zeros.
        """
        if self.shift and isinstance(inputs, Tensor):
            mask = inputs > 0 if mask is None else mask & (inputs > 0)
            inputs = (inputs - self.shift).clamp(min=0)
        model_inputs = dict(inputs) if isinstance(inputs, Mapping) else {self.model.main_input_name: inputs}
        attention = model_inputs.get("attention_mask")
        if attention is not None:
            attention = bool_mask(attention, "Backbone attention_mask", "a boolean or 0/1 mask", numbers=True).long()
        if mask is not None:
            bool_mask(mask, "Backbone mask", "a boolean mask (batch, token)")
            attention = mask.long() if attention is None else attention * mask
        if attention is not None:
            if attention.ndim != 2:
                raise ShapeError(
                    "Backbone", expected="an attention_mask (batch, token)", got=f"shape {tuple(attention.shape)}"
                )
            # A row without tokens would be 0 / 0 in some kernels; its output is masked afterward.
            model_inputs = {
                key: self._without_masked(key, value, attention.bool()) for key, value in model_inputs.items()
            }
            empty = ~attention.bool().any(dim=1, keepdim=True)
            model_inputs["attention_mask"] = attention.masked_fill(empty, 1)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            hidden = self.model(**model_inputs).last_hidden_state
        if hidden.ndim == 4:
            hidden = hidden.flatten(2).transpose(1, 2)
        valid = None if attention is None else self._valid(attention, hidden.shape[1])
        return Tokens(self.project(hidden), mask=valid, cls=self.cls)

    def _without_masked(self, key: str, value: Any, mask: Tensor) -> Any:
        """Replaces masked values of an input by padding; other masks and token labels are unchanged."""
        floating = isinstance(value, Tensor) and value.is_floating_point()
        if not (floating or key == "input_ids") or value.ndim < 2 or len(value) != len(mask):
            return value
        hidden = ~mask.to(value.device)
        if value.shape[:2] == mask.shape:
            hidden = hidden.reshape(*hidden.shape, *[1] * (value.ndim - 2))
        elif value.ndim == 3 and value.shape[::2] == mask.shape:
            hidden = hidden[:, None]
        else:
            return value
        padding = 0.0 if floating else getattr(self.model.config, "pad_token_id", None) or 0
        return value.masked_fill(hidden, padding)

    def _valid(self, attention: Tensor, length: int) -> Tensor:
        """Converts the attention mask to the rate of the tokens, which for audio is lower than the sampling rate."""
        if attention.shape[1] == length:
            return attention.bool()
        coarser = getattr(self.model, "_get_feature_vector_attention_mask", None)
        if coarser is None:
            raise ShapeError(
                "Backbone", expected=f"an attention_mask for each of {length} tokens",
                got=f"shape {tuple(attention.shape)}", fix="Omit it, and mask whole samples with batch['mask'].",
            )  # fmt: skip
        return coarser(length, attention.long()).bool() & attention.bool().any(dim=1, keepdim=True)


def _width(model: Any) -> int:
    config = model.config
    sizes = getattr(config, "hidden_sizes", None)
    # The last stage of multi-stage networks is the output; transformers have one width.
    width = sizes[-1] if sizes else getattr(config, "hidden_size", None)
    if not isinstance(width, int):
        raise ConfigError(
            "Backbone", expected="a model of one modality, with hidden_size or hidden_sizes in its configuration",
            got=type(model).__name__, fix="Of a multimodal model pass one encoder, such as CLIPVisionModel.",
        )  # fmt: skip
    return width


def _with_lora(model: Any, rank: int) -> Any:
    with require_extra("Backbone, lora"):
        import peft
    if rank < 1:
        raise ConfigError("Backbone", expected="a LoRA rank of 1 or more", got=f"lora = {rank}")
    # alpha = 2 rank is a common choice; unlike get_peft_model, this keeps the class of the model.
    return peft.inject_adapter_in_model(
        peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"), model
    )
