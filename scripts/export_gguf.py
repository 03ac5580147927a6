"""Make a GGUF for llama.cpp of a saved model, with llama.cpp's own converter, and check it.

LLAMA_CPP is a checkout of llama.cpp. Its `convert_hf_to_gguf.py` does not know tokenizers that were
trained here; this script tells it what they are. Types f32, f16, bf16 and q8_0 need the checkout
alone, the others its program `llama-quantize`. Models that llama.cpp has no head, shared expert or
number of heads for get them from zeros; a model that it would compute otherwise is refused before
anything is written (docs/engines.md).

The file's keys, tensors and vocabulary are compared with the folder. Where `llama-perplexity` is
built, llama.cpp reads a text: it must cut it into the tokenizer's tokens and, for models of up to
--compare gigabytes, give this package's logits. The file takes its name at the end; after an error
or a kill nothing has it.

Examples:
    python scripts/export_gguf.py runs/demo --llama-cpp ../llama.cpp --type q4_k_m
    python scripts/export_gguf.py runs/chat/merged --llama-cpp ../llama.cpp --type bf16 \\
        --output chat.gguf
    python scripts/push_to_hub.py runs/demo --repo-id me/demo --include '*.gguf'
"""

import json
import math
import os
import re
from dataclasses import MISSING, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from exporting.checks import (
    ExportError,
    chat_template,
    check_file,
    check_tokenizer_kind,
    check_vocabulary,
    unreached_tokens,
)
from exporting.forward import (
    check_ids,
    difference,
    llama_forward,
    own_log_probs,
    probe_ids,
    probe_text,
    weights_size,
)
from exporting.plan import Plan, make_plan, remarks
from exporting.programs import (
    check_checkout,
    find_program,
    require_program,
    run_program,
    run_python,
)
from options.settings import add_flags, check_settings, command_parser, run_main, setting
from publishing.folder import (
    check_tokenizer,
    empty_model,
    make_config,
    read_architecture,
    read_config,
)
from tokenizers import Tokenizer
from tqdm import tqdm

from kimi_linear.checkpoints.atomic import UNFINISHED
from kimi_linear.checkpoints.files import read_blocks
from kimi_linear.checkpoints.folders import INDEX, check_weights, weight_files

CAUSAL = "KimiLinearForCausalLM"
# What the converter writes itself; the rest is llama-quantize's, from a file that loses nothing.
CONVERTED = ("f32", "f16", "bf16", "q8_0")
QUANTIZED = (
    *("q6_k", "q5_k_m", "q5_k_s", "q5_0", "q5_1", "q4_k_m", "q4_k_s", "q4_0", "q4_1"),
    *("iq4_nl", "iq4_xs", "q3_k_l", "q3_k_m", "q3_k_s", "iq3_s", "iq3_m", "q2_k"),
)
LOSSLESS = {"F16": "f16", "BF16": "bf16"}
# A line of llama-quantize: "[   1/ 433] blk.0 ...".
TENSOR = re.compile(r"\[\s*(\d+)/\s*(\d+)\]")
# How far llama.cpp's logits may be from ours, over their spread, by type: it rounds activations to
# the weights' type. What it computes wrongly is off by 0.3 and more.
ALLOWED = {"f32": 0.01, "f16": 0.02, "bf16": 0.1, "q8_0": 0.2}
GIGA = 1e9


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is made of which folder."""

    folder: str | os.PathLike[str] = setting(MISSING, flag=False)
    llama_cpp: str | os.PathLike[str] = setting(MISSING, flag=False)
    type: str = setting("q4_k_m", "of the weights", choices=(*CONVERTED, *QUANTIZED))
    output: str | os.PathLike[str] | None = setting(
        None, "file to make (default: FOLDER/NAME-TYPE.gguf)", metavar="FILE"
    )
    overwrite: bool = setting(False, "replace the file if it is there")
    compare: float = setting(
        8.0, "gigabytes of weights up to which logits are compared; 0: never", least=0, metavar="GB"
    )
    threads: int | None = setting(None, "CPU threads of llama.cpp", least=1)


def main(**values: Any) -> Path:
    """Make a GGUF.

    Args:
        **values: Fields of `Settings`; `folder` and `llama_cpp` are needed.

    Returns:
        The absolute path of the file.

    Raises:
        ValueError: The folder is incomplete, llama.cpp does not compute such a model, a program is
            missing, or an argument is wrong. Nothing was written.
        ExportError: llama.cpp's programs failed, or made something else. No file was made.
    """
    settings = Settings(**values)
    check_settings(settings)
    folder = Path(settings.folder).expanduser().absolute()
    checkout = Path(settings.llama_cpp).expanduser().absolute()
    output = _output(folder, settings)
    plan = _read_plan(folder)
    check_checkout(checkout)
    if settings.type in QUANTIZED:
        require_program(checkout, "llama-quantize", f"type {settings.type}")
    for note in (*plan.notes, *remarks(plan.config), *_unreached(folder)):
        print(note, flush=True)
    export = Export(folder, checkout, plan, settings)
    draft = output.with_name(f"{UNFINISHED}-{output.name}")
    try:
        export.write(draft)
        os.replace(draft, output)
    finally:
        draft.unlink(missing_ok=True)
    print(f"{output}: {output.stat().st_size / 1e6:,.1f} MB", flush=True)
    return output


def _output(folder: Path, settings: Settings) -> Path:
    """The file to make."""
    if settings.output is None:
        output = folder / f"{folder.name}-{settings.type}.gguf"
    else:
        output = Path(settings.output).expanduser().absolute()
    if not output.parent.is_dir():
        raise ValueError(f"--output {output}: its folder is not there")
    if output.is_dir():
        raise ValueError(f"--output {output} is a folder; allowed: a file")
    if output.exists() and not settings.overwrite:
        raise ValueError(f"--output {output} is there already (--overwrite replaces it)")
    return output


def _read_plan(folder: Path) -> Plan:
    """Check a folder as far as the export depends on it."""
    fields = read_config(folder)
    architecture = read_architecture(folder, fields)
    if architecture != CAUSAL:
        raise ValueError(f"{folder}: architectures is {architecture!r}; allowed: {CAUSAL!r}")
    if fields.get("quantization_config") is not None:
        raise ValueError(
            f"{folder} is quantised; allowed: weights in 16 or 32 bits, such as the folder that it "
            "was made of (llama.cpp rounds them by itself)"
        )
    config = make_config(fields)
    plan = make_plan(config, fields)
    check_tokenizer_kind(folder)
    check_tokenizer(folder, config)
    check_weights(folder, empty_model(fields, architecture))
    return plan


def _unreached(folder: Path) -> list[str]:
    count = unreached_tokens(folder)
    return [f"{count:,} tokens that no merge makes: llama.cpp never takes them"] if count else []


@dataclass
class Export:
    """The steps from a folder to a file.

    Attributes:
        folder: The model.
        checkout: llama.cpp.
        plan: What its converter is told.
        settings: Of the command.
    """

    folder: Path
    checkout: Path
    plan: Plan
    settings: Settings

    def write(self, draft: Path) -> None:
        """Convert, quantise if need be, and check both files."""
        wanted = self.settings.type
        if wanted in CONVERTED:
            self.convert(draft, wanted)
            self.check(draft, wanted)
            return
        lossless = self.lossless()
        wide = draft.with_name(f"{draft.stem}-{lossless}.gguf")
        try:
            self.convert(wide, lossless)
            self.check(wide, lossless)
            self.quantize(wide, draft)
        finally:
            wide.unlink(missing_ok=True)
        self.check(draft, wanted)

    def lossless(self) -> str:
        """The type that holds the folder's matrices as they are."""
        files = [self.folder / name for name in weight_files(self.folder) if name != INDEX]
        blocks = [block for file in files for block in read_blocks(str(file)).values()]
        found = {block.dtype for block in blocks if len(block.shape) == 2}
        return LOSSLESS.get(found.pop(), "f32") if len(found) == 1 else "f32"

    def convert(self, file: Path, kind: str) -> None:
        """Have the checkout's converter write a file."""
        plan = self.plan
        job = {
            "llama_cpp": str(self.checkout),
            "folder": str(self.folder),
            "output": str(file),
            "type": kind,
            "template": chat_template(self.folder),
            "fields": plan.fields,
            "zeros": plan.zeros,
            "padded": plan.padded,
            "ties_head": plan.ties_head,
            "expert_groups": plan.expert_groups,
        }
        run_python("converter.py", [], "llama.cpp's converter", json.dumps(job))

    def quantize(self, source: Path, file: Path) -> None:
        """Have llama-quantize write a file."""
        program = require_program(self.checkout, "llama-quantize", f"type {self.settings.type}")
        command = [str(program), str(source), str(file), self.settings.type.upper()]
        with tqdm(desc=self.settings.type, unit="tensor", dynamic_ncols=True) as bar:

            def on_line(line: str) -> None:
                step = TENSOR.match(line)
                if step:
                    bar.total = int(step[2])
                    bar.update(int(step[1]) - bar.n)

            run_program([*command, str(self.threads)], "llama-quantize", on_line)

    @property
    def threads(self) -> int:
        """CPU threads of llama.cpp."""
        return self.settings.threads or torch.get_num_threads()

    def check(self, file: Path, kind: str) -> None:
        """Compare a file with the folder, and what llama.cpp computes of it with this package."""
        described = run_python("reader.py", [str(self.checkout), str(file)], "reading the file")
        found = json.loads(described)
        check_file(found, self.plan.config, self.plan.expert_groups)
        check_vocabulary(found["keys"], self.folder)
        types = ", ".join(f"{count} {name}" for name, count in sorted(found["types"].items()))
        print(f"{kind}: {len(found['tensors'])} tensors ({types}), the tokenizer's ids", flush=True)
        program = find_program(self.checkout, "llama-perplexity")
        if program is None:
            print("llama.cpp's forward was not run: llama-perplexity is not built", flush=True)
            return
        written = llama_forward(program, file, self.threads, self.probe)
        check_ids(written, self.tokenizer, self.probe)
        size = weights_size(self.folder)
        if size > self.settings.compare * GIGA:
            print(f"logits were not compared: {size / GIGA:.1f} GB of weights (--compare)")
            return
        ratio, same = difference(written.log_probs, self.log_probs)
        print(
            f"{kind}: llama.cpp's logits differ by {ratio:.2g} of their spread, the most likely "
            f"token is the same at {same:.0%} of {written.num_places} places",
            flush=True,
        )
        if not ratio <= ALLOWED.get(kind, math.inf):
            raise ExportError(
                f"llama.cpp computes something else: its logits differ by {ratio:.2g} of their "
                f"spread; allowed for {kind}: {ALLOWED[kind]}"
            )

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The folder's."""
        return Tokenizer.from_file(str(self.folder / "tokenizer.json"))

    @cached_property
    def probe(self) -> str:
        """A text to read."""
        return probe_text(self.tokenizer)

    @cached_property
    def log_probs(self) -> np.ndarray:
        """What this package makes of it."""
        return own_log_probs(self.folder, probe_ids(self.tokenizer, self.probe))


def _parser() -> Any:
    parser = command_parser(__doc__)
    parser.add_argument("folder", help="saved model with its tokenizer")
    parser.add_argument("--llama-cpp", required=True, metavar="DIR", help="llama.cpp's checkout")
    add_flags(parser, Settings)
    return parser


if __name__ == "__main__":
    try:
        run_main(main, _parser())
    except (ExportError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
