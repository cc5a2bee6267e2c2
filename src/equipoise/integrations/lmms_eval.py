"""lmms-eval: a model that puts a condition (blank, other, none) in front of another registered model.

::

    lmms-eval --model equipoise --model_args base=qwen2_5_vl,condition=blank,pretrained=Qwen/Qwen2.5-VL-3B-Instruct \\
        --tasks mmstar

lmms-eval finds the model by the entry point group ``lmms_eval.models`` (version 0.7 or later).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from typing import Any

import numpy as np
from lmms_eval.api.model import lmms  # pyright: ignore[reportMissingImports]
from PIL import Image

from ..errors import ConfigError, unknown_name

CONDITIONS = ("given", "blank", "other", "none")
GRAY = (127, 127, 127)
"""Color of blank images."""
KINDS = ("image", "video", "audio")
HERE = "equipoise.integrations.lmms_eval"


def manifests() -> Any:
    """Returns the entry of lmms-eval's registry: the model "equipoise", for chat models and for simple ones."""
    from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports]

    return ModelManifest(
        "equipoise", simple_class_path=f"{HERE}.ConditionedSimpleModel", chat_class_path=f"{HERE}.ConditionedChatModel"
    )


class ConditionedModel(lmms):
    """Passes the requests of a task to another model with changed media.

    Args:
        base: name of a model that lmms-eval knows.
        condition: "given"; "blank" (gray images of the same size, silence); "other" (the media of another document of
            the task); or "none" (the text alone).
        seed: of the permutation for "other".
        arguments: of the other model, such as ``pretrained``.

    Raises:
        ConfigError: an unknown condition, a base of the other kind, or media that cannot be blank, such as video files.

    When it misleads: prompts of tasks may mention the image, or have a placeholder for it, also in the condition
    "none". In tasks of several rounds, only the media of the first round are changed.
    """

    def __init__(self, base: str, condition: str = "blank", seed: int = 0, **arguments: Any) -> None:
        from lmms_eval.models import get_model  # pyright: ignore[reportMissingImports]

        super().__init__()
        if condition not in CONDITIONS:
            raise unknown_name("lmms-eval", "condition", condition, CONDITIONS)
        kind = get_model(base, force_simple=self.is_simple)
        if bool(getattr(kind, "is_simple", True)) != self.is_simple:
            raise ConfigError(
                "lmms-eval", expected=f"a {'simple' if self.is_simple else 'chat'} model as base", got=base,
                fix="Add --force_simple for simple models, or leave it out for chat models.",
            )  # fmt: skip
        self.condition, self.seed = condition, seed
        self.base = kind(**arguments)
        self._rank, self._world_size = self.base.rank, self.base.world_size
        # The evaluator fills this dict with the documents of the tasks.
        self.task_dict = self.base.task_dict

    def __getattr__(self, name: str) -> Any:
        if name == "base":
            raise AttributeError(name)
        return getattr(self.base, name)

    def set_cache_hook(self, cache_hook: Any) -> None:
        super().set_cache_hook(cache_hook)
        self.base.set_cache_hook(cache_hook)

    def loglikelihood(self, requests: Sequence[Any]) -> Any:
        return self.base.loglikelihood(self.conditioned(requests))

    def generate_until(self, requests: Sequence[Any]) -> Any:
        return self.base.generate_until(self.conditioned(requests))

    def generate_until_multi_round(self, requests: Sequence[Any]) -> Any:
        return self.base.generate_until_multi_round(self.conditioned(requests))

    def conditioned(self, requests: Sequence[Any]) -> list[Any]:
        """Returns copies of requests whose media follow the condition."""
        if self.condition == "given":
            return list(requests)
        documents: dict[tuple[Any, Any], list[Any]] = {}
        for request in requests:
            if len(request.args) == 2:
                continue
            # Requests of several rounds have one more argument before these.
            doc_id, task, split = request.args[-3:]
            known = documents.setdefault((task, split), [])
            if doc_id not in known:
                known.append(doc_id)
        partners = {}
        for place, known in documents.items():
            order = [known[index] for index in np.random.default_rng(self.seed).permutation(len(known))]
            if self.condition == "other" and len(order) < 2:
                raise ConfigError("lmms-eval", expected="several documents for the condition 'other'", got="one")
            partners |= {(*place, one): order[index - 1] for index, one in enumerate(order)}
        changed = []
        for request in requests:
            if len(request.args) == 2:
                # The likelihood of a choice alone, without question and media, for mutual information.
                changed.append(request)
                continue
            *first, doc_id, task, split = request.args
            other = self.task_dict[task][split][partners[task, split, doc_id]] if self.condition == "other" else None
            # Requests of likelihoods have a list of media for chat models too.
            if self.is_simple or request.request_type == "loglikelihood":
                first[2] = self.media_reader(first[2], other)
            else:
                place = next(n for n, part in enumerate(first) if callable(part))
                first[place] = self.message_reader(first[place], other)
            one = copy(request)
            one.arguments = (*first, doc_id, task, split)
            changed.append(one)
        return changed

    def media_reader(self, inner: Callable[[Any], Any], other: Any) -> Callable[[Any], list[Any]]:
        """Returns the function from a document to the list of media that the other model receives."""

        def read(document: Any) -> list[Any]:
            if self.condition == "none":
                return []
            if self.condition == "other":
                return inner(other)
            return [blank_medium(one) for one in inner(document) or ()]

        return read

    def message_reader(self, inner: Callable[[Any], Any], other: Any) -> Callable[[Any], list[Any]]:
        """Returns the function from a document to the messages with media that the other model receives."""

        def read(document: Any) -> list[Any]:
            replacements = {kind: [] for kind in KINDS}
            for message in inner(other) if self.condition == "other" else ():
                for part in _parts(message):
                    if part.get("type") in KINDS:
                        replacements[part["type"]].append(part["url"])
            counts = dict.fromkeys(KINDS, 0)
            messages = []
            for message in inner(document):
                content = []
                for part in _parts(message):
                    kind = part.get("type")
                    if kind not in KINDS:
                        content.append(part)
                    elif self.condition == "blank":
                        content.append({**part, "url": blank_medium(part["url"])})
                    elif self.condition == "other" and replacements[kind]:
                        urls = replacements[kind]
                        content.append({**part, "url": urls[counts[kind] % len(urls)]})
                        counts[kind] += 1
                messages.append({**message, "content": content})
            return messages

        return read


class ConditionedSimpleModel(ConditionedModel):
    """For models that receive a list of media for each document."""

    is_simple = True


class ConditionedChatModel(ConditionedModel):
    """For models that receive messages with media for each document."""

    is_simple = False


def blank_medium(medium: Any) -> Any:
    """Returns a gray image of the same size, or silence of the same length.

    Raises:
        ConfigError: other media, such as paths of videos.
    """
    if isinstance(medium, Image.Image):
        return Image.new("RGB", medium.size, GRAY)
    if isinstance(medium, Mapping) and "array" in medium:
        return {**medium, "array": np.zeros_like(np.asarray(medium["array"]))}
    raise ConfigError(
        "lmms-eval blank", expected="images as Pillow objects, or audio as {'array', 'sampling_rate'}",
        got=type(medium).__name__, fix="Use the condition 'other' or 'none' for video files.",
    )  # fmt: skip


def _parts(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else [dict(part) for part in content]
