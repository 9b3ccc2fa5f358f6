"""The Kubernetes manifest of the page has what KServe's InferenceService needs."""

import yaml
from helpers.documents import code_blocks
from helpers.paths import ROOT

(MANIFEST,) = (yaml.safe_load(t) for language, t in code_blocks(ROOT / "docs" / "serving.md") if language == "yaml")


def test_it_is_an_inference_service_that_scales_triton():
    assert (MANIFEST["apiVersion"], MANIFEST["kind"]) == ("serving.kserve.io/v1beta1", "InferenceService")
    assert MANIFEST["metadata"]["name"]
    predictor = MANIFEST["spec"]["predictor"]
    assert 0 < predictor["minReplicas"] <= predictor["maxReplicas"]
    assert predictor["scaleMetric"] in ("concurrency", "rps", "cpu", "memory")
    model = predictor["model"]
    assert (model["modelFormat"]["name"], model["protocolVersion"]) == ("triton", "v2")
    assert model["storageUri"].startswith(("pvc://", "s3://", "gs://", "https://"))
    assert set(model["resources"]) <= {"requests", "limits"}
