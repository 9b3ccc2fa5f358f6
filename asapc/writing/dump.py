"""Writes the program after each stage of a compilation, for reading and for comparing: `asapc compile --dump DIR`."""

import shutil
from collections.abc import Mapping
from pathlib import Path

from asapc.errors import OutputError
from asapc.types.artifacts import OnnxArtifact
from asapc.types.choices import Selection
from asapc.types.graph import CapturedGraph
from asapc.types.site import Findings, Site


class Dump:
    """Writes the program after each stage; the files stay where a later stage fails.

    Args:
        folder: where they go; None for nowhere.

    Raises:
        OutputError: the folder cannot be written.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder, self.count = folder, 0
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                why = str(error.strerror).lower()
                raise OutputError(f"cannot write {folder}: {why}", "give another --dump") from None

    def graph(self, stage: str, graph: CapturedGraph) -> None:
        """Write the graph as readable code, below each line of the user's code the nodes that were traced from it."""
        if self.folder is not None:
            self.text(stage, graph.program.graph_module.print_readable(print_output=False))

    def findings(self, stage: str, findings: Findings) -> None:
        """Write the sites with their loops and nodes, and the near misses."""
        sites = [describe_site(site) for site in findings.sites]
        misses = [f"miss at {miss.source or miss.node}: {miss.reason}; {miss.hint}" for miss in findings.misses]
        self.text(stage, "\n".join([*sites, *misses]) or "nothing looks like attention")

    def selection(self, stage: str, selection: Selection) -> None:
        """Write the operator of each site with its reason, and the front that it was chosen from."""
        lines = []
        for name, choice in selection.choices.items():
            lines.append(f"{name}: {choice.candidate.operator}, {choice.reason}")
            for candidate in choice.front:
                relc = "not measured" if candidate.fidelity is None else f"{candidate.fidelity.relc:.3g}"
                lines.append(
                    f"    {candidate.operator}, {candidate.half_steps} half-steps, {candidate.lowering}: "
                    f"{candidate.cost:.3f} ms by estimate, relc {relc}"
                )
        self.text(stage, "\n".join(lines))

    def onnx(self, stage: str, artifact: OnnxArtifact) -> None:
        """Write an ONNX file as it is and as text."""
        if self.folder is None:
            return
        import onnx

        self.text(stage, onnx.printer.to_text(onnx.load(artifact.path, load_external_data=False)))
        shutil.copyfile(artifact.path, self.folder / f"{self.count:02}-{stage}.onnx")

    def text(self, stage: str, text: str) -> None:
        """Write one file, numbered in the order of the stages.

        Raises:
            OutputError: it cannot be written.
        """
        if self.folder is None:
            return
        self.count += 1
        path = self.folder / f"{self.count:02}-{stage}.txt"
        try:
            path.write_text(text + "\n")
        except OSError as error:
            raise OutputError(f"cannot write {path}: {str(error.strerror).lower()}", "give another --dump") from None


def describe_site(site: Site) -> str:
    """Describe a site in a few lines: the mathematics, and the nodes with their axes."""
    loop, wiring = site.loop, site.wiring
    nodes: Mapping[str, object] = {
        "scores": wiring.scores,
        "plan": wiring.plan,
        "product of queries and keys": wiring.product,
        "product with values": wiring.attention,
    }
    return "\n".join(
        [
            f"{site.name} at {site.source or 'no source line'}: {loop.half_steps} half-steps, the last on {loop.last}, "
            f"{loop.heads} heads of {loop.queries} x {loop.keys}{', masked' if loop.masked else ''}",
            *(f"    {name}: {node}" for name, node in nodes.items() if node is not None),
        ]
    )
