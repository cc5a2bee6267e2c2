"""Collects predictions and attention of a model over a loader, optionally with one modality replaced by noise."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ..errors import ConfigError, ShapeError, unknown_name
from ..geometry import mean_keys, membership
from ..nn.eval_mode import eval_mode_no_grad
from ..tokens.token_batch import Output, as_output

Distribution = Literal["dataset", "standard", "per_sample"]


@dataclass(frozen=True, eq=False)
class CollectedPredictions:
    """Predictions and attention of one pass, on the CPU.

    Attributes:
        logits: (sample, output).
        target: (sample, ...); empty if the batches have no targets.
        names: modality names, in the order of ``share``.
        share: (sample, head, modality) attention of the class query of the fusion; None without attention.
        cosine: (sample, head, modality) cosine of the class query and the mean key; None without attention; NaN if a
            sample lacks the modality.
        key_norm: (sample, head, modality) length of the mean key.
        missing: why a model has no share, if it has attention that could not be attributed.
    """

    logits: Tensor
    target: Tensor
    names: tuple[str, ...]
    share: Float[Tensor, "sample head modality"] | None = None
    cosine: Float[Tensor, "sample head modality"] | None = None
    key_norm: Float[Tensor, "sample head modality"] | None = None
    missing: str = ""


@dataclass(frozen=True)
class NoiseSource:
    """Gaussian noise that replaces a modality; word ids are replaced by other ids of the same batch.

    Args:
        modality: name of the modality to replace.
        mean, std: of the noise; usually those of the training inputs after preprocessing.
        seed: the same seed gives the same noise for the same batches.
        distribution: ``"dataset"`` uses ``mean`` and ``std``, ``"standard"`` 0 and 1, ``"per_sample"`` the mean and
            standard deviation of the valid values of each sample; ``mean`` and ``std`` for samples with a single value,
            which has no deviation.

    Integer inputs, such as word ids, have no mean: their valid values are permuted among all samples of the batch, or
    within each sample for ``"per_sample"``; 0 is padding.
    """

    modality: str
    mean: float = 0.0
    std: float = 1.0
    seed: int = 0
    distribution: Distribution = "dataset"

    def of(self, values: Tensor, batch_number: int, valid: Tensor | None = None) -> Tensor:
        """Returns noise of the shape of ``values``; ``valid`` (broadcastable) selects the values for the statistics."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + batch_number)
        if not values.is_floating_point():
            return permute_ids(values, generator, valid=valid, within=self.distribution == "per_sample")
        drawn = torch.randn(values.shape, generator=generator).to(values.device, values.dtype)
        if self.distribution == "standard":
            return drawn
        if self.distribution == "per_sample":
            mean, std = sample_statistics(values, valid)
            single = _count(values, valid) < 2
            return drawn * torch.where(single, self.std, std) + torch.where(single, self.mean, mean)
        return drawn * self.std + self.mean


def permute_ids(
    ids: Int[Tensor, "batch token"], generator: torch.Generator, *, valid: Tensor | None = None, within: bool = False
) -> Int[Tensor, "batch token"]:
    """Permutes the valid ids of a batch at random, among all samples or ``within`` each; 0 and masked ids stay.

    Example:
        >>> permute_ids(torch.tensor([[5, 5, 0], [5, 0, 0]]), torch.Generator().manual_seed(0)).tolist()
        [[5, 5, 0], [5, 0, 0]]
    """
    moved = ids.cpu() > 0
    if valid is not None:
        moved = moved & valid.cpu().expand(ids.shape)
    result = ids.cpu().clone()
    for rows in range(len(ids)) if within else [slice(None)]:
        chosen, picked = result[rows], moved[rows]
        words = chosen[picked]
        chosen[picked] = words[torch.randperm(len(words), generator=generator)]
    return result.to(ids.device)


def collect_predictions(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], *, noise: NoiseSource | None = None
) -> CollectedPredictions:
    """Runs a FusionModel over batches in evaluation mode; training modes, hooks and the RNG state are restored.

    Args:
        model: a FusionModel, or a module that returns ``Output``.
        batches: dicts with every modality, and ``"target"`` where there is one.
        noise: noise that replaces one modality in every batch.

    Raises:
        ConfigError: the module is neither of these, or the model does not have the modality of ``noise``.
        ShapeError: no batch, a batch that is not a dict or lacks the modality of ``noise``, or targets in only some of
            the batches.
    """
    names = _names(model)
    if noise is not None and noise.modality not in names:
        raise unknown_name("read", "modality", noise.modality, names)
    records: dict[str, list[Tensor]] = {"logits": [], "target": [], "share": [], "cosine": [], "key_norm": []}
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    missing: list[str] = []
    with eval_mode_no_grad(model), collect_with_attention(model, records, missing):
        for number, batch in enumerate(named_batches(model, batches)):
            inputs = {key: to_device(value, device) for key, value in check_batch(batch, "read").items()}
            if noise is not None:
                values = input_of(inputs, noise.modality, "read")
                inputs[noise.modality] = noise.of(values, number, valid_of(inputs, noise.modality, values))
            returned = model(inputs)
            if not isinstance(returned, Output) and not hasattr(model, "output_of"):
                raise _no_fusion_model(f"{type(model).__name__} that returns {type(returned).__name__}")
            output = as_output(model, returned, "read")
            if output.logits is None:
                raise _no_fusion_model(f"{type(model).__name__} that returns no logits")
            records["logits"].append(output.logits.float().cpu())
            if batch.get("target") is not None:
                records["target"].append(batch["target"].to("cpu", copy=True))
            if output.share is not None:
                records["share"].append(output.share.float().cpu())
    if not records["logits"]:
        raise ShapeError(
            "read", expected="at least one batch", got="none", fix="Is the split empty, or the loader used up?"
        )
    if records["target"] and len(records["target"]) < len(records["logits"]):
        raise ShapeError(
            "read",
            expected="a target in every batch or in none",
            got=f"one in {len(records['target'])} of {len(records['logits'])} batches",
        )
    records["target"] = records["target"] or [torch.zeros(0)]
    joined = {key: torch.cat(parts) if parts else None for key, parts in records.items()}
    return CollectedPredictions(names=names, missing="; ".join(missing), **joined)  # type: ignore[arg-type]


def named_batches(model: nn.Module, batches: Iterable[Any]) -> Iterator[Any]:
    """Yields batches as dicts with the modalities' names; a model of ``eq.adapt`` converts those of its own loader."""
    convert = getattr(model, "to_batch", None)
    return iter(batches) if convert is None else map(convert, batches)


def check_batch(batch: Any, who: str) -> Mapping[str, Any]:
    """Returns the batch if it is a dict; raises ShapeError otherwise."""
    if isinstance(batch, Mapping):
        return batch
    raise ShapeError(
        who,
        expected="batches that are dicts: modality name -> input",
        got=type(batch).__name__,
        fix="Wrap the loader: ({'audio': a, 'image': i, 'target': t} for a, i, t in loader).",
    )


def input_of(batch: Any, modality: str, who: str) -> Tensor:
    """Returns the input of a modality; raises ShapeError unless it is a floating-point tensor or (batch, token) ids."""
    value = check_batch(batch, who).get(modality)
    if isinstance(value, Tensor) and (value.is_floating_point() or is_ids(value)):
        return value
    raise ShapeError(
        f"{who} '{modality}'",
        expected="a floating tensor or word ids in every batch, for noise to replace",
        got=str(value.dtype) if isinstance(value, Tensor) else type(value).__name__,
        fix="Leave out batches that lack the modality, or choose another one.",
    )


def is_ids(value: Tensor) -> bool:
    """Returns whether the tensor holds word ids: integers of shape (batch, token)."""
    return value.ndim == 2 and not value.is_floating_point() and not value.is_complex() and value.dtype != torch.bool


def valid_of(batch: Mapping[str, Any], modality: str, values: Tensor) -> Bool[Tensor, "batch ..."]:
    """The valid values of the input of a modality according to the mask of the batch, broadcastable to the input.

    A token mask applies to inputs (batch, token, ...) of the same size. If the tokens are created by the encoder, the
    mask only excludes samples without any token.
    """
    masks = batch.get("mask")
    mask = masks.get(modality) if isinstance(masks, Mapping) else None
    if not isinstance(mask, Tensor):
        mask = torch.ones(len(values), dtype=torch.bool)
    mask = mask.bool().to(values.device)
    if mask.ndim > 1 and (mask.shape != values.shape[:2] or values.ndim == 4):
        mask = mask.flatten(1).any(dim=1)
    return mask.reshape(*mask.shape, *[1] * (values.ndim - mask.ndim))


def sample_statistics(
    values: Float[Tensor, "batch ..."], valid: Tensor | None = None
) -> tuple[Float[Tensor, "batch ..."], Float[Tensor, "batch ..."]]:  # fmt: skip
    """(mean, standard deviation) of each sample's valid values, (batch, 1, ...); 0 where a sample has none.

    Example:
        >>> valid = torch.tensor([[True, True, False]])
        >>> sample_statistics(torch.tensor([[1.0, 3.0, torch.nan]]), valid)
        (tensor([[2.]]), tensor([[1.]]))
    """
    axes = tuple(range(1, values.ndim))
    count = _count(values, valid).clamp(min=1)
    valid = (torch.ones_like(values, dtype=torch.bool) if valid is None else valid).expand(values.shape)
    mean = values.masked_fill(~valid, 0).sum(axes, keepdim=True) / count
    square = (values - mean).masked_fill(~valid, 0).square().sum(axes, keepdim=True) / count
    return mean, square.sqrt()


def _count(values: Float[Tensor, "batch ..."], valid: Tensor | None) -> Tensor:
    """Returns the number of valid values of each sample, (batch, 1, ...)."""
    valid = (torch.ones_like(values, dtype=torch.bool) if valid is None else valid).expand(values.shape)
    return valid.sum(tuple(range(1, values.ndim)), keepdim=True)


def _names(model: nn.Module) -> tuple[str, ...]:
    names = getattr(model, "names", None)
    if not names:
        raise _no_fusion_model(f"{type(model).__name__} without names")
    return tuple(names)


def _no_fusion_model(got: str) -> ConfigError:
    return ConfigError(
        "read",
        expected="a FusionModel, or a module with the modalities' names that returns Output",
        got=got,
        fix="Set model.names = ('audio', 'image') and return equipoise.Output(features, logits=logits); or adapt it: "
        "model = eq.adapt(model, encoders={'audio': model.audio, ...}).",
    )


def to_device(value: Any, device: torch.device) -> Any:
    """Moves a tensor, or the tensors of a dict, to a device; other values are unchanged."""
    if isinstance(value, Tensor):
        return value.to(device)
    # The masks of a batch, or inputs that an encoder takes by name.
    return {key: to_device(part, device) for key, part in value.items()} if isinstance(value, dict) else value


@contextlib.contextmanager
def collect_with_attention(
    model: nn.Module, records: dict[str, list[Tensor]], missing: list[str] | None = None
) -> Iterator[None]:
    """Collects "cosine" and "key_norm" (batch, head, modality) at the pooling attention, if there is one.

    A model of ``eq.adapt`` also adds its "share", or the reason why there is none to ``missing``.
    """
    adapted: Any = model
    if callable(getattr(model, "attention_readout", None)):
        with adapted.attention_readout() as readout:
            yield
        if (name := readout.readout) is None:
            if missing is not None:
                missing.append(readout.reason())
        elif not records["share"]:
            cosine, norm = readout.cosine(name)
            records["share"], records["cosine"], records["key_norm"] = [readout.share(name)], [cosine], [norm]
        return
    layer = getattr(getattr(model, "fusion", None), "attention", None)
    if layer is None:
        yield
        return

    def record(core: nn.Module, args: tuple, kwargs: dict) -> None:
        query, key, _ = args
        mask = kwargs.get("mask")
        member = membership(kwargs["modality"], kwargs["num_modalities"], len(query), mask)
        means, counts = mean_keys(key.float(), member)
        means = means.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        cosine = torch.cosine_similarity(query[:, :, :1].float(), means, dim=-1, eps=1e-12)
        absent = (counts == 0)[:, None].expand(cosine.shape)
        records["cosine"].append(cosine.masked_fill(absent, torch.nan).cpu())
        records["key_norm"].append(means.norm(dim=-1).masked_fill(absent, torch.nan).cpu())

    # Registered after the hook of RollingQ, so that the query is already rotated.
    handle = layer.core.register_forward_pre_hook(record, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
