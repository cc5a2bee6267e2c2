"""Hugging Face models as encoders: mask, frozen, LoRA, in a fusion model."""

import sys

import pytest
import torch
import transformers
from torch import nn

import equipoise as eq
from equipoise.errors import ConfigError, MissingExtraError, ShapeError
from helpers.tolerance import TOL

SMALL = {"hidden_size": 12, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 48}


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def build_bert(**options):
    torch.manual_seed(0)
    result = transformers.BertModel(transformers.BertConfig(vocab_size=13, **SMALL, **options))
    with torch.no_grad():
        for parameter in result.parameters():
            # Parameters of exactly 0 and 1 would hide errors.
            parameter += 0.1 * torch.randn_like(parameter)
    return result


IDS = torch.tensor([[1, 5, 7, 2], [1, 6, 2, 0], [0, 0, 0, 0]])
TEXT = {"input_ids": IDS, "attention_mask": (IDS > 0).long()}


def test_backbone_returns_its_attention_mask(tmp_path):
    build_bert().save_pretrained(tmp_path)
    encoder = eq.encoders.Backbone(str(tmp_path), dim=7, cls=True).eval()
    tokens = encoder(TEXT)
    assert torch.equal(tokens.mask, IDS > 0)
    assert torch.equal(tokens.pooled()[:2], tokens.values[:2, 0])
    assert bool(tokens.values.isfinite().all())
    assert not bool(tokens.pooled()[2].any())
    shorter = encoder({"input_ids": IDS[1:2, :3]}).values
    torch.testing.assert_close(tokens.values[1:2, :3], shorter, **TOL[torch.float32])
    named = encoder(IDS, mask=IDS > 0)
    assert torch.equal(named.values, tokens.values)
    both = encoder({**TEXT, "attention_mask": torch.ones_like(IDS)}, mask=IDS > 0)
    assert torch.equal(both.values, tokens.values)
    assert encoder(IDS).mask is None


def test_backbone_gets_no_gradient_from_missing_text():
    torch.manual_seed(0)
    encoders = {"text": eq.encoders.Backbone(build_bert(), dim=8), "image": nn.Linear(5, 8)}
    model = eq.FusionModel(encoders, eq.fusion.JointAttention(8, dropout=0.0), 2, unimodal="train").eval()
    batch = {"text": dict(TEXT), "image": normal(4, 3, 2, 5)}
    output = model(batch)
    assert not bool(output.share[2, :, 0].any())
    model.loss(output.logits, torch.tensor([0, 1, 1])).backward()
    # Token 0 occurs only in the empty text.
    gradient = encoders["text"].model.embeddings.word_embeddings.weight.grad
    assert float(gradient[0].abs().max()) == 0.0
    assert float(gradient[5].abs().max()) > 0.0


def test_frozen():
    encoder = eq.encoders.Backbone(build_bert(), frozen=True, dim=7)
    model = nn.ModuleList([encoder]).train()
    assert encoder.training
    assert not any(part.training for part in encoder.model.modules())
    values = encoder(TEXT).values
    assert torch.equal(values, encoder(TEXT).values)
    values.square().mean().backward()
    learns = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert learns == {"0.project.weight", "0.project.bias"}
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == learns


def test_lora_trains_only_its_matrices():
    plain = eq.encoders.Backbone(build_bert(attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0))
    encoder = eq.encoders.Backbone(build_bert(attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0), lora=2)
    torch.testing.assert_close(encoder(TEXT).values, plain(TEXT).values, **TOL[torch.float32])
    trained = {name for name, parameter in encoder.named_parameters() if parameter.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    # Six linear layers in each of three blocks, and the pooler; two matrices each.
    assert len(trained) == 2 * (3 * 6 + 1)
    assert encoder.model.encoder.layer[0].attention.self.query.lora_A.default.weight.shape == (2, 12)


def test_audio_has_fewer_tokens_than_samples():
    config = transformers.Wav2Vec2Config(
        conv_dim=[8, 8], conv_stride=[3, 2], conv_kernel=[5, 3], num_feat_extract_layers=2, vocab_size=5,
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, feat_extract_norm="layer", **SMALL,
    )  # fmt: skip
    torch.manual_seed(0)
    encoder = eq.encoders.Backbone(transformers.Wav2Vec2Model(config), dim=7).eval()
    sound, mask = normal(5, 3, 101), torch.arange(101) < torch.tensor([101, 47, 0])[:, None]
    tokens = encoder({"input_values": sound, "attention_mask": mask.long()})
    # (101 - 5) // 3 + 1 = 33, (33 - 3) // 2 + 1 = 16; of 47 samples (47 - 5) // 3 + 1 = 15, 7.
    assert tokens.mask.sum(dim=1).tolist() == [16, 7, 0]
    assert tokens.values.shape == (3, 16, 7)


def build_resnet():
    config = transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4, 6], depths=[1, 1], layer_type="basic")
    return transformers.ResNetModel(config)


def test_images_and_encoder_decoders():
    vit = transformers.ViTModel(transformers.ViTConfig(image_size=8, patch_size=4, **SMALL))
    assert eq.encoders.Backbone(vit, cls=True)(torch.zeros(2, 3, 8, 8)).values.shape == (2, 5, 12)
    stages, pixels = build_resnet().eval(), normal(6, 2, 3, 16, 24)
    values = eq.encoders.Backbone(stages)(pixels).values
    assert values.shape == (2, 2 * 3, 6)
    torch.testing.assert_close(values[1, 4], stages(pixels).last_hidden_state[1, :, 1, 1], **TOL[torch.float32])
    t5 = transformers.T5Model(
        transformers.T5Config(vocab_size=13, d_model=12, d_kv=4, d_ff=8, num_layers=1, num_heads=3)
    )
    encoder = eq.encoders.Backbone(t5)
    assert encoder(TEXT).values.shape == (3, 4, 12)
    assert not any("decoder" in name for name, _ in encoder.named_parameters())


def test_model_without_single_width():
    class Odd(nn.Module):
        config = transformers.PreTrainedConfig()

    with pytest.raises(
        ConfigError, match=r"a model of one modality.* got Odd\. .*pass one encoder, such as CLIPVision"
    ):
        eq.encoders.Backbone(Odd())


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (
            lambda: eq.encoders.Backbone(build_bert(), frozen=True, lora=2),
            ConfigError,
            "frozen=True or a LoRA rank, got both, lora = 2",
        ),
        (
            lambda: eq.encoders.Backbone(build_bert(), lora=0),
            ConfigError,
            "expected a LoRA rank of 1 or more, got lora = 0",
        ),
        (
            lambda: eq.encoders.Backbone(torch.nn.Linear(3, 5)),
            ConfigError,
            "a model of transformers, got Linear. Any other module can be given to FusionModel",
        ),
        (
            lambda: eq.encoders.Backbone(build_bert())(
                {"inputs_embeds": torch.zeros(2, 5, 12), "attention_mask": torch.ones(2, 5, 5)}
            ),
            ShapeError,
            r"Backbone: expected an attention_mask \(batch, token\), got shape \(2, 5, 5\)",
        ),
        (
            lambda: eq.encoders.Backbone(build_resnet())(
                {"pixel_values": torch.zeros(2, 3, 32, 32), "attention_mask": torch.ones(2, 5)}
            ),
            ShapeError,
            r"Backbone: expected an attention_mask for each of 16 tokens, got shape \(2, 5\)\. Omit it, and mask",
        ),
    ],
)
def test_errors(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


@pytest.mark.parametrize(
    ("package", "call", "fix"),
    [
        (
            "transformers",
            lambda: eq.encoders.Backbone("folder"),
            r"Backbone: expected the package 'transformers'.*pip install 'equipoise\[hf\]'",
        ),
        (
            "peft",
            lambda: eq.encoders.Backbone(build_bert(), lora=2),
            r"Backbone, lora: expected the package 'peft'.*pip install 'equipoise\[lora\]'",
        ),
    ],
)
def test_missing_packages_raise(package, call, fix, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=fix):
        call()
