"""Rules against values that no sane config holds."""

from __future__ import annotations

from typing import Any

import pytest

from porter.core.pitfalls import RULES
from porter.core.risks import risks_of


@pytest.mark.parametrize("value", [
    None, True, 0, -1, float("inf"), float("nan"), "", [], [[]], [{}], {}, {"type": []}, {"rope_type": {}}, [None, "x"],
    10**400,
])  # fmt: skip
def test_no_value_breaks_a_rule(value: Any) -> None:
    config = {key: value for rule in RULES for key in rule.keys} | {"text_config": value}
    for name in (None, "FluxTransformer2DModel", "AutoencoderKL", "CLIPTextModel", "Qwen3ForCausalLM"):
        for more in ({}, {"model_type": value}, {"num_attention_heads": value, "use_dynamic_shifting": value}):
            assert isinstance(risks_of("text_encoder", name, {**config, **more}, None), list)
