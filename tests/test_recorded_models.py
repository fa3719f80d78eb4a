"""mm-convert's tests use names and shapes of transformers; here the installed transformers is asked for them."""

import json

import pytest

from house.tiny_models import MODELS, RECORDED, record


@pytest.mark.parametrize("model", MODELS)
def test_the_installed_transformers_has_the_recorded_names_and_shapes(model: str) -> None:
    recorded = json.loads((RECORDED / f"{model}.json").read_text(encoding="utf-8"))
    made = record(model)
    assert made["saved"] == recorded["saved"]
    assert made["in_memory"] == recorded["in_memory"]
    assert made["config"]["model_type"] == recorded["config"]["model_type"]
