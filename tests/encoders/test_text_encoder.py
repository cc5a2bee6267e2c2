"""TextEncoder and ConvEncoder against loops, and the vocabulary."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

import equipoise as eq
from equipoise.data.sets.word_vocabulary import WordVocabulary, pad_sequences, split_words, trigrams
from equipoise.encoders import ConvEncoder, TextEncoder
from equipoise.errors import ConfigError, ShapeError
from helpers.tolerance import TOL
from oracles.fusion import gelu, state_as_float64, transformer

EXACT = TOL[torch.float64]
CAPTIONS = ["red heart", "blue heart", "Kiss: woman, man", "o’clock"]


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_word_embedding_plus_position_embedding(depth):
    torch.manual_seed(0)
    encoder = TextEncoder(11, max_length=7, dim=6, depth=depth, heads=3).double()
    ids = torch.tensor([[4, 2, 0, 0, 0], [7, 7, 10, 0, 0], [0, 0, 0, 0, 0]])
    tokens, state = encoder(ids), state_as_float64(encoder)
    assert tokens.values.shape == (3, 3, 6)
    assert tokens.mask.tolist() == [[True, True, False], [True, True, True], [False, False, False]]
    assert tokens.present().tolist() == [True, True, False]
    for row in (0, 1):
        own = [int(number) for number in ids[row] if number]
        rows = torch.stack([state["words"][number] for number in own])
        if depth:
            rows = rows + state["positions"][: len(own)]
        expected = transformer(state, "transformer.", rows, [True] * len(own), depth, 3)
        torch.testing.assert_close(tokens.values[row, : len(own)], expected, **EXACT)
        torch.testing.assert_close(tokens.pooled()[row], expected.mean(dim=0), **EXACT)


@given(st.integers(0, 6))
@settings(max_examples=7, deadline=None)
def test_padding_has_no_effect(more):
    torch.manual_seed(0)
    encoder = TextEncoder(11, max_length=13, dim=6, depth=2, heads=2).double()
    ids = torch.tensor([[4, 2, 5, 0, 0], [9, 1, 0, 0, 0]])
    wide = torch.cat([ids, torch.zeros(2, more, dtype=torch.long)], dim=1)
    beside = torch.cat([wide, torch.full((1, wide.shape[1]), 3)])
    torch.testing.assert_close(encoder(wide).pooled(), encoder(ids).pooled(), **EXACT)
    torch.testing.assert_close(encoder(beside).pooled()[:2], encoder(ids).pooled(), **EXACT)


def test_order_matters_only_with_transformer_blocks():
    torch.manual_seed(0)
    there, back = torch.tensor([[4, 2, 5]]), torch.tensor([[5, 2, 4]])
    bag, chain = (TextEncoder(11, max_length=5, dim=6, depth=depth, heads=2).double() for depth in (0, 1))
    torch.testing.assert_close(bag(there).pooled(), bag(back).pooled(), **EXACT)
    assert (chain(there).pooled() - chain(back).pooled()).abs().max() > 1e-3


def test_no_gradient_for_absent_words():
    torch.manual_seed(0)
    encoder = TextEncoder(11, max_length=5, dim=6, depth=1, heads=2)
    encoder(torch.tensor([[4, 2, 0], [4, 0, 0]])).pooled().square().sum().backward()
    touched = encoder.words.grad.abs().sum(dim=1) > 0
    # Padding ids are embedded too, and masked before the first attention layer.
    assert touched.nonzero()[:, 0].tolist() == [2, 4]


def convolution(x, weight, bias, stride):
    """Computes a 3 x 3 convolution with zero padding, pixel by pixel."""
    channels, height, width = x.shape
    border = torch.zeros(channels, height + 2, width + 2, dtype=x.dtype)
    border[:, 1:-1, 1:-1] = x
    rows = range(0, height, stride)
    columns = range(0, width, stride)
    return torch.stack([
        torch.stack([
            torch.stack([(weight[k] * border[:, i : i + 3, j : j + 3]).sum() + bias[k] for j in columns]) for i in rows
        ])
        for k in range(len(weight))
    ])  # fmt: skip


def group_norm(x, weight, bias, groups=8, eps=1e-5):
    parts = []
    for part in x.chunk(groups):
        mean = part.mean()
        parts.append((part - mean) / ((part - mean).square().mean() + eps).sqrt())
    return torch.cat(parts) * weight[:, None, None] + bias[:, None, None]


def test_conv_encoder_against_loops():
    torch.manual_seed(0)
    encoder = ConvEncoder(3, (6, 10), dim=5, widths=(8, 16)).double().eval()
    pixels = torch.randn(2, 3, 6, 10, dtype=torch.float64)
    tokens, state = encoder(pixels), state_as_float64(encoder)
    assert tokens.values.shape == (2, 2 * 3, 5)
    for sample in (0, 1):
        x = pixels[sample]
        for stage in (0, 2):
            own = f"stages.{stage}."
            x = convolution(x, state[f"{own}weight"], state[f"{own}bias"], 2)
            y = x
            for step in (0, 1):
                norm, conv = f"stages.{stage + 1}.norms.{step}.", f"stages.{stage + 1}.convolutions.{step}."
                y = gelu(group_norm(y, state[f"{norm}weight"], state[f"{norm}bias"]))
                y = convolution(y, state[f"{conv}weight"], state[f"{conv}bias"], 1)
            x = x + y
        last = gelu(group_norm(x, state["norm.weight"], state["norm.bias"]))
        for index, (i, j) in enumerate((i, j) for i in range(2) for j in range(3)):
            expected = state["project.weight"] @ last[:, i, j] + state["project.bias"]
            torch.testing.assert_close(tokens.values[sample, index], expected, **EXACT)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: TextEncoder(0, max_length=3, dim=4), ConfigError, "TextEncoder: expected vocabulary >= 1 .* 0 and 3"),
        (lambda: TextEncoder(5, max_length=0, dim=4), ConfigError, "max_length >= 1, got 5 and 0"),
        (lambda: build_encoder()(torch.zeros(2, 3)), ShapeError, r"integers of .*, got shape \(2, 3\), torch\.float32"),
        (lambda: build_encoder()(torch.zeros(3, dtype=torch.long)), ShapeError, r"got shape \(3,\), torch.int64"),
        (lambda: build_encoder()(torch.ones(2, 5, dtype=torch.long)), ShapeError, "1 to 4 words, got 5. Truncate the "
                                                                                  "texts"),
        (lambda: build_encoder()(torch.ones(2, 0, dtype=torch.long)), ShapeError, "expected 1 to 4 words, got 0"),
        (lambda: build_encoder()(torch.tensor([[1, 7]])), ShapeError, "indices from 0 to 6, got 1 to 7. Build the "
                                                                      "encoder"),
        (lambda: build_encoder()(torch.tensor([[1, -1]])), ShapeError, "got -1 to 1"),
        (lambda: ConvEncoder(3, (8, 8), dim=4, widths=()), ConfigError, r"one or more widths.*, got \(\)"),
        (lambda: ConvEncoder(3, (8, 8), dim=4, widths=(8, 12)), ConfigError, r"multiples of 8, got \(8, 12\)"),
        (
            lambda: ConvEncoder(3, (8, 8), dim=4, widths=(8,))(torch.zeros(2, 1, 8, 8)), ShapeError,
            r"ConvEncoder: expected \(batch, channel, height, width\) = \(batch, 3, 8, 8\), got shape \(2, 1, 8, 8\)",
        ),
        (lambda: WordVocabulary(CAPTIONS, length=0), ConfigError, "Words: expected length >= 1, got 0"),
        (lambda: WordVocabulary(["?", ""], length=3), ConfigError, "Words: expected captions with words in them, got "
                                                                   "none"),
        (lambda: build_vocabulary().encode([""]), ShapeError, "Words: expected a text with a word in it, got ''"),
        (lambda: build_vocabulary().encode(["red", " ?! "]), ShapeError, "Words, text 1: expected a text .*, got ' "
                                                                         "[?]! '"),
        (lambda: build_vocabulary().encode(["red " * 6], "caption"), ShapeError, "caption: .* at most 5 words, got 6 "
                                                                                 ".'red red"),
        (lambda: build_vocabulary().encode(["xyz"]), ConfigError, r"expected a known word, got 'xyz'\. Choose one "
                                                                  r"of: blue"),
        (lambda: build_vocabulary().encode(["kks"]), ConfigError, r"expected a known word, got 'kks'\. Did you mean "
                                                                  r"'kiss'"),
    ],
)  # fmt: skip
def test_invalid_input_raises(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


def build_encoder():
    return TextEncoder(7, max_length=4, dim=4, depth=1, heads=1)


def build_vocabulary():
    return WordVocabulary(CAPTIONS, length=5)


def test_words_are_numbered_alphabetically():
    known = build_vocabulary()
    assert list(known.words) == ["blue", "clock", "heart", "kiss", "man", "o", "red", "woman"]
    assert known.encode(["BLUE heart!", "kiss woman man"]).tolist() == [[1, 3, 0, 0, 0], [4, 8, 5, 0, 0]]
    assert build_vocabulary().pieces == known.pieces
    assert WordVocabulary(reversed(CAPTIONS), length=5).pieces == known.pieces
    numbers = [*known.words.values(), *known.pieces.values()]
    assert numbers == list(range(1, len(known)))


def test_unknown_word_is_encoded_by_its_trigrams():
    known = build_vocabulary()
    assert known.unseen("two red Hearts") == ["two", "hearts"]
    (row,) = known.encode(["hearts"]).tolist()
    names = {number: piece for piece, number in known.pieces.items()}
    assert [names[number] for number in row if number] == ["<he", "hea", "ear", "art"]


@given(st.text(max_size=30))
@settings(max_examples=40, deadline=None)
def test_any_text_is_encoded_or_raises(text):
    known = WordVocabulary(CAPTIONS, length=64)
    expected = [number for word in known.numbers(text) for number in word]
    if 0 < len(expected) <= 64:
        assert known.encode([text]).tolist() == [expected + [0] * (64 - len(expected))]
    else:
        with pytest.raises(
            ConfigError if split_words(text) and not expected else ShapeError, match=r"^Words: expected"
        ):
            known.encode([text])


def test_parts_of_words():
    assert split_words("The cat's 3 lives — AH") == ["the", "cat", "s", "3", "lives", "ah"]
    assert trigrams("o") == ["<o>"]
    assert pad_sequences([], 4).shape == (0, 4)


def test_recipes_select_encoders_by_sample_shape():
    assert TextEncoder.for_data((24,)) == {"max_length": 24}
    assert TextEncoder.for_data((3, 8, 8)) is None
    assert ConvEncoder.for_data((3, 8, 9)) == {"channels": 3, "size": (8, 9)}
    assert ConvEncoder.for_data((24,)) is None
    assert eq.encoders.TextEncoder is TextEncoder
    assert eq.encoders.ConvEncoder is ConvEncoder
