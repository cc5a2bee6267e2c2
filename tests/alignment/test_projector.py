"""Projectors, and media spliced into text, against a loop over words."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from equipoise.alignment.connectors.media_splice import splice
from equipoise.alignment.connectors.projector import Projector
from equipoise.errors import ConfigError, ShapeError
from equipoise.tokens.token_batch import Tokens, unpack
from helpers.tolerance import TOL
from oracles import align as slow

EXACT = TOL[torch.float64]
DIM, IMAGE, AUDIO = 3, 90, 91


@pytest.mark.parametrize(("kind", "layers"), [("linear", 1), ("mlp1x_gelu", 1), ("mlp2x_gelu", 3), ("mlp3x_gelu", 5)])
def test_kinds(kind, layers):
    torch.manual_seed(0)
    layer = Projector(5, 7, kind=kind).double()
    assert len(layer.layers) == layers
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    expected = x @ layer.layers[0].weight.T + layer.layers[0].bias
    for linear in (layer for layer in list(layer.layers)[1:] if isinstance(layer, nn.Linear)):
        expected = 0.5 * expected * (1 + torch.erf(expected / 2**0.5))
        expected = expected @ linear.weight.T + linear.bias
    torch.testing.assert_close(layer(x), expected, **EXACT)
    tokens = Tokens(x, mask=torch.tensor([[True, False, True]] * 2), times=torch.zeros(2, 3))
    result = layer(tokens)
    torch.testing.assert_close(result.values, expected, **EXACT)
    assert result.mask is tokens.mask
    assert result.times is tokens.times


def test_identity():
    x = torch.randn(2, 3, 5)
    assert torch.equal(Projector(5, 5, kind="identity")(x), x)
    assert not list(Projector(5, 5, kind="identity").parameters())


def test_single_placeholder_per_medium():
    text = torch.arange(4.0)[None, :, None].expand(1, 4, DIM)
    image = torch.tensor([10.0, 11.0])[None, :, None].expand(1, 2, DIM)
    result = splice(text, torch.tensor([[5, IMAGE, 6, 7]]), IMAGE, image)
    assert result.embeddings[0, :, 0].tolist() == [0, 10, 11, 2, 3]
    assert result.labels.tolist() == [[5, -100, -100, 6, 7]]
    assert result.modality.tolist() == [[0, 1, 1, 0, 0]]
    assert result.names == ("text", "image")
    assert result.mask.all()
    again = unpack(result.tokens)
    assert again["image"].values[0, :, 0].tolist() == [10, 11]


def test_placeholders_for_single_tokens_are_replaced():
    text, image = torch.zeros(2, 4, DIM), torch.arange(12.0).view(2, 2, DIM)
    ids = torch.tensor([[5, IMAGE, IMAGE, 6], [IMAGE, 7, 8, IMAGE]])
    result = splice(text, ids, IMAGE, image)
    assert result.embeddings.shape == text.shape
    torch.testing.assert_close(result.embeddings[ids == IMAGE], image.flatten(0, 1), **EXACT)
    assert result.labels.tolist() == [[5, -100, -100, 6], [-100, 7, 8, -100]]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(["right", "left"]))
def test_splice_against_a_loop(seed, side):
    random = torch.Generator().manual_seed(seed)
    batch, words, places = 3, 7, {"image": IMAGE, "audio": AUDIO}
    ids = torch.randint(5, (batch, words), generator=random)
    draw = torch.rand(batch, words, generator=random)
    ids = ids.masked_fill(draw < 0.2, IMAGE).masked_fill(draw > 0.85, AUDIO)
    mask = torch.rand(batch, words, generator=random) < 0.8
    labels = torch.where(torch.rand(batch, words, generator=random) < 0.3, -100, ids)
    text = torch.randn(batch, words, DIM, generator=random, dtype=torch.float64)
    media, lists = {}, {}
    for name, index in places.items():
        count, length = int(((ids == index) & mask).sum()), 4
        values = torch.randn(count, length, DIM, generator=random, dtype=torch.float64)
        valid = torch.rand(count, length, generator=random) < 0.7
        # At least two tokens, so that a placeholder for a medium differs from one for a token.
        valid[:, :2] = True
        media[name] = Tokens(values, mask=valid)
        lists[name] = [part[keep].tolist() for part, keep in zip(values, valid, strict=True)]
    result = splice(text, ids, places, media, labels=labels, mask=mask, side=side)
    rows = slow.splice(text.tolist(), ids.tolist(), labels.tolist(), mask.tolist(), places, lists)
    longest = max(len(row) for row in rows)
    assert result.embeddings.shape == (batch, longest, DIM)
    for i, row in enumerate(rows):
        start = longest - len(row) if side == "left" else 0
        here = slice(start, start + len(row))
        assert result.mask[i].tolist() == [start <= j < start + len(row) for j in range(longest)]
        assert result.embeddings[i, here].tolist() == [part[0] for part in row]
        assert result.labels[i, here].tolist() == [part[1] for part in row]
        assert result.modality[i, here].tolist() == [part[2] for part in row]
        assert float(result.embeddings[i][~result.mask[i]].abs().sum()) == 0.0
        assert set(result.labels[i][~result.mask[i]].tolist()) <= {-100}
        assert set(result.modality[i][~result.mask[i]].tolist()) <= {-1}


def test_rows_without_media_are_unchanged():
    text, image = torch.ones(2, 3, DIM), torch.zeros(1, 2, DIM)
    result = splice(text, torch.tensor([[5, 6, 7], [5, IMAGE, 7]]), IMAGE, image)
    assert result.modality.tolist() == [[0, 0, 0, -1], [0, 1, 1, 0]]
    none = splice(text, torch.tensor([[5, 6, 7], [5, 8, 7]]), IMAGE, image[:0])
    assert torch.equal(none.embeddings, text)


def test_gradients_reach_text_and_media():
    text = torch.randn(2, 3, DIM, dtype=torch.float64, requires_grad=True)
    image = torch.randn(2, 2, 4, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([[5, IMAGE, 6], [IMAGE, 7, 8]])
    torch.manual_seed(0)
    projector = Projector(4, DIM).double()
    assert torch.autograd.gradcheck(lambda t, i: projector.splice(t, ids, IMAGE, i).embeddings, (text, image))
    result = projector.splice(text, ids, IMAGE, image)
    torch.testing.assert_close(result.embeddings[result.modality == 1], projector(image).flatten(0, 1), **EXACT)
    result.embeddings.sum().backward()
    assert float(text.grad[ids == IMAGE].abs().max()) == 0.0
    assert float(text.grad[ids != IMAGE].abs().min()) > 0.0


def test_dtypes():
    result = splice(
        torch.zeros(1, 2, DIM, dtype=torch.bfloat16), torch.tensor([[IMAGE, 5]]), IMAGE, torch.ones(1, 2, DIM)
    )
    assert result.embeddings.dtype == torch.bfloat16
    assert result.labels.dtype == torch.int64


def test_errors():
    text, ids, image = torch.zeros(2, 3, DIM), torch.tensor([[5, IMAGE, 6], [5, IMAGE, 7]]), torch.zeros(2, 4, DIM)
    with pytest.raises(
        ShapeError,
        match=r"splice 'image': expected one placeholder for each of 1 media, or for each of their 4 tokens, got 2 "
        r"\(per row: \[1, 1\]\). Remove texts without their medium, and media without a placeholder",
    ):
        splice(text, ids, IMAGE, image[:1])
    with pytest.raises(ShapeError, match=r"splice 'image': .* got 0 \(per row: \[0, 0\]\)"):
        splice(text, ids, IMAGE + 1, image)
    with pytest.raises(ShapeError, match=r"splice 'image': expected the text's width, dim = 3, got 4. Use Projector"):
        splice(text, ids, IMAGE, torch.zeros(2, 4, 4))
    with pytest.raises(ShapeError, match=r"splice input_ids: expected \(batch, word\) = \(2, 3\), got \(2, 2\)"):
        splice(text, ids[:, :2], IMAGE, image)
    with pytest.raises(ShapeError, match=r"splice text: expected embeddings \(batch, word, dim\)"):
        splice(text[0], ids, IMAGE, image)
    with pytest.raises(ShapeError, match=r"splice mask: expected dtype torch.bool, got torch.int64. Use mask.bool"):
        splice(text, ids, IMAGE, image, mask=ids)
    with pytest.raises(ConfigError, match="splice: expected a known side, got 'middle'"):
        splice(text, ids, IMAGE, image, side="middle")
    with pytest.raises(ConfigError, match="splice: expected placeholder and tokens both by name, or neither"):
        splice(text, ids, IMAGE, {"image": image})
    with pytest.raises(ConfigError, match="splice: expected a known medium, got 'audio'"):
        splice(text, ids, {"image": IMAGE, "audio": AUDIO}, {"image": image})
    with pytest.raises(ConfigError, match="splice: expected a known placeholder, got 'audio'"):
        splice(text, ids, {"image": IMAGE}, {"image": image, "audio": image})
    with pytest.raises(ConfigError, match="none called 'text'"):
        splice(text, ids, {"text": IMAGE}, {"text": image})
    with pytest.raises(ConfigError, match=r"Projector: expected kind .* got 'mlp0x_gelu'. LLaVA-1.5 uses"):
        Projector(2, 3, kind="mlp0x_gelu")
    with pytest.raises(ConfigError, match="Projector: expected in_dim = out_dim for identity, got 2 and 3"):
        Projector(2, 3, kind="identity")
    with pytest.raises(ShapeError, match="Projector: expected in_dim = 2, got 5"):
        Projector(2, 3)(torch.zeros(1, 1, 5))
