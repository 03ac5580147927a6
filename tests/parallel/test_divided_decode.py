"""Tensor parallelism by the recorded step beside one process: with gloo under Triton's interpreter,
with two GPUs as CUDA graphs.

    TRITON_INTERPRET=1 python -m pytest tests/parallel/test_divided_decode.py
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from builders import token_ids
from decode_models import DEVICES, allowed, check, decode_model
from processes import fits, here, run
from transformers.distributed import DistributedConfig

from kimi_linear import KimiLinearCache, KimiLinearForCausalLM
from kimi_linear.decode import few_rows, obstacles, step
from kimi_linear.decode.graph import drop_recordings, has_recording
from kimi_linear.parallel import sums
from kimi_linear.parallel.own_part import division_obstacle

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.interpreted,
    pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed"),
]
FIELDS: dict[str, Any] = {  # three heads of MLA and two of KDA for each of two processes
    "vocab_size": 100,
    "num_attention_heads": 6,
    "intermediate_size": 48,
    "moe_intermediate_size": 48,
    "num_shared_experts": 2,
    "linear_attn_config": {
        "full_attn_layers": [2],
        "num_heads": 4,
        "head_dim": 16,
        "short_conv_kernel_size": 4,
    },
    "num_hidden_layers": 2,
}
MODELS = {"model": {}, "tied": {"tie_word_embeddings": True}}


def load(folder: str, name: str, is_divided: bool = True) -> Any:
    """A saved model, divided among all processes or whole on each."""
    if not torch.cuda.is_available():  # see `small_grids`
        few_rows.PROGRAMS, step.SPLITS = 4, 6
        obstacles.DEVICE_TYPES, obstacles.DTYPES = ("cpu",), (torch.float32,)
    model = KimiLinearForCausalLM.from_pretrained(
        f"{folder}/{name}",
        distributed_config=DistributedConfig(tp_plan="auto") if is_divided else None,
        attn_implementation="sdpa",
        dtype="auto",
    )
    if not torch.cuda.is_available():  # as a file lies in memory, tensors are not aligned
        model = model.double().float()
    return model if is_divided else here(model)


def steps_equal(divided: Any, plain: Any, num_rows: int, num_tokens: int = 1, **inputs: Any):
    """Logits of three steps behind a prompt, one with tokens taken back before it: of the divided
    model by recorded steps, of the plain one layer by layer."""
    divided.decode_backend, plain.decode_backend = "graph", "eager"
    ids, mask = here(token_ids(num_rows, 7)), inputs.get("attention_mask")
    caches = [KimiLinearCache(divided.config) for _ in "ab"]
    both = list(zip((divided, plain), caches, strict=True))
    for model, cache in both:
        model(ids, cache=cache, attention_mask=mask)
    for i in range(3):
        if i == 2 and mask is None:
            for cache in caches:
                cache.crop(-1)
        new = here(token_ids(num_rows, num_tokens, seed=10 + i))
        if mask is not None:
            mask = torch.nn.functional.pad(mask, (0, num_tokens), value=1)
        found, expected = (
            model(new, cache=cache, attention_mask=mask).logits for model, cache in both
        )
        check(found, expected, f"{num_rows} rows, step {i}")
        everywhere = [torch.empty_like(found) for _ in range(dist.get_world_size())]
        dist.all_gather(everywhere, found.contiguous())
        assert all(torch.equal(found, each) for each in everywhere)
    divided.decode_backend = plain.decode_backend = "auto"


@torch.no_grad()
def steps_of_a_part(rank: int, world: int, folder: str) -> None:
    for name in MODELS:
        divided, plain = load(folder, name), load(folder, name, is_divided=False)
        for num_rows in (1, 5):
            steps_equal(divided, plain, num_rows)
            assert has_recording(divided, num_rows)
    steps_equal(divided, plain, 1, num_tokens=3)
    steps_equal(divided, plain, 2, num_tokens=4)
    mask = here(torch.ones(3, 7, dtype=torch.int64))
    mask[0, :4] = 0
    steps_equal(divided, plain, 3, attention_mask=mask)
    drop_recordings(divided)  # those of NCCL's sums keep its group from ending


@torch.no_grad()
def texts_of_generate(rank: int, world: int, folder: str) -> None:
    """Ids of plain `generate()`, as one process has them."""
    divided, plain = load(folder, "model"), load(folder, "model", is_divided=False)
    assert divided.decode_backend == "auto"
    for num_rows in (1, 4):
        ids = here(token_ids(num_rows, 9))
        options: Any = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
        texts = [
            each.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=96, **options)
            for each in (divided, plain)
        ]
        found, alone = (text[:, ids.shape[1] :].tolist() for text in texts)
        for prompt, own, other in zip(ids.tolist(), found, alone, strict=True):
            assert own == allowed(plain, prompt, own, other)
        assert has_recording(divided, num_rows)
    drop_recordings(divided)


@torch.no_grad()
def group_sums(rank: int, world: int, folder: str) -> None:
    """As on GPUs that do not read each other's memory."""
    sums.USES_SHARED_MEMORY = False
    steps_of_a_part(rank, world, folder)
    sums.USES_SHARED_MEMORY = True


@torch.no_grad()
def changed_weights_are_seen(rank: int, world: int, folder: str) -> None:
    """In place, and in another place, in the middle of a text."""
    divided, plain = load(folder, "model"), load(folder, "model", is_divided=False)
    steps_equal(divided, plain, 1)
    for model in (divided, plain):
        weight = model.model.layers[1].self_attn.o_proj.weight
        weight.mul_(-2)
    steps_equal(divided, plain, 1)
    for model in (divided, plain):
        projection = model.model.layers[0].self_attn.o_proj
        projection.weight = torch.nn.Parameter(projection.weight * -2)
    steps_equal(divided, plain, 1)
    drop_recordings(divided)


@torch.no_grad()
def obstacles_are_named(rank: int, world: int, folder: str) -> None:
    """Found by one process, they hold for all."""
    divided = load(folder, "odd_vocabulary")
    assert "is divided unequally among 2 processes" in division_obstacle(divided)
    divided = load(folder, "model")
    divided.decode_backend = "graph"
    cache = KimiLinearCache(divided.config)
    divided(here(token_ids(1, 5)), cache=cache)
    other = cache.copy()
    if rank == 1:
        norm = divided.model.norm
        norm.weight = torch.nn.Parameter(norm.weight.double())
    message = "model.norm.weight is torch.float64" if rank else "another process has an obstacle"
    with pytest.raises(ValueError, match=message):
        divided(here(token_ids(1, 1)), cache=other)
    divided = load(folder, "model")
    linear = divided.model.layers[1].self_attn.o_proj
    linear.weight = torch.nn.Parameter(linear.weight.full_tensor())
    message = "layers.1.self_attn.o_proj.weight is whole, others are divided"
    assert message in division_obstacle(divided)


@pytest.mark.parametrize("where", DEVICES)
def test_two_processes_decode_as_one(tmp_path: Path, where: str):
    """Logits, equal to the bit on both processes, and ids of `generate()`."""
    if not fits(2, where):
        pytest.skip("needs two GPUs")
    for name, fields in MODELS.items():
        model = decode_model("cpu", **{**FIELDS, **fields})
        model.lm_head.weight.data.mul_(40)  # far from ties
        model.to(torch.bfloat16 if where == "cuda" else torch.float32)
        model.save_pretrained(tmp_path / name)
    odd = decode_model("cpu", **{**FIELDS, "vocab_size": 101})
    odd.save_pretrained(tmp_path / "odd_vocabulary")
    functions: list[Any] = [steps_of_a_part, texts_of_generate, changed_weights_are_seen]
    functions += [obstacles_are_named]
    if where == "cuda":
        functions += [group_sums]
    run(2, functions, tmp_path, where)
