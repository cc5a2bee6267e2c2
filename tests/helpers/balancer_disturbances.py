"""Training loops with a disturbance, and the same loops without it: both must end with equal weights."""

import inspect
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch.utils.checkpoint import checkpoint

import equipoise as eq
from equipoise.errors import EquipoiseError
from helpers.balancer_cases import ATTENTION, BALANCERS, build_with_balancer, joint_attention, sgd
from helpers.fusion import batch
from helpers.tasks import batch_for
from helpers.tolerance import TOL

EXACT = TOL[torch.float64]
EPOCHS, STEPS = 2, 3


class Loop:
    """A typical training loop; a disturbance overrides one of its methods. It is compared with ``reference``."""

    clean = "Loop"
    scaled = False

    def __init__(self, name, **options):
        self.model, self.balancing = build_with_balancer(name, **options)
        self.optimizer = sgd(self.model, self.balancing)
        # Without momentum, gradients times s and the learning rate divided by s give the same step.
        self.optimizer.param_groups[0]["momentum"] = 0.0
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=10**6, enabled=self.scaled)
        self.factor = 1.0

    def output(self, inputs):
        return self.model(inputs)

    def loss(self, inputs):
        return self.balancing.loss(self.output(inputs), inputs["target"])

    def backward(self, loss):
        self.scaler.scale(loss * self.factor).backward()

    def update(self):
        self.scaler.unscale_(self.optimizer)
        self.balancing.before_step()
        self.optimizer.param_groups[0]["lr"] = 0.05 / self.factor
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def before(self, number):
        """Runs before a step."""

    def step(self, inputs, number):
        self.optimizer.zero_grad()
        self.backward(self.loss(inputs))
        self.update()

    def run(self):
        """Returns the final weights and the logs."""
        logs = []
        for epoch in range(EPOCHS):
            batches = [batch_for("classification", self.model.names, seed=10 * epoch + n) for n in range(STEPS)]
            self.model.train()
            for number, inputs in enumerate(batches):
                for _ in range(self.balancing.steps_per_batch):
                    self.before(number)
                    self.step(inputs, number)
            self.balancing.review(batches, [batch_for("classification", self.model.names, seed=500)])
            logs.append(self.balancing.end_epoch())
        states = [self.model.state_dict(), *(balancer.state_dict() for balancer in self.balancing.balancers)]
        assert all(bool(v.isfinite().all()) for s in states for k, v in s.items() if not k.endswith("air"))
        return [p.detach().clone() for p in self.model.parameters()], logs


def odd(names, fill):
    inputs = batch_for("classification", names, seed=77)
    inputs[names[0]] = inputs[names[0]] * 20 if fill is None else inputs[names[0]].index_fill(0, torch.tensor(0), fill)
    return inputs


class SkippedBatch(Loop):
    """A finite batch whose loss is computed and kept, but not back-propagated."""

    fill = None

    def before(self, number):
        if number == 1:
            self.held = self.loss(odd(self.model.names, self.fill))


class SkippedNan(SkippedBatch):
    """A batch with NaN whose loss is not back-propagated."""

    fill = torch.nan


class ScaledLoop(Loop):
    scaled = True


class SkippedStep(ScaledLoop):
    """A batch with NaN, for which GradScaler skips the step."""

    clean = "ScaledLoop"

    def before(self, number):
        if number == 1:
            self.step(odd(self.model.names, torch.nan), number)


class StillScaled(ScaledLoop):
    """Gradients that are not unscaled before ``before_step``."""

    clean = "ScaledLoop"

    def update(self):
        self.balancing.before_step()
        self.scaler.step(self.optimizer)
        self.scaler.update()


class DroppedStep(Loop):
    """A step that the loop abandons after backward."""

    zeros = False

    def before(self, number):
        if number == 1:
            self.optimizer.zero_grad()
            self.backward(self.loss(odd(self.model.names, None)))
            self.optimizer.zero_grad(set_to_none=not self.zeros)


class ZeroedStep(DroppedStep):
    """The same, with gradients set to zero instead of None."""

    zeros = True

    def step(self, inputs, number):
        self.optimizer.zero_grad(set_to_none=False)
        self.backward(self.loss(inputs))
        self.update()


class ValidationEval(Loop):
    """A validation loss in evaluation mode."""

    training = False
    gradient = False

    def before(self, number):
        self.model.train(self.training)
        with nullcontext() if self.gradient else torch.no_grad():
            self.held = self.loss(odd(self.model.names, None))
        self.model.train()


class ValidationTrain(ValidationEval):
    """A validation loss in training mode without gradient."""

    training = True


class ValidationEvalGradient(ValidationEval):
    """A validation loss in evaluation mode with gradient."""

    gradient = True


class Checkpoint(Loop):
    """The model under activation checkpointing."""

    def output(self, inputs):
        return checkpoint(self.model, inputs, use_reentrant=False)


class CheckpointReentrant(Loop):
    """The model under reentrant activation checkpointing."""

    def output(self, inputs):
        passes = []

        def tensors(_):
            result = self.model(inputs)
            passes.append(result)
            parts = [result.features, result.logits, *result.unimodal_logits.values()]
            parts += [part.values for part in result.tokens.values()]
            return tuple(parts if result.share is None else [*parts, result.share])

        features, logits, *rest = checkpoint(tensors, torch.zeros((), requires_grad=True), use_reentrant=True)
        first, rest = passes[0], iter(rest)
        return first.with_(
            features=features, logits=logits, unimodal_logits={name: next(rest) for name in first.unimodal_logits},
            tokens={name: replace(part, values=next(rest)) for name, part in first.tokens.items()},
            share=None if first.share is None else next(rest),
        )  # fmt: skip


class CheckpointLoss(Loop):
    """Model and loss together under activation checkpointing."""

    reentrant = False

    def loss(self, inputs):
        zero = torch.zeros((), requires_grad=True)
        return checkpoint(lambda _: Loop.loss(self, inputs), zero, use_reentrant=self.reentrant)


class CheckpointLossReentrant(CheckpointLoss):
    """The same with reentrant checkpointing."""

    reentrant = True


class CheckpointFusion(Loop):
    """The fusion alone under activation checkpointing."""

    reentrant = False

    def __init__(self, name, **options):
        super().__init__(name, **options)
        fusion, inside = self.model.fusion, self.model.fusion.forward

        def forward(tokens):
            if not torch.is_grad_enabled():
                return inside(tokens)
            names, layout = list(tokens), []

            def tensors(*values):
                result = inside({n: replace(tokens[n], values=v) for n, v in zip(names, values, strict=True)})
                layout.append(result)
                return (result.features, *(() if result.share is None else (result.share,)))

            values = [tokens[name].values for name in names]
            features, *share = checkpoint(tensors, *values, use_reentrant=self.reentrant)
            return layout[0].with_(features=features, share=share[0] if share else None, tokens=dict(tokens))

        fusion.forward = forward


class CheckpointFusionReentrant(CheckpointFusion):
    """The same with reentrant checkpointing."""

    reentrant = True


class CheckpointEncoders(Loop):
    """The encoders under activation checkpointing."""

    def __init__(self, name, **options):
        super().__init__(name, **options)
        for encoder in self.model.encoders.values():
            encoder.forward = lambda x, inside=encoder.forward: checkpoint(inside, x, use_reentrant=False)


class Tenth(Loop):
    """A loss that the loop multiplies by 0.1, with ten times the learning rate."""

    def __init__(self, name, **options):
        super().__init__(name, **options)
        self.factor = 0.1


class Accumulated(Loop):
    """Two batches per step."""

    def step(self, inputs, number):
        other = batch_for("classification", self.model.names, seed=100 + number)
        self.optimizer.zero_grad()
        # The last window has one batch.
        window = [inputs] if number == STEPS - 1 else [inputs, other]
        self.windows(window)
        self.update()

    def windows(self, window):
        for inputs in window:
            self.backward(self.loss(inputs) / len(window))


class PartialWindow(Accumulated):
    """Accumulation that divides by two also in an incomplete last window."""

    clean = "Accumulated"

    def windows(self, window):
        self.factor = len(window) / 2
        for inputs in window:
            self.backward(self.loss(inputs) / len(window))


class TwoForwards(Accumulated):
    """All forward passes run before the first loss; one backward pass."""

    clean = "Accumulated"

    def windows(self, window):
        outputs = [self.output(inputs) for inputs in window]
        losses = [self.balancing.loss(out, inputs["target"]) for out, inputs in zip(outputs, window, strict=True)]
        self.backward(torch.stack(losses).mean())


class TwoLosses(Accumulated):
    """Losses are added before one backward pass."""

    clean = "Accumulated"

    def windows(self, window):
        self.backward(torch.stack([self.loss(inputs) for inputs in window]).mean())


class CheckpointTwoForwards(TwoForwards):
    """The same, with the model under activation checkpointing."""

    def output(self, inputs):
        return checkpoint(self.model, inputs, use_reentrant=False)


class TwoPasses(Loop):
    """Two passes over one batch, where the step uses the second, as in SAM."""

    def step(self, inputs, number):
        self.optimizer.zero_grad()
        self.backward(self.loss(inputs))
        super().step(inputs, number)


class RetainedGraph(Loop):
    """One loss is back-propagated twice, and the gradients are cleared in between."""

    def step(self, inputs, number):
        self.optimizer.zero_grad()
        loss = self.loss(inputs)
        loss.backward(retain_graph=True)
        self.optimizer.zero_grad()
        self.backward(loss)
        self.update()


class FrozenHead(Loop):
    """A model whose head is not trained."""

    def __init__(self, name, **options):
        super().__init__(name, **options)
        self.model.head.requires_grad_(False)


class ZeroedFrozenHead(FrozenHead, ZeroedStep):
    """``ZeroedStep`` for a model whose head is not trained."""

    clean = "FrozenHead"


DISTURBANCES = {
    kind.__name__: kind
    for kind in (
        SkippedBatch, SkippedNan, SkippedStep, StillScaled, DroppedStep, ZeroedStep, ValidationEval, ValidationTrain,
        ValidationEvalGradient, Checkpoint, CheckpointReentrant, CheckpointLoss, CheckpointLossReentrant,
        CheckpointFusion, CheckpointFusionReentrant, CheckpointEncoders, Tenth, PartialWindow, TwoForwards, TwoLosses,
        CheckpointTwoForwards, TwoPasses, RetainedGraph, ZeroedFrozenHead,
    )
}  # fmt: skip
CLEAN = {kind.__name__: kind for kind in (Loop, ScaledLoop, Accumulated, FrozenHead)}

REFUSED = {
    "TwoLosses": ("ModalityCorruption", "ModalityDropout", "OPM"),
    "CheckpointReentrant": ("LFM", "MMPareto"),
    "CheckpointFusionReentrant": ("DGL", "LFM"),
}
"""Loop -> balancers that raise an error in it."""

_weights = {}


def undisturbed(name, clean):
    """Returns the reference result of a balancer and a loop; cached."""
    if (name, clean) not in _weights:
        _weights[name, clean] = CLEAN[clean](name).run()
    return _weights[name, clean]


def outcome(name, disturbance):
    """Returns "equal", or the message of an expected error; raises AssertionError if weights differ."""
    kind = DISTURBANCES[disturbance]
    expected, logs = undisturbed(name, kind.clean)
    try:
        result, message = kind(name).run()
    except EquipoiseError as error:
        return str(error)
    for a, b in zip(result, expected, strict=True):
        torch.testing.assert_close(a, b, **EXACT)
    for log, again in zip(message, logs, strict=True):
        for key in log:
            assert abs(log[key] - again[key]) <= 1e-6 * (1 + abs(log[key])), (key, log[key], again[key])
    return "equal"


def shared(name):
    """Returns a model with an encoder shared by two modalities, its BalancerList and a batch; or the error."""
    torch.manual_seed(0)
    one = torch.nn.Linear(3, 12)
    encoders = {"left": one, "right": one, "image": torch.nn.Linear(5, 12)}
    fusion = joint_attention(ATTENTION[name]) if name in ATTENTION else eq.fusion.Concat(12)
    model = eq.FusionModel(encoders, fusion, 3, unimodal="train" if BALANCERS[name].needs_heads else "probe").double()
    full = batch()
    audio = full.pop("audio")
    inputs = {"left": audio, "right": audio.flip(0), **full}
    kind, taken = BALANCERS[name], inspect.signature(BALANCERS[name]).parameters
    given = {"model": model, "fusion": model.fusion, "layer": getattr(model.fusion, "attention", None), "epochs": 4}
    try:
        balancer = kind(**{key: value for key, value in given.items() if key in taken})
        return model, eq.BalancerList(model, [balancer]), inputs
    except EquipoiseError as error:
        return error
