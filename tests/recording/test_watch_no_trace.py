"""``eq.watch`` restores the model: after a forward pass, after an error of the user, and after an error of the
model.
"""

import pytest
import torch
from torch import nn
from torch.nn.modules import module as registry
from torch.overrides import _get_current_function_mode_stack

import equipoise as eq
from equipoise.errors import EquipoiseError
from helpers.fusion import batch, joint_model

LABELS = torch.tensor([0, 0, 1, 1, -1])
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_forward_hooks_with_kwargs",
         "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")  # fmt: skip
GLOBAL = [
    name for name in dir(registry) if name.startswith("_global_") and name.endswith(("hooks", "called", "kwargs"))
]


class FailingModel(nn.Module):
    """Runs the inner module, and then raises an error if requested."""

    def __init__(self, inside):
        super().__init__()
        self.inside, self.fails = inside, False

    def forward(self, *args, **kwargs):
        result = self.inside(*args, **kwargs)
        if self.fails:
            raise RuntimeError("broken")
        return result


def fusion():
    model = joint_model(dropout=0.5).train()
    model.fusion.eval()
    model.encoders["audio"] = FailingModel(model.encoders["audio"])
    return model, model.encoders["audio"], lambda: model(batch()), {}


def encoder():
    layer = nn.Sequential(FailingModel(nn.TransformerEncoder(nn.TransformerEncoderLayer(6, 2, 7, batch_first=True), 2)))
    layer.train()[0].inside.layers[1].eval()
    tokens = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(0))
    return layer, layer[0], lambda: layer(tokens), {"modality": LABELS}


def inference():
    result, breaks, run, options = encoder()

    def without_gradients():
        with torch.no_grad():
            run()

    result.eval()
    return result, breaks, without_gradients, options


def vision_language():
    small_vlms = pytest.importorskip("small_vlms")
    model, inputs = small_vlms.family("llava")
    model.set_attn_implementation({"vision_config": "eager"})
    model.train().model.vision_tower.eval()
    with torch.no_grad():
        model(**inputs)  # Run once, so that changes by transformers itself precede the comparison.
    model.model.language_model.norm = FailingModel(model.model.language_model.norm)
    options = {"max_new_tokens": 3, "do_sample": False}
    return model, model.model.language_model.norm, lambda: model.generate(**inputs, **options), {}


MADE = {made.__name__: made for made in (fusion, encoder, inference, vision_language)}


def attention_functions():
    """Returns the registry of attention functions in transformers and its entries."""
    try:
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface
    except ImportError:
        return None
    faces = (AttentionInterface, AttentionMaskInterface)
    return [(dict(vars(face)), dict(face._global_mapping)) for face in faces]


def model_state(model):
    configs = [part.config for part in model.modules() if hasattr(part, "config")]
    return {
        "modes": [part.training for part in model.modules()],
        "hooks": [len(getattr(part, kind)) for part in model.modules() for kind in HOOKS],
        "global hooks": {name: len(getattr(registry, name)) for name in GLOBAL},
        "attributes": [sorted(part.__dict__) for part in model.modules()],
        "modes of functions": len(_get_current_function_mode_stack()),
        "backends": [getattr(config, "_attn_implementation", None) for config in configs],
        "functions": attention_functions(),
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "grad": [None if weight.grad is None else weight.grad.tolist() for weight in model.parameters()],
        "weights": {name: value.tolist() for name, value in model.state_dict().items()},
        "gradients on": torch.is_grad_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
    }


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("ends", ["well", "with a user's error", "with the model's error", "with an error beside it"])
def test_model_is_restored(name, ends):
    model, breaks, run, options = MADE[name]()
    # Some gradients exist already, as during gradient accumulation.
    first = next(model.parameters())
    first.grad = torch.ones_like(first)
    before = model_state(model)
    torch.manual_seed(7)
    run()
    after = torch.random.get_rng_state()
    torch.manual_seed(7)
    if ends == "well":
        with eq.watch(model, **options), eq.watch(model, queries="last", tokens=True, **options):
            run()
        assert torch.equal(torch.random.get_rng_state(), after)
    elif ends == "with a user's error":
        with pytest.raises(EquipoiseError, match="known word or modality"), eq.watch(model, queries="adio", **options):
            run()
    elif ends == "with the model's error":
        breaks.fails = True
        with pytest.raises(RuntimeError, match="broken"), eq.watch(model, **options), eq.watch(model, **options):
            run()
        breaks.fails = False
    else:
        with pytest.raises(KeyError), eq.watch(model, **options):
            {}[run()]
    assert model_state(model) == before


@pytest.mark.parametrize("name", MADE)
def test_recording_works_after_an_error(name):
    model, breaks, run, options = MADE[name]()
    model.eval()
    with eq.watch(model, **options) as full:
        run()
    with eq.watch(model, **options) as record:
        breaks.fails = True
        with pytest.raises(RuntimeError, match="broken"):
            run()
        breaks.fails = False
        run()
    for layer in full.layers:
        count = len(full.share(layer))
        assert torch.equal(record.share(layer)[-count:], full.share(layer))
