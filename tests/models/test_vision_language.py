"""Vision-language model: inputs, connectors, predictions, generated answers and their evaluation."""

import sys

import pytest
import torch

from equipoise.alignment import GatedCrossAttention
from equipoise.data import load_dataset
from equipoise.data.sets.scenes import IGNORED, Scenes
from equipoise.data.sets.text_codes import IDS, decode_text, encode_text
from equipoise.encoders import PatchEncoder
from equipoise.errors import ConfigError, MissingExtraError, ShapeError
from equipoise.models.vision_language import CONNECTORS, VisionLanguageModel, evaluate_vlm
from equipoise.models.vision_language.vlm_evaluation import derangement, generate_answers, word_f1
from equipoise.training.method_factory import build_model, parse_method
from equipoise.training.recipes import load_recipe
from helpers.language import batch, build_vlm, small_scenes
from helpers.tolerance import TOL

pytest.importorskip("transformers")
EXACT = TOL[torch.float32]
PATCHES, LATENTS = 36, 5


def encode(text):
    return torch.tensor([[IDS["<image>"], *encode_text(text)]])


@pytest.mark.parametrize("kind", CONNECTORS)
def test_image_tokens_replace_the_placeholder(kind):
    model, part = build_vlm(kind), batch()
    patches = model.patches(part["image"])
    assert patches.shape == (7, PATCHES, 12)
    # Without the class token, which stands in front.
    torch.testing.assert_close(patches, model.encoder(part["image"]).values[:, 1:], **EXACT)
    stream = model.stream(patches, part["text"], part["labels"])
    words = model.language.get_input_embeddings()(part["text"])
    if kind == "gated":
        assert torch.equal(stream.embeddings, words)
        assert torch.equal(stream.labels, part["labels"])
        assert stream.media_at.nonzero().tolist() == [[row, 0] for row in range(7)]
        return
    count = PATCHES if kind in ("linear", "mlp") else LATENTS
    assert stream.modality[0].tolist() == [1] * count + [0] * (part["text"].shape[1] - 1)
    torch.testing.assert_close(stream.embeddings[:, :count], model.connector(patches), **EXACT)
    torch.testing.assert_close(stream.embeddings[:, count:], words[:, 1:], **EXACT)
    assert (stream.labels[:, :count] == IGNORED).all()
    assert torch.equal(stream.labels[:, count:], part["labels"][:, 1:])


@pytest.mark.parametrize("kind", CONNECTORS)
def test_losses_cover_predicted_words_only(kind):
    model, part = build_vlm(kind), batch()
    stream = model.stream(model.patches(part["image"]), part["text"], part["labels"])
    logits = model.logits(stream).double()
    terms = {"answer": [], "caption": []}
    for row in range(7):
        name = "caption" if small_scenes().kinds("train")[row] == "caption" else "answer"
        for index, word in enumerate(stream.labels[row].tolist()):
            if word != IGNORED:
                terms[name].append(-logits[row, index - 1].log_softmax(dim=0)[word])
    result = model.losses(part)
    assert set(result) == set(terms)
    for name, values in terms.items():
        torch.testing.assert_close(result[name].double(), sum(values) / len(values), **EXACT)


@pytest.mark.parametrize("kind", CONNECTORS)
def test_words_attend_to_image_and_previous_words(kind):
    model, part = build_vlm(kind), batch()
    if kind == "gated":
        for gate in model.gates:
            torch.nn.init.ones_(gate.attention_gate)
    patches, text = model.patches(part["image"]), part["text"]
    here = model.logits(model.stream(patches, text))
    changed = text.clone()
    changed[:, -1] = IDS["car"]
    assert torch.equal(model.logits(model.stream(patches, changed))[:, :-1], here[:, :-1])
    assert not torch.allclose(model.logits(model.stream(patches.flip(1), text))[:, -1], here[:, -1])


def test_closed_gates_block_the_image():
    model, part = build_vlm("gated"), batch()
    stream = model.stream(model.patches(part["image"]), part["text"])
    alone = model.language(inputs_embeds=stream.embeddings).logits
    assert torch.equal(model.logits(stream), alone)
    assert not any(block._forward_pre_hooks for block in model.language.model.layers)
    assert sum(isinstance(gate, GatedCrossAttention) for gate in model.gates) == 2


def test_hooks_are_removed_after_an_error(monkeypatch):
    model, part = build_vlm("gated"), batch()
    stream = model.stream(model.patches(part["image"]), part["text"])
    monkeypatch.setattr(model.gates[1], "forward", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.logits(stream)
    assert not any(block._forward_pre_hooks for block in model.language.model.layers)


@pytest.mark.parametrize("kind", CONNECTORS)
def test_answer_is_the_most_likely_next_word(kind):
    model, data = build_vlm(kind), small_scenes()
    part = batch(16)
    asks = part["target"] != IGNORED
    part = {name: values[asks] for name, values in part.items()}
    result = model.answer(part)
    bare = part["text"].masked_fill(part["labels"] != IGNORED, IDS["<pad>"])
    assert torch.equal(model.answer({"image": part["image"], "text": bare}), result)
    for row, index in enumerate(part["index"].tolist()):
        text = torch.tensor([[IDS[word] for word in data.words("train", index)[:-1]]])
        stream = model.stream(model.patches(part["image"][row : row + 1]), text)
        assert int(model.logits(stream)[0, -1].argmax()) == int(result[row])


@pytest.mark.parametrize("kind", CONNECTORS)
def test_captions_are_greedy(kind):
    model, part = build_vlm(kind, seed=3), batch(5)
    result = model.caption(part, longest=6)
    assert result.shape[1] <= 6
    text = torch.cat([encode("describe").expand(5, -1), result], dim=1)
    logits = model.logits(model.stream(model.patches(part["image"]), text))
    message = logits.argmax(dim=-1)[:, -result.shape[1] - 1 : -1]
    for row in range(5):
        words = result[row].tolist()
        end = words.index(IDS["<end>"]) + 1 if IDS["<end>"] in words else len(words)
        assert message[row, :end].tolist() == words[:end]
        assert set(words[end:]) <= {IDS["<pad>"]}


def test_caption_contains_no_image_token():
    model = build_vlm()
    picture = torch.tensor(IDS["<image>"])
    # What it would say all the time.
    model.language.lm_head.register_forward_hook(lambda module, args, said: said.index_fill(-1, picture, 99.0))
    assert IDS["<image>"] not in model.caption({"image": batch(3)["image"]}, longest=4)


@pytest.mark.parametrize("kind", CONNECTORS)
def test_training_reduces_loss_and_depends_on_seed_only(kind):
    def trained():
        model, part = build_vlm(kind, seed=1), batch()
        optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-2)
        values = []
        for _ in range(6):
            loss = sum(model.losses(part).values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            values.append(float(loss.detach()))
        idle = [name for name, p in model.named_parameters() if p.grad is None]
        return values, idle

    values, idle = trained()
    assert values[-1] < 0.8 * values[0]
    assert not idle
    assert trained()[0] == values


class StoredAnswers(VisionLanguageModel):
    """Returns the stored answers of known images."""

    def __init__(self, source, split):
        torch.nn.Module.__init__(self)
        self.words, self.weight = source.lexicon, torch.nn.Parameter(torch.zeros(1))
        self.known = {}
        for part in source.batches(split, 5, seed=0, epoch=0, train=False):
            for image, labels in zip(part["image"], part["labels"], strict=True):
                self.known[image.sum().item()] = labels[labels != IGNORED]

    def answer(self, batch):
        return torch.stack([self.known.get(image.sum().item(), torch.tensor([0]))[0] for image in batch["image"]])

    def caption(self, batch):
        message = [self.known.get(image.sum().item(), torch.tensor([0])) for image in batch["image"]]
        return torch.nn.utils.rnn.pad_sequence(message, batch_first=True)


def test_metrics_of_a_model_with_stored_answers():
    source = small_scenes()
    row = evaluate_vlm(StoredAnswers(source, "test"), source)
    result = row["metrics"]
    kinds = set(source.kinds("test"))
    assert {f"accuracy/{kind}" for kind in kinds if kind != "caption"} <= set(result)
    for name, value in result.items():
        if "shuffled" not in name and "blank" not in name:
            assert value == 1.0
    truth = {}
    for index in range(len(source.test)):
        labels = source.test.inputs["labels"][index]
        truth[index] = decode_text(labels[labels != IGNORED].tolist())
    other = derangement(len(truth)).tolist()
    asks = [index for index in truth if source.kinds("test")[index] != "caption"]
    right = [truth[other[index]].split()[0] == truth[index] for index in asks]
    assert result["accuracy_shuffled"] == pytest.approx(sum(right) / len(right))
    assert result["accuracy_blank"] == result["caption_exact_blank"] == 0.0
    assert row["examples"][2] == {
        "question": " ".join(source.words("test", 2)[1:-1]), "answer": truth[2], "said": truth[2]
    }  # fmt: skip


def test_every_sample_has_a_reply_and_a_swapped_image():
    source, model = small_scenes(), build_vlm()
    assert sorted(index for index, _ in generate_answers(model, source, "test")) == list(range(len(source.test)))
    order = derangement(11).tolist()
    index, met = 0, []
    for _ in range(11):
        met.append(index)
        index = order[index]
    assert sorted(met) == list(range(11))
    assert index == 0


def test_hand_computed_word_f1():
    assert word_f1([], []) == 1.0
    assert word_f1([], ["a"]) == 0.0
    assert word_f1(["a", "red", "car"], ["a", "red", "car"]) == 1.0
    assert word_f1(["a", "a", "a"], ["a", "red", "car"]) == pytest.approx(2 / 6)


@pytest.mark.parametrize("kind", CONNECTORS)
def test_recipe_builds_every_variant(kind):
    recipe = load_recipe("scenes_vlm")
    assert kind in recipe.methods
    model, balancers = build_model(parse_method(kind, recipe), recipe, small_scenes())
    assert isinstance(model, VisionLanguageModel)
    assert model.kind == kind
    assert not balancers
    assert float(sum(model.losses(batch()).values()).detach()) > 0


def test_errors():
    model, part = build_vlm(), batch(3)
    with pytest.raises(
        ConfigError, match=r"VisionLanguageModel: expected 'image' in the batch, got \['labels', 'target'"
    ):
        model.losses({name: part[name] for name in ("text", "labels", "target")})
    with pytest.raises(ConfigError, match=r"VisionLanguageModel: expected 'text' in the batch, got \['image'\]"):
        model.answer({"image": part["image"]})
    with pytest.raises(ShapeError, match=r"PatchEncoder: .*\(batch, 3, 48, 48\), got shape \(3, 3, 24, 24\)"):
        model.answer({**part, "image": part["image"][..., ::2, ::2]})
    without = part["text"].clone()
    without[1, 0] = IDS["what"]
    with pytest.raises(
        ShapeError, match=r"VisionLanguageModel text: expected one <image> in every text, got \[1, 0, 1\]\. Put"
    ):
        model.answer({"image": part["image"], "text": without})
    empty = part["text"].clone()
    empty[1, 1:] = IDS["<pad>"]
    with pytest.raises(
        ShapeError, match=r"text: expected at least one word besides <image>, got texts of \[10, 1, 7\]"
    ):
        model.answer({"image": part["image"], "text": empty})
    with pytest.raises(
        ShapeError, match=r"VisionLanguageModel text: expected ids \(batch, word\), batch = 2, got shape \(3, 14\)"
    ):
        model.losses({**part, "image": part["image"][:2]})
    with pytest.raises(
        ShapeError, match=r"VisionLanguageModel text: expected ids \(batch, word\), batch = 3, got shape \(14,\)"
    ):
        model.answer({"image": part["image"], "text": part["text"][0]})
    long = torch.cat([part["text"], torch.full((3, 100), IDS["car"])], dim=1)
    with pytest.raises(
        ShapeError, match=r"VisionLanguageModel text: expected at most context = 128 tokens, .* got 149\. Shorten"
    ):
        model.answer({"image": part["image"], "text": long})
    with pytest.raises(ShapeError, match=r"at most context = 40 tokens, .* got 49"):
        build_vlm(context=40).losses(part)
    with pytest.raises(ShapeError, match=r"at most context = 10 tokens, .* got 14"):
        build_vlm("gated", context=10).losses(part)
    with pytest.raises(
        ConfigError, match=r"VisionLanguageModel: expected a known connector, got 'qforner'\. Did you mean"
    ):
        build_vlm("qforner")
    with pytest.raises(ConfigError, match=r"VisionLanguageModel: expected latents >= 1, got latents = 0"):
        build_vlm("resampler", latents=0)
    with pytest.raises(ConfigError, match=r"dim a multiple of 2 heads, for rotary positions, got depth = 2, dim = 20"):
        build_vlm(heads=4)


def test_recipe_errors():
    encoders = {"image": PatchEncoder(3, (48, 48), patch=8, dim=8, depth=1, heads=2)}
    with pytest.raises(
        ConfigError, match=r"'vision_language_model': expected a data set of images and texts, got Generated"
    ):
        VisionLanguageModel.for_data(load_dataset("generated", samples=20), encoders)
    with pytest.raises(ConfigError, match=r"model 'vision_language_model': expected one encoder, image, got \[\]"):
        VisionLanguageModel.for_data(small_scenes(), {})
    with pytest.raises(ConfigError, match=r"expected a known option of VisionLanguageModel, got 'conector'\. Did"):
        VisionLanguageModel.for_data(small_scenes(), encoders, conector="mlp")


def test_missing_transformers_raises(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r"VisionLanguageModel: expected the package 'transformers', got none"):
        build_vlm()


def test_data_other_than_scenes_raise():
    assert isinstance(small_scenes(), Scenes)
    assert build_vlm().words == small_scenes().lexicon
