"""Optional dependencies: which extra of ``pip install`` provides which package, and the error where one is missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from .errors import MissingExtraError

EXTRAS = {
    "train": (
        "lightning",
        "torchmetrics",
        "sklearn",
        "scipy",
        "soundfile",
        "PIL",
        "rich",
        "yaml",
        "datasets",
    ),
    "report": ("matplotlib", "jinja2"),
    "hf": ("transformers", "accelerate", "huggingface_hub"),
    "lora": ("peft",),
}
"""Extra -> names of the modules that it provides, as they are imported."""

DISTRIBUTIONS = {"sklearn": "scikit-learn", "PIL": "pillow", "yaml": "pyyaml"}
"""Module -> name of its package on PyPI where the two differ."""


@contextmanager
def require_extra(who: str) -> Iterator[None]:
    """Turns the import error of an optional package into one that names the extra to install.

    Args:
        who: feature that needs the package; begins the error's message.

    Raises:
        MissingExtraError: an import in the ``with`` block fails because an optional package is not installed.

    Example:
        >>> with require_extra("eq.lightning"):
        ...     raise ModuleNotFoundError("No module named 'lightning'", name="lightning")
        Traceback (most recent call last):
        equipoise.errors.MissingExtraError: eq.lightning: expected the package 'lightning', got none installed. \
Install it: pip install 'equipoise[train]'
    """
    try:
        yield
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        for extra, modules in EXTRAS.items():
            if module in modules:
                raise MissingExtraError(
                    who, expected=f"the package '{DISTRIBUTIONS.get(module, module)}'", got="none installed",
                    fix=f"Install it: pip install 'equipoise[{extra}]'",
                ) from error  # fmt: skip
        raise
