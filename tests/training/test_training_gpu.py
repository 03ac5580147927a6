"""Training on a GPU: loss and experts, beside float64 and beside what autograd does by itself."""

import pytest
import torch
import torch.nn.functional as F
from builders import tiny_config
from tolerance import TOLERANCE, assert_close
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from kimi_linear.inputs.layout import SequenceLayout, sequence_layout
from kimi_linear.layers.delta_attention import KimiLinearDeltaAttention
from kimi_linear.layers.mlp import KimiLinearMLP
from kimi_linear.layers.moe import KimiLinearExperts
from kimi_linear.ops import cross_entropy as loss_kimi_linear
from kimi_linear.ops import joint_products
from kimi_linear.ops.cross_entropy import linear_cross_entropy
from kimi_linear.ops.experts.training import train_experts, trains_lean

pytestmark = pytest.mark.gpu
MODES = ["bfloat16", "autocast", "float32"]


def check(names, ours, theirs, exact):
    """Of our dtypes, and not further off than 1.5 times what theirs are."""
    for name, mine, other, wanted in zip(names, ours, theirs, exact, strict=True):
        assert mine.dtype == other.dtype and mine.isfinite().all(), name
        error, allowed = ((each.double() - wanted).norm() for each in (mine, other))
        assert error <= 1.5 * allowed + TOLERANCE[torch.float32] * wanted.norm(), name


def draw_head(num_tokens, hidden_size, vocab_size, dtype):
    torch.manual_seed(0)
    x = torch.randn(num_tokens, hidden_size, device="cuda").to(dtype).requires_grad_()
    weight = torch.randn(vocab_size, hidden_size, device="cuda") * hidden_size**-0.5
    labels = torch.randint(0, vocab_size, (num_tokens,), device="cuda")
    labels[1::7] = -100
    return x, weight.to(dtype).requires_grad_(), labels


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("num_tokens", [1, 512, 1300])
def test_loss(monkeypatch, num_tokens, mode):
    monkeypatch.setattr(loss_kimi_linear, "CHUNK_ELEMENTS", 512 * 5003)
    dtype = torch.bfloat16 if mode == "bfloat16" else torch.float32
    x, weight, labels = draw_head(num_tokens, 136, 5003, dtype)

    def run(loss_of, x, weight):
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=mode == "autocast"):
            loss = loss_of(x, weight)
        return loss, *torch.autograd.grad(2 * loss, (x, weight))

    def wide(x, weight):
        logits = F.linear(x, weight)
        return F.cross_entropy(logits.to(torch.promote_types(x.dtype, torch.float32)), labels)

    ours = run(lambda x, weight: linear_cross_entropy(x, weight, labels), x, weight)
    theirs = run(wide, x, weight)
    exact_inputs = (each.detach().double().requires_grad_() for each in (x, weight))
    if mode == "autocast":
        x64, weight64 = exact_inputs
        loss = wide(x64, weight64)
        exact = loss, *torch.autograd.grad(2 * loss, (x64, weight64))
    else:
        exact = run(wide, *exact_inputs)
    check(("loss", "x", "weight"), ours, theirs, exact)


def test_memory_of_the_loss():
    """Of 8,192 tokens and a vocabulary of 65,536: the head's gradient and a chunk, not 2 GB a copy
    of the logits."""
    x, weight, labels = draw_head(8192, 256, 65536, torch.bfloat16)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    linear_cross_entropy(x, weight, labels).backward()
    taken = torch.cuda.max_memory_allocated() - before
    assert taken <= 6 * loss_kimi_linear.CHUNK_ELEMENTS + 12 * weight.numel() + 16 * x.numel()


@pytest.mark.parametrize("mode", MODES[:2])
def test_experts(mode):
    torch.manual_seed(0)
    experts = KimiLinearExperts(tiny_config(hidden_size=136, moe_intermediate_size=72))
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    dtype = torch.bfloat16 if mode == "bfloat16" else torch.float32
    experts = experts.to("cuda", dtype)
    x = torch.randn(300, 136, device="cuda").to(dtype).requires_grad_()
    index = torch.rand(300, 6, device="cuda").topk(2).indices
    index[index == 3] = 4  # an expert without tokens
    weights = torch.rand(300, 2, device="cuda", requires_grad=True)
    seed = torch.randn(300, 136, device="cuda")

    def run(function, experts, x, weights):
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=mode == "autocast"):
            out = function(experts, x, index, weights)
        inputs = x, weights, experts.gate_up_proj, experts.down_proj
        return out, *torch.autograd.grad(out, inputs, seed.to(out.dtype))

    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=mode == "autocast"):
        assert trains_lean(experts, x, weights)
    experts.config._experts_implementation = "eager"
    one_at_a_time = type(experts).forward
    ours = run(train_experts, experts, x, weights)
    theirs = run(one_at_a_time, experts, x, weights)
    if mode == "bfloat16":
        grouped = run(ALL_EXPERTS_FUNCTIONS["grouped_mm"], experts, x, weights)
        assert_close(ours[0], grouped[0], torch.bfloat16)
    wide = [each.detach().double().requires_grad_() for each in (x, weights)]
    mode = "float64"
    exact = run(one_at_a_time, experts.double(), *wide)
    check(("out", "x", "weights", "gate_up_proj", "down_proj"), ours, theirs, exact)


def draw_layer(kind):
    """A layer in training mode, how it is called, and 300 tokens of input."""
    torch.manual_seed(0)
    config, layout = tiny_config(hidden_size=136), SequenceLayout()
    layer = KimiLinearMLP(config, 72) if kind == "mlp" else KimiLinearDeltaAttention(config, 0)
    if kind == "packed":
        positions = torch.cat([torch.arange(n) for n in (1, 2, 130, 67, 100)])[None].cuda()
        device = torch.device("cuda")
        layout = sequence_layout(1, 300, position_ids=positions, device=device)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    call = layer if kind == "mlp" else lambda x: layer.attend(x, layout)[0]
    return layer.to("cuda").train(), call, torch.randn(1, 300, 136, device="cuda")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["mlp", "rows", "packed"])
def test_joint_products(monkeypatch, kind, mode):
    """A layer's output and gradients, with its products at once and one by one."""
    layer, call, x = draw_layer(kind)
    names, wide = [name for name, _ in layer.named_parameters()], x.double().requires_grad_()
    if mode == "bfloat16":
        layer, x = layer.to(torch.bfloat16), x.to(torch.bfloat16)
        wide = x.double().requires_grad_()
    x.requires_grad_()
    seed = torch.randn(1, 300, 136, device="cuda")

    def run(x):
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=mode == "autocast"):
            out = call(x)
        return out, *torch.autograd.grad(out, [x, *layer.parameters()], seed.to(out.dtype))

    ours = run(x)
    with monkeypatch.context() as patch:
        patch.setattr(joint_products, "DEVICES", ())
        theirs = run(x)
    assert not all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))
    mode, layer = "float64", layer.double()
    for parameter in layer.parameters():  # the decay's stay in float32 otherwise
        parameter.data = parameter.data.double()
    check(("out", "x", *names), ours, theirs, run(wide))


@pytest.mark.parametrize("kind", ["mlp", "rows", "packed"])
def test_without_a_graph_in_training_the_bits_are_the_same(kind):
    """As in the first pass of reentrant checkpointing."""
    layer, call, x = draw_layer(kind)
    layer, x = layer.to(torch.bfloat16), x.to(torch.bfloat16)
    with torch.no_grad():
        first = call(x)
    second = call(x)
    assert second.requires_grad and torch.equal(first, second)
