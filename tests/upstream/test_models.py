"""`upstream/models.py`: loading and saving go by the attributes that are set here."""

import pytest
import torch
from builders import tiny_model
from safetensors import safe_open
from torch import nn
from touchpoints import CHANGED

from kimi_linear.upstream.interfaces import init
from kimi_linear.upstream.models import mark_initialized, save_by_registered_names

pytestmark = pytest.mark.core


def test_parameters_that_are_filled_stay():
    """`init` and `_is_hf_initialized` keep what a checkpoint has filled."""
    parameter = nn.Parameter(torch.ones(3))
    mark_initialized(parameter)
    init.zeros_(parameter)
    assert parameter.eq(1).all(), f"transformers.initialization fills what is marked: {CHANGED}"
    plain = nn.Parameter(torch.ones(3))
    init.zeros_(plain)
    assert plain.eq(0).all(), CHANGED


def test_saving_goes_by_the_registered_conversion(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert hasattr(loaded, "_weight_conversions"), (
        f"PreTrainedModel._weight_conversions is gone: {CHANGED}"
    )
    loaded._weight_conversions = []  # as of a file with other names
    save_by_registered_names(loaded)
    loaded.save_pretrained(tmp_path / "again")
    with safe_open(tmp_path / "again" / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert any(name.endswith(".experts.0.w1.weight") for name in names), f"{names}: {CHANGED}"
