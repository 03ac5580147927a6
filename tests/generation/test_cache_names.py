"""`cache` and `past_key_values` are one argument and one output, on every version of Transformers;
what a forward does not know is refused; a loop that has lost its cache is an error."""

import importlib.util
import inspect
import pickle
import re
import sys
import warnings

import pytest
import torch
import transformers
from builders import tiny_config, tiny_model, token_ids
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList
from transformers.generation import GenerationMixin
from transformers.generation import utils as generation_utils
from transformers.utils import logging

from kimi_linear import (
    KimiLinearBackbone,
    KimiLinearCache,
    KimiLinearForSequenceClassification,
    KimiLinearForTokenClassification,
)
from kimi_linear.outputs_kimi_linear import CACHE_NAMES
from kimi_linear.upstream import generation
from kimi_linear.upstream.caches import CACHE_NAME
from kimi_linear.upstream.generation import LoopWatch
from kimi_linear.upstream.late_stop import late_sample

pytestmark = pytest.mark.core

COMMON = dict(max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=96)
CLASSES = {
    "backbone": lambda: KimiLinearBackbone(tiny_config()),
    "causal lm": tiny_model,
    "sequences": lambda: KimiLinearForSequenceClassification(tiny_config(num_labels=3)),
    "tokens": lambda: KimiLinearForTokenClassification(tiny_config(num_labels=3)),
}
each_name = pytest.mark.parametrize("name", CACHE_NAMES)
each_class = pytest.mark.parametrize("make", CLASSES.values(), ids=CLASSES)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


# ---- both names ----------------------------------------------------------------------------------


@each_name
@each_class
def test_every_forward_takes_and_returns_both_names(make, name):
    model = make().eval()
    ids = token_ids(2, 9)
    cache = KimiLinearCache(model.config)
    with torch.no_grad():
        whole = model(ids, use_cache=False)[0]
        out = model(ids[:, :5], **{name: cache})
        rest = model(ids[:, 5:], **{name: cache})[0]
    assert cache.get_seq_length() == 9
    expected = whole if whole.ndim == 2 else whole[:, 5:]  # a sequence's label is read at its end
    torch.testing.assert_close(rest, expected, atol=1e-5, rtol=1e-5)
    if "cache" in out:  # Transformers' output of token classifiers has none
        assert out.cache is out.past_key_values is out["cache"] is out["past_key_values"] is cache
        assert out.get("past_key_values") is cache and "past_key_values" in out
        assert list(out).count("cache") == 1 and "past_key_values" not in list(out)


@each_class
def test_two_different_caches_are_refused(make):
    model = make().eval()
    one, other = KimiLinearCache(model.config), KimiLinearCache(model.config)
    with pytest.raises(ValueError, match="cache and past_key_values are two different caches"):
        model(token_ids(1, 3), cache=one, past_key_values=other)
    with torch.no_grad():
        model(token_ids(1, 3), cache=one, past_key_values=one)
    assert one.get_seq_length() == 3


@each_name
def test_generate_takes_both_names_and_returns_both(model, name):
    ids = token_ids(2, 7)
    expected = model.generate(ids, use_cache=False, **COMMON)
    cache = KimiLinearCache(model.config)
    with torch.no_grad():
        model(ids[:, :4], cache=cache)
    out = model.generate(ids, **{name: cache}, return_dict_in_generate=True, **COMMON)
    assert torch.equal(out.sequences, expected)
    assert out.cache is out["cache"] is out["past_key_values"] is cache
    assert out.past_key_values is cache and "cache" in out and "past_key_values" in out
    with pytest.raises(ValueError, match="two different caches"):
        model.generate(ids, cache=cache, past_key_values=DynamicCache(), **COMMON)


def test_outputs_can_be_written_under_both_names(model):
    with torch.no_grad():
        out = model(token_ids(1, 3), use_cache=True)
    other = KimiLinearCache(model.config)
    out.past_key_values = other
    assert out.cache is other is out["cache"]
    out["past_key_values"] = None
    assert out.cache is None


def test_positional_arguments_are_where_transformers_has_them(model):
    names = list(inspect.signature(model.forward).parameters)
    assert names[:6] == [
        "input_ids",
        "attention_mask",
        "position_ids",
        "cache",
        "inputs_embeds",
        "labels",
    ]


def test_plain_runs_are_silent(model, tmp_path, caplog):
    """Neither Python's warnings nor Transformers' own, whatever the name of the cache."""
    logging.get_logger("transformers").warning_once.__func__.cache_clear()  # said in other tests
    logger = logging.get_logger("transformers")
    logger.addHandler(caplog.handler)
    ids = token_ids(2, 7)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for name in CACHE_NAMES:
                cache = KimiLinearCache(model.config)
                with torch.no_grad():
                    out = model(ids, **{name: cache})
                assert getattr(out, name) is out[name]
                model.generate(ids, **COMMON)
                model.generate(ids, **{name: KimiLinearCache(model.config)}, **COMMON)
                model.generate(ids, num_beams=2, **COMMON)
                model.generate(ids[:1], prompt_lookup_num_tokens=2, **COMMON)
                model.generate(ids, prefill_chunk_size=3, **COMMON)
                model.generate(ids, prefill_chunk_size=3, num_beams=2, **COMMON)
    finally:
        logger.removeHandler(caplog.handler)
    about_cache = [r.message for r in caplog.records if "cache" in r.message or "past" in r.message]
    assert not about_cache


# ---- nothing is swallowed ------------------------------------------------------------------------


@each_class
def test_a_misspelt_argument_is_named(make):
    model = make().eval()
    with pytest.raises(TypeError) as error:
        model(token_ids(1, 3), past_key_value=KimiLinearCache(model.config))
    message = str(error.value)
    assert "does not know past_key_value: its arguments are input_ids, " in message
    for known in ("attention_mask", "cache", "past_key_values", "output_hidden_states"):
        assert known in message
    assert type(model).__name__ in message


@pytest.mark.parametrize("number", [0, 3], ids=["KDA", "MLA"])
def test_a_layer_names_a_misspelt_argument(model, number):
    layer = model.model.layers[number]
    with pytest.raises(TypeError, match=f"{type(layer.self_attn).__name__}.* past_key_value:"):
        layer(torch.zeros(1, 3, 40), plan=None, past_key_value=None)


def test_generate_names_a_misspelt_argument(model):
    with pytest.raises(ValueError, match="past_key_value"):
        model.generate(token_ids(1, 3), past_key_value=KimiLinearCache(model.config), **COMMON)


def test_a_loss_function_of_ones_own_has_its_arguments():
    model = tiny_model()

    def loss(logits, labels, vocab_size, sharpness=0.0):
        return logits.mean() * 0 + sharpness

    model.loss_function = loss
    ids = token_ids(1, 5)
    assert model(ids, labels=ids, sharpness=3.0).loss.item() == 3.0
    with pytest.raises(TypeError, match="bluntness"):
        model(ids, labels=ids, bluntness=3.0)


def test_what_trainers_pass_is_known():
    """By name: TRL's DistillationTrainer and RewardTrainer, Trainer with Liger's kernels."""
    ids = token_ids(2, 5)
    with torch.no_grad():
        backbone = KimiLinearBackbone(tiny_config()).eval()
        plain = backbone(ids).last_hidden_state
        for extra in ({"logits_to_keep": 3}, {"num_items_in_batch": 8}):
            assert torch.equal(backbone(ids, **extra).last_hidden_state, plain)
        head = KimiLinearForSequenceClassification(tiny_config(num_labels=1)).eval()
        assert torch.equal(head(ids, margin=torch.ones(2)).logits, head(ids).logits)
        model = tiny_model()
        assert torch.equal(model(ids, skip_logits=True).logits, model(ids).logits)


def test_what_the_model_itself_gives_a_loss_is_no_argument(model):
    for name in ("logits", "vocab_size", "kwargs"):
        given = {name: {"depth": 1} if name == "kwargs" else 3}
        with pytest.raises(TypeError, match="does not know"):
            model(token_ids(1, 3), **given)


def test_lengths_alone_are_refused(model):
    """They would be packed rows that nobody takes apart."""
    ends = torch.tensor([0, 2, 5], dtype=torch.int32)
    with pytest.raises(ValueError, match="without cu_seq_lens_q is not allowed"):
        model(token_ids(1, 5), cu_seq_lens_k=ends, max_length_k=3)


def test_outputs_of_generate_can_be_pickled(model):
    out = model.generate(token_ids(1, 4), return_dict_in_generate=True, **COMMON)
    again = pickle.loads(pickle.dumps(out))
    assert torch.equal(again.sequences, out.sequences)
    assert (
        again.cache.get_seq_length()
        == out.cache.get_seq_length()
        == again["cache"].layers[0].num_tokens
    )


def test_another_model_driven_from_inside_is_not_watched(model):
    """As amateur decoding does: a logits processor that asks a second model."""
    other, caches = tiny_model(seed=1), []

    class Other(LogitsProcessor):
        def __call__(self, input_ids, scores):
            caches.append(KimiLinearCache(other.config))
            other(**other.prepare_inputs_for_generation(input_ids, cache=caches[-1]))
            return scores

    ids = token_ids(1, 6)
    text = model.generate(ids, logits_processor=LogitsProcessorList([Other()]), **COMMON)
    assert torch.equal(text, model.generate(ids, **COMMON)) and len(caches) == 8


# ---- a loop that loses its cache -----------------------------------------------------------------


@pytest.fixture
def renamed_loop(monkeypatch):
    """`generate()` of a later Transformers that has renamed the cache, in all of its loop."""
    name, other = CACHE_NAME, "kv_store"
    source = inspect.getsource(generation_utils)
    source = re.sub(rf"(?<![.\w]){name}(?=\W)(?! import)|(?<=outputs\.){name}\b", other, source)
    spec = importlib.util.spec_from_loader("transformers.generation.renamed", loader=None)
    module = importlib.util.module_from_spec(spec)
    module.__file__ = generation_utils.__file__
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(source, generation_utils.__file__, "exec"), vars(module))
    for key, value in vars(module.GenerationMixin).items():
        if key in vars(GenerationMixin) and inspect.isfunction(value):
            monkeypatch.setattr(GenerationMixin, key, value)
    monkeypatch.setattr(generation, "CACHE_NAME", "cache")
    late_sample.cache_clear()
    yield other
    late_sample.cache_clear()


@pytest.mark.parametrize(
    "mode",
    [{"num_beams": 3}, {"prefill_chunk_size": 3}],
    ids=["beam", "chunked"],
)
def test_a_renamed_cache_is_an_error_and_not_a_text(renamed_loop, model, mode):
    message = {
        "num_beams": "rows of its cache in the order of the step before",
        "prefill_chunk_size": "Cannot use prefill chunking without a ",
    }[next(iter(mode))]
    with pytest.raises((RuntimeError, ValueError), match=message) as error:
        model.generate(token_ids(1, 7), **mode, **COMMON)
    if "num_beams" in mode:
        assert f"Transformers {transformers.__version__} is installed" in str(error.value)
        assert "tested with 5.17.0 to " in str(error.value)


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_renamed_loop_of_one_row_is_right(renamed_loop, model, use_cache):
    """The model goes on with its own cache, which the loop holds without knowing it."""
    ids, expected = token_ids(1, 7), token_ids(1, 7)
    with torch.no_grad():
        for _ in range(8):
            best = model(expected, use_cache=False).logits[:, -1:].argmax(-1)
            expected = torch.cat([expected, best], dim=1)
    assert torch.equal(model.generate(ids, use_cache=use_cache, **COMMON), expected)


def test_a_renamed_loop_of_drafts_is_right_or_an_error(renamed_loop, model):
    """Ours knows the cache by the name under which the package hands it in."""
    ids = token_ids(1, 7)
    expected = model.generate(ids, **COMMON)
    try:
        assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=2, **COMMON), expected)
    except RuntimeError as error:  # Transformers' own
        assert "assisted decoding requires a " in str(error).lower()


def test_a_loop_that_drops_the_cache_is_an_error(model, monkeypatch):
    """As on 5.24 before this package knew its name: each step a text of one token."""
    update = GenerationMixin._update_model_kwargs_for_generation

    def forgetful(self, *args, **kwargs):
        kept = update(self, *args, **kwargs)
        kept.pop(CACHE_NAME)
        return kept

    monkeypatch.setattr(GenerationMixin, "_update_model_kwargs_for_generation", forgetful)
    with pytest.raises(RuntimeError, match="step 2 without the cache that the first one returned"):
        model.generate(token_ids(1, 7), **COMMON)


def test_a_loop_with_a_cache_that_has_not_seen_the_prompt_is_an_error(model, monkeypatch):
    update = GenerationMixin._update_model_kwargs_for_generation

    def swapped(self, *args, **kwargs):
        kept = update(self, *args, **kwargs)
        kept[CACHE_NAME] = KimiLinearCache(self.config)
        return kept

    monkeypatch.setattr(GenerationMixin, "_update_model_kwargs_for_generation", swapped)
    with pytest.raises(RuntimeError, match="step 2 with another cache than the first one"):
        model.generate(token_ids(1, 7), **COMMON)


class Held:
    """What `LoopWatch` asks of a cache."""

    def __init__(self, count):
        self.count = count

    def get_seq_length(self):
        return self.count


def run_watch(*steps):
    """Steps of (tokens cached, columns of ids, tokens read)."""
    watch, cache = LoopWatch(), Held(0)
    for past, width, new in steps:
        cache.count = past
        watch.step(cache, width, new, uses_cache=True)


@pytest.mark.parametrize(
    "steps",
    [
        [(0, 7, 7), (7, 8, 1), (8, 9, 1)],
        [(4, 7, 3), (7, 8, 1)],  # a prompt that is cached in part
        [(4, 3, 3), (7, 4, 1), (8, 5, 1)],  # new tokens alone
        [(0, 0, 7), (7, 1, 1), (8, 2, 1)],  # from embeddings
        [(0, 3, 3), (3, 3, 3), (6, 1, 1), (7, 8, 1), (8, 9, 1)],  # in pieces
        [(0, 9, 9), (7, 11, 4), (9, 10, 1)],  # drafts, some of them taken back
        [(0, 7, 7), (10, 8, 1), (11, 9, 1)],  # PEFT's prompt tuning with three virtual tokens
        [(0, 7, 7), (7, 8, 1), (8, 8, 1)],  # rows that have ended, where other processes go on
        [(0, 1, 1), (1, 2, 1), (2, 3, 1)],
    ],
)
def test_the_watch_lets_right_loops_pass(steps):
    run_watch(*steps)


@pytest.mark.parametrize(
    "steps",
    [
        [(0, 7, 7), (0, 8, 1)],  # an empty cache
        [(0, 7, 7), (7, 8, 8)],  # the text read twice
        [(0, 7, 7), (6, 8, 1)],  # a token is missing
        [(0, 3, 3), (0, 3, 3)],  # a piece that the cache has not
        [(0, 3, 3), (3, 3, 3), (3, 8, 1)],
        [(0, 0, 7), (0, 1, 1)],
        [(0, 7, 7), (10, 8, 1), (14, 9, 1)],  # virtual tokens at every step
    ],
)
def test_the_watch_refuses_wrong_ones(steps):
    with pytest.raises(RuntimeError, match="generate\\(\\) made step"):
        run_watch(*steps)
