"""Saves models to folders and the Hugging Face Hub, and loads them without executing code."""

from __future__ import annotations

import copy
import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn

from ...balance import RollingQ
from ...errors import ConfigError, DataError, SchemaError, require_extra
from ...io.atomic_files import atomic_write, check_file, read_json
from ...io.recorded_options import RecordedOptions
from ...io.typed_values import shorten_repr
from ...io.weight_files import load_weights, save_weights
from .model_card import write_model_card
from .module_description import add_rotations, build, describe, describe_rotations

if TYPE_CHECKING:
    from ...diagnostics.suite import Diagnosis

CONFIG, WEIGHTS, CARD, DIAGNOSIS = FILES = ("config.json", "model.safetensors", "README.md", "diagnosis.json")
SCHEMA = 1
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


class HubMethods(RecordedOptions):
    """Adds ``save_pretrained``, ``from_pretrained`` and ``push_to_hub`` to a model, as huggingface_hub's mixins do.

    The files are ``config.json`` (classes of equipoise and their options), ``model.safetensors``, the card
    ``README.md`` and, if there is one, ``diagnosis.json``. Loading imports and runs nothing that a file names. Folders
    need no further package; the Hub needs ``huggingface_hub`` (``pip install 'equipoise[hf]'``)."""

    def save_pretrained(
        self, folder: str | os.PathLike[str], *, diagnosis: Diagnosis | None = None, repo_id: str | None = None
    ) -> Path:
        """Saves the model to a folder, with its rotations.

        Encoders and fusions of equipoise and ``nn.Linear`` are described in ``config.json``; other modules have to be
        passed to ``from_pretrained``.

        Args:
            folder: a folder, which is created; its files are replaced.
            diagnosis: result of ``eq.diagnose`` for the card; for a model of ``eq.load`` that of its run, if it was
                diagnosed.
            repo_id: name on the Hub, for the card.

        Raises:
            ConfigError: a model whose weights do not fit its description, such as one with modules that were added
            later.
        """
        model: Any = self
        folder = Path(folder)
        shared = getattr(self, "shared_from", {})
        diagnosis = diagnosis or shared.get("diagnosis")
        content = {"library_name": "equipoise", "schema": SCHEMA, "model": describe(self),
                   "rotations": describe_rotations(model)}  # fmt: skip
        _check_description(model, content)
        folder.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            check_file(folder / name, "save_pretrained")
        save_weights(model, folder / WEIGHTS)
        atomic_write(
            folder / CARD, write_model_card(model, repo_id=repo_id, diagnosis=diagnosis, run=shared.get("run"))
        )
        if diagnosis is not None:
            atomic_write(folder / DIAGNOSIS, json.dumps(diagnosis.to_dict(), indent=1, allow_nan=False) + "\n")
        # Written last: a folder without it is incomplete.
        atomic_write(folder / CONFIG, json.dumps(content, indent=1, allow_nan=False) + "\n")
        return folder

    @classmethod
    def from_pretrained(cls, location: str | os.PathLike[str], *, revision: str | None = None, token: str | None = None,
                        cache_dir: str | Path | None = None, **modules: Any) -> Self:  # fmt: skip
        """Loads a saved model, on the CPU and in evaluation mode.

        Args:
            location: a folder, or the name of a model on the Hub, ``"user/name"``.
            revision, token, cache_dir: of the Hub; see ``huggingface_hub.snapshot_download``.
            modules: modules that ``config.json`` does not describe: ``encoders={"audio": module}``, ``fusion=module``.

        Raises:
            DataError: no such folder or model, or damaged weights. SchemaError: an invalid ``config.json``.
            ConfigError: a model of another class, or a module that has to be passed.
            MissingExtraError: a name on the Hub without ``huggingface_hub``.
        """
        folder = find_pretrained(location, revision=revision, token=token, cache_dir=cache_dir)
        model = load_pretrained(folder, **modules)
        if not isinstance(model, cls):
            raise ConfigError(
                f"{cls.__name__}.from_pretrained", expected=f"a {cls.__name__}", got=f"a {type(model).__name__}",
                fix="Load it with eq.load.",
            )  # fmt: skip
        return model

    def push_to_hub(
        self,
        repo_id: str,
        *,
        diagnosis: Diagnosis | None = None,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        commit_message: str = "Upload model with equipoise",
        create_pr: bool = False,
    ) -> str:
        """Uploads the files of ``save_pretrained`` to the Hugging Face Hub, and returns the address of the commit.

        Args:
            repo_id: ``"user/name"``; the repository is created if it does not exist.
            diagnosis: see ``save_pretrained``.
            private, token, revision, commit_message, create_pr: of the Hub; see ``huggingface_hub.HfApi``.

        Raises:
            MissingExtraError: ``huggingface_hub`` is not installed. ConfigError: see ``save_pretrained``.
        """
        with require_extra(f"{type(self).__name__}.push_to_hub"):
            from huggingface_hub import HfApi
        api = HfApi(token=token)
        with tempfile.TemporaryDirectory() as place:
            folder = self.save_pretrained(place, diagnosis=diagnosis, repo_id=repo_id)
            name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            commit = api.upload_folder(
                repo_id=name, folder_path=folder, revision=revision, commit_message=commit_message, create_pr=create_pr
            )
        return str(commit)


def find_pretrained(
    location: str | os.PathLike[str], *, revision: str | None = None, token: str | None = None,
    cache_dir: str | Path | None = None,
) -> Path:  # fmt: skip
    """Returns the folder of a model: an existing one, or that of a model on the Hub after downloading it.

    Raises:
        DataError: neither a folder nor a model on the Hub. MissingExtraError: ``huggingface_hub`` is not installed.
    """
    path, text = Path(location), os.fspath(location)
    if path.is_dir():
        return path
    if not HUB_ID.fullmatch(text):
        raise DataError(
            "load", expected="a folder, or the name of a model on the Hub such as user/name", got=f"'{text}'"
        )
    with require_extra(f"load '{text}' from the Hub"):
        from huggingface_hub import snapshot_download
    try:
        found = snapshot_download(text, revision=revision, token=token, cache_dir=cache_dir, allow_patterns=list(FILES))
    except Exception as error:
        reason = shorten_repr(next(iter(str(error).splitlines()), "") or type(error).__name__)
        raise DataError(
            "load", expected="a folder, or a model on the Hub", got=f"'{text}', which is no folder; the Hub: {reason}"
        ) from error
    return Path(found)


def is_pretrained(folder: Path) -> bool:
    """Returns whether a folder was written by ``save_pretrained``."""
    try:
        content = read_json(folder / CONFIG)
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("library_name") == "equipoise"


def load_pretrained(folder: Path, **modules: Any) -> Any:
    """Loads the model in a folder; see ``HubMethods.from_pretrained``."""
    who = f"load '{folder.name}'"
    try:
        content = read_json(folder / CONFIG)
    except FileNotFoundError as error:
        fix = "save_pretrained and push_to_hub write one."
        raise DataError(who, expected=f"a model with {CONFIG}", got=f"no {CONFIG}", fix=fix) from error
    except (OSError, ValueError) as error:
        raise SchemaError(who, expected=f"JSON in {CONFIG}", got=shorten_repr(str(error))) from error
    if not isinstance(content, dict) or content.get("library_name") != "equipoise" or content.get("schema") != SCHEMA:
        raise SchemaError(who, expected=f"a model of equipoise, schema {SCHEMA}", got=f"another {CONFIG}")
    model = _build(content, _flatten(modules))
    load_weights(model, folder / WEIGHTS)
    return model.eval()


def _build(content: Mapping[str, Any], given: Mapping[str, nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        model = build(content.get("model"), given, "")
    if not isinstance(model, HubMethods) or not isinstance(model, nn.Module):
        raise SchemaError("from_pretrained", expected="the description of a model", got=type(model).__name__)
    add_rotations(model, content.get("rotations", {}))
    return model


def _flatten(modules: Mapping[str, Any]) -> dict[str, nn.Module]:
    """Returns path -> module, such as ``"encoders.audio"``."""
    flat: dict[str, nn.Module] = {}
    for name, value in modules.items():
        parts = (
            {name: value} if isinstance(value, nn.Module) else {f"{name}.{key}": part for key, part in value.items()}
        )
        flat |= parts
    return flat


def _is_given(module: nn.Module) -> bool:
    return not isinstance(module, nn.ModuleDict) and "given" in describe(module)


def _check_description(model: nn.Module, content: Mapping[str, Any]) -> None:
    """Raises ConfigError if the described model has other weights; modules without a description are copied."""
    given = {name: copy.deepcopy(module) for name, module in model.named_modules() if name and _is_given(module)}
    for rolling in [part for module in given.values() for part in module.modules() if isinstance(part, RollingQ)]:
        rolling.detach()
    own = {name: value.shape for name, value in model.state_dict().items()}
    other = {name: value.shape for name, value in _build(content, given).state_dict().items()}
    # Rows of training data in buffers are sized when they are loaded.
    different = sorted(own.keys() ^ other.keys()) or [n for n, _ in model.named_parameters() if own[n] != other[n]]
    if different:
        raise ConfigError(
            "save_pretrained", expected="weights that follow from the options of the model",
            got=f"'{different[0]}', which was added or changed later", fix="Save its state_dict instead.",
        )  # fmt: skip
