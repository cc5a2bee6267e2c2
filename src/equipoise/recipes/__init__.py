"""Recipes: YAML files that say what is trained on what and how; the header comment of each is its manual."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from ..errors import ConfigError, unknown_name
from ..model import UNIMODAL

FOLDER = Path(__file__).parent

PRECISIONS = (
    "32-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true", "64-true", "transformer-engine",
    "transformer-engine-float16", "16", "bf16", "32", "64",
)  # fmt: skip
"""As Lightning names them; listed here, so that a wrong one is told before Lightning is loaded or a run starts."""

CHOICES = {"optimizer": ("adamw", "sgd"), "unimodal": UNIMODAL, "precision": PRECISIONS}

LIMITS: dict[str, tuple[type, str, Callable[[Any], bool]]] = {
    "epochs": (int, "epochs >= 1", lambda value: value >= 1),
    "batch_size": (int, "batch_size >= 1", lambda value: value >= 1),
    "learning_rate": (float, "a finite learning_rate > 0", lambda value: 0 < value < math.inf),
    "weight_decay": (float, "a finite weight_decay >= 0", lambda value: 0 <= value < math.inf),
    "warmup": (float, "0 <= warmup < 1", lambda value: 0 <= value < 1),
    "momentum": (float, "0 <= momentum < 1", lambda value: 0 <= value < 1),
    "clip": (float, "clip > 0, or None", lambda value: value > 0),
    "accumulate": (int, "accumulate >= 1", lambda value: value >= 1),
    "exposure": (float, "0 <= exposure <= 1", lambda value: 0 <= value <= 1),
}
"""Training option -> its type, what is expected of it, and whether a value is that."""


@dataclass(frozen=True)
class TrainOptions:
    """How a model is trained.

    Args:
        epochs: passes over the training split; the last one counts, nothing is selected.
        batch_size: samples of one optimiser step and all devices together, before accumulation.
        learning_rate: the peak; it warms up linearly and falls to zero along a cosine.
        weight_decay: decoupled (AdamW) or plain (SGD).
        warmup: part of all steps over which the learning rate rises.
        optimizer: ``"adamw"``, or ``"sgd"`` with ``momentum``.
        momentum: of SGD.
        clip: largest gradient norm; None leaves gradients as they are.
        accumulate: batches added up before a step.
        precision: as Lightning names it, such as ``"32-true"`` or ``"bf16-mixed"``.
        exposure: probability with which, in training, each modality of a sample is replaced by noise.
        unimodal: ``"probe"`` heads watch, ``"train"`` heads teach the encoders, ``"vote"`` heads also add their
            logits to the fused ones, ``"none"``.

    Raises:
        ConfigError: a value of the wrong type, out of its limits, or unknown.

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
    exposure: float = 0.0
    unimodal: Literal["probe", "train", "vote", "none"] = "probe"

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            if (value := getattr(self, name)) not in known:
                raise unknown_name("train", name, str(value), known)
        for name, (kind, expected, holds) in LIMITS.items():
            value = getattr(self, name)
            if value is None and name == "clip":
                continue
            number = isinstance(value, (int, kind)) and not isinstance(value, bool)
            if not number or not holds(value):
                # A variant's options come from YAML as they are.
                fix = "YAML takes 1e-3 for a text; write 1.0e-3." if isinstance(value, str) else ""
                raise ConfigError("train", expected=expected, got=f"{name} = {value!r}", fix=fix)


@dataclass(frozen=True)
class Recipe:
    """Everything that a run needs but its method, seed and fold.

    Args:
        data: ``{"name": data set, option: value, ...}``.
        encoders: modality -> ``{"name": class in equipoise.encoders, option: value, ...}``.
        methods: what ``compare`` runs when it is not told.
        seeds: how many, counted from 0, when ``compare`` is not told.
        folds: which, when ``compare`` is not told; empty for data without folds.
        fusions: name -> options; ``"fusion"`` names the class where the key is a name of your own, ``"train"`` holds
            training options of this variant alone.
        balancers: name -> options; ``"balancer"`` names the class where the key is a name of your own.
        train: how.
        model: what is trained where that is no fusion of one target: ``{"name": class in equipoise.space, language or
            correspondence, option: value, ...}``; methods are then the names under ``variants``.
        variants: name -> options of the model in this variant; ``"train"`` holds training options of it alone.
        noise_modality: the one whose noise the attention should notice; by default the one attended most on
            validation data.
        reference: the method that others are compared with; by default the first static fusion among them.
        references: method -> the method that it is compared with in tables and pages, its fair control; others follow
            the rule of ``record.summarise``.
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

    def with_train(self, **changes: Any) -> Recipe:
        """The same recipe with some training options changed.

        Raises:
            ConfigError: an option that does not exist.
        """
        for name in changes:
            if name not in TrainOptions.__dataclass_fields__:
                raise unknown_name("recipe", "training option", name, TrainOptions.__dataclass_fields__)
        return replace(self, train=replace(self.train, **changes))


def names() -> list[str]:
    """Packaged recipes."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def locate(name_or_path: str | Path) -> Path:
    """The file of a packaged recipe (with or without .yaml) or of a path.

    A file of that path wins over a packaged recipe of the same name.

    Raises:
        ConfigError: neither is there; the closest packaged name is given.
    """
    path = Path(name_or_path)
    if path.is_file():
        return path
    known = f"Packaged recipes: {', '.join(names())}."
    if path.is_dir() and path.name.removesuffix(".yaml") not in names():
        raise ConfigError("recipe", expected="a file or the name of a packaged recipe", got=f"the folder '{path}'",
                          fix=known)  # fmt: skip
    packaged = FOLDER / f"{path.name.removesuffix('.yaml')}.yaml"
    if path.parent == Path() and packaged.is_file():
        return packaged
    if path.parent != Path():
        raise ConfigError(
            "recipe",
            expected="an existing file or the name of a packaged recipe",
            got=str(path),
            fix=known,
        )
    raise unknown_name("recipe", "recipe", path.name.removesuffix(".yaml"), names())


def manual(path: Path) -> str:
    """The header comment of a recipe."""
    lines = path.read_text(encoding="utf-8").splitlines()
    header = []
    for line in lines:
        if not line.startswith("#"):
            break
        header.append(line.removeprefix("#").strip())
    return "\n".join(header).strip()


def read(name_or_path: str | Path) -> Recipe:
    """A recipe from its file.

    Raises:
        ConfigError: no such recipe, no YAML, an option that does not exist or has the wrong type.
    """
    path = locate(name_or_path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"recipe {path.name}", expected="YAML", got=" ".join(str(error).split()).rstrip(".")
        ) from error
    return from_dict(content, f"recipe {path.name}")


def dump(recipe: Recipe) -> str:
    """The recipe as YAML that ``read`` understands."""
    return yaml.safe_dump(asdict(recipe), sort_keys=False, allow_unicode=True)


def from_dict(content: Any, who: str = "recipe") -> Recipe:
    """A recipe from plain values, checked against the types of ``Recipe``."""
    from jsonargparse import ArgumentError, ArgumentParser

    if not isinstance(content, dict):
        raise ConfigError(who, expected="a mapping of options", got=type(content).__name__)
    for key in content:
        if key not in Recipe.__dataclass_fields__:
            raise unknown_name(who, "option", str(key), Recipe.__dataclass_fields__)
    data, train = content.get("data"), content.get("train", {})
    if not isinstance(train, dict):
        raise ConfigError(who, expected="a mapping under train", got=str(train))
    if isinstance(data, dict) and "name" not in data:
        raise ConfigError(who, expected="the name of the data set under data", got=f"data: {data}")
    if content.get("model") and not (isinstance(content["model"], dict) and "name" in content["model"]):
        raise ConfigError(who, expected="the name of a model under model", got=f"model: {content['model']}")
    if content.get("variants") and not content.get("model"):
        raise ConfigError(
            who, expected="variants of a model", got="variants without model",
            fix="Name the model under model, or put variants of a fusion under fusions.",
        )  # fmt: skip
    for key in train:
        if key not in TrainOptions.__dataclass_fields__:
            raise unknown_name(who, "training option", str(key), TrainOptions.__dataclass_fields__)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Recipe, "recipe")
    try:
        parsed = parser.parse_object({"recipe": content}).as_dict()["recipe"]
    except ArgumentError as error:
        expected, got = _in_plain_words(" ".join(str(error).replace("recipe.", "").split()).rstrip("."))
        raise ConfigError(who, expected=expected, got=got) from error
    return Recipe(**{**parsed, "train": TrainOptions(**parsed["train"])})


WORDS = {"dict": "a mapping", "list": "a list", "int": "a whole number", "float": "a number", "str": "a text",
         "bool": "true or false", "NoneType": "nothing"}  # fmt: skip


def _in_plain_words(message: str) -> tuple[str, str]:
    """(expected, got) out of what the parser says in terms of its own and of Python's types."""
    if missing := re.fullmatch(r"the following arguments are required: (.*)", message):
        return f"an entry {missing[1]}", "none"
    found = re.fullmatch(r'Parser key "(?P<key>.*?)": (?P<wanted>.*?)\.? (Got|Given) value: (?P<got>.*)', message)
    kinds = re.search(r"Subtypes: \[(.*?)\]", found["wanted"]) if found else None
    kinds = re.findall(r"<class '(\w+)'>", kinds[1] if kinds else found["wanted"] if found else "")
    choices = re.search(r"Literal\[(.*?)\]", found["wanted"]) if found else None
    if found is None or not (choices or kinds) or any(kind not in WORDS for kind in kinds):
        return "options of the right names and types", message
    wanted = f"one of {choices[1]}" if choices else " or ".join(WORDS[kind] for kind in kinds)
    return f"{wanted} under {found['key']}", found["got"]
