"""Small fusions and token sequences for the tests of the fusions."""

import inspect

import torch

from equipoise import fusion as package
from equipoise.fusion import Concat, FiLM, Fusion, Gated, Sum, Unimodal
from equipoise.tokens.token_batch import Tokens
from helpers.tolerance import TOL

BATCH, DIM, OUTPUTS = 3, 10, 7
NAMES = ("audio", "image", "text", "depth", "touch")
LENGTHS = {"audio": 5, "image": 2, "text": 3, "depth": 1, "touch": 4}
EXACT, SINGLE = TOL[torch.float64], TOL[torch.float32]
STATIC = {"concat": Concat, "sum": Sum, "film": FiLM, "gated": Gated, "unimodal": Unimodal}
FUSIONS = {
    name: kind
    for name, kind in inspect.getmembers(package, inspect.isclass)
    if issubclass(kind, Fusion) and not inspect.isabstract(kind)
}


def random_tokens(names, *, seed=0, dtype=torch.float64, masked=False, cls=False):
    random = torch.Generator().manual_seed(seed)
    result = {}
    for name in names:
        values = torch.randn(BATCH, LENGTHS[name], DIM, generator=random, dtype=torch.float64)
        mask = torch.rand(BATCH, LENGTHS[name], generator=random) < 0.7 if masked else None
        result[name] = Tokens(values.to(dtype), mask=mask, cls=cls)
    return result


def build_fusion(kind, names, *, dtype=torch.float64, **options):
    """Returns a fusion in evaluation mode with perturbed parameters."""
    torch.manual_seed(0)
    fusion = kind(DIM, **options).build(names).eval().to(dtype)
    with torch.no_grad():
        for parameter in fusion.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return fusion


def check_gradients(fusion):
    """Runs ``gradcheck`` on the features of a fusion of two modalities with respect to the tokens of one sample."""
    inputs = [part.values[:1].clone().requires_grad_() for part in random_tokens(NAMES[1:3]).values()]

    def features(*values):
        return fusion(dict(zip(NAMES[:2], map(Tokens, values), strict=True))).features

    return torch.autograd.gradcheck(features, inputs)
