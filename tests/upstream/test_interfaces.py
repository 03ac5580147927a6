"""`upstream/interfaces.py`: the names that are used as they are do what is relied on."""

import pytest
import torch
from builders import tiny_config, tiny_model, token_ids
from touchpoints import CHANGED

from kimi_linear.upstream import interfaces

pytestmark = pytest.mark.core


def test_experts_interface():
    functions = interfaces.ALL_EXPERTS_FUNCTIONS
    for name in ("grouped_mm", "batched_mm"):
        assert name in functions, f"there is no experts implementation {name!r}: {CHANGED}"
    interface = interfaces.ExpertsInterface()
    interface["grouped_mm"] = test_experts_interface
    assert interface["grouped_mm"] is test_experts_interface, CHANGED
    assert functions["grouped_mm"] is not test_experts_interface, CHANGED


def test_attention_interface_and_its_name_in_a_configuration():
    model = tiny_model()
    assert interfaces.attention_backend(model.config) == "sdpa", CHANGED
    found = interfaces.ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", None)
    assert callable(found), f"AttentionInterface.get_interface(): {CHANGED}"
    assert interfaces.attention_backend(tiny_config()) == "", CHANGED


def test_parallel_styles():
    styles = interfaces.ALL_PARALLEL_STYLES
    needed = {"embedding_rowwise", "packed_colwise", "colwise_gather_output", "grouped_gemm"}
    needed |= {"ep_router", "moe_tp_experts"} if "ep_router" in styles else {"ep_dispatch_experts"}
    missing = {name for name in needed if name not in styles}
    assert not missing, f"there are no parallel styles {missing}: {CHANGED}"
    model = tiny_model()
    for plan in (model._tp_plan, model._ep_plan):
        unknown = {style for style in plan.values() if style not in styles}
        assert plan and not unknown, f"plans have unknown styles {unknown}: {CHANGED}"


def test_checkpointing_layers_leave_the_cache_alone():
    """A cached call without gradients in training mode: the layer must not take its cache away."""
    model = tiny_model().train()
    model.gradient_checkpointing_enable()
    ids = token_ids(1, 6)
    with torch.no_grad():
        cache = model(ids[:, :5], use_cache=True).cache
        rest = model(ids[:, 5:], cache=cache).logits
        whole = model(ids, use_cache=False).logits[:, 5:]
    torch.testing.assert_close(rest, whole, atol=1e-5, rtol=1e-5, msg=lambda m: f"{m} {CHANGED}")
