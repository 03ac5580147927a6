"""`torch.export` and compilers with padding: what is computed does not hang on where padding is,
and the values are those of an eager call."""

import pytest
import torch
from builders import TWO_LAYERS, tiny_model, token_ids
from tolerance import assert_close

from kimi_linear import KimiLinearCache

pytestmark = pytest.mark.core

IDS = token_ids(4, 11)
MASK = torch.tensor(
    [[1] * 8 + [0] * 3, [1] * 11, [0, 0, 1, 1, 1, 0, 1, 1, 0, 0, 0], [1] + [0] * 10]
)


@pytest.fixture(scope="module")
def model():
    return tiny_model(**TWO_LAYERS)


def exported(model, inputs, **settings):
    with torch.no_grad():
        return torch.export.export(model, (), inputs, strict=False, **settings).module()


def test_an_exported_program_takes_any_padding(model):
    program = exported(model, {"input_ids": IDS, "attention_mask": MASK, "use_cache": False})
    for mask in (MASK, MASK.flip(0), torch.ones_like(MASK)):
        out = program(input_ids=IDS, attention_mask=mask, use_cache=False).logits
        expected = model(IDS, attention_mask=mask, use_cache=False).logits
        real = mask.bool()
        assert_close(out[real], expected[real], torch.float32)
        assert_close(out[:, -1], expected[:, -1], torch.float32)


def test_an_exported_program_takes_other_sizes(model):
    """Rows, and tokens within as many chunks of 64."""
    rows, tokens = torch.export.Dim("rows"), torch.export.Dim("tokens", min=2, max=64)
    program = exported(
        model,
        {"input_ids": IDS, "attention_mask": MASK, "use_cache": False},
        dynamic_shapes={
            "input_ids": {0: rows, 1: tokens},
            "attention_mask": {0: rows, 1: tokens},
            "use_cache": None,
        },
    )
    for shape in ((2, 17), (7, 3), (3, 64)):
        ids, mask = token_ids(*shape), torch.ones(shape, dtype=torch.long)
        mask[0, :2], mask[-1, 1:] = 0, 0
        out = program(input_ids=ids, attention_mask=mask, use_cache=False).logits
        expected = model(ids, attention_mask=mask, use_cache=False).logits
        assert_close(out[mask.bool()], expected[mask.bool()], torch.float32)


def test_an_exported_program_refuses_packed_rows(model):
    positions = torch.arange(11).expand(4, -1)
    inputs = {"input_ids": IDS, "attention_mask": MASK, "use_cache": False}
    program = exported(model, {**inputs, "position_ids": positions})
    assert torch.equal(
        program(**inputs, position_ids=positions + 3).logits,
        program(**inputs, position_ids=positions).logits,
    )
    with pytest.raises(RuntimeError, match="packed rows are not allowed"):
        program(**inputs, position_ids=positions % 4)


def test_an_exported_call_behind_a_cache(model):
    """A padded call goes on from states and latents that are inputs of the program."""
    exporters = pytest.importorskip("transformers.exporters.exporter_dynamo")
    exporters.register_cache_pytrees_for_model(model)

    def past(mask):
        cache = KimiLinearCache(model.config, rollback_tokens=0)
        with torch.no_grad():
            model(IDS, attention_mask=mask, cache=cache)
        return cache

    new, new_mask = token_ids(4, 5, seed=2), torch.tensor([[1] * 5, [1, 1, 0, 0, 0]] * 2)
    mask = torch.cat([MASK, new_mask], dim=1)
    inputs = {"input_ids": new, "attention_mask": mask}
    program = exported(model, {**inputs, "cache": past(MASK)})
    other = torch.cat([MASK.flip(0), new_mask.flip(1)], dim=1)
    for mask in (inputs["attention_mask"], other):
        inputs["attention_mask"] = mask
        out = program(**inputs, cache=past(mask[:, :11]))
        eager = past(mask[:, :11])
        expected = model(**inputs, cache=eager)
        assert_close(out.logits[:, -1], expected.logits[:, -1], torch.float32)
        step = token_ids(4, 1, seed=3)
        mask = torch.cat([mask, torch.ones(4, 1, dtype=torch.long)], dim=1)
        assert_close(
            model(step, attention_mask=mask, cache=out.cache).logits,
            model(step, attention_mask=mask, cache=eager).logits,
            torch.float32,
        )


def test_a_compiled_call_with_padding_trains():
    """Loss and gradients of padded rows, with the router's losses."""
    own = tiny_model(**TWO_LAYERS, router_aux_loss_coef=0.1, router_z_loss_coef=0.01)
    own.train()
    labels = IDS.masked_fill(MASK == 0, -100)
    inputs = {"input_ids": IDS, "attention_mask": MASK, "labels": labels}

    def gradients(call):
        own.zero_grad()
        loss = call(**inputs).loss
        loss.backward()
        return loss.detach(), {name: p.grad.clone() for name, p in own.named_parameters()}

    loss, expected = gradients(own)
    torch.compiler.reset()
    compiled_loss, found = gradients(torch.compile(own, backend="aot_eager"))
    assert_close(compiled_loss, loss, torch.float32)
    for name, grad in expected.items():
        assert_close(found[name], grad, torch.float32)


def test_jit_tracing_is_refused_by_name(model):
    with pytest.raises(RuntimeError, match=r"torch\.jit\.trace is not supported: torch\.export"):
        torch.jit.trace(model, IDS, check_trace=False)
