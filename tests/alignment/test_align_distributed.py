"""Alignment losses in two processes: value and gradients of a single process on the whole batch."""

import pytest
import torch
from torch import multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from equipoise.alignment import InfoNCE, QFormer, QFormerLosses, SigLIP
from helpers.processes import process_group
from helpers.tolerance import TOL

pytestmark = pytest.mark.distributed
WORLD, SIZES, WIDTHS = 2, (4, 3), {"audio": 3, "image": 5, "text": 2}
EXACT = TOL[torch.float64]
MADE = {
    "info_nce": lambda: InfoNCE(scale=3.0),
    "smoothed": lambda: InfoNCE(scale=3.0, smoothing=0.1, hard=0.5, top_k=4, duplicates="ignore"),
    "siglip": lambda: SigLIP(scale=3.0, bias=-2.0, tile=2),
    "anchored": lambda: SigLIP(anchor="text"),
}
HERE = {"image": torch.tensor([True, False, True, True, False, True, True])}


def local_part(rank, values):
    """Returns the part of the seven samples in one process, or all of them."""
    return values if rank is None else values[: SIZES[0]] if rank == 0 else values[SIZES[0] :]


class Model(nn.Module):
    """A module of encoders and a loss that returns the loss."""

    def __init__(self, loss):
        super().__init__()
        torch.manual_seed(0)
        self.encoders = nn.ModuleDict({name: nn.Linear(width, 4) for name, width in WIDTHS.items()})
        self.loss = loss

    def forward(self, batch, ids, present):
        return self.loss({name: self.encoders[name](batch[name]) for name in WIDTHS}, ids=ids, present=present)


def loss_and_gradients(name, rank, wrapped=True):
    """Returns the loss and every gradient."""
    random = torch.Generator().manual_seed(1)
    total = sum(SIZES)
    batch = {n: torch.randn(total, w, generator=random, dtype=torch.float64) for n, w in WIDTHS.items()}
    ids = torch.tensor([0, 1, 2, 3, 1, 5, 0])
    model = Model(MADE[name]()).double()
    called = DistributedDataParallel(model) if rank is not None and wrapped else model
    loss = called(
        {n: local_part(rank, x) for n, x in batch.items()},
        None if name == "info_nce" else local_part(rank, ids),
        {n: local_part(rank, x) for n, x in HERE.items()},
    )
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters()}}


def no_samples(rank):
    """No sample has an image: both processes skip its pairs without deadlock."""
    parts = {name: torch.eye(3, dtype=torch.float64).requires_grad_() for name in ("audio", "image")}
    loss = InfoNCE().double()(parts, present={"image": torch.zeros(3, dtype=torch.bool)})
    loss.backward()
    return {"loss": loss.detach(), "grad": parts["audio"].grad}


def queries(rank):
    """Returns the contrastive loss of a Q-Former; its other losses use only the samples of the process."""
    torch.manual_seed(0)
    qformer = QFormer(5, dim=8, depth=1, heads=2, queries=3, vocabulary=11, positions=4)
    losses = QFormerLosses(qformer, embed=4).double()
    random = torch.Generator().manual_seed(2)
    media = torch.randn(7, 2, 5, generator=random, dtype=torch.float64)
    words = torch.randint(11, (7, 3), generator=random)
    result = losses(local_part(rank, media), local_part(rank, words), generator=random)
    if rank is not None:
        (result["contrastive"] / 1).backward()
        grads = {name: p.grad for name, p in losses.named_parameters() if p.grad is not None}
        for name, grad in grads.items():
            if name != "temperature":
                torch.distributed.all_reduce(grad)
                grad /= WORLD
    else:
        result["contrastive"].backward()
        grads = {name: p.grad for name, p in losses.named_parameters() if p.grad is not None}
    return {"loss": result["contrastive"].detach(), **grads}


def evaluate_in_one_process(rank):
    """Evaluates in one process while the other does something else."""
    vectors = torch.eye(3, dtype=torch.float64)
    loss = (
        InfoNCE(gather=False).double()(vectors, vectors.roll(1, 0)).detach() if rank in (None, 0) else torch.zeros(())
    )
    return {"loss": loss}


SCENES = (
    {"by_itself": evaluate_in_one_process}
    | {name: lambda rank, name=name: loss_and_gradients(name, rank) for name in MADE}
    | {
        "alone": lambda rank: loss_and_gradients("siglip", rank, wrapped=False),
        "no_samples": no_samples,
        "queries": queries,
    }
)


def worker(rank, folder):
    with process_group(rank, folder, WORLD):
        torch.save({name: result(rank) for name, result in SCENES.items()}, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The results of each of two processes."""
    folder = tmp_path_factory.mktemp("processes")
    multiprocessing.spawn(worker, args=(str(folder),), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


@pytest.mark.parametrize("name", [*MADE, "queries"])
def test_two_processes_equal_one_on_the_whole_batch(results, name):
    alone = SCENES[name](None)
    for process in results:
        assert process[name].keys() == alone.keys()
        for key, value in alone.items():
            torch.testing.assert_close(process[name][key], value, **EXACT, msg=lambda m, key=key: f"{key}: {m}")


def test_scale_stays_synchronized_without_a_wrapper(results):
    """The gradient of the scale is that of all samples in both processes, also without gradient averaging."""
    alone = loss_and_gradients("siglip", None)
    for process in results:
        for key in ("loss", "loss.log_scale", "loss.bias"):
            torch.testing.assert_close(process["alone"][key], alone[key], **EXACT)


def test_halves_of_the_batch_have_a_different_loss():
    """Otherwise, the equality above would be trivial."""
    full = loss_and_gradients("siglip", None)["loss"]
    for rank in range(WORLD):
        model = Model(MADE["siglip"]()).double()
        random = torch.Generator().manual_seed(1)
        batch = {n: torch.randn(7, w, generator=random, dtype=torch.float64) for n, w in WIDTHS.items()}
        half = model(
            {n: local_part(rank, x) for n, x in batch.items()}, None, {n: local_part(rank, x) for n, x in HERE.items()}
        )
        assert abs(float(half.detach() - full)) > 1e-3


def test_modality_missing_in_all_processes_is_excluded(results):
    for process in results:
        assert float(process["no_samples"]["loss"]) == 0.0
        assert float(process["no_samples"]["grad"].abs().max()) == 0.0


def test_one_process_can_evaluate_without_gathering(results):
    assert float(results[0]["by_itself"]["loss"]) == float(evaluate_in_one_process(None)["loss"]) > 1.0
