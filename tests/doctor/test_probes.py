"""Imports that raise, crash or hang harm nobody."""

import signal
import sys
import time

import pytest

from asapc.doctor.probes import probe

MODULES = {
    "whole": "__version__ = '1.2'",
    "raising": "raise RuntimeError('first\\nsecond')",
    "exiting": "raise SystemExit(3)",
    "without": "import no_such_module",
    "loud": "print('noise'); print('{}')",
    "crashing": f"import os; os.kill(os.getpid(), {int(signal.SIGSEGV)})",
    "leaving": "import os, sys; print('the reason', file=sys.stderr, flush=True); os._exit(7)",
    "hanging": "import time; time.sleep(600)",
}


@pytest.fixture
def modules(tmp_path, monkeypatch):
    for name, code in MODULES.items():
        (tmp_path / f"{name}_module.py").write_text(code)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])


def ask(name: str, code: str = "", seconds: float = 60) -> dict:
    return probe({"answer": (f"{name}_module", code)}, seconds)["answer"]


def test_a_module_that_loads_says_its_version_and_what_the_code_asks(modules):
    answer = ask("whole", "details['own'] = module.__version__ + '!'")
    assert answer == {"installed": True, "version": "1.2", "details": {"own": "1.2!"}}


def test_a_module_that_is_not_there_is_no_error(modules):
    assert ask("absent") == {"installed": False}
    assert probe({"a": ("no_such_package.part", "")})["a"] == {"installed": False}


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("raising", "RuntimeError: first second"),
        ("exiting", "SystemExit: 3"),
        ("without", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("crashing", "the import ended its process (SIGSEGV)"),
        ("leaving", "the import ended its process (the reason)"),
    ],
)
def test_a_module_that_does_not_load_says_why(modules, name, error):
    assert ask(name) == {"installed": True, "error": error}


def test_code_that_raises_is_an_error_too(modules):
    assert ask("whole", "1 / 0")["error"] == "ZeroDivisionError: division by zero"


def test_what_a_module_prints_is_no_answer(modules):
    assert ask("loud") == {"installed": True, "version": None, "details": {}}


def test_a_module_that_hangs_is_left_at_the_time_limit_and_others_answer(modules):
    start = time.monotonic()
    answers = probe({"hang": ("hanging_module", ""), "whole": ("whole_module", "")}, 3)
    assert time.monotonic() - start < 30
    assert answers["hang"] == {"installed": True, "error": "the import took more than 3 s"}
    assert answers["whole"]["version"] == "1.2"
