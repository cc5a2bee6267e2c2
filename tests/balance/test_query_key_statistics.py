"""Statistics of RollingQ: sums of a batch, their window over batches, weights for a target share; against loops."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.balance.rollingq.query_key_statistics import RunningSums, key_mask, query_key_sums
from equipoise.balance.rollingq.share_weights import weights_for_share
from equipoise.errors import ConfigError
from helpers.tolerance import TOL
from oracles.rollingq import means, shares, step

EXACT, SINGLE = TOL[torch.float64], TOL[torch.float32]
NAMES = ("audio", "image", "text")
INDICATORS = ("cosine", "logit", "mass", "mass_per_token")
CPU = torch.device("cpu")


def random_batch(seed, *, size=5, heads=3, keyheads=3, queries=5, keys=11, d=7, missing=False, dtype=torch.float64):
    """Query, key, labels (batch, key) in any order with special tokens, valid (batch, key), rows (batch, query)."""
    random = torch.Generator().manual_seed(seed)
    query = torch.randn(size, heads, queries, d, generator=random, dtype=torch.float64).to(dtype)
    key = torch.randn(size, keyheads, keys, d, generator=random, dtype=torch.float64).to(dtype)
    labels = torch.randint(-1, len(NAMES), (size, keys), generator=random)
    valid = torch.rand(size, keys, generator=random) < 0.8
    if missing:
        valid[0] &= labels[0] != 0
        valid[1] &= labels[1] != 2
        valid[2] = False
    rows = torch.rand(size, queries, generator=random) < 0.6
    return query, key, labels, valid, rows


def samples(*batches):
    return [sample for parts in batches for sample in zip(*(part.double().numpy() for part in parts), strict=True)]


def assert_statistics_match(total, oracle_samples, *, heads=3, d=7, tolerance=EXACT, **options):
    """Means from the sums of each head, against the loops over the samples."""
    sums = RunningSums(heads, NAMES, d, None)
    for head in range(heads):
        result = sums.means(total, head)
        query, keys, values, tokens = means(oracle_samples, NAMES, head, **options)
        torch.testing.assert_close(result.query, torch.from_numpy(query), **tolerance)
        assert list(result.keys) == list(keys)
        for name in keys:
            torch.testing.assert_close(result.keys[name], torch.from_numpy(keys[name]), **tolerance)
        relative = {"rel": tolerance["rtol"], "abs": tolerance["atol"]}
        assert result.imbalance == pytest.approx(values, **relative)
        assert result.tokens == pytest.approx(tokens)


@pytest.mark.parametrize("indicator", INDICATORS)
@pytest.mark.parametrize("missing", [False, True])
def test_statistics_against_loops(indicator, missing):
    query, key, labels, valid, rows = parts = random_batch(1, missing=missing)
    total = query_key_sums(
        query, key, labels, len(NAMES), valid=valid, rows=rows, indicator=indicator
    )  # fmt: skip
    assert_statistics_match(total, samples(parts), kind=indicator)


@pytest.mark.parametrize("indicator", INDICATORS)
def test_without_masks_every_key_and_query_counts(indicator):
    query, key, labels, valid, rows = random_batch(2)
    total = query_key_sums(query, key, labels, len(NAMES), indicator=indicator)
    everything = (query, key, labels, torch.ones_like(valid), torch.ones_like(rows))
    assert_statistics_match(total, samples(everything), kind=indicator)


@pytest.mark.parametrize("indicator", INDICATORS)
def test_shared_label_row(indicator):
    query, key, labels, valid, _ = random_batch(3)
    shared = query_key_sums(query, key, labels[0], len(NAMES), valid=valid, indicator=indicator)
    written_out = query_key_sums(query, key, labels[:1].expand(5, -1), len(NAMES), valid=valid, indicator=indicator)
    torch.testing.assert_close(shared, written_out, **EXACT)


@pytest.mark.parametrize("indicator", INDICATORS)
@pytest.mark.parametrize("keyheads", [1, 3])
def test_grouped_keys(indicator, keyheads):
    query, key, labels, valid, rows = parts = random_batch(4, heads=6, keyheads=keyheads)
    total = query_key_sums(query, key, labels, len(NAMES), valid=valid, rows=rows, indicator=indicator)
    assert_statistics_match(total, samples(parts), heads=6, kind=indicator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_is_accumulated_in_float32(dtype):
    query, key, labels, valid, rows = parts = random_batch(5, dtype=dtype)
    total = query_key_sums(query, key, labels, len(NAMES), valid=valid, rows=rows)
    assert total.dtype == torch.float64
    assert_statistics_match(total, samples(parts), tolerance=SINGLE)


def test_worked_example():
    query = torch.tensor([[[[3.0, 4.0]]], [[[0.0, 2.0]]]])
    key = torch.tensor([[[[1.0, 0.0], [3.0, 0.0], [0.0, 1.0]]], [[[0.0, 1.0], [0.0, 1.0], [5.0, 0.0]]]])
    total = query_key_sums(query, key, torch.tensor([0, 0, 1]), 2)[0]
    # Rows: audio, image, query; columns: vector sum, sum of cosines, tokens, samples.
    expected = torch.tensor([[2, 1, 0.6 + 1, 4, 2], [5, 1, 0.8 + 0, 2, 2], [3, 6, 0, 0, 2]], dtype=torch.float64)
    torch.testing.assert_close(total, expected, **SINGLE)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.sampled_from(INDICATORS))
def test_micro_batches_sum_to_the_batch(seed, cut, indicator):
    query, key, labels, valid, rows = parts = random_batch(seed, missing=True)
    full = query_key_sums(query, key, labels, 3, valid=valid, rows=rows, indicator=indicator)
    added = torch.zeros_like(full)
    for piece in (slice(0, cut), slice(cut, None)):
        q, k, modality, v, r = (part[piece] for part in parts)
        added += query_key_sums(q, k, modality, 3, valid=v, rows=r, indicator=indicator)
    torch.testing.assert_close(added, full, **EXACT)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.permutations(range(3)), st.sampled_from(INDICATORS))
def test_renaming_modalities_permutes_rows(seed, order, indicator):
    query, key, labels, valid, _ = random_batch(seed)
    renamed = torch.tensor([*order, -1])[labels]
    a = query_key_sums(query, key, labels, 3, valid=valid, indicator=indicator)
    b = query_key_sums(query, key, renamed, 3, valid=valid, indicator=indicator)
    torch.testing.assert_close(b[:, [*order, 3]], a, **EXACT)


def test_masses_of_a_sample_sum_to_one_without_special_tokens():
    query, key, labels, _, _ = random_batch(6, size=1)
    labels = labels.clamp(min=0)
    for indicator in ("mass", "mass_per_token"):
        total = query_key_sums(query, key, labels, 3, indicator=indicator)
        torch.testing.assert_close(total[:, :-1, -3].sum(dim=1), torch.ones(3, dtype=torch.float64), **EXACT)


def test_statistics_have_no_gradient():
    query, key, labels, _, _ = random_batch(7)
    assert not query_key_sums(query.requires_grad_(), key.requires_grad_(), labels, 3).requires_grad


@pytest.mark.parametrize("tail", [1, 3, None])
def test_window_contains_the_last_batches(tail):
    batches = [random_batch(seed, size=size) for seed, size in enumerate((5, 2, 3, 7, 4))]
    window = RunningSums(3, NAMES, 7, tail)
    for query, key, labels, valid, rows in batches:
        window.add(query_key_sums(query, key, labels, 3, valid=valid, rows=rows))
    assert_statistics_match(window.total(CPU), samples(*batches[-(tail or 5) :]))
    window.reset()
    assert not window.total(CPU).any()
    window.add(query_key_sums(*batches[0][:3], 3, valid=batches[0][3], rows=batches[0][4]))
    assert_statistics_match(window.total(CPU), samples(batches[0]))


def test_keep_all_ignores_the_window():
    batches = [random_batch(seed) for seed in range(5)]
    window = RunningSums(3, NAMES, 7, 2)
    for query, key, labels, valid, rows in batches:
        window.add(query_key_sums(query, key, labels, 3, valid=valid, rows=rows), keep_all=True)
    assert_statistics_match(window.total(CPU), samples(*batches))


@pytest.mark.parametrize("tail", [3, None])
def test_window_is_restored_from_state(tail):
    sums = [query_key_sums(*random_batch(seed)[:3], 3) for seed in range(7)]
    full, first, second = (RunningSums(3, NAMES, 7, tail) for _ in range(3))
    for part in sums:
        full.add(part)
    for part in sums[:4]:
        first.add(part)
    second.load(first.state())
    for part in sums[4:]:
        second.add(part)
    assert torch.equal(second.total(CPU), full.total(CPU))


def test_window_of_different_length_is_reset():
    window, other = RunningSums(3, NAMES, 7, 3), RunningSums(3, NAMES, 7, 5)
    window.add(query_key_sums(*random_batch(0)[:3], 3))
    other.add(query_key_sums(*random_batch(1)[:3], 3))
    other.load(window.state())
    assert other.cursor == 0
    assert not other.total(CPU).any()


def test_modality_missing_from_all_samples_is_excluded():
    query, key, labels, _, _ = random_batch(8)
    total = query_key_sums(query, key, labels.clamp(max=1), 3)
    assert list(RunningSums(3, NAMES, 7, None).means(total, 0).keys) == ["audio", "image"]


def test_key_mask_of_every_form():
    valid = torch.tensor([[True, True, False], [True, False, False]])
    additive = torch.zeros(2, 3).masked_fill(~valid, -torch.inf)
    per_query = valid[:, None].expand(2, 5, 3) & torch.tensor([True, False, True, True, True])[None, :, None]
    assert key_mask(None, 2, 3) is None
    for mask in (valid, additive, per_query, per_query[:, None], additive[:, None, None]):
        assert torch.equal(key_mask(mask, 2, 3), valid)
    assert torch.equal(key_mask(torch.tensor([True, False, True]), 2, 3), torch.tensor([[True, False, True]] * 2))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.02, 0.98))
def test_target_share_is_reached_or_clamped(seed, reference):
    random = torch.Generator().manual_seed(seed)
    query, audio, image = torch.randn(3, 7, generator=random, dtype=torch.float64) * 2
    keys, tokens = {"audio": audio, "image": image}, {"audio": 16.0, "image": 5.0}
    alpha = weights_for_share(query, keys, tokens, {"audio": reference, "image": 1 - reference})
    assert sum(alpha.values()) == pytest.approx(1.0)

    def share(weight):
        mixed = weight * audio / audio.norm() + (1 - weight) * image / image.norm()
        anchor = mixed / mixed.norm() * query.norm()
        plain = {name: key.numpy() for name, key in keys.items()}
        return shares(anchor.numpy(), plain, tokens)["audio"]

    expected = min(max(reference, share(0.0)), share(1.0))
    assert share(alpha["audio"]) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("expected", "end"), [({"audio": 1.0, "image": 0.0}, 1.0), ({"audio": 0.0, "image": 1.0}, 0.0)]
)
def test_target_share_of_one_is_an_endpoint(expected, end):
    query, audio, image = torch.randn(3, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    alpha = weights_for_share(query, {"audio": audio, "image": image}, {"audio": 3.0, "image": 3.0}, expected)
    assert alpha["audio"] == pytest.approx(end)


@pytest.mark.parametrize(
    "target", [{"audio": 0.7, "image": 0.7}, {"audio": 1.0}, {"audio": 0.5, "text": 0.5}, {"audio": 1.5, "image": -0.5}]
)
def test_invalid_target_shares_raise(target):
    keys = {"audio": torch.ones(3), "image": torch.ones(3)}
    with pytest.raises(
        ConfigError, match="RollingQ target_share: expected shares of exactly two modalities that sum to 1"
    ):
        weights_for_share(torch.ones(3), keys, {"audio": 1.0, "image": 1.0}, target)


def test_equal_shares_of_equal_modalities_are_the_bisector():
    query, audio, image = torch.eye(3, dtype=torch.float64)
    keys = {"audio": 2 * audio, "image": 2 * image}
    alpha = weights_for_share(query, keys, {"audio": 4.0, "image": 4.0}, {"audio": 0.5, "image": 0.5})
    _, bisector, _, _ = step(query.numpy(), {n: k.numpy() for n, k in keys.items()}, {"audio": 0.0, "image": 0.0}, 0.0)
    assert alpha == pytest.approx(bisector)
