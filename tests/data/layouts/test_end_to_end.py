"""From raw files to a diagnosis: each packaged recipe of a published data set trains on a prepared miniature copy."""

import pytest
import torch
import yaml

from equipoise.cli import run
from equipoise.data import Manifest, loader, ood_split
from equipoise.data.layouts import find_layout, verify
from equipoise.errors import DataError
from equipoise.training import method_factory, recipes
from equipoise.training.run import load_run_dataset
from helpers.raw_layouts import prepare_raw

RECIPES = {
    "cremad": "cremad",
    "cremad_resnet": "cremad",
    "kinetics_sounds": "kinetics_sounds",
    "mosei": "mosei",
    "mosi_multibench": "mosi",
    "av_mnist": "av_mnist",
    "ucf101": "ucf101",
    "hmdb51": "hmdb51",
}
SMALL = {
    "ViTEncoder": {"dim": 24, "depth": 1, "heads": 2}, "SequenceEncoder": {"dim": 24, "depth": 1, "heads": 2},
    "ConvEncoder": {"dim": 24, "widths": [8, 8]}, "ResNetEncoder": {"dim": 24},
}  # fmt: skip


def write_small_recipe(name, manifest, path):
    """Writes the packaged recipe with another manifest, smaller images and encoders, and one epoch."""
    content = yaml.safe_load(recipes.find_recipe(name).read_text(encoding="utf-8"))
    content["data"]["path"] = str(manifest)
    if "ood" in content["data"]:
        content["data"]["ood"] = str(manifest.with_name("ood.csv"))
    for options in content["data"]["modalities"].values():
        if "size" in options:
            options["size"] = 16
    for encoder in content["encoders"].values():
        encoder |= SMALL[encoder["name"]]
    content["train"] |= {"epochs": 1, "batch_size": 8, "workers": 0}
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def manifests(tmp_path_factory):
    """Layout -> the manifest of its prepared miniature copy."""
    result = {}

    def get(layout):
        if layout not in result:
            index = tmp_path_factory.mktemp(layout)
            size = {} if layout in ("mosei", "mosi", "av_mnist") else {"size": 16}
            unknown = {"ood": "far"} if layout == "hmdb51" else {}
            prepare_raw(layout, index / "raw", index / "prepared", **size, **unknown)
            assert verify(index / "prepared").complete
            result[layout] = index / "prepared" / "manifest.csv"
        return result[layout]

    return get


# One step of the ResNets takes half a minute on one core.
@pytest.mark.parametrize(
    "name",
    [
        # Recordings, sequences, and images with unknown classes; the other recipes take the same paths.
        name if name in ("cremad", "mosei", "hmdb51") else pytest.param(name, marks=pytest.mark.slow)
        for name in RECIPES
        if name != "cremad_resnet"
    ],
)
def test_prepare_train_and_diagnose(manifests, tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    recipe = write_small_recipe(name, manifests(RECIPES[name]), tmp_path / "small.yaml")
    assert (
        run(["train", "--config", str(recipe), "--method", "joint+rollingq", "--out", "run", "--accelerator", "cpu"])
        == 0
    )
    assert run(["diagnose", "run", "--tests", "noise,masking"]) == 0
    assert (tmp_path / "run" / "diagnosis" / "report.html").is_file()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_methods_fit_the_data(manifests, tmp_path, name):
    config = recipes.load_recipe(
        write_small_recipe(name, manifests(RECIPES[name]), tmp_path / "small.yaml")
    ).with_train(epochs=2)
    data = load_run_dataset(config, None)
    for method in [*config.methods, *config.fusions]:
        built, _ = method_factory.build_model(method_factory.parse_method(method, config), config, data)
        assert built.num_outputs == data.num_outputs


def test_unknown_classes_are_the_near_ood_split(manifests, tmp_path):
    data = load_run_dataset(
        recipes.load_recipe(write_small_recipe("hmdb51", manifests("hmdb51"), tmp_path / "small.yaml")), None
    )
    unknown = ood_split(data, "near")
    (batch,) = loader(unknown, "test", 64, seed=0, train=False)
    assert len(batch["target"]) == 5
    assert set(batch["target"].tolist()) == {-1}
    known = next(iter(loader(data, "test", 64, seed=0, train=False)))
    assert batch["rgb"].shape[1:] == known["rgb"].shape[1:]
    # Source 4 is of the test split, in the same pixels for each of the classes of a raw copy.
    assert torch.equal(batch["flow"][4], known["flow"][0])


def test_unknown_samples_need_the_same_columns(manifests, tmp_path):
    (tmp_path / "ood.csv").write_text("rgb,label\nx.npy,3\n")
    config = recipes.load_recipe(write_small_recipe("hmdb51", manifests("hmdb51"), tmp_path / "small.yaml"))
    config.data["ood"] = str(tmp_path / "ood.csv")
    with pytest.raises(DataError, match=r"ood.csv': expected a column 'flow', as in the training data, got none"):
        load_run_dataset(config, None)
    config.data["ood"] = str(tmp_path / "none.csv")
    with pytest.raises(DataError, match=r"none.csv': expected an existing file"):
        load_run_dataset(config, None)


def test_columns_are_inferred_without_target_leakage(manifests):
    options = {"target": "target", "group": "group"}
    for layout in ("cremad", "mosei"):
        result = Manifest(manifests(layout), **options)
        assert set(result.modalities) == set(find_layout(layout).columns)
