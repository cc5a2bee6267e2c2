"""Every balancer in two processes with half of each batch: as one process on the whole of it."""

import pytest
import torch
from torch import multiprocessing
from torch.nn.parallel import DistributedDataParallel

from helpers.balancer_cases import BALANCERS, Loss, all_finite, build_with_balancer, epoch, eval_logits, sgd
from helpers.fusion import batch, split_batch
from helpers.processes import process_group
from helpers.tolerance import TOL

pytestmark = pytest.mark.distributed
WORLD, EPOCHS, STEPS, SIZE = 2, 3, 2, 5
EXACT = TOL[torch.float64]

APART = {
    "ModalityCorruption": "noise is drawn for each process's batch",
    "DiagnoseRelearn": "each process clusters its own part of the data",
    "QMF": "each process ranks the samples of its batch",
}
"""Balancers for which two processes are not one on the doubled batch, and why; they must agree with each other all the
same."""

every = pytest.mark.parametrize("name", sorted(BALANCERS))


def local_batch(rank, seed):
    """Returns the batch of one process: half of the samples if there are two."""
    full = batch(size=WORLD * SIZE, seed=seed)
    return full if rank is None else split_batch(full, SIZE, SIZE)[rank]


def train_in_process(rank, name):
    """Returns logits and logs of a few epochs; of one process on all data if ``rank`` is None."""
    model, balancing = build_with_balancer(name)
    loss = Loss(model, balancing)
    if rank is not None:
        loss = DistributedDataParallel(loss, find_unused_parameters=balancing.partial_graph)
    optimizer, logs = sgd(model, balancing), []
    for number in range(EPOCHS):
        batches = [local_batch(rank, 10 * number + index) for index in range(STEPS)]
        logs.append(epoch(model, balancing, optimizer, batches, [local_batch(rank, 500)], loss=loss))
    return {"logs": logs, "answers": eval_logits(model)}


def train_with_missing_modality(rank, name):
    """Whether all went well where one process at a time has a modality that the other lacks altogether."""
    model, balancing = build_with_balancer(name)
    loss = DistributedDataParallel(Loss(model, balancing), find_unused_parameters=True)
    batches = [local_batch(rank, index) for index in range(3)]
    batches[rank] = {**batches[rank], "image": None}
    batches[2] = {**batches[2], "image": None}
    logs = [epoch(model, balancing, sgd(model, balancing), batches, batches[:2], loss=loss) for _ in range(2)]
    return {"finite": all_finite(model, logs), "answers": eval_logits(model)}


def worker(rank, folder):
    with process_group(rank, folder, WORLD):
        result = {}
        for name in sorted(BALANCERS):
            try:
                result[name] = train_in_process(rank, name)
                result[name]["lacking"] = train_with_missing_modality(rank, name)
            except Exception as error:  # one balancer's failure is not the others'
                result[name] = {"error": f"{type(error).__name__}: {error}"}
        torch.save(result, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Results of both processes for all balancers."""
    folder = tmp_path_factory.mktemp("processes")
    multiprocessing.spawn(worker, args=(str(folder),), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


@every
def test_both_processes_have_equal_weights(results, name):
    one, other = (process[name] for process in results)
    assert "error" not in one, one["error"]
    assert "error" not in other, other["error"]
    assert torch.equal(one["answers"], other["answers"])
    assert one["logs"] == other["logs"]


@every
def test_two_processes_match_one_with_doubled_batch(results, name):
    alone, both = train_in_process(None, name), results[0][name]
    assert "error" not in both, both["error"]
    if name in APART:
        assert not torch.allclose(both["answers"], alone["answers"], **EXACT)
        return
    torch.testing.assert_close(both["answers"], alone["answers"], **EXACT)
    for one, other in zip(both["logs"], alone["logs"], strict=True):
        assert one == pytest.approx(other, rel=1e-7)


@every
def test_modality_missing_in_one_process(results, name):
    one, other = (process[name]["lacking"] for process in results)
    assert one["finite"]
    assert other["finite"]
    assert torch.equal(one["answers"], other["answers"])


@every
def test_half_of_the_data_gives_a_different_result(results, name):
    """Checks that the equality above can fail."""
    model, balancing = build_with_balancer(name)
    optimizer = sgd(model, balancing)
    for number in range(EPOCHS):
        batches = [local_batch(0, 10 * number + index) for index in range(STEPS)]
        epoch(model, balancing, optimizer, batches, [local_batch(0, 500)])
    assert not torch.allclose(eval_logits(model), results[0][name]["answers"], **EXACT)
