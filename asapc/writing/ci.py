"""Writes what a check found in the formats that CI systems read."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from asapc.writing.words import reached


def write_junit(path: Path, data: Mapping[str, Any]) -> None:
    """Write JUnit XML: a case for each term of the budget and for each batch size.

    Args:
        path: the file.
        data: of a check, as docs/check.schema.json describes it.
    """
    from junitparser import Error, Failure, TestCase

    cases = []
    for term in data["verdict"]["terms"]:
        case = TestCase(term["term"], classname=f"{data['folder']}.fidelity")
        if not term["met"]:
            case.result = [Failure(f"reached {reached(term)}")]
        cases.append(case)
    for gate in data["gates"]:
        case = TestCase(f"batch {gate['batch']}", classname=f"{data['folder']}.latency")
        if gate["outcome"] == "regression":
            case.result = [Failure(gate["reason"])]
        elif gate["outcome"] == "unstable":
            case.result = [Error(gate["reason"])]
        cases.append(case)
    write_suite(path, cases)


def write_junit_error(path: Path, folder: str, reason: str) -> None:
    """Write JUnit XML of a check that could not be made: one case, with the reason."""
    from junitparser import Error, TestCase

    case = TestCase("check", classname=folder)
    case.result = [Error(reason)]
    write_suite(path, [case])


def write_suite(path: Path, cases: Iterable[Any]) -> None:
    """Write cases as JUnit XML."""
    from junitparser import JUnitXml, TestSuite

    suite = TestSuite("asapc check")
    suite.add_testcases(cases)
    xml = JUnitXml("asapc")
    xml.add_testsuite(suite)
    xml.write(str(path), pretty=True)


def benchmark_entries(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return latencies as github-action-benchmark takes them under `customSmallerIsBetter`."""
    return [
        {
            "name": f"{data['folder']}, batch {gate['batch']}",
            "unit": "ms",
            "value": gate["ms"],
            "range": f"± {gate['ms'] * gate['noise_floor']:.3g}",
            "extra": gate["reason"],
        }
        for gate in data["gates"]
        if gate["ms"] is not None
    ]
