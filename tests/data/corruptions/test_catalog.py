"""The catalog of corruptions: masks, severities, seeds, and each corruption against its definition."""

import math

import pytest
import torch

import equipoise as eq
from equipoise.data.corruptions import (
    CORRUPTIONS,
    KINDS,
    SEVERITIES,
    corrupt_batch,
    corrupt_input,
    corruption_names,
    infer_kind,
)
from equipoise.errors import ConfigError, ShapeError
from helpers.tolerance import TOL

SHAPES = {
    "sequence": (7, 13, 3), "spectrogram": (7, 5, 13), "image": (7, 2, 11, 13), "vector": (7, 13), "tokens": (7, 13),
}  # fmt: skip
LENGTHS = torch.tensor([13, 4, 9, 1, 0, 13, 7])
EVERY = [(kind, name) for kind in KINDS for name in corruption_names(kind)]
TIMED = [(kind, name) for kind, name in EVERY if kind in ("sequence", "spectrogram", "tokens")]


def random_inputs(kind, *, seed=0, shape=None):
    random = torch.Generator().manual_seed(seed)
    shape = shape or SHAPES[kind]
    if kind == "tokens":
        return torch.randint(1, 50, shape, generator=random)
    return torch.randn(shape, generator=random) + 0.3


def frames_of(values, kind):
    """(batch, frame, ...), as the mask counts them."""
    return values.movedim(-1, 1) if kind == "spectrogram" else values


def padded(kind, fill):
    """Inputs whose masked frames have the value ``fill``, and their mask."""
    mask = torch.arange(13) < LENGTHS[:, None]
    values = frames_of(random_inputs(kind), kind).clone()
    values[~mask] = fill
    return (values.movedim(1, -1) if kind == "spectrogram" else values), mask


def sequence(*values):
    return torch.tensor(values)[None, :, None]


def test_catalog_is_available_in_diagnostics():
    assert eq.diagnostics.corruptions.CORRUPTIONS is CORRUPTIONS
    assert set(corruption_names()) == set(CORRUPTIONS)
    assert {name for kind in KINDS for name in corruption_names(kind)} == set(CORRUPTIONS)


@pytest.mark.parametrize(("kind", "name"), EVERY)
@pytest.mark.parametrize("severity", SEVERITIES)
def test_shape_type_and_seed(kind, name, severity):
    values = random_inputs(kind)
    before = values.clone()
    state = torch.random.get_rng_state()
    first = corrupt_input(values, name, severity=severity, kind=kind, seed=3)
    again = corrupt_input(values, name, severity=severity, kind=kind, seed=3)
    assert torch.equal(first.values, again.values)
    assert first.values.shape == values.shape
    assert first.values.dtype == values.dtype
    assert bool(first.values.isfinite().all())
    assert torch.equal(values, before)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_severity_increases_the_distance(kind, name):
    values = random_inputs(kind, shape=(61, *SHAPES[kind][1:]))

    def distance(severity):
        result = corrupt_input(values, name, severity=severity, kind=kind, seed=1)
        if name == "shift":
            # Independent values are equally far from all others; the vacated frames are 0.
            return float((result.values == 0).double().mean())
        changed = (result.values != values) if kind == "tokens" else (result.values - values).square()
        gone = 0.0 if result.mask is None else float((~result.mask).float().mean())
        return float(changed.double().mean()) + gone

    distances = [distance(severity) for severity in SEVERITIES]
    assert distances[0] > 0
    assert distances[4] > distances[0]
    assert distances == pytest.approx(sorted(distances), rel=0.1)


@pytest.mark.parametrize(("kind", "name"), TIMED)
@pytest.mark.parametrize("severity", [1, 3, 5])
def test_padding_has_no_influence_and_is_kept(kind, name, severity):
    if kind == "tokens":
        fills = (0, 0)
    else:
        fills = (0.0, math.nan)
    actual = []
    for fill in fills:
        values, mask = padded(kind, fill)
        result = corrupt_input(values, name, severity=severity, kind=kind, mask=mask, seed=5)
        kept = mask if result.mask is None else result.mask
        if name not in ("swapped", "missing"):
            rows = frames_of(result.values, kind)[~mask]
            assert bool((rows.isnan() if math.isnan(fill) else rows == 0).all())
            assert not bool((kept & ~mask).any())
        actual.append(frames_of(result.values, kind)[kept])
    assert torch.equal(actual[0], actual[1])
    assert bool(actual[0].isfinite().all())


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_samples_without_the_modality_are_unchanged(kind, name):
    values = random_inputs(kind)
    has = torch.tensor([True, False, True, True, False, True, True])
    result = corrupt_input(values, name, kind=kind, mask=has, seed=2)
    mask = has if result.mask is None else result.mask
    assert not bool(mask[~has].any())
    assert torch.equal(result.values[~has], values[~has])


def test_levels_have_five_severities_and_destructive_ones_are_marked():
    values = torch.randn(211, 17, 3)
    for name, one in CORRUPTIONS.items():
        assert len(one.levels) == len(SEVERITIES)
        if one.function is None or "sequence" not in one.kinds:
            continue
        result = corrupt_input(values, name, seed=1).values
        r = torch.corrcoef(torch.stack([result.flatten(), values.flatten()]))[0, 1].nan_to_num(0.0)
        # A destroyed input does not depend on the original one.
        assert (abs(float(r)) < 0.05) or not one.destroys, name


def test_noise_has_the_given_statistics():
    values = random_inputs("sequence", shape=(31, 101, 3))
    result = corrupt_input(values, "white_noise", statistics=(7.0, 2.0)).values
    assert float(result.mean()) == pytest.approx(7.0, abs=0.1)
    assert float(result.std()) == pytest.approx(2.0, abs=0.1)
    scale = torch.arange(1, 32)[:, None, None]
    own = corrupt_input(scale * values, "own_noise", statistics=(7.0, 2.0)).values
    assert torch.allclose(own.std(dim=(1, 2)) / scale.flatten(), torch.ones(31), atol=0.15)


def test_mixing_keeps_the_variance():
    values = torch.randn(67, 101, 3)
    for severity in SEVERITIES:
        assert float(corrupt_input(values, "white_noise", severity=severity).values.std()) == pytest.approx(1, abs=0.03)


def test_additive_noise_has_the_signal_to_noise_ratio():
    values = 5 + 3 * torch.randn(41, 211, 3)
    for severity, decibels in zip(SEVERITIES, CORRUPTIONS["additive"].levels, strict=True):
        noise = corrupt_input(values, "additive", severity=severity).values - values
        ratio = values.var(dim=(1, 2)) / noise.var(dim=(1, 2))
        assert float(10 * ratio.log10().mean()) == pytest.approx(decibels, abs=0.3)


def test_occluded_region_sizes():
    values = torch.ones(13, 20, 3)
    for severity, extent in zip(SEVERITIES, CORRUPTIONS["zeros"].levels, strict=True):
        zero = corrupt_input(values, "zeros", severity=severity).values[..., 0] == 0
        assert torch.equal(zero.sum(dim=1), torch.full((13,), round(20 * extent)))
        edges = zero.int().diff(dim=1).abs().sum(dim=1)
        assert int(edges.max()) <= 2
    box = corrupt_input(torch.ones(1, 1, 20, 20), "zeros", severity=3).values[0, 0] == 0
    rows, columns = box.any(dim=1), box.any(dim=0)
    assert torch.equal(box, rows[:, None] & columns[None])
    assert 0.6 <= float(box.float().mean()) < 0.75


def test_hand_computed_corruptions():
    values = sequence(1.0, 2.0, 3.0, 4.0)
    assert corrupt_input(values, "gain", severity=2).values.flatten().tolist() == [2, 4, 6, 8]
    assert corrupt_input(values, "attenuation", severity=2).values.flatten().tolist() == [0.5, 1, 1.5, 2]
    limits = corrupt_input(values, "clipping", severity=3, statistics=(2.0, 0.5)).values
    assert limits.flatten().tolist() == [1.5, 2, 2.5, 2.5]
    assert corrupt_input(values, "frozen").values.flatten().tolist() == [1, 1, 1, 1]
    constant = corrupt_input(values.expand(5, -1, -1), "constant", statistics=(1.0, 2.0)).values
    assert bool((constant == constant[:, :1]).all())
    assert len(constant[:, 0].unique()) == 5
    ramp = corrupt_input(values, "drift", severity=3, statistics=(0.0, 3.0)).values - values
    assert ramp.flatten().abs().tolist() == pytest.approx([0, 2, 4, 6], abs=TOL[torch.float32]["atol"])
    # A window of 0.8 of four frames reaches two frames to each side.
    assert corrupt_input(values, "blur").values.flatten().tolist() == [2, 2.5, 2.5, 3]
    moved = corrupt_input(values, "shift").values.flatten().tolist()
    assert moved in ([0, 0, 1, 2], [3, 4, 0, 0])


def test_spectrograms_are_logarithmic():
    values = random_inputs("spectrogram")
    result = corrupt_input(values, "gain", kind="spectrogram", severity=2, statistics=(0.0, 3.0)).values
    assert torch.allclose(result - values, torch.full_like(values, 3 * math.log(2)), **TOL[torch.float32])


def test_vector_offsets_are_equal_in_all_samples():
    values = random_inputs("vector")
    offset = corrupt_input(values, "drift", severity=2).values - values
    assert torch.allclose(offset, offset[:1].expand_as(offset), **TOL[torch.float32])
    assert torch.allclose(offset.abs(), torch.ones_like(offset), **TOL[torch.float32])


def test_shuffled_and_dropped_frames():
    values = torch.arange(40.0)[None, :, None].expand(7, -1, 2)
    result = corrupt_input(values, "shuffled", severity=5).values
    assert torch.equal(result.sort(dim=1).values, values)
    assert not torch.equal(result[0], result[1])
    some = corrupt_input(values, "shuffled", severity=1).values
    assert int((some[..., 0] != values[..., 0]).sum(dim=1).max()) <= 8
    lost = corrupt_input(values + 1, "dropped", severity=3).values == 0
    # Packets of two frames each.
    assert torch.equal(lost[:, ::2], lost[:, 1::2])
    assert 0.2 < float(lost.float().mean()) < 0.6


def test_swapped_samples_have_input_and_mask_of_another_sample():
    values, mask = padded("sequence", 0.0)
    values[..., 0] = torch.where(mask, torch.arange(7.0)[:, None], values[..., 0])
    result = corrupt_input(values, "swapped", mask=mask, seed=4)
    present = [sample for sample in range(7) if mask[sample].any()]
    sources = [int(result.values[sample, 0, 0]) for sample in present]
    assert sorted(sources) == present
    assert all(source != sample for source, sample in zip(sources, present, strict=True))
    assert torch.equal(result.mask[present], mask[sources])
    single = corrupt_input(values[:1], "swapped")
    assert torch.equal(single.values, values[:1])


def test_missing_samples_are_masked():
    values, mask = padded("sequence", 0.0)
    assert not bool(corrupt_input(values, "missing", mask=mask).mask.any())
    some = corrupt_input(torch.ones(400, 2, 3), "missing", severity=2).mask
    assert 0.3 < float((~some).float().mean()) < 0.5
    batch = {"audio": values, "image": values, "mask": {"audio": mask}, "target": torch.zeros(7)}
    result = corrupt_batch(batch, "image", "missing")
    assert result["mask"]["audio"] is mask
    assert not bool(result["mask"]["image"].any())
    assert "image" not in batch["mask"]


def test_dropped_and_replaced_tokens():
    ids = torch.tensor([[5, 6, 7, 0], [8, 9, 0, 0]])
    result = corrupt_input(ids, "dropped", severity=5, mask=ids > 0)
    assert torch.equal(result.mask, result.values > 0)
    other = corrupt_input(ids, "replaced")
    assert torch.equal(other.values > 0, ids > 0)
    assert set(other.values[other.values > 0].tolist()) <= {5, 6, 7, 8, 9}


def test_kinds_are_inferred_from_shapes():
    assert [infer_kind(random_inputs(kind)) for kind in ("sequence", "image", "vector", "tokens")] == [
        "sequence", "image", "vector", "tokens",
    ]  # fmt: skip
    for wrong in (torch.zeros(3), torch.zeros(2, 3, dtype=torch.bool), torch.zeros(1, 2, 3, 4, 5), "text"):
        with pytest.raises(ShapeError, match="expected a floating tensor"):
            infer_kind(wrong)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", corruption_names("sequence"))
def test_dtype_is_kept(name, dtype):
    values, mask = padded("sequence", 0.0)
    result = corrupt_input(values.to(dtype), name, mask=mask, seed=1)
    exact = corrupt_input(values.to(dtype).double(), name, mask=mask, seed=1)
    assert result.values.dtype == dtype
    assert torch.allclose(result.values.double(), exact.values, rtol=0.05, atol=0.1)


@pytest.mark.parametrize("name", corruption_names())
def test_empty_batches(name):
    kind = CORRUPTIONS[name].kinds[0]
    empty = random_inputs(kind)[:0]
    assert corrupt_input(empty, name, kind=kind).values.shape == empty.shape


def test_errors():
    values = random_inputs("sequence")
    with pytest.raises(ConfigError, match=r"known corruption, got 'frosen'\. Did you mean 'frozen'"):
        corrupt_input(values, "frosen")
    with pytest.raises(ConfigError, match="a severity of 1, 2, 3, 4 or 5, got 0"):
        corrupt_input(values, "frozen", severity=0)
    with pytest.raises(ConfigError, match=r"a corruption of the kind 'vector': .* got 'frozen', which fits sequence"):
        corrupt_input(random_inputs("vector"), "frozen")
    with pytest.raises(ConfigError, match="known kind of input, got 'video'"):
        corrupt_input(values, "zeros", kind="video")
    with pytest.raises(ConfigError, match="known kind of input, got 'video'"):
        corruption_names("video")
    with pytest.raises(ShapeError, match=r"floating tensor .* for the kind 'image'"):
        corrupt_input(random_inputs("vector"), "zeros", kind="image")
    with pytest.raises(ShapeError, match="a mask of 7 samples, got shape"):
        corrupt_input(values, "zeros", mask=torch.ones(3, dtype=torch.bool))
    with pytest.raises(ConfigError, match="two finite numbers with std >= 0"):
        corrupt_input(values, "zeros", statistics=(0.0, -1.0))
    with pytest.raises(ShapeError, match="'audio': expected a tensor in the batch, got NoneType"):
        corrupt_batch({"audio": None}, "audio", "zeros")
