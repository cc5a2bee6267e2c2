"""``eq.look``: shares, maps and effects against explicit attention, in models of many families; user errors."""

import base64
import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from equipoise.errors import ConfigError, DataError
from equipoise.inspection import look
from equipoise.inspection.patch_layout import patch_grid
from equipoise.inspection.prompt_inputs import complete_inputs, token_words
from helpers.look import CHAT, IMAGE, QUESTION, WORDS, build_llama, build_llava, build_processor, tokenizer, wide_image
from helpers.tolerance import TOL
from helpers.vlms import family

TOP = 2


@pytest.fixture(scope="module")
def model():
    return build_llava()


@pytest.fixture(scope="module")
def inspection(model):
    return look(model, build_processor(), image=wide_image(), text=QUESTION, max_new_tokens=5, exclude_top_k=TOP)


@pytest.fixture(scope="module")
def explicit_attention(model, inspection):
    """Returns the (head, query, key) attention of each layer for prompt and answer with eager attention, and the
    logits.
    """
    inputs = build_processor()(images=wide_image(), text=inspection.prompt, return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    ids = torch.tensor([[WORDS.index(token.text) for token in inspection.tokens]])
    assert ids[0, :length].tolist() == inputs["input_ids"][0].tolist()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model(input_ids=ids, pixel_values=inputs["pixel_values"], output_attentions=True)
    model.set_attn_implementation("sdpa")
    return [a[0].double() for a in output.attentions], output.logits[0].double(), ids[0].tolist(), length


def query_positions(part, length, total):
    return list(range(length)) if part == "prompt" else list(range(length - 1, total - 1))


def assert_close(result, expected):
    torch.testing.assert_close(
        torch.as_tensor(result).double(), torch.as_tensor(expected).double(), **TOL[torch.float32]
    )


@pytest.mark.parametrize("part", ["prompt", "answer"])
def test_shares_are_sums_of_the_matrix(inspection, explicit_attention, part):
    attentions, _, ids, length = explicit_attention
    rows, view = query_positions(part, length, len(ids)), inspection.views[part]
    kinds = [1 if token == IMAGE else 0 for token in ids]
    assert inspection.names == ("text", "image")
    for layer, attention in enumerate(attentions):
        per_key = [attention[:, rows, j].mean(dim=1) for j in range(len(ids))]
        average = torch.stack(per_key).mean(dim=1)
        top = sorted(range(len(ids)), key=lambda j: -float(average[j]))[:TOP]
        for m in range(2):
            mine = [j for j, kind in enumerate(kinds) if kind == m]
            assert_close(view.share[layer, :, m], sum(per_key[j] for j in mine))
            rest = sum(per_key[j] for j in mine if j not in top)
            assert_close(
                view.without_sinks[layer, :, m], rest / sum(per_key[j] for j in range(len(ids)) if j not in top)
            )
            even = [sum(kinds[j] == m for j in range(i + 1)) / (i + 1) for i in rows]
            assert_close(view.uniform[layer, m], sum(even) / len(even))


def test_sinks_are_the_most_attended_tokens_over_all_layers(inspection, explicit_attention):
    attentions, _, ids, length = explicit_attention
    rows = query_positions("answer", length, len(ids))
    mean = sum(attention[:, rows].mean(dim=(0, 1)) for attention in attentions) / len(attentions)
    best = sorted(range(len(ids)), key=lambda j: -float(mean[j]))[:TOP]
    assert [sink.place for sink in inspection.views["answer"].sinks] == best
    assert_close([sink.attention for sink in inspection.views["answer"].sinks], mean[best])
    assert [sink.text for sink in inspection.views["answer"].sinks] == [WORDS[ids[j]] for j in best]


def test_maps_are_rows_of_the_matrix(inspection, explicit_attention):
    attentions, _, ids, length = explicit_attention
    maps = inspection.maps
    assert [reader.text for reader in maps.readers[:2]] == ["the whole answer", "the whole prompt"]
    words_only = [index for index, token in enumerate(ids) if token != IMAGE]
    assert [reader.place for reader in maps.readers[2:]] == words_only
    assert maps.left_out == 0
    for number, reader in enumerate(maps.readers):
        # A token of the answer is predicted at the position before it.
        rows = query_positions(reader.part, length, len(ids)) if reader.place is None else [
            reader.place - (reader.place >= length)
        ]  # fmt: skip
        for layer, attention in enumerate(attentions):
            half = {"rtol": TOL[torch.float16]["rtol"], "atol": TOL[torch.float32]["atol"]}
            expected = attention[:, rows].mean(dim=1)
            torch.testing.assert_close(maps.by_head[number, layer].double(), expected, **half)
            torch.testing.assert_close(maps.mean[number, layer].double(), expected.mean(dim=0), **half)


def test_maps_survive_the_json_round_trip(inspection):
    for name in ("mean", "by_head"):
        packed = json.loads(json.dumps(inspection.to_dict()))["maps"][name]
        values = np.frombuffer(base64.b64decode(packed["float16"]), dtype="<f2").reshape(packed["shape"])
        assert np.array_equal(values, getattr(inspection.maps, name).numpy())


def mean_log_likelihood(logits, ids, length):
    each = [logits[index - 1].log_softmax(dim=0)[ids[index]] for index in range(length, len(ids))]
    return float(sum(each) / len(each))


def test_effects_are_changes_of_the_mean_log_likelihood(model, inspection, explicit_attention):
    _, logits, ids, length = explicit_attention
    assert inspection.log_likelihood == pytest.approx(mean_log_likelihood(logits, ids, length), **tolerance())
    color = tuple(int(np.round(part)) for part in np.asarray(wide_image()).reshape(-1, 3).mean(axis=0))
    blank = build_processor()(images=Image.new("RGB", (26, 18), color), text=inspection.prompt, return_tensors="pt")
    with torch.no_grad():
        without = model(input_ids=torch.tensor([ids]), pixel_values=blank["pixel_values"]).logits[0].double()
    effects = {effect.change: effect for effect in inspection.effects}
    assert {"text hidden", "image hidden", "QUAG avg-image", "blank image"} <= set(effects)
    assert effects["blank image"].log_likelihood == pytest.approx(
        mean_log_likelihood(without, ids, length), **tolerance()
    )
    for effect in inspection.effects:
        assert effect.difference == pytest.approx(effect.log_likelihood - inspection.log_likelihood, **tolerance())
    assert abs(effects["image hidden"].difference) > 100 * TOL[torch.float32]["atol"]


def tolerance():
    return {"rel": TOL[torch.float32]["rtol"], "abs": TOL[torch.float32]["atol"]}


def test_provided_answer_equals_generated_answer(model, inspection):
    again = look(
        model, build_processor(), image=wide_image(), text=QUESTION, answer=inspection.answer, exclude_top_k=TOP
    )
    assert (inspection.given, again.given, again.answer) == (False, True, inspection.answer)
    assert [token.text for token in again.tokens] == [token.text for token in inspection.tokens]
    assert again.log_likelihood == inspection.log_likelihood
    assert torch.equal(again.views["answer"].share, inspection.views["answer"].share)


def test_rows_table_and_file_agree(inspection, tmp_path):
    rows = inspection.rows()
    assert len(rows) == 2 * 3 * 4 * 2
    row = next(r for r in rows if (r["view"], r["layer"], r["head"], r["modality"]) == ("answer", 2, 3, "image"))
    view = inspection.views["answer"]
    assert row["share"] == float(view.share[2, 3, 1])
    assert (row["share_without_sinks"], row["uniform"]) == (
        float(view.without_sinks[2, 3, 1]),
        float(view.uniform[2, 1]),
    )
    assert row["name"] == "model.language_model.layers.2.self_attn"
    lines = inspection.table().splitlines()
    assert row["aei"] == pytest.approx(row["share"] / row["uniform"])
    assert inspection._repr_html_().startswith("<pre>") and inspection.answer in inspection._repr_html_()  # noqa: PT018
    assert lines[0].split() == ["prompt", "answer", "without", "sinks"]
    assert lines[1].split() == ["layer", *["text", "image"] * 3]
    assert f"{100 * float(view.share[1, :, 1].mean()):.1f} %" in lines[3]
    assert lines[-1].split()[0] == "mean"
    path = inspection.save(tmp_path)
    assert path == tmp_path / "look.json"
    assert json.loads(path.read_text()) == json.loads(json.dumps(inspection.to_dict()))
    assert list(tmp_path.iterdir()) == [path]


def test_cropped_image_area_is_reported(inspection):
    assert inspection.grid[:3] == (3, 3, True)
    assert inspection.frame == pytest.approx(((26 - 18) / 2 / 26, 0, (26 + 18) / 2 / 26, 1))
    assert Image.open(io.BytesIO(inspection.image)).size == (26, 18)


def test_several_images_have_one_map_each(model, tmp_path):
    images = [wide_image(), wide_image(20, 20)]
    result = look(model, build_processor(), image=images, text=QUESTION, max_new_tokens=2)
    assert [scene.grid[:3] for scene in result.scenes] == [(3, 3, True)] * 2
    places = [place for scene in result.scenes for place in scene.places]
    assert places == [n for n, token in enumerate(result.tokens) if token.modality == "image"]
    assert result.scenes[0].frame != result.scenes[1].frame == (0.0, 0.0, 1.0, 1.0)
    assert len(result.to_dict()["scenes"]) == 2
    blank = next(effect for effect in result.effects if effect.change == "blank image")
    assert blank.difference != 0
    assert result.report(tmp_path / "page.html").read_text().count("<canvas") == 2
    single = look(model, build_processor(), image=images[:1], text=QUESTION, max_new_tokens=2)
    assert single.scenes == ()
    assert single.image is not None


def test_selected_layers_only(model):
    some = look(model, build_processor(), image=wide_image(), text=QUESTION, answer="cat", layers="*layers.1.*")
    assert some.layers == ("model.language_model.layers.1.self_attn",)
    assert some.maps.layers == (0,)
    assert len(some.views["answer"].share) == 1


def test_the_chat_template_is_used_unless_the_text_has_a_placeholder(model):
    result = build_processor(chat_template=CHAT)
    asked = look(model, result, image=wide_image(), text=QUESTION, answer="cat")
    assert asked.prompt == f"USER : <image> {QUESTION} ASSISTANT :"
    own = look(model, result, image=wide_image(), text="cat <image> dog", answer="cat")
    assert own.prompt == "cat <image> dog"
    assert [token.modality for token in own.tokens] == ["text", *["image"] * 9, "text", "text"]


def test_text_only_model(tmp_path):
    alone = look(build_llama(), tokenizer(), text=QUESTION, answer="a cat")
    assert (alone.target, alone.grid, alone.image, alone.names) == (None, None, None, ("text",))
    assert torch.allclose(alone.views["answer"].share, torch.ones(2, 4, 1), **TOL[torch.float32])
    assert [effect.change for effect in alone.effects if effect.change.startswith("blank")] == []
    assert alone.report(tmp_path / "a.html").read_text().count("The input contains text only") == 1


def hooks(model):
    """Returns the number of hooks; transformers registers some itself."""
    return [(len(part._forward_hooks), len(part._forward_pre_hooks)) for part in model.modules()]


def test_model_is_not_changed(model):
    torch.manual_seed(3)
    model.train()
    before, modes = torch.get_rng_state(), [part.training for part in model.modules()]
    steps, held = [], hooks(model)
    look(model, build_processor(), image=wide_image(), text=QUESTION, max_new_tokens=2, progress=steps.append)
    assert torch.equal(torch.get_rng_state(), before)
    assert [part.training for part in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert hooks(model) == held
    assert len(steps) == 4
    model.eval()


class FixedProcessor:
    """A processor that always returns the first sample of the inputs of a family."""

    image_token, audio_token, chat_template = "<image>", "<audio>", None
    feature_extractor = type("Rate", (), {"sampling_rate": 8000})

    def __init__(self, inputs):
        self.inputs = {n: v[:1] if v.shape[0] == 2 else v[: v.shape[0] // 2] for n, v in inputs.items()}

    def __call__(self, text, return_tensors, **given):
        self.inputs["attention_mask"] = torch.ones_like(self.inputs["input_ids"])
        return dict(self.inputs)

    def convert_ids_to_tokens(self, number):
        return f"w{number}"

    def decode(self, ids, **options):
        return " ".join(f"w{number}" for number in np.atleast_1d(ids).tolist())


@pytest.mark.parametrize(
    "name",
    [
        "llava",
        "idefics3",
        "qwen3_vl",
        "blip2",
        "qwen2_audio",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("internvl", "gemma3", "paligemma", "smolvlm", "qwen2_vl")
        ),
    ],
)
def test_families(name, tmp_path):
    model, inputs = family(name)
    if name == "paligemma":
        inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    result = FixedProcessor(inputs)
    kind = "audio" if name == "qwen2_audio" else "image"
    media = {"audio": np.zeros(8, dtype=np.float32)} if kind == "audio" else {"image": wide_image()}
    actual = look(model, result, **media, text=QUESTION, max_new_tokens=3)
    assert actual.target == kind
    count = sum(token.modality == kind for token in actual.tokens)
    # The tokens of BLIP-2 are queries over the whole image.
    row = kind == "audio" or name == "blip2"
    assert (actual.grid.rows, actual.grid.columns) == ((1, 1) if count == 1 else (1, 4) if row else (2, 2))
    assert actual.grid.known == (name != "blip2")
    for view in actual.views.values():
        assert_close(view.share.sum(dim=-1), torch.ones(view.share.shape[:-1]))
        assert_close(view.uniform.sum(dim=-1), torch.ones(len(view.uniform)))
    assert f"goes to the {kind}" in actual.report(tmp_path / "page.html").read_text()
    # The answer does not change the attention of the tokens before it.
    answer = torch.tensor([[7, 8, 9]])
    short, long = (model(**given, use_cache=False).logits for given in (
        result(None, "pt"), complete_inputs(result(None, "pt"), answer, model.config.model_type)
    ))  # fmt: skip
    assert_close(long[:, : short.shape[1]], short)


def test_cross_attention_layers_have_shares_but_no_maps(tmp_path):
    model, inputs = family("mllama")
    result = look(model, FixedProcessor(inputs), image=wide_image(), text=QUESTION, max_new_tokens=2)
    assert [site.split(".")[-1] for site in result.layers] == ["self_attn", "cross_attn"]
    assert_close(result.views["answer"].share[1], torch.tensor([0.0, 1.0]).expand(4, -1))
    assert result.maps.layers == (0,)
    assert result.notes == ("1 of 2 layers attend to another sequence than the text; the maps omit them.",)
    assert result.grid.why == "one token"
    assert result.notes[0] in result.report(tmp_path / "page.html").read_text()


def test_grids():
    assert patch_grid(6, {"image_grid_thw": torch.tensor([[1, 4, 6]])}, None)[:3] == (2, 3, True)
    merged = type("Config", (), {"vision_config": type("Vision", (), {"spatial_merge_size": 2})})
    assert patch_grid(15, {"image_grid_thw": torch.tensor([[1, 6, 10]])}, merged)[:3] == (3, 5, True)
    # A grid that does not match the number of tokens is ignored.
    assert patch_grid(7, {"image_grid_thw": torch.tensor([[1, 6, 10]])}, merged)[:3] == (1, 7, False)
    assert "not a square number" in patch_grid(7, {}, None).why
    # Square numbers of learned queries, and of tokens of several tiles, are no grid of the image.
    queries = patch_grid(9, {}, SimpleNamespace(perceiver_config={}))
    assert queries[:3] == (1, 9, False)
    assert "learned query over the whole image (perceiver_config)" in queries.why
    tiles = patch_grid(16, {"pixel_values": torch.ones(1, 4, 3, 8, 8)}, None)
    assert tiles[:3] == (1, 16, False)
    assert tiles.why.startswith("4 tiles")
    # Tiles of zeros fill up a batch.
    assert patch_grid(
        16, {"pixel_values": torch.cat([torch.ones(1, 1, 3, 8, 8), torch.zeros(1, 3, 3, 8, 8)], 1)}, None
    ).known


def test_tokens_keep_their_leading_space():
    class Pieces:
        def convert_ids_to_tokens(self, number):
            return ["\u2581mat", "s", "\u0120on", "<0xE2>"][number]

        def decode(self, ids):
            return ["mat", "s", " on", "\N{REPLACEMENT CHARACTER}"][ids[0]]

    assert token_words(Pieces(), torch.arange(4)) == [" mat", "s", " on", "<0xE2>"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"look: expected an input in addition to the text, since LlavaForConditionalGeneration takes text and "
             r"image, got text only. Give image=..., or --image FILE."),
        ({"image": []}, "look: expected an input in addition to the text"),
        ({"audio": np.zeros(8)}, "expected inputs of LlavaForConditionalGeneration: text and image, got audio"),
        ({"image": wide_image(), "text": "  "}, "expected a text, such as a question about the image, got none"),
        ({"image": wide_image(), "answer": " "}, "look answer: expected text of at least one token without "
                                                 "placeholders"),
        ({"image": wide_image(), "answer": "cat <image>"}, "look answer: expected text of at least one token without "
                                                           "placeholders"),
        ({"image": wide_image(), "max_new_tokens": 0}, "expected max_new_tokens >= 1 and exclude_top_k >= 0"),
        ({"image": wide_image(), "layers": "*nowhere*"}, r"expected a known module for layers, got '\*nowhere\*'"),
    ],
)  # fmt: skip
def test_mismatched_inputs_raise(model, options, message):
    with pytest.raises(ConfigError, match=message):
        look(model, build_processor(), **{"text": QUESTION, **options})


def test_image_for_a_text_model_raises():
    with pytest.raises(ConfigError, match=r"expected inputs of LlamaForCausalLM: text, got image\. Omit image"):
        look(build_llama(), tokenizer(), image=wide_image(), text=QUESTION)


@pytest.mark.parametrize("wrong", [np.zeros((4, 4, 3)), [None], [[wide_image()]]])
def test_image_of_another_type_raises(model, wrong):
    with pytest.raises(DataError, match="look image: expected an image, its path or its content, got "):
        look(model, build_processor(), image=wrong, text=QUESTION)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "look image '.*cat.png': expected an image, got no such file"),
        (b"no picture", "look image '.*': expected an image, as PNG, JPEG or WebP, got a file of another kind"),
        ("cut", "expected a complete image, as PNG, JPEG or WebP.* Is the file truncated"),
    ],
)
def test_unreadable_image_raises(model, content, message, tmp_path):
    path = tmp_path / "cat.png"
    if content == "cut":
        wide_image(200, 100).save(path)
        content = path.read_bytes()[:300]
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        look(model, build_processor(), image=path, text=QUESTION)


def test_audio_is_resampled_to_the_rate_of_the_model(tmp_path):
    import soundfile

    from equipoise.data.media_files import read_audio

    wave = np.sin(2 * np.pi * 100 * np.arange(4000) / 8000)
    soundfile.write(tmp_path / "a.wav", np.stack([wave, wave], axis=1), 8000)
    result = read_audio(tmp_path / "a.wav", 16000)
    assert (result.shape, result.dtype) == ((8000,), np.float32)
    middle = np.sin(2 * np.pi * 100 * np.arange(8000) / 16000)[1000:-1000]
    assert np.abs(result[1000:-1000] - middle).max() < TOL[torch.bfloat16]["atol"]
    (tmp_path / "b.wav").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"audio '.*b\.wav': expected a sound, as WAV or FLAC"):
        read_audio(tmp_path / "b.wav", 16000)
