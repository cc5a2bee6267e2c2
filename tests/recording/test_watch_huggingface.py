"""``eq.watch`` on Hugging Face models, compared with the eager attention matrices of the same models."""

import copy
import warnings

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from torch import nn

import equipoise as eq
from equipoise.errors import ConfigError
from helpers.tolerance import TOL
from helpers.vlms import AUDIO, BERT, IMAGE, VIDEO, family, random_ids, random_images

NEAR = TOL[torch.float32]
JOINT = (
    "llava", "internvl", "gemma3", "paligemma", "idefics3", "smolvlm", "qwen2_vl", "qwen3_vl", "qwen2_vl_first",
    "qwen2_audio", "llava_next", "mistral3", "kosmos2", "voxtral", "gpt_oss", "gemma2", "llama",
)  # fmt: skip
"""Decoders of one sequence, whose token labels follow from the inputs."""
GENERATED = (
    *((name, "dynamic") for name in (
        "llava", "internvl", "gemma3", "qwen2_vl", "mistral3", "kosmos2", "voxtral", "gpt_oss", "gemma2",
    )),
    *((name, "static") for name in ("llava", "gemma3", "mistral3", "gpt_oss")),
    ("llava", "beams"), ("qwen2_vl", "beams"), ("gpt_oss", "sampled"), ("voxtral", "sampled"),
)  # fmt: skip


@pytest.fixture(autouse=True)
def ignore_warnings():
    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings():
        for text in (".*_register_pytree_node.*", ".*deprecated.*", ".*generation flags.*"):
            warnings.filterwarnings("ignore", message=text)
        yield


def labels_of(inputs, names):
    """Returns (batch, token) labels from the placeholders of the tests."""
    result = torch.full_like(inputs["input_ids"], names.index("text"))
    for token, name in ((IMAGE, "image"), (VIDEO, "video"), (AUDIO, "audio")):
        if name in names:
            result[inputs["input_ids"] == token] = names.index(name)
    if "image_embeds_position_mask" in inputs:
        result[inputs["image_embeds_position_mask"] == 1] = names.index("image")
    return result.masked_fill(inputs["attention_mask"] == 0, -1)


def expected_share(attention, labels, rows, count):
    """Computes the definition in loops over samples and modalities."""
    result = torch.zeros(*attention.shape[:2], count, dtype=torch.float64)
    for sample in range(len(attention)):
        mean = attention[sample, :, rows[sample]].double().mean(dim=1)
        for modality in range(count):
            result[sample, :, modality] = mean[:, labels[sample] == modality].sum(dim=-1)
    return result.float()


def eager_attention(model):
    result = copy.deepcopy(model)
    result.set_attn_implementation("eager")
    return result


def find_layer(layers, number):
    return next(layer for layer in layers if f".{number}." in layer and not layer.startswith("qformer"))


def logits(output):
    return output["logits"] if "logits" in output else output[0]


@pytest.mark.parametrize("name", JOINT)
def test_forward(name):
    model, inputs = family(name)
    with torch.no_grad():
        plain = model(**inputs)
        with eq.watch(model) as record, eq.watch(model, queries="last") as last:
            watched = model(**inputs)
        written = eager_attention(model)(**inputs, output_attentions=True).attentions
    assert torch.equal(logits(plain), logits(watched))
    labels, valid = labels_of(inputs, record.names), inputs["attention_mask"].bool()
    ends = torch.zeros_like(valid)
    ends[:, -1] = True
    for number, attention in enumerate(written):
        layer = find_layer(record.layers, number)
        torch.testing.assert_close(
            record.share(layer), expected_share(attention, labels, valid, len(record.names)), **NEAR
        )
        torch.testing.assert_close(
            last.share(layer), expected_share(attention, labels, ends, len(record.names)), **NEAR
        )
        everything = record.share(layer).sum(dim=-1) + record.special(layer) + record.sink(layer)
        torch.testing.assert_close(everything, torch.ones_like(everything), **NEAR)
    assert not record.missing
    if len(record.names) > 1:
        assert float(record.share(find_layer(record.layers, 1))[..., 0].std()) > 0.01
    if name == "gpt_oss":
        assert float(record.sink(record.layers[0]).min()) > 0
        assert record.special(record.layers[0]).abs().max() == 0


@pytest.mark.parametrize(("name", "cache"), GENERATED)
def test_generate(name, cache):
    model, inputs = family(name)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": cache == "sampled"}
    options |= {"static": {"cache_implementation": "static"}, "beams": {"num_beams": 2}}.get(cache, {})
    written = {"output_attentions": True, "return_dict_in_generate": True}
    torch.manual_seed(3)
    plain = model.generate(**inputs, **options)
    torch.manual_seed(3)
    with eq.watch(model, queries="last", tokens=True) as record:
        watched = model.generate(**inputs, **options)
    assert torch.equal(plain, watched)
    model.set_attn_implementation("eager")
    torch.manual_seed(3)
    result = model.generate(**inputs, **options, **written)
    steps, beams = result.attentions, getattr(result, "beam_indices", None)
    count = len(record.names)
    prompt = labels_of(inputs, record.names)
    labels = nn.functional.pad(prompt, (0, 4), value=record.names.index("text"))
    for number in range(2):
        total = 0
        for step, attention in enumerate(steps):
            length, keys = prompt.shape[1] + step, attention[number].shape[-1]
            here = nn.functional.pad(labels[:, :length], (0, max(keys - length, 0)), value=-1)[:, -keys:]
            rows = attention[number][:, :, -1:]
            # A returned sequence continues the beam that generated its token.
            rows = rows if beams is None else rows[beams[:, step].long()]
            total = total + expected_share(rows, here, torch.ones(len(labels), 1).bool(), count)
        layer = find_layer(record.layers, number)
        torch.testing.assert_close(record.share(layer), total / len(steps), **NEAR)
        tokens, places = record.tokens(layer), record.labels(layer)
        for modality in range(count):
            mass = (tokens * (places == modality)[:, None]).sum(dim=-1)
            torch.testing.assert_close(mass, record.share(layer)[..., modality], **NEAR)


@pytest.mark.parametrize("name", ["blip2", "instructblip"])
def test_learned_queries_then_a_language_model(name):
    model, inputs = family(name)
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    with eq.watch(model, queries="last") as record:
        model.generate(**inputs, **options)
    with torch.no_grad():
        prefill = eager_attention(model)(**inputs, output_attentions=True).language_model_outputs.attentions
        with eq.watch(model) as forward:
            model(**inputs)
    labels, valid = labels_of(inputs, ("text", "image")), inputs["attention_mask"].bool()
    layers = [layer for layer in forward.layers if "language_model" in layer]
    for layer, attention in zip(layers, prefill, strict=True):
        torch.testing.assert_close(forward.share(layer), expected_share(attention, labels, valid, 2), **NEAR)
        assert 0.01 < float(record.share(layer)[..., 1].mean()) < 0.99
    inside = [layer for layer in forward.layers if "qformer" in layer]
    if name == "blip2":
        assert not inside
        assert any("qformer" in layer for layer in forward.unimodal_layers)
    else:
        # The words of the question are in the same sequence as the learned queries.
        share = forward.share(inside[0])
        assert 0.05 < float(share[..., 0].mean()) < 0.95
        torch.testing.assert_close(share.sum(dim=-1), torch.ones_like(share[..., 0]), **NEAR)


@pytest.mark.parametrize("beams", [1, 2])
def test_encoder_decoder_with_a_joint_encoder(beams):
    model, inputs = family("florence2")
    labels, valid = labels_of(inputs, ("text", "image")), inputs["attention_mask"].bool()
    with torch.no_grad():
        with eq.watch(model) as record:
            model(**inputs)
        written = eager_attention(model)(**inputs, output_attentions=True)
    all_tokens = torch.ones(2, 7, dtype=torch.bool)
    for number in range(2):
        for part, attention, rows in (
            ("encoder.layers.{}.self_attn", written.encoder_attentions, valid),
            ("decoder.layers.{}.encoder_attn", written.cross_attentions, all_tokens),
        ):
            share = record.share(f"model.language_model.{part.format(number)}")
            torch.testing.assert_close(share, expected_share(attention[number], labels, rows, 2), **NEAR)
    del inputs["decoder_input_ids"]
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "num_beams": beams}
    with eq.watch(model, queries="last") as record:
        model.generate(**inputs, **options)
    steps = eager_attention(model).generate(**inputs, **options, output_attentions=True, return_dict_in_generate=True)
    came = steps.beam_indices.long().T if beams > 1 else torch.arange(2).expand(4, -1)
    total = sum(
        expected_share(step[1][rows, :, -1:], labels, torch.ones(2, 1).bool(), 2)
        for step, rows in zip(steps.cross_attentions, came, strict=True)
    )
    share = record.share("model.language_model.decoder.layers.1.encoder_attn")
    torch.testing.assert_close(share, total / len(steps.cross_attentions), **NEAR)


@pytest.mark.parametrize(("name", "cross", "other"), [
    ("whisper", "encoder_attn", 1), ("mllama", "cross_attn", 1), ("idefics", "cross_attn", 1),
    ("blip", "crossattention", 1), ("bart", "encoder_attn", 0), ("t5", "EncDecAttention", 0),
])  # fmt: skip
def test_cross_attention_to_another_stream(name, cross, other):
    model, inputs = family(name)
    with torch.no_grad():
        plain = model(**inputs)
        with eq.watch(model) as record:
            watched = model(**inputs)
    assert torch.equal(logits(plain), logits(watched))
    for layer in record.layers:
        share = record.share(layer).mean(dim=(0, 1))
        if cross in layer:
            assert share[other] == 1
        elif name != "mllama":
            torch.testing.assert_close(share[0], torch.tensor(1.0), **NEAR)
    inputs = {key: value for key, value in inputs.items() if key != "decoder_input_ids"}
    with eq.watch(model, queries="last") as record:
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert any(cross in layer for layer in record.layers)
    assert all(len(record.share(layer)) == 2 for layer in record.layers)


def test_two_tower_models():
    model, inputs = family("clip")
    with torch.no_grad(), eq.watch(model) as record:
        model(**inputs)
    assert sorted(record.layers) == sorted(record.unimodal_layers)
    for layer in record.layers:
        assert record.share(layer)[..., int("vision" in layer)].unique().tolist() == [1.0]
    with torch.no_grad(), eq.watch(model) as alone:
        model.get_text_features(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    assert all("text" in layer for layer in alone.layers)


PICTURE, WORDS = [1] * 5, [0] * 13


@pytest.mark.parametrize(("name", "labels", "layer", "first"), [
    ("git", PICTURE + WORDS, "git.encoder.layer.1.attention.self", 5),
    ("vilt", WORDS + PICTURE, "encoder.layer.1.attention.attention", 0),
    ("visual_bert", WORDS + PICTURE, "encoder.layer.1.attention.self", 0),
    ("flava", [-1, *PICTURE, *WORDS], "multimodal_model.encoder.layer.1.attention.attention", 6),
])  # fmt: skip
def test_sequences_assembled_by_the_model(name, labels, layer, first):
    model, inputs = family(name)
    with torch.no_grad():
        torch.manual_seed(0)
        with eq.watch(model) as followed:
            model(**inputs)
        torch.manual_seed(0)
        with eq.watch(model, modality=torch.tensor(labels), names=("text", "image")) as record:
            model(**inputs)
        torch.manual_seed(0)
        # Not all models return attentions; all apply dropout to them.
        attention, inside = [], model.get_submodule(layer).dropout
        hook = inside.register_forward_hook(lambda part, args, output: attention.append(args[0]))
        model(**inputs)
        hook.remove()
    rows = torch.ones(2, len(labels), dtype=torch.bool)
    rows[:, first : first + 13] = inputs["attention_mask"].bool()
    expected = expected_share(attention[0], torch.tensor([labels] * 2), rows, 2)
    torch.testing.assert_close(record.share(layer), expected, **NEAR)
    # Without labels, keys are traced from the inputs. ViLT's class token is a parameter: it belongs to no modality.
    inferred = [-1 if name == "vilt" and index == len(WORDS) else label for index, label in enumerate(labels)]
    torch.testing.assert_close(
        followed.share(layer), expected_share(attention[0], torch.tensor([inferred] * 2), rows, 2), **NEAR
    )


def test_generate_with_user_labeled_image_tokens():
    model, inputs = family("git")
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    with eq.watch(model, modality=torch.tensor(PICTURE + WORDS), names=("text", "image"), queries="last") as record:
        model.generate(**inputs, **options)
    steps = (
        eager_attention(model)
        .generate(**inputs, **options, output_attentions=True, return_dict_in_generate=True)
        .attentions
    )
    labels = torch.tensor([PICTURE + WORDS + [0] * 4] * 2)
    total = sum(
        expected_share(step[1][:, :, -1:], labels[:, : step[1].shape[-1]], torch.ones(2, 1).bool(), 2) for step in steps
    )
    torch.testing.assert_close(record.share("git.encoder.layer.1.attention.self"), total / 4, **NEAR)


def test_parallel_streams():
    model, inputs = family("lxmert")
    with torch.no_grad(), eq.watch(model, modality=torch.tensor(WORDS + PICTURE), names=("text", "image")) as record:
        model(**inputs)
    result = {layer: int(record.share(layer).mean(dim=(0, 1)).argmax()) for layer in record.layers}
    assert result == {
        "encoder.layer.0.attention.self": 0, "encoder.r_layers.0.attention.self": 1,
        "encoder.x_layers.0.visual_attention.att": 1, "encoder.x_layers.0.visual_attention.att#2": 0,
        "encoder.x_layers.0.lang_self_att.self": 0, "encoder.x_layers.0.visn_self_att.self": 1,
    }  # fmt: skip


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training(backend, checkpointing):
    model, inputs = family("llava")
    with torch.no_grad(), eq.watch(model, queries="answer") as still:
        model(**inputs, labels=inputs["input_ids"])
    model.set_attn_implementation(backend)
    for part in model.modules():
        if hasattr(part, "attention_dropout"):
            part.attention_dropout = 0.5
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()

    def step():
        torch.manual_seed(5)
        model.zero_grad()
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    plain = step()
    with eq.watch(model, queries="answer") as record:
        watched = step()
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))
    torch.testing.assert_close(record.share(record.layers[0]), still.share(still.layers[0]), **NEAR)
    assert all(record.share(layer).shape == (2, 4, 2) for layer in record.layers)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_half_precision(dtype, backend):
    model, inputs = family("gemma3")
    model.to(dtype).float()
    with torch.no_grad():
        with eq.watch(model) as single:
            model(**inputs)
        model.to(dtype).set_attn_implementation(backend)
        inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
        with eq.watch(model) as half:
            model(**inputs)
    for layer in single.layers:
        torch.testing.assert_close(half.share(layer), single.share(layer), **TOL[dtype])


def test_text_interleaved_images_and_video():
    model, _ = family("qwen2_vl")
    words = random_ids(0)
    with torch.no_grad(), eq.watch(model) as record:
        model(**words)
    assert record.share(record.layers[0]).unique().tolist() == [0.0, 1.0]
    assert record.share(record.layers[0])[..., 0].unique().tolist() == [1.0]
    both = random_ids(0, length=23)
    both["input_ids"][:, [3, 10, 16]] = 95
    both["input_ids"][:, 4:8] = both["input_ids"][:, 17:21] = IMAGE
    both["input_ids"][:, 11:15] = VIDEO
    types = (both["input_ids"] == IMAGE).long() + 2 * (both["input_ids"] == VIDEO)
    grid = [1, 4, 4]
    both |= {
        "pixel_values": random_images(64, 96), "image_grid_thw": torch.tensor([grid] * 4), "mm_token_type_ids": types,
        "pixel_values_videos": random_images(32, 96, seed=7), "video_grid_thw": torch.tensor([grid] * 2),
    }  # fmt: skip
    with torch.no_grad():
        with eq.watch(model) as record:
            model(**both)
        written = eager_attention(model)(**both, output_attentions=True).attentions
    assert record.names == ("text", "image", "video")
    expected = expected_share(written[1], labels_of(both, record.names), both["attention_mask"].bool(), 3)
    torch.testing.assert_close(record.share(record.layers[1]), expected, **NEAR)
    assert float(expected[..., 1:].mean(dim=(0, 1)).min()) > 0.05


@pytest.mark.parametrize("left", [True, False])
def test_last_query_of_padded_batches(left):
    model, inputs = family("llava")
    if not left:
        inputs["input_ids"], inputs["attention_mask"] = (
            torch.cat([part[:1], part[1:].roll(-2, dims=1)]) for part in (inputs["input_ids"], inputs["attention_mask"])
        )
    with torch.no_grad():
        with eq.watch(model, queries="last") as record:
            model(**inputs)
        written = eager_attention(model)(**inputs, output_attentions=True).attentions
    ends = torch.zeros(2, 13, dtype=torch.bool)
    ends[0, -1] = ends[1, -1 if left else -3] = True
    expected = expected_share(written[1], labels_of(inputs, record.names), ends, 2)
    torch.testing.assert_close(record.share(record.layers[1]), expected, **NEAR)


def test_custom_labels_and_input_embeddings():
    model, inputs = family("llava")
    labels = torch.tensor([0] * 4 + [1] * 3 + [-1] + [2] * 5)
    with torch.no_grad():
        with eq.watch(model, modality=labels, names=("question", "face", "context")) as record:
            model(**inputs)
        written = eager_attention(model)(**inputs, output_attentions=True).attentions
        valid = inputs["attention_mask"].bool()
        expected = expected_share(written[1], labels.expand(2, -1), valid, 3)
        torch.testing.assert_close(record.share(record.layers[1]), expected, **NEAR)
        vectors = model.get_input_embeddings()(inputs["input_ids"])
        message = "inputs are inputs_embeds without input_ids"
        with pytest.warns(UserWarning, match=message), eq.watch(model) as blind:
            model(inputs_embeds=vectors, attention_mask=inputs["attention_mask"])
        with pytest.raises(ConfigError, match="needed to distinguish images from text"):
            blind.table()
        message = "it has 13 keys, and modality is given for 14"
        with pytest.warns(UserWarning, match=message), eq.watch(model, modality=torch.zeros(14).long()) as wrong:
            model.generate(**inputs, max_new_tokens=3, do_sample=False)
        with pytest.raises(ConfigError, match=message):
            wrong.share(record.layers[0])


def test_encoder_segments_and_image_patches():
    for name, labels in (("roberta", [0] * 6 + [1] * 7), ("vit", [-1, 0, 0, 1, 1])):
        model, inputs = family(name)
        with torch.no_grad():
            with eq.watch(model, modality=torch.tensor(labels), names=("first", "second")) as record:
                model(**inputs)
            written = eager_attention(model)(**inputs, output_attentions=True).attentions
        valid = inputs.get("attention_mask", torch.ones(2, len(labels))).bool()
        expected = expected_share(written[1], torch.tensor([labels] * 2), valid, 2)
        torch.testing.assert_close(record.share(record.layers[1]), expected, **NEAR)


class JoinedModels(nn.Module):
    """Two Hugging Face encoders with custom attention over both."""

    def __init__(self):
        super().__init__()
        self.words, self.picture = family("roberta")[0], family("vit")[0].vit
        self.fusion = nn.MultiheadAttention(BERT["hidden_size"], 2, batch_first=True)

    def forward(self, input_ids, pixel_values):
        parts = self.words(input_ids=input_ids)[0], self.picture(pixel_values=pixel_values)[0]
        both = torch.cat(parts, dim=1)
        return self.fusion(both, both, both)[1]


def test_nested_models():
    model = JoinedModels().eval()
    inputs = {"input_ids": random_ids(0)["input_ids"].clamp(3), "pixel_values": random_images(2, 3, 8, 8)}
    with torch.no_grad(), eq.watch(model, modality=torch.tensor(WORDS + PICTURE), names=("text", "image")) as record:
        attention = model(**inputs)
    assert record.layers == ["fusion"]
    assert len(record.unimodal_layers) == 4
    torch.testing.assert_close(record.share("fusion").mean(dim=1)[:, 1], attention[:, :, 13:].sum(-1).mean(1), **NEAR)
    message = "'fusion', but the modality of its 18 keys is unknown"
    with torch.no_grad(), pytest.warns(UserWarning, match=message), eq.watch(model):
        model(**inputs)


def test_wrapped_and_adapted_models():
    peft = pytest.importorskip("peft")
    model, inputs = family("llava")
    with torch.no_grad(), eq.watch(model) as bare:
        model(**inputs)
    with torch.no_grad(), eq.watch(model) as base:
        model.model(**inputs)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2))
    with torch.no_grad(), eq.watch(adapted) as inside:
        adapted(**inputs)
    for one, two, three in zip(bare.layers, base.layers, inside.layers, strict=True):
        assert torch.equal(bare.share(one), base.share(two))
        assert torch.equal(bare.share(one), inside.share(three))
    with eq.watch(adapted, queries="last") as steps:
        adapted.generate(**inputs, max_new_tokens=3)
    assert len(steps.layers) == 2
    assert steps.share(steps.layers[0]).shape == (2, 4, 2)


def test_unknown_names():
    model, _ = family("llava")
    for options, message in (
        ({"queries": "imag"}, "watch queries: expected a known word or modality, got 'imag'. Did you mean 'image'"),
        ({"names": ("text", "imag")}, "watch names: expected a known modality of Llava.*'imag'. Did you mean 'image'"),
        (
            {"layers": "*.self_atn"},
            r"a known module for layers, got '\*.self_atn'. Did you mean 'self_attn'",
        ),
    ):
        with pytest.raises(ConfigError, match=message), eq.watch(model, **options):
            pytest.fail("watched")


def test_existing_cache():
    model, inputs = family("llava")
    with torch.no_grad():
        first = model(**inputs, use_cache=True)
        cache = first.get("cache", first.get("past_key_values"))
        more = torch.full((2, 3), 5)
        message = "its cache contains 13 earlier tokens of unknown modality"
        with pytest.warns(UserWarning, match=message), eq.watch(model):
            model(input_ids=more, past_key_values=cache, attention_mask=torch.ones(2, 16))
