"""What the parts of a Hugging Face model read, as their classes, names and configuration tell."""

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
TOWER = re.compile(
    r"(vision|visual|image|img|video|audio|speech)(_?(unimodal|model|encoder|backbone|transformer|trunk))?",
    re.IGNORECASE,
)
WORDS = {"video": "video", "audio": "audio", "speech": "audio"}
CONNECTOR = re.compile(r"resampler|perceiver|q_?former|projector|projection|connector|abstractor", re.IGNORECASE)
CROSS = re.compile(r"(cross_?att|crossattention|encoder_attn|encdecattention|cross_layer)", re.IGNORECASE)


def is_pretrained_model(model: nn.Module) -> list[nn.Module]:
    """The outermost Hugging Face models in a module."""
    if "transformers" not in sys.modules:
        return []
    from transformers import PreTrainedModel

    if isinstance(model, PreTrainedModel):
        return [model]
    return [found for part in model.children() for found in is_pretrained_model(part)]


def modalities_of(root: nn.Module) -> tuple[str, ...]:
    """The names of what a model reads, text first."""
    found = set(placeholders(root.config).values())
    declared = set(submodel_kinds(root))
    for name, part in root.named_modules():
        kinds = set(submodel_kinds(part)) if part is root or _is_pretrained(part) else set()
        # A Q-Former made for images declares images, also where the whole model reads audio.
        if len(declared) < 2 or not CONNECTOR.search(name):
            found |= kinds
    if decodes_text(root):
        found.add("text")
    ordered = [name for name in ORDER if name in found]
    return (*ordered, *sorted(found - set(ORDER)))


def find_submodels(root: nn.Module) -> list[nn.Module]:
    """The Hugging Face models that a model is made of, itself first."""
    from transformers import PreTrainedModel

    return [part for part in root.modules() if isinstance(part, PreTrainedModel)]


def _is_pretrained(part: nn.Module) -> bool:
    from transformers import PreTrainedModel

    return isinstance(part, PreTrainedModel)


def decodes_text(root: nn.Module) -> bool:
    """Whether it is an encoder-decoder whose decoder is given token ids of text, whatever its encoder reads."""
    written = getattr(root, "output_modalities", None) or ("text",)
    written = (written,) if isinstance(written, str) else tuple(written)
    return "text" in written and _encoder(root) is not None and "decoder_input_ids" in inspect.signature(
        type(root).forward
    ).parameters  # fmt: skip


def submodel_kinds(part: nn.Module) -> tuple[str, ...]:
    """What a Hugging Face model says that it reads; "text" is also what one says that says nothing."""
    said = getattr(part, "input_modalities", "text") or "text"
    said = (said,) if isinstance(said, str) else tuple(said)
    main = getattr(part, "main_input_name", None)
    return (MAIN_INPUT[main],) if said == ("text",) and isinstance(main, str) and main in MAIN_INPUT else said


def placeholders(config: Any) -> dict[int, str]:
    """token id -> modality that it stands for in ``input_ids``, as the configuration and its parts tell."""
    found: dict[int, str] = {}
    for part in _configs(config):
        # What the whole says of a modality goes before what its parts say.
        missing = [name for name in ORDER[1:] if name not in found.values()]
        for name in missing:
            for suffix in ("token_id", "token_index", "context_token_id", "pad_token_id", "patch_id"):
                token = getattr(part, f"{name}_{suffix}", None)
                if isinstance(token, int) and token >= 0:
                    found.setdefault(token, name)
        # Models whose pictures are words of their vocabulary.
        words = getattr(part, "vocabulary_map", None)
        if isinstance(words, dict) and isinstance(words.get("<image>"), int):
            found.setdefault(words["<image>"], "image")
    return found


def _configs(config: Any) -> list[Any]:
    from transformers import PreTrainedConfig

    inner = [part for part in vars(config).values() if isinstance(part, PreTrainedConfig)]
    return [config, *(deeper for part in inner for deeper in _configs(part))]


class Submodels:
    """Names, owners and tasks of a model's modules.

    Args:
        root: a PreTrainedModel.

    Attributes:
        paths: id of every module -> its name.
        modalities: of the whole.
        placeholders: token id -> modality.
        encoder: the encoder of an encoder-decoder; None where there is none.
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
        """All but text."""
        return tuple(name for name in self.modalities if name != "text")

    def owner(self, module: nn.Module) -> nn.Module:
        """The innermost Hugging Face model that holds a module."""
        return self._owners[id(module)]

    def is_submodel(self, module: nn.Module) -> bool:
        """Whether it belongs to a model inside the model, with a configuration of its own."""
        return type(self.owner(module).config) is not type(self.root.config)

    def alone(self, module: nn.Module) -> str | None:
        """The modality of an encoder of one, or of what brings it to a language model; None where several may meet."""
        said = submodel_kinds(self.owner(module))
        if "text" not in said:
            if self._decodes_text and self._in_decoder(module):
                # The class of a decoder inherits what the whole model reads; it is given text.
                return None
            path = self.paths[id(module)]
            return next((name for name in self.modalities if name in said), self._among_others(_spoken_of(path)))
        if not self.others:
            return "text"
        for name in self.paths[id(module)].split("."):
            if found := TOWER.fullmatch(name):
                return self._among_others(WORDS.get(found[1].lower(), "image"))
            if CONNECTOR.search(name):
                return self._among_others(_spoken_of(self.paths[id(module)]))
        return None

    def queries_in_front(self, module: nn.Module) -> int | None:
        """The number of learned queries of a Q-Former, behind which words may follow."""
        if re.search(r"q_?former", self.paths[id(module)], re.IGNORECASE):
            return getattr(self.root.config, "num_query_tokens", None)
        return None

    def is_cross(self, module: nn.Module) -> bool:
        """Whether its keys come from another stream than its queries."""
        if getattr(module, "is_cross_attention", False):
            return True
        near = ".".join(self.paths[id(module)].split(".")[-2:])
        return bool(CROSS.search(near) or CROSS.search(type(module).__name__))

    def in_encoder(self, module: nn.Module) -> bool:
        if self.encoder is None:
            return False
        path, encoder = self.paths[id(module)], self.paths[id(self.encoder)]
        return path == encoder or path.startswith(f"{encoder}.")

    def _in_decoder(self, module: nn.Module) -> bool:
        decoder = self.root.get_decoder()  # type: ignore[operator]
        path = self.paths.get(id(decoder))
        holds_encoder = decoder is self.root or any(part is self.encoder for part in decoder.modules())
        return bool(path) and not holds_encoder and f"{self.paths[id(module)]}.".startswith(f"{path}.")

    def source(self) -> str:
        """What cross-attention reads, where nothing else is known."""
        if self.encoder is not None:
            return next((name for name in submodel_kinds(self.encoder) if name != "text"), "text")
        return next(iter(self.others), "text")

    def reads_others(self, owner: nn.Module) -> bool:
        """Whether any part of it reads another stream."""
        return any(self.is_cross(part) for part in owner.modules() if id(part) in self.paths)

    def _among_others(self, name: str) -> str | None:
        return name if name in self.others else next(iter(self.others), None)


def _spoken_of(path: str) -> str:
    return next((name for word, name in WORDS.items() if word in path.lower()), "image")


def _owners(root: nn.Module) -> dict[int, nn.Module]:
    """id of every module -> the innermost Hugging Face model that holds it."""
    from transformers import PreTrainedModel

    found: dict[int, nn.Module] = {}

    def walk(part: nn.Module, owner: nn.Module) -> None:
        owner = part if isinstance(part, PreTrainedModel) else owner
        found[id(part)] = owner
        for child in part.children():
            walk(child, owner)

    walk(root, root)
    return found


def _encoder(root: nn.Module) -> nn.Module | None:
    if not getattr(root.config, "is_encoder_decoder", False):
        return None
    get_encoder: Any = getattr(root, "get_encoder", None)
    found = get_encoder() if get_encoder is not None else None
    return found if isinstance(found, nn.Module) and found is not root else None
