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
        found = self.inside(*args, **kwargs)
        if self.fails:
            raise RuntimeError("broken")
        return found


def fusion():
    made = joint_model(dropout=0.5).train()
    made.fusion.eval()
    made.encoders["audio"] = FailingModel(made.encoders["audio"])
    return made, made.encoders["audio"], lambda: made(batch()), {}


def encoder():
    made = nn.Sequential(FailingModel(nn.TransformerEncoder(nn.TransformerEncoderLayer(6, 2, 7, batch_first=True), 2)))
    made.train()[0].inside.layers[1].eval()
    tokens = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(0))
    return made, made[0], lambda: made(tokens), {"modality": LABELS}


def inference():
    made, breaks, run, options = encoder()

    def without_gradients():
        with torch.no_grad():
            run()

    made.eval()
    return made, breaks, without_gradients, options


def vision_language():
    small_vlms = pytest.importorskip("small_vlms")
    made, inputs = small_vlms.family("llava")
    made.set_attn_implementation({"vision_config": "eager"})
    made.train().model.vision_tower.eval()
    with torch.no_grad():
        made(**inputs)  # Run once, so that changes by transformers itself precede the comparison.
    made.model.language_model.norm = FailingModel(made.model.language_model.norm)
    options = {"max_new_tokens": 3, "do_sample": False}
    return made, made.model.language_model.norm, lambda: made.generate(**inputs, **options), {}


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


def model_state(made):
    configs = [part.config for part in made.modules() if hasattr(part, "config")]
    return {
        "modes": [part.training for part in made.modules()],
        "hooks": [len(getattr(part, kind)) for part in made.modules() for kind in HOOKS],
        "global hooks": {name: len(getattr(registry, name)) for name in GLOBAL},
        "attributes": [sorted(part.__dict__) for part in made.modules()],
        "modes of functions": len(_get_current_function_mode_stack()),
        "backends": [getattr(config, "_attn_implementation", None) for config in configs],
        "functions": attention_functions(),
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "grad": [None if weight.grad is None else weight.grad.tolist() for weight in made.parameters()],
        "weights": {name: value.tolist() for name, value in made.state_dict().items()},
        "gradients on": torch.is_grad_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
    }


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("ends", ["well", "with a user's error", "with the model's error", "with an error beside it"])
def test_model_is_restored(name, ends):
    made, breaks, run, options = MADE[name]()
    # Some gradients exist already, as during gradient accumulation.
    first = next(made.parameters())
    first.grad = torch.ones_like(first)
    before = model_state(made)
    torch.manual_seed(7)
    run()
    after = torch.random.get_rng_state()
    torch.manual_seed(7)
    if ends == "well":
        with eq.watch(made, **options), eq.watch(made, queries="last", tokens=True, **options):
            run()
        assert torch.equal(torch.random.get_rng_state(), after)
    elif ends == "with a user's error":
        with pytest.raises(EquipoiseError, match="known word or modality"), eq.watch(made, queries="adio", **options):
            run()
    elif ends == "with the model's error":
        breaks.fails = True
        with pytest.raises(RuntimeError, match="broken"), eq.watch(made, **options), eq.watch(made, **options):
            run()
        breaks.fails = False
    else:
        with pytest.raises(KeyError), eq.watch(made, **options):
            {}[run()]
    assert model_state(made) == before


@pytest.mark.parametrize("name", MADE)
def test_recording_works_after_an_error(name):
    made, breaks, run, options = MADE[name]()
    made.eval()
    with eq.watch(made, **options) as whole:
        run()
    with eq.watch(made, **options) as record:
        breaks.fails = True
        with pytest.raises(RuntimeError, match="broken"):
            run()
        breaks.fails = False
        run()
    for layer in whole.layers:
        count = len(whole.share(layer))
        assert torch.equal(record.share(layer)[-count:], whole.share(layer))
