"""FusionModel: encoders -> fusion -> head, for any number of modalities."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import ConfigError, ShapeError, unknown_name
from ..fusion import Fusion
from ..tokens.masks import bool_mask, without_masked
from ..tokens.token_batch import Output, Tokens, as_tokens
from .sharing import HubMethods
from .task_losses import Task, TaskLosses

Unimodal = Literal["probe", "train", "ensemble", "none"]
MASK = "a tensor (batch,) or (batch, token), boolean or all 0 and 1, True = present"
UNIMODAL = ("probe", "train", "ensemble", "none")


class FusionModel(HubMethods, TaskLosses, nn.Module):
    """A multimodal model: an encoder per modality, a fusion of their tokens, and a linear head.

    Args:
        encoders: name -> module that returns ``Tokens``, (batch, token, dim), (batch, dim) or an object with
            ``last_hidden_state``. The order of the names is the order of the modalities.
        fusion: the fusion module.
        num_outputs: number of classes, labels or regression targets.
        task: ``"classification"`` (cross entropy), ``"multilabel"`` (binary cross entropy), ``"regression"`` (squared
            error).
        unimodal: linear heads on the pooled vector of each modality: ``"probe"`` detaches their inputs, so that they
            only measure; ``"train"`` lets their losses reach the encoders; ``"ensemble"`` also adds their logits, with
            stopped gradient, to the fused logits, so that the fusion learns the residual; ``"none"`` has no heads.

    Raises:
        ConfigError: no encoder, ``fusion`` is not a Fusion, an unknown task.
        ShapeError: in ``forward``, a modality absent from the batch or an encoder of the wrong width.

    Example:
        >>> import torch
        >>> from equipoise.fusion import JointAttention
        >>> encoders = {"audio": nn.Linear(3, 8), "image": nn.Linear(5, 8)}
        >>> model = FusionModel(encoders, JointAttention(8), num_outputs=2)
        >>> model({"audio": torch.zeros(4, 7, 3), "image": torch.zeros(4, 2, 5)}).logits.shape
        torch.Size([4, 2])
    """

    def __init__(
        self,
        encoders: Mapping[str, nn.Module],
        fusion: Fusion,
        num_outputs: int,
        *,
        task: Task = "classification",
        unimodal: Unimodal = "probe",
    ) -> None:
        super().__init__()
        if not encoders or not isinstance(fusion, Fusion):
            raise ConfigError(
                "FusionModel",
                expected="at least one encoder and a Fusion",
                got=f"{len(encoders)} encoders and {type(fusion).__name__}",
            )
        if task not in ("classification", "multilabel", "regression") or unimodal not in UNIMODAL:
            raise ConfigError(
                "FusionModel",
                got=f"task='{task}', unimodal='{unimodal}'",
                expected="task classification, multilabel or regression and unimodal probe, train, ensemble or none",
            )
        bad = [name for name in encoders if name == "mask" or "." in name or hasattr(nn.ModuleDict, name)]
        if bad:
            raise ConfigError(
                "FusionModel",
                expected="modality names without dots that are not reserved",
                got=repr(bad[0]),
                fix="Rename the modality; 'mask' is the batch's entry for missing tokens.",
            )
        self.names = tuple(encoders)
        self.num_outputs, self.task, self.unimodal = num_outputs, task, unimodal
        self.encoders = nn.ModuleDict(encoders)
        self.fusion = fusion.build(self.names)
        self.head = fusion.head(num_outputs)
        heads = () if unimodal == "none" else self.names
        self.unimodal_heads = nn.ModuleDict({name: nn.Linear(fusion.dim, num_outputs) for name in heads})
        self.preparations: list[Callable[[Mapping[str, Any]], Mapping[str, Any]]] = []
        self.transforms: list[Callable[[Mapping[str, Tokens], Tensor | None], Mapping[str, Tokens]]] = []
        self.results: list[Callable[[Output], Output]] = []
        self._takes_mask = {name: "mask" in _parameters(encoder) for name, encoder in encoders.items()}
        self._takes_times = {name: "times" in _parameters(encoder) for name, encoder in encoders.items()}

    def forward(self, batch: Mapping[str, Tensor | Mapping[str, Tensor] | None]) -> Output:
        """Computes the output for a batch.

        Args:
            batch: name -> input of that modality's encoder, or None if the whole batch lacks it. ``"mask"`` is a dict
                name -> (batch,), True if a sample has the modality, or (batch, token), True for valid tokens.
                ``"times"`` is a dict name -> (batch, token) in seconds, passed to encoders that take ``times``;
                the tokens of other encoders get them if there is one for each token.
                ``"target"`` is used by balancers that change tokens in training. Other keys are ignored. Masks are
                boolean or contain only 0 and 1; additive masks are rejected, and so are floating-point masks of zeros
                only, which are ambiguous. Masks of modalities that the model does not use are ignored.

        Masked inputs are set to zero before the encoder, so that NaN there reaches neither outputs nor gradients:
        whole samples, and tokens if the input is (batch, token, ...) and matches the mask.

        Returns:
            Output with logits (batch, output), unimodal_logits, features, tokens and share.
        """
        if self.training:
            for prepare in self.preparations:
                batch = prepare(batch)
        tokens: Mapping[str, Tokens] = self.encode(batch)
        if self.training:
            for transform in self.transforms:
                tokens = transform(tokens, batch.get("target"))  # type: ignore[arg-type]
        output = self.fuse(tokens)
        if self.training:
            for result in self.results:
                output = result(output)
        return output

    def encode(self, batch: Mapping[str, Tensor | Mapping[str, Tensor] | None]) -> dict[str, Tokens]:
        """Runs the encoders only: name -> Tokens of the fusion's width."""
        if not isinstance(batch, Mapping):
            raise ShapeError(
                "FusionModel",
                expected="a batch as a dict: modality name -> input",
                got=type(batch).__name__,
                fix=f"Call model({{'{self.names[0]}': ..., ...}}).",
            )
        absent = [name for name in self.names if name not in batch]
        if absent:
            raise ShapeError(
                f"FusionModel '{absent[0]}'",
                expected=f"a batch with {', '.join(self.names)}",
                got=f"a batch with {', '.join(map(str, batch)) or 'nothing'}",
                fix=f"Set batch['{absent[0]}'] = None for a batch without it, or batch['mask'] for some samples.",
            )
        masks = self._masks(batch)
        times: Any = batch.get("times") or {}
        tokens = {}
        for name in self.names:
            if batch[name] is not None:
                tokens[name] = self._encode_one(name, batch[name], masks.get(name), times.get(name))
        if not tokens:
            raise ShapeError(
                "FusionModel", expected="at least one modality in the batch", got="None for all", fix="Drop the batch."
            )
        like = next(iter(tokens.values())).values
        empty = Tokens(like.new_zeros(len(like), 0, self.fusion.dim))
        return {name: tokens.get(name, empty) for name in self.names}

    def fuse(self, tokens: Mapping[str, Tokens]) -> Output:
        """Runs the fusion and the heads on encoded tokens."""
        fused = self.fusion(tokens)
        unimodal = {}
        for name, head in self.unimodal_heads.items():
            pooled = fused.tokens[name].pooled()
            unimodal[name] = head(pooled.detach() if self.unimodal == "probe" else pooled)
        output = fused.with_(unimodal_logits=unimodal)
        ensemble_logits = self.ensemble_logits(output)
        logits = self.head(fused.features)
        return output.with_(
            logits=torch.stack([logits, *ensemble_logits.values()]).sum(dim=0) if ensemble_logits else logits
        )

    def ensemble_logits(self, output: Output) -> dict[str, Tensor]:
        """Logits that each unimodal head adds: name -> (batch, output), 0 for samples without it; {} unless ensemble.

        They are detached: each head is trained by its own loss, and the fusion learns the residual. They are added with
        full weight even for corrupted inputs; heads are uncertain about those only if training contains them.
        """
        ensemble_logits: dict[str, Tensor] = {}
        if self.unimodal != "ensemble":
            return ensemble_logits
        for name, logits in output.unimodal_logits.items():
            tokens = output.tokens[name]
            has = len(tokens) > 0 if tokens.mask is None else tokens.present()[:, None]
            ensemble_logits[name] = logits.detach() * has
        return ensemble_logits

    def contributions(self, output: Output) -> dict[str, Tensor] | None:
        """Additive contributions to the logits: name -> (batch, output); None if the logits are not such a sum."""
        parts = self.fusion.contributions(output, self.head)
        ensemble_logits = self.ensemble_logits(output)
        return (
            {name: part + ensemble_logits[name] for name, part in parts.items()} if parts and ensemble_logits else parts
        )

    def _masks(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Boolean masks from ``batch["mask"]`` for the modalities of the model."""
        masks: object = batch.get("mask")
        if masks is None:
            return {}
        if not isinstance(masks, Mapping):
            raise ShapeError(
                "FusionModel mask",
                expected="a dict: modality name -> mask",
                got=type(masks).__name__,
                fix=f"Set batch['mask'] = {{'{self.names[0]}': mask}}, with True where a sample has it.",
            )
        result = {}
        for name, mask in masks.items():
            if name not in self.names:
                # The batch may contain modalities of other models; a mask without an input is a mistake.
                if len(self.names) > 1 and name not in batch:
                    raise unknown_name("FusionModel mask", "modality", str(name), self.names)
            elif mask is not None:
                try:
                    result[name] = bool_mask(mask, f"mask of '{name}'", MASK, numbers=True)
                except ShapeError:
                    if self._uses(name):
                        raise
        return result

    def _uses(self, name: str) -> bool:
        """Whether the modality influences the logits or the encoders' gradients."""
        return name in self.fusion.reads or self.unimodal in ("train", "ensemble")

    def _encode_one(self, name: str, value: object, mask: Tensor | None, times: Tensor | None = None) -> Tokens:
        encoder = self.encoders[name]
        takes_mask = self._takes_mask[name]
        per_token = mask is not None and mask.ndim == 2 and takes_mask
        value = without_masked(value, mask, tokens_too=takes_mask)
        options = {"mask": mask} if per_token else {}
        if times is not None and self._takes_times[name]:
            options["times"] = times
        tokens = as_tokens(encoder(value, **options), f"encoder '{name}'")
        if times is not None and tokens.times is None and times.shape == tokens.values.shape[:2]:
            tokens = replace(tokens, times=times)
        if tokens.dim != self.fusion.dim:
            raise ShapeError(
                f"encoder '{name}'",
                expected=f"tokens of the fusion's width dim = {self.fusion.dim}",
                got=f"width {tokens.dim}",
                fix=f"Give the encoder dim={self.fusion.dim}, or put "
                f"torch.nn.Linear({tokens.dim}, {self.fusion.dim}) behind it.",
            )
        if mask is not None and per_token and tokens.mask is None and mask.shape != tokens.values.shape[:2]:
            # The encoder returned fewer tokens than it received; keep only whether a sample has any.
            mask = mask.any(dim=1)
        elif mask is None or (per_token and tokens.mask is not None):
            return tokens.zero_masked()
        if mask.ndim == 1:
            mask = mask[:, None].expand(-1, len(tokens))
        if mask.shape != tokens.values.shape[:2]:
            if not self._uses(name):
                return tokens.zero_masked()
            raise ShapeError(
                f"mask of '{name}'",
                expected=f"(batch,) or (batch, token) = {tuple(tokens.values.shape[:2])}",
                got=f"shape {tuple(mask.shape)}",
                fix="Pass one value per sample, or one per token that the encoder returns.",
            )
        valid = mask if tokens.mask is None else tokens.mask & mask
        return Tokens(tokens.values, mask=valid, times=tokens.times, cls=tokens.cls).zero_masked()


def _parameters(encoder: nn.Module) -> set[str]:
    return set(inspect.signature(encoder.forward).parameters)
