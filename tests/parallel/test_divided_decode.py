"""Tensor parallelism by the recorded step beside one process: with gloo under Triton's interpreter,
with two GPUs as CUDA graphs.

    TRITON_INTERPRET=1 python -m pytest tests/parallel/test_divided_decode.py
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from builders import token_ids
from decode_models import DEVICES, check_logits, choices, decode_model
from measuring.models import build, build_divided
from processes import device, fits, here, run, whole
from torch.nn import Parameter
from torch.nn.functional import pad
from transformers.distributed import DistributedConfig

from kimi_linear import KimiLinearCache, KimiLinearForCausalLM
from kimi_linear.decode import divided, few_rows, graph, obstacles, step
from kimi_linear.parallel import sums
from kimi_linear.parallel.own_part import division_obstacle

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.interpreted,
    pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed"),
]
FIELDS: dict[str, Any] = {  # of two processes each has three heads of MLA and two of KDA
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
}
MEMORISED = 4, 33  # rows and tokens
KERNELS = {divided.LinkedFewRowsStep, divided.LinkedManyRowsStep}
OTHERS = {divided.DividedFewRowsStep, divided.DividedManyRowsStep}


class FileMemory:
    """As `SharedMemory`, of processes on a CPU: a file for each."""

    folder = ""
    count = 0

    def __init__(self, shape: Any, dtype: torch.dtype, device: torch.device, group: Any) -> None:
        FileMemory.count += 1
        self.name, self.shape, self.dtype = f"memory_{self.count}", shape, dtype
        self.own = self.of(dist.get_rank())
        dist.barrier()

    def of(self, rank: int) -> torch.Tensor:
        size = torch.Size(self.shape).numel()
        path = f"{self.folder}/{self.name}_{rank}"
        return torch.from_file(path, shared=True, size=size, dtype=self.dtype).view(self.shape)

    def settle(self) -> None:
        dist.barrier()


def load(folder: str, name: str, is_divided: bool = True) -> Any:
    """A saved model, divided among all processes or whole on each."""
    model = KimiLinearForCausalLM.from_pretrained(
        f"{folder}/{name}",
        distributed_config=DistributedConfig(tp_plan="auto") if is_divided else None,
        attn_implementation="sdpa",
        dtype="auto",
    )
    if torch.cuda.is_available():
        return model if is_divided else here(model)
    few_rows.PROGRAMS, step.SPLITS = 4, 6  # see `small_grids`
    obstacles.DEVICE_TYPES, obstacles.DTYPES = ("cpu",), (torch.float32,)
    sums.SHARING_DEVICES, sums.SharedMemory, FileMemory.folder = ("cpu",), FileMemory, folder
    return model.double().float()  # tensors of a mapped file are not aligned


def steps_equal(ours: Any, plain: Any, num_rows: int, num_tokens: int = 1, mask: Any = None):
    """Logits of three steps behind a prompt, without a mask one of them behind a token taken back:
    of the divided model by recorded steps, of the plain one layer by layer."""
    ours.decode_backend, plain.decode_backend = "graph", "eager"
    both = [(model, KimiLinearCache(model.config)) for model in (ours, plain)]
    ids = here(token_ids(num_rows, 7))
    for model, cache in both:
        model(ids, cache=cache, attention_mask=mask)
    for i in range(3):
        if mask is not None:
            mask = pad(mask, (0, num_tokens), value=1)
        elif i == 2:
            for _, cache in both:
                cache.crop(-1)
        new = here(token_ids(num_rows, num_tokens, seed=10 + i))
        found = ours(new, cache=both[0][1], attention_mask=mask).logits
        with choices(plain) as margins:
            expected = plain(new, cache=both[1][1], attention_mask=mask).logits
        check_logits(found, expected, margins, f"{num_rows} rows, step {i}")
        everywhere = [torch.empty_like(found) for _ in range(dist.get_world_size())]
        dist.all_gather(everywhere, found.contiguous())
        assert all(torch.equal(found, each) for each in everywhere)
    ours.decode_backend = plain.decode_backend = "auto"


@contextmanager
def two_models(way: str, folder: str, name: str) -> Iterator[tuple[Any, Any]]:
    """The divided model, whose steps sum in this way, and the plain one."""
    sums.WAY = way
    ours = load(folder, name)
    try:
        yield ours, load(folder, name, is_divided=False)
    finally:  # recordings of NCCL's sums keep its group from ending
        graph.drop_recordings(ours)


@torch.no_grad()
def equal_steps(way: str, folder: str, kinds: set[type]) -> None:
    mask = here(torch.ones(4, 7, dtype=torch.int64))
    mask[0, :4] = 0
    with two_models(way, folder, "model") as models:
        for num_rows in (1, 5):
            steps_equal(*models, num_rows)
        assert {type(x) for x in graph.recorded_steps(models[0])} == kinds
        steps_equal(*models, 1, num_tokens=3)
        steps_equal(*models, 2, num_tokens=4)
        steps_equal(*models, 4, mask=mask)


@torch.no_grad()
def equal_texts(way: str, folder: str) -> None:
    """Ids of plain `generate()` of a trained model."""
    text = token_ids(*MEMORISED)
    count = 24 if torch.cuda.is_available() else 4
    options: Any = {"max_new_tokens": count, "do_sample": False, "eos_token_id": None}
    with two_models(way, folder, "trained") as models:
        models[0].decode_backend = "graph"
        for num_rows in (1, 4):
            ids, rest = here(text[:num_rows]).split([9, text.shape[1] - 9], dim=1)
            options |= {"attention_mask": torch.ones_like(ids), "pad_token_id": 96}
            for model in models:
                assert torch.equal(model.generate(ids, **options)[:, 9:], rest[:, :count])
            assert graph.has_recording(models[0], num_rows)


@torch.no_grad()
def no_further_from_float32(rank: int, world: int, folder: str) -> None:
    """The recorded step than the layers of the divided model."""
    for way in sums.WAYS:
        with two_models(way, folder, "model") as (ours, plain):
            errors, exact = {}, plain.float()
            for num_rows in (1, 5):
                ids, new = here(token_ids(num_rows, 7)), here(token_ids(num_rows, 1, seed=10))
                for backend in ("eager", "graph"):
                    both = []
                    for model in (ours, exact):
                        cache = KimiLinearCache(model.config)
                        model(ids, cache=cache)
                        model.decode_backend = backend if model is ours else "eager"
                        both.append(model(new, cache=cache).logits.float())
                    errors[backend] = (both[0] - both[1]).square().mean().sqrt().item()
                assert errors["graph"] <= 1.5 * errors["eager"], (way, num_rows, errors)


def memorised(model: Any) -> Any:
    """The model, trained on one text until it has it by heart."""
    text, optimizer = token_ids(*MEMORISED), torch.optim.AdamW(model.parameters(), lr=1e-2)
    model.train()
    for _ in range(40):
        optimizer.zero_grad()
        loss = model(input_ids=text, labels=text, use_cache=False).loss
        loss.backward()
        optimizer.step()
    assert loss < 0.1, loss
    return model.eval()


def sums_by_kernels(rank: int, world: int, folder: str) -> None:
    equal_steps("kernels", folder, KERNELS)
    equal_texts("kernels", folder)


def sums_by_the_operator(rank: int, world: int, folder: str) -> None:
    equal_steps("operator", folder, OTHERS)
    equal_texts("operator", folder)


def sums_by_the_group(rank: int, world: int, folder: str) -> None:
    equal_steps("group", folder, OTHERS)


@torch.no_grad()
def changed_weights_are_seen(rank: int, world: int, folder: str) -> None:
    """In place, and in another place, in the middle of a text."""
    with two_models("kernels", folder, "model") as models:
        steps_equal(*models, 1)
        for model in models:
            model.model.layers[1].self_attn.o_proj.weight.mul_(-2)
        steps_equal(*models, 1)
        for model in models:
            projection = model.model.layers[0].self_attn.o_proj
            projection.weight = Parameter(projection.weight * -2)
        steps_equal(*models, 1)


@torch.no_grad()
def obstacles_are_named(rank: int, world: int, folder: str) -> None:
    """Found by one process, they hold for all."""
    try:
        reason = division_obstacle(load(folder, "odd_vocabulary"))
    except ValueError as error:  # 5.17 does not divide it
        assert "`lm_head` (101) must be divisible" in str(error)
    else:
        assert "embed_tokens.weight [101, 72] is divided unequally among 2 processes" in reason
    ours = load(folder, "model")
    cache = KimiLinearCache(ours.config)
    for num_tokens in (5, 1):
        ours(here(token_ids(1, num_tokens)), cache=cache)
    assert not graph.recorded_steps(ours)  # which nobody has asked for
    ours.decode_backend, cache = "graph", KimiLinearCache(ours.config)
    ours(here(token_ids(1, 5)), cache=cache)
    if rank == 1:
        norm = ours.model.norm
        norm.weight = Parameter(norm.weight.double())
    message = "model.norm.weight is torch.float64" if rank else "another process has an obstacle"
    with pytest.raises(ValueError, match=message):
        ours(here(token_ids(1, 1)), cache=cache)
    ours = load(folder, "model")
    linear = ours.model.layers[1].self_attn.o_proj
    linear.weight = Parameter(linear.weight.full_tensor())
    message = "layers.1.self_attn.o_proj.weight is whole, others are divided"
    assert message in division_obstacle(ours)


def drawn_parts_are_of_the_whole(rank: int, world: int, folder: str) -> None:
    """The weights with which `benchmarks/tensor_parallel.py` compares."""
    config, options = load(folder, "model").config, {"device": device(), "dtype": torch.float32}
    ours = build_divided(config, world, **options).state_dict()
    expected = build("ours", config, **options).state_dict()
    assert ours.keys() == expected.keys()
    for name, x in expected.items():
        assert torch.equal(whole(ours[name]).cpu(), x.cpu()), name


@pytest.mark.parametrize("where", DEVICES)
def test_two_processes_decode_as_one(tmp_path: Path, where: str):
    """Logits, equal to the bit on both processes, and ids of `generate()`."""
    if not fits(2, where):
        pytest.skip("needs two GPUs")
    models = {
        "model": decode_model("cpu", **FIELDS),
        "trained": memorised(decode_model("cpu", **FIELDS, tie_word_embeddings=True)),
        "odd_vocabulary": decode_model("cpu", **{**FIELDS, "vocab_size": 101}),
    }
    for name, model in models.items():
        model.to(torch.bfloat16 if where == "cuda" else torch.float32)
        model.save_pretrained(tmp_path / name)
    functions = [sums_by_kernels, sums_by_the_group, changed_weights_are_seen]
    functions += [obstacles_are_named, drawn_parts_are_of_the_whole]
    functions += [sums_by_the_operator, no_further_from_float32] if where == "cuda" else []
    run(2, functions, tmp_path, where)
