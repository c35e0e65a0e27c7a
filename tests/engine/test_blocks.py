"""What of the decoder blocks is pruned, and what is said of the rest."""

import pytest
from loguru import logger
from peft import LoraConfig, get_peft_model

from efx_plugin.engine.blocks import warn_of_unprunable
from tests.support.tiny_models import tiny_model


@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "with an adapter"])
@pytest.mark.parametrize(
    ("architecture", "apart", "said"), [("Llama", True, 0), ("Mixtral", True, 0), ("Mixtral", False, 1)]
)
def test_experts_that_are_one_tensor_are_said_to_stay(monkeypatch, architecture, apart, said, adapted):
    model, warned = tiny_model(architecture, linearize=apart), []
    monkeypatch.setattr(logger, "warning", warned.append)
    warn_of_unprunable(get_peft_model(model, LoraConfig(target_modules=["q_proj"])) if adapted else model)
    assert len(warned) == said
    assert all("stay as they are, such as model.layers.0.mlp.experts" in line for line in warned)
