"""Attention whose keys are not placeholders: encoder-decoders, joint streams, sampling points, recurrences."""

import re
import warnings

import pytest
import torch

pytest.importorskip("transformers")

import transformers as hf

import equipoise as eq
from equipoise.recording.origin_codes import MIXED, QUERY, READER
from equipoise.recording.provenance import Provenance


@pytest.fixture(autouse=True)
def quiet_transformers():
    hf.logging.set_verbosity_error()
    with warnings.catch_warnings():
        for text in (".*_register_pytree_node.*", ".*deprecated.*", ".*meshgrid.*", ".*fast path.*"):
            warnings.filterwarnings("ignore", message=text)
        yield


def record_model(model, inputs):
    """Returns the record, and the warnings of ``watch``."""
    with torch.no_grad(), warnings.catch_warnings(record=True) as messages:
        warnings.simplefilter("always")
        with eq.watch(model.eval()) as record:
            model(**inputs)
    return record, [str(w.message) for w in messages if str(w.message).startswith("watch")]


def single_layer(record, layer):
    """Returns the only modality that a layer attends to."""
    share = record.share(layer)
    at = share[0, 0].argmax()
    assert float(share[..., at].min()) > 1 - 1e-5, layer
    return record.names[at]


@pytest.mark.parametrize("patches", [12, 9])
def test_pix2struct_patches_of_any_number(patches):
    vision = {"hidden_size": 16, "d_kv": 4, "d_ff": 20, "num_hidden_layers": 1, "num_attention_heads": 4,
              "patch_embed_hidden_size": 48}  # fmt: skip
    text = {"vocab_size": 97, "hidden_size": 16, "d_kv": 4, "d_ff": 20, "num_layers": 1, "num_heads": 4,
            "decoder_start_token_id": 0}  # fmt: skip
    model = hf.Pix2StructForConditionalGeneration(hf.Pix2StructConfig(text_config=text, vision_config=vision))
    flat = torch.cat([torch.ones(2, patches, 2), torch.randn(2, patches, 48)], dim=-1)
    record, messages = record_model(
        model, {"flattened_patches": flat, "decoder_input_ids": torch.randint(3, 80, (2, 9))}
    )
    assert not messages
    assert not record.missing
    assert single_layer(record, "encoder.encoder.layer.0.attention") == "image"
    assert single_layer(record, "decoder.layer.0.self_attention.attention") == "text"
    assert single_layer(record, "decoder.layer.0.encoder_decoder_attention.attention") == "image"
    assert "encoder.encoder.layer.0.attention" in record.unimodal_layers


@pytest.mark.parametrize("words", [9, 6])
def test_groundingdino_sampling_points_are_missing(words):
    bert = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
            "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0}  # fmt: skip
    swin = hf.SwinConfig(
        image_size=32, window_size=2, embed_dim=8, depths=[1, 1, 1], num_heads=[1, 1, 1],
        out_features=["stage2", "stage3"], out_indices=[2, 3],
    )  # fmt: skip
    config = hf.GroundingDinoConfig(
        backbone_config=swin, text_config=hf.BertConfig(**bert), d_model=32, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, num_queries=6,
        num_feature_levels=3, encoder_n_points=2, decoder_n_points=2, max_text_len=16,
    )  # fmt: skip
    ids = torch.randint(3, 80, (2, words))
    ids[:, 0] = 1
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(2, 3, 32, 32),
              "pixel_mask": torch.ones(2, 32, 32, dtype=torch.long)}  # fmt: skip
    record, messages = record_model(hf.GroundingDinoForObjectDetection(config), inputs)
    deformable = [
        *(f"model.encoder.layers.{n}.deformable_layer.self_attn" for n in (0, 1)),
        *(f"model.decoder.layers.{n}.encoder_attn" for n in (0, 1)),
    ]
    for layer in deformable:
        assert layer not in record.backends
        assert "not attention over tokens" in record.missing[layer]
    assert len(messages) == 1
    assert "not in the table" in messages[0]
    for number in (0, 1):
        # Images attend to words, and words attend to images, in one module.
        fusion = f"model.encoder.layers.{number}.fusion_layer.attn"
        assert (single_layer(record, fusion), single_layer(record, f"{fusion}#2")) == ("image", "text")
        assert single_layer(record, f"model.encoder.layers.{number}.text_enhancer_layer.self_attn") == "text"
        assert single_layer(record, f"model.decoder.layers.{number}.encoder_attn_text") == "text"
    windows = [layer for layer in record.unimodal_layers if "backbone" in layer and "text" not in layer]
    assert windows
    # Image windows are not samples.
    assert all(len(record.share(layer)) == 2 for layer in windows)


def test_missing_layers_are_reported_everywhere():
    pytest.importorskip("rich")
    from rich.console import Console

    config = hf.JambaConfig(
        vocab_size=97, hidden_size=16, intermediate_size=20, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, num_experts=2,
        use_mamba_kernels=False, mamba_d_state=4, mamba_dt_rank=4,
    )  # fmt: skip
    record, messages = record_model(hf.JambaForCausalLM(config), {"input_ids": torch.randint(3, 80, (2, 7))})
    assert list(record.missing) == ["model.layers.0.mamba"]
    reason = record.missing["model.layers.0.mamba"]
    assert reason.startswith("a layer without attention")
    assert messages == [f"watch: 'model.layers.0.mamba' is not in the table: {reason}."]
    table = record.table()
    console = Console(width=300)
    with console.capture() as captured:
        console.print(table)
    for text in (str(table), repr(table), captured.get(), re.sub("<[^>]*>", " ", table._repr_html_())):
        assert "not in the table:" in text
        assert "model.layers.0.mamba: a layer without attention" in text


def follow(function, **codes):
    """Returns the codes of the result of a function, given the codes of its arguments."""
    origin = Provenance()
    with origin.tracing():
        tensors = {name: torch.randn(2, *shape) for name, (shape, _) in codes.items()}
        for name, (_, code) in codes.items():
            if code:
                origin.mark(tensors[name], code)
        origin.active = True
        result = function(**tensors)
    return origin, result


def test_traced_codes_of_positions():
    words, picture = ((3, 4), 1), ((5, 4), 2)
    origin, joined = follow(lambda a, b: torch.cat([a, b], dim=1).relu(), a=words, b=picture)
    assert origin.codes_of(joined)[0, :, 0].tolist() == [1] * 3 + [2] * 5
    # A stream keeps its codes after cross-attention; the scores have the codes of the keys, also transposed.
    origin, scores = follow(lambda a, b: (a @ b.transpose(1, 2)).softmax(-1), a=words, b=picture)
    assert origin.codes_of(scores).unique().tolist() == [1]
    assert origin.keys_of_scores(scores).unique().tolist() == [2]
    origin, scores = follow(lambda a, b: (a @ b.transpose(1, 2)).transpose(1, 2).softmax(-1), a=words, b=picture)
    assert origin.keys_of_scores(scores).unique().tolist() == [1]
    origin, read = follow(lambda a, b: (a @ b.transpose(1, 2)).softmax(-1) @ b, a=words, b=picture)
    assert origin.codes_of(read).unique().tolist() == [1]
    # Weights of sampling points are not products of queries and keys.
    layer = torch.nn.Linear(4, 6)
    origin, points = follow(lambda a: layer(a).softmax(-1), a=words)
    assert origin.keys_of_scores(points) is None
    # A sum of values of two inputs has no code.
    origin, added = follow(lambda a, b: a + b.mean(dim=1, keepdim=True), a=words, b=picture)
    assert origin.codes_of(added).unique().tolist() == [MIXED]


def test_traced_codes_of_learned_queries():
    queries = torch.randn(2, 3, 4)

    def reads(*sources):
        result = queries
        for source in sources:
            result = result + torch.nn.functional.scaled_dot_product_attention(result, source, source)
        return result

    origin, result = follow(lambda b: reads(b), b=((5, 4), 2))
    assert origin.codes_of(result).unique().tolist() == [2 + QUERY]
    origin, result = follow(lambda a, b: reads(a, b), a=((5, 4), 1), b=((5, 4), 2))
    assert origin.codes_of(result).unique().tolist() == [READER]
    # Learned queries have the modality that they attended to when they join another stream.
    origin, result = follow(lambda a, b: torch.cat([reads(b), a], dim=1), a=((5, 4), 1), b=((5, 4), 2))
    assert origin.codes_of(result)[0, :, 0].tolist() == [2] * 3 + [1] * 5
