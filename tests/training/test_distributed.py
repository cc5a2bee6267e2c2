"""RollingQ in two processes: sums of both, one decision, one rotation bit by bit, and that of one process alone."""

import pytest
import torch
from torch import multiprocessing
from torch.nn.parallel import DistributedDataParallel

import equipoise as eq
from helpers.fusion import batch, joint_model, run_forward, split_batch
from helpers.processes import process_group
from helpers.tolerance import TOL

pytestmark = pytest.mark.distributed
WORLD, EPOCHS, STEPS, SIZE = 2, 3, 3, 5
EXACT = TOL[torch.float64]


def build(model, **options):
    return eq.balance.RollingQ(model.fusion.attention, **{"beta": 0.0, "tail": 2, "max_rotations": None, **options})


def full_batch(epoch, step):
    """The batch of one process; several take equal parts of it, in which other samples lack something."""
    return batch(size=WORLD * SIZE, seed=10 * epoch + step, missing=("image",))


def train_in_process(rank):
    """Rotations, logs and logits of a few epochs; of one process on everything where ``rank`` is None."""
    model = joint_model()
    rolling = build(model)
    called = model if rank is None else DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    rotations, logs = [], []
    for epoch in range(EPOCHS):
        model.train()
        for step in range(STEPS):
            inputs = full_batch(epoch, step)
            if rank is not None:
                inputs = split_batch(inputs, SIZE, SIZE)[rank]
            output = called(inputs)
            loss = model.loss(output.logits, inputs["target"])
            for scores in output.unimodal_logits.values():
                # Over all samples, so that the mean over processes is that of the whole batch.
                loss = loss + model.loss(scores, inputs["target"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        logs.append(rolling.end_epoch())
        rotations.append(rolling.rotation.clone())
    return {"rotations": rotations, "logs": logs, "logits": model.eval()(batch(seed=99)).logits.detach()}


def train_uneven(rank):
    """The second process sees nothing at all."""
    model = joint_model()
    rolling = build(model, tail=None)
    run_forward(model, [batch(seed=1), batch(seed=2)] if rank in (None, 0) else [])
    return {"log": rolling.end_epoch(), "rotation": rolling.rotation}


def train_disagreeing(rank):
    """The second process would rotate otherwise, or not at all."""
    model, other = joint_model(), joint_model()
    rolling = build(model, rho=1.0 if rank in (None, 0) else 5.0)
    idle = build(other, beta=0.0 if rank in (None, 0) else 2.0)
    for each in (model, other):
        run_forward(each, [batch(seed=1)])
    rolling.end_epoch()
    log = idle.end_epoch()
    logits = other.eval()(batch()).logits.detach()
    return {"rotation": rolling.rotation, "idle": idle.rotation, "log": log, "logits": logits}


def measure_full_pass(rank):
    """A pass of which each process has its own half."""
    model = joint_model()
    rolling = build(model, statistics="full_pass")
    batches = [batch(seed=seed, size=size) for seed, size in enumerate((5, 3, 2, 7))]
    rolling.measure(model, batches if rank is None else batches[rank::WORLD])
    rolling.end_epoch()
    return {"rotation": rolling.rotation}


def train_with_unused_parameters(rank):
    """Whether two steps pass in which parameters have no gradient, told to the wrapper and untold."""
    passed = {}
    for messages in (False, True):
        for what in ("stage", "modality"):
            model = joint_model(depth=3 if what == "stage" else 1)
            if what == "stage":
                eq.balance.ProgressiveRollingQ(model.fusion, epochs=3)
            called = DistributedDataParallel(model, find_unused_parameters=messages)
            passed[f"{what}, {messages}"] = True
            try:
                for seed in range(2):
                    inputs = batch(seed=seed)
                    if what == "modality":
                        inputs["image"] = None
                    output = called(inputs)
                    scores = sum(logits.sum() for logits in output.unimodal_logits.values())
                    (model.loss(output.logits, inputs["target"]) + scores).backward()
            except RuntimeError as error:
                passed[f"{what}, {messages}"] = "find_unused_parameters=True" not in str(error)
    return passed


SCENES = {
    "resting": train_with_unused_parameters,
    "training": train_in_process,
    "uneven": train_uneven,
    "disagreeing": train_disagreeing,
    "measured": measure_full_pass,
}


def worker(rank, folder):
    with process_group(rank, folder, WORLD):
        torch.save({name: scene(rank) for name, scene in SCENES.items()}, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("processes")
    multiprocessing.spawn(worker, args=(str(folder),), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


def test_both_processes_rotate_identically(results):
    for one, other in zip(results[0]["training"]["rotations"], results[1]["training"]["rotations"], strict=True):
        assert torch.equal(one, other)
    assert results[0]["training"]["logs"] == results[1]["training"]["logs"]
    assert torch.equal(results[0]["training"]["logits"], results[1]["training"]["logits"])


def test_two_processes_match_one_with_doubled_batch(results):
    alone = train_in_process(None)
    for epoch, (one, other) in enumerate(zip(alone["rotations"], results[0]["training"]["rotations"], strict=True)):
        torch.testing.assert_close(other, one, **EXACT)
        assert results[0]["training"]["logs"][epoch] == pytest.approx(alone["logs"][epoch], abs=EXACT["rtol"])
    assert alone["logs"][-1]["rotations"] == EPOCHS
    torch.testing.assert_close(results[1]["training"]["logits"], alone["logits"], **EXACT)


def test_half_of_the_data_gives_a_different_rotation():
    """Control for the equality above: the statistics of one process differ from those of both."""
    rotations = []
    for take in (slice(0, 2), slice(0, 1), slice(1, 2)):
        model = joint_model()
        rolling = build(model)
        run_forward(model, split_batch(full_batch(0, 0), SIZE, SIZE)[take])
        rolling.end_epoch()
        rotations.append(rolling.rotation)
    assert float((rotations[0] - rotations[1]).abs().max()) > 1e-3
    assert float((rotations[0] - rotations[2]).abs().max()) > 1e-3


def test_unused_parameters_must_be_declared(results):
    """As docs/methods/rollingq.md says."""
    for process in results:
        assert process["resting"] == {
            "stage, False": False, "modality, False": False, "stage, True": True, "modality, True": True
        }  # fmt: skip


def test_process_without_samples_follows_the_others(results):
    alone = train_uneven(None)
    for process in results:
        torch.testing.assert_close(process["uneven"]["rotation"], alone["rotation"], **EXACT)
        assert process["uneven"]["log"]["rotated"] == results[0]["uneven"]["log"]["rotated"] == 1.0


def test_first_process_decides(results):
    alone = train_disagreeing(None)
    for process in results:
        torch.testing.assert_close(process["disagreeing"]["rotation"], alone["rotation"], **EXACT)
        torch.testing.assert_close(process["disagreeing"]["idle"], alone["idle"], **EXACT)
        assert (process["disagreeing"]["log"]["rotated"], process["disagreeing"]["log"]["rotations"]) == (1.0, 1.0)
        torch.testing.assert_close(process["disagreeing"]["logits"], alone["logits"], **EXACT)
    for name in ("rotation", "idle", "logits"):
        assert torch.equal(results[0]["disagreeing"][name], results[1]["disagreeing"][name])


def test_full_pass_is_shared(results):
    alone = measure_full_pass(None)["rotation"]
    for process in results:
        torch.testing.assert_close(process["measured"]["rotation"], alone, **EXACT)
    assert torch.equal(results[0]["measured"]["rotation"], results[1]["measured"]["rotation"])
