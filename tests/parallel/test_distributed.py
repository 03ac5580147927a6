"""Training on several processes by PyTorch's `fully_shard`, beside one process, and by DDP from a
checkpoint on, beside an uninterrupted run: with gloo on a CPU, the first with NCCL on GPUs too.

What fails in a process is raised here. Processes are started twice only: each imports everything.
"""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import train
import transformers
from builders import SMALL_FIELDS, tiny_model, token_ids
from learning.optimizers import make_optimizer
from packaging.version import Version
from processes import DEVICE_TYPES, assert_same, assert_same_gradients, device, fits, here, run
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers.distributed import DistributedConfig

from kimi_linear import KimiLinearForCausalLM
from kimi_linear.training.parameter_groups import parameter_groups

pytestmark = [
    pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed"),
]
ROWS, TOKENS = 4, 24
WHOLE = StateDictOptions(full_state_dict=True)
# Older ones look for an optimizer's state on "cpu:0", which torch does not know.
TRAINER_RESUMES = Version(transformers.__version__) >= Version("5.23")


def sharded(world: int, seed: int = 0) -> Any:
    model = here(tiny_model(seed=seed)).train()
    mesh = init_device_mesh(device().type, (world,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def batch() -> dict[str, torch.Tensor]:
    """Packed rows: two sequences each, of different lengths."""
    ids = token_ids(ROWS, TOKENS)
    cuts = [5, 11, 16, 20]
    positions = torch.stack(
        [torch.cat([torch.arange(cut), torch.arange(TOKENS - cut)]) for cut in cuts]
    )
    return here({"input_ids": ids, "labels": ids, "position_ids": positions})


def backward(model: Any, inputs: dict[str, torch.Tensor], num_items: int) -> torch.Tensor:
    """The loss of these rows, summed and divided by `num_items`, after its backward pass."""
    loss = model(**inputs, use_cache=False, num_items_in_batch=num_items).loss
    loss.backward()
    return loss.detach()


def same_gradients(rank: int, world: int, folder: str) -> None:
    model, plain, inputs = sharded(world), here(tiny_model()).train(), batch()
    share = slice(rank * ROWS // world, (rank + 1) * ROWS // world)
    mine = {name: x[share] for name, x in inputs.items()}
    num_items = ROWS * (TOKENS - 2)
    for loss_backend in ("auto", "logits"):
        for checkpointing in (False, True):
            for each in (model, plain):
                each.loss_backend = loss_backend
                each.zero_grad()
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            # gradients are averaged over processes
            loss = backward(model, mine, num_items / world)
            dist.all_reduce(loss)
            expected = backward(plain, inputs, num_items)
            assert_same(loss / world, expected, "loss")
            assert_same_gradients(model, plain, loss_backend)
        model.gradient_checkpointing_disable()


def muon_refuses_shards(rank: int, world: int, folder: str) -> None:
    model = sharded(world)
    backward(model, {name: x[:1] for name, x in batch().items()}, TOKENS)
    with pytest.raises(ValueError, match="optimizer='muon' .* sharded .* must be 'adamw'"):
        make_optimizer("muon", model, 1e-3, 0.0).step()
    make_optimizer("adamw", model, 1e-3, 0.0).step()


def saved_in_bfloat16(folder: str, source: str = "bfloat16", **sizes: int) -> Any:
    """The model saved there, divided by Transformers if sizes of a DistributedConfig are given."""
    config = DistributedConfig(**sizes) if sizes else None
    path = f"{folder}/{source}"
    model = KimiLinearForCausalLM.from_pretrained(
        path, dtype=torch.bfloat16, distributed_config=config
    )
    return here(model).train()


def same_training_in_bfloat16(rank: int, world: int, folder: str) -> None:
    """FSDP by Transformers of a model whose decay parameters stay in float32: two passes, the
    second with checkpointing, a step of the optimizer, text and files. Each process reads rows of
    its own, the plain model too, so that both round in the same places."""
    model, plain = saved_in_bfloat16(folder, fsdp_size=world), saved_in_bfloat16(folder)
    share = slice(rank * ROWS // world, (rank + 1) * ROWS // world)
    mine = {name: x[share] for name, x in batch().items()}
    for checkpointing in (False, True):
        if checkpointing:
            for each in (model, plain):
                each.gradient_checkpointing_enable({"use_reentrant": False})
        losses = [backward(each, mine, TOKENS) for each in (model, plain)]
        assert_same(*losses, "loss")
    for parameter in plain.parameters():
        dist.all_reduce(parameter.grad)
        parameter.grad /= world
    assert_same_gradients(model, plain)
    for each in (model, plain):
        torch.optim.AdamW(parameter_groups(each, 0.1), lr=1e-2).step()
        each.to(torch.bfloat16)
    for (name, ours), (other, theirs) in zip(
        model.named_parameters(), plain.named_parameters(), strict=True
    ):
        is_wide = name.endswith(("A_log", "dt_bias"))
        assert name == other
        assert ours.dtype == theirs.dtype == (torch.float32 if is_wide else torch.bfloat16)
        assert_same(ours, theirs, name)
    plain.load_state_dict(get_model_state_dict(model, options=WHOLE))  # on GPUs, they differ
    assert_same(*(backward(each, mine, TOKENS) for each in (model, plain)), "loss after a step")
    ids = here(token_ids(2, 9))
    texts = [
        each.eval().generate(ids, max_new_tokens=4, do_sample=False) for each in (model, plain)
    ]
    assert torch.equal(*texts)
    model.save_pretrained(f"{folder}/of_shards")
    if rank == 0:
        plain.save_pretrained(f"{folder}/of_plain")
    dist.barrier()


def shards_of_bfloat16(rank: int, world: int, folder: str) -> None:
    """Torch's own checkpoints have the released names too, and any model of them reads them."""
    model = saved_in_bfloat16(folder, fsdp_size=world)
    whole = get_model_state_dict(model, options=WHOLE)
    if rank == 0:
        expected = saved_in_bfloat16(folder).state_dict()
        assert whole.keys() == expected.keys()
        assert all(torch.equal(x.cpu(), expected[name].cpu()) for name, x in whole.items())
    other = saved_in_bfloat16(folder, "of_shards", fsdp_size=world)
    dcp.save({"model": get_model_state_dict(other)}, checkpoint_id=f"{folder}/shards_in_bfloat16")
    state = {"model": get_model_state_dict(model)}
    dcp.load(state, checkpoint_id=f"{folder}/shards_in_bfloat16")
    set_model_state_dict(model, state["model"])
    inputs = {name: x[:1] for name, x in batch().items()}
    plain = saved_in_bfloat16(folder, "of_plain")
    assert_same(*(backward(each, inputs, TOKENS) for each in (model, plain)), "loss")


def save_shards(rank: int, world: int, folder: str) -> None:
    model = sharded(world)
    dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=f"{folder}/shards")
    whole = get_model_state_dict(model, options=WHOLE)
    if rank == 0:
        assert all(type(x) is torch.Tensor for x in whole.values())
        tiny_model().save_pretrained(f"{folder}/plain")
        tiny_model(seed=5).save_pretrained(f"{folder}/whole", state_dict=whole)


def load_shards(rank: int, world: int, folder: str) -> None:
    """Into other values, from shards of another number of processes and from released names."""
    model = sharded(world, seed=1)
    state = {"model": get_model_state_dict(model)}
    dcp.load(state, checkpoint_id=f"{folder}/shards")
    set_model_state_dict(model, state["model"])
    check_equal(model)
    other, whole = sharded(world, seed=2), {}
    if rank == 0:
        whole = KimiLinearForCausalLM.from_pretrained(f"{folder}/whole").state_dict()
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(other, whole, options=options)
    check_equal(other)


def resumed_training(rank: int, world: int, folder: str) -> None:
    """By DDP, from what a run leaves that was killed after its second step, to the same bits."""
    whole, cut = Path(folder) / "whole_run", Path(folder) / "cut_run"
    texts = [f"line {i} says that {i} and {j} make {i + j}" for i in range(20) for j in range(20)]
    data = Path(folder) / f"texts_{rank}"
    data.mkdir()
    (data / "all.txt").write_text("\n".join(texts))
    (data / "tiny.json").write_text(json.dumps(SMALL_FIELDS))
    settings: dict[str, Any] = {"sequence_length": 32, "batch_size": 2, "accumulate": 2}
    settings |= {"paths": [data / "all.txt"], "config": data / "tiny.json", "vocab_size": 540}
    settings |= {"steps": 4, "save_every": 2, "log_every": 1, "router_bias_update_rate": 0.01}
    train.main(output=whole, **settings)
    if rank == 0:
        shutil.copytree(whole / "checkpoint-2", cut / "checkpoint-2")
    dist.barrier()
    train.main(output=cut, resume=True, **settings)
    if rank == 0:
        files = [(path / "model.safetensors").read_bytes() for path in (whole, cut)]
        assert files[0] == files[1]
        states = [
            json.loads((path / "checkpoint-4" / "trainer_state.json").read_text())
            for path in (whole, cut)
        ]
        assert states[0]["log_history"] == states[1]["log_history"]
        assert [entry["step"] for entry in states[0]["log_history"]][-1] == 4


def check_equal(model: Any) -> None:
    expected = tiny_model().state_dict()
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    if dist.get_rank() == 0:
        assert whole.keys() == expected.keys()
        for name, x in whole.items():
            assert torch.equal(x.cpu(), expected[name]), name


def load_as_accelerate_does(rank: int, world: int, folder: str) -> None:
    """With `fsdp_cpu_ram_efficient_loading` one process has the weights and the others none: the
    correction bias, a buffer, arrives too, and is a plain tensor again."""
    from accelerate.utils.fsdp_utils import fsdp2_load_full_state_dict

    whole = tiny_model().state_dict()
    mesh = init_device_mesh(device().type, (world,))
    model = tiny_model(seed=3).to("meta")
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    model = fully_shard(model, mesh=mesh)
    if rank:
        whole = {}
    fsdp2_load_full_state_dict(SimpleNamespace(is_main_process=rank == 0), model, whole)
    assert not any(buffer.is_meta for buffer in model.buffers())
    assert all(type(buffer) is torch.Tensor for buffer in model.buffers())
    check_equal(model)
    backward(model.train(), {name: x[:1] for name, x in batch().items()}, TOKENS)


@pytest.mark.parametrize("device_type", DEVICE_TYPES)
def test_two_and_four_processes_equal_one(tmp_path: Path, device_type: str):
    """Loss and gradients; and checkpoints, among them the short convolutions' weights [D, 1, W] and
    the fused experts, saved by two processes and read by four."""
    functions = [same_gradients, muon_refuses_shards, save_shards, load_as_accelerate_does]
    if TRAINER_RESUMES and device_type == "cpu":
        functions.append(resumed_training)
    tiny_model().bfloat16().save_pretrained(tmp_path / "bfloat16")
    functions += [same_training_in_bfloat16, shards_of_bfloat16]
    run(2, functions, tmp_path, device_type)
    for file in ("model.safetensors", "config.json"):
        expected = (tmp_path / "of_plain" / file).read_bytes()
        assert (tmp_path / "of_shards" / file).read_bytes() == expected
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "whole")]
    assert files[0] == files[1]  # saved from shards: the released names, byte for byte
    readers = 4 if fits(4, device_type) else 2
    run(readers, [same_gradients, load_shards], tmp_path, device_type)
