"""What `asapc doctor` knows of a machine and its installation, and what is wrong with them.

It must work where torch and the runtimes do not, so it imports none of them: processes of their own do.
"""

from dataclasses import dataclass
from typing import Any

from asapc.doctor.facts import Facts
from asapc.doctor.rules import Finding, diagnose
from asapc.doctor.survey import collect


@dataclass(frozen=True)
class Examination:
    """What was found on a machine.

    Attributes:
        facts: about it.
        findings: what is wrong, faults first.
    """

    facts: Facts
    findings: tuple[Finding, ...]

    @property
    def ready(self) -> bool:
        """Whether asapc can compile here."""
        return not any(finding.severity == "fault" for finding in self.findings)

    def data(self) -> dict[str, Any]:
        """Return all of it as `asapc doctor --json` prints it, see docs/doctor.schema.json."""
        findings = [finding.data() for finding in self.findings]
        return {"schema": "asapc.doctor/1", "ready": self.ready, **self.facts.data(), "findings": findings}


def examine() -> Examination:
    """Examine this machine, which takes some seconds."""
    facts = collect()
    return Examination(facts, diagnose(facts))
