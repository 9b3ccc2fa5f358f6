"""What is recorded of the machine."""

import os
import time

from asapc.timing import machine
from asapc.timing.machine import Watch, warn_of_load
from asapc.types.timing import Conditions


def test_what_other_processes_used_is_what_this_one_did_not(monkeypatch):
    snapshots = iter([(0.0, 100.0, 10.0), (10.0, 121.0, 16.0)])
    monkeypatch.setattr(machine, "snapshot", lambda: next(snapshots))
    assert Watch().conditions.others == 1.5  # 15 of 21 seconds in 10


def test_own_work_is_not_that_of_others():
    before = machine.snapshot()
    end = time.process_time() + 0.05
    while time.process_time() < end:
        pass
    after = machine.snapshot()
    assert after[2] - before[2] >= 0.03
    assert after[1] >= before[1]


def test_the_cores_are_those_that_the_process_may_run_on():
    assert set(Watch().conditions.cores) == os.sched_getaffinity(0)


def test_a_busy_machine_is_said():
    assert warn_of_load(Conditions((), None, None, ())) == []
    assert warn_of_load(Conditions((), None, 0.1, ())) == []
    assert "1.5 cores" in warn_of_load(Conditions((), None, 1.5, ()))[0]
