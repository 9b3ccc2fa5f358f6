"""The Kubernetes manifests of the page have what KServe's InferenceService needs.

That they have nothing else is tested with KServe's own schema, in test_image_server.py.
"""

import pytest
import yaml
from helpers.documents import code_blocks
from helpers.paths import ROOT

MANIFESTS = [yaml.safe_load(t) for language, t in code_blocks(ROOT / "docs" / "serving.md") if language == "yaml"]
TRITON, IMAGE = (manifest["spec"]["predictor"] for manifest in MANIFESTS)


@pytest.mark.parametrize("manifest", MANIFESTS)
def test_it_is_an_inference_service_that_scales(manifest):
    assert (manifest["apiVersion"], manifest["kind"]) == ("serving.kserve.io/v1beta1", "InferenceService")
    assert manifest["metadata"]["name"]
    predictor = manifest["spec"]["predictor"]
    assert 0 < predictor["minReplicas"] <= predictor["maxReplicas"]
    assert predictor["scaleMetric"] in ("concurrency", "rps", "cpu", "memory")


def test_triton_gets_a_repository():
    model = TRITON["model"]
    assert (model["modelFormat"]["name"], model["protocolVersion"]) == ("triton", "v2")
    assert model["storageUri"].startswith(("pvc://", "s3://", "gs://", "https://"))
    assert set(model["resources"]) <= {"requests", "limits"}


def test_an_image_gets_the_port_and_the_probes_of_its_server():
    (container,) = IMAGE["containers"]
    assert container["name"] == "kserve-container"  # which KServe takes for the server
    assert container["ports"] == [{"containerPort": 8080, "protocol": "TCP"}]
    probes = [container[probe]["httpGet"] for probe in ("readinessProbe", "livenessProbe")]
    assert probes == [{"path": f"/v2/health/{state}", "port": 8080} for state in ("ready", "live")]
