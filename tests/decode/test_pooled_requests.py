"""Requests that decode together in a pool: each answer is the one that it gets alone."""

import pytest
import torch
from builders import token_ids
from decode_models import DEVICES, allowed, decode_model, small_grids  # noqa: F401
from transformers import ContinuousBatchingConfig, GenerationConfig

from kimi_linear.cache.pool import TextPool
from kimi_linear.decode import recording
from kimi_linear.generation import requests
from kimi_linear.generation.drafts import GroupDrafts
from kimi_linear.generation.texts import OwnCaches, PooledTexts
from kimi_linear.ops.runtime import TritonError
from kimi_linear.upstream.requests import PAGE_SIZE

pytestmark = [pytest.mark.kernels, pytest.mark.interpreted, pytest.mark.usefixtures("small_grids")]
each_device = pytest.mark.parametrize("device", DEVICES)
PAGE = 32


def answers(model, lengths, count, start=0, place=PooledTexts, num_drafted=None, **settings):
    """Of `generate_batch`, those that each prompt gets alone, and the processor, whose texts end in
    `place`; prompts begin with the same `start` tokens."""
    found, make = [], type(model).request_processor
    model.request_processor = lambda manager: found.append(make(model, manager)) or found[-1]
    first = token_ids(start).tolist()
    texts = [first + token_ids(n, seed=n).tolist() for n in lengths]
    greedy = {"do_sample": False, "eos_token_id": None, "max_new_tokens": count}
    options = ContinuousBatchingConfig(**{PAGE_SIZE: PAGE}, **settings)
    model.decode_backend = "auto"
    config = GenerationConfig(**greedy, prompt_lookup_num_tokens=num_drafted)
    outs = list(model.generate_batch(texts, config, options).values())
    model.decode_backend = "eager"
    ids = [torch.tensor([text], device=model.device) for text in texts]
    alone = [model.generate(x, **greedy)[0, x.shape[1] :].tolist() for x in ids]
    pairs = zip(texts, outs, alone, strict=True)
    alone = [allowed(model, text, out.generated_tokens, one) for text, out, one in pairs]
    (processor,) = found
    assert isinstance(processor.texts, place)
    return outs, alone, processor


@each_device
def test_prompts_of_different_lengths(device):
    outs, alone, processor = answers(decode_model(device), (3, 40, 9, 33), 4, num_blocks=10)
    assert [out.generated_tokens for out in outs] == alone
    pool = processor.texts.pool
    assert (pool.num_free_rows, pool.num_free_pages) == (pool.num_rows, pool.num_pages)


@each_device
def test_drafts(device, monkeypatch):
    """Right ones and wrong ones, in a step with all texts."""
    monkeypatch.setattr(GroupDrafts, "_value", lambda self, rows, size, length: length)
    kinds, record = set(), recording.decode_step

    def noted(model, kind, *group):
        kinds.add(kind)
        return record(model, kind, *group)

    monkeypatch.setattr(recording, "decode_step", noted)
    outs, alone, processor = answers(
        decode_model(device), (3, 40, 9), 12, num_blocks=10, num_drafted=3
    )
    assert [out.generated_tokens for out in outs] == alone
    assert {kind.num_tokens for kind in kinds} >= {4}
    pool = processor.texts.pool
    assert (pool.num_free_rows, pool.num_free_pages) == (pool.num_rows, pool.num_pages)


@each_device
def test_memory_for_fewer_texts_than_there_are(device, monkeypatch):
    """Texts that grow into pages which there are not go back and are read again."""
    back, set_back = [], requests.RequestProcessor._set_back
    monkeypatch.setattr(
        requests.RequestProcessor,
        "_set_back",
        lambda self, row: (back.append(row), set_back(self, row))[1],
    )
    outs, alone, processor = answers(decode_model(device), (30, 29, 31), 5, num_blocks=4)
    assert back
    assert [out.generated_tokens for out in outs] == alone
    assert processor.texts.pool.num_free_pages == 4


@each_device
def test_a_text_that_outgrows_all_memory(device):
    outs, alone, _ = answers(decode_model(device), (60, 3), 8, num_blocks=2)
    assert outs[0].error == "the text has 65 tokens, for more there is no memory"
    assert outs[0].generated_tokens == alone[0][:5] and outs[1].generated_tokens == alone[1]


@each_device
def test_memory_that_others_take_while_a_prompt_is_read(device):
    """Read in pieces, a prompt finds its pages taken by texts that have grown meanwhile."""
    outs, alone, _ = answers(
        decode_model(device), (31, 30, 70), 6, num_blocks=5, max_batch_tokens=20
    )
    assert [out.generated_tokens for out in outs] == alone


@each_device
@pytest.mark.parametrize("num_blocks", [30, 8])
def test_a_shared_beginning(num_blocks, device, monkeypatch):
    """Read once, its pages are shared; where memory is short, it is given up."""
    monkeypatch.setattr(requests, "PREFIX_TOKENS", PAGE)
    added, add = [], TextPool.add
    monkeypatch.setattr(
        TextPool,
        "add",
        lambda self, *args, **kwargs: (added.append(kwargs["like"]), add(self, *args, **kwargs))[1],
    )
    outs, alone, processor = answers(
        decode_model(device), (5, 9, 31, 2), 4, start=2 * PAGE, num_blocks=num_blocks
    )
    assert [out.generated_tokens for out in outs] == alone
    shared = [like is not None for like in added]
    assert not shared[0] and any(shared)
    pool = processor.texts.pool
    taken = 0 if processor.prefix is None else 2
    assert pool.num_free_pages == num_blocks - taken
    processor.reset()
    assert (pool.num_free_rows, pool.num_free_pages) == (pool.num_rows, pool.num_pages)


# ---- a model that changes -----------------------------------------------------------------------


class Adapted(torch.nn.Module):
    """A linear layer with an adapter, of which only the layer's weight is seen, as PEFT's are."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        size = base.weight.shape[1], base.weight.shape[0]
        self.factor = torch.nn.Linear(*size, bias=False, device=base.weight.device)
        self.factor.to(base.weight.dtype)

    @property
    def weight(self):
        return self.base_layer.weight

    def forward(self, x):
        return self.base_layer(x) + 4 * self.factor(x)


def scale(attention):
    attention.o_proj.weight.data.mul_(-2)


def replace(attention):
    attention.o_proj.weight.data = attention.o_proj.weight.data * -2


def adapt(attention):
    attention.o_proj = Adapted(attention.o_proj)


def merge(attention):
    base, factor = attention.o_proj.base_layer, attention.o_proj.factor
    base.weight.data += 4 * factor.weight.data
    attention.o_proj = base


@each_device
@torch.no_grad()
def test_a_manager_that_is_kept_sees_a_model_that_changes(device):
    """Weights, in place or in others; adapters, which steps do not read; and merged ones."""
    model = decode_model(device)
    greedy = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 4}
    options = ContinuousBatchingConfig(page_size=PAGE, num_blocks=4)
    text, last = token_ids(5).tolist(), None
    changes = {None: PooledTexts, scale: PooledTexts, replace: PooledTexts}
    for change, place in (changes | {adapt: OwnCaches, merge: PooledTexts}).items():
        if change is not None:
            change(model.model.layers[1].self_attn)
        model.decode_backend = "auto"
        (out,) = model.generate_batch(
            [text], GenerationConfig(**greedy), options, persistent_manager=True
        ).values()
        model.decode_backend = "eager"
        ids = torch.tensor([text], device=model.device)
        alone = model.generate(ids, **greedy)[0, 5:].tolist()
        assert out.generated_tokens == allowed(model, text, out.generated_tokens, alone), change
        # merged, the model is what it was
        assert (out.generated_tokens == last) == (change is merge), "no change could be seen"
        last = out.generated_tokens
        texts = model._cached_continuous_batching_manager.batch_processor.texts
        assert isinstance(texts, place), change
    model.destroy_cached_continuous_batching_manager()


@each_device
def test_hooks_that_come_while_texts_decode(device, monkeypatch):
    """The texts are read again, layer by layer from there on, and so are prompts half read."""
    model, calls, steps = decode_model(device), [], []
    step = PooledTexts.step

    def hooked(self, rows, ids):
        steps.append(len(rows))
        if len(steps) == 2:
            linear = model.model.layers[1].self_attn.o_proj
            linear.register_forward_pre_hook(lambda *args: calls.append(1))
        return step(self, rows, ids)

    monkeypatch.setattr(PooledTexts, "step", hooked)
    outs, alone, _ = answers(
        model,
        (5, 9, 70),
        4,
        place=OwnCaches,
        num_blocks=10,
        max_batch_tokens=20,
    )
    assert [out.generated_tokens for out in outs] == alone
    assert len(steps) == 2 and calls


@each_device
def test_kernels_that_cannot_be_built_leave_the_layers(device, monkeypatch):
    def fail(self, *args):
        raise TritonError("out of resources")

    monkeypatch.setattr(recording.FewRowsStep, "__init__", fail)
    outs, alone, _ = answers(decode_model(device), (5, 9), 3, place=OwnCaches, num_blocks=4)
    assert [out.generated_tokens for out in outs] == alone


def test_a_pool_is_of_one_dtype():
    model = decode_model("cpu")
    texts = PooledTexts(model, 2, 3, PAGE, 0.5)
    model.to(torch.bfloat16)
    assert texts.step([0], token_ids(1)) is None
