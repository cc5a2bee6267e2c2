"""A shared embedding space of a few emoji with known vectors, and the folder of a run that contains it."""

import json

import torch
import yaml
from safetensors.torch import save_file

from equipoise.data import load_dataset
from equipoise.training import method_factory, recipes

SMALL = {
    "image": {"name": "ConvEncoder", "dim": 8, "widths": [8, 8]},
    "text": {"name": "TextEncoder", "dim": 8, "depth": 0, "heads": 1},
}
EVIL = '<script>alert(1)</script>"><img src=x onerror=alert(2)>'


def recipe():
    """Returns the packaged recipe with the smallest encoders."""
    content = yaml.safe_load(recipes.dump_recipe(recipes.load_recipe("emoji_clip")))
    return recipes.recipe_from_dict({**content, "encoders": SMALL, "model": {"name": "dual_encoder", "dim": 6}})


def build_dual_encoder(net=None):
    """Returns an untrained dual encoder; its search results are arbitrary."""
    torch.manual_seed(0)
    model, _ = method_factory.build_model(
        method_factory.parse_method("info_nce", recipe()), recipe(), net or load_dataset("emoji")
    )
    return model.eval()


def write_run(folder, model):
    """Writes the files of a finished run."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / "model.safetensors")
    (folder / "recipe.yaml").write_text(recipes.dump_recipe(recipe()), encoding="utf-8")
    run = {"method": "info_nce", "seed": 0, "fold": None, "metrics": {}}
    (folder / "run.json").write_text(json.dumps({"run": run}), encoding="utf-8")
    return folder
