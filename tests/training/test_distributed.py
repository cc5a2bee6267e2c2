"""RollingQ in two processes: sums of both, one decision, one rotation bit by bit, and that of one process alone."""

import pytest
import torch
from torch import multiprocessing
from torch.nn.parallel import DistributedDataParallel

import equipoise as eq
from helpers.fusion import batch, forward, model, slices
from helpers.processes import together
from helpers.tolerance import TOL

pytestmark = pytest.mark.distributed
WORLD, EPOCHS, STEPS, SIZE = 2, 3, 3, 5
EXACT = TOL[torch.float64]


def attached(made, **options):
    return eq.balance.RollingQ(made.fusion.attention, **{"beta": 0.0, "tail": 2, "max_rotations": None, **options})


def whole(epoch, step):
    """The batch of one process; several take equal parts of it, in which other samples lack something."""
    return batch(size=WORLD * SIZE, seed=10 * epoch + step, missing=("image",))


def training(rank):
    """Rotations, logs and logits of a few epochs; of one process on everything where ``rank`` is None."""
    made = model()
    rolling = attached(made)
    called = made if rank is None else DistributedDataParallel(made)
    optimizer = torch.optim.SGD(made.parameters(), lr=0.05)
    rotations, logs = [], []
    for epoch in range(EPOCHS):
        made.train()
        for step in range(STEPS):
            inputs = whole(epoch, step)
            if rank is not None:
                inputs = slices(inputs, SIZE, SIZE)[rank]
            output = called(inputs)
            loss = made.loss(output.logits, inputs["target"])
            for scores in output.unimodal_logits.values():
                # Over all samples, so that the mean over processes is that of the whole batch.
                loss = loss + made.loss(scores, inputs["target"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        logs.append(rolling.end_epoch())
        rotations.append(rolling.rotation.clone())
    return {"rotations": rotations, "logs": logs, "logits": made.eval()(batch(seed=99)).logits.detach()}


def uneven(rank):
    """The second process sees nothing at all."""
    made = model()
    rolling = attached(made, tail=None)
    forward(made, [batch(seed=1), batch(seed=2)] if rank in (None, 0) else [])
    return {"log": rolling.end_epoch(), "rotation": rolling.rotation}


def disagreeing(rank):
    """The second process would rotate otherwise, or not at all."""
    made, other = model(), model()
    rolling = attached(made, rho=1.0 if rank in (None, 0) else 5.0)
    idle = attached(other, beta=0.0 if rank in (None, 0) else 2.0)
    for each in (made, other):
        forward(each, [batch(seed=1)])
    rolling.end_epoch()
    log = idle.end_epoch()
    logits = other.eval()(batch()).logits.detach()
    return {"rotation": rolling.rotation, "idle": idle.rotation, "log": log, "logits": logits}


def measured(rank):
    """A pass of which each process has its own half."""
    made = model()
    rolling = attached(made, statistics="full_pass")
    batches = [batch(seed=seed, size=size) for seed, size in enumerate((5, 3, 2, 7))]
    rolling.measure(made, batches if rank is None else batches[rank::WORLD])
    rolling.end_epoch()
    return {"rotation": rolling.rotation}


def resting(rank):
    """Whether two steps pass in which parameters have no gradient, told to the wrapper and untold."""
    passed = {}
    for told in (False, True):
        for what in ("stage", "modality"):
            made = model(depth=3 if what == "stage" else 1)
            if what == "stage":
                eq.balance.ProgressiveRollingQ(made.fusion, epochs=3)
            called = DistributedDataParallel(made, find_unused_parameters=told)
            passed[f"{what}, {told}"] = True
            try:
                for seed in range(2):
                    inputs = batch(seed=seed)
                    if what == "modality":
                        inputs["image"] = None
                    output = called(inputs)
                    scores = sum(logits.sum() for logits in output.unimodal_logits.values())
                    (made.loss(output.logits, inputs["target"]) + scores).backward()
            except RuntimeError as error:
                passed[f"{what}, {told}"] = "find_unused_parameters=True" not in str(error)
    return passed


SCENES = {"resting": resting, "training": training, "uneven": uneven, "disagreeing": disagreeing, "measured": measured}


def worker(rank, folder):
    with together(rank, folder, WORLD):
        torch.save({name: scene(rank) for name, scene in SCENES.items()}, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("processes")
    multiprocessing.spawn(worker, args=(str(folder),), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


def test_both_processes_rotate_bit_by_bit_alike(found):
    for one, other in zip(found[0]["training"]["rotations"], found[1]["training"]["rotations"], strict=True):
        assert torch.equal(one, other)
    assert found[0]["training"]["logs"] == found[1]["training"]["logs"]
    assert torch.equal(found[0]["training"]["logits"], found[1]["training"]["logits"])


def test_they_rotate_as_one_process_on_the_doubled_batch(found):
    alone = training(None)
    for epoch, (one, other) in enumerate(zip(alone["rotations"], found[0]["training"]["rotations"], strict=True)):
        torch.testing.assert_close(other, one, **EXACT)
        assert found[0]["training"]["logs"][epoch] == pytest.approx(alone["logs"][epoch], abs=EXACT["rtol"])
    assert alone["logs"][-1]["rotations"] == EPOCHS
    torch.testing.assert_close(found[1]["training"]["logits"], alone["logits"], **EXACT)


def test_each_half_alone_would_rotate_otherwise():
    """The equality above is worth something: the statistics of one process are not those of both."""
    rotations = []
    for take in (slice(0, 2), slice(0, 1), slice(1, 2)):
        made = model()
        rolling = attached(made)
        forward(made, slices(whole(0, 0), SIZE, SIZE)[take])
        rolling.end_epoch()
        rotations.append(rolling.rotation)
    assert float((rotations[0] - rotations[1]).abs().max()) > 1e-3
    assert float((rotations[0] - rotations[2]).abs().max()) > 1e-3


def test_resting_parameters_must_be_told(found):
    """As docs/methods/rollingq.md says."""
    for process in found:
        assert process["resting"] == {
            "stage, False": False, "modality, False": False, "stage, True": True, "modality, True": True
        }  # fmt: skip


def test_a_process_that_saw_nothing_follows(found):
    alone = uneven(None)
    for process in found:
        torch.testing.assert_close(process["uneven"]["rotation"], alone["rotation"], **EXACT)
        assert process["uneven"]["log"]["rotated"] == found[0]["uneven"]["log"]["rotated"] == 1.0


def test_the_first_process_decides(found):
    alone = disagreeing(None)
    for process in found:
        torch.testing.assert_close(process["disagreeing"]["rotation"], alone["rotation"], **EXACT)
        torch.testing.assert_close(process["disagreeing"]["idle"], alone["idle"], **EXACT)
        assert (process["disagreeing"]["log"]["rotated"], process["disagreeing"]["log"]["rotations"]) == (1.0, 1.0)
        torch.testing.assert_close(process["disagreeing"]["logits"], alone["logits"], **EXACT)
    for name in ("rotation", "idle", "logits"):
        assert torch.equal(found[0]["disagreeing"][name], found[1]["disagreeing"][name])


def test_a_pass_is_shared(found):
    alone = measured(None)["rotation"]
    for process in found:
        torch.testing.assert_close(process["measured"]["rotation"], alone, **EXACT)
    assert torch.equal(found[0]["measured"]["rotation"], found[1]["measured"]["rotation"])
