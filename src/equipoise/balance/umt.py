"""UMT: every encoder stays close to one that was trained alone."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ..errors import ConfigError, ShapeError
from ..tokens.token_batch import Output, Tokens, as_tokens
from .balancer import Balancer, Multimodal
from .common.pending_state import recomputing
from .common.unimodal_terms import at_least_single, check_encoders_apart, check_modalities, masked_mean


def distillation(
    student: Float[Tensor, "batch dim"], teacher: Float[Tensor, "batch dim"], present: Bool[Tensor, " batch"]
) -> Float[Tensor, ""]:
    """Mean squared difference of features, over the samples that have the modality; no gradient to the teacher.

    Example:
        >>> ones = torch.ones(2, 3)
        >>> distillation(ones, 3 * ones, torch.tensor([True, False]))
        tensor(4.)
    """
    apart = at_least_single(student) - at_least_single(teacher.detach())
    return masked_mean(apart.square().mean(dim=-1), present)


class UMT(Balancer):
    """Draws every encoder's feature to that of a teacher, the same encoder trained on its modality alone::

        L = L_task + strength sum_m MSE(f_m, sg f_m^teacher),   f = pooled tokens

    Args:
        model: the student.
        teachers: modality -> encoder that was trained alone. They are copied, kept in evaluation mode and saved with
            this balancer's state. May be empty until training begins.
        strength: lambda >= 0.

    Raises:
        ConfigError: one modality, a negative strength, a teacher for no modality; in training, a modality without
            teacher. ShapeError: in training, a teacher of another width than its student.

    It helps where joint training leaves encoders weaker than training each alone would, as in late fusion. It holds
    encoders back where what matters shows only in several modalities together. Every teacher sees every batch, without
    gradient, about a third more time for the encoders; and the teachers must be trained first, as long as the model.

    Reference: Du et al., "On Uni-Modal Feature Learning in Supervised Multi-Modal Learning" (ICML 2023), UMT;
    spec 3.3.
    Differs from the released code in: any number of modalities, and samples that lack one do not count for it.

    Example:
        >>> import equipoise as eq
        >>> encoders = {"audio": nn.Linear(3, 8), "image": nn.Linear(5, 8)}
        >>> model = eq.FusionModel(encoders, eq.fusion.Concat(8), 2)
        >>> balancer = eq.balance.UMT(model, teachers=encoders)
        >>> batch = {"audio": torch.ones(4, 7, 3), "image": torch.ones(4, 2, 5), "target": torch.tensor([0, 1, 0, 1])}
        >>> output = model(batch)
        >>> balancer.penalty(output, batch["target"])
        tensor(0., grad_fn=<MulBackward0>)
    """

    needs_teachers = True
    notes_in_forward = True

    def __init__(
        self, model: Multimodal, *, teachers: Mapping[str, nn.Module] | None = None, strength: float = 10.0
    ) -> None:
        super().__init__()
        check_modalities(model, "UMT")
        check_encoders_apart(model, "UMT")
        unknown = sorted(set(teachers or {}) - set(model.names))
        if unknown or not strength >= 0:
            raise ConfigError(
                "UMT", expected=f"strength >= 0 and teachers for {', '.join(model.names)}",
                got=f"strength = {strength} and teachers for {', '.join(teachers or {}) or 'none'}",
            )  # fmt: skip
        self.names, self.strength = model.names, strength
        self.teachers = nn.ModuleDict({name: copy.deepcopy(teacher) for name, teacher in (teachers or {}).items()})
        self.teachers.requires_grad_(False).eval()
        self._handles: list[Any] = [
            model.encoders[name].register_forward_hook(partial(self._teach, name), with_kwargs=True)
            for name in model.names
            if name in self.teachers
        ]

    def train(self, mode: bool = True) -> UMT:
        """Teachers stay in evaluation mode, also where a module that contains this one is trained."""
        return super().train(False)

    def penalty(self, output: Output, target: Tensor) -> Tensor:
        """The distance to the teachers on this batch."""
        total = output.features.new_zeros((), dtype=torch.promote_types(output.features.dtype, torch.float32))
        for name in self.names:
            if name not in self.teachers:
                raise ConfigError(
                    "UMT", expected=f"a teacher for '{name}'", got=f"teachers for {', '.join(self.teachers) or 'none'}",
                    fix="Give UMT(model, teachers={name: encoder}) encoders that were trained alone.",
                )  # fmt: skip
            tokens = output.tokens[name]
            passed = self.kept(name, output)
            if passed is None or len(tokens) == 0:
                continue
            student, args, kwargs = passed
            teacher = self._taught(name, student, args, kwargs)
            if not student.values.requires_grad:
                # The encoder ran under a checkpoint that computes its graph later.
                student = replace(student, values=tokens.values)
            student, teacher = _masked(student, tokens), _masked(teacher, tokens)
            total = total + distillation(student.pooled(), teacher.pooled(), student.present())
        return self.strength * total

    def detach(self) -> None:
        """Takes the hooks out of the encoders again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _teach(self, name: str, encoder: nn.Module, args: tuple, kwargs: dict[str, Any], result: Any) -> None:
        """Keeps what the student reads, for the teacher."""
        # In the recomputation of the encoder alone there is nothing new.
        if not encoder.training or (recomputing() and not self._pending.announced()):
            return
        self.keep(name, (as_tokens(result, f"encoder '{name}'"), args, kwargs))

    def _taught(self, name: str, student: Tokens, args: tuple, kwargs: dict[str, Any]) -> Tokens:
        """The teacher's tokens for what the student read."""
        teacher = self.teachers[name].to(student.values.device)
        with torch.no_grad():
            taught = as_tokens(teacher(*args, **kwargs), f"teacher '{name}'")
        if taught.dim != student.dim:
            raise ShapeError(
                f"UMT '{name}'", expected=f"a teacher of its student's width dim = {student.dim}",
                got=f"width {taught.dim}", fix="Train the teacher with the same encoder options.",
            )  # fmt: skip
        return taught


def _masked(tokens: Tokens, like: Tokens) -> Tokens:
    """With the mask that the model has put on the encoder's tokens, where there is one for them."""
    return replace(tokens, mask=like.mask) if like.mask is not None and len(like) == len(tokens) else tokens
