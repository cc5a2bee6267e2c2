"""``Reliability``: a trained model whose predictions are marginalized over which modalities are usable."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..data.corruptions import InputKind, corruption_names
from ..diagnostics.modality_ablation import record_fusion
from ..errors import ConfigError, unknown_name
from ..fusion.subset_tokens import keep_modalities
from ..models.sharing import HubMethods
from ..nn.eval_mode import eval_mode_no_grad
from ..tokens.masks import at_least_float32
from ..tokens.token_batch import Output, Tokens
from . import marginalization
from .calibration import reliability_logit
from .damaged_validation import check_calibration_corruptions
from .evidence import log_distances, measure_inputs, prediction_entropy
from .fitting import calibrate, measure_training
from .given_reliability import replace_reliability
from .masked_tokens import finite_tokens, mask_unusable
from .saved_state import read_state, write_state
from .training_distance import PROTOTYPES, TrainingDistance
from .wrapper_options import DISTANCES, FORMS, DistanceName, Form, check_options, check_prototypes

Batches = Iterable[Mapping[str, Any]]
WHO = "Reliability"


class Reliability(HubMethods, nn.Module):
    """A trained model that estimates which modalities of each sample can be used, and predicts accordingly.

    With u_m = 1 if modality m of a sample can be used, and p_S the model with the modalities outside of S masked::

        rho_m(x) = P(u_m = 1 | x_m) = sigmoid(a_m - sum_k exp(b_mk) (e_mk(x) - median))
        p(y | x) = sum_S w_S p_S(y | x),    w_S ∝ A_S^lambda prod_{m in S} rho_m  prod_{m not in S} (1 - rho_m)

    The evidence e_m is the logarithm of the distance d_m to the training data, and the entropy of the prediction from m
    alone (not for a regression). A_S is the agreement of the predictions from each modality of S alone
    (``subset_agreement``; 1 for a regression). The sum is over all non-empty subsets for up to four modalities; for
    more over the full set, the sets without one modality and the single ones. The encoders run once and the fusion once
    for each subset.

    ``fit`` measures d_m on training data, and fits a_m, b_mk, lambda and one temperature of all p_S on validation data
    that are damaged by random corruptions, by the likelihood of the mixture and that of each modality alone, ``rho_m
    p_m(y) + (1 - rho_m) / C``. The model itself is not changed or trained.

    Missing modalities have rho = 0 and are masked in all subsets. Inputs whose encoding contains NaN or infinite values
    count as missing. A regression predicts the mean of the mixture, and its likelihood is normal
    (``own_log_likelihood``).

    Args:
        model: a FusionModel, or a module with names, encoders, encode, fuse, loss and task.
        distance: ``"knn"``: mean distance of mean and standard deviation over tokens to those of the 5 nearest training
            samples; ``"mahalanobis"``: distance of the same features to the training mean; ``"energy"``: free energy of
            the unimodal head, or of the model with this modality alone; ``"input"``: as knn, with statistics of the raw
            input.
        form: ``"marginal"``, or ``"conformal"``: a modality is masked (rho = 0) if its distance exceeds the (1 - alpha)
            quantile of clean validation data; the fusion runs once. If all modalities of a sample exceed it, all are
            used.
        alpha: upper bound of the probability of masking a clean modality, if test and validation are exchangeable.

    Validation data must differ from the training data as much as test data do (other people, other devices); otherwise
    clean test inputs count as damaged. Two modalities that contradict each other do not tell which of them is wrong.

    Raises:
        ConfigError: an unknown distance or form, alpha outside (0, 1), the energy of a regression, or a model without
            the interface above.

    Reference: ours.

    Example:
        >>> import equipoise as eq
        >>> encoders = {"audio": nn.Linear(3, 8), "image": nn.Linear(5, 8)}
        >>> model = eq.FusionModel(encoders, eq.fusion.Concat(8), num_outputs=2)
        >>> batch = {"audio": torch.randn(20, 7, 3), "image": torch.randn(20, 5), "target": torch.arange(20) % 2}
        >>> reliable = eq.Reliability.fit(model, [batch], [batch])
        >>> output = reliable(batch)
        >>> output.logits.exp().sum(dim=1).allclose(torch.ones(20)), sorted(output.reliability)
        (True, ['audio', 'image'])
    """

    name = "reliability"

    intercept: Tensor
    log_slope: Tensor
    center: Tensor
    threshold: Tensor
    log_temperature: Tensor
    log_agreement: Tensor
    settings: Tensor
    subsets: Tensor
    singles: Tensor

    def __init__(
        self, model: nn.Module, *, distance: DistanceName = "knn", form: Form = "marginal", alpha: float = 0.02
    ) -> None:
        super().__init__()
        record_fusion(model, WHO)
        check_options(distance, form, alpha, model.task, WHO)  # type: ignore[arg-type]
        self.model, self.alpha = model, float(alpha)
        count = len(self.names)
        self.distances = nn.ModuleDict({name: TrainingDistance() for name in self.names})
        kinds = 1 if model.task == "regression" else 2
        for name, shape in (
            ("intercept", (count,)), ("log_slope", (count, kinds)), ("center", (count, kinds)), ("threshold", (count,)),
            ("log_temperature", ()), ("log_agreement", ()),
        ):  # fmt: skip
            self.register_buffer(name, torch.zeros(shape))
        # Indices of distance and form, and whether the wrapper was fitted: part of the state, which is meaningless
        # without.
        self.register_buffer("settings", torch.tensor([DISTANCES.index(distance), FORMS.index(form), 0]))
        self.register_buffer("subsets", marginalization.usable_subsets(count), persistent=False)
        self.register_buffer("singles", marginalization.single_subsets(self.subsets), persistent=False)
        self._names, self._single = marginalization.subset_names(self.subsets, self.names), self.singles.tolist()
        self._read_settings()

    def _read_settings(self) -> None:
        # Read once: reading from a GPU in each forward pass would force a sync.
        distance, form, fitted = self.settings.tolist()
        self.distance, self.form, self.is_fitted = DISTANCES[distance], FORMS[form], bool(fitted)

    @classmethod
    def fit(
        cls, model: nn.Module, train: Batches, val: Batches, *, distance: DistanceName = "knn", form: Form = "marginal",
        alpha: float = 0.02, corruptions: Sequence[str] | None = None, kinds: Mapping[str, InputKind] | None = None,
        prototypes: int = PROTOTYPES, seed: int = 0,
    ) -> Reliability:  # fmt: skip
        """Fits reliability on training and validation data; iterates over each once, in evaluation mode.

        Args:
            model: the trained model. It becomes a submodule and is not copied.
            train: batches of the training data, dicts with every modality and ``"target"``, without augmentation.
            val: batches of validation data, from other groups (speakers, devices) if the test data are.
            distance, form, alpha: see the class.
            corruptions: names of ``equipoise.diagnostics.corruptions`` with which validation data are damaged; by
                default all that fit the inputs, except ``missing``.
            kinds: modality -> kind of input, where the shape does not determine it (spectrograms).
            prototypes: number of training samples among which the nearest are searched, at random if there are more.
                Fewer make predictions faster, and distances separate damaged inputs less well; see
                benchmarks/neighbors.py.
            seed: of the damage, and of the choice of prototypes.

        Returns:
            The wrapper, in evaluation mode, as the model is then.

        Raises:
            ShapeError: no batch, a batch without target, or a modality without samples.
            ConfigError: see the class; an unknown corruption, modality or kind of input; fewer than five prototypes.
        """
        chosen = check_calibration_corruptions(corruptions)
        check_prototypes(prototypes, "Reliability.fit")
        reliable = cls(model, distance=distance, form=form, alpha=alpha)
        for name, kind in (kinds or {}).items():
            if name not in reliable.names:
                raise unknown_name("Reliability.fit", "modality", name, reliable.names)
            corruption_names(kind)
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        reliable.to(device).eval()
        with eval_mode_no_grad(model):
            moments = measure_training(reliable, train, device, torch.Generator().manual_seed(seed), prototypes)
            calibrate(reliable, val, device, seed + 1, moments, chosen, kinds or {})
        reliable.settings[2] = 1
        reliable._read_settings()
        return reliable

    def forward(self, batch: Mapping[str, Any], *, rho: float | Mapping[str, float | Tensor] | None = None) -> Output:
        """Computes the calibrated output for a batch.

        Args:
            batch: as for the model.
            rho: replaces the estimated reliability: a number for all modalities, or name -> number or (batch,) for
                some. ``rho=1`` returns the logits of the model itself, bit for bit, without temperature.

        Returns:
            The output of the model with all modalities, with ``logits`` of the mixture (log-probabilities of the
            classes; log-odds of labels; values of a regression), ``reliability`` {name: (batch,)} and the share of
            attention averaged with the weights of the subsets.
        """
        if isinstance(rho, int | float) and rho == 1:
            output = self.model(batch)
            ones = at_least_float32(output.logits).new_ones(len(output.logits))
            return output.with_(reliability=dict.fromkeys(self.names, ones))
        return self.fuse(self.encode(batch), rho=rho)

    def encode(self, batch: Mapping[str, Any]) -> dict[str, Tokens]:
        """Runs the encoders only, as ``FusionModel.encode``; measures raw inputs for ``distance="input"``."""
        tokens: dict[str, Tokens] = self.model.encode(batch)  # type: ignore[operator]
        if self.distance == "input":
            return measure_inputs(tokens, batch, self.distances, WHO)
        return tokens

    def fuse(self, tokens: Mapping[str, Tokens], *, rho: float | Mapping[str, float | Tensor] | None = None) -> Output:
        """Marginalizes the fusion over subsets of the encoded modalities."""
        if not self.is_fitted:
            raise ConfigError(
                WHO, expected="a fitted wrapper", got="one without training data",
                fix="Create it with Reliability.fit(model, train, val), or load its state.",
            )  # fmt: skip
        tokens, present = finite_tokens(tokens, self.names)
        if self.form == "conformal":
            return self._conformal(tokens, present, rho)
        evidence, outputs = self.evidence(tokens)
        estimated = reliability_logit(evidence, self.intercept, self.log_slope, self.center).sigmoid()
        reliability = self._named(estimated, present, rho)
        logits = torch.stack([output.logits for output in outputs], dim=1)  # type: ignore[arg-type]
        agreement = marginalization.subset_agreement(
            logits[:, self.singles], present, self.subsets, self.task, self.temperature
        )
        stacked = torch.stack(list(reliability.values()), dim=1)
        log_weights = marginalization.subset_log_weights(
            stacked, present, self.subsets, self.log_agreement.exp() * agreement
        )
        logits = marginalization.mix_predictions(logits, log_weights, self.task, self.temperature)
        share = outputs[0].share
        if share is not None:
            shares = torch.stack([output.share for output in outputs], dim=1)  # type: ignore[arg-type]
            share = (log_weights.exp()[..., None, None] * shares).sum(dim=1).to(share.dtype)
        return outputs[0].with_(logits=logits, reliability=reliability, share=share, names=self.names)

    def evidence(
        self, tokens: Mapping[str, Tokens]
    ) -> tuple[Float[Tensor, "batch modality evidence"], list[Output]]:  # fmt: skip
        """Returns log distance and entropy of each modality, and the output of the fusion for each subset."""
        outputs: list[Output] = [
            self.model.fuse(keep_modalities(tokens, kept)) for kept in self._names  # type: ignore[operator]
        ]  # fmt: skip
        singles = {name: outputs[int(index)].logits for name, index in zip(self.names, self._single, strict=True)}
        parts = [log_distances(tokens, self.distances, self.distance, self.task, outputs[0], singles)]  # type: ignore[arg-type]
        if self.task != "regression":
            parts.append(prediction_entropy(torch.stack(list(singles.values()), dim=1), self.task))  # type: ignore[arg-type]
        return torch.stack(parts, dim=-1), outputs

    def rho(self, batch: Mapping[str, Any]) -> dict[str, Float[Tensor, " batch"]]:
        """Returns the reliability of each modality, name -> (batch,), without gradients."""
        with torch.no_grad():
            return self(batch).reliability

    @property
    def names(self) -> tuple[str, ...]:
        return self.model.names  # type: ignore[return-value]

    @property
    def task(self) -> str:
        return self.model.task  # type: ignore[return-value]

    @property
    def encoders(self) -> nn.ModuleDict:
        return self.model.encoders  # type: ignore[return-value]

    @property
    def temperature(self) -> Tensor:
        """The temperature of all subsets; not used by a regression."""
        return self.log_temperature.exp()

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Loss of the model's task."""
        return self.model.loss(logits, target)  # type: ignore[operator]

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the weights of the model and the fitted state as a safetensors file, atomically."""
        return write_state(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: nn.Module) -> Reliability:
        """Loads a file that ``save`` wrote, into a model of the same architecture.

        Raises:
            DataError: the file is missing or damaged, or belongs to another model.
        """
        reliable = cls(model)
        read_state(reliable, path)
        return reliable.eval()

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):  # type: ignore[override]
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._read_settings()

    def _named(self, rho: Float[Tensor, "batch modality"], present: Tensor, given: Any) -> dict[str, Tensor]:
        """Names the reliability of the modalities; missing modalities have 0, and given values replace estimates."""
        named = dict(zip(self.names, rho.masked_fill(~present, 0.0).unbind(dim=1), strict=True))
        return replace_reliability(named, given, present, WHO)

    def _conformal(self, tokens: Mapping[str, Tokens], present: Tensor, rho: Any) -> Output:
        """Masks the modalities with rho = 0, and fuses once."""
        output, singles = None, {}
        if self.distance == "energy":
            fuse: Callable[..., Output] = self.model.fuse  # type: ignore[assignment]
            output = fuse(tokens)
            lacking = [name for name in self.names if name not in output.unimodal_logits]
            singles = {name: fuse(keep_modalities(tokens, [name])).logits for name in lacking}
        distances = log_distances(tokens, self.distances, self.distance, self.task, output, singles)  # type: ignore[arg-type]
        within = (distances.float() <= self.threshold).to(distances.dtype)
        reliability = self._named(within, present, rho)
        masked = mask_unusable(tokens, torch.stack(list(reliability.values()), dim=1) > 0, present)
        result: Output = self.model.fuse(masked)  # type: ignore[operator]
        alone = at_least_float32(result.logits).new_zeros(len(result.logits), 1)  # type: ignore[arg-type]
        logits = marginalization.mix_predictions(result.logits[:, None], alone, self.task, self.temperature)  # type: ignore[index]
        return result.with_(logits=logits, reliability=reliability, names=self.names)
