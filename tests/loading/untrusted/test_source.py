"""What a source tells of its file, and how it refuses it."""

import dataclasses
import hashlib
import pickle

import pytest

from asapc.errors import CheckpointError, OptionError, SamplesError
from asapc.loading.untrusted.source import Source


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "samples.npz"
    path.write_bytes(b"four")
    return path


def test_a_source_has_the_size_and_the_hash_of_its_file(file):
    source = Source.at(file, SamplesError)
    assert (source.size, source.sha256) == (4, hashlib.sha256(b"four").hexdigest())


def test_a_source_never_changes(file):
    with pytest.raises(dataclasses.FrozenInstanceError):
        Source.at(file, SamplesError).size = 5


@pytest.mark.parametrize("error", [CheckpointError, OptionError, SamplesError])
def test_a_source_refuses_with_its_own_class(file, error):
    refusal = Source.at(file, error).refuse("it is old", "train again")
    assert (type(refusal), str(refusal), refusal.hint) == (error, f"cannot read {file}: it is old", "train again")


def test_a_member_has_a_label_and_a_size_of_its_own(file):
    source = Source.at(file, SamplesError)
    member = source.member("x", 2)
    assert (str(member), member.size) == (f"x in {file}", 2)
    assert (member.path, member.error) == (source.path, source.error)


def test_a_pointer_of_git_lfs_is_said_to_be_one(file):
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 5\n")
    with pytest.raises(SamplesError, match="pointer of Git LFS") as caught:
        Source.at(file, SamplesError)
    assert caught.value.hint == "fetch the file: git lfs pull"


def test_what_would_run_is_named_with_a_hint_for_the_kind_of_file(file):
    message = f"{file} holds Python objects that would run code when loaded (os.system); nothing was run"
    samples, model = (Source.at(file, error).would_run("os system") for error in (SamplesError, CheckpointError))
    assert str(samples) == str(model) == message
    assert samples.hint == "save arrays of numbers by input name, with numpy.savez or torch.save"
    assert model.hint == "save tensors only: model.state_dict(), not the model"


@pytest.mark.parametrize(
    ("failure", "why"),
    [
        (KeyError("x"), "cannot read {}: it is damaged, or of another format"),
        (MemoryError(), "cannot read {}: it claims more memory than there is"),
        (pickle.UnpicklingError("pickle data was truncated"), "cannot read {}: it is damaged, or of another format"),
        (
            pickle.UnpicklingError("Unsupported global"),
            "{} holds Python objects that would run code when loaded; nothing was run",
        ),
    ],
    ids=["any error", "memory", "damaged pickle", "pickle that calls"],
)
def test_whatever_a_reader_raises_becomes_one_refusal(file, failure, why):
    with pytest.raises(CheckpointError) as caught, Source.at(file, CheckpointError).reading():
        raise failure
    assert str(caught.value) == why.format(file)


def test_a_refusal_passes_through_as_it_is(file):
    refusal = SamplesError("not finite", "remove those samples")
    with pytest.raises(SamplesError) as caught, Source.at(file, CheckpointError).reading():
        raise refusal
    assert caught.value is refusal
