"""Integration with ``transformers.Trainer``; no Trainer subclass is needed."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..balance import Balancer, BalancerList, statistics_by_full_pass
from ..balance.balancer import overrides
from ..errors import ConfigError
from ..io.atomic_files import unshare_tensors
from ..tokens.token_batch import as_output
from .huggingface_moda import MODAAdapter as MODAAdapter
from .huggingface_moda import apply_moda as apply_moda
from .step_watcher import StepWatcher


class BalancedModel(nn.Module):
    """Wrapper of a model whose ``forward`` returns the balanced loss, as Trainer expects::

        model = eq.hf.BalancedModel(fusion_model, eq.BalancerList(fusion_model, [eq.balance.OGM(fusion_model)]))
        trainer = Trainer(model, args, train_dataset=..., callbacks=[eq.hf.BalancerCallback(model.balancing)])

    Checkpoints contain the state of the balancers under ``balance.<number>``, so that ``resume_from_checkpoint`` and
    ``load_best_model_at_end`` restore it with the weights.

    Args:
        model: a FusionModel, or any other model after ``eq.adapt``.
        balancing: BalancerList of this model.

    Raises:
        ConfigError: a BalancerList of another model.

    Set ``remove_unused_columns=False`` in TrainingArguments, because modalities are not named arguments of ``forward``.
    To evaluate on batches whose targets have the key ``target``, also set ``label_names=["target"]``.

    Example:
        >>> import equipoise as eq
        >>> inner = eq.FusionModel({"audio": nn.Linear(3, 8), "image": nn.Linear(5, 8)}, eq.fusion.Concat(8), 2)
        >>> model = BalancedModel(inner, BalancerList(inner, [eq.balance.OGM(inner)]))
        >>> batch = {"audio": torch.ones(4, 7, 3), "image": torch.ones(4, 2, 5), "labels": torch.tensor([0, 1, 0, 1])}
        >>> sorted(model(**batch)), sorted(name for name in model.state_dict() if "balance" in name)
        (['logits', 'loss'], ['balance.0.epoch', 'balance.0.used'])
    """

    # The loss is a mean over the batch, so Trainer divides it by the number of accumulated batches.
    accepts_loss_kwargs = False

    def __init__(self, model: nn.Module, balancing: BalancerList) -> None:
        super().__init__()
        if balancing.model is not model:
            raise ConfigError(
                "BalancedModel",
                expected="a BalancerList of this model",
                got=f"one of another {type(balancing.model).__name__}",
            )
        self.model, self.balancing = model, balancing
        keep_state(self, balancing)

    def forward(self, labels: Tensor | None = None, **batch: Any) -> dict[str, Tensor | None]:
        """Computes logits and, if there are targets, the loss.

        Args:
            labels: targets; by default ``batch["target"]``.
            batch: inputs of the model: name -> input, and ``mask``.

        Returns:
            ``logits``, and ``loss`` if there are targets: with auxiliary losses and penalties in training, only the
            task loss in evaluation.
        """
        target = batch.pop("target", None) if labels is None else labels
        output = as_output(self.model, self.model({**batch, "target": target}), "BalancedModel")
        if target is None:
            return {"logits": output.logits}
        if self.training:
            loss = self.balancing.loss(output, target)
        else:
            loss = self.balancing.model.loss(output.logits, target)  # type: ignore[arg-type]
        return {"loss": loss, "logits": output.logits}


class BalancerCallback(TrainerCallback):
    """Calls the step and epoch hooks of balancers, and writes their metrics to ``state.log_history``.

    Trainer clips gradients before it calls callbacks; ``clip`` clips them after the balancers, as the other loops do.

    Args:
        balancing: the BalancerList whose loss the model returns; see ``BalancedModel``.
        clip: maximum norm of all gradients; replaces Trainer's ``max_grad_norm``, which must then be 0 (or infinite).
        val: validation batches for balancers that review data; by default those of the last evaluation, if there was
            one before the end of the epoch.

    Attributes:
        last: metrics of the balancers in the last epoch.

    Raises:
        ConfigError: when training begins, if training arguments are incompatible with the balancers.
    """

    def __init__(self, balancing: BalancerList, *, clip: float | None = None, val: Iterable[Any] | None = None) -> None:
        if clip is not None and not clip > 0:
            raise ConfigError("BalancerCallback", expected="clip > 0 or None", got=f"clip = {clip}")
        self.balancing, self.clip, self.val = balancing, clip, val
        self.last: dict[str, float] = {}
        # Whether there were steps since the last epoch end, which must run before the checkpoint of the last step.
        self._open = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        _check(self.balancing, self.clip, args, kwargs["model"])
        self._open = False
        # Unwrap accelerate's optimizer, for balancers that reset optimizer state.
        self.balancing.attach_optimizer(getattr(kwargs["optimizer"], "optimizer", kwargs["optimizer"]))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._open = True
        self.balancing.before_step()
        if self.clip is not None:
            nn.utils.clip_grad_norm_(kwargs["model"].parameters(), self.clip)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # Trainer saves between the last step and on_epoch_end, and does not call on_epoch_end when it resumes there.
        if state.epoch is not None and state.epoch % 1 == 0:
            self._end(state, **kwargs)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Iterable data sets end their epoch here; an interrupted epoch is not ended.
        if self._open and not control.should_training_stop:
            self._end(state, **kwargs)

    def _end(
        self, state: TrainerState, *, model: nn.Module, train_dataloader: Any, eval_dataloader: Any, **_: Any
    ) -> None:
        self._open = False
        device = next(model.parameters()).device
        if hasattr(train_dataloader, "set_epoch"):
            # A resumed run uses another loader for its first epoch, so this one still has the initial epoch.
            train_dataloader.set_epoch(math.ceil(state.epoch or 1) - 1)
        train = _Batches(train_dataloader, device)
        for rolling in statistics_by_full_pass(self.balancing.balancers):
            rolling.measure(self.balancing.model, train)  # type: ignore[arg-type]
        self.balancing.review(train, _Batches(self.val if self.val is not None else eval_dataloader, device))
        self.last = self.balancing.end_epoch()
        metrics = {f"balance/{name}": value for name, value in self.last.items()}
        state.log_history.append({"epoch": state.epoch, "step": state.global_step, **metrics})


def keep_state(module: nn.Module, balancing: BalancerList) -> None:
    """Saves the state of balancers in a module's state dict, under ``balance.<number>``, and loads it from there.

    ``BalancedModel`` calls it. Call it once for your own model whose ``forward`` returns ``balancing.loss``. The
    balancers do not become submodules, because their sums are per process and data-parallel training would overwrite
    them with those of the first process.
    """
    module.register_state_dict_post_hook(partial(_add_state, balancing.balancers))
    module.register_load_state_dict_pre_hook(partial(_load_state, balancing.balancers))


def _without_submodules(balancers: Sequence[Balancer], module: nn.Module) -> dict[str, Balancer]:
    """Returns prefix -> balancer for balancers that are not submodules, as submodules are saved anyway."""
    inside = set(module.modules())
    return {f"balance.{number}.": b for number, b in enumerate(balancers) if b not in inside}


def _add_state(
    balancers: Sequence[Balancer], module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Any
) -> None:
    for name, balancer in _without_submodules(balancers, module).items():
        state.update({prefix + name + key: value.contiguous() for key, value in balancer.state_dict().items()})
    # Trainer saves safetensors, which reject tensors that occur under two names.
    state.update(unshare_tensors(state))


def _load_state(
    balancers: Sequence[Balancer], module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Any,
    strict: bool, missing: list[str], unexpected: list[str], errors: list[str],
) -> None:  # fmt: skip
    for name, balancer in _without_submodules(balancers, module).items():
        start = prefix + name
        balancer_state = {key.removeprefix(start): state.pop(key) for key in list(state) if key.startswith(start)}
        result = balancer.load_state_dict(balancer_state, strict=False)
        missing.extend(start + key for key in result.missing_keys)
        unexpected.extend(start + key for key in result.unexpected_keys)


class WatchCallback(TrainerCallback):
    """Logs shares of attention, AIR and gradient norms of every n-th step through the log of a Trainer::

        trainer = Trainer(model, args, train_dataset=data)
        eq.hf.WatchCallback(every_n_steps=50).attach(trainer)

    ``attach`` adds the callback, and logs to the reporters of ``report_to`` as well. Passed as
    ``Trainer(callbacks=[...])``, it logs to ``trainer.state.log_history`` only, because Trainer gives callbacks no
    access to its reporters.

    Training is not changed, bit for bit, and other steps cost one comparison. The names and values are those of
    ``eq.lightning.WatchCallback``; the step is the number of optimizer steps before. Trainer clips gradients before it
    calls callbacks, so that the norms are those after clipping by ``max_grad_norm``. Gradients are left out under FSDP
    and DeepSpeed, and in fp16 with ``max_grad_norm=0``, where Trainer does not unscale them.

    Args:
        every_n_steps: number of optimizer steps from one measurement to the next, the first step included.
        options: arguments of ``StepWatcher``: ``per_layer``, ``layers``, ``queries``, ``modality``, ``names``,
            ``encoders``, ``share`` and ``gradients``.

    Attributes:
        last: values of the last measured step.

    Raises:
        ConfigError: ``every_n_steps`` below 1. TypeError: an unknown option.

    Example:
        >>> WatchCallback(every_n_steps=50, queries="last").last
        {}
    """

    def __init__(self, every_n_steps: int = 100, **options: Any) -> None:
        self._watcher = StepWatcher(every_n_steps, **options)
        self._trainer: Trainer | None = None
        self.last: dict[str, float] = {}

    def attach(self, trainer: Trainer) -> WatchCallback:
        """Adds the callback to a Trainer, and logs with ``trainer.log``; returns the callback."""
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)
        self._trainer = trainer
        return self

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        if state.is_world_process_zero:
            self._watcher.begin(state.global_step, given["model"])

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self._watcher.open:
            return
        reason = None
        if args.fsdp or args.deepspeed:
            reason = "under FSDP and DeepSpeed a process has a part of each gradient"
        elif args.fp16 and not args.max_grad_norm:
            reason = "in fp16 with max_grad_norm=0, Trainer does not unscale them"
        measured = self._watcher.end(reason)
        if measured is None:
            return
        step, self.last = measured
        if self._trainer is None:
            state.log_history.append({"epoch": state.epoch, "step": step, **self.last})
        else:
            self._trainer.log(dict(self.last))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        self._watcher.discard()


class _Batches:
    """Iterates over the batches of a loader on a device, with targets under the key ``target``."""

    def __init__(self, loader: Iterable[Any] | None, device: torch.device) -> None:
        self._loader, self._device = loader, device

    def __iter__(self) -> Iterator[Any]:
        for batch in () if self._loader is None else self._loader:
            moved: Any = send_to_device(batch, self._device)
            yield {"target" if name == "labels" else name: value for name, value in moved.items()}


def _check(balancing: BalancerList, clip: float | None, args: TrainingArguments, model: nn.Module) -> None:
    for applies, expected, got, fix in _incompatibilities(balancing, clip, args, model):
        if applies:
            raise ConfigError("BalancerCallback", expected=expected, got=got, fix=fix)
    changing = [type(b).__name__ for b in balancing.balancers if _changes_gradients(b)]
    if _clips(args) and changing:
        warnings.warn(
            f"Trainer clips gradients before {', '.join(changing)} changes them. For the order of the other loops set "
            f"max_grad_norm=0 in TrainingArguments, and pass BalancerCallback(clip={args.max_grad_norm}).",
            stacklevel=2,
        )


def _incompatibilities(
    balancing: BalancerList, clip: float | None, args: TrainingArguments, model: nn.Module
) -> list[tuple[bool, str, str, str]]:
    """Returns training arguments that are incompatible with balancing: (whether this applies, expected, got, fix)."""
    find_unused = args.ddp_find_unused_parameters
    return [
        (
            isinstance(model, BalancedModel) and model.balancing is not balancing,
            "the balancing of the trained model",
            "another BalancerList",
            "Pass model.balancing.",
        ),
        (
            balancing.steps_per_batch > 1,
            "balancers that take one step per batch",
            "one that takes several",
            "Use equipoise's own training loop, or repeat each batch in a loop of your own.",
        ),
        (
            bool(args.deepspeed),
            "gradients that can be changed before the step",
            "DeepSpeed, which steps inside backward",
            "Use DistributedDataParallel.",
        ),
        (
            bool(args.fsdp) and bool(balancing.balancers),
            "the whole model in each process",
            "FSDP, under which a process has a part of each parameter and gradient",
            "Use DistributedDataParallel.",
        ),
        (
            args.n_gpu > 1,
            "one device for each process",
            f"{args.n_gpu} under DataParallel, which copies the model",
            "Start one process per device: torchrun --nproc-per-node.",
        ),
        (
            args.world_size > 1 and balancing.partial_graph and not find_unused,
            "ddp_find_unused_parameters=True, since some parameters have no gradient in some steps",
            str(find_unused),
            "Set it in TrainingArguments.",
        ),
        (
            isinstance(model, BalancedModel) and bool(args.remove_unused_columns),
            "remove_unused_columns=False, since modalities are not named arguments of forward",
            "True",
            "Set it in TrainingArguments.",
        ),
        (
            clip is not None and _clips(args),
            "max_grad_norm=0 in TrainingArguments if the callback clips",
            f"{args.max_grad_norm}",
            "Gradients would be clipped twice.",
        ),
        (
            bool(args.fp16) and not args.max_grad_norm,
            "max_grad_norm=float('inf') under fp16, since Trainer unscales gradients when it computes their norm",
            str(args.max_grad_norm),
            "Set it in TrainingArguments; it clips nothing.",
        ),
        (
            args.save_strategy != "no" and not _saves_state(balancing, model),
            "a model whose checkpoints contain the state of the balancers",
            type(model).__name__,
            "Train eq.hf.BalancedModel(model, balancing), or call eq.hf.keep_state(model, balancing) first.",
        ),
    ]


def _clips(args: TrainingArguments) -> bool:
    return 0 < (args.max_grad_norm or 0) < math.inf


def _saves_state(balancing: BalancerList, model: nn.Module) -> bool:
    state: dict[str, Tensor] = {}
    _add_state(balancing.balancers, model, state, "", None)
    return state.keys() <= model.state_dict().keys()


def _changes_gradients(balancer: Balancer) -> bool:
    return overrides(balancer, "gradient_scale") or (balancer.changes_gradients and overrides(balancer, "before_step"))
