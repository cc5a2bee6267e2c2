"""Parsing of method names, and the models and balancers they build."""

from dataclasses import replace

import pytest
import torch

import equipoise as eq
from equipoise.errors import ConfigError
from equipoise.io.class_registry import instantiate
from equipoise.training import method_factory
from equipoise.training.run import load_run_dataset
from helpers.runs import recipe


def build_method(name, result=None):
    result = result or recipe()
    return method_factory.build_model(method_factory.parse_method(name, result), result, load_run_dataset(result, None))


@pytest.mark.parametrize(
    ("name", "fusion", "names", "balancers"),
    [
        ("audio", eq.fusion.Unimodal, ("audio",), []),
        ("concat", eq.fusion.Concat, ("audio", "image"), []),
        ("film", eq.fusion.FiLM, ("audio", "image"), []),
        (" joint + rollingq ", eq.fusion.JointAttention, ("audio", "image"), [eq.balance.RollingQ]),
        ("joint+dgl", eq.fusion.JointAttention, ("audio", "image"), [eq.balance.DGL]),
        ("concat+cggm", eq.fusion.Concat, ("audio", "image"), [eq.balance.CGGM]),
        ("concat+data_remixing", eq.fusion.Concat, ("audio", "image"), [eq.balance.DataRemixing]),
        ("joint+inforeg", eq.fusion.JointAttention, ("audio", "image"), [eq.balance.InfoReg]),
        ("joint+arl", eq.fusion.JointAttention, ("audio", "image"), [eq.balance.ARL]),
        ("qmf", eq.fusion.Concat, ("audio", "image"), [eq.balance.QMF]),
        ("sum+qmf", eq.fusion.Sum, ("audio", "image"), [eq.balance.QMF]),
        ("tmc", eq.fusion.Concat, ("audio", "image"), [eq.balance.TMC]),
        ("deep+progressive", eq.fusion.JointAttention, ("audio", "image"), [eq.balance.ProgressiveRollingQ]),
    ],
)
def test_method_names(name, fusion, names, balancers):
    model, attached = build_method(name)
    assert type(model.fusion) is fusion
    assert model.names == names
    assert [type(balancer) for balancer in attached] == balancers


def test_methods_with_a_head_of_their_own_stand_for_a_fusion_and_themselves():
    digits = recipe()
    digits.balancers["tmc"] = {"annealing": 3}
    digits.balancers["slow_tmc"] = {"balancer": "tmc", "annealing": 50}
    names = {name: method_factory.parse_method(name, digits).name for name in ("tmc", "qmf", "slow_tmc", "concat+tmc")}
    assert names == {
        "tmc": "concat+tmc",
        "qmf": "concat+qmf",
        "slow_tmc": "concat+slow_tmc",
        "concat+tmc": "concat+tmc",
    }
    assert [build_method(name, digits)[1][0].annealing for name in ("tmc", "slow_tmc")] == [3, 50]
    with pytest.raises(ConfigError, match="expected a known fusion or modality, got 'ogm'"):
        method_factory.parse_method("ogm", digits)
    with pytest.raises(ConfigError, match="tmc"):
        method_factory.parse_method("tnc", digits)


def test_qmf_ranks_by_the_history_of_the_training_samples():
    _, (balancer,) = build_method("qmf")
    assert balancer.samples == len(load_run_dataset(recipe(), None).split("train"))


def test_weights_depend_on_the_generator():
    logits = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        model = build_method("joint")[0].eval()
        logits.append(
            model(load_run_dataset(recipe(), None).batch("test", torch.arange(3), seed=0, epoch=0, train=False)).logits
        )
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])


def test_variant_training_options():
    config = recipe()
    config.fusions["fast"] = {"fusion": "concat", "train": {"epochs": 1, "unimodal": "none"}}
    own = method_factory.method_recipe(method_factory.parse_method("fast", config), config)
    assert (own.train.epochs, config.train.epochs) == (1, 3)
    assert build_method("fast", config)[0].unimodal == "none"
    config.fusions["fast"]["train"] = {"epoks": 1}
    with pytest.raises(ConfigError, match="expected a known training option, got 'epoks'"):
        build_method("fast", config)


def test_repeated_balancer_raises():
    with pytest.raises(ConfigError, match="expected each balancer once"):
        method_factory.parse_method("joint+rollingq+rollingq", recipe())


def test_reliability_is_a_suffix():
    config = recipe(balancers={"reliability": {"distance": "mahalanobis", "form": "conformal", "alpha": 0.1}})
    method = method_factory.parse_method("joint+reliability+rollingq", config)
    assert method.name == "joint+rollingq+reliability"
    assert method.balancers == ("rollingq",)
    model, balancers = build_method("joint+rollingq+reliability", config)
    assert isinstance(model, eq.FusionModel)
    assert [type(balancer) for balancer in balancers] == [eq.balance.RollingQ]
    wrapper = method_factory.wrap_reliability(model, method, config)
    assert (wrapper.distance, wrapper.form, wrapper.alpha) == ("mahalanobis", "conformal", 0.1)
    with pytest.raises(
        ConfigError, match=r"'joint\+reliability': .*got distance = 'cosine'\. It has to be one of 'knn'"
    ):
        build_method("joint+reliability", recipe(balancers={"reliability": {"distance": "cosine"}}))
    with pytest.raises(ConfigError, match=r"prototypes >= 5, got prototypes = 1\.5"):
        build_method("joint+reliability", recipe(balancers={"reliability": {"prototypes": 1.5}}))
    with pytest.raises(ConfigError, match="known option of Reliability, got 'distanse'"):
        build_method("joint+reliability", recipe(balancers={"reliability": {"distanse": "knn"}}))


def test_constructor_errors_name_the_class():
    config = recipe()
    encoders = {**config.encoders, "image": {**config.encoders["image"], "heads": 3}}
    with pytest.raises(ConfigError, match=r"^encoder 'image', Attention: expected dim = 8 divisible by heads"):
        build_method("joint", replace(config, encoders=encoders))


@pytest.mark.parametrize("method", ["joint", "text"])
def test_modalities_of_word_ids_can_be_fused(method):
    encoders = {name: {"dim": 8, "depth": 1, "heads": 2} for name in ("audio", "text")}
    encoders["image"] = {"dim": 8, "depth": 1, "heads": 2, "patch": 4}
    model, _ = build_method(method, replace(recipe(), data={"name": "triples"}, encoders=encoders))
    assert "text" in model.names


def test_options_are_checked_against_the_class():
    with pytest.raises(ConfigError, match=r"who: expected a known option of PatchEncoder, got 'size'\."):
        instantiate(eq.encoders.PatchEncoder, "who", {"size": 3}, size=(8, 8))
    with pytest.raises(ConfigError, match=r"who: expected dim of type int, got True\."):
        instantiate(eq.encoders.PatchEncoder, "who", {"dim": True})
    with pytest.raises(ConfigError, match=r"expected dropout of type float, got '1e-3'\. YAML parses 1e-3 as a string"):
        instantiate(eq.encoders.PatchEncoder, "who", {"dropout": "1e-3"})
    with pytest.raises(ConfigError, match=r"expected options that PatchEncoder takes, got \{'dim': 8\} \(.*missing"):
        instantiate(eq.encoders.PatchEncoder, "who", {"dim": 8})
