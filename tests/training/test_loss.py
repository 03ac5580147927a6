"""The loss of training without the logits, beside the loss from logits."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from builders import tiny_model, token_ids
from tolerance import TOLERANCE, assert_close
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.loss.loss_utils import ForCausalLMLoss

from kimi_linear.ops import cross_entropy as loss_kimi_linear
from kimi_linear.ops.cross_entropy import chunk_tokens, linear_cross_entropy
from kimi_linear.training.deferred_logits import DeferredLogits

pytestmark = [pytest.mark.core, pytest.mark.kernels]

V, D, C = 97, 40, 16
WIDE_DTYPES = [torch.float32, torch.float64]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(loss_kimi_linear, "CHUNK_ELEMENTS", V * C)
    monkeypatch.setattr(loss_kimi_linear, "MIN_CHUNK_TOKENS", 1)
    assert chunk_tokens(V) == C


def draw(num_tokens, dtype):
    generator = torch.Generator().manual_seed(num_tokens)
    x = torch.randn(num_tokens, D, generator=generator, dtype=torch.float64)
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64) / 4
    labels = torch.randint(0, V, (num_tokens,), generator=generator)
    labels[1::5] = -100
    return x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels


def from_logits(x, weight, labels, num_items=None):
    """Loss and gradients by float64 logits."""
    x, weight = (each.detach().double().requires_grad_() for each in (x, weight))
    reduction = "mean" if num_items is None else "sum"
    loss = F.cross_entropy(x @ weight.T, labels, reduction=reduction) / (num_items or 1)
    return loss, *torch.autograd.grad(loss, (x, weight))


@pytest.mark.parametrize("dtype", WIDE_DTYPES)
@pytest.mark.parametrize("num_tokens", [1, C - 1, C, C + 1, 3 * C + 5])
@pytest.mark.parametrize("num_items", [None, 7, torch.tensor(7)])
def test_loss_and_gradients(num_tokens, dtype, num_items):
    x, weight, labels = draw(num_tokens, dtype)
    expected = from_logits(x, weight, labels, None if num_items is None else 7)
    loss = linear_cross_entropy(x, weight, labels, num_items_in_batch=num_items)
    assert loss.dtype == dtype and loss.shape == ()
    (3 * loss).backward()
    for name, actual, wanted in zip(
        ("loss", "x", "weight"), (loss, x.grad / 3, weight.grad / 3), expected, strict=True
    ):
        assert_close(actual, wanted, dtype, name)


def test_only_wanted_gradients():
    x, weight, labels = draw(C + 3, torch.float32)
    expected = from_logits(x, weight, labels)
    (dx,) = torch.autograd.grad(linear_cross_entropy(x, weight.detach(), labels), x)
    assert_close(dx, expected[1], torch.float32)
    (dweight,) = torch.autograd.grad(linear_cross_entropy(x.detach(), weight, labels), weight)
    assert_close(dweight, expected[2], torch.float32)
    assert not linear_cross_entropy(x.detach(), weight.detach(), labels).requires_grad


@pytest.mark.parametrize("autocast", [False, True])
def test_16_bits_are_not_further_off_than_by_logits(autocast):
    x, weight, labels = draw(5 * C, torch.bfloat16)
    if autocast:
        x, weight = (each.detach().float().requires_grad_() for each in (x, weight))
    exact = from_logits(x, weight, labels)

    def run(loss_of):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = loss_of()
        return loss, *torch.autograd.grad(loss, (x, weight))

    fused = run(lambda: linear_cross_entropy(x, weight, labels))
    wide = run(lambda: F.cross_entropy(F.linear(x, weight).float(), labels))
    for name, ours, theirs, wanted in zip(("loss", "x", "weight"), fused, wide, exact, strict=True):
        assert ours.dtype == theirs.dtype
        error, allowed = ((each.double() - wanted).norm() for each in (ours, theirs))
        assert error <= 1.5 * allowed + TOLERANCE[torch.float32] * wanted.norm(), name


def test_no_label_counts():
    x, weight, labels = draw(C + 1, torch.float32)
    labels[:] = -100
    assert linear_cross_entropy(x, weight, labels).isnan()  # as F.cross_entropy
    loss = linear_cross_entropy(x, weight, labels, num_items_in_batch=5)
    loss.backward()
    assert loss == 0 and not x.grad.any() and not weight.grad.any()


def test_second_backward_is_refused():
    x, weight, labels = draw(5, torch.float32)
    loss = linear_cross_entropy(x, weight, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="loss_backend='fused' is not possible.*'logits'"):
        loss.backward()


# -------------------------------------------------------------------------------------- the model
def run(model, backend, ids, *, labels=None, **kwargs):
    """Output, and gradients by name."""
    model.loss_backend = backend
    model.zero_grad()
    out = model(ids, labels=ids if labels is None else labels, **kwargs)
    out.loss.backward()
    return out, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def padded(ids):
    mask = torch.ones_like(ids)
    mask[0, :4] = mask[1, 20:] = 0
    return {"attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


INPUTS = {
    "plain": lambda ids: {},
    "padded": padded,
    "packed": lambda ids: {"position_ids": torch.arange(ids.shape[1]).expand(2, -1) % 11},
    "boundaries": lambda ids: {"cu_seq_lens_q": torch.tensor([0, 9, 30, ids.numel()])},
    "count": lambda ids: {"num_items_in_batch": torch.tensor(13)},
    "shifted": lambda ids: {"shift_labels": ids.flip(1)},
    "ignored": lambda ids: {"labels": ids.masked_fill(ids < 50, 3), "ignore_index": 3},
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("inputs", INPUTS)
def test_model_gets_the_gradients_of_its_logits(inputs, tied):
    model, ids = tiny_model(tie_word_embeddings=tied).train(), token_ids(2, 30)
    kwargs = INPUTS[inputs](ids)
    expected, expected_grads = run(model, "logits", ids, **kwargs)
    actual, grads = run(model, "auto", ids, **kwargs)
    assert type(actual.logits) is DeferredLogits and type(expected.logits) is torch.Tensor
    assert_close(actual.loss, expected.loss, torch.float32)
    assert grads.keys() == expected_grads.keys()
    for name, grad in expected_grads.items():
        assert_close(grads[name], grad, torch.float32, name)


class LargestTensor(TorchDispatchMode):
    """Notes the largest tensor that any operator returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, tuple | list) else [out]:
            if isinstance(each, torch.Tensor):
                self.numel = max(self.numel, each.numel())
        return out


def test_memory_does_not_grow_with_tokens_times_vocabulary(monkeypatch):
    vocab_size, ids = 5003, token_ids(2, 64)
    monkeypatch.setattr(loss_kimi_linear, "CHUNK_ELEMENTS", vocab_size * C)
    model = tiny_model(vocab_size=vocab_size).train()
    largest = {}
    for backend in ("logits", "fused"):
        with LargestTensor() as seen:
            run(model, backend, ids)
        largest[backend] = seen.numel
    assert largest["logits"] == ids.numel() * vocab_size
    assert largest["fused"] == model.lm_head.weight.numel()  # its gradient; a chunk is smaller


class Adapter(nn.Module):
    """Stands for a layer that PEFT puts in place of another."""

    def __init__(self, base):
        super().__init__()
        self.base, self.weight = base, base.weight

    def forward(self, x):
        return self.base(x)


def with_a_hook(model):
    model.lm_head.register_forward_hook(lambda *args: None)


def with_an_adapter(model):
    model.lm_head = Adapter(model.lm_head)


def with_a_bias(model):
    model.lm_head = nn.Linear(D, V)


def with_a_function(model):
    model.loss_function = functools.partial(ForCausalLMLoss)


def in_another_dtype(model):
    model.lm_head.to(torch.bfloat16)
    model.lm_head.register_forward_pre_hook(lambda module, args: (args[0].bfloat16(),))


@pytest.mark.parametrize(
    "change", [with_a_hook, with_an_adapter, with_a_bias, with_a_function, in_another_dtype]
)
def test_logits_where_they_are_needed(change):
    model, ids = tiny_model().train(), token_ids(2, 9)
    change(model)
    out, _ = run(model, "auto", ids)
    assert isinstance(out.logits, torch.Tensor)
    with pytest.raises(ValueError, match="loss_backend='fused' is not possible here: .*'logits'"):
        run(model, "fused", ids)


def test_logits_outside_training():
    model, ids = tiny_model(), token_ids(2, 9)
    model.loss_backend = "fused"
    assert isinstance(model(ids, labels=ids).logits, torch.Tensor)
    model.train()
    assert isinstance(model(ids).logits, torch.Tensor)
    with torch.no_grad():
        assert isinstance(model(ids, labels=ids).logits, torch.Tensor)
    model.loss_backend = "auto"
    with pytest.raises(ValueError, match="logits_to_keep=2 is not allowed"):
        model(ids, labels=ids, logits_to_keep=2)


def test_unknown_backend():
    model, ids = tiny_model().train(), token_ids(1, 3)
    model.loss_backend = "quick"
    with pytest.raises(ValueError, match="loss_backend='quick'.*'auto', 'fused', 'logits'"):
        model(ids, labels=ids)


# -------------------------------------------------------------------------------- deferred logits
def test_deferred_logits_are_the_logits():
    model, ids = tiny_model().train(), token_ids(2, 9)
    expected = run(model, "logits", ids)[0].logits
    logits = run(model, "auto", ids)[0].logits
    assert logits.shape == expected.shape and logits.dtype == expected.dtype
    assert logits.device == expected.device and not logits.is_made
    for actual, wanted in (
        (logits.tensor(), expected),
        (logits[..., :-1, :], expected[..., :-1, :]),
        (logits.argmax(-1), expected.argmax(-1)),
        (torch.cat([logits, logits]), torch.cat([expected, expected])),
        (F.log_softmax(input=logits, dim=-1), F.log_softmax(expected, dim=-1)),
        (2 * logits - 1, 2 * expected - 1),
        (logits > 0, expected > 0),
        (logits == expected, torch.ones_like(expected, dtype=torch.bool)),
        (logits.to(torch.float64), expected.double()),
        (torch.stack(list(logits)), expected),
        (logits // 0.5 + logits % 0.5, expected // 0.5 + expected % 0.5),
        (2**logits + 2 // logits, 2**expected + 2 // expected),
    ):
        torch.testing.assert_close(getattr(actual, "tensor", lambda a=actual: a)(), wanted)
    assert len(logits) == 2
    with pytest.raises(AttributeError):
        _ = logits.no_such_thing


def test_deferred_logits_can_be_written_to():
    model, ids = tiny_model().train(), token_ids(2, 9)
    logits = run(model, "auto", ids)[0].logits
    logits[..., 5] = -torch.inf
    assert logits.argmax(-1).ne(5).all() and logits[..., 5].isinf().all()


def test_deferred_logits_are_saved_as_logits(tmp_path):
    model, ids = tiny_model().train(), token_ids(2, 9)
    out = run(model, "auto", ids)[0]
    torch.save({"logits": out.logits}, tmp_path / "out.pt")
    torch.save(out, tmp_path / "outputs.pt")
    found = torch.load(tmp_path / "out.pt", weights_only=True)["logits"]
    assert torch.equal(found, out.logits.tensor())
    assert type(torch.load(tmp_path / "outputs.pt", weights_only=False).logits) is torch.Tensor
    assert torch.equal(copy.deepcopy(out.logits), found)


def test_deferred_logits_are_not_made_by_accelerate():
    from accelerate.utils import convert_outputs_to_fp32

    model, ids = tiny_model().to(torch.bfloat16).train(), token_ids(2, 9)
    out = convert_outputs_to_fp32(model.forward)(ids, labels=ids)
    assert type(out.logits) is DeferredLogits and out.logits.dtype == torch.float32
    assert not out.logits.is_made
    assert out.logits[0].dtype == torch.float32


def test_deferred_logits_under_the_autocast_of_their_forward():
    model, ids = tiny_model().train(), token_ids(2, 9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(ids, labels=ids).logits
    assert logits.dtype == logits.tensor().dtype == torch.bfloat16


def test_deferred_logits_have_a_gradient_where_it_is_recorded():
    model, ids = tiny_model().train(), token_ids(2, 9)
    out = model(ids, labels=ids)
    with torch.no_grad():
        assert not (out.logits * 1).requires_grad
    model.zero_grad()
    out = model(ids, labels=ids)
    with torch.inference_mode():
        assert out.logits.argmax(-1).shape == ids.shape
    (out.loss + out.logits.square().mean()).backward()
    model.loss_backend = "logits"
    grad, model.lm_head.weight.grad = model.lm_head.weight.grad, None
    out = model(ids, labels=ids)
    (out.loss + out.logits.square().mean()).backward()
    assert_close(grad, model.lm_head.weight.grad, torch.float32)


class Identity(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        return inputs

    @staticmethod
    def backward(ctx, *grads):
        return grads


def test_deferred_logits_survive_what_ddp_does_to_outputs():
    """It hands them through a function that returns its inputs: nothing is made, nor lost."""
    model, ids = tiny_model().train(), token_ids(2, 9)
    (logits,) = Identity.apply(model(ids, labels=ids).logits)
    assert type(logits) is DeferredLogits and not logits.is_made
    model.loss_backend = "logits"
    expected = model(ids, labels=ids).logits
    weights = list(model.parameters())
    grads, expected_grads = (
        torch.autograd.grad(x.sin().mean(), weights) for x in (logits, expected)
    )
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert_close(grad, expected_grad, torch.float32)


def test_deferred_logits_are_a_tensor_to_accelerate_trainer_and_numpy():
    from accelerate.utils import gather, pad_across_processes, recursively_apply
    from transformers.trainer_pt_utils import nested_concat, nested_detach, nested_numpify

    model, ids = tiny_model().train(), token_ids(2, 9)
    expected = run(model, "logits", ids)[0].logits.detach()

    def fresh():
        logits = run(model, "auto", ids)[0].logits
        assert isinstance(logits, torch.Tensor) and not logits.is_made and logits.requires_grad
        return logits

    for found in (
        pad_across_processes(fresh(), dim=1),
        pad_across_processes({"logits": [fresh()]}, dim=1)["logits"][0],
        gather(fresh()),
        recursively_apply(lambda each: each * 1, {"logits": fresh()})["logits"],
        nested_detach(fresh()),
        nested_concat(fresh(), fresh())[:2],
        torch.as_tensor(nested_numpify(nested_detach(fresh()))),
        torch.from_numpy(fresh().detach().cpu().numpy()),
        torch.tensor(fresh().tolist()),
        torch.from_dlpack(fresh().detach()),
        torch.stack([fresh().data[0], fresh()[1]]),
    ):
        assert_close(found.detach() * 1, expected, torch.float32)
    assert fresh().size(-1) == V and fresh().ndim == 3 and fresh().numel() == expected.numel()
    with pytest.raises(RuntimeError, match="requires grad"):
        fresh().numpy()
    loss = torch.compile(lambda x: x.logsumexp(-1).mean(), backend="eager")
    assert_close(loss(fresh()), expected.logsumexp(-1).mean(), torch.float32)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3),
    "one by one": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=False),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_deferred_logits_are_never_those_of_other_weights(kind):
    model, ids = tiny_model().train(), token_ids(2, 9)
    optimizer = OPTIMIZERS[kind](model.parameters())
    read, unread = (model(ids, labels=ids) for _ in range(2))
    before = read.logits.detach().clone()
    read.loss.backward()
    optimizer.step()
    assert torch.equal(read.logits, before)  # made in time
    message = "cannot be made any more: lm_head's weight has changed since the forward pass"
    for use in (
        lambda logits: F.cross_entropy(logits[0], ids[0]),
        lambda logits: logits.float() + 1,
        lambda logits: logits.tolist(),
    ):
        with pytest.raises(RuntimeError, match=message):
            use(unread.logits)
    if kind != "fused":  # torch's own check, which torch's own fused optimizers pass by
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            read.logits.sum().backward()


def test_deferred_logits_notice_a_change_past_the_version_counter():
    """As bitsandbytes' and DeepSpeed's optimizers make it; FSDP takes the whole weight away."""
    for change in (
        lambda weight: weight.data.mul_(1.001),
        lambda weight: weight.untyped_storage().resize_(0),
    ):
        model, ids = tiny_model().train(), token_ids(2, 9)
        out = model(ids, labels=ids)
        change(model.lm_head.weight)
        with pytest.raises(RuntimeError, match="lm_head's weight has changed"):
            out.logits.argmax(-1)


@pytest.mark.parametrize("backend", ["fused", "logits"])
def test_packed_rows_take_another_ignore_index(backend):
    model, ids = tiny_model().train(), token_ids(1, 12)
    model.loss_backend = backend
    packing = {"seq_idx": torch.arange(12)[None] // 5}
    expected = model(ids, labels=ids, **packing).loss
    assert_close(model(ids, labels=ids, ignore_index=-1, **packing).loss, expected, torch.float32)
