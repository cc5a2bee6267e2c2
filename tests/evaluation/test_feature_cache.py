"""``FeatureCache``: encoder outputs are reused only where they are equal."""

import pytest
import torch

from equipoise.evaluation.questions.feature_cache import FeatureCache
from helpers.vlms import family


@pytest.fixture
def counted():
    """A model, its inputs, and a list that grows with each pass of its image encoder."""
    model, inputs = family("llava")
    passes = []
    model.model.vision_tower.register_forward_hook(lambda *_: passes.append(1))
    return model.eval(), inputs, passes


@torch.no_grad()
def test_equal_media_are_encoded_once(counted):
    model, inputs, passes = counted
    expected = model(**inputs).logits
    passes.clear()
    cache = FeatureCache(model)
    with cache.open():
        model(**inputs)
        for _ in range(3):
            with cache.reused("hidden"):
                assert torch.equal(model(**inputs).logits, expected)
        # The first pass and the one that checks the condition.
        assert len(passes) == 2
        with cache.reused("hidden"):
            other = {**inputs, "pixel_values": inputs["pixel_values"].clone()}
            other["pixel_values"][0, 0, 0, 0] += 1
            assert not torch.equal(model(**other).logits, expected)
        assert len(passes) == 3
        model(**inputs)
        assert len(passes) == 4
    assert "get_image_features" not in vars(model.model)


@torch.no_grad()
def test_outputs_that_a_condition_changes_are_not_reused(counted):
    model, inputs, passes = counted
    cache = FeatureCache(model)
    with cache.open():
        model(**inputs)
        with cache.reused("hidden"):
            handle = model.model.vision_tower.register_forward_pre_hook(lambda _, args: (args[0] + 1, *args[1:]))
            changed = model(**inputs).logits
            assert torch.equal(model(**inputs).logits, changed)
            handle.remove()
    assert len(passes) == 3


@torch.no_grad()
def test_outputs_changed_in_place_are_not_reused(counted):
    model, inputs, passes = counted
    cache = FeatureCache(model)
    expected = model(**inputs).logits
    with cache.open(), cache.reused("hidden"):
        for _ in range(2):
            model(**inputs)
        count = len(passes)
        cache._kept[0].output.pooler_output[0].zero_()
        assert torch.equal(model(**inputs).logits, expected)
        assert len(passes) == count + 1


@torch.no_grad()
def test_arguments_changed_in_place_are_encoded_again(counted):
    model, inputs, _ = counted
    cache = FeatureCache(model)
    with cache.open(), cache.reused("hidden"):
        for _ in range(2):
            model(**inputs)
        inputs["pixel_values"].mul_(0.5)
        logits = model(**inputs).logits
    assert torch.equal(logits, model(**inputs).logits)


@torch.no_grad()
def test_outputs_of_a_condition_that_changes_them_are_not_kept(counted):
    model, inputs, _ = counted
    cache = FeatureCache(model)
    second = {**inputs, "pixel_values": inputs["pixel_values"] + 1}
    expected = model(**second).logits
    with cache.open():
        for _ in range(2):
            with cache.reused("blank"):
                model(**inputs)
        with cache.reused("hidden"):
            handle = model.model.vision_tower.register_forward_pre_hook(lambda _, args: (args[0] * 2, *args[1:]))
            for one in (inputs, second):
                model(**one)
            handle.remove()
        with cache.reused("blank"):
            assert torch.equal(model(**second).logits, expected)


def test_inference_mode_reuses_nothing(counted):
    model, inputs, passes = counted
    cache = FeatureCache(model)
    with torch.inference_mode(), cache.open(), cache.reused("hidden"):
        for _ in range(3):
            model(**inputs)
    assert len(passes) == 3
