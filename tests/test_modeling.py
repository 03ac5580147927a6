"""The model against itself: padding, packing, chunks and steps change nothing that a token sees."""

import itertools

import pytest
import torch
from builders import PATTERNS, tiny_config, tiny_model, token_ids
from safetensors.torch import load_file
from tolerance import assert_close
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, StaticCache
from transformers.masking_utils import flash_attention_mask

from kimi_linear import (
    KimiLinearCache,
    KimiLinearForCausalLM,
    KimiLinearForSequenceClassification,
    KimiLinearForTokenClassification,
)
from kimi_linear.layers import planner

pytestmark = [pytest.mark.core, pytest.mark.kernels]

BACKENDS = ("eager", "sdpa", "flex_attention")
FLOAT32 = torch.float32


@pytest.fixture(params=PATTERNS, scope="module")
def model(request):
    return tiny_model(request.param)


@pytest.fixture(scope="module")
def hybrid():
    return tiny_model()


def pad_columns(ids, columns, length):
    """Rows with the ids at `columns` and rubbish elsewhere, and the mask that says so."""
    padded = torch.full((1, length), 96)
    mask = torch.zeros(1, length, dtype=torch.long)
    padded[0, columns], mask[0, columns] = ids, 1
    return padded, mask


LENGTH = 41
PADDINGS = {
    "left": torch.arange(9, LENGTH),
    "right": torch.arange(0, LENGTH - 9),
    "interior": torch.cat([torch.arange(0, 7), torch.arange(12, 30), torch.arange(34, LENGTH)]),
    "everywhere": torch.arange(1, LENGTH, 2),
    "between conv taps": torch.cat([torch.arange(0, 2), torch.arange(5, 7), torch.arange(11, 13)]),
}


@pytest.mark.parametrize("where", PADDINGS)
def test_padded_equals_unpadded(model, where):
    columns = PADDINGS[where]
    ids = token_ids(len(columns), seed=3)
    padded, mask = pad_columns(ids, columns, LENGTH)
    other = token_ids(1, LENGTH, seed=4)
    batch, batch_mask = torch.cat([padded, other]), torch.cat([mask, torch.ones_like(mask)])
    with torch.no_grad():
        expected = model(ids[None]).logits[0]
        out = model(batch, attention_mask=batch_mask).logits
        assert_close(out[0, columns], expected, FLOAT32, where)
        assert_close(out[1], model(other).logits[0], FLOAT32, "neighbour")


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("where", ["left", "right", "everywhere"])
def test_what_padding_holds_reaches_nobody(model, where, backend):
    """In values and gradients, with a cache and without: 0 * NaN of a masked token is NaN."""
    real = torch.zeros(2, LENGTH, dtype=torch.bool)
    real[0, PADDINGS[where]], real[1] = True, True
    mask, found = real.long(), []
    embeds = model.model.embed_tokens(token_ids(2, LENGTH)).detach()
    model.set_attn_implementation(backend)
    try:
        for rubbish in (0.0, torch.nan, torch.inf):
            inputs = embeds.masked_fill(~real[..., None], rubbish).requires_grad_()
            logits = model(inputs_embeds=inputs, attention_mask=mask, use_cache=False).logits
            grads = torch.autograd.grad(
                logits[real].square().sum(), [inputs, *model.parameters()], allow_unused=True
            )
            cache, parts = None, []
            with torch.no_grad():
                for begin, end in ((0, 20), (20, LENGTH - 1), (LENGTH - 1, LENGTH)):
                    part = {"inputs_embeds": inputs[:, begin:end], "attention_mask": mask[:, :end]}
                    out = model(**part, cache=cache, use_cache=True)
                    cache = out.cache
                    parts.append(out.logits)
            found.append([logits.detach(), torch.cat(parts, dim=1), *grads])
    finally:
        model.set_attn_implementation("sdpa")
    for got in zip(*found, strict=True):
        if got[0] is not None:  # the embedding's
            assert got[0].isfinite().all() and torch.equal(got[0], got[1])
            assert torch.equal(got[0], got[2])


@pytest.mark.parametrize("where", PADDINGS)
def test_padded_then_continued_equals_unpadded(model, where):
    columns = PADDINGS[where]
    ids, more = token_ids(len(columns), seed=3), token_ids(6, seed=5)
    padded, mask = pad_columns(ids, columns, LENGTH)
    with torch.no_grad():
        expected = model(torch.cat([ids, more])[None]).logits[0, len(ids) :]
        cache = model(padded, attention_mask=mask, use_cache=True).cache
        mask = torch.cat([mask, torch.ones(1, 4, dtype=torch.long)], dim=1)
        first = model(more[None, :4], attention_mask=mask, cache=cache).logits
        # two single steps with a padded one in between
        logits = [first[0]]
        for token, real in ((more[4], 1), (torch.tensor(96), 0), (more[5], 1)):
            mask = torch.cat([mask, torch.tensor([[real]])], dim=1)
            out = model(token.view(1, 1), attention_mask=mask, cache=cache).logits
            if real:
                logits.append(out[0])
    assert_close(torch.cat(logits), expected, FLOAT32, where)


@pytest.mark.parametrize("backend", BACKENDS)
def test_backends_agree_on_padding_and_packing(hybrid, backend):
    ids = token_ids(2, 24)
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[0, :5], mask[1, 10:13] = 0, 0
    positions = torch.arange(24).expand(2, -1).clone()
    positions[:, 15:] -= 15
    try:
        hybrid.set_attn_implementation("eager")
        with torch.no_grad():
            expected = [
                hybrid(ids, attention_mask=mask).logits,
                hybrid(ids, position_ids=positions).logits,
            ]
            hybrid.set_attn_implementation(backend)
            assert hybrid.config._attn_implementation == backend
            got = [
                hybrid(ids, attention_mask=mask).logits,
                hybrid(ids, position_ids=positions).logits,
            ]
    finally:
        hybrid.set_attn_implementation("sdpa")
    assert_close(got[0][mask.bool()], expected[0][mask.bool()], FLOAT32, "padding")
    assert_close(got[1], expected[1], FLOAT32, "packing")


@pytest.mark.parametrize("has_padding", [False, True])
def test_packed_sequences_attended_to_one_by_one(hybrid, monkeypatch, has_padding):
    """What each gets, and its gradients, are those of rows with a mask; and no mask is made."""
    ids = token_ids(2, 40)
    inputs = {"labels": ids, "seq_idx": torch.arange(40).expand(2, -1) // 17}
    if has_padding:
        mask = torch.ones_like(ids)
        mask[0, :18], mask[1, 10:13] = 0, 0  # all of a sequence, and the middle of one
        inputs |= {"attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    masks = []
    create = planner.create_causal_mask
    monkeypatch.setattr(
        planner, "create_causal_mask", lambda *args, **kw: masks.append(1) or create(*args, **kw)
    )
    found = []
    for least in (1000, 1):
        monkeypatch.setattr(planner, "SEQUENCE_TOKENS", least)
        hybrid.zero_grad()
        out = hybrid(ids, **inputs)
        out.loss.backward()
        grads = {name: p.grad.clone() for name, p in hybrid.named_parameters()}
        found.append((out.logits if not has_padding else out.logits[mask.bool()], grads))
    assert len(masks) == 1
    assert_close(found[1][0], found[0][0], FLOAT32)
    for name, grad in found[0][1].items():
        assert_close(found[1][1][name], grad, FLOAT32, name)
    hybrid.zero_grad()


def flash_stand_in(
    module, query, key, value, attention_mask, scaling, cu_seq_lens_q=None, **kwargs
):
    """What flash attention computes, from what Transformers hands it: no 4D mask, value as wide as
    key, sequences either end to end with their boundaries, or in rows with a 2D padding mask."""
    assert value.shape[-1] == key.shape[-1]
    out = torch.zeros(*query.shape[:3], value.shape[-1])
    if cu_seq_lens_q is not None:
        assert attention_mask is None and query.shape[0] == 1
        assert kwargs["max_length_q"] == cu_seq_lens_q.diff().max()
        spans = [(0, torch.arange(a, b)) for a, b in itertools.pairwise(cu_seq_lens_q.tolist())]
    elif attention_mask is not None:
        spans = [(row, real.nonzero()[:, 0]) for row, real in enumerate(attention_mask)]
    else:
        spans = [(row, torch.arange(key.shape[2])) for row in range(key.shape[0])]
    for row, columns in spans:
        queries = columns[columns >= key.shape[2] - query.shape[2]] - (
            key.shape[2] - query.shape[2]
        )
        scores = query[row][:, queries] @ key[row][:, columns].transpose(1, 2) * scaling
        later = columns[None] > (queries + key.shape[2] - query.shape[2])[:, None]
        weights = scores.masked_fill(later, float("-inf")).softmax(-1)
        out[row][:, queries] = weights @ value[row][:, columns]
    return out.transpose(1, 2), None


def test_the_flash_path_hands_over_boundaries_and_padding(hybrid):
    """Packing, padding, and padding with a cache, as flash attention gets them."""
    AttentionInterface.register("flash_stand_in", flash_stand_in)
    AttentionMaskInterface.register("flash_stand_in", flash_attention_mask)
    ids = token_ids(2, 24)
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[0, :5], mask[1, 10:13] = 0, 0
    positions = torch.arange(24).expand(2, -1).clone()
    positions[:, 15:] -= 15
    ends = torch.tensor([0, 15, 24, 39, 48], dtype=torch.int32)
    collated = {
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": 15,
        "max_length_k": 15,
    }
    calls = (
        {"input_ids": ids},
        {"input_ids": ids, "attention_mask": mask},
        {"input_ids": ids, "position_ids": positions},
        {"input_ids": ids, "position_ids": positions, "attention_mask": mask},
        {"input_ids": ids, **collated},
    )
    try:
        for call in calls:
            real = call.get("attention_mask", torch.ones_like(mask)).bool()
            logits = []
            for backend in ("eager", "flash_stand_in"):
                hybrid.config._attn_implementation = backend
                with torch.no_grad():
                    logits.append(hybrid(**call, use_cache=False).logits[real])
                    if not {"position_ids", "cu_seq_lens_q"} & set(call):
                        cut = {**call, "input_ids": ids[:, :20]}
                        if "attention_mask" in call:
                            cut["attention_mask"] = mask[:, :20]
                        cache = hybrid(**cut, use_cache=True).cache
                        rest = {**call, "input_ids": ids[:, 20:]}
                        out = hybrid(**rest, cache=cache).logits
                        whole = hybrid(**call, use_cache=False).logits[:, 20:]
                        assert_close(out[real[:, 20:]], whole[real[:, 20:]], FLOAT32, "cached")
            assert_close(logits[1], logits[0], FLOAT32, str(list(call)))
    finally:
        hybrid.config._attn_implementation = "sdpa"


LENGTHS = (3, 1, 17, 64, 2, 20)


def packed_notation(notation):
    """The same packing, said in each way that Transformers' collators say it."""
    ends = torch.tensor((0, *LENGTHS)).cumsum(0)
    lengths = torch.tensor(LENGTHS)
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    return {
        "position_ids": {"position_ids": positions},
        "seq_idx": {"seq_idx": torch.arange(len(LENGTHS)).repeat_interleave(lengths)[None].int()},
        "cu_seq_lens": {
            "cu_seq_lens_q": ends.int(),
            "cu_seq_lens_k": ends.int(),
            "max_length_q": 64,
            "max_length_k": 64,
        },
        "all": {"position_ids": positions, "cu_seq_lens_q": ends.int()},
        "with mask": {"position_ids": positions, "attention_mask": torch.ones(1, sum(LENGTHS))},
    }[notation]  # fmt: skip


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("notation", ["position_ids", "seq_idx", "cu_seq_lens", "all", "with mask"])
def test_packed_equals_separate(model, notation, training):
    ids = token_ids(1, sum(LENGTHS), seed=6)
    model.train(training)
    try:
        with torch.no_grad():
            packed = model(ids, **packed_notation(notation)).logits
            alone = [model(part).logits for part in ids.split(LENGTHS, dim=1)]
    finally:
        model.eval()
    assert_close(packed, torch.cat(alone, dim=1), FLOAT32, notation)


@pytest.mark.parametrize("notation", ["position_ids", "seq_idx", "cu_seq_lens"])
def test_packed_loss_and_gradients_equal_separate(hybrid, notation):
    """Also without -100 at the sequences' first tokens: nothing predicts them."""
    ids = token_ids(1, sum(LENGTHS), seed=6)
    hybrid.train()
    count = sum(n - 1 for n in LENGTHS)
    hybrid.zero_grad()
    hybrid(ids, labels=ids, num_items_in_batch=count, **packed_notation(notation)).loss.backward()
    packed = {name: p.grad for name, p in hybrid.named_parameters()}
    hybrid.zero_grad()
    for part in ids.split(LENGTHS, dim=1):
        if part.shape[1] > 1:
            hybrid(part, labels=part, num_items_in_batch=count).loss.backward()
    hybrid.eval()
    for name, parameter in hybrid.named_parameters():
        assert_close(packed[name], parameter.grad, FLOAT32, name)
    hybrid.zero_grad()


def test_packed_rows_of_a_batch_with_padding(model):
    ids = token_ids(2, 12)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, 10:], mask[1, :3] = 0, 0
    positions = torch.tensor(
        [[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 0, 0], [0, 0, 0, 0, 1, 0, 1, 2, 3, 4, 5, 6]]
    )
    with torch.no_grad():
        out = model(ids, attention_mask=mask, position_ids=positions).logits
        for row, start, end in ((0, 0, 4), (0, 4, 10), (1, 3, 5), (1, 5, 12)):
            alone = model(ids[row : row + 1, start:end]).logits[0]
            assert_close(out[row, start:end], alone, FLOAT32, f"{row} {start}")


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "splits", [(50,), (49, 1), (1, 49), (16, 17, 17), (1,) * 50, (3, 1, 2, 1, 43)]
)
def test_one_call_equals_chunks_equals_steps(model, splits, training):
    ids = token_ids(2, 50)
    model.train(training)
    try:
        with torch.no_grad():
            expected = model(ids).logits
            cache, parts = KimiLinearCache(model.config), []
            for part in ids.split(splits, dim=1):
                parts.append(model(part, cache=cache).logits)
    finally:
        model.eval()
    assert cache.get_seq_length() == 50
    assert_close(torch.cat(parts, dim=1), expected, FLOAT32, str(splits))


def test_float64_agrees_with_itself_to_1e_10():
    model, ids = tiny_model().double(), token_ids(2, 40)
    model.set_experts_implementation("eager")  # grouped matrix products have no float64
    assert model.model.layers[0].self_attn.A_log.dtype == torch.float64
    with torch.no_grad():
        expected = model(ids).logits
        cache = model(ids[:, :23]).cache
        steps = [model(ids[:, t : t + 1], cache=cache).logits for t in range(23, 40)]
    assert_close(torch.cat(steps, dim=1), expected[:, 23:], torch.float64)


def test_gradients_flow_through_a_cached_prefix(hybrid):
    """A prefix in the cache and then a suffix: the same gradients as one call."""
    ids = token_ids(1, 30)
    grads = []
    for split in (30, 13):
        hybrid.zero_grad()
        embeds = hybrid.get_input_embeddings()(ids).detach().requires_grad_()
        cache = KimiLinearCache(hybrid.config)
        for part in embeds.split((split, 30 - split) if split < 30 else (30,), dim=1):
            logits = hybrid(inputs_embeds=part, cache=cache).logits
        logits[:, -1].square().sum().backward()
        grads.append(embeds.grad)
    hybrid.zero_grad()
    assert_close(grads[1], grads[0], FLOAT32)


def test_batch_neighbours_do_not_matter(hybrid):
    ids = token_ids(3, 20)
    with torch.no_grad():
        together = hybrid(ids).logits
        assert_close(together[1:2], hybrid(ids[1:2]).logits, FLOAT32)


def test_left_padded_generation_equals_each_prompt_alone(hybrid):
    prompts = [token_ids(n, seed=n) for n in (4, 9, 13)]
    padded = torch.full((3, 13), 96)
    mask = torch.zeros(3, 13, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        padded[row, -len(prompt) :], mask[row, -len(prompt) :] = prompt, 1
    kwargs = dict(max_new_tokens=10, do_sample=False, eos_token_id=None, pad_token_id=96)
    together = hybrid.generate(padded, attention_mask=mask, **kwargs)[:, 13:]
    for row, prompt in enumerate(prompts):
        alone = hybrid.generate(prompt[None], **kwargs)[0, len(prompt) :]
        assert together[row].tolist() == alone.tolist()


def test_an_empty_dynamic_cache_is_taken_over(hybrid):
    ids = token_ids(1, 7)
    cache = DynamicCache(config=hybrid.config)
    with torch.no_grad():
        hybrid(ids[:, :5], cache=cache)
        out = hybrid(ids[:, 5:], cache=cache).logits
        assert_close(out, hybrid(ids).logits[:, 5:], FLOAT32)
    assert cache.get_seq_length() == 7


def test_logits_to_keep(hybrid):
    ids = token_ids(2, 11)
    with torch.no_grad():
        everything = hybrid(ids).logits
        assert_close(hybrid(ids, logits_to_keep=3).logits, everything[:, -3:], FLOAT32)
        some = torch.tensor([0, 4, 10])
        assert_close(hybrid(ids, logits_to_keep=some).logits, everything[:, some], FLOAT32)


def test_inputs_embeds_and_tuples(hybrid):
    ids = token_ids(2, 11)
    with torch.no_grad():
        expected = hybrid(ids).logits
        embeds = hybrid.get_input_embeddings()(ids)
        assert_close(hybrid(inputs_embeds=embeds).logits, expected, FLOAT32)
        assert_close(hybrid(ids, return_dict=False)[0], expected, FLOAT32)


def test_no_cache_is_built_in_training_nor_with_labels(hybrid):
    ids = token_ids(1, 5)
    assert hybrid(ids).cache is not None
    assert hybrid(ids, labels=ids).cache is None
    hybrid.train()
    assert hybrid(ids).cache is None
    hybrid.eval()


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_is_exact(reentrant):
    ids, grads = token_ids(2, 20), []
    for checkpointing in (False, True):
        model = tiny_model().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        embeds = model.get_input_embeddings()(ids)
        model(inputs_embeds=embeds, labels=ids).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("method", ["forward", "generate"])
@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"input_ids": token_ids(0, 4)}, r"input_ids has shape \(0, 4\)"),
        ({"input_ids": token_ids(0, 1)}, r"input_ids has shape \(0, 1\)"),
        ({"input_ids": token_ids(2, 0)}, r"input_ids has shape \(2, 0\)"),
        ({"input_ids": token_ids(4)}, r"input_ids has shape \(4,\)"),
        ({"input_ids": [[1, 2]]}, "input_ids=list"),
        ({"inputs_embeds": torch.ones(0, 4, 40)}, r"inputs_embeds has shape \(0, 4, 40\)"),
        ({"inputs_embeds": torch.ones(2, 0, 40)}, r"inputs_embeds has shape \(2, 0, 40\)"),
    ],
)
def test_inputs_of_nothing_are_refused_by_name(hybrid, method, arguments, error):
    cache = KimiLinearCache(hybrid.config)
    with torch.no_grad():
        hybrid(token_ids(2, 3), cache=cache)
    for kwargs in ({}, {"cache": cache}):
        with pytest.raises(ValueError, match=error):
            getattr(hybrid, method)(**arguments, **kwargs)
    if method == "generate" and "input_ids" in arguments:
        with pytest.raises(ValueError, match=error.replace("input_ids", "inputs")):
            hybrid.generate(arguments["input_ids"])


def test_embeddings_may_come_with_no_ids(hybrid):
    embeds = hybrid.get_input_embeddings()(token_ids(1, 5)).detach()
    settings = {"max_new_tokens": 2, "do_sample": False}
    expected = hybrid.generate(inputs_embeds=embeds, **settings)
    got = hybrid.generate(input_ids=token_ids(1, 0), inputs_embeds=embeds, **settings)
    assert got.tolist() == expected.tolist()


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_expert_implementations_agree_in_value_and_gradient(implementation):
    ids, results = token_ids(2, 20), []
    for each in ("eager", implementation):
        model = tiny_model().train()
        model.set_experts_implementation(each)
        loss = model(ids, labels=ids).loss
        loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters()}
        assert all(grad is not None and grad.isfinite().all() for grad in grads.values())
        results.append((loss.detach(), grads))
    assert_close(results[1][0], results[0][0], FLOAT32)
    for name, grad in results[0][1].items():
        assert_close(results[1][1][name], grad, FLOAT32, name)


def test_softmax_router_and_groups_pick_within_the_best_groups():
    model = tiny_model(num_expert_group=3, topk_group=1, moe_router_activation_func="softmax")
    router = model.model.layers[1].block_sparse_moe.gate
    x = torch.randn(50, 40)
    logits, weights, experts = router(x)
    scores = logits.softmax(-1)
    biased = (scores + router.e_score_correction_bias).view(50, 3, 2)
    best = biased.sum(-1).argmax(-1)
    assert (experts // 2 == best[:, None]).all()
    chosen = scores.gather(1, experts)
    expected = chosen / chosen.sum(-1, keepdim=True) * model.config.routed_scaling_factor
    assert_close(weights, expected, FLOAT32)


@pytest.mark.parametrize(
    ("named", "kwargs"),
    [
        ("attention_mask", {"attention_mask": torch.ones(1, 1, 6, 6)}),
        ("attention_mask", {"attention_mask": torch.ones(1, 9)}),
        ("cache", {"position_ids": torch.tensor([[0, 1, 0, 1, 2, 3]]), "use_cache": True}),
        ("input_ids", {"inputs_embeds": torch.zeros(1, 6, 40)}),
        ("cu_seq_lens_q", {"cu_seq_lens_q": torch.tensor([0, 4])}),
    ],
)
def test_contradicting_inputs_are_refused_by_name(hybrid, named, kwargs):
    with pytest.raises(ValueError, match=named):
        hybrid(token_ids(1, 6), **kwargs)


def test_caches_of_others_are_refused(hybrid):
    with pytest.raises(ValueError, match="StaticCache"):
        hybrid(token_ids(1, 6), cache=StaticCache(config=hybrid.config, max_cache_len=8))
    used = DynamicCache()
    used.update(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4), 0)
    with pytest.raises(ValueError, match="holds tokens"):
        hybrid(token_ids(1, 6), cache=used)
    with pytest.raises(ValueError, match="num_hidden_layers"):
        hybrid(token_ids(1, 6), cache=KimiLinearCache(tiny_config(num_hidden_layers=5)))


def test_sequence_and_token_classification():
    config = tiny_config(num_labels=5)
    ids = token_ids(2, 8)
    ids[0, 5:] = 96
    mask = (ids != 96).long()
    sequence = KimiLinearForSequenceClassification(config).eval()
    out = sequence(ids, attention_mask=mask, labels=torch.tensor([1, 4]))
    assert out.logits.shape == (2, 5)
    assert_close(out.logits[:1], sequence(ids[:1, :5]).logits, FLOAT32)
    out.loss.backward()
    token = KimiLinearForTokenClassification(config).eval()
    out = token(ids, attention_mask=mask, labels=torch.zeros_like(ids))
    assert out.logits.shape == (2, 8, 5)
    out.loss.backward()
    assert token.model.layers[0].self_attn.A_log.grad.abs().sum() > 0
    for given, used in ((None, 0.1), (0.3, 0.3)):  # as Transformers' own heads read it
        config = tiny_config(classifier_dropout=given)
        assert KimiLinearForTokenClassification(config).dropout.p == used


def test_tied_embeddings():
    model = KimiLinearForCausalLM(tiny_config(tie_word_embeddings=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_bfloat16_keeps_the_decay_in_float32():
    model = tiny_model()
    attention = model.model.layers[0].self_attn
    before = attention.A_log.clone(), attention.dt_bias.clone()
    for cast in (lambda: model.to(torch.bfloat16), model.half, model.bfloat16):
        cast()
        assert attention.A_log.dtype == attention.dt_bias.dtype == torch.float32
        assert torch.equal(attention.A_log, before[0]) and torch.equal(attention.dt_bias, before[1])
        assert model.dtype in (torch.bfloat16, torch.float16)
    out = model(token_ids(2, 20), labels=token_ids(2, 20))
    out.loss.backward()
    assert out.logits.dtype == torch.bfloat16 and attention.A_log.grad.dtype == torch.float32


def test_autocast_runs_the_recurrence_in_float32(hybrid):
    ids = token_ids(2, 40)
    with torch.no_grad():
        expected = hybrid(ids).logits
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = hybrid(ids).logits
    assert (out - expected).abs().mean() < 0.05 * expected.abs().mean()


@pytest.mark.parametrize("where", PADDINGS)
def test_padded_loss_equals_unpadded(hybrid, where):
    """Padding predicts nothing, and the token before a gap predicts the one after it."""
    columns = PADDINGS[where]
    ids = token_ids(len(columns), seed=3)
    padded, mask = pad_columns(ids, columns, LENGTH)
    count = torch.tensor(len(columns) - 1)
    expected = hybrid(ids[None], labels=ids[None], num_items_in_batch=count).loss
    for labels in (padded, padded.masked_fill(mask == 0, -100)):
        out = hybrid(padded, labels=labels, attention_mask=mask, num_items_in_batch=count)
        assert_close(out.loss, expected, FLOAT32, where)


def test_a_given_cache_counts_whatever_use_cache_says(hybrid):
    ids = token_ids(1, 12)
    with torch.no_grad():
        cache = hybrid(ids[:, :8]).cache
        out = hybrid(ids[:, 8:], cache=cache, use_cache=False).logits
        assert_close(out, hybrid(ids).logits[:, 8:], FLOAT32)


def test_gradient_checkpointing_never_drops_a_cache_silently():
    model, ids = tiny_model(), token_ids(2, 9)
    kwargs = dict(max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=96)
    expected = model.generate(ids, **kwargs).tolist()
    cache = model(ids).cache
    model.gradient_checkpointing_enable()
    model.train()
    assert model.generate(ids, **kwargs).tolist() == expected
    with pytest.raises(ValueError, match="cache"):
        model(ids, cache=cache)


@pytest.mark.parametrize("pattern", ["all_mla", "hybrid"])
def test_a_cache_of_another_batch_size_is_refused(pattern):
    model = tiny_model(pattern)
    cache = model(token_ids(2, 5)).cache
    with pytest.raises(ValueError, match="holds 2 rows"):
        model(token_ids(1, 2), cache=cache)


def test_a_cache_made_under_inference_mode_goes_on_outside_it(hybrid):
    ids = token_ids(1, 12)
    with torch.inference_mode():
        cache = hybrid(ids[:, :8]).cache
    with torch.no_grad():
        out = hybrid(ids[:, 8:], cache=cache).logits
        assert_close(out, hybrid(ids).logits[:, 8:], FLOAT32)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("experts", ["grouped_mm", "batched_mm"])
def test_transforms_of_torch_func(training, experts):
    model, ids = tiny_model().train(training), token_ids(2, 11)
    model.set_experts_implementation(experts)
    model(ids, labels=ids).loss.backward()
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def call(weights, ids, **kwargs):
        return torch.func.functional_call(model, weights, (ids,), {"use_cache": False, **kwargs})

    def loss(weights, row):
        return call(weights, row[None], labels=row[None]).loss

    per_row = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, ids)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert_close(per_row[name].mean(0), parameter.grad, FLOAT32, name)
    logits = torch.func.vmap(lambda row: call(weights, row[None]).logits[0])(ids)
    assert_close(logits, model.eval()(ids).logits, FLOAT32)


def test_trainer_resumes_through_load_state_dict(tmp_path):
    """Trainer hands over the saved names, which have single experts."""
    model, other = tiny_model(), tiny_model(seed=5)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert any(".experts.0.w1." in name for name in saved)
    result = other.load_state_dict(saved)
    assert not result.missing_keys and not result.unexpected_keys
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name
    another = tiny_model(seed=6)
    for half in (0, 1):  # as shards, each loaded without the other
        another.load_state_dict(dict(list(saved.items())[half::2]), strict=False)
    for name, tensor in model.state_dict().items():
        assert torch.equal(another.state_dict()[name], tensor), name


def test_released_names_are_assigned_to_a_model_without_memory(hybrid, tmp_path):
    hybrid.save_pretrained(tmp_path)
    saved = {n: x.bfloat16() for n, x in load_file(tmp_path / "model.safetensors").items()}
    with torch.device("meta"):
        other = KimiLinearForCausalLM(tiny_config())
    result = other.load_state_dict(saved, assign=True)
    assert not result.missing_keys and not result.unexpected_keys
    for name, tensor in hybrid.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor.bfloat16()), name
    assert all(p.requires_grad for p in other.parameters())
    some = {name: x for name, x in saved.items() if "experts.2.w2" not in name}
    with torch.device("meta"):
        other = KimiLinearForCausalLM(tiny_config())
    with pytest.raises(RuntimeError, match=r"experts.0.w1.weight cannot be put into a model on"):
        other.load_state_dict(some, strict=False, assign=True)


@pytest.mark.parametrize("rows", [slice(1), slice(7)])
def test_experts_of_another_shape_are_named(hybrid, tmp_path, rows):
    hybrid.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
    saved[name] = saved[name][rows]
    with pytest.raises(RuntimeError, match=f"size mismatch for {name}"):
        tiny_model().load_state_dict(saved)


def test_sequence_classification_reads_what_the_mask_calls_last():
    model = KimiLinearForSequenceClassification(tiny_config(num_labels=5)).eval()
    ids = token_ids(2, 8)
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1, 1, 1]])
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits
        embeds = model.get_input_embeddings()(ids)
        assert_close(model(inputs_embeds=embeds, attention_mask=mask).logits, logits, FLOAT32)
        assert_close(logits[:1], model(ids[:1, :5]).logits, FLOAT32)
        assert_close(logits[1:], model(ids[1:, 2:]).logits, FLOAT32)


def test_what_cannot_work_is_refused_by_name(hybrid):
    ids = token_ids(2, 6)
    with pytest.raises(ValueError, match="attention_mask=dict"):
        hybrid(ids, attention_mask={"full_attention": None})
    with pytest.raises(ValueError, match=r"shape \(2, 0\)"):
        hybrid(ids[:, :0])
    with pytest.raises(ValueError, match="logits_to_keep=2"):
        hybrid(ids, labels=ids, logits_to_keep=2)
    for labels in (ids[:, :5], ids[:1], ids[0]):
        with pytest.raises(ValueError, match=r"labels has shape .* \[batch, tokens\] = \[2, 6\]"):
            hybrid(ids, attention_mask=torch.ones_like(ids), labels=labels)
    with pytest.raises(ValueError, match=r"input_ids has shape \(6,\).*\[batch, tokens\]"):
        hybrid(ids[0])
    with pytest.raises(ValueError, match=r"inputs_embeds has shape \(2, 6\).*hidden_size\]"):
        hybrid(inputs_embeds=ids.float())
    with pytest.raises(ValueError, match="9 columns"):
        tiny_model("all_kda")(ids, attention_mask=torch.ones(2, 9))
    config = tiny_config()
    config.mla_use_nope = False
    with pytest.raises(ValueError, match="mla_use_nope"):
        KimiLinearForCausalLM(config)


def test_casting_down_from_float64_leaves_the_decay_in_float32():
    attention = tiny_model().double().bfloat16().model.layers[0].self_attn
    assert attention.A_log.dtype == attention.dt_bias.dtype == torch.float32


def test_outputs_come_in_the_order_of_their_names(hybrid):
    asked = {"output_hidden_states": True, "output_router_logits": True}
    hybrid.set_attn_implementation("eager")
    out = hybrid.model(token_ids(1, 5), output_attentions=True, use_cache=False, **asked)
    hybrid.set_attn_implementation("sdpa")
    found = [name for name in out if not name.startswith("router_losses")]
    assert found == ["last_hidden_state", "router_logits", "hidden_states", "attentions"]
