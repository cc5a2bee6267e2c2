"""Masked values do not affect outputs and gradients of models, fusions and encoders; valid masks."""

import inspect
import math

import pytest
import torch
from torch import nn

import equipoise as eq
from equipoise.encoders import Backbone, SequenceEncoder, TextEncoder
from equipoise.errors import ConfigError, ShapeError
from equipoise.tokens.masks import bool_mask, zero_loss
from equipoise.tokens.token_batch import Tokens
from helpers.fusion_cases import BATCH, DIM, FUSIONS, LENGTHS, NAMES, build_fusion, random_tokens
from helpers.masked_cases import FILLS, assert_equal_and_finite, outputs_and_gradients

FEATURES = {"audio": 3, "image": 7, "text": 11}
# Every fusion with its defaults, and options with other code paths for masks.
OPTIONS = {
    "JointAttention": ({"depth": 2}, {"include_cls_key": False}, {"shortcut": False}),
    "MulT": ({"causal": True}, {"readout": "attention"}),
    "MBT": ({"exchange": "cross"}, {"bottlenecks": 0}),
    "JMT": ({"output": "attention"},),
    "MMML": ({"readout": "attention"},),
    "MODA": tuple({"merge": merge, "pseudo": "all_masked"} for merge in ("mass", "gate", "sum", "concat")),
}
CASES = [(name, options) for name in FUSIONS for options in ({}, *OPTIONS.get(name, ()))]
fusions = pytest.mark.parametrize(("kind", "options"), CASES, ids=lambda part: str(part))


def padding_masks(names, *, seed=0):
    """Returns (batch, token) masks with padding in the middle and at the end, and a sample without the last
    modality.
    """
    random = torch.Generator().manual_seed(seed)
    masks = {name: torch.rand(BATCH, LENGTHS[name], generator=random) < 0.6 for name in names}
    masks[names[-1]][1] = False
    masks[names[0]][:, 0] = True
    return masks


class TestFusions:
    @fusions
    @pytest.mark.parametrize("cls", [False, True])
    def test_tokens(self, kind, options, cls):
        names, actual = NAMES[:3], []
        masks = padding_masks(names)
        fusion = build_fusion(FUSIONS[kind], names, **options)
        for fill in (0.0, *FILLS):
            tokens, leaves = {}, []
            for name, part in random_tokens(names).items():
                values = part.values.masked_fill(~masks[name][..., None], fill).requires_grad_()
                tokens[name], leaves = Tokens(values, mask=masks[name], cls=cls), [*leaves, values]
            output = fusion(tokens)
            actual.append(outputs_and_gradients((output.features, output.share), [*leaves, *fusion.parameters()]))
        for result in actual[1:]:
            assert_equal_and_finite(result, actual[0])

    @fusions
    def test_inputs_of_encoders(self, kind, options):
        """Also compares gradients of the encoder weights, since 0 times NaN is NaN."""
        names, actual = NAMES[:3], []
        masks = padding_masks(names)
        torch.manual_seed(0)
        encoders = {name: nn.Sequential(nn.Linear(FEATURES[name], DIM), nn.GELU(), nn.LayerNorm(DIM)) for name in names}
        model = eq.FusionModel(encoders, FUSIONS[kind](DIM, **options), 2, unimodal="train").double().eval()
        for fill in (0.0, *FILLS):
            random = torch.Generator().manual_seed(2)
            batch, leaves = {"mask": masks}, []
            for name in names:
                values = torch.randn(BATCH, LENGTHS[name], FEATURES[name], generator=random, dtype=torch.float64)
                batch[name] = values.masked_fill(~masks[name][..., None], fill).requires_grad_()
                leaves.append(batch[name])
            output = model(batch)
            loss = model.loss(output.logits, torch.tensor([0, 1, 1])) + model.unimodal_loss(
                output, torch.zeros(3).long()
            )
            actual.append(outputs_and_gradients((output.logits, output.share, loss), [*leaves, *model.parameters()]))
            tokens = [output.tokens[name] for name in model.fusion.reads]
            assert not any(part.values[~part.mask].any() for part in tokens)
        for result in actual[1:]:
            assert_equal_and_finite(result, actual[0])


class TestModel:
    def model(self, names=("audio", "image"), fusion=None):
        torch.manual_seed(0)
        encoders = {name: nn.Linear(FEATURES[name], DIM) for name in names}
        return eq.FusionModel(encoders, fusion or eq.fusion.Concat(DIM), 2)

    def batch(self):
        random = torch.Generator().manual_seed(0)
        return {
            name: torch.randn(BATCH, LENGTHS[name], FEATURES[name], generator=random) for name in ("audio", "image")
        }

    @pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8, torch.float32, torch.bfloat16])
    def test_boolean_and_0_1_masks_are_equivalent(self, dtype):
        model, batch = self.model(), self.batch()
        mask = torch.rand(BATCH, LENGTHS["audio"], generator=torch.Generator().manual_seed(1)) < 0.6
        expected = model({**batch, "mask": {"audio": mask}}).logits
        assert torch.equal(model({**batch, "mask": {"audio": mask.to(dtype)}}).logits, expected)

    @pytest.mark.parametrize(
        ("mask", "got"),
        [
            (torch.tensor([0.0, -math.inf, 0.0]), "numbers from -inf to 0"),
            (torch.tensor([0.0, -1e4, 0.0]).half(), "numbers from -10000 to 0"),
            (torch.tensor([0, -1, 0]), "numbers from -1 to 0"),
            (torch.tensor([1.0, 0.5, 0.0]), "numbers from 0 to 1"),
            (torch.tensor([1.0, math.nan, 0.0]), "numbers from nan to nan"),
            (torch.zeros(3), "floating zeros alone, which may be a 0/1 mask or an additive one"),
        ],
    )
    @pytest.mark.parametrize("tokens", [False, True])
    def test_additive_masks_raise(self, mask, got, tokens):
        mask = mask[:, None].expand(-1, LENGTHS["audio"]) if tokens else mask
        with pytest.raises(ShapeError, match=rf"mask of 'audio': expected .* all 0 and 1, .*got {got}\. True = valid"):
            self.model()({**self.batch(), "mask": {"audio": mask}})

    def test_integer_zeros_mask_everything(self):
        output = self.model()({**self.batch(), "mask": {"audio": torch.zeros(BATCH, dtype=torch.int64)}})
        assert not output.tokens["audio"].present().any()

    @pytest.mark.parametrize("mask", [torch.zeros(5, 5), torch.full((BATCH, 2), -math.inf), torch.ones(2), "rubbish"])
    def test_masks_of_unused_modalities_are_ignored(self, mask):
        batch = self.batch()
        alone = self.model(("audio",))
        expected = alone({"audio": batch["audio"]}).logits
        assert torch.equal(alone({**batch, "mask": {"image": mask}}).logits, expected)
        assert torch.equal(alone({"audio": batch["audio"], "mask": {"image": mask}}).logits, expected)
        both = self.model(fusion=eq.fusion.Unimodal(DIM, modality="audio"))
        expected = both(batch).logits
        assert torch.equal(both({**batch, "mask": {"image": mask}}).logits, expected)

    def test_invalid_masks_of_used_modalities_raise(self):
        model, batch = self.model(), self.batch()
        model({**batch, "touch": torch.zeros(3), "mask": {"touch": torch.full((1,), -math.inf)}})
        with pytest.raises(ConfigError, match="FusionModel mask: expected a known modality, got 'touch'"):
            model({**batch, "mask": {"touch": torch.ones(BATCH)}})
        taught = eq.FusionModel(
            {n: nn.Linear(FEATURES[n], DIM) for n in batch},
            eq.fusion.Unimodal(DIM, modality="audio"),
            2,
            unimodal="train",
        )
        with pytest.raises(ShapeError, match="mask of 'image'"):
            taught({**batch, "mask": {"image": torch.zeros(BATCH)}})

    def test_unimodal_fusion_accepts_other_modalities_of_any_size(self):
        fusion = eq.fusion.Unimodal(DIM, modality="image").build(("audio", "image"))
        tokens = random_tokens(("image",), dtype=torch.float32)
        output = fusion({"audio": Tokens(torch.full((7, 2, 5), math.nan)), **tokens})
        assert torch.equal(output.features, tokens["image"].pooled())

    @pytest.mark.parametrize("fill", [math.nan, math.inf])
    @pytest.mark.parametrize("encoder", [nn.Conv2d(3, DIM, 2), nn.LSTM(5, DIM, batch_first=True)])
    def test_missing_samples(self, encoder, fill):
        """An encoder that mixes tokens receives zeros instead of a missing sample."""

        class Encoder(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = encoder

            def forward(self, x):
                return self.inner(x)[0] if isinstance(self.inner, nn.LSTM) else self.inner(x).flatten(2).mT

        model = eq.FusionModel(
            {"image": Encoder(), "audio": nn.Linear(3, DIM)}, eq.fusion.JointAttention(DIM), 2
        ).eval()
        shape = (BATCH, 4, 5) if isinstance(encoder, nn.LSTM) else (BATCH, 3, 4, 5)
        present, result = torch.tensor([True, False, True]), []
        for value in (0.0, fill):
            image = torch.ones(shape)
            image[1] = value
            batch = {"image": image, "audio": torch.ones(BATCH, 2, 3), "mask": {"image": present}}
            result.append(
                outputs_and_gradients((model(batch).logits,), [p for p in model.parameters() if p.requires_grad])
            )
        assert_equal_and_finite(result[1], result[0])

    def test_channels_are_not_treated_as_tokens(self):
        """The number of tokens equals the number of channels: a mask of tokens must not be applied to the image."""
        encoder = nn.Sequential(nn.Conv2d(2, DIM, 2, stride=2), nn.Flatten(2))
        torch.manual_seed(0)
        model = eq.FusionModel({"image": _Transposed(encoder)}, eq.fusion.Concat(DIM), 2)
        picture = torch.randn(BATCH, 2, 2, 4)
        mask = torch.tensor([[True, False]]).expand(BATCH, -1)
        output = model({"image": picture, "mask": {"image": mask}})
        torch.testing.assert_close(output.features, encoder(picture)[..., 0])

    def test_encoder_that_accepts_but_does_not_return_masks(self):
        class Inner(nn.Linear):
            def forward(self, input, mask=None):
                return super().forward(input)

        class Pooling(nn.Linear):
            def forward(self, input, mask=None):
                return super().forward(input).mean(dim=1)

        mask = torch.tensor([[True, False], [False, False], [True, True]])
        for kind, expected in ((Inner, mask), (Pooling, mask.any(dim=1, keepdim=True))):
            model = eq.FusionModel({"image": kind(7, DIM)}, eq.fusion.Concat(DIM), 2)
            assert torch.equal(
                model({"image": torch.ones(3, 2, 7), "mask": {"image": mask}}).tokens["image"].mask, expected
            )


class _Transposed(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x).mT


class TestEncoders:
    def test_every_encoder_with_a_mask_is_tested(self):
        import equipoise.encoders as package

        kinds = inspect.getmembers(package, inspect.isclass)
        masked = {name for name, kind in kinds if "mask" in inspect.signature(kind.forward).parameters}
        assert masked == {"SequenceEncoder", "TextEncoder", "Backbone"}

    @pytest.mark.parametrize("fill", FILLS)
    def test_sequence(self, fill):
        torch.manual_seed(0)
        encoder = SequenceEncoder(3, max_length=7, dim=8, stride=2, depth=1, heads=2)
        frames, mask = torch.randn(2, 7, 3), torch.rand(2, 7, generator=torch.Generator().manual_seed(0)) < 0.5
        result = []
        for value in (0.0, fill):
            tokens = encoder(frames.masked_fill(~mask[..., None], value), mask=mask)
            result.append(
                outputs_and_gradients((tokens.pooled(), tokens.values[tokens.mask]), list(encoder.parameters()))
            )
        assert_equal_and_finite(result[1], result[0])

    def test_text(self):
        encoder = TextEncoder(11, max_length=7, dim=8, depth=1, heads=2)
        words, mask = torch.randint(1, 11, (2, 5)), torch.tensor([[True] * 3 + [False] * 2, [True] * 4 + [False]])
        expected = encoder(words.masked_fill(~mask, 0))
        assert expected.values.shape[1] == 4
        for value in (-100, 99):
            assert torch.equal(encoder(words.masked_fill(~mask, value), mask).values, expected.values)
        with pytest.raises(ShapeError, match=r"TextEncoder mask: expected a boolean mask \(batch, word\) = \(2, 5\)"):
            encoder(words, mask.float())

    def test_backbone(self):
        transformers = pytest.importorskip("transformers")
        size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        config = transformers.BertConfig(vocab_size=11, pad_token_id=3, **size)
        encoder = Backbone(transformers.BertModel(config), dim=5).eval()
        ids, mask = torch.tensor([[1, 5, 2, 4], [1, 2, 9, 9]]), torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
        expected = encoder({"input_ids": ids.masked_fill(mask == 0, 3), "attention_mask": mask})
        result = encoder({"input_ids": ids.masked_fill(mask == 0, -100), "attention_mask": mask.float()})
        assert torch.equal(result.values, expected.values)
        assert torch.equal(encoder(ids.masked_fill(mask == 0, -1), mask.bool()).pooled(), expected.pooled())
        with pytest.raises(ShapeError, match="attention_mask: expected a boolean or 0/1 mask, got numbers from"):
            encoder({"input_ids": ids, "attention_mask": (1.0 - mask.float()) * -1e4})
        vectors = torch.randn(2, 4, 8)
        for value in (0.0, math.nan):
            given = {"inputs_embeds": vectors.masked_fill(mask[..., None] == 0, value), "attention_mask": mask}
            assert encoder(given).values.isfinite().all()

    def test_audio_backbone(self):
        """The last axis of mel spectrograms is time."""
        encoder = Backbone.__new__(Backbone)
        mask = torch.tensor([[True, True, False], [True, False, False]])
        mel = torch.full((2, 5, 3), math.nan).masked_fill(mask[:, None], 1.0)
        cleaned = Backbone._without_masked(encoder, "input_features", mel, mask)
        assert torch.equal(cleaned, mask[:, None].expand(-1, 5, -1).float())


class TestHelpers:
    def test_invalid_mask_dtypes_raise(self):
        for mask, got in (([True], "list"), (torch.ones(2, dtype=torch.complex64), "torch.complex64")):
            with pytest.raises(ShapeError, match=f"here: expected a mask, got {got}"):
                bool_mask(mask, "here", "a mask", numbers=True)
        with pytest.raises(ShapeError, match=r"here: expected a mask, got shape \(2,\), torch.bool"):
            bool_mask(torch.ones(2).bool(), "here", "a mask", shape=(3,))
        assert bool_mask(torch.zeros(0), "here", "a mask", numbers=True).dtype == torch.bool

    def test_loss_without_terms_is_exactly_0(self):
        values = [torch.full((2, 3), math.nan), torch.tensor(math.inf).half(), torch.zeros(0, 5, dtype=torch.float64)]
        loss = zero_loss([value.requires_grad_() for value in values])
        assert (float(loss.detach()), loss.dtype) == (0.0, torch.float64)
        loss.backward()
        assert not any(value.grad.any() for value in values)
