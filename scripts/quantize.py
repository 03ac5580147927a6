"""Bring a downloaded or trained model to 3, 4 or 8 bits, without the memory for the whole.

SNAPSHOT, a folder with `config.json` and safetensors weights in 16 or 32 bits, is read tensor by
tensor and not changed. OUTPUT becomes a folder of its own: packed weights, `config.json` with the
`quantization_config` that vLLM and this package read, code, and the tokenizer's files. It takes its
name when all of it is there. After a kill or an error, the same command goes on with what stands in
"_unfinished-OUTPUT-to-resume" beside it, a file for each layer.

A part is "none" (it stays as it is) or fields with commas: `bits` (3, 4 or 8), `group` (inputs that
share a scale, a multiple of 32, or none: a row; default 64), `symmetric` (default true; false: each
group has a zero of its own), `float` (default false; true: float8 numbers), `rows` (outputs that
share a scale; default 1). With --preset, the parts that are given take the preset's place.

Scales and zeros are searched by squared error. With --calibrate, the model reads a text meanwhile,
layer by layer, and rounding errors are made up for where inputs correlate (GPTQ), of each expert by
itself.

Examples:
    hf download moonshotai/Kimi-Linear-48B-A3B-Instruct --local-dir official
    python scripts/quantize.py official --output kimi-linear-48b-24gb --preset 24gb
    python scripts/quantize.py official --output out --preset 24gb --calibrate chats.jsonl
    python scripts/quantize.py runs/demo --output runs/demo-4bit --experts bits=4,group=64
    python scripts/quantize.py official --output out --preset 48gb --head none
"""

import argparse
import os
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from options.settings import number, require
from publishing.folder import CONFIG, check_output, tokenizer_code
from quantizing.calibration import Calibration, read_calibration
from quantizing.data_free import write_shards
from quantizing.layer_by_layer import write_calibrated_shards
from quantizing.plan import Plan, config_text, index_text, make_plan
from quantizing.resuming import draft_of, settings_of
from quantizing.settings import FORM, read_quantization
from tqdm import tqdm

from kimi_linear.checkpoints.flat_copy import package_code, write_flat_copy
from kimi_linear.checkpoints.folders import INDEX
from kimi_linear.configuration_quantization import PARTS, PRESETS

# What is copied, beside the tokenizer's code. A card tells of the weights that it lay beside.
COPIED = (
    "LICENSE",
    "LICENSE.md",
    "LICENSE.txt",
    "NOTICE",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tiktoken.model",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
)
READ_AHEAD = 1 << 30
CALIBRATION_TOKENS = 1 << 18
Part = str | Mapping[str, Any] | None


def main(
    *,
    snapshot: str | os.PathLike[str],
    output: str | os.PathLike[str],
    preset: str | None = None,
    experts: Part = None,
    shared_experts: Part = None,
    attention: Part = None,
    embeddings: Part = None,
    head: Part = None,
    device: str = "auto",
    calibrate: str | os.PathLike[str] | None = None,
    calibration_tokens: int = CALIBRATION_TOKENS,
    read_ahead: int = READ_AHEAD,
) -> Path:
    """Write a snapshot's weights in few bits.

    Args:
        snapshot: Folder with `config.json` and safetensors weights in 16 or 32 bits.
        output: Folder to make; it may exist if it is empty.
        preset: A key of `configuration_quantization.PRESETS`.
        experts, shared_experts, attention, embeddings, head: How a part is held: a flag's text, the
            fields of a `Scheme`, or None: as the preset says.
        device: "auto" (CUDA if there is one), or a device of torch.
        calibrate: File to calibrate with: JSON lines with `text` or `messages` if its name ends in
            .jsonl, else text; None: without data.
        calibration_tokens: Tokens to read of it.
        read_ahead: Bytes of weights that are in memory before they are worked on.

    Returns:
        The absolute path of `output`.

    Raises:
        ValueError: The snapshot is incomplete, does not fit its config or is quantised already, a
            part cannot be held so, `output` is in use, or an unfinished run had other settings. The
            message names file, tensor or flag, the value, and what is allowed.
    """
    parts = dict(zip(PARTS, (experts, shared_experts, attention, embeddings, head), strict=True))
    quantization = read_quantization(preset, parts)
    require(read_ahead >= 1, "read_ahead", read_ahead, "at least 1")
    source, target = (Path(path).expanduser().absolute() for path in (snapshot, output))
    place = _device(device)
    plan = make_plan(source, quantization)
    if source.resolve() in (target.resolve(), *target.resolve().parents):
        raise ValueError(
            f"output={target} is in the snapshot, which must not change: choose another"
        )
    check_output(target)
    calibration = None
    if calibrate is not None:
        calibration = read_calibration(Path(calibrate), source, plan.config, calibration_tokens)
    _write(plan, target, place, calibration, read_ahead)
    size = sum(path.stat().st_size for path in target.glob("*.safetensors"))
    print(f"{target}: {plan.size / 1e9:.3g} GB of {source} in {size / 1e9:.3g} GB")
    return target


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device {name!r} is not allowed: {error}") from None


def _write(
    plan: Plan,
    target: Path,
    device: torch.device,
    calibration: Calibration | None,
    read_ahead: int,
) -> None:
    settings = settings_of(plan, device.type, calibration and calibration.settings)
    with ExitStack() as stack:
        draft = stack.enter_context(draft_of(target, settings))
        progress = stack.enter_context(
            tqdm(total=plan.size, unit="B", unit_scale=True, dynamic_ncols=True)
        )
        if calibration is None:
            write_shards(plan, draft, device, read_ahead, progress)
        else:
            write_calibrated_shards(plan, draft, device, calibration, read_ahead, progress)
        (draft / INDEX).write_text(index_text(plan), encoding="utf-8")
        _copy_files(plan.folder, draft)
        write_flat_copy(draft)
        (draft / CONFIG).write_text(config_text(plan), encoding="utf-8")


def _copy_files(source: Path, draft: Path) -> None:
    """Tokenizer, licence and generation's settings."""
    code = tokenizer_code(source) - set(package_code())
    for pattern in (*COPIED, *sorted(code)):
        for path in sorted(source.glob(pattern)):
            copy = draft / path.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("snapshot", help="folder with config.json and safetensors weights")
    parser.add_argument("--output", required=True, help="folder to make: a new or an empty one")
    parser.add_argument("--preset", choices=PRESETS, help="by the GPU that it is for")
    for part, text in PART_HELP.items():
        parser.add_argument(f"--{part.replace('_', '-')}", metavar="PART", help=text)
    parser.add_argument("--device", default="auto", help="CUDA if there is one, or of torch's")
    parser.add_argument("--calibrate", metavar="FILE", help="text, or JSON lines (.jsonl)")
    parser.add_argument(
        "--calibration-tokens",
        type=number,
        default=CALIBRATION_TOKENS,
        metavar="N",
        help="tokens to read of it (default 256k)",
    )
    parser.add_argument(
        "--read-ahead",
        type=number,
        default=READ_AHEAD,
        metavar="BYTES",
        help="weights in memory before they are worked on (default 1024m)",
    )
    return parser


PART_HELP = {
    "experts": f"routed experts: {FORM}",
    "shared_experts": "experts that every token uses, and dense MLPs",
    "attention": "the large projections of KDA and MLA",
    "embeddings": "the embedding",
    "head": "the language model's head",
}

if __name__ == "__main__":
    try:
        main(**vars(_parser().parse_args()))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
