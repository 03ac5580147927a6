"""Masks of four dimensions: trees of texts that share beginnings."""

import pytest
import torch
from builders import TWO_LAYERS, tiny_model, token_ids
from tolerance import assert_close

pytestmark = pytest.mark.core

# of each token the one before it in its text; -1: none, None: padding
PARENTS = [[-1, 0, 1, 2, 1, 4, 0, 3, 3], [-1, -1, 1, 0, 2, None, 3, None, 6]]


def texts(row):
    """Of each real token the columns of its text up to it."""
    found = {}
    for token, parent in enumerate(PARENTS[row]):
        if parent is not None:
            found[token] = [*found.get(parent, []), token]
    return found


def tree_mask():
    mask = torch.zeros(2, 1, 9, 9, dtype=torch.bool)
    for row in range(2):
        for token, columns in texts(row).items():
            mask[row, 0, token, columns] = True
    return mask


@pytest.fixture(scope="module", params=["hybrid", "mla_first"])
def model(request):
    return tiny_model(request.param)


@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.float32])
def test_each_token_is_that_of_its_text(model, kind):
    ids, mask = token_ids(2, 9), tree_mask()
    if kind is torch.float32:
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(kind).min)
    logits = model(ids, attention_mask=mask.to(kind)).logits
    for row in range(2):
        for token, columns in texts(row).items():
            alone = model(ids[row, columns][None]).logits[0, -1]
            assert_close(logits[row, token], alone, torch.float32)


def test_one_mask_for_all_rows_and_gradients():
    model = tiny_model(**TWO_LAYERS)
    embeds = model.get_input_embeddings()(token_ids(2, 9)).detach().requires_grad_()
    out = model(inputs_embeds=embeds, attention_mask=tree_mask()[:1]).logits
    out[:, 7].sum().backward()
    plain = embeds.detach().clone().requires_grad_()
    model(inputs_embeds=plain[:, [0, 1, 2, 3, 7]]).logits[:, -1].sum().backward()
    assert_close(embeds.grad, plain.grad, torch.float32)


def test_a_causal_mask_is_one_text(model):
    ids = token_ids(2, 9)
    mask = torch.ones(9, 9).tril()[None, None].long()
    out = model(ids, attention_mask=mask).logits
    assert_close(out, model(ids).logits, torch.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.triu(), "no mask of trees at token 0"),  # sees later tokens
        (lambda m: m.tril(-1), "no mask of trees at token 1"),  # not itself
        (lambda m: m.tril() - m.tril(-3), "no mask of trees at token 3"),  # a window
        (lambda m: m.tril()[:, :, :, 1:], r"has shape \(1, 1, 9, 8\)"),
        (lambda m: m.tril().float(), "other values than 0"),
        (lambda m: m * 0, "hides everything"),
    ],
)
def test_other_masks_are_refused(model, change, message):
    mask = change(torch.ones(1, 1, 9, 9, dtype=torch.int64))
    with pytest.raises(ValueError, match=message):
        model(token_ids(2, 9), attention_mask=mask)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_cache": True}, "not allowed with a cache"),
        ({"seq_idx": torch.zeros(2, 9, dtype=torch.long)}, "not allowed with seq_idx"),
        ({"cu_seq_lens_q": torch.tensor([0, 9, 18])}, "not allowed with cu_seq_lens_q"),
        ({"output_hidden_states": True}, "not allowed with output_hidden_states"),
        ({"labels": token_ids(2, 9)}, "for calls without labels"),
    ],
)
def test_what_it_cannot_be_combined_with(model, fields, message):
    with pytest.raises(ValueError, match=message):
        model(token_ids(2, 9), attention_mask=tree_mask(), **fields)


def test_losses_of_the_router_are_refused():
    own = tiny_model(**TWO_LAYERS, router_aux_loss_coef=0.1).train()
    with pytest.raises(ValueError, match="not allowed with router_aux_loss_coef"):
        own(token_ids(2, 9), attention_mask=tree_mask())
