"""Tiny configurations of Hugging Face families: the default configuration of a model type, made small."""

import copy
from contextlib import suppress
from typing import Any

import torch
import transformers as hf
from torch import nn

IMAGE, VIDEO, AUDIO = 190, 191, 192
SIZES = {
    200: "vocab_size text_vocab_size decoder_vocab_size",
    32: "hidden_size d_model embed_dim embedding_dim hidden_dim out_hidden_size encoder_hidden_size hidden_dims "
    "intermediate_size moe_intermediate_size shared_expert_intermediate_size ffn_dim d_ff encoder_ffn_dim "
    "decoder_ffn_dim projection_dim project_dim text_hidden_size vision_hidden_size mlp_dim "
    "cross_attention_hidden_size attention_dim output_dim image_text_hidden_size "
    "output_size hidden_sizes_out fc_hidden_size projector_hidden_size text_embed_dim word_embed_proj_dim",
    2: "num_hidden_layers num_layers encoder_layers decoder_layers depth n_layer num_encoder_layers "
    "num_decoder_layers num_key_value_heads num_local_experts num_experts n_routed_experts num_experts_per_tok "
    "spatial_merge_size encoder_num_key_value_heads decoder_num_key_value_heads",
    4: "num_attention_heads num_heads encoder_attention_heads decoder_attention_heads attention_heads n_head n_heads "
    "encoder_num_attention_heads decoder_num_attention_heads num_query_tokens patch_size",
    8: "head_dim d_kv attention_head_dim kv_channels",
    16: "image_size",
    128: "max_position_embeddings max_target_positions n_positions",
    64: "max_source_positions",
    80: "num_mel_bins",
}
TOKENS = {"image": IMAGE, "video": VIDEO, "audio": AUDIO}
FIXED = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 2, "decoder_start_token_id": 1,
         "forced_bos_token_id": None, "forced_eos_token_id": None, "tie_word_embeddings": None,
         "suppress_tokens": None, "begin_suppress_tokens": None}  # fmt: skip


def sub_configs(config: Any, path: str = "") -> list[tuple[str, Any]]:
    """Yields a configuration and its nested configurations by dotted name."""
    inner = [(name, part) for name, part in vars(config).items() if isinstance(part, hf.PreTrainedConfig)]
    return [(path, config), *(deep for name, part in inner for deep in sub_configs(part, f"{path}.{name}".strip(".")))]


def shrink(config: Any) -> None:
    """Makes all sizes of a configuration small, in the form (number, list) that they have."""
    sizes = {name: size for size, names in SIZES.items() for name in names.split()}
    for _, part in sub_configs(config):
        for name, value in list(vars(part).items()):
            size = sizes.get(name)
            if size is not None and value is not None and not isinstance(value, (bool, dict)):
                many = isinstance(value, (list, tuple))
                _set(part, name, type(value)([size] * len(value)) if many else size)
            elif name in FIXED and FIXED[name] is not None and value is not None:
                _set(part, name, FIXED[name])
            elif name in FIXED and name != "tie_word_embeddings" and FIXED[name] is None:
                _set(part, name, None)
            elif name in ("layer_types", "mlp_layer_types") and value:
                # One layer of each kind, including the last one, which must be full attention in some models.
                _set(part, name, [value[0], value[-1]])
            for modality, token in TOKENS.items():
                if name in (f"{modality}_token_id", f"{modality}_token_index"):
                    _set(part, name, token)
        rope = getattr(part, "rope_parameters", None)
        if isinstance(rope, dict) and hasattr(part, "num_attention_heads"):
            width = int(8 * rope.get("partial_rotary_factor", 1.0)) // 2
            rope["mrope_section"] = [width - 2 * (width // 3), width // 3, width // 3]


def _set(config: Any, name: str, value: Any) -> None:
    with suppress(NotImplementedError, AttributeError):
        setattr(config, name, value)


def build(kind: str, cls: str | None = None, options: dict[str, Any] | None = None, **changes: Any) -> nn.Module:
    """Returns a tiny model with random weights.

    Args:
        kind: the model type.
        cls: the class of the model; None = the one for images and text, or else of any kind.
        options: arguments of the configuration class.
        changes: attributes of the configuration, "text_config__hidden_size" those of its parts.
    """
    config = hf.CONFIG_MAPPING[kind](**copy.deepcopy(options or {}))
    shrink(config)
    for name, value in changes.items():
        *parts, last = name.split("__")
        part = config
        for word in parts:
            part = getattr(part, word)
        setattr(part, last, value)
    result = getattr(hf, cls or "AutoModelForImageTextToText")
    model = result.from_config(config) if result.__name__.startswith("Auto") else result(config)
    return sharpened(model.float()).eval()


def sharpened(model: nn.Module) -> nn.Module:
    """Returns the same model with clearly nonuniform attention."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and any(
                word in name for word in ("q_proj", "k_proj", "qkv", "query", "key", ".q.", ".k.")
            ):
                weight.mul_(8)
            if not torch.isfinite(weight).all():
                weight.normal_(std=0.02)
    return model
