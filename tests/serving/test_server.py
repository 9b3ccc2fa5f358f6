"""A real Triton server answers from what was packaged."""

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from helpers.folders import relist, tamper
from helpers.triton import server_environment

import asapc
from asapc.errors import BuildError
from asapc.serving import triton
from asapc.serving.smoke import infer, running, smoke_triton
from asapc.serving.triton import package_triton

pytestmark = pytest.mark.slow  # the server's environment alone takes a minute


@pytest.fixture(scope="module")
def packaged(folder, tmp_path_factory):
    return package_triton(folder, tmp_path_factory.mktemp("repository"), "points", "python")


def points(batch: int, length: int) -> np.ndarray:
    return np.random.default_rng(batch).standard_normal((batch, length, 3)).astype(np.float32)


def test_the_smoke_test_passes(folder, packaged):
    assert "HTTP and gRPC" in smoke_triton(folder, packaged, server_environment())


def test_outputs_that_differ_fail_the_smoke_test(folder, packaged, tmp_path):
    other = shutil.copytree(folder, tmp_path / "other")
    outputs = {name: value + 0.01 for name, value in np.load(other / "expected.npz").items()}
    np.savez(other / "expected.npz", **outputs)
    relist(other)
    with pytest.raises(BuildError, match=r"differs by 0\.01"):
        smoke_triton(other, packaged, server_environment())


def test_a_server_answers_as_onnx_runtime_does_and_stays_up(folder, packaged):
    model = asapc.load(folder, device="cpu")
    names = [info.name for info in model.outputs]
    with running(packaged.parent.parent, "points", server_environment()) as addresses:
        for protocol, address in addresses.items():
            for wrong in (points(1, 49), points(1, 7), points(17, 24), points(1, 24)[..., :2], np.ones((1, 24, 3))):
                with pytest.raises(BuildError, match="refuses a request"):
                    infer(protocol, address, "points", {"points": wrong}, names)
            for batch, length in [(1, 24), (7, 24), (3, 8), (16, 48)]:
                inputs = {"points": points(batch, length)}
                outputs = infer(protocol, address, "points", inputs, names)
                for name, value in model(inputs).items():
                    np.testing.assert_allclose(outputs[name], value, rtol=1e-4, atol=1e-4)


POLL = ("--model-control-mode=poll", "--repository-poll-secs=1")


def shifted(folder: Path, target: Path) -> Path:
    """Another model with the same interface: one whose first output is 1 more."""
    tamper(folder, target, "manifest.json", lambda manifest: manifest.update(model_sha256="0" * 64))
    model = onnx.load(target / "model.onnx")
    name = model.graph.output[0].name
    (producer,) = (node for node in model.graph.node if name in node.output)
    producer.output[list(producer.output).index(name)] = "before"
    model.graph.node.append(onnx.helper.make_node("Add", ["before", "one"], [name]))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(1, np.float32), "one"))
    onnx.save(model, target / "model.onnx")
    relist(target)
    return target


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def alike(answer: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> bool:
    return all(np.allclose(answer[name], value, rtol=1e-4, atol=1e-4) for name, value in expected.items())


def in_time(ask: Callable[[], dict[str, np.ndarray]], seconds: float = 40) -> dict[str, np.ndarray]:
    """The first answer, of a server that has to look first."""
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        try:
            return ask()
        except BuildError:
            time.sleep(0.2)
    return ask()


@pytest.fixture
def two(folder, tmp_path):
    """Two models with one interface, inputs, and what each returns for them."""
    other, inputs = shifted(folder, tmp_path / "other"), {"points": points(2, 24)}
    first, second = (asapc.load(one, device="cpu")(inputs) for one in (folder, other))
    assert not alike(first, second)
    return other, inputs, first, second


def test_another_model_takes_over_under_load(folder, two, tmp_path):
    other, inputs, first, second = two
    repository = tmp_path / "repository"
    package_triton(folder, repository, "points", "python")
    answers, stop = {"http": [], "grpc": []}, threading.Event()

    def send(protocol: str, address: str) -> None:
        while not stop.is_set():
            try:
                answers[protocol].append(infer(protocol, address, "points", inputs, list(first)))
            except Exception as error:
                answers[protocol].append(error)

    with running(repository, "points", server_environment(), *POLL) as addresses:
        clients = [threading.Thread(target=send, args=address) for address in addresses.items()]
        for client in clients:
            client.start()
        try:
            package_triton(other, repository, "points", "python")
            in_time(lambda: infer("grpc", addresses["grpc"], "points", inputs, list(first), "2"))
            time.sleep(1)
        finally:
            stop.set()
            for client in clients:
                client.join()
        for number, expected in (("1", first), ("2", second)):  # the one before is still there to go back to
            assert alike(infer("http", addresses["http"], "points", inputs, list(first), number), expected)
    for of_client in answers.values():
        assert not [answer for answer in of_client if isinstance(answer, Exception)]
        models = [[alike(answer, first), alike(answer, second)].index(True) for answer in of_client]
        assert models == sorted(models)
        assert {*models} == {0, 1}


def test_a_damaged_version_is_not_taken_and_the_one_before_answers(folder, two, tmp_path):
    other, inputs, first, second = two
    repository = tmp_path / "repository"
    version = package_triton(folder, repository, "points", "python")
    bad = package_triton(other, tmp_path / "elsewhere", "points", "python", version=2)
    truncate(bad / "model.asap" / "model.onnx")
    with running(repository, "points", server_environment(), *POLL) as addresses:

        def ask(number: str = "") -> dict[str, np.ndarray]:
            return infer("http", addresses["http"], "points", inputs, list(first), number)

        bad.rename(version.with_name("2"))
        (version / "model.asap" / "model.onnx").unlink()  # of the version that is served
        for _ in range(12):
            time.sleep(0.5)
            assert alike(ask(), first)
            with pytest.raises(BuildError):
                ask("2")
        package_triton(folder, repository, "points", "python", version=1, force=True)
        package_triton(other, repository, "points", "python", version=2, force=True)
        assert alike(in_time(lambda: ask("2")), second)
        assert alike(ask("1"), first)


def test_a_new_model_that_grows_in_the_repository_is_taken_when_it_is_whole(folder, two, tmp_path, monkeypatch):
    other, inputs, first, second = two
    repository, write = tmp_path / "repository", triton.write_version
    package_triton(folder, repository, "points", "python")
    monkeypatch.setattr(triton, "movable", lambda repository: False)
    monkeypatch.setattr(triton, "write_version", lambda *arguments: (write(*arguments), time.sleep(3)))
    with running(repository, "points", server_environment(), *POLL) as addresses:
        package_triton(other, repository, "grown", "python")
        for name, expected in (("grown", second), ("points", first)):
            assert alike(in_time(lambda n=name: infer("grpc", addresses["grpc"], n, inputs, list(first))), expected)


@pytest.mark.parametrize("given", [("x", "mask"), ("x",)])
def test_masks_are_served_where_the_model_was_compiled_with_them(given, masked, tmp_path):
    folder = masked(given)
    version = package_triton(folder, tmp_path / "repository", "masked", "python")
    assert "HTTP and gRPC" in smoke_triton(folder, version, server_environment())
    samples, outputs = np.load(folder / "samples.npz"), np.load(folder / "expected.npz").files
    sent = {"x": samples["x"], "mask": np.ones(samples["x"].shape[:2], bool)}
    with running(version.parent.parent, "masked", server_environment()) as addresses:
        for protocol, address in addresses.items():
            for names in {("x", "mask"), ("x",)} - {given}:
                with pytest.raises(BuildError, match="refuses a request"):
                    infer(protocol, address, "masked", {name: sent[name] for name in names}, outputs)
