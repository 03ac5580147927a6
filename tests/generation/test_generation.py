"""Everything that `generate()` does, with our cache and without any: the same ids."""

import copy

import pytest
import torch
from builders import tiny_model, token_ids
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tolerance import assert_close
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from kimi_linear import KimiLinearCache
from kimi_linear.decode.obstacles import call_obstacle

pytestmark = [pytest.mark.core, pytest.mark.kernels]

COMMON = dict(max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=96)
NO_CACHE = dict(use_cache=False)


@pytest.fixture(scope="module")
def hybrid():
    return tiny_model()


@pytest.fixture(scope="module", params=["hybrid", "all_kda"])
def model(request):
    return tiny_model(request.param)


class NoRepeat(LogitsProcessor):
    """Forbid the token before the last one."""

    def __call__(self, input_ids, scores):
        return scores.scatter(1, input_ids[:, -2:-1], float("-inf"))


class StopAt(StoppingCriteria):
    """Stop a row at a length of its own."""

    def __call__(self, input_ids, scores, **kwargs):
        rows = torch.arange(len(input_ids), device=input_ids.device)
        return input_ids.shape[1] >= 12 + rows


MODES = {
    "greedy": {},
    "sampling": dict(do_sample=True, temperature=0.7, top_k=20, top_p=0.9),
    "several samples": dict(do_sample=True, num_return_sequences=3, top_k=0),
    "beam": dict(num_beams=4, num_return_sequences=2, length_penalty=0.5),
    "beam sampling": dict(num_beams=3, do_sample=True, top_k=10),
    "early stopping": dict(num_beams=3, early_stopping=True, eos_token_id=[5, 6, 7, 8, 9]),
    "end token": dict(eos_token_id=list(range(0, 94, 9))),
    "processors": dict(repetition_penalty=1.3, no_repeat_ngram_size=2, min_new_tokens=4),
    "own processor": dict(logits_processor=LogitsProcessorList([NoRepeat()])),
    "own stopping": dict(stopping_criteria=StoppingCriteriaList([StopAt()])),
    "guidance": dict(guidance_scale=1.5),
    "sequence bias": dict(sequence_bias={(3,): 2.0, (4, 5): 1.0}),
}
CACHES = {
    "default": {},
    "dynamic": dict(cache_implementation="dynamic"),
    "static": dict(cache_implementation="static"),
    "offloaded": dict(cache_implementation="offloaded"),
    "offloaded static": dict(cache_implementation="offloaded_static"),
    "prefill in chunks": dict(prefill_chunk_size=4),
}


def run(model, ids, **kwargs):
    torch.manual_seed(0)
    return model.generate(ids, **{**COMMON, **kwargs}).tolist()


def left_padded(ids, lengths):
    """Rows cut to their last `lengths` tokens, and the mask."""
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, -length:] = 1
    return ids.masked_fill(mask == 0, 96), mask


@pytest.mark.parametrize("mode", MODES)
def test_modes(model, mode):
    ids = token_ids(2, 9)
    expected = run(model, ids, **NO_CACHE, **MODES[mode])
    assert run(model, ids, **MODES[mode]) == expected


@pytest.mark.parametrize("mode", ["greedy", "sampling", "beam", "several samples", "processors"])
def test_modes_with_left_padding(hybrid, mode):
    ids, mask = left_padded(token_ids(3, 11), (11, 4, 7))
    expected = run(hybrid, ids, attention_mask=mask, **NO_CACHE, **MODES[mode])
    assert run(hybrid, ids, attention_mask=mask, **MODES[mode]) == expected


@pytest.mark.parametrize("mode", ["greedy", "beam"])
@pytest.mark.parametrize("cache", CACHES)
def test_caches(hybrid, cache, mode):
    ids, mask = left_padded(token_ids(3, 11), (11, 4, 7))
    expected = run(hybrid, ids, attention_mask=mask, **NO_CACHE, **MODES[mode])
    assert run(hybrid, ids, attention_mask=mask, **CACHES[cache], **MODES[mode]) == expected


def test_a_static_cache_makes_its_room_once(hybrid):
    out = hybrid.generate(
        token_ids(1, 9),
        **{**COMMON, "max_new_tokens": 300},
        cache_implementation="static",
        return_dict_in_generate=True,
    )
    assert out.cache.layers[3].tail.shape[1] == 512
    assert not out.cache.is_compileable


def test_logits_of_a_run_are_those_of_one_call(model):
    ids = token_ids(2, 9)
    out = model.generate(ids, **COMMON, return_dict_in_generate=True, output_logits=True)
    with torch.no_grad():
        expected = model(out.sequences[:, :-1], use_cache=False).logits[:, 8:]
    assert_close(torch.stack(out.logits, dim=1), expected, torch.float32)


def test_eager_attention_returns_weights_at_every_step(hybrid):
    ids = token_ids(2, 9)
    hybrid.set_attn_implementation("eager")
    try:
        out = hybrid.generate(ids, **COMMON, return_dict_in_generate=True, output_attentions=True)
        with torch.no_grad():
            whole = hybrid(out.sequences[:, :-1], output_attentions=True).attentions[0]
    finally:
        hybrid.set_attn_implementation("sdpa")
    assert len(out.attentions) == COMMON["max_new_tokens"]
    for step, weights in enumerate(out.attentions[1:], start=9):
        assert_close(weights[0], whole[:, :, step : step + 1, : step + 1], torch.float32)


def test_inputs_embeds(hybrid):
    ids = token_ids(2, 9)
    embeds = hybrid.get_input_embeddings()(ids)
    expected = [row[9:] for row in run(hybrid, ids)]
    assert hybrid.generate(inputs_embeds=embeds, **COMMON).tolist() == expected


class Collect(BaseStreamer):
    """Keep what is put."""

    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


def test_streaming(hybrid):
    streamer = Collect()
    out = run(hybrid, token_ids(1, 9), streamer=streamer)
    assert streamer.tokens == out[0] and streamer.ended


def test_stopping_strings(hybrid):
    tokenizer = Tokenizer(models.WordLevel({chr(33 + i): i for i in range(97)}, unk_token="!"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    ids = token_ids(1, 9)
    whole = run(hybrid, ids)[0]
    stop = fast.decode(whole[12:14])
    out = run(hybrid, ids, stop_strings=[stop], tokenizer=fast)[0]
    assert len(stop) == 2 and out == whole[:14]


# ------------------------------------------------------------------------------------ given caches
@pytest.mark.parametrize("split", [1, 5, 8])
@pytest.mark.parametrize("mode", ["greedy", "sampling"])
def test_a_cache_filled_by_hand(model, split, mode):
    ids = token_ids(2, 9)
    cache = KimiLinearCache(model.config)
    with torch.no_grad():
        model(ids[:, :split], cache=cache)
    expected = run(model, ids, **MODES[mode])
    assert run(model, ids, cache=cache, **MODES[mode]) == expected


@pytest.mark.parametrize("mode", ["greedy", "beam"])
def test_an_empty_cache_given_by_hand(hybrid, mode):
    ids = token_ids(2, 9)
    given = KimiLinearCache(hybrid.config, reserve_tokens=100, rollback_tokens=0)
    expected = run(hybrid, ids, **MODES[mode])
    assert run(hybrid, ids, cache=given, **MODES[mode]) == expected


@pytest.mark.parametrize("cached", [9, 12])
def test_a_prompt_without_a_new_token_is_refused(hybrid, cached):
    """Transformers' own models read it twice."""
    ids = token_ids(2, 12)
    cache = KimiLinearCache(hybrid.config)
    hybrid(ids[:, :cached], cache=cache)
    prompt = ids[:, :9]
    embeds = hybrid.get_input_embeddings()(prompt)
    for name, value in {"input_ids": prompt, "inputs_embeds": embeds}.items():
        with pytest.raises(ValueError, match=f"{name} has 9 tokens and cache {cached}"):
            hybrid.generate(**{name: value}, cache=cache, **COMMON)
    assert cache.get_seq_length() == cached
    expected = hybrid.generate(prompt, **COMMON)
    cache.crop(8)
    assert torch.equal(hybrid.generate(prompt, cache=cache, **COMMON), expected)


def test_the_new_tokens_alone_with_a_mask_of_all(hybrid):
    ids = token_ids(2, 12)
    expected = hybrid.generate(ids, **COMMON)
    cache = KimiLinearCache(hybrid.config)
    hybrid(ids[:, :9], cache=cache)
    mask = torch.ones_like(ids)
    out = hybrid.generate(ids[:, 9:], attention_mask=mask, cache=cache, **COMMON)
    assert torch.equal(out, expected[:, 9:])


def test_three_turns_with_a_returned_cache(model):
    text, cache = token_ids(1, 8), None
    for turn in range(3):
        settings = {**COMMON, "attention_mask": torch.ones_like(text)}
        expected = run(model, text, **settings)
        out = model.generate(text, **settings, cache=cache, return_dict_in_generate=True)
        assert out.sequences.tolist() == expected
        cache = out.cache
        text = torch.cat([out.sequences, token_ids(1, 5, seed=turn)], dim=1)


def test_a_turn_that_takes_some_of_the_answer_back(hybrid):
    out = hybrid.generate(token_ids(1, 8), **COMMON, return_dict_in_generate=True)
    text = torch.cat([out.sequences[:, :14], token_ids(1, 5, seed=3)], dim=1)
    out.cache.crop(14 - out.cache.get_seq_length())
    expected = run(hybrid, text)
    assert run(hybrid, text, cache=out.cache) == expected


PADDINGS = {
    "left": [[0, 0, 0, 1, 1, 1, 1, 1], [1] * 8],
    "right": [[1, 1, 1, 1, 1, 0, 0, 0], [1] * 8],
    "interior": [[1, 1, 0, 0, 1, 1, 0, 1], [1, 1, 1, 1, 0, 1, 1, 1]],
}


@pytest.mark.parametrize("where", PADDINGS)
def test_padded_prompts_then_a_turn(model, where):
    """A prompt padded anywhere, read by hand, then a turn that ends in real tokens."""
    ids, mask = token_ids(2, 8), torch.tensor(PADDINGS[where])
    cache = KimiLinearCache(model.config)
    with torch.no_grad():
        model(ids, attention_mask=mask, cache=cache)
    text = torch.cat([ids, token_ids(2, 4, seed=2)], dim=1)
    mask = torch.cat([mask, torch.ones(2, 4, dtype=torch.long)], dim=1)
    out = model.generate(text, attention_mask=mask, cache=cache, **COMMON)
    for row in range(2):
        alone = text[row][mask[row].bool()]
        assert out[row, 12:].tolist() == run(model, alone[None])[0][len(alone) :]


ENDING_IN_PADDING = torch.tensor(
    [[1] * 8 + [0] * 3, [1] * 11, [0, 0, 1, 1, 1, 0, 1, 1, 0, 0, 0], [1] + [0] * 10]
)


@pytest.mark.parametrize(
    ("mode", "cache"),
    [*(("greedy", cache) for cache in CACHES), ("beam", "default"), ("several samples", "static")],
)
def test_prompts_that_end_in_padding(model, mode, cache):
    """Each row goes on from its last real token, whatever stands at padding."""
    ids, mask = token_ids(4, 11), ENDING_IN_PADDING
    settings = {**MODES[mode], **CACHES[cache]}
    if mode == "several samples":
        settings["top_k"] = 1
    out = torch.tensor(run(model, ids, attention_mask=mask, **settings)).view(4, -1, 23)
    assert torch.equal(out[:, :, :11], ids[:, None].expand_as(out[:, :, :11]))
    assert run(model, ids, attention_mask=mask, **NO_CACHE, **MODES[mode] | settings) == (
        out.view(-1, 23).tolist()
    )
    for row in range(4):
        alone = ids[row][mask[row].bool()]
        expected = torch.tensor(run(model, alone[None], **settings))
        assert out[row, :, 11:].tolist() == expected[:, len(alone) :].tolist()


@pytest.mark.parametrize("real", [[1, 1, 0, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0, 0]])
def test_drafts_behind_a_prompt_that_ends_in_padding(model, real):
    ids, mask = token_ids(1, 7), torch.tensor([real])
    expected = run(model, ids[:, mask[0].bool()])[0][sum(real) :]
    for how in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": tiny_model(seed=1)}):
        assert run(model, ids, attention_mask=mask, **how)[0][7:] == expected


def test_turns_that_end_in_padding(hybrid):
    """Also those after a cached one, with embeddings, and with the new tokens alone."""
    ids, mask = token_ids(2, 8), torch.tensor([[1] * 6 + [0] * 2, [1] * 8])
    out = hybrid.generate(ids, attention_mask=mask, **COMMON, return_dict_in_generate=True)
    new = torch.tensor([[1] * 5, [1, 1, 1, 0, 0]])
    text = torch.cat([out.sequences, token_ids(2, 5, seed=4)], dim=1)
    mask = torch.cat([mask, torch.ones_like(out.sequences[:, 8:]), new], dim=1)
    expected = run(hybrid, text, attention_mask=mask)
    embeds = hybrid.get_input_embeddings()(text)
    by_embeds = hybrid.generate(inputs_embeds=embeds, attention_mask=mask, **COMMON)
    assert by_embeds.tolist() == [row[text.shape[1] :] for row in expected]
    assert run(hybrid, text, attention_mask=mask, cache=out.cache) == expected


def test_logits_at_padding_are_those_of_the_last_real_token(model):
    ids, mask = token_ids(4, 11), ENDING_IN_PADDING
    for kept in (0, 3, torch.tensor([10, 2])):
        logits = model(ids, attention_mask=mask, logits_to_keep=kept).logits
        columns = torch.arange(11)[-kept:] if isinstance(kept, int) else kept
        for row, real in enumerate(mask.bool()):
            alone = model(ids[row][real][None]).logits[0]
            for place, column in enumerate(columns.tolist()):
                seen = int(real[: column + 1].sum())
                if seen:
                    assert_close(logits[row, place], alone[seen - 1], torch.float32)


def test_many_answers_from_one_prefix(hybrid):
    ids = token_ids(1, 9)
    cache = KimiLinearCache(hybrid.config)
    with torch.no_grad():
        hybrid(ids[:, :8], cache=cache)
    for seed in range(3):
        torch.manual_seed(seed)
        settings = {**COMMON, "do_sample": True}
        expected = hybrid.generate(ids, **settings).tolist()
        torch.manual_seed(seed)
        got = hybrid.generate(ids, cache=cache.fork(), **settings).tolist()
        assert got == expected
    cache.batch_repeat_interleave(4)
    rows = ids.expand(4, -1)
    assert run(hybrid, rows, cache=cache) == run(hybrid, rows)


# ------------------------------------------------------------------------------------- speculation
def perturbed(model, amount):
    """A draft that agrees with the model often, but not always."""
    draft = copy.deepcopy(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(amount * parameter.std() * torch.randn_like(parameter))
    return draft


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=94,
        eos_token_id=95,
        pad_token_id=96,
    )
    return LlamaForCausalLM(config).eval()


DRAFTS = {
    "itself": lambda model: copy.deepcopy(model),
    "close": lambda model: perturbed(model, 0.05),
    "far": lambda model: tiny_model("alternating", seed=9),
    "another architecture": lambda model: llama(),
}


@pytest.mark.parametrize("draft", DRAFTS)
def test_assisted_decoding_gives_the_greedy_text(model, draft):
    ids = token_ids(1, 9)
    settings = {**COMMON, "max_new_tokens": 40}
    expected = model.generate(ids, **settings).tolist()
    assistant = DRAFTS[draft](model)
    assistant.generation_config.num_assistant_tokens = 5
    assistant.generation_config.assistant_confidence_threshold = 0.0
    assert model.generate(ids, assistant_model=assistant, **settings).tolist() == expected


@pytest.mark.parametrize("draft", [None, 2])
def test_prompts_above_the_limit_are_refused_before_they_are_read(draft):
    """One of 200,000 tokens keeps all others of a server waiting. Drafts are not held to it."""
    model, ids = tiny_model(max_prompt_tokens=9), token_ids(2, 10)
    settings = {**COMMON, "max_new_tokens": 20}
    read = []
    model.model.register_forward_pre_hook(lambda *_: read.append(1))
    for prompt in ({"inputs": ids}, {"inputs_embeds": model.get_input_embeddings()(ids).detach()}):
        with pytest.raises(ValueError, match=r"has 10 tokens.* max_prompt_tokens=9"):
            model.generate(**prompt, **settings)
    assert not read
    cache = model(ids[:, :8]).cache
    with pytest.raises(ValueError, match=r"has 10 tokens.* max_prompt_tokens=9"):
        model.generate(ids[:, 8:], attention_mask=torch.ones_like(ids), cache=cache, **settings)
    expected = tiny_model().generate(ids[:1, :9], **settings)
    got = model.generate(ids[:1, :9], assistant_early_exit=draft, **settings)
    assert got.tolist() == expected.tolist()


def test_the_limit_counts_padding_and_cached_tokens():
    model, ids = tiny_model(max_prompt_tokens=9), token_ids(1, 10)
    mask = torch.ones_like(ids)
    mask[:, :6] = 0
    cache = model(ids[:, :8], use_cache=True).past_key_values
    for more in ({"attention_mask": mask}, {"past_key_values": cache}):
        with pytest.raises(ValueError, match=r"has 10 tokens.* max_prompt_tokens=9"):
            model.generate(ids, **more, **COMMON)
    assert cache.get_seq_length() == 8


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_drafts_of_its_own_first_layers_give_the_greedy_text(model, layers):
    ids = token_ids(1, 9)
    settings = {**COMMON, "max_new_tokens": 30}
    expected = model.generate(ids, **settings).tolist()
    assert model.generate(ids, assistant_early_exit=layers, **settings).tolist() == expected
    assert model.config.num_hidden_layers == len(model.model.layers)
    model.config.num_hidden_layers = layers  # as it is while a draft is made
    try:
        assert len(model(ids, output_hidden_states=True).hidden_states) == layers + 1
        assert f"num_hidden_layers={layers}" in call_obstacle(model, 1)
    finally:
        model.config.num_hidden_layers = len(model.model.layers)
    assert call_obstacle(model, 1) == ""


def test_a_draft_of_ours_for_another_architecture():
    ids = token_ids(1, 9)
    settings = {**COMMON, "max_new_tokens": 30}
    main = llama()
    assert main.generate(ids, assistant_model=tiny_model(), **settings).tolist() == (
        main.generate(ids, **settings).tolist()
    )


@pytest.mark.parametrize("num_tokens", [2, 10])
def test_prompt_lookup_gives_the_greedy_text(model, num_tokens):
    phrase = token_ids(1, 7)
    ids = torch.cat([phrase, phrase, phrase[:, :3]], dim=1)
    settings = {**COMMON, "max_new_tokens": 40}
    expected = model.generate(ids, **settings).tolist()
    out = model.generate(ids, prompt_lookup_num_tokens=num_tokens, **settings)
    assert out.tolist() == expected


@pytest.mark.parametrize("outputs", [{}, {"output_scores": True}], ids=["ours", "transformers"])
def test_prompt_lookup_after_a_long_prompt_and_then_a_turn(hybrid, outputs):
    """The first call of Transformers' loop reads prompt and candidates at once, and takes
    candidates back."""
    phrase = token_ids(1, 30)
    ids = torch.cat([phrase] * 20, dim=1)
    options = {**COMMON, **outputs, "return_dict_in_generate": True}
    out = hybrid.generate(ids, prompt_lookup_num_tokens=8, **options)
    assert out.sequences.tolist() == run(hybrid, ids)
    turn = torch.cat([out.sequences, phrase[:, :5]], dim=1)
    assert run(hybrid, turn, cache=out.cache) == run(hybrid, turn)


def test_a_right_padded_turn_with_its_own_positions(hybrid):
    """Positions may be those of the new tokens alone, as the ids are."""
    first = hybrid.generate(token_ids(2, 6), **COMMON, return_dict_in_generate=True)
    text = torch.cat([first.sequences, token_ids(2, 4, seed=5)], dim=1)
    mask = torch.ones_like(text)
    mask[0, -2:] = 0
    expected = run(hybrid, text, attention_mask=mask)
    past = first.cache.get_seq_length()
    positions = torch.arange(past, text.shape[1]).expand(2, -1)
    inputs = {"attention_mask": mask, "position_ids": positions, "cache": first.cache}
    new = len(expected[0]) - text.shape[1]
    found = run(hybrid, text[:, past:], **inputs)
    assert [row[-new:] for row in found] == [row[-new:] for row in expected]


@pytest.mark.parametrize("how", ["lookup", "assistant"])
def test_drafts_behind_a_given_cache(how):
    """Transformers' first step reads the whole text once more, behind what the cache holds."""
    own = tiny_model(initializer_range=0.3)
    how = {"prompt_lookup_num_tokens": 3} if how == "lookup" else {"assistant_model": tiny_model()}
    first = own.generate(token_ids(1, 9), **COMMON, return_dict_in_generate=True)
    text = torch.cat([first.sequences, token_ids(1, 3, seed=5)], dim=1)
    assert run(own, text, cache=first.cache.fork(), **how) == run(own, text)
    with pytest.raises(ValueError, match="input_ids has 5 tokens and cache"):
        run(own, text[:, :5], cache=first.cache, **how)
    assert run(own, text, cache=first.cache) == run(own, text)


def test_assisted_sampling_draws_from_the_model(hybrid):
    """The draft is the model itself, so that every candidate is accepted, whatever was drawn."""
    ids = token_ids(1, 9)
    assistant = copy.deepcopy(hybrid)
    torch.manual_seed(0)
    out = hybrid.generate(
        ids,
        **{**COMMON, "do_sample": True, "max_new_tokens": 30},
        assistant_model=assistant,
        return_dict_in_generate=True,
        output_logits=True,
    )
    with torch.no_grad():
        expected = hybrid(out.sequences[:, :-1], use_cache=False).logits[0, 8:]
    got = torch.cat([logits[:1] for logits in out.logits])
    assert_close(got, expected, torch.float32)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_speculative_loop_of_ones_own(model, batch_size):
    """Random drafts, some right by luck or by design; all rows go back equally far."""
    ids = token_ids(batch_size, 9)
    expected = torch.tensor(run(model, ids, max_new_tokens=30))
    generator = torch.Generator().manual_seed(0)
    cache, text = KimiLinearCache(model.config), ids
    with torch.no_grad():
        logits = model(text, cache=cache).logits[:, -1]
        while text.shape[1] < expected.shape[1]:
            token = logits.argmax(-1, keepdim=True)
            start = text.shape[1] + 1
            draft = expected[:, start : start + 4].clone()
            if draft.shape[1]:  # spoil one place of one row
                row, place = (
                    int(torch.randint(0, n, (1,), generator=generator)) for n in draft.shape
                )
                draft[row, place] = (draft[row, place] + 1) % 94
            step = torch.cat([token, draft], dim=1)
            out = model(step, cache=cache).logits
            right = out[:, :-1].argmax(-1) == draft
            accepted = int(right.all(dim=0).cumprod(0).sum())
            cache.crop(-(draft.shape[1] - accepted))
            text = torch.cat([text, step[:, : 1 + accepted]], dim=1)
            logits = out[:, accepted]
    assert text.tolist() == expected.tolist()


# ---------------------------------------------------------------------------------------- refusals
def test_what_cannot_work_is_refused_by_name(hybrid):
    ids = token_ids(2, 6)
    with pytest.raises(ValueError, match="cache_implementation='quantized'"):
        hybrid.generate(ids, cache_implementation="quantized", **COMMON)
    with pytest.raises(ValueError, match="attention_mask has no token of row 1"):
        hybrid.generate(ids, attention_mask=torch.tensor([[1] * 6, [0] * 6]), **COMMON)


def test_memory_for_rollback_is_kept_only_for_those_who_can_use_it(hybrid, monkeypatch):
    made = []
    original = KimiLinearCache.__init__

    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        made.append(self)

    monkeypatch.setattr(KimiLinearCache, "__init__", init)
    run(hybrid, token_ids(1, 5))
    hybrid.generate(token_ids(1, 5), **COMMON, return_dict_in_generate=True)
    hybrid.generate(token_ids(1, 5), **COMMON, prompt_lookup_num_tokens=3)
    assert [cache.layers[0].rollback.tokens for cache in made] == [0, 64, 0]
