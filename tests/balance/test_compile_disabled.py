"""A method that is not compiled: it still belongs to its object, and goes along with copies of it."""

import copy
import pickle

import torch

from equipoise.balance.rollingq.compile_disabled import CompileDisabled


class Counter:
    """Counts, through a method that is not compiled; the two refer to each other, as a hook and its module do."""

    def __init__(self):
        self.total = 0
        self.add = CompileDisabled(self.take)

    def take(self, number, again=0):
        self.total += number + again


def test_copied_methods_are_bound_to_the_copy():
    first = Counter()
    first.add(2, 3)
    for twin in (copy.deepcopy(first), pickle.loads(pickle.dumps(first))):
        twin.add(7)
        assert (first.total, twin.total) == (5, 12)
        assert twin.add.method.__self__ is twin


def test_decorated_method_is_not_compiled():
    messages = []
    look = CompileDisabled(lambda x: messages.append(torch.compiler.is_compiling()))
    operations = []

    def backend(graph, _):
        operations.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    @torch.compile(backend=backend)
    def step(x):
        y = x * 2
        look(y)
        return y + 1

    assert float(step(torch.tensor(3.0))) == 7.0
    assert messages == [False]
    assert len(operations) == 2
