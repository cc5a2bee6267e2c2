"""eq.Reliability: the marginalized prediction against enumeration, special cases, state, and odd inputs."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn

import equipoise as eq
from equipoise.errors import ConfigError, DataError, EquipoiseError, ShapeError
from equipoise.reliability import fitting
from equipoise.reliability.damaged_validation import InputMoments, damaged_batch
from helpers.fusion import FEATURES, OUTPUTS, batch, joint_model
from helpers.fusion_cases import FUSIONS
from helpers.tolerance import TOL

EXACT = TOL[torch.float64]
PAIR = ("audio", "image")
DISTANCES = ("knn", "mahalanobis", "energy", "input")
FORMS = ("marginal", "conformal")


def random_data(names=PAIR, *, size=40, seed=0, dtype=torch.float64, task="classification", parts=2):
    result = [batch(names, size=size, seed=seed + part, dtype=dtype) for part in range(parts)]
    for part in result:
        if task == "multilabel":
            part["target"] = torch.stack([part["target"] > 0, part["target"] > 1, part["target"] < 1], dim=1)
        elif task == "regression":
            part["target"] = 3 + part[names[0]].mean(dim=(1, 2)).to(dtype)[:, None].expand(-1, OUTPUTS)
    return result


def trained_model(names=PAIR, *, fusion=None, unimodal="probe", task="classification", dtype=torch.float64, seed=0):
    """A model whose predictions depend on all modalities, by its random weights."""
    torch.manual_seed(seed)
    fusion = fusion or eq.fusion.Concat(12)
    encoders = {name: nn.Linear(FEATURES[name], 12) for name in names}
    return eq.FusionModel(encoders, fusion, OUTPUTS, task=task, unimodal=unimodal).to(dtype).eval()


def fit_reliability(net, *, names=PAIR, task="classification", dtype=torch.float64, parts=2, **options):
    train = random_data(names, dtype=dtype, task=task, parts=parts)
    val = random_data(names, seed=50, dtype=dtype, task=task, parts=parts)
    return eq.Reliability.fit(net, train, val, **options)


def present_subsets(names):
    if len(names) <= 4:
        return [s for size in range(1, len(names) + 1) for s in itertools.combinations(names, size)]
    return [names, *(tuple(n for n in names if n != out) for out in names), *((n,) for n in names)]


def enumerated_prediction(reliable, inputs, names):
    """sum_S w_S softmax(logits_S / T), each subset as a batch that lacks the other modalities."""
    rho = reliable(inputs).reliability
    total, mixture = 0.0, 0.0

    def predicted(subset):
        left = {name: inputs[name] if name in subset else None for name in names}
        return (reliable.model(left).logits / reliable.temperature.double()).softmax(dim=1)

    alone = {name: 0.95 * predicted([name]) + 0.05 / OUTPUTS for name in names}
    for subset in present_subsets(names):
        weight = math.prod([rho[name] if name in subset else 1 - rho[name] for name in names])
        agreement = math.prod([OUTPUTS * alone[name] for name in subset]).mean(dim=1)
        weight = weight * agreement ** reliable.log_agreement.double().exp()
        probabilities = predicted(subset)
        total, mixture = total + weight, mixture + weight[:, None] * probabilities
    return mixture / total[:, None]


@pytest.mark.parametrize("names", [("audio",), PAIR, ("audio", "image", "text"), tuple(FEATURES)])
@pytest.mark.parametrize("attention", [False, True])
def test_predictions_against_enumeration(names, attention):
    net = trained_model(names, fusion=eq.fusion.JointAttention(12, heads=2, dropout=0.0) if attention else None)
    reliable = fit_reliability(net, names=names)
    inputs = batch(names, size=17, seed=99)
    output = reliable(inputs)
    assert torch.allclose(output.logits.exp(), enumerated_prediction(reliable, inputs, names), rtol=1e-6, atol=1e-9)
    assert set(output.reliability) == set(names)
    assert all(part.shape == (17,) for part in output.reliability.values())
    assert torch.equal(output.rho, torch.stack([output.reliability[name] for name in names], dim=1))
    assert {name: part.tolist() for name, part in reliable.rho(inputs).items()} == {
        name: part.tolist() for name, part in output.reliability.items()
    }


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("form", FORMS)
def test_reliability_of_1_equals_the_model(distance, form):
    net = joint_model().eval()
    reliable = fit_reliability(net, distance=distance, form=form)
    inputs = batch(size=11, seed=9)
    plain, result = net(inputs), reliable(inputs, rho=1)
    assert torch.equal(result.logits, plain.logits)
    assert torch.equal(result.features, plain.features)
    assert torch.equal(result.share, plain.share)
    assert all(bool((part == 1).all()) for part in result.reliability.values())
    # Given for each modality, the temperature is applied as well.
    tempered = reliable(inputs, rho=dict.fromkeys(PAIR, 1.0))
    assert torch.equal(tempered.logits, (plain.logits / reliable.temperature).log_softmax(dim=1))
    assert torch.equal(tempered.share, plain.share)


@pytest.mark.parametrize("fusion", sorted(FUSIONS))
def test_every_fusion(fusion, monkeypatch):
    # The fit runs the model for each subset of each copy of the validation data.
    monkeypatch.setattr(fitting, "COPIES", 2)
    names = ("audio", "image", "text")
    net = trained_model(names, fusion=FUSIONS[fusion](12))
    reliable = fit_reliability(net, names=names, parts=1)
    inputs = batch(names, size=7, seed=9)
    expected = enumerated_prediction(reliable, inputs, names)
    assert torch.allclose(reliable(inputs).logits.exp(), expected, rtol=1e-6, atol=1e-9)
    assert torch.equal(reliable(inputs, rho=1).logits, net(inputs).logits)
    conformal = fit_reliability(net, names=names, form="conformal", alpha=0.3, parts=1)
    assert bool(conformal(inputs).logits.isfinite().all())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("unimodal", "distance"),
    [
        # The heads and the distances do not depend on each other.
        (unimodal, distance)
        if unimodal == "probe" or distance == "knn"
        else pytest.param(unimodal, distance, marks=pytest.mark.slow)
        for unimodal in ("probe", "ensemble", "none")
        for distance in DISTANCES
    ],
)
def test_missing_modalities_are_masked(distance, form, unimodal):
    names = ("audio", "image", "text")
    net = trained_model(names, unimodal=unimodal)
    reliable = fit_reliability(net, names=names, distance=distance, form=form)
    inputs = batch(names, size=6, seed=9)
    has = torch.tensor([True, False, True, False, True, False])
    masked = reliable({**inputs, "mask": {"image": has}})
    absent = reliable({**inputs, "image": None})
    full = reliable(inputs)
    assert masked.reliability["image"][~has].tolist() == [0.0] * 3
    assert absent.reliability["image"].tolist() == [0.0] * 6
    assert torch.allclose(masked.logits[~has], absent.logits[~has], **EXACT)
    assert torch.allclose(masked.logits[has], full.logits[has], **EXACT)


@pytest.mark.parametrize("form", FORMS)
def test_reliability_of_0_equals_a_missing_modality(form):
    reliable = fit_reliability(trained_model(), form=form)
    inputs = batch(size=6, seed=9)
    given = {"image": 0.0}
    expected = reliable({**inputs, "image": None}, rho={"audio": 1.0}).logits
    result = reliable(inputs, rho={"audio": 1.0, **given}).logits
    assert torch.allclose(result, expected, **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_corrupted_modality_is_less_reliable(form):
    """A model that reads the class from both modalities, one of which is replaced by large values."""
    torch.manual_seed(0)

    def classes(seed, size=200):
        random = torch.Generator().manual_seed(seed)
        target = torch.randint(OUTPUTS, (size,), generator=random)
        one = torch.nn.functional.one_hot(target, OUTPUTS).double()[:, None]
        return {
            name: one + 0.1 * torch.randn(size, 4, OUTPUTS, generator=random, dtype=torch.float64) for name in PAIR
        } | {"target": target}

    net = eq.FusionModel({name: nn.Identity() for name in PAIR}, eq.fusion.Concat(OUTPUTS), OUTPUTS, unimodal="none")
    net = net.double()
    with torch.no_grad():
        net.head.weight.copy_(20 * torch.cat([torch.eye(OUTPUTS)] * 2, dim=1))
        net.head.bias.zero_()
    # A gain is harmless for this model, and would teach that large values are.
    reliable = eq.Reliability.fit(net, [classes(0)], [classes(1)], form=form, corruptions=["white_noise"])
    test = classes(2)
    target = test["target"]
    damaged = {**test, "audio": -30 * test["audio"]}
    plain = (net(damaged).logits.argmax(dim=1) == target).double().mean()
    output = reliable(damaged)
    assert float(plain) < 0.1
    assert float((output.logits.argmax(dim=1) == target).double().mean()) > 0.95
    low = float(output.reliability["audio"].mean())
    assert low < 0.4
    assert float(output.reliability["image"].mean()) > low + 0.3
    clean = reliable(test)
    assert float((clean.logits.argmax(dim=1) == target).double().mean()) > 0.95
    assert all(float(part.mean()) > low + 0.3 for part in clean.reliability.values())


def test_conformal_form_masks_by_threshold():
    alpha = 0.1
    reliable = fit_reliability(trained_model(), form="conformal", alpha=alpha)
    inputs = batch(size=500, seed=9)
    output = reliable(inputs)
    for part in output.reliability.values():
        assert set(part.tolist()) <= {0.0, 1.0}
        # The inputs are exchangeable: 80 validation samples, 500 new ones.
        assert float(1 - part.mean()) == pytest.approx(
            alpha, abs=4 * math.sqrt(alpha * (1 - alpha) * (1 / 80 + 1 / 500))
        )
    kept = output.rho > 0
    kept |= ~kept.any(dim=1, keepdim=True)
    mask = {name: kept[:, index] for index, name in enumerate(PAIR)}
    expected = reliable.model({**inputs, "mask": mask}).logits / reliable.temperature
    assert torch.allclose(output.logits, expected.log_softmax(dim=1), **EXACT)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("task", ["multilabel", "regression"])
def test_all_tasks(form, task):
    net = trained_model(task=task)
    reliable = fit_reliability(net, task=task, form=form)
    inputs = batch(size=13, seed=9)
    output = reliable(inputs)
    assert bool(output.logits.isfinite().all())
    ones = reliable(inputs, rho=dict.fromkeys(PAIR, 1.0)).logits
    assert torch.allclose(ones, net(inputs).logits / (reliable.temperature if task == "multilabel" else 1.0), **EXACT)
    if form == "marginal":
        low, high = (reliable(inputs, rho={"audio": 1.0, "image": value}).logits for value in (0.0, 1.0))
        half = reliable(inputs, rho={"audio": 1.0, "image": 0.5}).logits
        if task == "regression":
            assert torch.allclose(half, (low + high) / 2, **EXACT)
        else:
            # The agreement of the two modalities changes the weights from one half.
            assert bool(
                (half >= torch.minimum(low, high) - 1e-9).all() & (half <= torch.maximum(low, high) + 1e-9).all()
            )
    with pytest.raises(ConfigError, match="a regression, which has no energy"):
        eq.Reliability(trained_model(task="regression"), distance="energy")


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("form", FORMS)
def test_save_load_and_state_dict(distance, form, tmp_path):
    reliable = fit_reliability(trained_model(), distance=distance, form=form)
    inputs = batch(size=11, seed=9)
    expected = reliable(inputs)
    path = reliable.save(tmp_path / "reliable.safetensors")
    loaded = eq.Reliability.load(path, trained_model(seed=5))
    # The state contains distance and form.
    other = eq.Reliability(trained_model(seed=6))
    other.load_state_dict(reliable.state_dict())
    for again in (loaded, other, copy.deepcopy(reliable)):
        output = again(inputs)
        assert torch.equal(output.logits, expected.logits)
        assert torch.equal(output.rho, expected.rho)
        assert (again.distance, again.form) == (distance, form)


def test_damaged_and_foreign_files_raise(tmp_path):
    reliable = fit_reliability(trained_model())
    path = reliable.save(tmp_path / "reliable.safetensors")
    with pytest.raises(DataError, match=r"expected a file of Reliability\.save for this model"):
        eq.Reliability.load(path, trained_model(("audio", "text")))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match=r"expected a file of Reliability\.save"):
        eq.Reliability.load(path, trained_model())
    with pytest.raises(DataError, match=r"expected a file of Reliability\.save"):
        eq.Reliability.load(tmp_path / "none", trained_model())


@pytest.mark.parametrize("distance", DISTANCES)
def test_fit_depends_on_seed_only(distance):
    states = [fit_reliability(trained_model(), distance=distance, seed=seed).state_dict() for seed in (3, 3, 4)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not all(torch.equal(states[0][key], states[2][key]) for key in states[0])


def test_fit_does_not_change_the_model_or_the_global_state():
    net = trained_model()
    before = copy.deepcopy(net.state_dict())
    state = torch.random.get_rng_state()
    fit_reliability(net)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in before.items())
    assert all(parameter.grad is None for parameter in net.parameters())


def test_iterators_are_consumed_once():
    expected = fit_reliability(trained_model())
    result = eq.Reliability.fit(trained_model(), iter(random_data()), iter(random_data(seed=50)))
    assert torch.equal(result.intercept, expected.intercept)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("form", FORMS)
def test_nan_inputs_count_as_missing(distance, form):
    reliable = fit_reliability(trained_model(), distance=distance, form=form)
    inputs = batch(size=6, seed=9)
    full = reliable(inputs)
    for value in (math.nan, math.inf):
        bad = {**inputs, "image": inputs["image"].clone()}
        bad["image"][2, 0, 0] = value
        output = reliable(bad)
        assert bool(output.logits.isfinite().all())
        assert output.reliability["image"][2] == 0
        rest = [0, 1, 3, 4, 5]
        assert torch.allclose(output.logits[rest], full.logits[rest], **EXACT)
        missing = reliable({**inputs, "image": None}).logits
        assert torch.allclose(output.logits[2], missing[2], **EXACT)
        bad["audio"] = torch.full_like(inputs["audio"], value)
        assert bool(reliable(bad).logits.isfinite().all())


def test_nan_in_training_and_validation_data_is_excluded():
    train, val = random_data(), random_data(seed=50)
    for part in (*train, *val):
        part["image"][3] = math.nan
    reliable = eq.Reliability.fit(trained_model(), train, val)
    assert all(bool(value.isfinite().all()) for value in reliable.state_dict().values())
    assert bool(reliable(batch(size=6, seed=9)).logits.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_low_precision(dtype, form):
    inputs = batch(size=11, seed=9)
    expected = fit_reliability(trained_model(), form=form, alpha=0.3)(inputs)
    low = {name: inputs[name].to(dtype) for name in PAIR}
    output = fit_reliability(trained_model(dtype=dtype), form=form, alpha=0.3, dtype=dtype)(low)
    assert output.logits.dtype == torch.float32
    if form == "marginal":
        assert torch.allclose(output.logits.double(), expected.logits, atol=0.3)
        assert torch.allclose(output.rho.double(), expected.rho.double(), atol=0.15)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = fit_reliability(trained_model(dtype=torch.float32), form=form, dtype=torch.float32)
        assert bool(mixed({name: inputs[name].float() for name in PAIR}).logits.isfinite().all())


def test_wrapper_supports_to_and_backward():
    reliable = fit_reliability(trained_model(dtype=torch.float32), dtype=torch.float32).double()
    inputs = {name: value.requires_grad_() for name, value in batch(PAIR, size=3).items() if name in PAIR}
    output = reliable(inputs)
    assert output.logits.dtype == torch.float64
    reliable.loss(output.logits, torch.tensor([0, 1, 2])).backward()
    assert all(bool(value.grad.isfinite().all()) for value in inputs.values())


def test_token_ids_and_mappings():
    class Text(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(20, 12)

        def forward(self, ids):
            return self.table(ids)

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 12)

        def forward(self, value):
            return self.linear(value["pixels"])

    torch.manual_seed(0)
    net = eq.FusionModel({"text": Text(), "image": Pair()}, eq.fusion.Concat(12), OUTPUTS)

    def part(seed):
        random = torch.Generator().manual_seed(seed)
        return {
            "text": torch.randint(1, 20, (30, 6), generator=random),
            "image": {"pixels": torch.randn(30, 4, 3, generator=random), "grid": torch.ones(30, 2, dtype=torch.long)},
            "target": torch.randint(OUTPUTS, (30,), generator=random),
        }

    for distance in DISTANCES:
        output = eq.Reliability.fit(net, [part(0)], [part(1)], distance=distance)(part(2))
        assert bool(output.logits.isfinite().all())
        assert bool(((output.rho > 0) & (output.rho <= 1)).all())


def test_calibration_corruptions_can_be_chosen():
    fitted = {
        name: fit_reliability(trained_model(), corruptions=given).intercept
        for name, given in (("all", None), ("noise", ["white_noise"]), ("again", ["white_noise"]))
    }
    assert torch.equal(fitted["noise"], fitted["again"])
    assert not torch.equal(fitted["noise"], fitted["all"])
    assert bool(fit_reliability(trained_model(), kinds={"audio": "spectrogram"}).intercept.isfinite().all())
    for given, match in (
        ({"corruptions": ["dust"]}, "known corruption, got 'dust'"),
        ({"corruptions": ["missing"]}, "one or more corruptions other than 'missing'"),
        ({"kinds": {"sound": "sequence"}}, "known modality, got 'sound'"),
        ({"kinds": {"audio": "smell"}}, "known kind of input, got 'smell'"),
    ):
        with pytest.raises(ConfigError, match=match):
            fit_reliability(trained_model(), **given)


def test_damaged_validation_data_keep_a_modality_and_all_corruptions_occur():
    names = ("audio", "image")
    inputs = batch(names, size=400, seed=1) | {"target": torch.zeros(400)}
    moments = InputMoments(names)
    moments.add(inputs)
    random = torch.Generator().manual_seed(0)
    found = damaged_batch(inputs, names, moments, random, ["zeros", "gain"], {})
    changed = torch.stack([(found[name] != inputs[name]).flatten(1).any(dim=1) for name in names], dim=1)
    assert not bool(changed.all(dim=1).any())
    assert 0.2 < float(changed.double().mean()) < 0.45
    zero = (found["audio"] == 0).flatten(1).any(dim=1)
    assert 20 < int(zero.sum()) < int(changed[:, 0].sum()) - 20
    again = damaged_batch(inputs, names, moments, torch.Generator().manual_seed(0), ["zeros", "gain"], {})
    assert all(torch.equal(found[name], again[name]) for name in names)


def test_errors():
    net = trained_model()
    train, val = random_data(), random_data(seed=50)
    with pytest.raises(ConfigError, match="known distance, got 'cosine'"):
        eq.Reliability(net, distance="cosine")
    with pytest.raises(ConfigError, match="known form, got 'hard'"):
        eq.Reliability(net, form="hard")
    with pytest.raises(ConfigError, match="prototypes >= 5, got prototypes = 4"):
        fit_reliability(net, prototypes=4)
    with pytest.raises(ConfigError, match="0 < alpha < 1, got alpha = 0"):
        eq.Reliability(net, alpha=0)
    with pytest.raises(ConfigError, match="expected a FusionModel"):
        eq.Reliability(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="expected a fitted wrapper"):
        eq.Reliability(net)(train[0])
    with pytest.raises(ShapeError, match=r"Reliability\.fit train: expected at least one batch, got none"):
        eq.Reliability.fit(net, [], val)
    with pytest.raises(ShapeError, match=r"Reliability\.fit val: expected at least one batch, got none"):
        eq.Reliability.fit(net, train, iter(()))
    with pytest.raises(ShapeError, match="expected a 'target' in every batch, got audio, image"):
        eq.Reliability.fit(net, [{name: train[0][name] for name in PAIR}], val)
    with pytest.raises(ShapeError, match=r"fit train 'image': expected two or more training samples"):
        eq.Reliability.fit(net, [{**train[0], "image": None}], val)
    with pytest.raises(ShapeError, match=r"fit val 'image': expected validation samples with the modality"):
        eq.Reliability.fit(net, train, [{**val[0], "image": None}])
    reliable = eq.Reliability.fit(net, train, val)
    with pytest.raises(ConfigError, match="known modality, got 'sound'"):
        reliable(train[0], rho={"sound": 1.0})
    with pytest.raises(ConfigError, match=r"'image': expected rho in \[0, 1\]"):
        reliable(train[0], rho={"image": 1.5})
    with pytest.raises(EquipoiseError, match="a batch with audio, image"):
        reliable({"audio": train[0]["audio"]})


def test_wrapper_can_be_diagnosed():
    reliable = fit_reliability(trained_model(fusion=eq.fusion.JointAttention(12, heads=2)))
    loader = random_data(seed=9)
    result = eq.diagnose(reliable, loader)
    assert result.names == PAIR
    for metric in ("accuracy", "accuracy_noise/audio", "accuracy_mask/image", "noise_attention_r", "shapley/audio"):
        assert metric in result.metrics, (metric, result.skipped)
    masked = eq.diagnostics.mask_modality(reliable, loader)
    expected = [reliable({**part, "image": None}).logits for part in loader]
    assert torch.allclose(masked.logits["image"].double(), torch.cat(expected), **TOL[torch.float32])
