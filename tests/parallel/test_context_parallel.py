"""One row's tokens divided among processes, beside one process: with gloo on a CPU, with NCCL on
two GPUs."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from builders import tiny_model, token_ids
from processes import DEVICE_TYPES, assert_same, device, fits, here, run
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import DynamicCache

pytestmark = [
    pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed"),
]
TOKENS = 48
# Lengths of the row's sequences: across one and several borders of processes, ending and beginning
# at them, one or two tokens behind or before them, inside one process, and all together.
ROWS = {
    "alone": [48],
    "across": [5, 30, 13],
    "at_borders": [12, 12, 24],
    "near_borders": [11, 2, 12, 13, 10],
    "inside": [13, 3, 4, 2, 1, 1, 24],
}
FIELDS: dict[str, Any] = {"router_aux_loss_coef": 0.1, "router_z_loss_coef": 0.01}


def row(lengths: list[int]) -> dict[str, torch.Tensor]:
    ids = token_ids(1, TOKENS)
    labels = ids.clone()
    labels[0, 20:25] = -100
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    return here({"input_ids": ids, "labels": labels, "position_ids": positions})


def pair(pattern: str, **fields: Any) -> tuple[Any, Any]:
    """The same model twice, once with its tokens divided."""
    model, plain = (here(tiny_model(pattern, **FIELDS, **fields)).train() for _ in range(2))
    model.set_context_parallel(dist.group.WORLD)
    return model, plain


def check_gradients(model: Any, plain: Any, world: int, what: str) -> None:
    """That the mean of the processes' gradients is the row's; they are deleted."""
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        if hasattr(ours.grad, "full_tensor"):
            grad = ours.grad.full_tensor()  # FSDP has averaged it
        else:
            dist.all_reduce(ours.grad)
            grad = ours.grad / world
        assert_same(grad, theirs.grad, f"{what}, {name}")
    model.zero_grad()
    plain.zero_grad()


def same_gradients(rank: int, world: int, folder: str) -> None:
    own = slice(rank * TOKENS // world, (rank + 1) * TOKENS // world)
    model, plain = pair("alternating" if world == 2 else "mla_first")
    for name, lengths in ROWS.items():
        if name == "across":
            model.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            model.gradient_checkpointing_disable()
        counts = {"num_items_in_batch": here(torch.tensor(7))} if name == "inside" else {}
        outputs = [each(**row(lengths), **counts) for each in (model, plain)]
        assert_same(outputs[0].loss.detach(), outputs[1].loss.detach(), f"{name}, loss")
        logits = [outputs[0].logits[:], outputs[1].logits[:, own]]
        assert_same(*(x.detach() for x in logits), f"{name}, logits")
        for each in outputs:
            each.loss.backward()
        check_gradients(model, plain, world, name)


def under_fsdp(rank: int, world: int, folder: str) -> None:
    model, plain = pair("hybrid")
    mesh = init_device_mesh(device().type, (world,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for each in (model, plain):
        each(**row(ROWS["near_borders"])).loss.backward()
    check_gradients(model, plain, world, "FSDP2")


def without_gradients(rank: int, world: int, folder: str) -> None:
    """The backbone's hidden states from embeddings; and turning it off again."""
    model, plain = pair("hybrid")
    embeds = here(torch.randn(1, TOKENS, 40, generator=torch.Generator().manual_seed(3)))
    with torch.no_grad():
        ours, theirs = (
            each.eval().model(inputs_embeds=embeds).last_hidden_state for each in (model, plain)
        )
        own = slice(rank * TOKENS // world, (rank + 1) * TOKENS // world)
        assert_same(ours, theirs[:, own], "hidden states")
        model.set_context_parallel(None)
        assert torch.equal(model.model(inputs_embeds=embeds).last_hidden_state, theirs)


def refuses(rank: int, world: int, folder: str) -> None:
    model, _ = pair("hybrid")
    ids, mask = here(token_ids(1, TOKENS)), here(torch.ones(1, TOKENS))
    model(ids, attention_mask=mask)
    mask[0, 0] = 0
    calls: list[tuple[dict[str, Any], str]] = [
        ({"input_ids": here(token_ids(2, TOKENS))}, "the batch size is 2, .* it must be 1"),
        ({"input_ids": ids[:, :-1]}, f"has {TOKENS - 1} tokens.* a multiple of {world} processes"),
        ({"input_ids": ids[:, :world]}, f"has {world} tokens, .* at least 3 tokens for each"),
        ({"input_ids": ids, "attention_mask": mask}, "attention_mask has zeros.* all ones"),
        ({"input_ids": ids, "cache": DynamicCache()}, "cache .* is given"),
        ({"input_ids": ids, "use_cache": True}, "use_cache is given.* it must be left out"),
    ]
    for inputs, message in calls:
        with pytest.raises(ValueError, match=message):
            model(**inputs)
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="attn_implementation='eager'.* it must be 'sdpa'"):
        model(ids)


@pytest.mark.parametrize("device_type", DEVICE_TYPES)
def test_two_and_four_processes_equal_one(tmp_path: Path, device_type: str):
    functions = [same_gradients, under_fsdp, without_gradients, refuses]
    run(2, functions, tmp_path, device_type)
    if fits(4, device_type):
        run(4, [same_gradients], tmp_path, device_type)
