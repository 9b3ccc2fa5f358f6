"""The lines of the pages on using a result run as they stand there, on what the README's first command compiles."""

import shlex
from pathlib import Path

import pytest
from helpers import documents
from helpers.documents import code_blocks, commands
from helpers.paths import ROOT

SERVING = code_blocks(ROOT / "docs" / "serving.md")
PYTHON = [text for language, text in SERVING if language == "python"]
COMMANDS = [line for language, text in SERVING if language == "sh" for line in commands(text)]
OBJECTS = [t for name, t in code_blocks(ROOT / "docs" / "guide.md") if name == "python" and "load_checkpoint" in t]
(README,) = (t for name, t in code_blocks(ROOT / "README.md") if name == "python" and "asapc.load(" in t)
CLASSES = """
import torch
images = digits.held_out.inputs["images"]
with asapc.load("digits.asap", device="cpu") as compiled, torch.no_grad():
    (logits,) = compiled(images).values()
    print("same", bool((logits.argmax(1) == fast(images).argmax(1)).all()), logits.shape)
"""


@pytest.mark.parametrize("code", [README, *PYTHON])
def test_a_folder_is_loaded_as_the_pages_say(code: str, readme_folder: Path) -> None:
    assert "onnxruntime" in documents.run(["-c", code], readme_folder)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_page_runs(command: str, readme_folder: Path) -> None:
    program, *words = shlex.split(command)
    assert program == "asapc"
    documents.run(["-m", "asapc.cli", *words, "--force"], readme_folder)


def test_objects_are_compiled_and_accelerated_as_the_guide_says(readme_folder: Path) -> None:
    compile_it, accelerate_it = OBJECTS
    assert "PASSED" in documents.run(documents.quick_words(compile_it), readme_folder)
    assert (readme_folder / "live.asap" / "model.onnx").is_file()
    # Trained digits: the module names the classes that the file names which the command wrote.
    assert "same True torch.Size([500, 10])" in documents.run(["-c", accelerate_it + CLASSES], readme_folder)
