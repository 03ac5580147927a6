"""Let FLA choose among its configurations on this GPU, and write them to `ops/fla/configs.py`.

A model of few layers is trained and used, packed and not, so that every kernel of FLA that this
package reaches is tuned once for each shape and dtype, as `ops/fla/tuning.py` tells them apart. The
candidates of a kernel are compiled in threads before they are timed. The table is written when all
is done, and a line of JSON for each choice.

    python benchmarks/tune_fla.py --record benchmarks/results/fla_configs_h200.jsonl
"""

import os
import pprint
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("FLA_CACHE_MODE", "disabled")  # the table of today is not asked

import torch
from common import ROOT, Recorder, make_parser, setting
from torch import nn
from triton.runtime._async_compile import AsyncCompileMode
from triton.runtime.autotuner import Autotuner

from kimi_linear import KimiLinearConfig, KimiLinearForCausalLM
from kimi_linear.ops.fla.tuning import KnownConfigs, autotuners, name_of, shape_of

OUTPUT = ROOT / "ops" / "fla" / "configs.py"
TABLES: dict[str, dict[str, dict[str, Any]]] = {}


def compile_in_threads(pool: ThreadPoolExecutor) -> None:
    """All candidates at once, before the first is timed; and one search for each shape."""
    prune = Autotuner.prune_configs

    def prune_and_compile(tuner: Any, kwargs: dict[str, Any]) -> list[Any]:
        configs = prune(tuner, kwargs)
        arguments = {**kwargs, "warmup": True}
        with AsyncCompileMode(pool, ignore_errors=True):
            for config in configs:
                tuner.fn.run(*tuner.nargs.values(), **arguments, **config.all_kwargs())
        return configs

    Autotuner.prune_configs = prune_and_compile


class ChosenConfigs(KnownConfigs):
    """An autotuner's memory that keeps each choice under its shape."""

    def __init__(self, tuner: Any) -> None:
        super().__init__(tuner, TABLES.setdefault(name_of(tuner), {}))

    def __setitem__(self, key: tuple[Any, ...], config: Any) -> None:
        super().__setitem__(key, config)
        kept = {"kwargs": config.kwargs, "num_warps": config.num_warps}
        kept["num_stages"] = config.num_stages
        self._table.setdefault(shape_of(self._tuner, key), kept)


def watch() -> None:
    for tuner in autotuners():
        if not isinstance(tuner.cache, ChosenConfigs):
            tuner.cache = ChosenConfigs(tuner)


def small_model(preset: str, layers: int) -> KimiLinearForCausalLM:
    """Layers of a preset's sizes, few experts and a small vocabulary."""
    config = KimiLinearConfig.from_preset(
        preset, num_hidden_layers=layers, num_experts=16, vocab_size=4096, **special_tokens()
    )
    torch.manual_seed(0)
    return KimiLinearForCausalLM(config).to("cuda", torch.bfloat16)


def special_tokens() -> dict[str, int]:
    return {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


def train(model: nn.Module, num_tokens: int) -> None:
    """A packed row, and rows of one sequence each."""
    model.train()
    ids = torch.randint(3, 4096, (1, num_tokens), device="cuda")
    cut = num_tokens // 3
    positions = torch.cat([torch.arange(cut), torch.arange(num_tokens - cut)])[None].cuda()
    for inputs in (
        {"input_ids": ids, "labels": ids, "position_ids": positions},
        {"input_ids": ids.view(2, -1), "labels": ids.view(2, -1)},
    ):
        model(**inputs, use_cache=False).loss.backward()
        watch()
        model.zero_grad(set_to_none=True)


@torch.no_grad()
def read(model: nn.Module, num_tokens: int) -> None:
    """A text in two calls, rows with padding, and a few tokens at once."""
    model.eval()
    ids = torch.randint(3, 4096, (2, num_tokens), device="cuda")
    cache = model(ids[:1], use_cache=True).cache
    watch()
    for piece in (ids[:1], ids[:1, :7]):
        model(piece, cache=cache, use_cache=True)
    mask = torch.ones_like(ids)
    mask[0, : num_tokens // 3] = 0
    model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False)


def source() -> str:
    table = pprint.pformat(TABLES, width=100, compact=True, sort_dicts=True)
    head = OUTPUT.read_text().split("\nCAPABILITY")[0]
    capability = torch.cuda.get_device_capability()
    return (
        f"{head}\nCAPABILITY = {capability}\n"
        f"CONFIGS: dict[str, dict[str, dict[str, Any]]] = {table}\n"
    )


def main(*, preset: str, layers: int, tokens: int, threads: int, record: Path | None) -> None:
    tell = Recorder(record).tell
    tell({"environment": setting()})
    start = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        compile_in_threads(pool)
        import_fla()
        watch()
        model = small_model(preset, layers)
        for step in (read, train):
            step(model, tokens)
            tell({"case": step.__name__, "seconds": round(time.perf_counter() - start, 1)})
    for name in [name for name, table in TABLES.items() if not table]:
        del TABLES[name]
    for name, table in TABLES.items():
        for shape, config in table.items():
            tell({"kernel": name, "shape": shape, **config})
    OUTPUT.write_text(source())


def import_fla() -> None:
    """Everything of FLA that the package reaches, so that no kernel is tuned unseen."""
    from kimi_linear.ops.fla.backend import convolution_kernels, kda_kernels, norm_kernel

    kda_kernels(), norm_kernel(), convolution_kernels()


if __name__ == "__main__":
    parser = make_parser(__doc__)
    parser.add_argument("--preset", default="48b-a3b", choices=["48b-a3b", "1b-a0.3b", "300m"])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=16)
    main(**vars(parser.parse_args()))
