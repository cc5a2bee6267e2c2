"""Tokens, pack and unpack: round trips, padding, ragged and interleaved layouts, every error."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.errors import ShapeError
from equipoise.tokens.token_batch import SPECIAL, Output, Tokens, as_tokens, pack, segment_labels, unpack
from helpers.tolerance import TOL
from oracles.fusion import mean_pool

BATCH, DIM = 3, 5
LENGTHS = {"audio": 7, "image": 2, "text": 11}


def random_sequences(seed=0, masked=(), timed=False):
    random = torch.Generator().manual_seed(seed)
    result = {}
    for name, length in LENGTHS.items():
        mask = torch.rand(BATCH, length, generator=random) < 0.6 if name in masked else None
        times = torch.rand(BATCH, length, generator=random) if timed else None
        result[name] = Tokens(torch.randn(BATCH, length, DIM, generator=random), mask=mask, times=times)
    return result


@pytest.mark.parametrize("masked", [(), ("image",), ("audio", "image", "text")])
@pytest.mark.parametrize("with_cls", [False, True])
def test_unpack_inverts_pack(masked, with_cls):
    tokens = random_sequences(masked=masked, timed=True)
    packed = pack(tokens, cls=torch.full((DIM,), 9.0) if with_cls else None)
    assert packed.values.shape == (BATCH, sum(LENGTHS.values()) + with_cls, DIM)
    assert packed.lengths == (int(with_cls), 7, 2, 11)
    again = unpack(packed)
    assert list(again) == list(tokens)
    for name, part in tokens.items():
        assert torch.equal(again[name].values, part.values)
        assert torch.equal(again[name].valid(), part.valid())
        assert torch.equal(again[name].times, part.times)


def test_pack_labels_blocks_class_token_and_padding():
    mask = torch.tensor([[True, False], [True, True]])
    tokens = {"audio": torch.zeros(2, 3, DIM), "image": Tokens(torch.zeros(2, 2, DIM), mask=mask)}
    packed = pack(tokens, cls=torch.arange(DIM).float())
    assert packed.modality.tolist() == [[-1, 0, 0, 0, 1, -1], [-1, 0, 0, 0, 1, 1]]
    assert packed.mask.tolist() == [[True] * 5 + [False], [True] * 6]
    assert packed.names == ("audio", "image")
    assert torch.equal(packed.values[:, 0], torch.arange(DIM).float().expand(2, -1))


def test_pack_with_class_token_per_sample():
    cls = torch.randn(BATCH, DIM)
    assert torch.equal(pack(random_sequences(), cls=cls).values[:, 0], cls)


def test_pack_without_masks_and_with_partial_times():
    assert pack(random_sequences()).mask is None
    timed = random_sequences(timed=True)
    assert torch.equal(pack(timed, cls=torch.zeros(DIM)).times[:, 1:8], timed["audio"].times)
    timed["image"] = Tokens(timed["image"].values)
    assert pack(timed).times is None


def test_pack_with_modality_missing_from_the_batch():
    tokens = random_sequences() | {"image": Tokens(torch.zeros(BATCH, 0, DIM))}
    packed = pack(tokens)
    assert packed.modality[0].tolist() == [0] * 7 + [2] * 11
    assert unpack(packed)["image"].values.shape == (BATCH, 0, DIM)


def test_missing_sample_is_not_present():
    mask = torch.tensor([[True, False], [False, False]])
    assert Tokens(torch.zeros(2, 2, DIM), mask=mask).present().tolist() == [True, False]
    assert Tokens(torch.zeros(2, 0, DIM)).present().tolist() == [False, False]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.lists(st.lists(st.integers(-1, 2), min_size=1, max_size=13), min_size=1, max_size=3))
def test_unpack_keeps_order_of_interleaved_tokens(seed, rows):
    longest = max(map(len, rows))
    labels = torch.tensor([row + [SPECIAL] * (longest - len(row)) for row in rows])
    values = torch.randn(len(rows), longest, DIM, generator=torch.Generator().manual_seed(seed))
    times = torch.arange(longest).float().expand(len(rows), -1)
    names = ("audio", "image", "text")
    again = unpack(Tokens(values, modality=labels, names=names, times=times))
    for index, name in enumerate(names):
        for sample, row in enumerate(rows):
            places = [j for j, label in enumerate(row) if label == index]
            part = again[name]
            assert part.valid()[sample].tolist() == [True] * len(places) + [False] * (len(part) - len(places))
            assert torch.equal(part.values[sample, : len(places)], values[sample, places])
            assert torch.equal(part.times[sample, : len(places)], times[sample, places])
            assert not part.values[sample, len(places) :].any()


def test_unpack_keeps_the_order_of_long_sequences():
    labels = (torch.arange(997) * 7 % 11 % 2)[None]
    again = unpack(Tokens(torch.arange(997.0)[None, :, None], modality=labels, names=("a", "b")))
    for index, name in enumerate(("a", "b")):
        assert torch.equal(again[name].values.flatten(), torch.nonzero(labels[0] == index).flatten().float())


def test_unpack_excludes_masked_interleaved_tokens():
    labels, mask = torch.tensor([[0, 1, 0, 1]]), torch.tensor([[True, True, False, True]])
    values = torch.arange(4.0)[None, :, None]
    again = unpack(Tokens(values, mask=mask, modality=labels, names=("a", "b")))
    assert again["a"].values.flatten().tolist() == [0.0]
    assert again["b"].values.flatten().tolist() == [1.0, 3.0]


@pytest.mark.parametrize("cls", [False, True])
@pytest.mark.parametrize("masked", [(), ("text",)])
def test_pooled_is_class_token_or_masked_mean(cls, masked):
    part = random_sequences(masked=masked)["text"]
    if part.mask is not None:
        part.mask[1] = False
    values = Tokens(part.values.double(), mask=part.mask, cls=cls).pooled()
    torch.testing.assert_close(values, mean_pool(part.values, part.mask, cls), **TOL[torch.float64])


def test_pooled_ignores_padding():
    values = torch.ones(1, 2, DIM)
    values[0, 1] = torch.nan
    assert Tokens(values, mask=torch.tensor([[True, False]])).pooled().tolist() == [[1.0] * DIM]
    assert Tokens(values.flip(1), mask=torch.tensor([[False, True]]), cls=True).pooled().tolist() == [[0.0] * DIM]


def test_pooled_sums_of_half_precision_do_not_overflow():
    values = torch.full((1, 1000, DIM), 100.0, dtype=torch.float16)
    mask = torch.arange(1000)[None] < 900
    assert Tokens(values, mask=mask).pooled().tolist() == [[100.0] * DIM]


def test_pooled_without_tokens_is_zero():
    assert Tokens(torch.zeros(BATCH, 0, DIM)).pooled().tolist() == [[0.0] * DIM] * BATCH


def test_ragged_sequences_are_padded_and_masked():
    rows = [torch.randn(length, DIM) for length in (2, 7, 0)]
    tokens = Tokens.ragged(rows)
    assert tokens.values.shape == (3, 7, DIM)
    assert tokens.mask.sum(dim=1).tolist() == [2, 7, 0]
    for row, values, mask in zip(rows, tokens.values, tokens.mask, strict=True):
        assert torch.equal(values[mask], row)
        assert not values[~mask].any()


def test_segment_labels():
    assert segment_labels((2, 3, 0, 1)).tolist() == [-1, -1, 0, 0, 0, 2]


class HuggingFaceOutput:
    def __init__(self, hidden):
        self.last_hidden_state = hidden


def test_as_tokens_accepts_encoder_outputs():
    hidden = torch.randn(BATCH, 7, DIM)
    ready = Tokens(hidden)
    assert as_tokens(ready, "encoder") is ready
    assert as_tokens(hidden, "encoder").values is hidden
    assert as_tokens(HuggingFaceOutput(hidden), "encoder").values is hidden
    vector = as_tokens(hidden[:, 0], "encoder")
    assert vector.values.shape == (BATCH, 1, DIM)
    assert torch.equal(vector.pooled(), hidden[:, 0])


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (torch.zeros(3, 5, 7, 7), r"encoder 'image': expected Tokens or a float tensor.*\(3, 5, 7, 7\).*map\.flatten"),
        (torch.zeros(3), r"got shape \(3,\)"),
        (torch.zeros(3, 5, dtype=torch.int64), r"got shape \(3, 5\), torch\.int64"),
        ("tokens", r"got str"),
        (HuggingFaceOutput(None), r"got NoneType"),
    ],
)
def test_as_tokens_invalid_outputs_raise(result, message):
    with pytest.raises(ShapeError, match=message):
        as_tokens(result, "encoder 'image'")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Tokens(torch.zeros(3, 5)),
            r"Tokens: expected values of shape \(batch, token, dim\), got shape \(3, 5\).*one token",
        ),
        (
            lambda: Tokens(torch.zeros(3, 2, 5), mask=torch.ones(3, 5).bool()),
            r"Tokens mask: expected shape .* = \(3, 2\), got shape \(3, 5\)",
        ),
        (lambda: Tokens(torch.zeros(3, 2, 5), modality=torch.zeros(2).long()), r"Tokens modality: .*got shape \(2,\)"),
        (lambda: Tokens(torch.zeros(3, 2, 5), times=torch.zeros(3, 1)), r"Tokens times: .*got shape \(3, 1\)"),
        (
            lambda: Tokens(torch.zeros(3, 2, 5), mask=torch.ones(3, 2)),
            r"Tokens mask: expected dtype torch\.bool.*torch\.float32.*mask\.bool\(\)",
        ),
        (lambda: Tokens.ragged([]), r"Tokens\.ragged: expected a non-empty list"),
        (lambda: Tokens.ragged([torch.zeros(2, 5), torch.zeros(2, 7)]), r"got shapes \[\(2, 5\), \(2, 7\)\]"),
        (lambda: pack({}), r"pack: expected at least one modality, got an empty mapping"),
        (
            lambda: pack({"audio": torch.zeros(2, 3, 5), "image": torch.zeros(2, 3, 7)}),
            r"pack 'image': expected \(batch, dim\) = \(2, 5\) as 'audio' has, got .*\(2, 7\)",
        ),
        (
            lambda: pack({"audio": torch.zeros(2, 3, 5), "image": torch.zeros(3, 3, 5)}),
            r"pack 'image': .*got \(batch, dim\) = \(3, 5\)",
        ),
        (lambda: pack({"audio": torch.zeros(2, 3, 5, 7)}), r"pack 'audio': expected Tokens"),
        (
            lambda: unpack(Tokens(torch.zeros(2, 3, 5))),
            r"unpack: expected tokens with modality labels, got modality=None",
        ),
    ],
)
def test_errors(make, message):
    with pytest.raises(ShapeError, match=message):
        make()


def test_output_replace_changes_given_fields_only():
    before = Output(features=torch.zeros(2, 3), names=("audio",))
    after = before.with_(logits=torch.ones(2, 1))
    assert before.logits is None
    assert after.features is before.features
    assert after.names == ("audio",)
    assert torch.equal(after.logits, torch.ones(2, 1))
