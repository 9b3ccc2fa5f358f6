"""KServe's server answers from the folder of an image as the model does, without a container."""

import copy
import json
import re
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import yaml
from helpers.documents import code_blocks
from helpers.kserve import server_environment
from helpers.paths import ROOT

import asapc
from asapc.errors import BuildError
from asapc.serving.image import package_image
from asapc.serving.image_smoke import running_image, smoke_image
from asapc.serving.smoke import infer

pytestmark = pytest.mark.slow  # the server's environment alone takes two minutes

# Prints what of manifests does not keep to the classes that KServe and Kubernetes generate from their schemas: names
# that these do not know, values of another type, and fields that are missing.
UNKNOWN = """
import json, re, sys
import kserve.models, kubernetes.client

TYPES = {"str": str, "int": int, "bool": bool, "float": (int, float)}

found = []

def walk(value, kind, path):
    inner = re.fullmatch(r"(?:list|dict)[(\\[](?:str, ?)?(.+)[)\\]]", kind, re.IGNORECASE)
    known = getattr(kserve.models, kind, None) or getattr(kubernetes.client, kind, None) if not inner else None
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if kind in TYPES and (not isinstance(value, TYPES[kind]) or isinstance(value, bool) != (kind == "bool")):
        found[-1].append(f"{path} is no {kind}")
        return
    names = {json_name: name for name, json_name in known.attribute_map.items()} if known else {}
    for key, entry in entries:
        if inner:
            walk(entry, inner[1], f"{path}.{key}")
        elif key in names:
            walk(entry, known.openapi_types[names[key]], f"{path}.{key}")
        elif kind != "object":
            found[-1].append(f"{path}.{key}")
    if known:
        try:
            known(**{names[key]: entry for key, entry in entries if key in names})
        except ValueError as error:
            found[-1].append(f"{path}: {error}")

for manifest in json.load(sys.stdin):
    found.append([])
    walk(manifest, "V1beta1InferenceService", "")
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def image(folder, tmp_path_factory):
    target = tmp_path_factory.mktemp("with spaces") / "out"
    package_image(folder, target, "points")
    settings = target / "settings.toml"
    # As a user edits it: small limits, so that little reaches them.
    text = settings.read_text().replace("body_bytes = 16777216", "body_bytes = 100000")
    settings.write_text(text.replace("waiting_requests = 256", "waiting_requests = 40"))
    return target


@pytest.fixture(scope="module")
def served(image):
    with running_image(image, "points", server_environment()) as (addresses, process):
        yield addresses
        assert process.poll() is None  # nothing that the tests sent has ended it


@pytest.fixture(scope="module")
def model(folder):
    return asapc.load(folder, device="cpu")


def points(batch: int, length: int) -> np.ndarray:
    return np.random.default_rng(batch).standard_normal((batch, length, 3)).astype(np.float32)


def names(model) -> list[str]:
    return [info.name for info in model.outputs]


def fetch(address: str, path: str, data: bytes | None = None, **headers: str) -> tuple[int, str]:
    request = urllib.request.Request(f"http://{address}{path}", data, headers)
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_the_smoke_test_passes(folder, image):
    assert "HTTP and gRPC" in smoke_image(folder, image, "points", server_environment())


def test_it_says_that_it_is_ready_what_it_serves_and_what_it_did(served, model):
    infer("http", served["http"], "points", {"points": points(1, 24)}, names(model))
    assert fetch(served["http"], "/v2/health/live")[0] == 200
    assert json.loads(fetch(served["http"], "/v2/models/points/ready")[1])["ready"] is True
    of_model = json.loads(fetch(served["http"], "/v2/models/points")[1])
    assert of_model["inputs"] == [{"name": "points", "datatype": "FP32", "shape": [-1, -1, 3]}]
    status, metrics = fetch(served["http"], "/metrics")
    assert status == 200
    assert 'request_predict_seconds_count{model_name="points"}' in metrics


@pytest.mark.parametrize(("batch", "length"), [(1, 24), (7, 24), (3, 8), (16, 48)])
@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_both_protocols_answer_as_the_model_does(served, model, protocol, batch, length):
    inputs = {"points": points(batch, length)}
    outputs = infer(protocol, served[protocol], "points", inputs, names(model))
    for name, value in model(inputs).items():
        np.testing.assert_allclose(outputs[name], value, rtol=1e-4, atol=1e-4)


def test_json_is_answered_by_json(served, model):
    array = points(2, 8)
    tensor = {"name": "points", "shape": array.shape, "datatype": "FP32", "data": array.ravel().tolist()}
    body = json.dumps({"inputs": [tensor]}).encode()
    status, text = fetch(served["http"], "/v2/models/points/infer", body, **{"Content-Type": "application/json"})
    assert status == 200, text
    for output in json.loads(text)["outputs"]:
        value = model(array)[output["name"]]
        np.testing.assert_allclose(np.reshape(output["data"], output["shape"]), value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_wrong_requests_get_an_error_and_the_server_stays_up(served, model, protocol):
    ask = (protocol, served[protocol])
    wrong = (points(1, 49), points(1, 7), points(17, 24), points(1, 24)[..., :2], np.ones((1, 24, 3), np.int64))
    for array in wrong:
        with pytest.raises(BuildError, match=r"points is .*the model takes"):
            infer(*ask, "points", {"points": array}, names(model))
    with pytest.raises(BuildError, match="no input other"):
        infer(*ask, "points", {"other": points(1, 24)}, names(model))
    with pytest.raises(BuildError, match="does not exist"):
        infer(*ask, "another", {"points": points(1, 24)}, names(model))
    with pytest.raises(BuildError, match=r"413|RESOURCE_EXHAUSTED"):
        infer(*ask, "points", {"points": points(9000, 3)}, names(model))
    assert infer(*ask, "points", {"points": points(1, 24)}, names(model))


def test_malformed_bodies_get_an_error_and_the_model_is_not_unloaded(served):
    short = b'{"inputs": [{"name": "points", "shape": [1, 9, 3], "datatype": "FP32", "data": [1]}]}'
    for body in (b"", b"{", b"[]", short):
        status, text = fetch(served["http"], "/v2/models/points/infer", body, **{"Content-Type": "application/json"})
        assert 400 <= status < 500, text
    assert fetch(served["http"], "/v2/repository/models/points/unload", b"")[0] == 400
    assert fetch(served["http"], "/v2/models/points/ready")[0] == 200


def test_many_at_once_are_answered_or_told_that_too_many_wait(served, model):
    requests = [{"points": points(1 + i % 3, (8, 24)[i % 2])} for i in range(240)]
    answers = [None] * len(requests)

    def send(start: int) -> None:
        for i in range(start, len(requests), 60):
            try:
                answers[i] = infer("grpc", served["grpc"], "points", requests[i], names(model))
            except BuildError as error:
                answers[i] = error

    clients = [threading.Thread(target=send, args=(start,)) for start in range(60)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    refused = [answer for answer in answers if isinstance(answer, BuildError)]
    assert all("RESOURCE_EXHAUSTED" in str(error) for error in refused), refused
    assert len(refused) < len(answers) / 2
    for inputs, answer in zip(requests, answers, strict=True):
        if not isinstance(answer, BuildError):
            for name, value in model(inputs).items():
                np.testing.assert_allclose(answer[name], value, rtol=1e-4, atol=1e-4)


def test_sigterm_ends_it_when_what_it_took_is_answered(folder, model, tmp_path):
    package_image(folder, tmp_path / "out", "points")
    settings = tmp_path / "out" / "settings.toml"
    settings.write_text(
        settings.read_text().replace("delay_ms = 0.1", "delay_ms = 2000")
    )  # so long they are on the way
    inputs = {"points": points(2, 24)}  # on the way for so long
    with (
        running_image(tmp_path / "out", "points", server_environment()) as (addresses, process),
        ThreadPoolExecutor() as pool,
    ):
        answers = [pool.submit(infer, *address, "points", inputs, names(model)) for address in addresses.items()]
        time.sleep(0.7)
        process.send_signal(signal.SIGTERM)
        for answer in answers:
            for name, value in model(inputs).items():
                np.testing.assert_allclose(answer.result()[name], value, rtol=1e-4, atol=1e-4)
        assert process.wait(15) == 0


def test_settings_that_name_no_option_end_it_with_a_word_on_them(folder, tmp_path):
    package_image(folder, tmp_path / "out", "points")
    settings = tmp_path / "out" / "settings.toml"
    settings.write_text(settings.read_text().replace("http_port = 8080", 'http_port = "many"'))
    serving = running_image(tmp_path / "out", "points", server_environment())
    with pytest.raises(BuildError, match="invalid int value"), serving:
        pass


def test_files_that_vanish_do_not_reach_a_server_that_runs_and_damaged_ones_start_none(folder, model, tmp_path):
    package_image(folder, tmp_path / "out", "points")
    file, inputs = tmp_path / "out" / "model.asap" / "model.onnx", {"points": points(2, 24)}
    content = file.read_bytes()
    with running_image(tmp_path / "out", "points", server_environment()) as (addresses, _):
        file.unlink()
        answer = infer("http", addresses["http"], "points", inputs, names(model))
        for name, value in model(inputs).items():
            np.testing.assert_allclose(answer[name], value, rtol=1e-4, atol=1e-4)
    for damage, reason in ((None, "it is missing"), (content[:-100], "it changed since it was written")):
        if damage is not None:
            file.write_bytes(damage)
        serving = running_image(tmp_path / "out", "points", server_environment())
        with pytest.raises(BuildError, match=reason), serving:
            pass


@pytest.mark.parametrize("given", [("x", "mask"), ("x",)])
def test_masks_are_served_where_the_model_was_compiled_with_them(given, masked, tmp_path):
    package_image(masked(given), tmp_path / "out", "masked")
    assert "HTTP and gRPC" in smoke_image(masked(given), tmp_path / "out", "masked", server_environment())


def test_the_manifests_of_the_page_keep_to_kserves_own_schema():
    blocks = code_blocks(ROOT / "docs" / "serving.md")
    triton, image = (yaml.safe_load(text) for language, text in blocks if language == "yaml")
    wrong = [copy.deepcopy(triton), copy.deepcopy(triton), copy.deepcopy(image)]
    wrong[0]["spec"]["predictor"].update(replicas=1)
    wrong[1]["spec"]["predictor"].update(minReplicas="one")
    del wrong[1]["spec"]["predictor"]["model"]["modelFormat"]
    del wrong[2]["spec"]["predictor"]["containers"][0]["name"]
    command = [server_environment() / "bin" / "python", "-c", UNKNOWN]
    content = json.dumps([triton, image, *wrong])
    found = json.loads(subprocess.run(command, input=content, capture_output=True, text=True, check=True).stdout)
    format_lacks = ".spec.predictor.model: Invalid value for `model_format`, must not be `None`"
    assert found[:3] == [[], [], [".spec.predictor.replicas"]]
    assert found[3] == [".spec.predictor.minReplicas is no int", format_lacks]
    (name_lacks,) = found[4]
    assert re.match(r"\.spec\.predictor\.containers\.0: .*V1Container\s+name\s+Field required", name_lacks)
