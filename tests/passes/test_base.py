import pytest

from asapc.errors import AsapcError
from asapc.passes.base import GraphPass, PassManager, PassResult, PostconditionError, PreconditionError


class AtMost(GraphPass[int]):
    """Programs are numbers here: lowers a number to a limit, and writes down which hooks ran on what."""

    def __init__(self, limit, log):
        self.limit, self.log = limit, log

    def requires(self, program):
        self.log.append(("requires", program))
        if program < 0:
            raise PreconditionError("negative")

    def call(self, program):
        self.log.append(("call", program))
        return PassResult(min(program, self.limit), program > self.limit)

    def ensures(self, program):
        self.log.append(("ensures", program))
        if program == 13:
            raise PostconditionError("thirteen")


def test_the_precondition_is_checked_on_the_input_and_the_postcondition_on_the_result():
    log = []
    assert AtMost(5, log)(9) == PassResult(5, modified=True)
    assert log == [("requires", 9), ("call", 9), ("ensures", 5)]


def test_a_pass_does_not_run_on_a_program_that_it_cannot_take():
    log = []
    with pytest.raises(PreconditionError):
        AtMost(5, log)(-1)
    assert log == [("requires", -1)]


def test_a_result_that_breaks_the_promise_is_not_returned():
    with pytest.raises(PostconditionError):
        AtMost(13, [])(20)


def test_broken_contracts_are_defects_of_asapc_and_not_the_users_fault():
    for error in (PreconditionError, PostconditionError):
        assert not issubclass(error, AsapcError)
        assert error.exit_code == 70


def test_a_manager_runs_passes_in_order_each_on_the_result_of_the_one_before():
    log = []
    assert PassManager([AtMost(7, log), AtMost(5, log)])(9) == PassResult(5, modified=True)
    assert [program for hook, program in log if hook == "call"] == [9, 7]


@pytest.mark.parametrize(("program", "modified"), [(9, True), (6, True), (5, False)])
def test_a_manager_has_modified_where_any_pass_has(program, modified):
    # The last pass of the three never has anything left to do.
    manager = PassManager([AtMost(7, []), AtMost(5, []), AtMost(8, [])])
    assert manager(program).modified is modified
    assert manager(manager(program).program).modified is False


def test_managers_nest_and_an_empty_one_does_nothing():
    manager = PassManager([PassManager([AtMost(7, [])]), PassManager([])])
    assert manager(9) == PassResult(7, modified=True)
    assert PassManager([])(9) == PassResult(9, modified=False)
