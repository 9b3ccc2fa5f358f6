"""What an error says survives the way from the process of a worker, which pickles it."""

import pickle

import pytest

from asapc.errors import AsapcError, BuildError


def of_kind(kind: type[AsapcError]) -> list[type[AsapcError]]:
    """A class of errors, and all below it."""
    return [kind, *(one for below in kind.__subclasses__() for one in of_kind(below))]


@pytest.mark.parametrize("kind", of_kind(AsapcError))
def test_an_error_leaves_a_pickle_as_it_entered_it(kind):
    error = pickle.loads(pickle.dumps(kind("what is wrong", "what to do")))
    assert (type(error), str(error), error.hint) == (kind, "what is wrong", "what to do")


def test_the_node_of_a_build_error_stays_with_it():
    assert pickle.loads(pickle.dumps(BuildError("what is wrong", "what to do", "node_7"))).node == "node_7"
