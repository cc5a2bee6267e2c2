"""Methods that work on whole optimizer steps, in two processes: as one process on the doubled batch."""

import pytest
import torch
from torch import multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

import equipoise as eq
from helpers.fusion import DIM, batch, split_batch
from helpers.processes import process_group
from helpers.steps import attention_model
from helpers.tolerance import TOL
from helpers.umt import build_teachers

# test_distributed_balancers.py has every balancer in two processes, with default options.
pytestmark = [pytest.mark.distributed, pytest.mark.slow]
WORLD, EPOCHS, STEPS, SIZE = 2, 3, 2, 5
EXACT = TOL[torch.float64]
MADE = {
    "mmpareto": lambda made: eq.balance.MMPareto(made),
    "blending": lambda made: eq.balance.GradientBlending(made, every=1),
    "copied": lambda made: eq.balance.GradientBlending(made, every=1, copies=True, learning_rate=0.05),
    "greedy": lambda made: eq.balance.Greedy(made, window=2),
    "mla": lambda made: eq.balance.MLA(made),
    "reconboost": lambda made: eq.balance.ReconBoost(made),
    "umt": lambda made: eq.balance.UMT(made, teachers=build_teachers()),
}


def local_batch(rank, **options):
    """Returns the batch of one process: half of the samples if there are two."""
    full = batch(size=WORLD * SIZE, **options)
    return full if rank is None else split_batch(full, SIZE, SIZE)[rank]


class TrainingStep(nn.Module):
    """Module that returns the loss, as Lightning's training step does, so that DDP finds unused parameters."""

    def __init__(self, model, balancing):
        super().__init__()
        self.model, self.balancing = model, balancing

    def forward(self, inputs):
        return self.balancing.loss(self.model(inputs), inputs["target"])


def train_in_process(rank, name):
    """Returns logits and logs of a few epochs; of one process on all data if ``rank`` is None."""
    model = attention_model(fusion=eq.fusion.Concat(DIM))
    balancing = eq.BalancerList(model, [MADE[name](model)])
    called = TrainingStep(model, balancing)
    if rank is not None:
        called = DistributedDataParallel(called, find_unused_parameters=balancing.partial_graph)
    optimizer, logs = torch.optim.SGD(model.parameters(), lr=0.05, weight_decay=0.1), []
    for epoch in range(EPOCHS):
        model.train()
        inputs = [local_batch(rank, seed=10 * epoch + step) for step in range(STEPS)]
        for each in inputs * balancing.steps_per_batch:
            optimizer.zero_grad()
            called(each).backward()
            balancing.before_step()
            optimizer.step()
        balancing.review(inputs, [local_batch(rank, seed=500)])
        logs.append(balancing.end_epoch())
    return {"logs": logs, "logits": model.eval()(batch(seed=99)).logits.detach()}


def worker(rank, folder):
    with process_group(rank, folder, WORLD):
        torch.save({name: train_in_process(rank, name) for name in MADE}, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Results of both processes."""
    folder = tmp_path_factory.mktemp("processes")
    multiprocessing.spawn(worker, args=(str(folder),), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


@pytest.mark.parametrize("name", sorted(MADE))
def test_two_processes_match_one_with_doubled_batch(results, name):
    alone = train_in_process(None, name)
    assert torch.equal(results[0][name]["logits"], results[1][name]["logits"])
    torch.testing.assert_close(results[0][name]["logits"], alone["logits"], **EXACT)
    for one, other in zip(results[0][name]["logs"], alone["logs"], strict=True):
        assert one == pytest.approx(other, rel=1e-7)
