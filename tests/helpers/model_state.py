"""The state that a diagnostic must leave unchanged, and a module that fails."""

import torch


class FailingModel(torch.nn.Module):
    """Raises an error on its second batch."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, values):
        self.calls += 1
        if self.calls > 1:
            raise RuntimeError("broken")
        return values.repeat(1, 1, 4)


def hooks(model):
    """Returns the number of hooks of every module and parameter of a model."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    modules = [len(getattr(module, kind)) for module in model.modules() for kind in kinds]
    return modules, [len(parameter._backward_hooks or ()) for parameter in model.parameters()]


def model_state(model, batches):
    """Returns all state of a model, its batches and the process that a diagnostic must not change."""
    return {
        "modes": [module.training for module in model.modules()],
        "hooks": hooks(model),
        "trained": [parameter.requires_grad for parameter in model.parameters()],
        "grad": [None if parameter.grad is None else parameter.grad.tolist() for parameter in model.parameters()],
        "weights": {name: value.tolist() for name, value in model.state_dict().items()},
        "random": torch.random.get_rng_state().tolist(),
        "gradients on": torch.is_grad_enabled(),
        "names": sorted(model.__dict__),
        "batches": [{name: values.tolist() for name, values in inputs.items()} for inputs in batches],
    }
