"""Training: the same bytes for the same recipe, however often it is stopped, and in however many processes."""

import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.tolerances import FLOAT32, LOGITS, difference
from helpers.training import SMALL, TINY, TINY_FILE, Killed, killed_at
from torch import nn

from asapc.errors import AsapcError, CheckpointError, OptionError, OutputError, SamplesError
from asapc.loading.model import load_model
from asapc.models.vit import VisionTransformer
from asapc.planning.distributed import several
from asapc.training import loop
from asapc.training.loop import train
from asapc.training.run import Run, learning_rate, take_scaling_form
from asapc.training.tasks import Task, task
from asapc.types.samples import Samples


@pytest.fixture(autouse=True)
def every_other_step(monkeypatch):
    monkeypatch.setattr(loop, "EVERY", 2)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> bytes:
    out = tmp_path_factory.mktemp("uninterrupted") / "model.pt"
    train(TINY, out)
    return out.read_bytes()


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "model.pt"


@pytest.fixture
def stopped(out) -> Path:
    """The state of a training that was stopped."""
    with pytest.raises(Killed):
        train(TINY, out, on_event=killed_at(4))
    return out.with_name("model.pt.state")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def refusal(error: type[AsapcError], *arguments, **options) -> tuple[str, str]:
    with pytest.raises(error) as caught:
        train(*arguments, **options)
    return str(caught.value), caught.value.hint


@pytest.mark.parametrize("step", range(1, TINY.steps + 1))
def test_a_training_that_is_stopped_at_any_step_and_resumed_writes_the_same_bytes(step, out, uninterrupted):
    with pytest.raises(Killed):
        train(TINY, out, on_event=killed_at(step))
    assert names(out.parent) == (["model.pt.state"] if step > 1 else [])
    train(TINY, out, resume=True)
    assert out.read_bytes() == uninterrupted
    assert names(out.parent) == ["model.pt"]


def test_it_may_be_stopped_again(out, uninterrupted):
    for step in (2, 3, 3, 5):
        with pytest.raises(Killed):
            train(TINY, out, resume=True, on_event=killed_at(step))
    train(TINY, out, resume=True)
    assert out.read_bytes() == uninterrupted


def test_another_seed_gives_other_weights(out, uninterrupted):
    train(replace(TINY, seed=1), out)
    assert out.read_bytes() != uninterrupted


def test_the_checkpoint_loads_and_is_right_as_often_as_it_claims(out):
    facts = train(TINY, out)
    loaded, content = load_model(out), torch.load(out, weights_only=True)
    assert content["training"] == facts
    assert (facts["task"], facts["seed"], facts["steps"]) == ("digits", 0, 7)
    assert content["model_args"] == {"size": 8, "classes": 10, **SMALL, "epsilon": 0.25, "iterations": 2}
    assert (len(loaded.calibration), len(loaded.held_out)) == (64, 500)
    with torch.no_grad():
        right = loaded.module(loaded.held_out.inputs["images"]).argmax(dim=-1) == loaded.held_out.labels
    assert facts["held_out_accuracy"] == pytest.approx(right.double().mean().item(), abs=1 / 500)


def test_softmax_attention_is_that_of_the_checkpoint(out):
    train(replace(TINY, attention="softmax", steps=1), out)
    with torch.no_grad():
        model = load_model(out).module
        x = torch.randn(1, 64, 8)
        attention = model.blocks[0].attention
        q, k, v = attention.qkv(x).view(1, 64, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        expected = attention.proj(mixed.transpose(1, 2).reshape(1, 64, 8))
        assert difference(attention(x), expected) < FLOAT32


def test_a_state_holds_tensors_and_numbers_alone(stopped):
    assert torch.load(stopped, weights_only=True)["step"] == 4


def test_training_leaves_torch_as_it_was(out):
    generator = torch.get_rng_state()
    train(replace(TINY, steps=1), out)
    assert torch.equal(torch.get_rng_state(), generator)


def test_progress_has_loss_accuracy_and_remaining_time(out):
    events = []
    train(replace(TINY, steps=2), out, on_event=events.append)
    advanced = [event for event in events if hasattr(event, "remaining")]
    assert [event.detail.split(",")[0] for event in advanced] == ["step 1/2", "step 2/2"]
    assert all("loss " in event.detail and "accuracy " in event.detail for event in advanced)
    assert advanced[0].remaining > 0
    assert advanced[1].remaining == 0


def test_what_a_training_left_is_neither_overwritten_nor_mixed_with_another_recipe(out, stopped):
    before = stopped.read_bytes()
    message, hint = refusal(OutputError, TINY, out)
    assert str(stopped) in message
    assert "--resume" in hint
    assert "--force" in hint
    message, hint = refusal(OptionError, replace(TINY, seed=1), out, resume=True)
    assert "seed was 0, and is 1" in message
    assert stopped.read_bytes() == before
    assert names(out.parent) == [stopped.name]


def test_force_starts_again(out, stopped, uninterrupted):
    train(TINY, out, force=True)
    assert out.read_bytes() == uninterrupted
    assert not stopped.exists()


@pytest.mark.parametrize("content", [b"", b"no archive", "half", {"format": "another"}, {"step": "none"}, {"step": -5}])
def test_a_damaged_state_is_refused_and_left(content, out, stopped):
    if content == "half":
        content = stopped.read_bytes()[: stopped.stat().st_size // 2]
    if isinstance(content, bytes):
        stopped.write_bytes(content)
    else:
        state = torch.load(stopped, weights_only=True)
        torch.save({**state, **content}, stopped)
    message, hint = refusal(CheckpointError, TINY, out, resume=True)
    assert str(stopped) in message
    assert "without --resume" in hint or hint == "remove it"
    assert names(out.parent) == [stopped.name]


def test_a_state_of_as_many_processes_alone_is_taken(out, stopped, monkeypatch):
    monkeypatch.setattr(loop, "processes_sharing", lambda: 2)
    message, hint = refusal(OptionError, TINY, out, resume=True)
    assert "processes was 1, and is 2" in message
    assert "number of processes" in hint


def test_a_training_that_is_done_is_not_done_again_by_resume(out, uninterrupted):
    out.write_bytes(uninterrupted)
    facts = train(TINY, out, resume=True, on_event=killed_at(0))
    assert facts["held_out_accuracy"] > 0
    assert out.read_bytes() == uninterrupted
    assert names(out.parent) == [out.name]
    message, _ = refusal(OutputError, replace(TINY, seed=1), out, resume=True)
    assert "exists already" in message


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_where_the_state_would_be_is_refused(force, out):
    state = out.with_name("model.pt.state")
    state.mkdir()
    message, hint = refusal(OutputError, TINY, out, force=force)
    assert f"{state} is a folder" in message
    assert hint == "remove it"
    assert "no name" in refusal(OutputError, TINY, Path())[0]


def test_a_checkpoint_that_exists_is_not_replaced(out):
    out.write_bytes(b"mine")
    message, hint = refusal(OutputError, TINY, out)
    assert "exists already" in message
    assert "--force" in hint
    assert out.read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 1e30}, "the loss is"),
        ({"batch": 2000}, "a batch of 2000 is more than all 1297 samples"),
        ({"model": {"breadth": 10}}, "breadth"),
        ({"model": {**SMALL, "classes": 3}}, "classes of [model] is the task's own, 10"),
    ],
)
def test_a_recipe_that_does_not_fit_its_task_is_refused(changes, message, out):
    said, hint = refusal(OptionError, replace(TINY, **changes), out)
    assert message in said
    assert "recipe" in hint or "learning_rate" in hint or hint == "omit it"
    assert not out.exists()


def numbered(count: int) -> Task:
    """Images that tell which they are."""
    images = torch.arange(count).view(-1, 1, 1).expand(-1, 8, 8) / count
    samples = Samples({"images": images}, torch.zeros(count, dtype=torch.long))
    return Task(f"{VisionTransformer.__module__}:VisionTransformer", samples, samples)


def test_all_samples_are_taken_once_before_one_is_taken_again():
    run, epochs = Run(replace(TINY, batch=4), numbered(13)), []
    for _ in range(2):
        taken = []
        for _ in range(3):
            taken += run.batch().inputs["images"][:, 0, 0].tolist()
            run.step += 1
        assert len(set(taken)) == 12
        epochs.append(taken)
    assert epochs[0] != epochs[1]


def test_sinkhorn_is_trained_in_its_scaling_form_unless_another_is_asked_for():
    model = nn.ModuleList(nn.Identity() for _ in range(3))
    model[0].form, model[1].form = "log", "recompute"
    take_scaling_form(model)
    assert [getattr(module, "form", None) for module in model] == ["scaling", "recompute", None]


def test_the_learning_rate_grows_over_a_tenth_of_the_steps_and_falls_to_zero():
    for steps in (1, 2, 10, 100):
        rates = [learning_rate(replace(TINY, steps=steps), step) for step in range(steps)]
        top = -(-steps // 10) - 1
        assert rates[top] == max(rates) == TINY.learning_rate
        assert rates == [*sorted(rates[:top]), *sorted(rates[top:], reverse=True)]
        assert rates[-1] > 0


def test_a_batch_is_shared_out_whole(monkeypatch):
    """What the processes compute adds up to what one does."""
    tensors: list[torch.Tensor] = []
    monkeypatch.setattr("asapc.training.run.total", lambda sums: tensors.append(sums.clone()) or sums)
    Run(TINY, task("digits")).advance()
    whole, whole_sums = tensors
    shares = []
    for rank in range(3):
        tensors.clear()
        monkeypatch.setattr("asapc.training.run.share", lambda samples, rank=rank: samples[rank::3])
        Run(TINY, task("digits")).advance()
        shares.append(tuple(tensors))
    assert difference(sum(gradients for gradients, _ in shares), whole) < FLOAT32
    assert difference(sum(sums for _, sums in shares), whole_sums) < FLOAT32


def test_more_processes_than_samples_in_a_batch_are_refused(monkeypatch, out):
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 9)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    token = several.set(True)
    try:
        message, _ = refusal(SamplesError, TINY, out)
    finally:
        several.reset(token)
    assert "9 processes cannot share 8 samples" in message


@pytest.mark.slow
def test_processes_of_torchrun_train_what_one_does(tmp_path, uninterrupted):
    (tmp_path / "tiny.toml").write_text(TINY_FILE)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "asapc", "train"]
    ran = subprocess.run([*command, "tiny.toml"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("held-out accuracy") == 1
    assert names(tmp_path) == ["model.pt", "tiny.toml"]
    # Outputs, not weights: the bias of keys changes nothing, so that its gradient is rounding, and Adam takes its sign.
    (tmp_path / "alone.pt").write_bytes(uninterrupted)
    images = task("digits").held_out.inputs["images"]
    with torch.no_grad():
        alone, shared = (load_model(tmp_path / f"{name}.pt").module(images) for name in ("alone", "model"))
    assert (shared - alone).abs().max() < LOGITS


@pytest.mark.slow
def test_a_process_that_is_killed_is_resumed_to_the_same_bytes(tmp_path):
    (tmp_path / "tiny.toml").write_text(TINY_FILE.replace("steps = 7", "steps = 400"))
    command = [sys.executable, "-m", "asapc", "train", "tiny.toml", "--resume", "--out"]
    subprocess.run([*command, "whole.pt"], cwd=tmp_path, check=True, capture_output=True)
    process = subprocess.Popen([*command, "killed.pt"], cwd=tmp_path, stderr=subprocess.DEVNULL)
    try:
        while not (tmp_path / "killed.pt.state").exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    assert not (tmp_path / "killed.pt").exists()
    subprocess.run([*command, "killed.pt"], cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "killed.pt").read_bytes() == (tmp_path / "whole.pt").read_bytes()
    assert names(tmp_path) == ["killed.pt", "tiny.toml", "whole.pt"]
