"""save_pretrained, from_pretrained, push_to_hub and eq.load: the same outputs, a card with the findings, no code from
files.
"""

import builtins
import copy
import json
import re

import pytest
import torch
from torch import nn

import equipoise as eq
from equipoise.errors import ConfigError, DataError, EquipoiseError, MissingExtraError, SchemaError
from equipoise.training.run import execute_run
from helpers.runs import RandomData, run_spec

FUSIONS = ["Concat", "Sum", "FiLM", "Gated", "JointAttention", "MulT", "MBT", "JMT", "MMML", "MidFusion", "MODA"]


def batch(size=4):
    random = torch.Generator().manual_seed(0)
    return {"audio": torch.randn(size, 7, 3, generator=random), "image": torch.randn(size, 1, 8, 8, generator=random)}


def build(fusion="JointAttention", **options):
    torch.manual_seed(1)
    encoders = {
        "audio": eq.encoders.SequenceEncoder(3, max_length=7, dim=8, depth=1, heads=2),
        "image": eq.encoders.PatchEncoder(1, (8, 8), dim=8, depth=1, heads=2, patch=4),
    }
    return eq.FusionModel(encoders, getattr(eq.fusion, fusion)(8), 3, **options).eval()


def outputs(model):
    with torch.no_grad():
        return model(batch()).logits


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_saved_model_equals_itself(fusion, tmp_path):
    model = build(fusion, unimodal="ensemble")
    assert model.save_pretrained(tmp_path / "saved") == tmp_path / "saved"
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    state = torch.get_rng_state()
    loaded = eq.FusionModel.from_pretrained(tmp_path / "saved")
    assert torch.equal(state, torch.get_rng_state())
    assert not loaded.training
    assert torch.equal(outputs(loaded), outputs(model))
    assert torch.equal(outputs(eq.load(tmp_path / "saved")), outputs(model))
    copy.deepcopy(model).save_pretrained(tmp_path / "copied")
    assert (tmp_path / "copied" / "config.json").read_text() == (tmp_path / "saved" / "config.json").read_text()


def test_rotations_are_saved(tmp_path):
    model = build()
    rolling = eq.balance.RollingQ(model.fusion.attention, beta=0.0, rho=2.0, target_share={"audio": 0.3, "image": 0.7})
    with torch.no_grad():
        rolling.rotation.copy_(torch.linalg.qr(torch.randn(rolling.rotation.shape))[0])
        rolling.rotation[:, 0] *= torch.linalg.det(rolling.rotation)[:, None].sign()
    assert rolling.rotates()
    model.save_pretrained(tmp_path)
    loaded = eq.FusionModel.from_pretrained(tmp_path)
    assert torch.equal(outputs(loaded), outputs(model))
    (other,) = [part for part in loaded.modules() if isinstance(part, eq.balance.RollingQ)]
    assert (other.rho, other.beta, other.target_share) == (2.0, 0.0, {"audio": 0.3, "image": 0.7})


def test_modules_of_the_user_are_passed(tmp_path):
    class Mine(nn.Linear):
        pass

    def model(seed):
        torch.manual_seed(seed)
        return eq.FusionModel({"audio": Mine(3, 8), "text": nn.Linear(5, 8, bias=False)}, eq.fusion.Concat(8), 2)

    saved = model(0)
    saved.save_pretrained(tmp_path)
    with pytest.raises(
        ConfigError, match=r"'encoders.audio' of the type Mine, which only your code.*encoders=\{'audio': module\}"
    ):
        eq.FusionModel.from_pretrained(tmp_path)
    loaded = eq.FusionModel.from_pretrained(tmp_path, encoders={"audio": Mine(3, 8)})
    for one, other in zip(saved.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(one, other)


def test_models_with_added_weights_raise(tmp_path):
    model = build()
    model.head = nn.Sequential(model.head, nn.Linear(3, 3))
    with pytest.raises(ConfigError, match=r"'head\.0\.bias', which was added or changed later"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize(
    "method", ["joint+rollingq", pytest.param("concat+pmr", marks=pytest.mark.slow), "joint+reliability", "image"]
)
def test_runs_of_recipes_are_saved_without_their_data(method, tmp_path):
    execute_run(run_spec(method, epochs=2), tmp_path / "run")
    model = eq.load(tmp_path / "run")
    model.save_pretrained(tmp_path / "saved")
    loaded = eq.load(tmp_path / "saved")
    assert type(loaded) is type(model)
    inputs = {"audio": torch.randn(5, 64, 40), "image": torch.randn(5, 1, 8, 8)}
    with torch.no_grad():
        assert torch.equal(model(inputs).logits, loaded(inputs).logits)
    card = (tmp_path / "saved" / "README.md").read_text()
    assert re.search(r"\| accuracy \| 0\.\d+ \|", card)
    assert "with seed 0" in card


def test_the_card_has_the_findings_of_a_diagnosis(tmp_path):
    source = RandomData(sizes=(64, 16, 64))
    torch.manual_seed(0)
    encoders = {name: nn.Linear(shape[-1], 8) for name, shape in source.shapes.items()}
    model = eq.FusionModel(encoders, eq.fusion.Concat(8), 3)
    result = eq.diagnose(
        model, [source.batch("test", torch.arange(64), seed=0, epoch=0, train=False)], tests=["score", "masking"]
    )
    model.save_pretrained(tmp_path, diagnosis=result, repo_id="user/name")
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: equipoise\n")
    assert 'eq.load("user/name")' in card
    plain = card.replace("\\", "")
    assert all(verdict.text in plain for verdict in result.verdicts)
    assert f"| accuracy_mask/audio | {result.metrics['accuracy_mask/audio']:.4g} |" in plain
    assert eq.Diagnosis.load(tmp_path).metrics.keys() == result.metrics.keys()
    renamed = eq.Diagnosis("<img src=x>", ("a",), None, 1, {"[x](y)\n# z": 1.0}, skipped={"t": "`code`|"})
    model.save_pretrained(tmp_path, diagnosis=renamed)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "<img" not in card.replace("\\<", "")
    assert "\n# z" not in card


def changed(folder, change):
    content = json.loads((folder / "config.json").read_text())
    change(content)
    (folder / "config.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.update(schema=2),
        lambda c: c.update(model=None),
        lambda c: c.update(model=[1]),
        lambda c: c["model"].update({"class": "os.system"}),
        lambda c: c["model"].update({"class": "Backbone"}),
        lambda c: c["model"].update({"class": "PatchEncoder"}),
        lambda c: c["model"]["options"].update(fusion={"class": "Backbone", "options": {"name": "someone/model"}}),
        lambda c: c["model"]["options"].update(secret=3),
        lambda c: c["model"]["options"].update(num_outputs=-1),
        lambda c: c["model"].update(options=3),
        lambda c: c.update(rotations={"fusion.nowhere": {}}),
        lambda c: c.update(rotations=3),
    ],
)
def test_invalid_configurations_raise(change, tmp_path):
    build().save_pretrained(tmp_path)
    changed(tmp_path, change)
    with pytest.raises(EquipoiseError):
        eq.load(tmp_path)
    with pytest.raises(EquipoiseError):
        eq.FusionModel.from_pretrained(tmp_path)


def test_damaged_folders_raise(tmp_path):
    with pytest.raises(DataError, match=r"no config\.json"):
        eq.FusionModel.from_pretrained(tmp_path)
    build().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(DataError, match="safetensors"):
        eq.load(tmp_path)
    (tmp_path / "config.json").write_text('{"library_name": "equi')
    with pytest.raises(SchemaError, match="JSON"):
        eq.FusionModel.from_pretrained(tmp_path)
    build().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="expected a DualEncoder, got a FusionModel"):
        eq.models.DualEncoder.from_pretrained(tmp_path)


def test_names_on_the_hub(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    model = build()
    asked, uploaded = [], {}

    def snapshot_download(name, **options):
        asked.append((name, options["revision"], options["allow_patterns"]))
        return str(tmp_path / "hub")

    class Api:
        def __init__(self, token=None):
            uploaded["token"] = token

        def create_repo(self, repo_id, **options):
            uploaded["private"] = options["private"]
            return hub.RepoUrl(f"https://huggingface.co/{repo_id}")

        def upload_folder(self, *, repo_id, folder_path, **options):
            uploaded["repo"] = repo_id
            (tmp_path / "hub").mkdir()
            for path in folder_path.iterdir():
                (tmp_path / "hub" / path.name).write_bytes(path.read_bytes())
            return "https://huggingface.co/commit"

    monkeypatch.setattr(hub, "HfApi", Api)
    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    assert model.push_to_hub("user/name", token="t", private=True) == "https://huggingface.co/commit"
    assert uploaded == {"token": "t", "private": True, "repo": "user/name"}
    assert torch.equal(outputs(eq.load("user/name")), outputs(model))
    assert torch.equal(outputs(eq.FusionModel.from_pretrained("user/name", revision="v1")), outputs(model))
    files = ["config.json", "model.safetensors", "README.md", "diagnosis.json"]
    assert asked == [("user/name", None, files), ("user/name", "v1", files)]


def test_a_name_that_is_neither_folder_nor_model(monkeypatch):
    hub = pytest.importorskip("huggingface_hub")

    def fail(*given, **options):
        raise OSError("cannot be reached")

    monkeypatch.setattr(hub, "snapshot_download", fail)
    with pytest.raises(DataError, match=r"'user/name', which is no folder; the Hub: cannot be reached"):
        eq.load("user/name")
    with pytest.raises(DataError, match="a folder, or the name of a model on the Hub"):
        eq.FusionModel.from_pretrained("nowhere")


def test_without_huggingface_hub(tmp_path, monkeypatch):
    real = builtins.__import__

    def missing(name, *given, **options):
        if name == "huggingface_hub":
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)
        return real(name, *given, **options)

    monkeypatch.setattr(builtins, "__import__", missing)
    model = build()
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(eq.load(tmp_path)), outputs(model))
    for call in (lambda: model.push_to_hub("user/name"), lambda: eq.load("user/name")):
        with pytest.raises(MissingExtraError, match=r"pip install 'equipoise\[hf\]'"):
            call()


def test_self_contained_models(tmp_path):
    torch.manual_seed(0)
    encoders = {"audio": eq.encoders.VectorEncoder(3, dim=8), "image": eq.encoders.VectorEncoder(5, dim=8)}
    model = eq.models.DualEncoder(encoders, dim=4).eval()
    model.save_pretrained(tmp_path)
    loaded = eq.models.DualEncoder.from_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model"]["class"] == "DualEncoder"
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
