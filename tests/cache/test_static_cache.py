"""Decode steps that `torch.compile` takes as one graph, behind a static cache."""

import sys

import pytest
import torch
from builders import TWO_LAYERS, tiny_model, token_ids
from torch._dynamo.utils import counters
from transformers import CompileConfig, StaticCache
from transformers.cache_utils import DynamicCache

from kimi_linear.ops import short_conv
from kimi_linear.ops.kda.recurrent import l2norm
from kimi_linear.ops.runtime import is_traced
from kimi_linear.ops.short_conv.convolution import short_convolution

pytestmark = pytest.mark.core

COMMON = dict(max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=96)
IDS = token_ids(3, 6)
MASKS = {
    "none": None,
    "left": [[1] * 6, [0, 0, 1, 1, 1, 1], [0] * 5 + [1]],
    "right": [[1] * 6, [1] * 4 + [0] * 2, [1] + [0] * 5],
    "interior": [[1] * 6, [1, 0, 1, 1, 0, 1], [0, 1, 0, 0, 0, 1]],
}


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def model(request):
    own = tiny_model(**TWO_LAYERS)
    own.set_attn_implementation(request.param)
    return own


@pytest.fixture
def graphs():
    """How many have been compiled since the test began."""
    torch.compiler.reset()
    counters.clear()
    return lambda: counters["stats"]["unique_graphs"]


def static():
    compile_config = CompileConfig(fullgraph=True, dynamic=False, backend="eager", mode=None)
    compile_config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": compile_config}


@pytest.mark.parametrize("mask", MASKS)
def test_a_compiled_text_is_the_plain_one(model, graphs, mask):
    """One graph for all steps, whatever their number and wherever padding stands."""
    settings = dict(COMMON)
    if MASKS[mask] is not None:
        settings["attention_mask"] = torch.tensor(MASKS[mask])
    expected = model.generate(IDS, **settings)
    out = model.generate(IDS, **settings, **static(), return_dict_in_generate=True)
    assert out.sequences.tolist() == expected.tolist()
    assert graphs() == 1
    assert isinstance(out.cache, StaticCache) and out.cache.get_seq_length() == 13
    settings["max_new_tokens"] = 4
    model.generate(IDS, **settings, **static())
    assert graphs() == 1


def test_steps_of_a_single_row_are_one_graph_too(model, graphs):
    """Strides of a single row that are those of all the text made each step another graph."""
    expected = model.generate(IDS[:1], **COMMON)
    assert model.generate(IDS[:1], **COMMON, **static()).tolist() == expected.tolist()
    assert graphs() == 1


def test_beams_behind_a_cache_that_could_be_compiled(model):
    """Transformers compiles greedy search and sampling only."""
    settings = {**COMMON, "num_beams": 2, "attention_mask": torch.tensor(MASKS["right"])}
    expected = model.generate(IDS, **settings)
    assert model.generate(IDS, **settings, **static()).tolist() == expected.tolist()


def test_weights_of_attention_have_one_shape(graphs):
    own = tiny_model(**TWO_LAYERS)
    own.set_attn_implementation("eager")
    settings = {**COMMON, "return_dict_in_generate": True, "output_attentions": True}
    plain = own.generate(IDS, **settings)
    out = own.generate(IDS, **settings, **static())
    for step, (found, expected) in enumerate(zip(out.attentions, plain.attentions, strict=True)):
        width = 6 + step
        assert found[0].shape == (3, 3, 6 if step == 0 else 1, 256)
        torch.testing.assert_close(found[0][..., :width], expected[0])
        assert not found[0][..., width:].any()


def test_a_static_cache_without_compilation(model):
    """Nothing is compiled, and the mask's further columns do not matter, where no device asks."""
    mask = torch.tensor(MASKS["right"])
    expected = model.generate(IDS, **COMMON, attention_mask=mask)
    for fields in ({}, {"compile_config": CompileConfig()}):
        out = model.generate(
            IDS,
            **COMMON,
            attention_mask=mask,
            cache_implementation="static",
            return_dict_in_generate=True,
            **fields,
        )
        assert out.sequences.tolist() == expected.tolist()
        assert isinstance(out.cache, StaticCache)
        assert not isinstance(out.cache, DynamicCache)


def test_a_turn_behind_a_full_static_cache(model):
    """What the room is too small for is refused, before the next token is read."""
    settings = {**COMMON, "max_new_tokens": 2}
    mask = torch.tensor(MASKS["left"])
    padded = model.generate(
        IDS, **settings, **static(), attention_mask=mask, return_dict_in_generate=True
    )
    text = torch.cat([padded.sequences, token_ids(3, 260, seed=5)], dim=1)
    mask = torch.nn.functional.pad(mask, (0, text.shape[1] - 6), value=1)
    with pytest.raises(ValueError, match="the text has 268 tokens, .* room for 256"):
        model.generate(text, attention_mask=mask, cache=padded.cache, **settings)
    cache = model.generate(IDS, **settings, **static(), return_dict_in_generate=True).cache
    with pytest.raises(ValueError, match="the text has 257 tokens, .* room for 256"):
        model.generate(text[:, :20], cache=cache, **{**COMMON, "max_new_tokens": 240})


def test_a_given_cache_says_whether_its_steps_are_compiled(model, graphs, monkeypatch):
    """Transformers takes no cache_implementation beside a cache."""
    settings = {**COMMON, "return_dict_in_generate": True}
    first = model.generate(IDS, **settings, **static())
    text = torch.cat([first.sequences, token_ids(3, 2, seed=5)], dim=1)
    expected = model.generate(text, **COMMON).tolist()
    fields = {"compile_config": static()["compile_config"], "cache": first.cache}
    module = sys.modules[type(model).prepare_inputs_for_generation.__module__]
    monkeypatch.setattr(module.logger, "warning_once", pytest.fail)  # that it has no effect
    assert model.generate(text, **COMMON, **fields).tolist() == expected
    assert graphs() == 1


def test_pieces_of_a_prompt_are_read_at_once(model, graphs):
    expected = model.generate(IDS, **COMMON)
    out = model.generate(IDS, **COMMON, **static(), prefill_chunk_size=2)
    assert out.tolist() == expected.tolist() and graphs() == 1


def test_the_default_cache_is_a_dynamic_one(model):
    out = model.generate(IDS, **COMMON, return_dict_in_generate=True)
    assert isinstance(out.cache, DynamicCache) and not out.cache.is_compileable


def test_kernels_do_not_read_padding_behind_the_real_tokens(monkeypatch):
    """On a GPU without a graph of ours: their state is that of the last columns, and not kept."""
    taken = []

    def is_taken(*tensors):
        return len(tensors) == 6 and not is_traced()

    def convolve(inputs, taps, state, head_dim, _):
        before = 3 * [None] if state is None else state.unbind(1)
        options = {"output_final_state": True, "backend": "torch"}
        both = [
            short_convolution(x, tap, initial_state=old, **options)
            for x, tap, old in zip(inputs, taps, before, strict=True)
        ]
        taken.append(inputs[0].shape[1])
        heads = [y.unflatten(-1, (-1, head_dim)) for y, _ in both]
        normed = [*map(l2norm, heads[:2]), heads[2]]
        return [y.flatten(-2) for y in normed], torch.stack([last for _, last in both], dim=1)

    own = tiny_model(**TWO_LAYERS)
    own.set_attn_implementation("eager")
    settings = {**COMMON, "attention_mask": torch.tensor(MASKS["left"])}
    expected = own.generate(IDS, **settings)
    monkeypatch.setattr(short_conv, "has_kernels", is_taken)
    monkeypatch.setattr(short_conv, "convolve_three", convolve)
    assert own.generate(IDS, **settings, **static()).tolist() == expected.tolist()
    assert taken


def rows_of(cache, how):
    """A cache that goes on by itself, and which rows it has."""
    if how == "fork":
        return cache.fork(), [0]
    if how == "repeat":
        cache.batch_repeat_interleave(3)
        return cache, [0, 0, 0]
    cache.batch_select_indices(torch.tensor([0, 0]))
    return cache, [0, 0]


@pytest.mark.parametrize("how", ["fork", "repeat", "select"])
def test_a_turn_behind_rows_of_a_compiled_cache(how):
    """Its steps write to one buffer: what forks and further rows share would be lost to them."""
    own = tiny_model(**TWO_LAYERS, initializer_range=0.3)
    settings = {**COMMON, "return_dict_in_generate": True, "output_logits": True}
    first = own.generate(IDS[:1], **settings, **static())
    cache, rows = rows_of(first.cache, how)
    text = torch.cat([first.sequences, token_ids(1, 3, seed=5)], dim=1)[rows]
    expected = own.generate(text, **settings)
    settings["compile_config"] = static()["compile_config"]
    out = own.generate(text, **settings, cache=cache)
    torch.testing.assert_close(torch.stack(out.logits), torch.stack(expected.logits))
    if how == "fork":
        assert first.cache.get_seq_length() == 13
        again = own.generate(text, **settings, cache=first.cache)
        torch.testing.assert_close(torch.stack(again.logits), torch.stack(expected.logits))


def test_padding_behind_a_hook_is_finite():
    """NaN of a padding token would reach the state of the KDA layer above."""
    own = tiny_model("mla_first")
    own.set_attn_implementation("eager")
    own.model.layers[0].self_attn.kv_b_proj.register_forward_hook(lambda module, args, out: out)
    settings = {**COMMON, "attention_mask": torch.tensor(MASKS["left"])}
    expected = own.generate(IDS, **settings)
    assert own.generate(IDS, **settings, **static()).tolist() == expected.tolist()


@pytest.mark.parametrize("fields", [{}, static()])
def test_a_mask_of_too_many_columns_is_refused(fields):
    own = tiny_model(**TWO_LAYERS)
    settings = {**COMMON, "cache_implementation": "static", "return_dict_in_generate": True}
    cache = own.generate(IDS, **{**settings, **fields}).cache
    with pytest.raises(ValueError, match="40 columns, which is not allowed: it must cover the 13"):
        own(IDS, attention_mask=torch.ones(3, 40), cache=cache)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "attention_mask=None is not allowed here"),
        ({"attention_mask": torch.ones(3, 10)}, "it must cover the 13 cached and the 3 new"),
        ({"attention_mask": torch.zeros(3, 16)}, "zeros among the cached tokens"),
    ],
)
def test_calls_by_hand_behind_a_cache_of_compiled_steps(model, inputs, message):
    """They are held against the cache as behind any other one."""
    settings = {**COMMON, "return_dict_in_generate": True, **static()}
    if not inputs:
        settings["attention_mask"] = torch.tensor(MASKS["left"])
    cache = model.generate(IDS, **settings).cache
    with pytest.raises(ValueError, match=message):
        model(IDS[:, :3], cache=cache, **inputs)
