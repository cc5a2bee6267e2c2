"""Perceiver resampler and gated cross-attention: formulas, perturbations, identity at initialization."""

import pytest
import torch
from torch.nn import functional as F

from equipoise.alignment.connectors.gated_cross_attention import GatedCrossAttention, media_mask
from equipoise.alignment.connectors.perceiver_resampler import Resampler
from equipoise.errors import ConfigError, ShapeError
from equipoise.recording import watch
from equipoise.tokens.token_batch import Tokens
from helpers.tolerance import TOL
from oracles import align as slow

EXACT, SINGLE = TOL[torch.float64], TOL[torch.float32]
DIM, LATENTS = 6, 3


def resampler(seed=0, **options):
    torch.manual_seed(seed)
    layer = Resampler(DIM, **{"latents": LATENTS, "depth": 2, "heads": 1, "frames": 4, **options}).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return layer


def layer_norm(x, layer):
    mean = x.mean(-1, keepdim=True)
    return (x - mean) / ((x - mean).square().mean(-1, keepdim=True) + layer.eps).sqrt() * layer.weight + layer.bias


@torch.no_grad()
def test_resampler_formula():
    module = resampler()
    frames = torch.randn(2, 3, 5, DIM, dtype=torch.float64)
    for sample in range(2):
        media = (frames[sample] + module.times[:3]).flatten(0, 1)
        latents = module.latents[0]
        for layer in module.layers:
            normed = layer_norm(latents, layer.norm_latents)
            source = torch.cat([layer_norm(media, layer.norm_media), normed])
            weights = layer.reading
            query, key, value = (
                (x @ part.weight.T).numpy()
                for x, part in ((normed, weights.query), (source, weights.key), (source, weights.value))
            )
            mixed = slow.soft_attention(query, key, value, [[True] * len(source)] * LATENTS)
            latents = latents + torch.from_numpy(mixed) @ weights.out.weight.T
            hidden = layer_norm(latents, layer.ffn[0]) @ layer.ffn[1].weight.T
            latents = latents + (0.5 * hidden * (1 + torch.erf(hidden / 2**0.5))) @ layer.ffn[3].weight.T
        torch.testing.assert_close(
            module(frames)[sample], layer_norm(latents, module.norm), rtol=1e-8, atol=EXACT["rtol"]
        )


def test_projections_have_no_bias():
    for module in (Resampler(DIM, heads=2), GatedCrossAttention(DIM, heads=2)):
        assert all("bias" not in name or "norm" in name or "ffn.0" in name for name, _ in module.named_parameters())


def test_output_has_a_fixed_number_of_tokens():
    layer = resampler()
    for count in (0, 1, 2, 7):
        assert layer(torch.randn(2, count, DIM, dtype=torch.float64)).shape == (2, LATENTS, DIM)
    one, other = (layer(torch.randn(2, 5, DIM, dtype=torch.float64)) for _ in range(2))
    assert not torch.allclose(one, other)


def test_frame_embeddings_and_padding():
    layer = resampler()
    frames = torch.randn(2, 3, 5, DIM, dtype=torch.float64)
    assert not torch.allclose(layer(frames), layer(frames.flip(1)), **EXACT)
    flat = frames.flatten(1, 2)
    torch.testing.assert_close(layer(flat), layer(flat.flip(1)), **EXACT)
    mask = torch.arange(18).expand(2, -1) < 15
    padded = Tokens(F.pad(flat, (0, 0, 0, 3), value=9.0), mask=mask)
    torch.testing.assert_close(layer(padded), layer(flat), **EXACT)
    gone = Tokens(flat, mask=torch.arange(2)[:, None].expand(2, 15) == 1)
    torch.testing.assert_close(layer(gone)[0], layer(flat[:, :0])[0], **EXACT)


@pytest.mark.parametrize("names", [("image",), ("image", "audio"), ("image", "audio", "depth")])
def test_several_modalities_together(names):
    layer = resampler(names=names)
    parts = {name: torch.randn(2, 2 + i, DIM, dtype=torch.float64) for i, name in enumerate(names)}
    torch.testing.assert_close(layer(parts), layer(torch.cat(list(parts.values()), dim=1)), **EXACT)
    with watch(layer) as seen:
        layer(dict(reversed(parts.items())))
    share = seen.share(seen.layers[0])
    assert share.shape == (2, 1, len(names))
    assert float(share.sum(dim=-1).max()) < 1  # the remaining attention goes to the latents
    with watch(layer) as ordered:
        layer(parts)
    torch.testing.assert_close(share, ordered.share(ordered.layers[0]), **SINGLE)


def gated(seed=0, opened=True, **options):
    torch.manual_seed(seed)
    result = GatedCrossAttention(DIM, 4, **{"heads": 2, **options}).double()
    if opened:
        with torch.no_grad():
            result.attention_gate.fill_(0.7)
            result.ffn_gate.fill_(-0.4)
    return result


TEXT = torch.randn(2, 7, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
MEDIA = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
AT = torch.tensor([[0, 1, 0, 0, 1, 1, 0], [0, 0, 0, 1, 0, 0, 0]]).bool()


def test_exact_identity_at_initialization():
    layer = gated(opened=False)
    assert torch.equal(layer(TEXT, MEDIA, media_at=AT), TEXT)
    assert torch.equal(layer.float()(TEXT.float(), MEDIA.float()), TEXT.float())
    layer = gated(opened=False)
    layer(TEXT, MEDIA).square().sum().backward()
    assert float(layer.attention_gate.grad.abs()) > 0
    assert float(layer.ffn_gate.grad.abs()) > 0


def test_words_attend_to_the_last_medium_before_them():
    layer = gated()
    index = AT.cumsum(dim=1) - 1
    full = layer(TEXT, MEDIA, media_at=AT)
    for medium in range(3):
        changed = MEDIA.clone()
        changed[:, medium] += 1.0
        moved = (layer(TEXT, changed, media_at=AT) - full).abs().amax(dim=-1) > 1e-6
        assert torch.equal(moved, index == medium)


def test_words_before_any_medium_have_zero_attention():
    layer = gated()
    with torch.no_grad():
        layer.ffn_gate.zero_()
    result = layer(TEXT, MEDIA, media_at=AT)
    assert torch.equal(result[0, :1], TEXT[0, :1])
    assert torch.equal(result[1, :3], TEXT[1, :3])
    assert not torch.equal(result[0, 1], TEXT[0, 1])


def test_matches_word_by_word_decoding():
    layer = gated()
    valid = torch.rand(2, 3, 5, generator=torch.Generator().manual_seed(3)) < 0.7
    result = layer(TEXT, MEDIA, media_at=AT, valid=valid)
    for sample in range(2):
        for word in range(7):
            medium = int(AT[sample, : word + 1].sum()) - 1
            if medium < 0:
                continue
            keep = valid[sample, medium]
            alone = layer(TEXT[sample, word][None, None], MEDIA[sample, medium][keep][None])
            torch.testing.assert_close(result[sample, word], alone[0, 0], **EXACT)
    torch.testing.assert_close(
        layer(TEXT, MEDIA, valid=valid)[0, 0], layer(TEXT[:1, :1], MEDIA[0][valid[0]][None])[0, 0], **EXACT
    )


def test_media_mask_separates_media():
    mask = media_mask(AT, 3, 5)
    for sample in range(2):
        for word in range(7):
            medium = int(AT[sample, : word + 1].sum()) - 1
            assert mask[sample, word].tolist() == [key // 5 == medium for key in range(15)]


def test_gradients():
    layer = gated()
    leaves = TEXT[:, :4].clone().requires_grad_(), MEDIA[:, :1, :2].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda t, m: layer(t, m, media_at=AT[:, :4]), leaves)


def test_watch_does_not_label_words():
    layer = gated()
    labels = torch.tensor([0] * 7 + [1] * 8)
    with watch(layer, modality=labels, names=("image", "audio")) as seen:
        layer(TEXT, MEDIA)
    share = seen.share("reading")
    torch.testing.assert_close(share.sum(dim=-1), torch.ones(2, 2, dtype=share.dtype), **SINGLE)


def test_errors():
    with pytest.raises(ConfigError, match="Resampler: expected latents, depth and frames >= 1, got 0, 6 and 8"):
        Resampler(DIM, latents=0)
    module = resampler()
    with pytest.raises(ShapeError, match="Resampler: expected at most 4 frames, got 5"):
        module(torch.zeros(1, 5, 2, DIM))
    with pytest.raises(ShapeError, match="Resampler: expected dim = 6, got 5"):
        module(torch.zeros(1, 2, 2, 5))
    with pytest.raises(ShapeError, match="Resampler 'media': expected width = 6, got 5"):
        module(torch.zeros(1, 2, 5))
    with pytest.raises(ConfigError, match="Resampler: expected at least one kind of media"):
        module({})
    layer = gated()
    with pytest.raises(
        ShapeError, match=r"media_at: expected at most medium = 1 positions in a text, got \[3, 1\]. Pass one medium"
    ):
        layer(TEXT, MEDIA[:, :1], media_at=AT)
    with pytest.raises(ShapeError, match=r"media_at: expected a boolean mask \(batch, word\) = \(2, 7\), got \(2, 6\)"):
        layer(TEXT, MEDIA, media_at=AT[:, :6])
    with pytest.raises(ShapeError, match=r"GatedCrossAttention media: .* = 2, 4, got \(2, 3, 5, 3\)"):
        layer(TEXT, MEDIA[..., :3])
    with pytest.raises(ShapeError, match=r"GatedCrossAttention valid: expected \(2, 3, 5\), got \(2, 3, 4\)"):
        layer(TEXT, MEDIA, valid=torch.ones(2, 3, 4, dtype=torch.bool))
    with pytest.raises(ConfigError, match="GatedCrossAttention: expected dim >= 1, got 0"):
        GatedCrossAttention(0)
