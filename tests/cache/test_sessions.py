"""Caches in files: another process goes on as if it had read the text itself."""

import json
import resource
from concurrent.futures import ThreadPoolExecutor

import commands
import pytest
import torch
from builders import PATTERNS, tiny_model, token_ids
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tolerance import assert_close
from transformers import DynamicCache

from kimi_linear import KimiLinearCache
from kimi_linear.cache import sessions
from kimi_linear.cache.sessions import keep_prefix, load_session, model_fingerprint, save_session

pytestmark = pytest.mark.core

COMMON = dict(max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=96)

PROCESS = """
import sys, torch
from kimi_linear import KimiLinearForCausalLM
folder, session = sys.argv[1:]
model = KimiLinearForCausalLM.from_pretrained(folder).eval()
cache, ids = model.load_session(session)
turn = torch.cat([ids, torch.arange(5)[None].expand(len(ids), -1)], dim=1)
out = model.generate(turn, cache=cache, attention_mask=torch.ones_like(turn),
                     max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=96)
print(out.tolist())
"""


@pytest.fixture(params=PATTERNS, scope="module")
def model(request):
    return tiny_model(request.param)


def read(model, cache, ids, **kwargs):
    with torch.no_grad():
        return model(ids, cache=cache, **kwargs).logits


def test_another_process_goes_on(tmp_path):
    model, ids = tiny_model(), token_ids(2, 40)
    model.save_pretrained(tmp_path / "model")
    cache = KimiLinearCache(model.config)
    read(model, cache, ids)
    model.save_session(tmp_path / "s.safetensors", cache, ids)
    run = commands.run(["-c", PROCESS, tmp_path / "model", tmp_path / "s.safetensors"])
    assert run.returncode == 0, run.stderr
    turn = torch.cat([ids, torch.arange(5)[None].expand(2, -1)], dim=1)
    assert run.stdout.splitlines()[-1] == str(model.generate(turn, **COMMON).tolist())


@pytest.mark.parametrize("how", ["plain", "cropped", "repeated", "offloaded", "padded"])
def test_what_comes_back_is_what_was_there(model, tmp_path, how):
    ids, more = token_ids(2, 30), token_ids(2, 6, seed=2)
    cache = KimiLinearCache(model.config, rollback_tokens=10, offload=how == "offloaded")
    mask = torch.ones(2, 36, dtype=torch.long)
    if how == "repeated":
        ids = ids[:1].expand(2, -1)
        read(model, cache, ids[:1])
        cache.batch_repeat_interleave(2)
    else:
        if how == "padded":
            mask[0, 3:9] = 0
        read(model, cache, ids, attention_mask=mask[:, :30])
    if how == "cropped":
        cache.crop(-4)
        ids = ids[:, :26]
    path = tmp_path / "s.safetensors"
    save_session(path, cache, model, ids)
    other, other_ids = load_session(path, model)
    assert torch.equal(other_ids, ids) and other.get_seq_length() == ids.shape[1]
    mask = mask[:, : ids.shape[1] + 6]
    for _ in range(2):  # and once more, after going back
        expected = read(model, cache, more, attention_mask=mask)
        got = read(model, other, more, attention_mask=mask)
        assert_close(got, expected, torch.float32)  # latents lie in other segments
        cache.crop(-6)
        other.crop(-6)


def test_rows_that_share_a_prefix_share_it_in_the_file(tmp_path):
    model = tiny_model("all_mla")
    sizes = []
    for rows in (1, 4):
        cache = KimiLinearCache(model.config)
        read(model, cache, token_ids(1, 200))
        cache.batch_repeat_interleave(rows)
        save_session(tmp_path / f"{rows}", cache, model)
        sizes.append((tmp_path / f"{rows}").stat().st_size)
    assert abs(sizes[1] - sizes[0]) < 200


def test_sessions_of_other_models_and_dtypes_are_refused(tmp_path):
    model, ids = tiny_model(), token_ids(1, 10)
    cache = KimiLinearCache(model.config)
    read(model, cache, ids)
    path = tmp_path / "s.safetensors"
    save_session(path, cache, model)
    assert load_session(path, model).input_ids is None
    with pytest.raises(ValueError, match="another model"):
        load_session(path, tiny_model(seed=1))
    with pytest.raises(ValueError, match="another model"):
        load_session(path, tiny_model("alternating"))
    with pytest.raises(ValueError, match=r"torch\.float32.*torch\.bfloat16"):
        load_session(path, tiny_model().to(torch.bfloat16))
    save_file({"x": ids}, tmp_path / "other")
    with pytest.raises(ValueError, match="format None"):
        load_session(tmp_path / "other", model)
    (tmp_path / "rubbish").write_bytes(b"rubbish" * 10)
    with pytest.raises(ValueError, match="not a safetensors file"):
        load_session(tmp_path / "rubbish", model)


def test_one_changed_weight_changes_the_fingerprint():
    model = tiny_model()
    before = model_fingerprint(model)
    assert model_fingerprint(tiny_model()) == before
    with torch.no_grad():
        model.model.layers[2].self_attn.A_log[0, 0, 0, 0] += 1e-3
    assert model_fingerprint(model) != before


def test_what_cannot_be_saved_is_refused_and_leaves_the_old_file(tmp_path):
    model, ids = tiny_model(), token_ids(1, 10)
    cache = KimiLinearCache(model.config)
    path = tmp_path / "s.safetensors"
    with pytest.raises(ValueError, match="cache is empty"):
        save_session(path, cache, model)
    read(model, cache, ids)
    save_session(path, cache, model, ids)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="input_ids has shape"):
        save_session(path, cache, model, ids[:, :9])
    with pytest.raises(ValueError, match="DynamicCache"):
        save_session(path, DynamicCache(), model)
    assert path.read_bytes() == before and [x.name for x in tmp_path.iterdir()] == [path.name]
    assert load_file(path)["input_ids"].tolist() == ids.tolist()


@pytest.mark.parametrize(("same", "kept"), [(30, 30), (27, 27), (15, 0), (0, 0)])
def test_keep_prefix(same, kept):
    """What is beyond the kept states is read again from the beginning."""
    model = tiny_model()
    ids = token_ids(1, 30)
    cache = KimiLinearCache(model.config, rollback_tokens=8)
    for t in range(30):
        read(model, cache, ids[:, t : t + 1])
    text = torch.cat([ids[:, :same], (ids[:, same : same + 1] + 1) % 94, token_ids(1, 5)], dim=1)
    assert keep_prefix(cache, ids, text) == kept == cache.get_seq_length()
    with torch.no_grad():
        expected = model(text, use_cache=False).logits[:, kept:]
    assert_close(read(model, cache, text[:, kept:]), expected, torch.float32)


def test_keep_prefix_leaves_a_token_to_read():
    model, ids = tiny_model(), token_ids(1, 30)
    cache = KimiLinearCache(model.config)
    read(model, cache, ids)
    assert keep_prefix(cache, ids, ids) == 29


def test_read_session_reads_a_long_text_once(tmp_path, monkeypatch):
    """A text and a question, then another question: only what differs is read again."""
    model, path = tiny_model(), tmp_path / "book.session"
    book = token_ids(1, 300)
    read_counts = []
    forward = type(model).forward

    def counting(self, input_ids=None, **kwargs):
        read_counts.append(input_ids.shape[1])
        return forward(self, input_ids=input_ids, **kwargs)

    for seed, expected in ((1, 309), (2, 9), (2, 0)):
        ids = torch.cat([book, token_ids(1, 10, seed=seed)], dim=1)
        with monkeypatch.context() as patch:
            patch.setattr(type(model), "forward", counting)
            cache = model.read_session(path, ids)
        assert sum(read_counts) == expected
        read_counts.clear()
        assert cache.get_seq_length() == 309
        got = model.generate(ids, cache=cache, **COMMON).tolist()
        assert got == model.generate(ids, **COMMON).tolist()
    save_session(path, cache, model)
    with pytest.raises(ValueError, match="holds no input_ids"):
        model.read_session(path, ids)


@pytest.mark.parametrize("how", ["full", "no folder"])
def test_what_was_read_is_not_lost_where_it_cannot_be_written(tmp_path, monkeypatch, how):
    """Bug: a disk that was full after an hour's reading cost the hour."""
    model, ids = tiny_model(), token_ids(1, 30)
    path = tmp_path / ("absent" if how == "no folder" else ".") / "book.session"
    warned = []
    monkeypatch.setattr(sessions.logger, "warning", warned.append)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if how == "full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        cache = model.read_session(path, ids)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert cache.get_seq_length() == 29 and not list(tmp_path.iterdir())
    assert len(warned) == 1 and str(path) in warned[0]
    got = model.generate(ids, cache=cache, **COMMON).tolist()
    assert got == model.generate(ids, **COMMON).tolist()


def rewritten(path, change):
    """The file with tensors, metadata and a right checksum after `change(tensors, numbers)`."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    numbers = json.loads(metadata["layers"])
    change(tensors, numbers)
    metadata |= {"layers": json.dumps(numbers), "checksum": sessions._checksum(tensors)}
    save_file(tensors, path, metadata)


def put(name, value):
    return lambda tensors, numbers: numbers[0].update({name: value})


DAMAGE = {
    "an attribute of the layer": put("crop", "mine"),
    "a huge count": lambda tensors, numbers: [n.update(num_tokens=10**30) for n in numbers],
    "a number as a flag": put("is_stale", 1),
    "a flag as a number": put("rollback_tokens", True),
    "a negative number": put("rollback_tokens", -1),
    "room for all memory": lambda tensors, numbers: numbers[3].update(reserve_tokens=10**12),
    "a log that is not there": put("num_logged", 3),
    "layers of other lengths": put("num_tokens", 4),
    "a missing layer": lambda tensors, numbers: numbers.pop(),
    "a state of another size": lambda tensors, numbers: tensors.update(
        {"layers.0.recurrent_state": torch.zeros(1, 2, 16, 8)}
    ),
    "a missing state": lambda tensors, numbers: tensors.pop("layers.0.conv_state"),
    "integer latents": lambda tensors, numbers: tensors.update(
        {"layers.3.latents.0": torch.zeros(1, 7, 26, dtype=torch.int32)}
    ),
    "a tensor of nobody": lambda tensors, numbers: tensors.update(more=torch.zeros(2)),
    "ids of no vocabulary": lambda tensors, numbers: tensors.update(
        input_ids=torch.full((1, 7), 10**6)
    ),
}


@pytest.mark.parametrize("change", DAMAGE.values(), ids=DAMAGE)
def test_what_a_file_says_is_held_against_the_model(tmp_path, change):
    model, path = tiny_model(), tmp_path / "it"
    cache, ids = KimiLinearCache(model.config, rollback_tokens=0), token_ids(1, 7)
    with torch.no_grad():
        model(ids, cache=cache)
    save_session(path, cache, model, ids)
    rewritten(path, lambda tensors, numbers: None)
    assert load_session(path, model).cache.get_seq_length() == 7
    rewritten(path, change)
    with pytest.raises(ValueError, match="is damaged: .* is not allowed: it must be"):
        load_session(path, model)


def test_a_flipped_bit_is_noticed(tmp_path):
    model, path = tiny_model(), tmp_path / "it"
    cache = KimiLinearCache(model.config)
    with torch.no_grad():
        model(token_ids(1, 7), cache=cache)
    save_session(path, cache, model)
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged: checksum"):
        load_session(path, model)


def test_threads_save_to_one_path(tmp_path):
    model, path = tiny_model(), tmp_path / "it"
    cache = KimiLinearCache(model.config)
    with torch.no_grad():
        model(token_ids(1, 7), cache=cache)
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(save_session, path, cache, model) for _ in range(40)]:
            done.result()
    assert [file.name for file in tmp_path.iterdir()] == ["it"]
    assert load_session(path, model).cache.get_seq_length() == 7
