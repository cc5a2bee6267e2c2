"""``eq.watch`` in several threads, consecutively and concurrently."""

import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch._dynamo
from torch import nn
from torch.nn.modules import module as registry

import equipoise as eq
from equipoise.errors import ConfigError
from helpers.fusion import batch, joint_model

LABELS = torch.tensor([0, 0, 1, 1, -1])


def fusion():
    model, inputs = joint_model().eval(), batch()
    return model, lambda: model(inputs), {}


def encoder():
    layer = nn.TransformerEncoder(nn.TransformerEncoderLayer(6, 2, 7, batch_first=True), 2).eval()
    tokens = torch.randn(3, 5, 6)
    return layer, lambda: layer(tokens), {"modality": LABELS}


def vision_language():
    small_vlms = pytest.importorskip("small_vlms")
    model, inputs = small_vlms.family("llava")
    return model, lambda: model.generate(**inputs, max_new_tokens=3, do_sample=False), {}


MADE = {made.__name__: made for made in (fusion, encoder, vision_language)}


@pytest.fixture(autouse=True)
def ignore_warnings():
    with warnings.catch_warnings():
        for text in (".*_register_pytree_node.*", ".*deprecated.*", ".*generation flags.*"):
            warnings.filterwarnings("ignore", message=text)
        yield


def patched():
    """Returns the global functions that recording replaces."""
    result = [
        threading.Thread.start,
        *(len(getattr(registry, f"_global_forward_{kind}")) for kind in ("hooks", "pre_hooks")),
    ]
    result.append(torch._dynamo.eval_frame._stance.stance if hasattr(torch, "_dynamo") else None)
    return result


def run_threads(*works):
    """Runs functions in threads that start at the same time, and raises the first error of any of them."""
    barrier = threading.Barrier(len(works))

    def begin(work):
        barrier.wait()
        with torch.no_grad():
            return work()

    with ThreadPoolExecutor(len(works)) as pool:
        return [future.result() for future in [pool.submit(begin, work) for work in works]]


@pytest.mark.parametrize("name", MADE)
def test_one_model_recorded_in_several_threads(name):
    model, run, options = MADE[name]()
    before, forwards = patched(), [part.__dict__.get("forward") for part in model.modules()]
    with torch.no_grad(), eq.watch(model, **options) as record:
        run()
    right = str(record.table())

    def work():
        tables = set()
        for _ in range(4):
            with eq.watch(model, **options) as own:
                run()
            tables.add(str(own.table()))
        return tables

    assert run_threads(*[work] * 4) == [{right}] * 4
    assert patched() == before
    assert [part.__dict__.get("forward") for part in model.modules()] == forwards


def test_contexts_that_end_in_any_order():
    result, run, options = encoder()
    before = patched()
    first, second = threading.Event(), threading.Event()

    def early():
        with eq.watch(result, **options) as record:
            first.set()
            second.wait()
            run()
        return record.table()

    def late():
        first.wait()
        with eq.watch(result, **options) as record:
            second.set()
            one.join()
            run()
        return record.table()

    actual = []
    one = threading.Thread(target=lambda: actual.append(early()))
    other = threading.Thread(target=lambda: actual.append(late()))
    one.start(), other.start(), one.join(), other.join()
    assert [len(table) for table in actual] == [2, 2]
    assert str(actual[0]) == str(actual[1])
    assert patched() == before
    assert all("forward" not in part.__dict__ for part in result.modules())


def test_two_models_and_an_unrecorded_run():
    one, run_one, options = encoder()
    two, run_two, _ = fusion()

    def watched(model, run, **given):
        for _ in range(5):
            with eq.watch(model, **given) as record:
                run()
        return {layer: len(record.share(layer)) for layer in record.layers}

    def unwatched():
        for _ in range(5):
            run_one(), run_two()

    sizes = run_threads(lambda: watched(one, run_one, **options), lambda: watched(two, run_two), unwatched)[:2]
    with torch.no_grad():
        assert sizes == [watched(one, run_one, **options), watched(two, run_two)]


def test_error_in_one_thread_does_not_affect_others():
    result, run, options = encoder()
    before = patched()

    def fails():
        for _ in range(5):
            with pytest.raises(RuntimeError), eq.watch(result, **options):
                result(torch.zeros(3, 5, 7))

    def works():
        for _ in range(5):
            with eq.watch(result, **options) as record:
                run()
        return record.share("layers.1.self_attn")

    actual = run_threads(fails, works, works)
    assert torch.equal(actual[1], actual[2])
    assert patched() == before


def test_text_streamer_in_a_thread():
    model, _, _ = vision_language()
    transformers = pytest.importorskip("transformers")
    _, inputs = pytest.importorskip("small_vlms").family("llava")
    options = {**{key: value[:1] for key, value in inputs.items()}, "max_new_tokens": 4, "do_sample": False}

    class Numbers:
        def decode(self, tokens, **kwargs):
            return " ".join(map(str, tokens))

    with eq.watch(model, queries="last", tokens=True) as alone:
        written = model.generate(**options)[0, 13:].tolist()
    streamer = transformers.TextIteratorStreamer(Numbers(), skip_prompt=True, timeout=60)
    with eq.watch(model, queries="last", tokens=True) as record:
        thread = threading.Thread(target=model.generate, kwargs={**options, "streamer": streamer})
        thread.start()
        words = "".join(streamer).split()
    thread.join()
    assert [int(word) for word in words] == written
    for layer in alone.layers:
        assert torch.equal(record.share(layer), alone.share(layer))


def test_earlier_threads_are_not_recorded():
    result, run, options = encoder()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(int).result()
        message = "none, because the model ran in another thread, 'ThreadPool.*start that thread in the block"
        with pytest.warns(UserWarning, match=message), eq.watch(result, **options) as record:
            pool.submit(run).result()
        with pytest.raises(ConfigError, match=message):
            record.table()


def test_concurrent_threads_in_one_context():
    result, _, options = encoder()
    inside, go = threading.Event(), threading.Event()

    class Waits(nn.Module):
        def forward(self, tokens):
            inside.set()
            go.wait()
            return tokens

    full = nn.Sequential(Waits(), result)
    tokens = torch.randn(3, 5, 6)

    def both_at_once():
        with eq.watch(full, **options):
            thread = threading.Thread(target=full, args=(tokens,))
            thread.start()
            inside.wait()
            result(tokens)
            go.set()
            thread.join()

    def longer_than_the_block():
        with eq.watch(full, **options):
            threads.append(threading.Thread(target=full, args=(tokens,)))
            threads[0].start()
            inside.wait()

    threads = []
    with pytest.raises(
        ConfigError, match=r"only one thread at a time that runs the model in the block, got '.*' in parallel"
    ):
        both_at_once()
    inside.clear(), go.clear()
    with pytest.raises(ConfigError, match="got one that is still running after the block"):
        longer_than_the_block()
    go.set()
    threads[0].join()
    with eq.watch(full, **options) as record:
        for _ in range(2):
            thread = threading.Thread(target=full, args=(tokens,))
            thread.start()
            thread.join()
    assert len(record.share("1.layers.0.self_attn")) == 6
