"""Compares ``eq.watch`` with matrices and labels from independent code."""

import copy
import re
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import equipoise as eq
from helpers.eager_attention import EagerAttention
from helpers.tiny_config import AUDIO, IMAGE, VIDEO
from helpers.vlms import AUDIO as OTHER_AUDIO
from helpers.vlms import IMAGE as OTHER_IMAGE
from helpers.vlms import VIDEO as OTHER_VIDEO
from helpers.watch_families import IDS, Family

NEAR = 2e-4
PLACES = {IMAGE: "image", OTHER_IMAGE: "image", VIDEO: "video", OTHER_VIDEO: "video", AUDIO: "audio",
          OTHER_AUDIO: "audio"}  # fmt: skip


@dataclass
class Outcome:
    """Result of a comparison.

    Attributes:
        right: layers whose shares are as expected.
        refused: layer -> reason, of those that are not in the table.
        wrong: what differs, in words.
        joint: whether any layer outside of encoders of one modality is in the table.
        generate: "right", "refused" or "none".
    """

    right: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    joint: bool = False
    generate: str = "none"


def check_family(family: Family, form: int) -> Outcome:
    """Records a forward pass, and ``generate`` if supported, and compares both."""
    torch.manual_seed(0)
    model, inputs = family.make(), family.inputs(form)
    outcome, eager = Outcome(), copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with EagerAttention(eager) as written:
            first = eager(**inputs)[0]
        if not outputs_equal(first, model(**inputs)[0], inputs):
            # The model builds other masks with its own backend, so compute explicit matrices for it.
            eager = model
            with EagerAttention(eager) as written:
                eager(**inputs)
        with eq.watch(model) as seen:
            model(**inputs)
        _compare(family, inputs, seen, written.found, outcome)
        if family.generates and not outcome.wrong:
            _check_generate(family, model, eager, inputs, outcome)
    return outcome


def _compare(family: Family, inputs: dict, seen: Any, written: dict[str, list[Tensor]], outcome: Outcome) -> None:
    everything = [*seen.layers, *(site for site in seen.unimodal_layers if site not in seen.layers)]
    outcome.joint = any(site not in seen.unimodal_layers for site in seen.layers)
    outcome.refused |= {site: why for site, why in seen.missing.items() if site not in everything}
    for site in everything:
        name, _, number = site.partition("#")
        spec = rule(family, site)
        share = seen.share(site)
        if name not in written:
            outcome.wrong.append(f"{site}: no attention was written out there")
            continue
        if spec is None:
            outcome.wrong.append(f"{site}: no expectation; shares {format_share(seen, share)}")
            continue
        if isinstance(spec, str) and spec != IDS:
            expected = torch.tensor([float(known == spec) for known in seen.names]).expand(share.shape)
            rest = after_first(written[name], number)
            ok = shares_close(share, expected) or (
                rest.shape == share.shape[:2] and shares_close(share, expected * rest[..., None])
            )
        else:
            matrix = written[name][int(number or 1) - 1]
            expected = expected_share(
                matrix, labels_of(spec, inputs, matrix.shape[-1]), rows_of(inputs, matrix), seen.names
            )
            if len(expected) > len(share):
                expected = expected.unflatten(0, (len(share), -1)).mean(dim=1)
            ok = expected.shape == share.shape and shares_close(share, expected)
        if ok:
            outcome.right.append(site)
        else:
            outcome.wrong.append(
                f"{site}: shares {format_share(seen, share)}, expected {format_share(seen, expected)} ({spec})"
            )
    messages = {site.partition("#")[0] for site in (*everything, *seen.missing)}
    for name in written:
        if re.search("att", type_path(name), re.IGNORECASE) and not any(related(name, other) for other in messages):
            outcome.wrong.append(f"{name}: ran, and is neither in the table nor in missing")


def _check_generate(family: Family, model: nn.Module, eager: nn.Module, inputs: dict, outcome: Outcome) -> None:
    if not getattr(model, "can_generate", bool)():
        return
    given = {key: value for key, value in inputs.items() if not key.startswith("decoder_")}
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "num_beams": 1}
    with eq.watch(model, queries="last") as seen:
        model.generate(**given, **options)
    with EagerAttention(eager) as written:
        eager.generate(**given, **options)
    compared = 0
    for site in seen.layers if seen.complete else ():
        spec = rule(family, site)
        steps = written.found.get(site, [])
        if spec != IDS or len(steps) != 3:
            continue
        total: Any = 0
        for step in steps:
            labels = labels_of(spec, inputs, step.shape[-1], grown=True)
            total = total + expected_share(step[:, :, -1:], labels, torch.ones(len(step), 1).bool(), seen.names)
        compared += 1
        if not shares_close(seen.share(site), total / 3):
            outcome.wrong.append(f"generate, {site}: shares {format_share(seen, seen.share(site))}, expected "
                                 f"{format_share(seen, total / 3)}")  # fmt: skip
    outcome.generate = "right" if compared else "refused" if seen.missing else "not compared"


def rule(family: Family, name: str) -> Any:
    return next((spec for pattern, spec in family.rules if re.search(pattern, name)), None)


def labels_of(spec: Any, inputs: dict, keys: int, *, grown: bool = False) -> list[list[str | None]]:
    """Returns the modality of every key of every sample; None for keys without one."""
    if callable(spec):
        return [spec(inputs, keys)] * 64
    result = []
    for number, row in enumerate(inputs["input_ids"].tolist()):
        names = [PLACES.get(token, "text") for token in row]
        if (places := inputs.get("image_embeds_position_mask")) is not None:
            names = ["image" if at else name for at, name in zip(places[number].tolist(), names, strict=True)]
        names += ["text"] * (keys - len(names) if grown else 0)
        names = names[-keys:] if grown else names
        if len(names) != keys:
            raise ValueError(f"{keys} keys, and {len(names)} ids")
        result.append(names)
    return result


def rows_of(inputs: dict, matrix: Tensor) -> Tensor:
    mask = inputs.get("attention_mask")
    decoded = inputs.get("decoder_attention_mask")
    if decoded is not None and decoded.shape[1] == matrix.shape[-2] != matrix.shape[-1]:
        return decoded.bool()
    rows = torch.ones(matrix.shape[0], matrix.shape[-2], dtype=torch.bool)
    if (
        mask is not None
        and mask.ndim == 2
        and "input_ids" in inputs
        and mask.shape[0] == len(rows)
        and mask.shape[1] <= rows.shape[1]
    ):
        rows[:, : mask.shape[1]] = mask.bool()
    return rows


def expected_share(matrix: Tensor, labels: list, rows: Tensor, names: tuple[str, ...]) -> Tensor:
    """Computes the definition in loops over samples and modalities."""
    result = torch.zeros(*matrix.shape[:2], len(names), dtype=torch.float64)
    for sample, attention in enumerate(matrix):
        mean = attention[:, rows[sample]].double().mean(dim=1)
        for number, name in enumerate(names):
            columns = torch.tensor([known == name for known in labels[sample]])
            result[sample, :, number] = mean[:, columns].sum(dim=-1)
    return result.float()


def outputs_equal(one: Tensor, other: Tensor, inputs: dict) -> bool:
    """Returns True if two backends give equal outputs, except for padding."""
    mask = inputs.get("attention_mask")
    if mask is not None and one.ndim == 3 and mask.shape == one.shape[:2]:
        one, other = one[mask.bool()], other[mask.bool()]
    return torch.allclose(one, other, atol=1e-3) or (one.ndim < 3 and inputs.get("decoder_input_ids") is not None)


def after_first(matrices: list[Tensor], number: str) -> Tensor:
    """Returns the attention to all keys except the first, a learned class token."""
    return matrices[int(number or 1) - 1][..., 1:].sum(dim=-1).mean(dim=-1)


def shares_close(share: Tensor, expected: Tensor) -> bool:
    return bool((share.float() - expected).abs().nan_to_num(0.0).max() < NEAR)


def format_share(seen: Any, share: Tensor) -> str:
    mean = share.float().nanmean(dim=(0, 1)).tolist()
    return ", ".join(f"{name} {value:.4f}" for name, value in zip(seen.names, mean, strict=True))


def related(one: str, other: str) -> bool:
    return one == other or one.startswith(f"{other}.") or other.startswith(f"{one}.")


def type_path(name: str) -> str:
    return ".".join(name.split(".")[-3:])
