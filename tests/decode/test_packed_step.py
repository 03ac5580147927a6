"""The decode step of packed models against the layers, which see the weights in full."""

import gc
import types
import weakref

import pytest
import torch
from builders import TWO_LAYERS, token_ids
from decode_models import (  # noqa: F401
    DEVICES,
    check,
    check_logits,
    choices,
    decode_model,
    finish,
    prepared,
    small_grids,
)
from packed_models import every_part
from torch import nn

from kimi_linear import KimiLinearCache
from kimi_linear.decode import fixed_point
from kimi_linear.decode.fixed_point import FixedProjection
from kimi_linear.decode.obstacles import Snapshot, weight_obstacle
from kimi_linear.decode.packed import PackedManyRowsStep
from kimi_linear.decode.packed_few_rows import PackedFewRowsStep
from kimi_linear.decode.recording import StepKind, decode_step
from kimi_linear.quantization.packing import pack_rest
from kimi_linear.schemes import Scheme

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.interpreted,
    pytest.mark.usefixtures("small_grids"),
    pytest.mark.parametrize("device", DEVICES),
]
WAYS = {
    "3 bits, 8 bits": every_part(Scheme(3, 32), Scheme(8, None)),
    "4 bits": every_part(Scheme(4, 32), Scheme(4, 96)),
    "4 bits, zeros": every_part(Scheme(4, 32, is_symmetric=False), Scheme(8, 32)),
    "float8": every_part(*[Scheme(8, 32, is_float=True, rows=16)] * 2),
    "8 bits, plain": every_part(Scheme(8, 32), None),
    "plain, 8 bits": every_part(None, Scheme(8, 32)),  # type: ignore[arg-type]
}


# Over float32's tolerance: few rows' inputs have 16 bits, and 11 where weights are float8.
EXCESS, FLOAT8_EXCESS = 10, 100


def packed_model(device, way, **fields):
    # groups divide all sizes; the attention's 32 inputs are less than a block
    sizes = {"hidden_size": 96, "intermediate_size": 96, "moe_intermediate_size": 32}
    model = decode_model(device, **{**sizes, **fields})
    if way.schemes["attention"] is not None and way.schemes["attention"].group == 96:
        way = every_part(way.schemes["experts"])
    pack_rest(model, way)
    return model


def compare(model, num_rows, excess=EXCESS):
    """The step for so many rows, after its logits were found to be those of the layers."""
    assert weight_obstacle(model) == ""
    step, cache = prepared(model, num_rows)
    other, ids = cache.copy(), token_ids(num_rows, 1, seed=1).to(model.device)
    model.decode_backend = "eager"
    step.ids.copy_(ids)
    step.run()
    is_few = num_rows <= PackedFewRowsStep.most_rows
    with choices(model) as margins:
        expected = model(ids, cache=other).logits
    check_logits(step.logits[:, None], expected, margins, excess=excess if is_few else 1)
    return step


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("num_rows", [1, 6])
@torch.no_grad()
def test_steps_equal_the_layers(num_rows, way, device):
    model = packed_model(device, WAYS[way], num_shared_experts=2)
    step = compare(model, num_rows, FLOAT8_EXCESS if way == "float8" else EXCESS)
    assert type(step) is (PackedFewRowsStep if num_rows == 1 else PackedManyRowsStep)


@pytest.mark.parametrize("num_rows", [1, 3, 6])
@torch.no_grad()
def test_sizes_of_several_tiles(num_rows, device):
    """Blocks and tiles that are cut short, several of each; one row reads first blocks early."""
    sizes = {"hidden_size": 328, "moe_intermediate_size": 288, "num_shared_experts": 2}
    way = every_part(Scheme(4, None), Scheme(8, None))
    compare(packed_model(device, way, **sizes), num_rows)


@pytest.mark.parametrize("num_rows", [2, 6])
@torch.no_grad()
def test_sums_in_different_numbers_of_parts(num_rows, device, monkeypatch):
    """A layer's parts of a sum stand row by row, however many another layer has."""
    monkeypatch.setattr(fixed_point, "PROGRAMS", 60)
    monkeypatch.setattr(fixed_point, "MIN_BLOCKS", 1)
    linear = {**TWO_LAYERS["linear_attn_config"], "num_heads": 4, "head_dim": 128}
    sizes = {"linear_attn_config": linear, "num_attention_heads": 8, "v_head_dim": 128}
    model = packed_model(device, WAYS["3 bits, 8 bits"], **sizes)
    step = compare(model, num_rows)
    assert sorted({output.splits for output in step.outputs}) == [2, 4]


@pytest.mark.parametrize("way", ["3 bits, 8 bits", "float8"])
@torch.no_grad()
def test_attention_writes_whole_runs_in_fixed_point(way, device):
    linear = {**TWO_LAYERS["linear_attn_config"], "head_dim": 32}
    model = packed_model(device, WAYS[way], linear_attn_config=linear)
    step = compare(model, 2, FLOAT8_EXCESS if way == "float8" else EXCESS)
    assert all(isinstance(output, FixedProjection) for output in step.outputs)


@pytest.mark.parametrize("num_rows", [1, 6])
@torch.no_grad()
def test_gated_mlps_that_are_packed_in_part(num_rows, device):
    """Checkpoints of others may leave out some matrices: both halves count all the same."""
    model = packed_model(device, WAYS["3 bits, 8 bits"])
    first, second = model.model.layers
    for linear in (first.mlp.up_proj, second.block_sparse_moe.shared_experts.gate_proj):
        linear.weight = nn.Parameter(linear.weight.dequantized(), requires_grad=False)
    compare(model, num_rows)


def test_experts_that_are_packed_in_part_are_an_obstacle(device):
    model = packed_model(device, WAYS["3 bits, 8 bits"])
    experts = model.model.layers[1].block_sparse_moe.experts
    experts.down_proj = nn.Parameter(experts.down_proj.dequantized(), requires_grad=False)
    assert weight_obstacle(model) == "model.layers.1.block_sparse_moe.experts is packed in part"


@pytest.mark.parametrize("num_rows", [3, 40])
@torch.no_grad()
def test_all_rows_on_one_expert(num_rows, device):
    """More rows than a tile of the grouped kernels has columns."""
    model = packed_model(device, WAYS["3 bits, 8 bits"])
    layer = model.model.layers[1]
    layer.block_sparse_moe.gate.e_score_correction_bias[[1, 4]] += 10
    step, _ = prepared(model, num_rows)
    hidden = step.hidden.clone().to(model.dtype)
    step.hidden.copy_(hidden)
    step._experts(1)
    out = finish(step) - hidden
    assert set(step.experts.flatten().tolist()) == {1, 4}
    check(
        out,
        layer.block_sparse_moe(layer.post_attention_layernorm(hidden)),
        excess=EXCESS if num_rows <= PackedFewRowsStep.most_rows else 1,
    )


@torch.no_grad()
def test_rows_beyond_a_tile_of_columns(device):
    model = packed_model(device, WAYS["8 bits, plain"])
    pack_rest(model, WAYS["plain, 8 bits"])
    step = decode_step(model, StepKind(70))
    hidden = torch.randn(70, 96, device=model.device, dtype=model.dtype)
    step.hidden.copy_(hidden)
    step._project(step.head, model.model.norm, step.logits)
    check(step.logits, model.lm_head(model.model.norm(hidden)))


def test_a_recording_ends_with_its_weights(device):
    model = packed_model(device, WAYS["plain, 8 bits"])
    snapshot = Snapshot(model)
    assert snapshot.is_current(model)
    head = model.lm_head
    other = [plane.clone() for plane in head.weight.planes]
    head.weight.planes = tuple(other)
    assert not snapshot.is_current(model)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model.lm_head, "forward", model.lm_head.forward),
        lambda model: setattr(model.lm_head, "bias", nn.Parameter(torch.zeros(1))),
        lambda model: model.lm_head.add_module("more", nn.Identity()),
        lambda model: setattr(model.config, "hidden_act", "gelu"),
        lambda model: setattr(model.lm_head, "__class__", type("Other", (nn.Linear,), {})),
        lambda model: model.model.norm.register_buffer("more", torch.zeros(1)),
        lambda model: setattr(
            model.model.embed_tokens.weight, "data", model.model.embed_tokens.weight.data.t()
        ),
    ],
    ids=["forward", "bias", "child", "activation", "class", "buffer", "stride"],
)
def test_what_a_new_cache_makes_it_notice(change, device):
    model = packed_model(device, WAYS["plain, 8 bits"])
    snapshot = Snapshot(model)
    assert snapshot.is_same(model)
    change(model)
    assert snapshot.is_current(model) and not snapshot.is_same(model)


def test_a_snapshot_does_not_keep_its_model(device):
    model = packed_model(device, WAYS["plain, 8 bits"])
    model.forward = types.MethodType(type(model).forward, model)
    snapshots, gone = weakref.WeakKeyDictionary({model: Snapshot(model)}), weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None and not snapshots


@torch.no_grad()
def test_caches_of_packed_models_take_turns_with_the_graph(device):
    model = packed_model(device, WAYS["float8"])
    cache = KimiLinearCache(model.config)
    ids = token_ids(2, 9).to(model.device)
    model(ids, cache=cache)
    model.decode_backend = "graph"
    first = model(ids[:, :1], cache=cache).logits
    model.decode_backend = "eager"
    other = KimiLinearCache(model.config)
    model(ids, cache=other)
    check(first, model(ids[:, :1], cache=other).logits, excess=FLOAT8_EXCESS)
