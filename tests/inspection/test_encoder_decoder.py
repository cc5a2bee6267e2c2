"""``look`` at encoder-decoders: Whisper, Moonshine, Pix2Struct and Florence-2 with random weights."""

import json

import numpy as np
import pytest
import soundfile
import torch

import equipoise as eq
from equipoise.cli import run
from equipoise.errors import ConfigError, DataError
from equipoise.report.look_html import look_page
from helpers.encoder_decoders import SOUND, build


@pytest.mark.parametrize("name", ["whisper", "moonshine", "pix2struct", "florence2"])
def test_families(name):
    model, processor, inputs = build(name)
    result = eq.look(model, processor, **inputs, max_new_tokens=4)
    target = "audio" if "audio" in inputs else "image"
    assert result.target == target
    # Florence-2 encodes the question together with the image.
    assert result.by_construction == (name != "florence2")
    assert all(0 < value < 1 for value in result.written)
    assert {f"{target} hidden", "text hidden", f"blank {target}"} <= {effect.change for effect in result.effects}
    for effect in result.effects:
        assert effect.log_likelihood - effect.difference == pytest.approx(result.log_likelihood, abs=1e-4)
    assert result.maps.mean.shape[-1] == len(result.tokens)
    assert np.allclose(result.maps.mean.float().sum(-1), 1, atol=2e-3)
    page = look_page(result.to_dict())
    assert ("by construction and says nothing" in page) == result.by_construction
    assert "Written by cross-attention" in page
    shares = [row["share"] for row in result.rows() if row["view"] == "answer"]
    assert len(shares) == 2 * 2 * 2
    # Columns without attention are not shown.
    assert ("text" in result.table()) == (name == "florence2")


def test_maps_are_attention_times_the_norm_of_values():
    model, processor, inputs = build("whisper")
    result = eq.look(model, processor, **inputs, max_new_tokens=4)
    features = processor.feature_extractor(SOUND, sampling_rate=16000, return_tensors="pt")["input_features"]
    ids = torch.tensor([[3, *[2, 2]]])
    attention = model.model.decoder.layers[1].encoder_attn
    values = []
    handle = attention.v_proj.register_forward_hook(lambda *args: values.append(args[2]))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model(input_features=features, decoder_input_ids=ids, output_attentions=True, use_cache=False)
    handle.remove()
    norms = values[0].view(1, 8, 2, 8).transpose(1, 2).norm(dim=-1)
    expected = output.cross_attentions[1][0, :, 0] * norms[0]
    expected = expected / expected.sum(dim=-1, keepdim=True)
    # The first query, the start of the decoder, is the prompt.
    assert torch.allclose(result.maps.by_head[1, 1, :, :8].float(), expected, atol=1e-3)


def test_prompt_and_answer():
    model, processor, inputs = build("pix2struct")
    one = eq.look(model, processor, **inputs, max_new_tokens=3)
    ids = torch.tensor([processor.tokenizer("a cat").input_ids])
    assert one.tokens[-3 - ids.shape[1] :][0].text == "a"
    again = eq.look(model, processor, **inputs, answer=" dog")
    assert again.given
    assert again.answer == "dog"


def test_several_images_raise():
    model, processor, inputs = build("pix2struct")
    with pytest.raises(ConfigError, match="one image for an encoder-decoder, got 2 images"):
        eq.look(model, processor, image=[inputs["image"]] * 2, text="")


@pytest.mark.parametrize("name", ["whisper", "florence2"])
def test_patterns_that_include_the_encoder_give_the_cross_attention(name):
    model, processor, inputs = build(name)
    plain, whole = (eq.look(model, processor, **inputs, answer="a cat sits", layers=layers) for layers in (None, "*"))
    assert whole.layers == plain.layers
    assert torch.equal(whole.maps.mean, plain.maps.mean)


def test_sound_as_tensor_without_text():
    model, processor, inputs = build("whisper")
    plain = eq.look(model, processor, **inputs, max_new_tokens=2)
    other = eq.look(model, processor, audio=torch.from_numpy(SOUND), max_new_tokens=2)
    assert other.log_likelihood == plain.log_likelihood
    with pytest.raises(ConfigError, match="a processor with a feature extractor for audio, got "):
        eq.look(model, processor.tokenizer, audio=SOUND)
    with pytest.raises(DataError, match="look audio: expected a sound, its path or its content, got list"):
        eq.look(model, processor, audio=[SOUND, SOUND])


@pytest.mark.slow
def test_compiled_model():
    model, processor, inputs = build("whisper")
    plain = eq.look(model, processor, **inputs, answer="a cat")
    other = eq.look(torch.compile(model, backend="eager"), processor, **inputs, answer="a cat")
    assert other.layers == plain.layers
    assert other.written == pytest.approx(plain.written, abs=1e-5)


def test_text_only_encoder_decoder_raises():
    from helpers.vlms import family

    model, _ = family("bart")
    with pytest.raises(ConfigError, match="encoder-decoder with an image or a sound"):
        eq.look(model, build("whisper")[1].tokenizer, text="a cat")


def test_command(tmp_path):
    model, processor, _ = build("moonshine")
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    soundfile.write(tmp_path / "a.wav", SOUND, 16000)
    code = run(["look", str(tmp_path / "model"), "--audio", str(tmp_path / "a.wav"), "--max_new_tokens", "3",
                "--out", str(tmp_path / "out")])  # fmt: skip
    assert code == 0
    content = json.loads((tmp_path / "out" / "look.json").read_text())
    assert content["by_construction"]
    assert len(content["written"]) == 2
    assert (tmp_path / "out" / "report.html").is_file()
