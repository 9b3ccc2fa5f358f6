"""A real Triton server answers from what was packaged."""

import shutil
import threading
import time

import numpy as np
import pytest
from helpers.folders import relist
from helpers.triton import server_environment

import asapc
from asapc.errors import BuildError
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


def test_versions_switch_under_load(folder, tmp_path):
    repository = tmp_path / "repository"
    package_triton(folder, repository, "points", "python")
    inputs = {"points": points(2, 24)}
    expected = asapc.load(folder, device="cpu")(inputs)
    answers, stop = [], threading.Event()

    def send(protocol: str, address: str) -> None:
        while not stop.is_set():
            try:
                answers.append(infer(protocol, address, "points", inputs, list(expected)))
            except Exception as error:
                answers.append(error)

    poll = ("--model-control-mode=poll", "--repository-poll-secs=1")
    with running(repository, "points", server_environment(), *poll) as addresses:
        clients = [threading.Thread(target=send, args=address) for address in addresses.items()]
        for client in clients:
            client.start()
        try:
            package_triton(folder, repository, "points", "python")
            limit, second = time.monotonic() + 40, None
            while second is None and time.monotonic() < limit:
                try:
                    second = infer("grpc", addresses["grpc"], "points", inputs, list(expected), "2")
                except BuildError:
                    time.sleep(0.2)
            time.sleep(1)
        finally:
            stop.set()
            for client in clients:
                client.join()
        assert second is not None
        assert infer("http", addresses["http"], "points", inputs, list(expected), "1")  # still there to go back to
    assert len(answers) > 10
    for answer in answers:
        assert not isinstance(answer, Exception), answer
        for name, value in expected.items():
            np.testing.assert_allclose(answer[name], value, rtol=1e-4, atol=1e-4)
