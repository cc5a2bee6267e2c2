"""Recipes: YAML files that define data, models and training; the header comment of each documents it."""

from __future__ import annotations

import copy
import math
import re
import typing
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from ...data.corruptions import check_corruptions
from ...errors import ConfigError, unknown_name
from ...integrations.loggers import parse_loggers
from ...io.atomic_files import check_path_component
from ...io.typed_values import matches_type, shorten_repr, type_description
from ...models.fusion_model import UNIMODAL
from ...results.task_metrics import select_metrics

YAML_FLOAT = "YAML parses 1e-3 as a string; write 1.0e-3."

FOLDER = Path(__file__).parent

PRECISIONS = (
    "32-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true", "64-true", "transformer-engine",
    "transformer-engine-float16", "16", "bf16", "32", "64",
)  # fmt: skip
"""Names used by Lightning, listed here so that a wrong one is reported before Lightning is imported."""

CHOICES = {"optimizer": ("adamw", "sgd"), "unimodal": UNIMODAL, "precision": PRECISIONS}

MOST = 2**31 - 1
"""Upper limit of integer options."""

LIMITS: dict[str, tuple[type, str, Callable[[Any], bool]]] = {
    "epochs": (int, "epochs >= 1", lambda value: 1 <= value <= MOST),
    "batch_size": (int, "batch_size >= 1", lambda value: 1 <= value <= MOST),
    "learning_rate": (float, "a finite learning_rate > 0", lambda value: 0 < value < math.inf),
    "weight_decay": (float, "a finite weight_decay >= 0", lambda value: 0 <= value < math.inf),
    "warmup": (float, "0 <= warmup < 1", lambda value: 0 <= value < 1),
    "momentum": (float, "0 <= momentum < 1", lambda value: 0 <= value < 1),
    "clip": (float, "clip > 0, or None", lambda value: value > 0),
    "accumulate": (int, "accumulate >= 1", lambda value: 1 <= value <= MOST),
    "checkpoint_steps": (int, "checkpoint_steps >= 1, or None", lambda value: 1 <= value <= MOST),
    "workers": (int, "0 <= workers <= 1024", lambda value: 0 <= value <= 1024),
}
"""Training option -> its type, the expected values in words, and a check."""


@dataclass(frozen=True)
class TrainOptions:
    """Training options.

    Args:
        epochs: passes over the training split; the last epoch is evaluated, without model selection.
        batch_size: samples per batch over all devices, before accumulation.
        learning_rate: peak learning rate, after linear warm-up and before cosine decay to zero.
        weight_decay: decoupled (AdamW) or plain (SGD).
        warmup: fraction of all steps used for warm-up.
        optimizer: ``"adamw"``, or ``"sgd"`` with ``momentum``.
        momentum: momentum of SGD.
        clip: maximum gradient norm; None disables clipping.
        accumulate: batches per optimizer step.
        precision: precision of Lightning, such as ``"32-true"`` or ``"bf16-mixed"``.
        unimodal: unimodal heads: ``"probe"`` (detached from the encoders), ``"train"`` (their losses train the
            encoders), ``"ensemble"`` (their logits are also added to the fused ones), or ``"none"``.
        workers: processes that read training batches in advance; the result does not depend on it.
        checkpoint_steps: also save a checkpoint every so many optimizer steps, from which training resumes in the
            middle of an epoch; None saves after every epoch only.
        gradient_checkpointing: recompute the activations of each layer in the backward pass, which saves memory and
            takes more time; the result does not change.

    Raises:
        ConfigError: a value has the wrong type, is out of range, or unknown.

    Example:
        >>> TrainOptions(epochs=3).optimizer
        'adamw'
    """

    epochs: int = 12
    batch_size: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    warmup: float = 0.05
    optimizer: Literal["adamw", "sgd"] = "adamw"
    momentum: float = 0.9
    clip: float | None = None
    accumulate: int = 1
    precision: str = "32-true"
    unimodal: Literal["probe", "train", "ensemble", "none"] = "probe"
    workers: int = 0
    checkpoint_steps: int | None = None
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if not isinstance(value, str) or value not in choices:
                raise unknown_name("train", name, shorten_repr(value), choices)
        for name, (kind, expected, holds) in LIMITS.items():
            value = getattr(self, name)
            if value is None and name in ("clip", "checkpoint_steps"):
                continue
            number = isinstance(value, (int, kind)) and not isinstance(value, bool)
            if not number or not holds(value):
                # Options of a variant come from YAML unconverted.
                fix = YAML_FLOAT if isinstance(value, str) else ""
                raise ConfigError("train", expected=expected, got=f"{name} = {value!r}", fix=fix)


@dataclass(frozen=True)
class Recipe:
    """Definition of runs, except for method, seed and fold.

    Args:
        data: ``{"name": data set, option: value, ...}``.
        encoders: modality -> ``{"name": class in equipoise.encoders, option: value, ...}``.
        methods: default methods of ``compare``.
        seeds: default number of seeds of ``compare``, starting at 0.
        folds: default folds of ``compare``; empty for data without folds.
        fusions: name -> options; ``"fusion"`` is the class if the key is not one, ``"train"`` the training options of
            this variant only, ``"encoders"`` options of its encoders, modality -> options.
        balancers: name -> options; ``"balancer"`` is the class if the key is not one.
        train: training options.
        model: a self-contained model to train instead of fusions: ``{"name": class in equipoise.models, option: value,
            ...}``; methods are then the names under ``variants``.
        variants: name -> options of the model in this variant; ``"train"`` is the training options of this variant
            only.
        noise_modality: modality to replace by noise in the attention test; by default the one with the largest share
            on validation data.
        reference: method that others are compared with; by default the first static fusion.
        references: method -> its control, the method that it is compared with in tables and pages; other methods are
            compared as described in ``summarize_runs``.
        metrics: names of ``equipoise.results.task_metrics.METRICS`` that are measured beside the score of the task, on
            clean test data and with each modality replaced by noise. The first one is the main metric of tables,
            verdicts and paired tests.
        test_corruptions: names of ``equipoise.diagnostics.corruptions`` that are tested: each run measures
            ``<score>_corrupted/<modality>``, the mean over these corruptions of one modality at severities 1, 3 and 5.
        left_out: the same, for corruptions that are not trained with: ``ModalityCorruption`` trains, and
            ``+reliability`` is calibrated, with the others of the catalog.
        logger: names of the loggers of each run: ``csv``, ``tensorboard``, ``wandb``, ``trackio``; see
            ``docs/logging.md``. They do not change the results.
    """

    data: dict[str, Any]
    encoders: dict[str, dict[str, Any]]
    methods: list[str] = field(default_factory=lambda: ["concat", "joint", "joint+rollingq"])
    seeds: int = 5
    folds: list[str] = field(default_factory=list)
    fusions: dict[str, dict[str, Any]] = field(default_factory=dict)
    balancers: dict[str, dict[str, Any]] = field(default_factory=dict)
    train: TrainOptions = field(default_factory=TrainOptions)
    model: dict[str, Any] = field(default_factory=dict)
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    noise_modality: str | None = None
    reference: str | None = None
    references: dict[str, str] = field(default_factory=dict)
    metrics: list[str] = field(default_factory=list)
    test_corruptions: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    logger: list[str] = field(default_factory=list)

    @property
    def data_title(self) -> str:
        """Name of the data set; for a table of the user, that of its file."""
        return Path(str(self.data["path"])).stem if "path" in self.data else str(self.data["name"])

    def with_train(self, **changes: Any) -> Recipe:
        """Returns the recipe with changed training options.

        Raises:
            ConfigError: unknown option.
        """
        for name in changes:
            if name not in TrainOptions.__dataclass_fields__:
                raise unknown_name("recipe", "training option", name, TrainOptions.__dataclass_fields__)
        return replace(self, train=replace(self.train, **changes))


def recipe_names() -> list[str]:
    """Returns the names of the packaged recipes."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def find_recipe(name_or_path: str | Path) -> Path:
    """Returns the file of a packaged recipe (with or without .yaml), or an existing path.

    An existing file takes precedence over a packaged recipe of the same name.

    Raises:
        ConfigError: neither exists; the message lists the closest packaged names.
    """
    path = Path(name_or_path)
    if path.is_file():
        return path
    hint = f"Packaged recipes: {', '.join(recipe_names())}."
    if path.is_dir() and path.name.removesuffix(".yaml") not in recipe_names():
        raise ConfigError("recipe", expected="a file or the name of a packaged recipe", got=f"the folder '{path}'",
                          fix=hint)  # fmt: skip
    packaged = FOLDER / f"{path.name.removesuffix('.yaml')}.yaml"
    if path.parent == Path() and packaged.is_file():
        return packaged
    if path.parent != Path():
        raise ConfigError(
            "recipe",
            expected="an existing file or the name of a packaged recipe",
            got=str(path),
            fix=hint,
        )
    raise unknown_name("recipe", "recipe", path.name.removesuffix(".yaml"), recipe_names())


def recipe_header(path: Path) -> str:
    """Returns the header comment of a recipe."""
    lines = path.read_text(encoding="utf-8").splitlines()
    header = []
    for line in lines:
        if not line.startswith("#"):
            break
        header.append(line.removeprefix("#").strip())
    return "\n".join(header).strip()


def load_recipe(name_or_path: str | Path) -> Recipe:
    """Loads a recipe.

    Raises:
        ConfigError: unknown recipe, invalid YAML, or an option that is unknown or of the wrong type.
    """
    from .recipe_parsing import BYTES, parse

    path = find_recipe(name_or_path)
    who = f"recipe {shorten_repr(path.name)}"
    try:
        text = path.read_text(encoding="utf-8") if path.stat().st_size <= 4 * BYTES else " " * (BYTES + 1)
    except UnicodeDecodeError as error:
        raise ConfigError(who, expected="YAML in UTF-8", got=str(error)) from error
    return recipe_from_dict(parse(text, who), who)


def dump_recipe(recipe: Recipe) -> str:
    """Returns the recipe as YAML that ``load_recipe`` reads."""
    import yaml

    return yaml.safe_dump(asdict(recipe), sort_keys=False, allow_unicode=True)


def recipe_from_dict(content: Any, who: str = "recipe") -> Recipe:
    """Builds a recipe from plain values and checks their types.

    Raises:
        ConfigError: an option is unknown, missing, or of the wrong type; a name is not a valid path component.
    """
    if not isinstance(content, dict):
        raise ConfigError(who, expected="a mapping of options", got=type(content).__name__)
    for key in content:
        if key not in Recipe.__dataclass_fields__:
            raise unknown_name(who, "option", shorten_repr(key), Recipe.__dataclass_fields__)
    if "logger" in content:
        content = {**content, "logger": parse_loggers(content["logger"] or [], f"{who}: logger")}
    data, train = content.get("data"), content.get("train", {})
    if not isinstance(train, dict):
        raise ConfigError(who, expected="a mapping under train", got=shorten_repr(train))
    if isinstance(data, dict) and "name" not in data:
        raise ConfigError(who, expected="the name of the data set under data", got=shorten_repr(f"data: {data}"))
    if content.get("model") and not (isinstance(content["model"], dict) and "name" in content["model"]):
        raise ConfigError(
            who, expected="the name of a model under model", got=shorten_repr(f"model: {content['model']}")
        )
    if content.get("variants") and not content.get("model"):
        raise ConfigError(
            who, expected="variants of a model", got="variants without model",
            fix="Name the model under model, or put variants of a fusion under fusions.",
        )  # fmt: skip
    for key in train:
        if key not in TrainOptions.__dataclass_fields__:
            raise unknown_name(who, "training option", shorten_repr(key), TrainOptions.__dataclass_fields__)
    checked = _checked(Recipe, {key: value for key, value in content.items() if key != "train"}, who)
    for part in ("data", "model"):
        if not isinstance(checked.get(part, {}).get("name", ""), str):
            raise ConfigError(who, expected=f"a text under {part}.name", got=shorten_repr(checked[part]["name"]))
    if checked.get("metrics"):
        select_metrics(checked["metrics"], None, f"{who}: metrics")
        if content.get("model"):
            raise ConfigError(
                f"{who}: metrics", expected="metrics of a fusion", got=f"the model '{content['model']['name']}'",
                fix="Leave out metrics: the model defines its own evaluation.",
            )  # fmt: skip
    for part in ("test_corruptions", "left_out"):
        check_corruptions(checked.get(part, ()), f"{who}: {part}")
    for part in ("encoders", "fusions", "balancers", "variants"):
        for name in checked.get(part, ()):
            check_path_component(name, f"{who}, {part}", without="+,")
    return Recipe(**checked, train=TrainOptions(**_checked(TrainOptions, train, who, "train.")))


def _checked(cls: type, content: dict[str, Any], who: str, prefix: str = "") -> dict[str, Any]:
    """Checks values against the annotations of a dataclass and returns those to construct it with."""
    hints, result = typing.get_type_hints(cls), {}
    for field_ in fields(cls):
        if field_.name not in content:
            if field_.default is MISSING and field_.default_factory is MISSING:
                raise ConfigError(who, expected=f"an entry {prefix}{field_.name}", got="none")
            continue
        value, hint = content[field_.name], hints[field_.name]
        if not matches_type(value, hint):
            where, value, hint = _innermost(f"{prefix}{field_.name}", value, hint)
            raise ConfigError(
                who,
                expected=f"{type_description(hint)} under {where}",
                got=shorten_repr(value),
                fix=_advice(value, hint),
            )
        is_float = hint is float or float in typing.get_args(hint)
        result[field_.name] = float(value) if is_float and isinstance(value, int) else copy.deepcopy(value)
    return result


def _innermost(where: str, value: Any, hint: Any) -> tuple[str, Any, Any]:
    """Returns the key, value and annotation of the innermost value of the wrong type."""
    *_, part = typing.get_args(hint) or (None,)
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if typing.get_origin(hint) in (dict, list):
        for key, one in inner:
            if isinstance(key, str | int) and not matches_type(one, part):
                return _innermost(f"{where}.{shorten_repr(key)}", one, part)
    return where, value, hint


def _advice(value: Any, hint: Any) -> str:
    return YAML_FLOAT if isinstance(value, str) and float in (hint, *typing.get_args(hint)) and is_float(value) else ""


def is_float(text: str) -> bool:
    """Returns whether YAML 1.1 parses a number as a string, since it has an exponent but no decimal point."""
    return re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", text) is not None
