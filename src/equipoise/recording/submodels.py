"""Determines the modalities of the submodels of a Hugging Face model from classes, module names and configuration."""

from __future__ import annotations

import inspect
import re
import sys
from typing import Any

from torch import nn

ORDER = ("text", "image", "video", "audio")
"""Names of modalities, in the order of transformers' ``mm_token_type_ids``."""

MAIN_INPUT = {
    "pixel_values": "image", "flattened_patches": "image", "pixel_values_videos": "video", "input_features": "audio",
    "input_values": "audio",
}  # fmt: skip
ENCODER_NAME = re.compile(
    r"(vision|visual|image|img|video|audio|speech)(_?(unimodal|model|encoder|backbone|transformer|trunk))?",
    re.IGNORECASE,
)
KIND_IN_NAME = {"video": "video", "audio": "audio", "speech": "audio"}
CONNECTOR = re.compile(r"resampler|perceiver|q_?former|projector|projection|connector|abstractor", re.IGNORECASE)
CROSS = re.compile(r"(cross_?att|crossattention|encoder_attn|encdecattention|cross_layer)", re.IGNORECASE)


def outermost_pretrained_models(model: nn.Module) -> list[nn.Module]:
    """Returns the outermost Hugging Face models in a module."""
    if "transformers" not in sys.modules:
        return []
    from transformers import PreTrainedModel

    if isinstance(model, PreTrainedModel):
        return [model]
    return [inner for part in model.children() for inner in outermost_pretrained_models(part)]


def modalities_of(root: nn.Module) -> tuple[str, ...]:
    """Returns the modality names of a model, text first."""
    token_ids = set(placeholders(root.config).values())
    declared = set(submodel_kinds(root))
    for name, part in root.named_modules():
        kinds = set(submodel_kinds(part)) if part is root or _is_pretrained(part) else set()
        # A Q-Former class written for images declares images even inside an audio model.
        if len(declared) < 2 or not CONNECTOR.search(name):
            token_ids |= kinds
    if decodes_text(root):
        token_ids.add("text")
    ordered = [name for name in ORDER if name in token_ids]
    return (*ordered, *sorted(token_ids - set(ORDER)))


def find_submodels(root: nn.Module) -> list[nn.Module]:
    """Returns the Hugging Face models inside a model, itself first."""
    return [part for part in root.modules() if _is_pretrained(part)]


def _is_pretrained(part: nn.Module) -> bool:
    from transformers import PreTrainedModel

    return isinstance(part, PreTrainedModel)


def decodes_text(root: nn.Module) -> bool:
    """Whether the model is an encoder-decoder whose decoder takes token ids of text."""
    return (
        "text" in output_modalities(root)
        and _encoder(root) is not None
        and "decoder_input_ids" in inspect.signature(type(root).forward).parameters
    )


def output_modalities(root: nn.Module) -> tuple[str, ...]:
    """Returns the output modalities that a model declares; ("text",) by default."""
    declared = getattr(root, "output_modalities", None) or ("text",)
    return (declared,) if isinstance(declared, str) else tuple(declared)


def submodel_kinds(part: nn.Module) -> tuple[str, ...]:
    """Returns the input modalities that a Hugging Face model declares; ("text",) by default."""
    declared = getattr(part, "input_modalities", "text") or "text"
    declared = (declared,) if isinstance(declared, str) else tuple(declared)
    main = getattr(part, "main_input_name", None)
    is_default = declared == ("text",) and isinstance(main, str) and main in MAIN_INPUT
    return (MAIN_INPUT[main],) if is_default else declared  # type: ignore[index]


def placeholders(config: Any) -> dict[int, str]:
    """Returns token id -> modality of the placeholders in ``input_ids``, from the configuration and its parts."""
    ids: dict[int, str] = {}
    for part in _configs(config):
        # The outer configuration takes precedence over those of its parts.
        missing = [name for name in ORDER[1:] if name not in ids.values()]
        for name in missing:
            for suffix in ("token_id", "token_index", "context_token_id", "pad_token_id", "patch_id"):
                token = getattr(part, f"{name}_{suffix}", None)
                if isinstance(token, int) and token >= 0:
                    ids.setdefault(token, name)
        # Models whose image tokens are part of the vocabulary.
        vocabulary = getattr(part, "vocabulary_map", None)
        if isinstance(vocabulary, dict) and isinstance(vocabulary.get("<image>"), int):
            ids.setdefault(vocabulary["<image>"], "image")
    return ids


def _configs(config: Any) -> list[Any]:
    from transformers import PreTrainedConfig

    inner = [part for part in vars(config).values() if isinstance(part, PreTrainedConfig)]
    return [config, *(deeper for part in inner for deeper in _configs(part))]


class Submodels:
    """Names, owners and roles of a model's modules.

    Args:
        root: a PreTrainedModel.

    Attributes:
        paths: id of each module -> its name.
        modalities: modality names of the whole model.
        placeholders: token id -> modality.
        encoder: the encoder of an encoder-decoder model; None otherwise.
    """

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.paths = {id(part): name for name, part in root.named_modules()}
        self.modalities = modalities_of(root)
        self.placeholders = placeholders(root.config)
        self.encoder = _encoder(root)
        self._owners = _owners(root)
        self._decodes_text = decodes_text(root)

    @property
    def others(self) -> tuple[str, ...]:
        """Modalities other than text."""
        return tuple(name for name in self.modalities if name != "text")

    def owner(self, module: nn.Module) -> nn.Module:
        """Returns the innermost Hugging Face model that contains a module."""
        return self._owners[id(module)]

    def is_submodel(self, module: nn.Module) -> bool:
        """Whether the module belongs to an inner model with its own configuration class."""
        return type(self.owner(module).config) is not type(self.root.config)

    def unimodal_kind(self, module: nn.Module) -> str | None:
        """Returns the modality of a unimodal encoder or connector; None for modules that may have several."""
        kinds = submodel_kinds(self.owner(module))
        if "text" not in kinds:
            if self._decodes_text and self._in_decoder(module):
                # The decoder class inherits the modalities of the whole model, but takes text.
                return None
            path = self.paths[id(module)]
            return next((name for name in self.modalities if name in kinds), self._among_others(_kind_in_path(path)))
        if not self.others:
            return "text"
        for name in self.paths[id(module)].split("."):
            if match := ENCODER_NAME.fullmatch(name):
                return self._among_others(KIND_IN_NAME.get(match[1].lower(), "image"))
            if CONNECTOR.search(name):
                return self._among_others(_kind_in_path(self.paths[id(module)]))
        return None

    def num_leading_queries(self, module: nn.Module) -> int | None:
        """Returns the number of learned queries of a Q-Former, which text tokens may follow; None elsewhere."""
        if re.search(r"q_?former", self.paths[id(module)], re.IGNORECASE):
            return getattr(self.root.config, "num_query_tokens", None)
        return None

    def is_cross(self, module: nn.Module) -> bool:
        """Whether the module is cross-attention: its keys come from another sequence than its queries."""
        if getattr(module, "is_cross_attention", False):
            return True
        near = ".".join(self.paths[id(module)].split(".")[-2:])
        return bool(CROSS.search(near) or CROSS.search(type(module).__name__))

    def in_encoder(self, module: nn.Module) -> bool:
        """Whether the module is inside the encoder of an encoder-decoder model."""
        if self.encoder is None:
            return False
        path, encoder = self.paths[id(module)], self.paths[id(self.encoder)]
        return path == encoder or path.startswith(f"{encoder}.")

    def _in_decoder(self, module: nn.Module) -> bool:
        decoder = self.root.get_decoder()  # type: ignore[operator]
        path = self.paths.get(id(decoder))
        holds_encoder = decoder is self.root or any(part is self.encoder for part in decoder.modules())
        return bool(path) and not holds_encoder and f"{self.paths[id(module)]}.".startswith(f"{path}.")

    def source_modality(self) -> str:
        """Returns the modality of the keys of cross-attention if nothing else is known."""
        if self.encoder is not None:
            return next((name for name in submodel_kinds(self.encoder) if name != "text"), "text")
        return next(iter(self.others), "text")

    def has_cross_attention(self, owner: nn.Module) -> bool:
        """Whether a module contains cross-attention."""
        return any(self.is_cross(part) for part in owner.modules() if id(part) in self.paths)

    def _among_others(self, name: str) -> str | None:
        return name if name in self.others else next(iter(self.others), None)


def _kind_in_path(path: str) -> str:
    return next((name for word, name in KIND_IN_NAME.items() if word in path.lower()), "image")


def _owners(root: nn.Module) -> dict[int, nn.Module]:
    """Returns id of each module -> the innermost Hugging Face model that contains it."""
    owners: dict[int, nn.Module] = {}

    def walk(part: nn.Module, owner: nn.Module) -> None:
        owner = part if _is_pretrained(part) else owner
        owners[id(part)] = owner
        for child in part.children():
            walk(child, owner)

    walk(root, root)
    return owners


def _encoder(root: nn.Module) -> nn.Module | None:
    if not getattr(root.config, "is_encoder_decoder", False):
        return None
    get_encoder: Any = getattr(root, "get_encoder", None)
    encoder = get_encoder() if get_encoder is not None else None
    return encoder if isinstance(encoder, nn.Module) and encoder is not root else None
