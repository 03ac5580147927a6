"""Time and memory of `scripts/quantize.py` on the 48B model's shape, without a disk that holds it.

The snapshot's files are sparse. They hold headers, norms and other small tensors; of a matrix there
is nothing, and reading one gives random numbers from a pool in memory. So all is measured but the
speed of the disk that is read from: copies to the GPU, quantisation, packing, and writing, which
takes 22 to 51 GB of disk, given back after each form.

    python benchmarks/quantize_h200.py --forms 24gb,48gb --time-limit 400 \\
        --record benchmarks/results/quantize_h200.jsonl
    python benchmarks/quantize_h200.py --forms 24gb --calibration-tokens 262144 --time-limit 590

A line of JSON for each form; one that was stopped by --time-limit says how many files were done.
"""

import json
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from common import Recorder, make_parser, setting
from measuring.device import STATUS, collect_garbage
from measuring.forms import quantization
from quantize import main as quantize_snapshot
from quantizing import reading
from texts.corpus import first_bytes, standard_library
from torch import Tensor

from kimi_linear import KimiLinearConfig, KimiLinearForCausalLM
from kimi_linear.checkpoints.folders import INDEX
from kimi_linear.checkpoints.names import official_shapes
from kimi_linear.tokenizer import convert_tiktoken, train_bpe

# Files of the snapshot, as the released checkpoint has about as many.
FILES = 20
# Tensors with more numbers than this are nowhere.
SMALL = 1 << 16
POOL_BYTES = 1 << 26
WEIGHT_STD = 0.02
MESSAGE_LENGTH = 300
VOCAB_SIZE = 1024  # of the tokenizer for calibration


class OutOfTimeError(Exception):
    """--time-limit is spent."""


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Raise OutOfTimeError in what runs longer."""

    def stop(*_: Any) -> None:
        raise OutOfTimeError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds or 0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def write_snapshot(folder: Path, config: KimiLinearConfig) -> int:
    """A snapshot in bfloat16 whose large tensors are holes; the bytes that it would have."""
    config.architectures = ["KimiLinearForCausalLM"]
    with torch.device("meta"):
        model = KimiLinearForCausalLM(config).to(torch.bfloat16)
    shapes, places = official_shapes(model), {}
    wide = tuple(model._keep_in_fp32_modules_strict or ())
    names, total = list(shapes), 0
    share = -(-len(names) // FILES)
    for number, start in enumerate(range(0, len(names), share), 1):
        file = f"model-{number:05d}-of-{FILES:05d}.safetensors"
        part = {name: shapes[name] for name in names[start : start + share]}
        total += write_holes(folder / file, part, wide)
        places |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / INDEX).write_text(json.dumps(index))
    config.save_pretrained(folder)
    return total


def write_holes(path: Path, shapes: dict[str, tuple[int, ...]], wide: tuple[str, ...]) -> int:
    """A safetensors file of which only small tensors are written; the bytes of all."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        is_wide = any(each in name for each in wide)
        start, end = end, end + torch.Size(shape).numel() * (4 if is_wide else 2)
        dtype = "F32" if is_wide else "BF16"
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        begin = file.tell()
        for name, shape in shapes.items():
            if torch.Size(shape).numel() <= SMALL:
                kind = torch.float32 if header[name]["dtype"] == "F32" else torch.bfloat16
                values = small_values(name, shape).to(kind)
                file.seek(begin + header[name]["data_offsets"][0])
                file.write(values.view(-1).view(torch.uint8).numpy().tobytes())
        file.truncate(begin + end)
    return end


def small_values(name: str, shape: tuple[int, ...]) -> Tensor:
    """Numbers such as a trained model has."""
    if "norm" in name:
        return torch.ones(shape)
    if name.endswith("A_log"):
        return torch.empty(shape).uniform_(0, 2.7)
    if name.endswith("dt_bias"):
        return torch.empty(shape).uniform_(-6, -2)
    return torch.zeros(shape) if "bias" in name else torch.randn(shape) * WEIGHT_STD


def read_from_pool() -> None:
    """Let reading a large tensor's bytes give random numbers."""
    pool = (torch.randn(POOL_BYTES // 2) * WEIGHT_STD).to(torch.bfloat16)
    numbers, from_file = pool.view(torch.uint8).numpy().data, reading._read

    def read(block: Any, start: int, target: memoryview) -> None:
        if torch.Size(block.shape).numel() <= SMALL:
            from_file(block, start, target)
            return
        place = (block.start + start) * 2654435761 % (POOL_BYTES // 2) // 2 * 2
        done = 0
        while done < len(target):
            count = min(len(target) - done, POOL_BYTES - place)
            target[done : done + count] = numbers[place : place + count]
            done, place = done + count, 0

    reading._read = read


def write_text(folder: Path, num_tokens: int) -> Path:
    """A tokenizer beside the snapshot, and a text for calibration."""
    files = first_bytes(standard_library(), 8.0 * num_tokens)
    ranks = train_bpe((file.text for file in first_bytes(files, 4e6)), VOCAB_SIZE)
    convert_tiktoken(ranks, folder, eos_token="[EOS]")
    path = folder.parent / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": file.text}) for file in files))
    return path


def measure(
    snapshot: Path, form: str, device: str, seconds: float | None, **options: Any
) -> dict[str, Any]:
    """One form; the folder that it wrote is removed."""
    found = quantization(form)
    assert found is not None
    parts = {part: vars(scheme) if scheme else "none" for part, scheme in found.schemes.items()}
    is_cuda = device == "cuda"
    if is_cuda:
        collect_garbage(torch.device("cuda"))
        torch.cuda.reset_peak_memory_stats()
    output = snapshot.parent / "quantised"
    line: dict[str, Any] = {"case": "quantize", "form": form}
    start = time.perf_counter()
    try:
        with time_limit(seconds), redirect_stdout(sys.stderr):
            quantize_snapshot(snapshot=snapshot, output=output, device=device, **parts, **options)
    except OutOfTimeError:
        drafts = [each for each in snapshot.parent.iterdir() if each not in (snapshot, output)]
        done = [file for draft in drafts for file in draft.glob("*.safetensors")]
        line |= {"error": "not finished: --time-limit is spent", "files_done": len(done)}
    # any kind: what cannot be done is a result, and the others are still wanted
    except Exception as error:
        line["error"] = f"{type(error).__name__}: {error}"[:MESSAGE_LENGTH]
    line["seconds"] = round(time.perf_counter() - start, 1)
    written = sum(file.stat().st_size for file in snapshot.parent.rglob("quantised/*.safetensors"))
    line["written_bytes"] = written
    if is_cuda:
        line["peak_bytes"] = torch.cuda.max_memory_allocated()
    peak = next((x for x in STATUS.read_text().splitlines() if x.startswith("VmHWM")), None)
    line["peak_host_bytes"] = peak and 1024 * int(peak.split()[1])
    for each in snapshot.parent.iterdir():
        if each != snapshot and each.is_dir():
            shutil.rmtree(each)
    return line


def main(argv: list[str] | None = None) -> None:
    """Measure, print and record the lines as they come."""
    parser = make_parser(__doc__)
    parser.add_argument("--preset", default="48b-a3b")
    parser.add_argument("--forms", default="24gb,48gb", help="see scripts/measuring/forms.py")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--calibration-tokens", type=int, default=0, help="0: without data")
    parser.add_argument("--time-limit", type=float, help="seconds of all forms together")
    parser.add_argument("--folder", type=Path, help="on a disk with room for what is written")
    parser.add_argument("--commit", help="where there is no history to ask")
    args = parser.parse_args(argv)
    tell, begin = Recorder(args.record, is_appended=True).tell, time.monotonic()
    tell({"case": "setting", **setting(args.commit)})
    read_from_pool()
    with tempfile.TemporaryDirectory(dir=args.folder) as place:
        snapshot = Path(place) / "snapshot"
        snapshot.mkdir()
        config = KimiLinearConfig.from_preset(args.preset)
        size = write_snapshot(snapshot, config)
        options: dict[str, Any] = {}
        if args.calibration_tokens:
            text = write_text(snapshot, args.calibration_tokens)
            options = {"calibrate": text, "calibration_tokens": args.calibration_tokens}
        for form in args.forms.split(","):
            left = args.time_limit and args.time_limit - (time.monotonic() - begin)
            if left is not None and left <= 0:
                tell({"case": "quantize", "form": form, "error": "not run: time is spent"})
                continue
            line = measure(snapshot, form, args.device, left, **options)
            more = {"preset": args.preset, "calibration_tokens": args.calibration_tokens}
            tell({**line, **more, "read_bytes": size})


if __name__ == "__main__":
    main(sys.argv[1:])
