"""The program after each stage, in files that can be read and compared."""

from pathlib import Path

import onnx
import pytest
from helpers.command import written
from helpers.fitted import cached_teacher, site, sound

from asapc.errors import OutputError
from asapc.types.artifacts import OnnxArtifact
from asapc.types.choices import Candidate, Choice, Selection
from asapc.types.results import SiteFidelity
from asapc.types.site import Findings, Miss
from asapc.writing.dump import Dump


def test_files_are_numbered_in_the_order_of_the_stages(tmp_path):
    dump = Dump(tmp_path / "a" / "b")
    dump.text("capture", "first")
    dump.text("find", "second")
    files = {path.name: path.read_text() for path in (tmp_path / "a" / "b").iterdir()}
    assert files == {"01-capture.txt": "first\n", "02-find.txt": "second\n"}


def test_a_graph_is_readable_code_below_the_lines_it_was_traced_from(tmp_path):
    graph = cached_teacher(sound).graph
    Dump(tmp_path).graph("capture", graph)
    text = (tmp_path / "01-capture.txt").read_text()
    assert "vit.py" in text
    names = [node.name for node in graph.program.graph.nodes if node.op == "call_function"]
    assert names
    assert all(f" {name}" in text for name in names)


def test_findings_name_the_nodes_of_each_site_and_why_others_are_none(tmp_path):
    miss = Miss("mul_3", "model.py:7", "the plan is constant", "give other samples")
    dump = Dump(tmp_path)
    dump.findings("find", Findings((site(),), (miss,)))
    dump.findings("find", Findings((), ()))
    text = (tmp_path / "01-find.txt").read_text()
    assert "6 half-steps, the last on rows, 2 heads of 9 x 9" in text
    for node in ("scores", "plan", "query", "key", "value", "output"):
        assert f"node='{node}'" in text
    assert "miss at model.py:7: the plan is constant; give other samples" in text
    assert (tmp_path / "02-find.txt").read_text() == "nothing looks like attention\n"


def test_a_selection_shows_its_reason_and_what_else_there_was(tmp_path):
    exact = Candidate("exact", 40, 2.0, SiteFidelity(1e-7, 0.0, 0.0, 0.0))
    truncated = Candidate("truncated", 4, 1.0)
    Dump(tmp_path).selection(
        "select", Selection({"attention": Choice(exact, "nothing is cheaper", (truncated, exact))})
    )
    lines = (tmp_path / "01-select.txt").read_text().splitlines()
    assert lines == [
        "attention: exact, nothing is cheaper",
        "    truncated, 4 half-steps, materialised: 1.000 ms by estimate, relc not measured",
        "    exact, 40 half-steps, materialised: 2.000 ms by estimate, relc 1e-07",
    ]


def test_an_onnx_file_is_kept_as_it_is_and_as_text(tmp_path):
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [2])
    result = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [2])
    node = onnx.helper.make_node("Relu", ["x"], ["y"], name="step")
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "graph", [value], [result]))
    onnx.save(model, tmp_path / "model.onnx")
    Dump(tmp_path / "stages").onnx("model", OnnxArtifact(tmp_path / "model.onnx", 18))
    assert (tmp_path / "stages" / "01-model.onnx").read_bytes() == (tmp_path / "model.onnx").read_bytes()
    assert "y = Relu (x)" in (tmp_path / "stages" / "01-model.txt").read_text()


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dump = Dump()
    dump.graph("capture", cached_teacher(sound).graph)
    dump.findings("find", Findings((), ()))
    dump.onnx("model", OnnxArtifact(Path("missing.onnx"), 18))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_the_users_to_change(tmp_path):
    # A file in its path keeps out root too, under whom the tests may run.
    with pytest.raises(OutputError) as caught:
        Dump(written(tmp_path / "file") / "stages")
    assert "--dump" in caught.value.hint
    dump = Dump(tmp_path / "stages")
    (tmp_path / "stages" / "01-capture.txt").mkdir()
    with pytest.raises(OutputError, match="01-capture"):
        dump.text("capture", "")
