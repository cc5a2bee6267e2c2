"""UMT: distills each encoder from a teacher that was trained on its modality alone."""

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
from .common.pass_record import recomputing
from .common.unimodal_terms import at_least_single, check_encoders_apart, check_modalities, masked_mean


def distillation(
    student: Float[Tensor, "batch dim"], teacher: Float[Tensor, "batch dim"], present: Bool[Tensor, " batch"]
) -> Float[Tensor, ""]:
    """Returns the mean squared error of features over samples that have the modality; detaches the teacher.

    Example:
        >>> ones = torch.ones(2, 3)
        >>> distillation(ones, 3 * ones, torch.tensor([True, False]))
        tensor(4.)
    """
    difference = at_least_single(student) - at_least_single(teacher.detach())
    return masked_mean(difference.square().mean(dim=-1), present)


class UMT(Balancer):
    """Pulls each encoder's features to those of a teacher, the same encoder trained on its modality alone::

        L = L_task + strength sum_m MSE(f_m, sg f_m^teacher),   f = pooled tokens

    Args:
        model: the student.
        teachers: modality -> encoder that was trained alone. Teachers are copied, kept in evaluation mode and saved
            with this balancer's state. May be empty until training starts.
        strength: lambda >= 0.

    Raises:
        ConfigError: one modality, a negative strength, a teacher for an unknown modality; in training, a modality
            without teacher. ShapeError: in training, a teacher whose width differs from that of the student.

    It helps if encoders trained jointly are weaker than encoders trained alone, as in late fusion. It constrains
    encoders if the target depends on interactions of modalities. Each teacher runs on each batch, without gradient,
    which takes about a third more time for the encoders; the teachers must be trained before, for as long as the model.

    Reference: Du et al., "On Uni-Modal Feature Learning in Supervised Multi-Modal Learning" (ICML 2023), UMT.
    Differs from the released code in: any number of modalities, and samples that lack one are excluded from its mean.

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
            model.encoders[name].register_forward_hook(partial(self._keep_inputs, name), with_kwargs=True)
            for name in model.names
            if name in self.teachers
        ]

    def train(self, mode: bool = True) -> UMT:
        """Keeps the teachers in evaluation mode, also if a parent module is set to training mode."""
        return super().train(False)

    def penalty(self, output: Output, target: Tensor) -> Tensor:
        """Returns the distance to the teachers on this batch."""
        total = output.features.new_zeros((), dtype=torch.promote_types(output.features.dtype, torch.float32))
        for name in self.names:
            if name not in self.teachers:
                raise ConfigError(
                    "UMT", expected=f"a teacher for '{name}'", got=f"teachers for {', '.join(self.teachers) or 'none'}",
                    fix="Pass encoders that were trained alone: UMT(model, teachers={name: encoder}).",
                )  # fmt: skip
            tokens = output.tokens[name]
            inputs = self.kept(name, output)
            if inputs is None or len(tokens) == 0:
                continue
            student, args, kwargs = inputs
            teacher = self._teacher_tokens(name, student, args, kwargs)
            if not student.values.requires_grad:
                # The encoder runs under activation checkpointing, which builds the graph later.
                student = replace(student, values=tokens.values)
            student, teacher = _masked(student, tokens), _masked(teacher, tokens)
            total = total + distillation(student.pooled(), teacher.pooled(), student.present())
        return self.strength * total

    def detach(self) -> None:
        """Removes the hooks from the encoders."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _keep_inputs(self, name: str, encoder: nn.Module, args: tuple, kwargs: dict[str, Any], result: Any) -> None:
        """Stores the inputs of the student, for the teacher."""
        # Skip the recomputation of an encoder under activation checkpointing.
        if not encoder.training or (recomputing() and not self._pending.announced()):
            return
        self.keep(name, (as_tokens(result, f"encoder '{name}'"), args, kwargs))

    def _teacher_tokens(self, name: str, student: Tokens, args: tuple, kwargs: dict[str, Any]) -> Tokens:
        """Returns the teacher's tokens for the inputs of the student."""
        teacher = self.teachers[name].to(student.values.device)
        with torch.no_grad():
            tokens = as_tokens(teacher(*args, **kwargs), f"teacher '{name}'")
        if tokens.dim != student.dim:
            raise ShapeError(
                f"UMT '{name}'", expected=f"a teacher of the student's width dim = {student.dim}",
                got=f"width {tokens.dim}", fix="Train the teacher with the same encoder options.",
            )  # fmt: skip
        return tokens


def _masked(tokens: Tokens, like: Tokens) -> Tokens:
    """Applies the mask of the model's tokens to the encoder's tokens, if it fits."""
    return replace(tokens, mask=like.mask) if like.mask is not None and len(like) == len(tokens) else tokens
