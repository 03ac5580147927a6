"""The whole model on a GPU: FLA's kernels against the torch path, in 16 bits and in float32."""

import textwrap
from pathlib import Path

import pytest
import torch
from builders import tiny_model, token_ids
from decode_models import decode_model
from native import native_like
from tolerance import assert_kernel_close

from kimi_linear.ops.fla import backend as fla_backend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
DTYPES = [torch.bfloat16, torch.float16]
LENGTHS = (3, 1, 67, 130, 2)
# the fast path may be this much further from float32 than the torch path in the same dtype
ALLOWED_EXCESS = 1.5


@pytest.fixture(autouse=True)
def _needs_fla():
    pytest.importorskip("fla.ops.kda")


@pytest.fixture
def torch_path(monkeypatch):
    """A context in which no tensor is sent to FLA."""

    def use(function):
        with monkeypatch.context() as patch:
            patch.setattr(fla_backend, "FLA_DEVICES", ())
            return function()

    return use


def gpu_model(head_dim=64, dtype=torch.bfloat16, **fields):
    linear = {
        "full_attn_layers": [4],
        "num_heads": 3,
        "head_dim": head_dim,
        "short_conv_kernel_size": 4,
    }
    # every expert is chosen: near a tie, rounding would pick another one and hide what is compared
    experts = {"num_experts": 2, "num_experts_per_token": 2}
    sizes = {"hidden_size": 64, "initializer_range": 0.1}
    return tiny_model(**sizes, **experts, linear_attn_config=linear, **fields).to(dtype).cuda()


def rms(x):
    return x.double().square().mean().sqrt().item()


def assert_as_close_as_torch(fast, slow, exact):
    """`fast` and `slow` in 16 bits, `exact` in float32."""
    error, allowed = rms(fast - exact), ALLOWED_EXCESS * rms(slow - exact)
    assert fast.isfinite().all() and error <= allowed, f"{error} > {allowed}, size {rms(exact)}"


def compare(model, run, torch_path):
    """Run with FLA and with torch in the model's dtype, and with torch in float32."""
    fast, slow = run(model), torch_path(lambda: run(model))
    exact = torch_path(lambda: run(model.float()))
    assert_as_close_as_torch(fast, slow, exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("length", [1, 15, 65, 500])
@torch.no_grad()
def test_logits(dtype, head_dim, length, torch_path):
    ids = token_ids(2, length).cuda()
    compare(gpu_model(head_dim, dtype), lambda model: model(ids).logits, torch_path)


@torch.no_grad()
def test_packed(torch_path):
    ids = token_ids(1, sum(LENGTHS)).cuda()
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None].cuda()
    model = gpu_model()
    compare(model, lambda m: m(ids, position_ids=positions).logits, torch_path)
    model = gpu_model()
    packed = model(ids, position_ids=positions).logits
    alone = torch.cat([model(part).logits for part in ids.split(LENGTHS, dim=1)], dim=1)
    assert_kernel_close(packed, alone, torch.bfloat16)


@torch.no_grad()
def test_padding_then_continuing():
    model = gpu_model()
    real, more = token_ids(90, seed=2).cuda(), token_ids(5, seed=3).cuda()
    expected = model(torch.cat([real, more])[None]).logits[0]
    columns = torch.cat([torch.arange(4, 40), torch.arange(43, 97)]).cuda()
    ids = torch.full((1, 100), 96, device="cuda")
    mask = torch.zeros(1, 100, dtype=torch.long, device="cuda")
    ids[0, columns], mask[0, columns] = real, 1
    out = model(ids, attention_mask=mask, use_cache=True)
    assert_kernel_close(out.logits[0, columns], expected[:90], torch.bfloat16)
    for t in range(5):
        mask = torch.cat([mask, mask.new_ones(1, 1)], dim=1)
        step = model(more[t].view(1, 1), attention_mask=mask, cache=out.cache).logits
        assert_kernel_close(step[0, 0], expected[90 + t], torch.bfloat16)


@torch.no_grad()
@pytest.mark.parametrize("splits", [(120, 1, 1, 1), (64, 59), (1, 122), (50, 23, 50)])
def test_one_call_equals_chunks(splits):
    model = gpu_model()
    ids = token_ids(2, 123).cuda()
    expected, cache, parts = model(ids).logits, None, []
    for part in ids.split(splits, dim=1):
        out = model(part, cache=cache, use_cache=True)
        cache = out.cache
        parts.append(out.logits)
    assert_kernel_close(torch.cat(parts, dim=1), expected, torch.bfloat16)


@pytest.mark.parametrize("mode", ["bfloat16", "autocast"])
def test_gradients(mode, torch_path):
    ids = token_ids(2, 200).cuda()

    def gradients(model):
        model.zero_grad()
        autocast = mode == "autocast" and model is not exact_model
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            model.train()(ids, labels=ids).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    model = gpu_model(dtype=torch.float32 if mode == "autocast" else torch.bfloat16)
    exact_model = gpu_model(dtype=torch.bfloat16 if mode == "bfloat16" else torch.float32).float()
    fast, slow = gradients(model), torch_path(lambda: gradients(model))
    exact = torch_path(lambda: gradients(exact_model))
    total = {
        name: sum(rms(g[key] - exact[key]) ** 2 for key in exact)
        for name, g in (("fast", fast), ("slow", slow))
    }
    assert total["fast"] <= ALLOWED_EXCESS**2 * total["slow"]
    for name, grad in fast.items():
        assert grad.isfinite().all(), name


def test_generation_is_the_torch_paths(torch_path):
    model = gpu_model(dtype=torch.float32)
    ids = token_ids(2, 70).cuda()
    kwargs = dict(max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=96)
    fast = model.generate(ids, **kwargs)
    assert fast.tolist() == torch_path(lambda: model.generate(ids, **kwargs)).tolist()


def test_saved_on_the_gpu_and_loaded_again(tmp_path):
    model = gpu_model()
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype="auto", device_map="cuda")
    ids = token_ids(1, 30).cuda()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    assert again.model.layers[0].self_attn.A_log.dtype == torch.float32


def test_a_trained_model_says_the_same_by_every_path(torch_path):
    """A text learned by heart, in bfloat16: decoded as one graph, layer by layer, without FLA, and
    by Transformers' own model with the same weights."""
    text = Path(textwrap.__file__).read_bytes()[:600]
    text = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()[None].cuda()
    sizes = {"hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 64}
    model = decode_model("cuda", vocab_size=256, **sizes).float().train()
    optimizer, steps = torch.optim.AdamW(model.parameters()), 150
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-2 * min(1, (step + 1) / 20) * (1 - step / steps)
        loss = model(text, labels=text).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert loss < 0.02
    model = model.to(torch.bfloat16).eval()

    def says(model):
        options = {"max_new_tokens": 400, "do_sample": False, "eos_token_id": None}
        return model.generate(text[:, :32], **options)

    assert says(native_like(model).to(torch.bfloat16).cuda()).equal(text[:, :432])
    for backend in ("graph", "eager"):
        model.decode_backend = backend
        assert says(model).equal(text[:, :432]), backend
    assert torch_path(lambda: says(model)).equal(text[:, :432])
