"""``Reliability``: a trained model whose predictions are marginalized over which modalities are usable."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from ..diagnostics.modality_ablation import record_fusion
from ..diagnostics.prediction_collection import check_batch, to_device
from ..errors import ConfigError, DataError, ShapeError, unknown_name
from ..fusion.subset_tokens import keep_modalities
from ..io.atomic_files import open_atomic, unshare_tensors
from ..models.sharing import HubMethods
from ..nn.eval_mode import eval_mode_no_grad
from ..tokens.masks import at_least_float32
from ..tokens.token_batch import Output, Tokens
from .calibration import ModalityRecords, conformal_threshold, fit_calibration, reliability_logit
from .feature_statistics import input_features, token_features
from .marginalization import mix_predictions, subset_log_weights, subset_names, usable_subsets
from .noisy_validation import COPIES, InputMoments, noisy_batch
from .training_distance import TrainingDistance, TrainingFeatures

Batches = Iterable[Mapping[str, Any]]
DistanceName = Literal["knn", "mahalanobis", "energy", "input"]
Form = Literal["marginal", "conformal"]
DISTANCES = ("knn", "mahalanobis", "energy", "input")
FORMS = ("marginal", "conformal")
WHO = "Reliability"


@dataclass(frozen=True, eq=False)
class MeasuredTokens(Tokens):
    """Tokens with the log distance (batch,) of the raw input from which they were encoded."""

    log_distance: Tensor | None = None


class Reliability(HubMethods, nn.Module):
    """A trained model that estimates which modalities of each sample can be used, and predicts accordingly.

    With u_m = 1 if modality m of a sample can be used, and p_S the model with the modalities outside of S masked::

        rho_m(x) = P(u_m = 1 | x_m) = sigmoid(a_m - exp(b_m) (log d_m(x) - median))
        p(y | x) = sum_S w_S p_S(y | x),    w_S ∝ prod_{m in S} rho_m  prod_{m not in S} (1 - rho_m)

    The sum is over all non-empty subsets for up to four modalities; for more over the full set, the sets without one
    modality and the single ones. The encoders run once and the fusion once for each subset.

    ``fit`` measures d_m on training data, and fits a_m, b_m and one temperature of all p_S on validation data, with
    white
    noise mixed in to a random degree, by the likelihood of each modality alone: ``rho_m p_m(y) + (1 - rho_m) / C``. The
    model itself is not changed or trained.

    Missing modalities have rho = 0 and are masked in all subsets. Inputs whose encoding contains NaN or infinite values
    count as missing. A regression predicts the mean of the mixture, and its likelihood is normal
    (``own_log_likelihood``).

    Args:
        model: a FusionModel, or a module with names, encoders, encode, fuse, loss and task.
        distance: ``"knn"``: mean distance of mean and standard deviation over tokens to those of the 5 nearest
            training samples; ``"mahalanobis"``: distance of the same features to the training mean; ``"energy"``: free
            energy of the unimodal head, or of the model with this modality alone if it has no heads; ``"input"``: as
            knn, with statistics of the raw input.
        form: ``"marginal"``, or ``"conformal"``: a modality is masked (rho = 0) if its distance exceeds the (1 - alpha)
            quantile of clean validation data, and used (rho = 1) otherwise; the fusion runs once. If all modalities of
            a sample exceed it, all are used.
        alpha: upper bound of the probability of masking a clean modality, if test and validation are exchangeable.

    Validation data must differ from the training data as much as test data do (other people, other devices); otherwise
    clean test inputs count as damaged. Damage that leaves the features close to the training data is not detected.

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
    settings: Tensor
    subsets: Tensor

    def __init__(
        self, model: nn.Module, *, distance: DistanceName = "knn", form: Form = "marginal", alpha: float = 0.02
    ) -> None:
        super().__init__()
        record_fusion(model, WHO)
        for kind, value, choices in (("distance", distance, DISTANCES), ("form", form, FORMS)):
            if value not in choices:
                raise unknown_name(WHO, kind, str(value), choices)
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < 1:
            raise ConfigError(WHO, expected="0 < alpha < 1", got=f"alpha = {alpha!r}")
        if distance == "energy" and model.task == "regression":
            raise ConfigError(
                WHO, expected="another distance for a regression, which has no energy", got="distance='energy'",
                fix="Choose 'knn', 'mahalanobis' or 'input'.",
            )  # fmt: skip
        self.model, self.alpha = model, float(alpha)
        count = len(self.names)
        self.distances = nn.ModuleDict({name: TrainingDistance() for name in self.names})
        for name in ("intercept", "log_slope", "center", "threshold"):
            self.register_buffer(name, torch.zeros(count))
        self.register_buffer("log_temperature", torch.tensor(0.0))
        # Indices of distance and form, and whether the wrapper was fitted: part of the state, which is meaningless without.
        self.register_buffer("settings", torch.tensor([DISTANCES.index(distance), FORMS.index(form), 0]))
        self.register_buffer("subsets", usable_subsets(count), persistent=False)
        self._names = subset_names(self.subsets, self.names)
        self._read_settings()

    def _read_settings(self) -> None:
        # Read once: reading from a GPU in each forward pass would force a sync.
        distance, form, fitted = self.settings.tolist()
        self.distance, self.form, self.is_fitted = DISTANCES[distance], FORMS[form], bool(fitted)

    @classmethod
    def fit(
        cls, model: nn.Module, train: Batches, val: Batches, *, distance: DistanceName = "knn", form: Form = "marginal",
        alpha: float = 0.02, seed: int = 0,
    ) -> Reliability:  # fmt: skip
        """Fits reliability on training and validation data; iterates over each once, in evaluation mode.

        Args:
            model: the trained model. It becomes a submodule and is not copied.
            train: batches of the training data, dicts with every modality and ``"target"``, without augmentation.
            val: batches of validation data, from other groups (speakers, devices) if the test data are.
            distance, form, alpha: see the class.
            seed: of the noise, and of the choice of training samples above 100,000.

        Returns:
            The wrapper, in evaluation mode, as the model is then.

        Raises:
            ShapeError: no batch, a batch without target, or a modality without samples.
            ConfigError: see the class.
        """
        reliable = cls(model, distance=distance, form=form, alpha=alpha)
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        reliable.to(device).eval()
        with eval_mode_no_grad(model):
            moments = reliable._measure_training(train, device, torch.Generator().manual_seed(seed))
            reliable._calibrate(val, device, torch.Generator().manual_seed(seed + 1), moments)
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
        if self.distance != "input":
            return tokens
        masks = batch.get("mask") or {}
        for name in self.names:
            if batch[name] is not None:
                features = input_features(batch[name], masks.get(name), f"{WHO} '{name}'")
                part, distance = tokens[name], self.distances[name](features)
                fields = {key: getattr(part, key) for key in Tokens.__dataclass_fields__}
                tokens[name] = MeasuredTokens(**fields, log_distance=distance)
        return tokens

    def fuse(self, tokens: Mapping[str, Tokens], *, rho: float | Mapping[str, float | Tensor] | None = None) -> Output:
        """Marginalizes the fusion over subsets of the encoded modalities."""
        if not self.is_fitted:
            raise ConfigError(
                WHO, expected="a fitted wrapper", got="one without training data",
                fix="Create it with Reliability.fit(model, train, val), or load its state.",
            )  # fmt: skip
        tokens, present = self._without_nonfinite(tokens)
        if self.form == "conformal":
            return self._conformal(tokens, present, rho)
        outputs = [self.model.fuse(keep_modalities(tokens, subset)) for subset in self._names]  # type: ignore[operator]
        singles = {
            subset[0]: output.logits for subset, output in zip(self._names, outputs, strict=True) if len(subset) == 1
        }
        reliability = self._forced(
            self._reliability(self._log_distances(tokens, outputs[0], singles), present), rho, present
        )
        stacked = torch.stack(list(reliability.values()), dim=1)
        log_weights = subset_log_weights(stacked, present, self.subsets)
        logits = mix_predictions(
            torch.stack([output.logits for output in outputs], dim=1), log_weights, self.task, self.temperature
        )
        share = outputs[0].share
        if share is not None:
            shares = torch.stack([output.share for output in outputs], dim=1)
            share = (log_weights.exp()[..., None, None] * shares).sum(dim=1).to(share.dtype)
        return outputs[0].with_(logits=logits, reliability=reliability, share=share, names=self.names)

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
        from safetensors.torch import save

        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        with open_atomic(path) as file:
            file.write(save(unshare_tensors(state)))
        return Path(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: nn.Module) -> Reliability:
        """Loads a file that ``save`` wrote, into a model of the same architecture.

        Raises:
            DataError: the file is missing or damaged, or belongs to another model.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        reliable = cls(model)
        try:
            reliable.load_state_dict(load_file(path))
        except (OSError, SafetensorError, RuntimeError) as error:
            raise DataError(
                str(path), expected="a file of Reliability.save for this model", got=" ".join(str(error).split())[:400],
                fix="Build the model with the architecture of the saved one.",
            ) from error  # fmt: skip
        return reliable.eval()

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):  # type: ignore[override]
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._read_settings()

    def _without_nonfinite(
        self, tokens: Mapping[str, Tokens]
    ) -> tuple[dict[str, Tokens], Bool[Tensor, "batch modality"]]:
        """Masks the modalities of samples whose tokens are not finite, and returns which modalities each sample has."""
        result, present = {}, []
        for name in self.names:
            part = tokens[name].zero_masked()
            finite = part.values.isfinite().flatten(1).all(dim=1)
            # Masks are added only where the data may need them: they select other kernels.
            if not torch.compiler.is_compiling() and bool(finite.all()):
                present.append(part.present())
            else:
                part = replace(part, mask=part.valid() & finite[:, None]).zero_masked()
                present.append(part.present())
            result[name] = part
        return result, torch.stack(present, dim=1)

    def _log_distances(
        self, tokens: Mapping[str, Tokens], output: Output | None, singles: Mapping[str, Tensor]
    ) -> Float[Tensor, "batch modality"]:
        """Returns the log distance of each modality, or its energy."""
        distances = []
        for name in self.names:
            part = tokens[name]
            if self.distance == "energy":
                heads = {} if output is None else output.unimodal_logits
                distances.append(_energy(heads.get(name, singles.get(name)), self.task))  # type: ignore[arg-type]
            elif isinstance(part, MeasuredTokens) and part.log_distance is not None:
                distances.append(part.log_distance)
            elif self.distance == "input":
                # The modality is missing from the batch.
                distances.append(at_least_float32(part.values).new_full((len(part.values),), torch.inf))
            else:
                distances.append(self.distances[name](token_features(part)))
        return torch.stack(distances, dim=1)

    def _reliability(
        self, distances: Float[Tensor, "batch modality"], present: Bool[Tensor, "batch modality"]
    ) -> dict[str, Tensor]:
        if self.form == "conformal":
            rho = (distances.float() <= self.threshold).to(distances.dtype)
        else:
            rho = reliability_logit(distances, self.intercept, self.log_slope, self.center).sigmoid()
        rho = rho.masked_fill(~present, 0.0)
        return dict(zip(self.names, rho.unbind(dim=1), strict=True))

    def _forced(
        self, reliability: dict[str, Tensor], rho: float | Mapping[str, float | Tensor] | None, present: Tensor
    ) -> dict[str, Tensor]:
        """Replaces estimates by given values; missing modalities keep 0."""
        if rho is None:
            return reliability
        values = rho if isinstance(rho, Mapping) else dict.fromkeys(self.names, rho)
        for name in values:
            if name not in reliability:
                raise unknown_name(WHO, "modality", str(name), self.names)
        result = dict(reliability)
        for index, name in enumerate(self.names):
            if name in values:
                like = reliability[name]
                value = torch.as_tensor(values[name], dtype=like.dtype, device=like.device)
                if (
                    value.ndim > 1
                    or (value.ndim == 1 and value.shape != like.shape)
                    or not bool(((value >= 0) & (value <= 1)).all())
                ):
                    raise ConfigError(
                        f"{WHO} '{name}'", expected=f"rho in [0, 1], a number or (batch,) = {tuple(like.shape)}",
                        got=f"{value.tolist() if value.numel() < 5 else f'shape {tuple(value.shape)}'}",
                    )  # fmt: skip
                result[name] = value.expand(like.shape).masked_fill(~present[:, index], 0.0)
        return result

    def _conformal(self, tokens: Mapping[str, Tokens], present: Tensor, rho: Any) -> Output:
        """Masks the modalities with rho = 0, and fuses once."""
        output, singles = None, {}
        if self.distance == "energy":
            output, singles = self._energy_outputs(tokens)
        reliability = self._forced(
            self._reliability(self._log_distances(tokens, output, singles), present), rho, present
        )
        retained = torch.stack(list(reliability.values()), dim=1) > 0
        retained = retained | ~retained.any(dim=1, keepdim=True)
        if not torch.compiler.is_compiling() and bool((retained | ~present).all()):
            masked = dict(tokens)
        else:
            masked = {
                name: replace(tokens[name], mask=tokens[name].valid() & retained[:, index, None])
                for index, name in enumerate(self.names)
            }
        result: Output = self.model.fuse(masked)  # type: ignore[operator]
        alone = at_least_float32(result.logits).new_zeros(len(result.logits), 1)  # type: ignore[arg-type]
        logits = mix_predictions(result.logits[:, None], alone, self.task, self.temperature)  # type: ignore[index]
        return result.with_(logits=logits, reliability=reliability, names=self.names)

    def _energy_outputs(self, tokens: Mapping[str, Tokens]) -> tuple[Output, dict[str, Tensor]]:
        fuse: Callable[..., Output] = self.model.fuse  # type: ignore[assignment]
        output = fuse(tokens)
        lacking = [name for name in self.names if name not in output.unimodal_logits]
        return output, {name: fuse(keep_modalities(tokens, [name])).logits for name in lacking}  # type: ignore[misc]

    def _measure_training(self, train: Batches, device: torch.device, random: torch.Generator) -> InputMoments:
        """Fits the distances of the modalities, and returns statistics of the inputs and targets."""
        features = {name: TrainingFeatures(random) for name in self.names}
        moments = InputMoments(self.names)
        for batch in train:
            batch = _checked(batch, device, "Reliability.fit train")
            moments.add(batch)
            if self.distance == "energy":
                continue
            tokens, present = self._without_nonfinite(self.model.encode(batch))  # type: ignore[operator]
            masks = batch.get("mask") or {}
            for index, name in enumerate(self.names):
                if batch[name] is None:
                    continue
                found = token_features(tokens[name])
                if self.distance == "input":
                    found = input_features(batch[name], masks.get(name), f"{WHO} '{name}'")
                features[name].add(found[present[:, index]])
        moments.check("Reliability.fit train")
        if self.distance != "energy":
            for name, part in features.items():
                distance: TrainingDistance = self.distances[name]  # type: ignore[assignment]
                distance.fit(part, covariance=self.distance == "mahalanobis", who=f"Reliability.fit train '{name}'")
        return moments

    def _calibrate(self, val: Batches, device: torch.device, random: torch.Generator, moments: InputMoments) -> None:
        """Fits reliability and temperature on validation data with noise, and thresholds on clean validation data."""
        records = {name: ModalityRecords() for name in self.names}
        clean: dict[str, list[Tensor]] = {name: [] for name in self.names}
        count = 0
        for batch in val:
            batch = _checked(batch, device, "Reliability.fit val")
            count += 1
            for copy in range(1 + COPIES):
                # The first copy has no noise.
                noisy = noisy_batch(batch, self.names, moments, random) if copy else batch
                tokens, present = self._without_nonfinite(self.encode(noisy))
                output, singles = self._energy_outputs(tokens) if self.distance == "energy" else (None, {})
                if copy:
                    singles = {
                        name: self.model.fuse(keep_modalities(tokens, [name])).logits  # type: ignore[operator]
                        for name in self.names
                    }
                distances = self._log_distances(tokens, output, singles)
                for index, name in enumerate(self.names):
                    if copy:
                        records[name].add(distances[:, index], singles[name], batch["target"], present[:, index])
                    else:
                        valid = present[:, index] & distances[:, index].isfinite()
                        clean[name].append(distances[:, index][valid].cpu())
        if not count:
            raise _no_batch("Reliability.fit val")
        for name, part in records.items():
            if not len(part.joined()[0]):
                raise ShapeError(
                    f"Reliability.fit val '{name}'", expected="validation samples with the modality and finite features",
                    got="none", fix="Pass validation batches that contain every modality.",
                )  # fmt: skip
        calibration = fit_calibration(records, self.task, moments.target() if self.task == "regression" else None)
        for buffer, value in (
            (self.intercept, calibration.intercept), (self.log_slope, calibration.log_slope), (self.center, calibration.center),
            (self.log_temperature, calibration.log_temperature),
        ):  # fmt: skip
            buffer.copy_(value)
        if self.task == "regression":
            self.log_temperature.zero_()
        thresholds = [conformal_threshold(torch.cat(clean[name]).float(), self.alpha) for name in self.names]
        self.threshold.copy_(torch.tensor(thresholds))


def _energy(logits: Tensor, task: str) -> Float[Tensor, " batch"]:
    """Free energy of predictions; infinite where they are not finite."""
    logits = at_least_float32(logits)
    energy = -logits.logsumexp(dim=1) if task == "classification" else -F.softplus(logits).sum(dim=1)
    return energy.masked_fill(~logits.isfinite().all(dim=1), torch.inf)


def _checked(batch: Any, device: torch.device, who: str) -> dict[str, Any]:
    batch = {key: to_device(value, device) for key, value in check_batch(batch, who).items()}
    if not isinstance(batch.get("target"), Tensor):
        raise ShapeError(who, expected="a 'target' in every batch", got=", ".join(map(str, batch)) or "nothing")
    return batch


def _no_batch(who: str) -> ShapeError:
    return ShapeError(
        who, expected="at least one batch", got="none", fix="Is the split empty, or the iterator used up?"
    )
