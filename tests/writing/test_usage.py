"""What stands in an output folder for those who use it: samples with outputs, and a README whose lines run."""

import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from helpers.documents import code_blocks, commands, run

from asapc.types.artifacts import EngineArtifact, EngineResult
from asapc.types.interface import AxisRange, Interface, TensorInfo
from asapc.writing.usage import write_readme

INTERFACE = Interface(
    (TensorInfo("ids", "int64", ("batch", "seq")), TensorInfo("mask", "bool", ("batch", "seq"))),
    (TensorInfo("logits", "float32", ("batch", 3)),),
    {"batch": AxisRange(1, None), "seq": AxisRange(16, 64)},
)
# Lines that need a server or a GPU, which tests have not.
ELSEWHERE = ("tritonserver",)


@pytest.fixture(scope="module")
def folders(point_model) -> dict[int, Path]:
    """A small model with samples in its folder, and without."""
    _, compile_it = point_model
    return {count: compile_it(target="onnx", samples_in_folder=count).folder for count in (3, 0)}


@pytest.mark.parametrize("count", [3, 0])
def test_the_lines_of_its_readme_run(count, folders, tmp_path):
    folder = shutil.copytree(folders[count], tmp_path / "model")
    blocks = code_blocks(folder / "README.md")
    assert {language for language, _ in blocks} == {"python", "sh"}
    for language, text in blocks:
        if language == "python":
            assert "(3, 10)" in (printed := run(["-c", text], folder)) or not count, printed
            continue
        for line in commands(text):
            program, *words = shlex.split(line)
            if program == "asapc":
                run(["-m", "asapc.cli", *words], folder)
            elif program not in ELSEWHERE:
                subprocess.run([program, *words], cwd=folder, check=True)
    assert (tmp_path / "triton" / "out" / "1" / "model.onnx").is_file()
    assert (tmp_path / "outputs.npz").is_file() == bool(count)
    run(["-c", "import asapc; asapc.load('.')"], folder)  # nothing of this changed the folder


def test_without_samples_none_are_written(folders):
    names = {path.name for path in folders[0].iterdir()}
    assert not names & {"samples.npz", "expected.npz", "held_out.npz"}


def test_outputs_are_those_of_the_file_for_samples_that_were_held_out(folders):
    inputs, expected = (dict(np.load(folders[3] / name)) for name in ("samples.npz", "expected.npz"))
    session = onnxruntime.InferenceSession(str(folders[3] / "model.onnx"), providers=["CPUExecutionProvider"])
    assert [len(value) for value in inputs.values()] == [3]
    for name, output in zip(expected, session.run(None, inputs), strict=True):
        np.testing.assert_array_equal(output, expected[name])


def test_a_readme_says_ranges_and_makes_inputs_of_the_least_lengths(tmp_path):
    write_readme(tmp_path, "text", INTERFACE, EngineResult("omitted"), 0)
    page = (tmp_path / "README.md").read_text()
    assert "| input | `ids` | (batch, seq of 16 to 64) int64 |" in page
    assert '"mask": np.ones((1, 16), "bool"),' in page
    assert "There is no engine in this folder" in page
    assert "samples.npz" not in page
    assert max(map(len, page.splitlines())) <= 130


@pytest.mark.parametrize(
    ("builder", "module"), [("tensorrt-rtx 1.7.1", "tensorrt_rtx"), ("tensorrt 10.14", "tensorrt")]
)
def test_a_readme_names_the_engine_and_its_library(builder, module, tmp_path):
    engine = EngineArtifact(tmp_path / "model.engine", builder, ("SM89", "SM120"), {})
    write_readme(tmp_path, "text", INTERFACE, EngineResult("built", engine), 4)
    page = (tmp_path / "README.md").read_text()
    assert f"was built by {builder} for SM89, SM120" in page
    assert "fail without one" in page
    code = next(text for _, text in code_blocks(tmp_path / "README.md") if "deserialize" in text)
    assert code.startswith(f"import {module} as tensorrt\n")
    compile(code, "README.md", "exec")
