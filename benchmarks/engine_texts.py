"""What an engine makes of a folder: log-probabilities of prompts, and the greedy texts behind them.

One run for each engine, in an environment that has it. The first is the reference, our model in
float32 on the CPU; it takes its prompts from files of Python's standard library that are held out
of training. The others take the same ids from its result, and `compare_engines.py` compares:

    python benchmarks/engine_texts.py ours-float32 runs/demo reference.json
    python benchmarks/engine_texts.py ours-bfloat16 runs/demo ours.json --prompts reference.json
    python benchmarks/engine_texts.py vllm runs/demo vllm.json --prompts reference.json
    python benchmarks/engine_texts.py exllamav3 runs/demo-exl3 exl3.json --prompts reference.json

A result has the engine's versions and for each prompt `ids` and `logprobs` (natural; none for the
first), `new_ids` and `new_logprobs` of the greedy text, and `new_top`, the likeliest tokens at its
places as [id, log-probability], where the engine gives them.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from common import setting
from texts.corpus import split_by_file, standard_library
from torch import Tensor

# Around KDA's chunks of 64, a short one, and one that vLLM prefills otherwise than those up to 512.
LENGTHS = (17, 63, 64, 65, 128, 200, 257, 600)
TOP = 20
CACHE_BYTES = 1 << 31
CACHE_TOKENS = 4096  # of exLlamaV3: a multiple of its pages
Prompts = Sequence[list[int]]
Rows = list[dict[str, Any]]


def held_out_prompts(folder: Path) -> Prompts:
    """Beginnings of held-out files, each with the begin token."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    _, files = split_by_file(standard_library())
    texts = (tokenizer(file.text).input_ids for file in files)
    return [
        [tokenizer.bos_token_id, *next(ids for ids in texts if len(ids) >= length)[: length - 1]]
        for length in LENGTHS
    ]


def chosen(logits_TV: Tensor, ids: Sequence[int]) -> list[float]:
    """Log-probability of each id at its place."""
    scores = logits_TV.float().log_softmax(-1)
    return scores.gather(-1, torch.tensor(ids, device=scores.device)[:, None])[:, 0].tolist()


@torch.no_grad()
def ours(folder: Path, prompts: Prompts, num_new: int, dtype: torch.dtype) -> Rows:
    """Our model, on the GPU if there is one, in float32 on the CPU; packed weights are widened for
    that."""
    from kimi_linear import KimiLinearForCausalLM

    model = KimiLinearForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    if dtype == torch.float32 and getattr(model.config, "quantization_config", None) is not None:
        model = model.dequantize(dtype)
    is_on_gpu = dtype != torch.float32 and torch.cuda.is_available()
    model = model.to("cuda" if is_on_gpu else "cpu")
    model.generation_config.eos_token_id = None
    rows = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=model.device)
        logits = model(ids, use_cache=False).logits[0]
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_new,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
            use_cache=True,
        )
        new_ids = made.sequences[0, len(prompt) :].tolist()
        new_logits = torch.cat(list(made.logits))
        likeliest = new_logits.float().log_softmax(-1).topk(TOP)
        pairs = zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
        rows.append(
            {
                "ids": prompt,
                "logprobs": [None, *chosen(logits[:-1], prompt[1:])],
                "new_ids": new_ids,
                "new_logprobs": chosen(new_logits, new_ids),
                "new_top": [list(zip(*pair, strict=True)) for pair in pairs],
            }
        )
    return rows


def vllm(folder: Path, prompts: Prompts, num_new: int) -> Rows:
    """vLLM, a prompt at a time, without graphs."""
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=str(folder),
        dtype="bfloat16",
        skip_tokenizer_init=True,
        enforce_eager=True,
        enable_prefix_caching=False,
        max_model_len=max(map(len, prompts)) + num_new,
        max_num_seqs=1,
        kv_cache_memory_bytes=CACHE_BYTES,
        gpu_memory_utilization=0.1,
    )
    sampling = SamplingParams(
        temperature=0.0,
        max_tokens=num_new,
        ignore_eos=True,
        detokenize=False,
        logprobs=1,
        prompt_logprobs=1,
    )
    rows = []
    for prompt in prompts:
        [done] = engine.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
        new = done.outputs[0]
        rows.append(
            {
                "ids": prompt,
                "logprobs": _of_entries(prompt, done.prompt_logprobs),
                "new_ids": list(new.token_ids),
                "new_logprobs": _of_entries(new.token_ids, new.logprobs),
            }
        )
    return rows


def _of_entries(ids: Sequence[int], entries: Sequence[Any]) -> list[float | None]:
    """vLLM has a dictionary by id for each place, and nothing for a prompt's first."""
    pairs = zip(ids, entries, strict=True)
    return [entry and entry[token].logprob for token, entry in pairs]


@torch.inference_mode()
def exllamav3(folder: Path, prompts: Prompts, num_new: int) -> Rows:
    """exLlamaV3: a prompt in one call without a cache, and its generator for the text."""
    from exllamav3 import Cache, Config, Generator, GreedySampler, Job, Model, Tokenizer

    config = Config.from_directory(str(folder))
    model = Model.from_config(config)
    cache = Cache(model, max_num_tokens=CACHE_TOKENS)
    model.load()
    generator = Generator(model, cache, Tokenizer.from_config(config))
    rows = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        logits = model.forward(ids, {"attn_mode": "flash_attn_nc"})[0, :, : config.vocab_size]
        generator.enqueue(
            Job(ids, max_new_tokens=num_new, sampler=GreedySampler(), return_logits=True)
        )
        new_ids, new_logits = [], []
        while generator.num_remaining_jobs():
            for piece in generator.iterate():
                if piece.get("token_ids") is not None:
                    new_ids += piece["token_ids"].flatten().tolist()
                    new_logits.append(piece["logits"].flatten(0, -2)[:, : config.vocab_size])
        rows.append(
            {
                "ids": prompt,
                "logprobs": [None, *chosen(logits[:-1], prompt[1:])],
                "new_ids": new_ids,
                "new_logprobs": chosen(torch.cat(new_logits), new_ids),
            }
        )
    return rows


# By name: what runs, the package whose version counts, and the dtype.
ENGINES: dict[str, tuple[Callable[..., Rows], str, str]] = {
    "ours-float32": (ours, "transformers", "float32"),
    "ours-bfloat16": (ours, "transformers", "bfloat16"),
    "vllm": (vllm, "vllm", "bfloat16"),
    "exllamav3": (exllamav3, "exllamav3", "float16"),
}


def main(argv: list[str] | None = None) -> None:
    """Run one engine and write its result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--prompts", type=Path, help="an earlier result (default: held-out files)")
    parser.add_argument("--new-tokens", type=int, default=32)
    args = parser.parse_args(argv)
    run, package, dtype = ENGINES[args.engine]
    if args.prompts:
        earlier = json.loads(args.prompts.read_text(encoding="utf-8"))
        prompts = [row["ids"] for row in earlier["prompts"]]
    else:
        prompts = held_out_prompts(args.folder)
    options = {"dtype": getattr(torch, dtype)} if run is ours else {}
    rows = run(args.folder, prompts, args.new_tokens, **options)
    result = {
        "engine": args.engine,
        "version": f"{package} {version(package)}",
        "folder": args.folder.name,
        # the reference leaves a GPU alone
        "setting": setting() | ({"gpu": None} if args.engine == "ours-float32" else {}),
        "prompts": rows,
    }
    args.result.write_text(json.dumps(result) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
