"""RollingQ on a layer: statistics, decisions and rotations, against loops over the same batches."""

import pytest
import torch
from torch import nn

import equipoise as eq
from equipoise.errors import ConfigError
from helpers.fusion import DIM, NAMES, batch, joint_model, oracle_samples, run_forward, split_batch
from helpers.tolerance import TOL
from oracles.rollingq import means, shares, step

EXACT, SINGLE = TOL[torch.float64], TOL[torch.float32]
TWO = ("audio", "image")
INDICATORS = ("cosine", "logit", "mass", "mass_per_token")


def build_balancer(model, **options):
    return eq.balance.RollingQ(model.fusion.attention, **{"beta": 0.0, "tail": None, "max_rotations": None, **options})


def expected_rotation(result, names, heads, *, rho=1.0, **options):
    """Returns rotation and imbalance of each head, computed with loops."""
    rotations, air = [], []
    for head in range(heads):
        query, keys, values, _ = means(result, names, head, **options)
        imbalance, _, _, rotation = step(query, keys, values, rho)
        rotations.append(torch.from_numpy(rotation))
        air.append(imbalance)
    return torch.stack(rotations), air


def assert_log(log, air, names):
    for name in names:
        assert log[f"air/{name}"] == pytest.approx(sum(row[name] for row in air) / len(air), abs=EXACT["rtol"])
    assert log["air"] == log[f"air/{names[0]}"]


@pytest.mark.parametrize("indicator", INDICATORS)
@pytest.mark.parametrize("names", [TWO, NAMES[:3], NAMES])
@pytest.mark.parametrize("heads", [1, 3])
def test_rotation_against_loops(names, heads, indicator):
    model = joint_model(names, heads=heads)
    rolling = build_balancer(model, indicator=indicator, rho=0.7)
    batches = [batch(names, size=size, seed=size) for size in (5, 3, 2)]
    run_forward(model, batches)
    rotation, air = expected_rotation(oracle_samples(model, batches), names, heads, rho=0.7, kind=indicator)
    log = rolling.end_epoch()
    torch.testing.assert_close(rolling.rotation, rotation, **EXACT)
    assert_log(log, air, names)
    torch.testing.assert_close(
        rolling.air, torch.tensor([[row[n] for n in names] for row in air], dtype=torch.float64), **EXACT
    )
    assert rolling.air.dtype == torch.float64
    assert log["rotated"] == 1.0


def test_samples_without_a_modality_contribute_the_others():
    model = joint_model(NAMES[:3], heads=2)
    rolling = build_balancer(model)
    batches = [batch(NAMES[:3], size=7, seed=1, missing=("audio", "text")), batch(NAMES[:3], size=5, seed=2)]
    run_forward(model, batches)
    rotation, air = expected_rotation(oracle_samples(model, batches), NAMES[:3], 2)
    log = rolling.end_epoch()
    torch.testing.assert_close(rolling.rotation, rotation, **EXACT)
    assert_log(log, air, NAMES[:3])


def test_batches_without_one_modality():
    model = joint_model(NAMES[:3])
    rolling = build_balancer(model)
    batches = [batch(NAMES[:3], seed=seed) for seed in range(3)]
    batches[1]["image"] = None
    run_forward(model, batches)
    rotation, air = expected_rotation(oracle_samples(model, batches), NAMES[:3], 2)
    assert_log(rolling.end_epoch(), air, NAMES[:3])
    torch.testing.assert_close(rolling.rotation, rotation, **EXACT)


def test_epoch_without_one_of_three_modalities_balances_the_others():
    model = joint_model(NAMES[:3])
    rolling = build_balancer(model)
    batches = [{**batch(NAMES[:3], seed=seed), "text": None} for seed in range(2)]
    run_forward(model, batches)
    rotation, air = expected_rotation(oracle_samples(model, batches), NAMES[:3], 2)
    log = rolling.end_epoch()
    torch.testing.assert_close(rolling.rotation, rotation, **EXACT)
    assert log["air/text"] != log["air/text"]
    mean = [sum(row[name] for row in air) / 2 for name in TWO]
    assert log["spread"] == pytest.approx(abs(mean[0] - mean[1]) / 2, abs=1e-6)


def test_epoch_with_one_modality_warns_without_rotation():
    model = joint_model()
    rolling = build_balancer(model)
    run_forward(model, [{**batch(), "image": None}])
    with pytest.warns(UserWarning, match="RollingQ skipped a rotation: fewer than two modalities have statistics"):
        log = rolling.end_epoch()
    assert log["rotated"] == 0.0
    assert torch.equal(rolling.rotation, torch.eye(DIM // 2, dtype=torch.float64).repeat(2, 1, 1))


def test_zero_query_warns_without_rotation():
    model = joint_model(heads=1)
    with torch.no_grad():
        model.fusion.attention.query.weight.zero_()
        model.fusion.attention.query.bias.zero_()
    rolling = build_balancer(model)
    run_forward(model, [batch()])
    with pytest.warns(UserWarning, match="RollingQ skipped a rotation: the mean query is zero"):
        assert rolling.end_epoch()["rotated"] == 0.0


def test_rotations_are_composed():
    model = joint_model()
    rolling = build_balancer(model)
    total = torch.eye(DIM // 2, dtype=torch.float64)
    for epoch in range(4):
        batches = [batch(size=3, seed=10 * epoch + seed) for seed in range(2)]
        run_forward(model, batches)
        rotation, _ = expected_rotation(oracle_samples(model, batches, rolling.rotation), TWO, 2)
        total = total @ rotation
        assert rolling.end_epoch()["rotations"] == epoch + 1
        torch.testing.assert_close(rolling.rotation, total, **EXACT)
    eye = torch.eye(DIM // 2, dtype=torch.float64).expand(2, -1, -1)
    torch.testing.assert_close(rolling.rotation @ rolling.rotation.mT, eye, **EXACT)


@pytest.mark.parametrize("query_rows", ["first", "all"])
@pytest.mark.parametrize("heads", ["per_head", "joint"])
def test_layer_output_uses_rotated_queries(query_rows, heads):
    model = joint_model(shortcut=False).eval()
    rolling = build_balancer(model, query_rows=query_rows, heads=heads)
    run_forward(model, [batch()])
    rolling.end_epoch()
    layer, tokens = model.fusion.attention.eval(), torch.randn(2, 5, DIM, dtype=torch.float64)
    block = torch.block_diag(*rolling.rotation)
    query, turned = layer.query(tokens), layer.query(tokens) @ block
    rows = torch.cat([turned[:, :1], query[:, 1:]], dim=1) if query_rows == "first" else turned
    split = [part.unflatten(-1, (2, -1)).transpose(1, 2) for part in (rows, layer.key(tokens), layer.value(tokens))]
    attended = torch.nn.functional.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)
    assert float((turned - query).detach().norm()) > 0.1
    torch.testing.assert_close(layer(tokens).output, layer.out(attended), **EXACT)


@pytest.mark.parametrize("heads", [1, 2])
def test_joint_heads_equal_one_wide_head(heads):
    model, wide = joint_model(heads=heads), joint_model(heads=1)
    rolling, reference = build_balancer(model, heads="joint"), build_balancer(wide)
    for each in (model, wide):
        run_forward(each, [batch()])
    assert rolling.end_epoch()["air"] == pytest.approx(reference.end_epoch()["air"])
    torch.testing.assert_close(rolling.rotation, reference.rotation, **EXACT)


@pytest.mark.parametrize("tail", [1, 2, 3, 16])
def test_tail_uses_the_last_batches(tail):
    model = joint_model()
    rolling = build_balancer(model, tail=tail)
    batches = [batch(size=size, seed=size) for size in (5, 2, 3, 7)]
    run_forward(model, batches)
    rotation, _ = expected_rotation(oracle_samples(model, batches[-tail:]), TWO, 2)
    rolling.end_epoch()
    torch.testing.assert_close(rolling.rotation, rotation, **EXACT)


def test_statistics_are_reset_each_epoch():
    model = joint_model()
    rolling = build_balancer(model)
    run_forward(model, [batch(seed=1)])
    rolling.end_epoch()
    kept = rolling.rotation.clone()
    assert rolling.end_epoch()["rotated"] == 0.0
    assert torch.equal(rolling.rotation, kept)


@pytest.mark.parametrize("indicator", INDICATORS)
def test_accumulated_batches_equal_one_batch(indicator):
    rotations = []
    full = batch(size=12, missing=("image",))
    for sizes in ((12,), (5, 3, 4)):
        model = joint_model()
        rolling = build_balancer(model, indicator=indicator)
        run_forward(model, split_batch(full, *sizes))
        rolling.end_epoch()
        rotations.append(rolling.rotation)
    torch.testing.assert_close(*rotations, **EXACT)


def test_evaluation_is_not_observed():
    model = joint_model()
    rolling = build_balancer(model)
    run_forward(model.eval(), [])
    model.eval()
    model(batch())
    log = rolling.end_epoch()
    assert log["rotated"] == 0.0
    assert log["air"] != log["air"]


def test_only_the_rotation_is_modified():
    model = joint_model()
    rolling = build_balancer(model)
    run_forward(model, [batch()])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rolling.end_epoch()
    after = model.state_dict()
    changed = {name.rpartition(".")[2] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"rotation", "rotations", "epochs", "last_epoch", "air", "_extra_state"}
    assert not any(name.startswith("rolling") or ".rolling." in name for name, _ in model.named_parameters())


def test_observation_does_not_change_gradients():
    plain, rolled = joint_model(), joint_model()
    build_balancer(rolled)
    for result in (plain, rolled):
        result.loss(result(batch()).logits, batch()["target"]).backward()
    for one, other in zip(plain.parameters(), rolled.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        assert one.grad is None or torch.equal(one.grad, other.grad)


def test_autocast_statistics_are_float32():
    model, low = joint_model(dtype=torch.float32), joint_model(dtype=torch.float32)
    exact, rolling = build_balancer(model), build_balancer(low)
    inputs = batch(dtype=torch.float32, size=17)
    run_forward(model, [inputs])
    with torch.autocast("cpu", torch.bfloat16):
        run_forward(low, [inputs])
    exact.end_epoch()
    rolling.end_epoch()
    assert rolling.rotation.dtype == torch.float32
    torch.testing.assert_close(rolling.rotation, exact.rotation, **TOL[torch.bfloat16])
    eye = torch.eye(DIM // 2).expand(2, -1, -1)
    torch.testing.assert_close(rolling.rotation @ rolling.rotation.mT, eye, **SINGLE)
    with torch.autocast("cpu", torch.bfloat16):
        logits = low(inputs).logits
    torch.testing.assert_close(logits.float(), model(inputs).logits, **TOL[torch.bfloat16])


def rotation_epochs(rolling, model, epochs):
    """Returns the epochs with a rotation."""
    rotated = []
    for epoch in range(1, epochs + 1):
        run_forward(model, [batch(seed=epoch)])
        if rolling.end_epoch()["rotated"]:
            rotated.append(epoch)
    return rotated


@pytest.mark.parametrize(
    ("options", "epochs"),
    [
        ({"max_rotations": 0}, []),
        ({"max_rotations": 1}, [1]),
        ({"max_rotations": 3}, [1, 2, 3]),
        ({"max_rotations": None}, [1, 2, 3, 4, 5, 6, 7]),
        ({"warmup_epochs": 2}, [3, 4, 5, 6, 7]),
        ({"min_epochs_between": 3}, [1, 4, 7]),
        ({"warmup_epochs": 1, "min_epochs_between": 2, "max_rotations": 2}, [2, 4]),
        ({"beta": 2.0}, []),
    ],
)
def test_rotation_schedule(options, epochs):
    model = joint_model()
    assert rotation_epochs(build_balancer(model, **options), model, 7) == epochs


def test_due_predicts_end_epoch():
    model = joint_model()
    rolling = build_balancer(model, warmup_epochs=1, max_rotations=1)
    messages = []
    for epoch in range(4):
        run_forward(model, [batch(seed=epoch)])
        messages.append((rolling.due(), bool(rolling.end_epoch()["rotated"])))
    assert messages == [(False, False), (True, True), (False, False), (False, False)]
    assert not rolling.due()


def test_beta_threshold_is_per_head():
    model = joint_model(seed=3)
    _, air = expected_rotation(oracle_samples(model, [batch()]), TWO, 2)
    spreads = [abs(row["audio"]) for row in air]
    assert min(spreads) < max(spreads) - 0.05
    for beta in (min(spreads) - 0.01, min(spreads) + 0.01, max(spreads) + 0.01):
        rolled = joint_model(seed=3)
        rolling = build_balancer(rolled, beta=max(beta, 0.0))
        run_forward(rolled, [batch()])
        rolling.end_epoch()
        turned = [not torch.equal(r, torch.eye(DIM // 2, dtype=torch.float64)) for r in rolling.rotation]
        assert turned == [spread >= beta for spread in spreads]
        assert int(rolling.rotations) == int(any(turned))


def test_frozen_keeps_the_rotation_and_skips_statistics():
    model = joint_model()
    rolling = build_balancer(model)
    run_forward(model, [batch()])
    rolling.end_epoch()
    kept = rolling.rotation.clone()
    rolling.freeze()
    assert rotation_epochs(rolling, model, 3) == []
    assert torch.equal(rolling.rotation, kept)
    rolling.freeze(False)
    assert rotation_epochs(rolling, model, 1) == [1]


@pytest.mark.parametrize("expected", [0.4, 0.6])
def test_target_share_is_reached_on_mean_keys(expected):
    model = joint_model(heads=1, seed=4)
    rolling = build_balancer(model, target_share={"audio": expected, "image": 1 - expected})
    run_forward(model, [batch(size=11)])
    result = oracle_samples(model, [batch(size=11)])
    assert rolling.end_epoch()["rotated"] == 1.0
    query, keys, _, tokens = means(result, TWO, 0)
    turned = (torch.from_numpy(query) @ rolling.rotation[0]).numpy()
    assert shares(turned, keys, tokens)["audio"] == pytest.approx(expected, abs=1e-8)


def test_svd_reaches_the_same_anchor():
    pair = []
    for method in ("minimal", "svd"):
        model = joint_model(heads=1)
        rolling = build_balancer(model, rotation=method)
        run_forward(model, [batch()])
        query = torch.from_numpy(means(oracle_samples(model, [batch()]), TWO, 0)[0])
        rolling.end_epoch()
        pair.append((query @ rolling.rotation[0], rolling.rotation[0]))
    torch.testing.assert_close(pair[0][0], pair[1][0], **EXACT)
    assert float((pair[0][1] - pair[1][1]).norm()) > 1.0


def snapshot(model):
    return [module.training for module in model.modules()], torch.get_rng_state(), [p.grad for p in model.parameters()]


def assert_unchanged(model, before):
    modes, state, grads = snapshot(model)
    assert modes == before[0]
    assert torch.equal(state, before[1])
    assert all(a is b for a, b in zip(grads, before[2], strict=True))


class Noisy(nn.Linear):
    """An encoder that always draws random numbers."""

    def forward(self, input):
        return super().forward(input) + 0.0 * torch.rand(())


def build_full_pass(statistics="full_pass"):
    model = joint_model(dropout=0.3)
    model.encoders["audio"].__class__ = Noisy
    model.encoders["image"].eval()
    model.loss(model(batch()).logits, batch()["target"]).backward()
    return model, build_balancer(model, statistics=statistics, tail=1)


def test_full_pass_runs_in_eval_mode_and_restores_state():
    model, rolling = build_full_pass()
    before = snapshot(model)
    batches = [batch(size=size, seed=size) for size in (5, 3, 2)]
    rolling.measure(model, batches)
    assert_unchanged(model, before)
    rotation, _ = expected_rotation(oracle_samples(model, batches), TWO, 2)
    rolling.end_epoch()
    torch.testing.assert_close(rolling.rotation, rotation, **EXACT)


def test_full_pass_batch_limit():
    model, rolling = build_full_pass("tail")
    batches = [batch(size=size, seed=size) for size in (5, 3, 2)]
    run_forward(model, [batch(seed=99)])
    rolling.measure(model, iter(batches), max_batches=2)
    rotation, _ = expected_rotation(oracle_samples(model, batches[:2]), TWO, 2)
    rolling.end_epoch()
    torch.testing.assert_close(rolling.rotation, rotation, **EXACT)


def failing_batches():
    yield batch(seed=7)
    raise KeyError("broken")


def test_failing_full_pass_restores_state():
    model, rolling = build_full_pass("tail")
    run_forward(model, [batch()])
    before, sums = snapshot(model), rolling.get_extra_state()
    with pytest.raises(KeyError, match="broken"):
        rolling.measure(model, failing_batches())
    assert_unchanged(model, before)
    assert torch.equal(rolling.get_extra_state(), sums)


def test_training_is_not_observed_with_full_pass():
    model, rolling = build_full_pass()
    run_forward(model, [batch()])
    assert rolling.end_epoch()["rotated"] == 0.0


def test_compiled_model_is_observed_without_recompilation():
    model = joint_model()
    rolling = build_balancer(model, tail=2)
    compiles = []

    def backend(graph, _):
        compiles.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend)
    batches = [batch(seed=seed) for seed in range(5)]
    with torch.no_grad():
        run_forward(compiled, batches[:2])
        first = len(compiles)
        run_forward(compiled, batches[2:])
    assert len(compiles) == first > 0
    rotation, _ = expected_rotation(oracle_samples(model, batches[-2:]), TWO, 2)
    rolling.end_epoch()
    torch.testing.assert_close(rolling.rotation, rotation, **EXACT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rho": -1.0}, "expected rho >= 0 and finite, got rho = -1.0"),
        ({"beta": -0.1}, "expected beta >= 0, got beta = -0.1"),
        ({"max_rotations": -1}, "expected max_rotations >= 0 or None, got max_rotations = -1"),
        ({"rho": "1"}, r"expected rho >= 0 and finite, got rho = '1'\. Use a number, not a string"),
        ({"beta": None}, "expected beta >= 0, got beta = None"),
        ({"max_rotations": "3"}, "expected max_rotations >= 0 or None, got max_rotations = '3'"),
        ({"tail": 1.5}, "expected tail >= 1 or None, got tail = 1.5"),
        ({"warmup_epochs": "0"}, "expected warmup_epochs >= 0, got warmup_epochs = '0'"),
        ({"min_epochs_between": None}, "expected min_epochs_between >= 1, got min_epochs_between = None"),
        ({"tail": 0}, "expected tail >= 1 or None, got tail = 0"),
        ({"warmup_epochs": -1}, "expected warmup_epochs >= 0, got warmup_epochs = -1"),
        ({"min_epochs_between": 0}, "expected min_epochs_between >= 1, got min_epochs_between = 0"),
        ({"statistics": "epoch"}, "expected statistics 'tail' or 'full_pass', got statistics = 'epoch'"),
        ({"indicator": "angle"}, "expected indicator 'cosine', 'logit', .* got indicator = 'angle'"),
        ({"query_rows": "some"}, "expected query_rows 'first' or 'all', got query_rows = 'some'"),
        ({"heads": "each"}, "expected heads 'per_head' or 'joint', got heads = 'each'"),
        ({"rotation": "qr"}, "expected rotation 'minimal', 'svd', 'random', got rotation = 'qr'"),
        ({"target_share": {"audio": 0.9, "image": 0.9}}, "shares of exactly two modalities that sum to 1"),
    ],
)
def test_options_out_of_range_raise(options, message):
    model = joint_model()
    with pytest.raises(ConfigError, match=message):
        build_balancer(model, **options)
    assert not hasattr(model.fusion.attention.core, "rolling")
    build_balancer(model)


def test_width_one_raises():
    with pytest.raises(
        ConfigError, match=r"expected heads of width d >= 2, got d = 1\. There is no rotation in one dimension"
    ):
        build_balancer(joint_model(heads=DIM))


@pytest.mark.parametrize("bad", [float("nan"), 1e308])
@pytest.mark.parametrize("options", [
    *({"indicator": indicator} for indicator in INDICATORS),
    {"heads": "joint"}, {"query_rows": "all"}, {"tail": 2},
])  # fmt: skip
def test_non_finite_samples_are_excluded(bad, options):
    good, harmed = batch(size=5), batch(size=7)
    for name in (*TWO, "target"):
        harmed[name][:5] = good[name]
    harmed["audio"][5, 0, 0] = harmed["image"][6, 1, 2] = bad
    rollings = []
    for inputs in (good, harmed):
        model = joint_model()
        rollings.append(build_balancer(model, **options))
        run_forward(model, [batch(seed=1), inputs])
    one, other = (rolling.end_epoch() for rolling in rollings)
    assert one == pytest.approx(other, abs=1e-12)
    assert one["rotated"] == 1.0
    torch.testing.assert_close(rollings[0].rotation, rollings[1].rotation, **EXACT)


@pytest.mark.parametrize("statistics", ["tail", "full_pass"])
@pytest.mark.parametrize("options", [{}, {"target_share": {"audio": 0.4, "image": 0.6}}, {"rotation": "svd"}])
def test_epoch_of_non_finite_batches_rotates_nothing(statistics, options):
    model = joint_model(heads=1)
    rolling = build_balancer(model, statistics=statistics, **options)
    inputs = batch()
    inputs["audio"][:] = float("nan")
    rolling.measure(model, [inputs]) if statistics == "full_pass" else run_forward(model, [inputs])
    before = {name: value.clone() for name, value in rolling.named_buffers()}
    log = rolling.end_epoch()
    assert (log["rotated"], log["rotations"]) == (0.0, 0.0)
    for name, value in rolling.named_buffers():
        assert name == "epochs" or torch.equal(value.nan_to_num(-9.0), before[name].nan_to_num(-9.0))
    assert rolling.get_extra_state().isfinite().all()


def test_checkpoint_with_non_finite_sums_is_reset():
    model = joint_model()
    rolling = build_balancer(model)
    run_forward(model, [batch()])
    rolling.set_extra_state(torch.full_like(rolling.get_extra_state(), torch.nan))
    assert not rolling.get_extra_state().any()
