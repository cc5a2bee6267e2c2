"""Conditions in front of models of lmms-eval, where it is installed."""

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("lmms_eval.models.registry_v2", reason="lmms-eval is not installed")

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models import MODEL_REGISTRY_V2
from lmms_eval.models.registry_v2 import ModelManifest

from equipoise.errors import ConfigError
from equipoise.integrations.lmms_eval import blank_medium, manifests

COLORS = {"red": (255, 0, 0), "green": (0, 128, 0), "blue": (0, 0, 255)}
DOCS = [{"image": Image.new("RGB", (6, 4), color), "answer": name} for name, color in COLORS.items()]


def named(image):
    return {color: name for name, color in COLORS.items()}.get(image.getpixel((0, 0)), "gray")


class TinySimple(lmms):
    """Answers with the name of the color of the image."""

    def __init__(self, word="nothing"):
        super().__init__()
        self.word = word

    def generate_until(self, requests):
        replies = []
        for request in requests:
            _, _, doc_to_visual, doc_id, task, split = request.args
            media = doc_to_visual(self.task_dict[task][split][doc_id])
            replies.append(named(media[0]) if media else self.word)
        return replies

    def loglikelihood(self, requests):
        """0 for the color of the image, -1 for others, and -2 for choices without question and image."""
        values = []
        for request in requests:
            if len(request.args) == 2:
                values.append((-2.0, False))
                continue
            _, choice, doc_to_visual, doc_id, task, split = request.args
            media = doc_to_visual(self.task_dict[task][split][doc_id])
            values.append((0.0 if media and named(media[0]) == choice.strip() else -1.0, True))
        return values

    def generate_until_multi_round(self, requests):
        replies = []
        for request in requests:
            _, _, doc_to_visual, _, doc_id, task, split = request.args
            media = doc_to_visual(self.task_dict[task][split][doc_id])
            replies.append(named(media[0]) if media else self.word)
        return replies


class TinyChat(TinySimple):
    is_simple = False

    def generate_until(self, requests):
        replies = []
        for request in requests:
            _, doc_to_messages, _, doc_id, task, split = request.args
            (message,) = doc_to_messages(self.task_dict[task][split][doc_id])
            images = [part["url"] for part in message["content"] if part["type"] == "image"]
            assert message["content"][-1] == {"type": "text", "text": "Which color?"}
            replies.append(named(images[0]) if images else self.word)
        return replies


@pytest.fixture(autouse=True)
def registered():
    MODEL_REGISTRY_V2.register_manifest(manifests(), overwrite=True)
    for name in ("TinySimple", "TinyChat"):
        path = f"{__name__}.{name}"
        kind = {"simple_class_path": path} if name == "TinySimple" else {"chat_class_path": path}
        MODEL_REGISTRY_V2.register_manifest(ModelManifest(name, **kind), overwrite=True)


def messages(doc):
    content = [{"type": "image", "url": doc["image"]}, {"type": "text", "text": "Which color?"}]
    return [{"role": "user", "content": content}]


def requests(simple):
    visual = lambda doc: [doc["image"]]  # noqa: E731
    order = (lambda n: ("Which color?", {}, visual, n)) if simple else (lambda n: ("", messages, {}, n))
    return [
        Instance("generate_until", (*order(n), "colors", "test"), 0, {"task": "colors", "doc_id": n, "repeats": 1})
        for n in range(3)
    ]


@pytest.mark.parametrize("simple", [True, False])
@pytest.mark.parametrize("condition", ["given", "blank", "other", "none"])
def test_conditions(simple, condition):
    kind = MODEL_REGISTRY_V2.get_model_class("equipoise", force_simple=simple)
    base = "TinySimple" if simple else "TinyChat"
    model = kind.create_from_arg_string(f"base={base},condition={condition},word=unknown")
    model.task_dict["colors"] = {"test": DOCS}
    asked = requests(simple)
    replies = model.generate_until(asked)
    if condition == "other":
        assert sorted(replies) == sorted(COLORS)
        assert all(reply != name for reply, name in zip(replies, COLORS, strict=True))
    else:
        expected = {"given": [*COLORS], "blank": ["gray"] * 3, "none": ["unknown"] * 3}
        assert replies == expected[condition]
    # The requests of the evaluator are not changed.
    assert asked[0].args == requests(simple)[0].args or simple
    assert model.word == "unknown"


@pytest.mark.parametrize("simple", [True, False])
@pytest.mark.parametrize("condition", ["given", "blank", "other", "none"])
def test_multiple_choice_with_mutual_information(simple, condition):
    """Requests of lmms-eval's multiple choice, the last ones of which have no media."""
    kind = MODEL_REGISTRY_V2.get_model_class("equipoise", force_simple=simple)
    base = "TinySimple" if simple else "TinyChat"
    model = kind.create_from_arg_string(f"base={base},condition={condition}")
    model.task_dict["colors"] = {"test": DOCS}
    asked = [
        Instance("loglikelihood", arguments, index, {"task": "colors", "doc_id": n, "repeats": 1})
        for n in range(3)
        for alone in (False, True)
        for index, name in enumerate(COLORS)
        for arguments in [
            ("", name) if alone else ("Which color?", f" {name}", lambda doc: [doc["image"]], n, "colors", "test")
        ]
    ]
    values = [value for value, _ in model.loglikelihood(asked)]
    for n in range(3):
        with_media, alone = values[6 * n : 6 * n + 3], values[6 * n + 3 : 6 * n + 6]
        assert alone == [-2.0] * 3
        chosen = [index for index, value in enumerate(with_media) if value == 0]
        if condition == "given":
            assert chosen == [n]
        elif condition == "other":
            assert len(chosen) == 1
            assert chosen != [n]
        else:
            assert chosen == []


def test_requests_of_several_rounds():
    kind = MODEL_REGISTRY_V2.get_model_class("equipoise", force_simple=True)
    model = kind.create_from_arg_string("base=TinySimple,condition=other")
    model.task_dict["colors"] = {"test": DOCS}
    asked = requests(simple=True)
    for one in asked:
        one.arguments = (*one.arguments[:3], str, *one.arguments[3:])
    replies = model.generate_until_multi_round(asked)
    assert sorted(replies) == sorted(COLORS)
    assert all(reply != name for reply, name in zip(replies, COLORS, strict=True))


def test_bad_input():
    kind = MODEL_REGISTRY_V2.get_model_class("equipoise")
    with pytest.raises(ConfigError, match="expected a chat model as base, got TinySimple"):
        kind(base="TinySimple")
    with pytest.raises(ConfigError, match="condition"):
        kind(base="TinyChat", condition="blnk")
    with pytest.raises(ConfigError, match="got str"):
        blank_medium("clip.mp4")
    sound = blank_medium({"array": np.ones(4), "sampling_rate": 16000})
    assert sound["sampling_rate"] == 16000
    assert not sound["array"].any()
