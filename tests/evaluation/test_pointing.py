"""Pointing metrics: against explicit attention, and on a model constructed to point."""

import pytest
import torch

import equipoise.models.vision_language.grounding as part
from equipoise.data.sets.text_codes import WORDS
from equipoise.errors import ConfigError
from equipoise.models.vision_language import attention_map, pointing
from equipoise.models.vision_language.grounding import (
    GROUND,
    OBJECT,
    OTHER,
    TEXT,
    labeled_words,
    pointing_metrics,
    region_attention,
)
from helpers.language import batch, build_vlm, small_scenes
from helpers.tolerance import TOL

pytest.importorskip("transformers")
CLOSE = TOL[torch.float32]
KINDS = ("color", "shape")


def explicit_attention(model, image, text):
    """(batch, layer, head, word, patch or word) with the softmax written out, and how many keys are patches."""
    patches = model.patches(image)
    stream = model.stream(patches, text)
    if model.kind != "gated":
        model.language.set_attn_implementation("eager")
        result = model.language(inputs_embeds=stream.embeddings, output_attentions=True).attentions
        model.language.set_attn_implementation("sdpa")
        return torch.stack(result, dim=1)[:, :, :, patches.shape[1] - 1 :]
    maps, hidden = [], stream.embeddings
    for block, gate in zip(model.language.model.layers, model.gates, strict=True):
        reading, normed = gate.reading, gate.norm(hidden)
        q, k = (
            layer(x).unflatten(2, (2, -1)).transpose(1, 2)
            for layer, x in ((reading.query, normed), (reading.key, patches))
        )
        maps.append((q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(dim=-1))
        hidden = gate(hidden, patches)
        places = torch.arange(hidden.shape[1])[None]
        mask = torch.full((hidden.shape[1],) * 2, float("-inf")).triu(1)[None, None]
        turns = model.language.model.rotary_emb(hidden, places)
        hidden = block(hidden, attention_mask=mask, position_ids=places, position_embeddings=turns)
    return torch.stack(maps, dim=1)


@pytest.mark.parametrize("kind", ["linear", "mlp", "gated"])
@torch.no_grad()
def test_scores_against_explicit_attention(kind):
    model, held = build_vlm(kind), batch(7)
    for gate in model.gates:
        torch.nn.init.ones_(gate.attention_gate)
    torch.manual_seed(2)
    index = torch.tensor([1, 3, 2, 5, 4, 2, 3])
    region, others = torch.rand(7, 36) < 0.3, torch.rand(7, 36) < 0.3
    others &= ~region
    result = region_attention(model, held["image"], held["text"], index, region, others)
    maps = explicit_attention(model, held["image"], held["text"])
    assert result.shape == (7, 2, 2, 4)
    for row in range(7):
        seen = maps[row, :, :, index[row]]
        patches = seen[..., :36]
        for label, kept in ((OBJECT, region), (OTHER, others), (GROUND, ~(region | others))):
            torch.testing.assert_close(result[row, ..., label], patches[..., kept[row]].sum(dim=-1), **CLOSE)
        torch.testing.assert_close(result[row, ..., TEXT], seen[..., 36:].sum(dim=-1), **CLOSE)


@pytest.mark.parametrize("kind", ["linear", "gated"])
@torch.no_grad()
def test_maps_against_explicit_attention(kind):
    model, held = build_vlm(kind), batch(5)
    index = torch.tensor([1, 3, 2, 5, 4])
    patches = explicit_attention(model, held["image"], held["text"])[torch.arange(5), :, :, index, :36]
    result = attention_map(model, held["image"], held["text"], index)
    torch.testing.assert_close(result, patches / patches.sum(dim=-1, keepdim=True), **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_means_over_words_by_a_loop(kind):
    model, source = build_vlm("mlp"), small_scenes()
    masses, choices, sizes, rest = [], [], [], []
    for index in range(len(source.test)):
        words = source.words("test", index)
        caption = source.kinds("test")[index] == "caption"
        regions = source.regions("test", torch.tensor([index]))[0]
        covered = source.covered("test", torch.tensor([index]))[0]
        held = source.batch("test", torch.tensor([index]), seed=0, epoch=0, train=False)
        maps = explicit_attention(model, held["image"], held["text"])[0]
        for at, word in enumerate(words):
            if word not in part.KINDS[kind] or not regions[at].any() or (not caption and at == len(words) - 1):
                continue
            patches = maps[:, :, at, :36]
            own = patches[..., regions[at]].sum(dim=-1)
            masses.append(own / patches.sum(dim=-1))
            sizes.append(float(regions[at].float().mean()))
            if bool((covered & ~regions[at]).any()):
                choices.append(own / patches[..., covered].sum(dim=-1))
                rest.append(float(regions[at].sum() / covered.sum()))
    result = pointing(model, source, "test", kind)
    assert result.count == len(masses)
    torch.testing.assert_close(result.mass, torch.stack(masses).mean(dim=0), **CLOSE)
    torch.testing.assert_close(result.choice, torch.stack(choices).mean(dim=0), **CLOSE)
    assert result.chance == pytest.approx(sum(sizes) / len(sizes))
    assert result.chance_choice == pytest.approx(sum(rest) / len(rest))


@torch.no_grad()
def test_uniform_attention_is_at_chance():
    """Queries that are 0 look at everything alike."""
    model, source = build_vlm("gated"), small_scenes()
    for gate in model.gates:
        torch.nn.init.zeros_(gate.reading.query.weight)
    for kind in KINDS:
        result = pointing(model, source, "test", kind)
        torch.testing.assert_close(result.mass, torch.full((2, 2), result.chance), **CLOSE)
        torch.testing.assert_close(result.choice, torch.full((2, 2), result.chance_choice), **CLOSE)
        torch.testing.assert_close(result.picture, torch.ones(2, 2), **CLOSE)


def test_best_head_is_selected_on_validation_data(monkeypatch):
    values = {"val": [[0.1, 0.2], [0.9, 0.3]], "test": [[0.5, 0.8], [0.4, 0.7]]}

    def fake(model, source, split, kind):
        mass = torch.tensor(values[split])
        return part.PointingResult(mass, mass / 2, mass / 4, 0.125, 0.25, 3)

    monkeypatch.setattr(part, "pointing", fake)
    result = pointing_metrics(build_vlm("mlp"), small_scenes())
    assert result["pointing/color"] == pytest.approx(0.4)
    assert result["pointing_mean/color"] == pytest.approx(0.6)
    assert result["pointing_choice/shape"] == pytest.approx(0.2)
    assert (result["chance/shape"], result["chance_choice/shape"]) == (0.125, 0.25)


def test_labeled_words():
    source = small_scenes()
    for kind in KINDS:
        for index, position, region in labeled_words(source, "test", kind):
            words = [WORDS[source.test.inputs["text"][i, p]] for i, p in zip(index, position, strict=True)]
            assert set(words) <= set(part.KINDS[kind])
            assert region.any(dim=1).all()
            assert torch.equal(region, source.regions("test", index)[torch.arange(len(index)), position])


@pytest.mark.parametrize("kind", ["qformer", "resampler"])
def test_merged_patches_are_not_scored(kind):
    model = build_vlm(kind)
    with pytest.raises(ConfigError, match=rf"pointing: expected a connector that keeps .* patches, got '{kind}'\. Its"):
        pointing(model, small_scenes(), "test", "color")
    assert pointing_metrics(model, small_scenes()) == {}


def test_unknown_words_raise():
    with pytest.raises(ConfigError, match=r"pointing: expected a known kind of words, got 'colors'\. Did you mean"):
        pointing(build_vlm(), small_scenes(), "test", "colors")
