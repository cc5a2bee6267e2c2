"""The core install needs torch, numpy, jaxtyping and safetensors alone; anything else is reported with its extra."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from equipoise.errors import DISTRIBUTIONS, EXTRAS, EquipoiseError, MissingExtraError, require_extra

PYPROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PACKAGES = {module for modules in EXTRAS.values() for module in modules}
# What transformers itself imports, or the test itself.
TRANSFORMERS = {"transformers", "huggingface_hub", "yaml", "rich"}

BLOCK = """
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        blocked = name.partition(".")[0] in {blocked}
        return None if blocked else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""
WATCH = """
import torch, transformers
import equipoise as eq

text = transformers.LlamaConfig(vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
                                num_attention_heads=2, num_key_value_heads=2)
vision = transformers.CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=2,
                                       num_attention_heads=2, image_size=8, patch_size=4)
config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_id=3,
                                  vision_feature_select_strategy="default", vision_feature_layer=-1)
vlm = transformers.LlavaForConditionalGeneration(config).eval()
with eq.watch(vlm) as record, torch.no_grad():
    vlm(input_ids=torch.tensor([[1, 3, 3, 3, 3, 5, 6]]), pixel_values=torch.randn(1, 3, 8, 8))
print(record.table())
"""


def python(program, blocked):
    """Runs a program in a new interpreter in which the blocked packages cannot be imported."""
    return subprocess.run(
        [sys.executable, "-c", BLOCK.format(blocked=sorted(blocked)) + program], capture_output=True, text=True
    )


COMMANDS = ("--help", "demo", "compare", "train", "recipes ls", "diagnose x", "look x --text y")


@pytest.fixture(scope="module")
def core_results():
    """The sum of shares in an interpreter without extras, and the exit codes and outputs of commands in it."""
    program = f"""
import contextlib, io, json
import torch, equipoise as eq

q = torch.randn(1, 2, 3, 4)
total = eq.attend(q, q, q, modality=torch.tensor([0, 0, 1]), num_modalities=2).share.sum().item()

from equipoise.cli import main

results = []
for arguments in {list(map(str.split, COMMANDS))!r}:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(arguments)
        except SystemExit as end:
            code = end.code
    results.append((code, out.getvalue(), err.getvalue()))
print(json.dumps([total, results]))
"""
    done = python(program, PACKAGES)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def requirements(*extras):
    """Names of the packages in these extras of pyproject.toml, without versions."""
    listed = [PYPROJECT["optional-dependencies"][extra] for extra in extras]
    return {one.partition(">")[0] for requirement in listed for one in requirement}


@pytest.mark.parametrize("extra", EXTRAS)
def test_extras_match_pyproject(extra):
    assert {DISTRIBUTIONS.get(module, module) for module in EXTRAS[extra]} == requirements(extra)


def test_core_dependencies():
    assert {one.partition(">")[0] for one in PYPROJECT["dependencies"]} == {
        "torch",
        "numpy",
        "jaxtyping",
        "safetensors",
    }
    assert requirements("all") == {"equipoise[train,report,hf,lora,cluster,search]"}


def test_core_works_without_extras(core_results):
    assert core_results[0] == pytest.approx(6.0)


def test_watch_needs_transformers_only():
    done = python(WATCH, PACKAGES - TRANSFORMERS)
    assert done.returncode == 0, done.stderr
    assert "model.language_model.layers.1.self_attn" in done.stdout


@pytest.mark.parametrize(
    "missing",
    [
        (("hf", "accelerate", "hf"), ("report.report", "jinja2", "report"), ("training.compare", "scipy", "train")),
        (("look", "pillow", "train"), ("lightning", "lightning", "train"), ("load", "lightning", "train")),
    ],
    ids=["accelerate, jinja2, scipy", "pillow, lightning"],
)
def test_missing_extra_is_named_in_the_error(missing):
    packages = {package for _, package, _ in missing}
    blocked = {module for module in PACKAGES if DISTRIBUTIONS.get(module, module) in packages}
    program = "import equipoise as eq\n" + "".join(
        f"try:\n    eq.{name}\nexcept ImportError as error:\n    print(error)\n" for name, *_ in missing
    )
    assert python(program, blocked).stdout.splitlines() == [
        f"eq.{name}: expected the package '{package}', got none installed. Install it: pip install 'equipoise[{extra}]'"
        for name, package, extra in missing
    ]


def test_commands_without_extras_exit_with_2(core_results):
    (code, out, err), *others = core_results[1]
    assert (code or 0, err) == (0, "")
    assert "equipoise demo" in out
    for command, (code, _, err) in zip(COMMANDS[1:], others, strict=True):
        assert code == 2
        (line,) = err.splitlines()
        assert line.startswith(f"equipoise: equipoise {command.split()[0]}: expected the package ")
        assert line.endswith(("pip install 'equipoise[train]'", "pip install 'equipoise[report]'"))


def test_other_import_errors_propagate():
    with pytest.raises(ModuleNotFoundError, match="no_such_module"), require_extra("eq.x"):
        import no_such_module  # noqa: F401  # type: ignore[import-not-found]
    assert issubclass(MissingExtraError, EquipoiseError)
    with (
        pytest.raises(
            MissingExtraError, match=r"eq\.x: expected the package 'scikit-learn', got none installed\. Install it: pip"
        ),
        require_extra("eq.x"),
    ):
        raise ModuleNotFoundError("No module named 'sklearn'", name="sklearn.cluster")
