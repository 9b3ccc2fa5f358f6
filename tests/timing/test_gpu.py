"""Timing on a GPU: when it has come to rest, and the clocks that the driver reports."""

import itertools
import os

import pytest

from asapc.timing import gpu as module
from asapc.timing.gpu import WINDOW, clocks, settle


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """What the module takes for the time, in seconds."""
    now = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    return now


def test_it_has_settled_once_two_windows_take_the_same_time(clock):
    times = [5.0] * WINDOW + [3.0] * WINDOW + [2.0] * WINDOW + [2.01] * WINDOW + [9.0] * WINDOW
    left = iter(times)
    assert settle(lambda: next(left)) is True
    assert list(left) == [9.0] * WINDOW


def test_what_never_settles_ends_in_time(clock):
    times = itertools.count(1)

    def run() -> float:
        clock[0] += 0.02
        return 1.5 ** next(times)

    assert settle(run) is False
    assert clock[0] < module.MAX_SECONDS + 0.02 * WINDOW + 0.1


def smi(tmp_path, monkeypatch, text: str, code: int = 0) -> None:
    """Put an nvidia-smi into the path that prints a text, and writes down what it is asked."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\necho \"$@\" > {tmp_path}/words\ncat <<'END'\n{text}\nEND\nexit {code}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.skipif(os.name != "posix", reason="the program is a shell script")
def test_clocks_are_those_of_the_first_gpu(tmp_path, monkeypatch):
    smi(tmp_path, monkeypatch, "1980, 1980, 2619, 38, 121.50\n300, 1980, 2619, 30, 70.00")
    (reading,) = clocks()
    assert (reading.sm_mhz, reading.max_sm_mhz, reading.memory_mhz) == (1980, 1980, 2619)
    assert (reading.temperature_c, reading.power_w) == (38, 121.5)
    assert "--id" not in (tmp_path / "words").read_text()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    assert len(clocks()) == 1
    assert "--id=3" in (tmp_path / "words").read_text().split()


@pytest.mark.skipif(os.name != "posix", reason="the program is a shell script")
@pytest.mark.parametrize(
    ("text", "code", "expected"),
    [
        ("1500, [N/A], 7000, 40, [N/A]", 0, (1500.0, None, 7000.0, 40.0, None)),
        ("NVIDIA-SMI has failed because it could not communicate with the driver", 9, None),
        ("No devices were found", 0, None),
        ("", 0, None),
    ],
)
def test_what_the_driver_does_not_report_is_left_out(text, code, expected, tmp_path, monkeypatch):
    smi(tmp_path, monkeypatch, text, code)
    assert [tuple(vars(reading).values()) for reading in clocks()] == ([] if expected is None else [expected])


def test_without_a_driver_there_are_none(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert clocks() == ()
