"""What llama.cpp computes of a GGUF, beside this package.

`llama-perplexity` writes the ids that it cut a text into and the log probabilities of every token
in 16 bits, behind the first half of each chunk.

Legend: N chunks, P positions of a chunk that are written, V vocabulary.
"""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from exporting.checks import PROBE, ExportError
from exporting.programs import run_program
from kimi_linear import KimiLinearForCausalLM

# Tokens of a chunk, and chunks.
LENGTH, CHUNKS = 128, 2
FIRST = LENGTH // 2
MAGIC = b"_logits_"


@dataclass(frozen=True)
class Written:
    """What `llama-perplexity` wrote.

    Attributes:
        ids: [N, LENGTH] int32.
        log_probs: [N, P, V] float32, of the tokens after `FIRST` and later ones.
    """

    ids: np.ndarray
    log_probs: np.ndarray

    @property
    def num_places(self) -> int:
        """N x P."""
        return self.log_probs.shape[0] * self.log_probs.shape[1]


def probe_text(tokenizer: Tokenizer) -> str:
    """`PROBE`, as often as gives enough tokens."""
    count = len(tokenizer.encode(PROBE).ids)
    return (PROBE * -(-LENGTH * (CHUNKS + 1) // count)).rstrip()


def probe_ids(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """The tokens of it that llama-perplexity reads, [N, LENGTH] int32."""
    ids = np.array(tokenizer.encode(text).ids[: CHUNKS * LENGTH], dtype=np.int32)
    return ids.reshape(CHUNKS, LENGTH)


def llama_forward(
    program: Path, file: Path, threads: int, text: str, batch: int = LENGTH
) -> Written:
    """Have llama.cpp read a text on the CPU, its caches in float32.

    Args:
        program: `llama-perplexity`.
        file: A GGUF.
        threads: CPU threads.
        text: What `probe_text` made.
        batch: Tokens that it reads at once.

    Raises:
        ExportError: It failed, or wrote something else than expected.
    """
    with tempfile.TemporaryDirectory() as folder:
        prompt, output = Path(folder) / "probe.txt", Path(folder) / "logits"
        prompt.write_bytes(text.encode())
        command = [program, "-m", file, "-f", prompt, "-c", str(LENGTH)]
        command += ["-b", str(batch), "-ub", str(batch)]
        command += ["--chunks", str(CHUNKS), "-t", str(threads), "-ngl", "0"]
        command += ["-ctk", "f32", "-ctv", "f32", "-fa", "off", "--save-all-logits", output]
        run_program(command, f"llama.cpp's forward of {file.name}", lambda line: None)
        content = output.read_bytes() if output.is_file() else b""
    return read_logits(content)


def read_logits(content: bytes) -> Written:
    """Read the file of `--save-all-logits`: "_logits_", int32 LENGTH, V, N, ids, and for each
    position float32 scale and minimum, V uint16 (an even number).

    Raises:
        ExportError: It is something else.
    """
    if not content.startswith(MAGIC):
        raise ExportError("llama-perplexity wrote no logits")
    length, vocab, chunks = np.frombuffer(content, np.int32, 3, len(MAGIC)).tolist()
    start = len(MAGIC) + 12
    ids = np.frombuffer(content, np.int32, length * chunks, start).reshape(chunks, length)
    positions, width = length - 1 - length // 2, 2 * ((vocab + 1) // 2) + 4
    codes = np.frombuffer(content, np.uint16, -1, start + ids.nbytes)
    if (length, chunks) != (LENGTH, CHUNKS) or codes.size != chunks * positions * width:
        raise ExportError("llama-perplexity wrote logits in another form than release b11739")
    codes = codes.reshape(chunks, positions, width)
    scale, least = np.moveaxis(np.ascontiguousarray(codes[..., :4]).view(np.float32), -1, 0)
    return Written(ids, scale[..., None] * codes[..., 4 : 4 + vocab] + least[..., None])


@torch.inference_mode()
def own_log_probs(folder: Path, ids: np.ndarray) -> np.ndarray:
    """The same of this package, in float32. It takes the memory of the whole model.

    Returns:
        [N, P, V] float32.
    """
    model = KimiLinearForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    logits = model(input_ids=torch.from_numpy(ids.astype(np.int64))).logits
    return logits[:, FIRST:-1].float().log_softmax(-1).numpy()


def check_ids(written: Written, tokenizer: Tokenizer, text: str) -> None:
    """Compare the ids that llama.cpp has cut a text into with the tokenizer's.

    Raises:
        ExportError: They differ.
    """
    found, wanted = written.ids.ravel().tolist(), probe_ids(tokenizer, text).ravel().tolist()
    for index, (one, other) in enumerate(zip(found, wanted, strict=True)):
        if one != other:
            raise ExportError(
                f"llama.cpp cuts the probe into other tokens: number {index} is {one} "
                f"({tokenizer.id_to_token(one)!r}) and not {other} "
                f"({tokenizer.id_to_token(other)!r})"
            )


def difference(found: np.ndarray, wanted: np.ndarray) -> tuple[float, float]:
    """How far log probabilities are from others.

    Args:
        found, wanted: [N, P, V] float32.

    Returns:
        The error's root mean square over the spread of `wanted`, the median over positions, since
        rounding can change the choice of an expert at some; and how often both have the same most
        likely token.
    """
    # Far below the most likely token, llama-perplexity writes no more than "at most".
    counts = wanted > wanted.max(-1, keepdims=True) - 15
    error = np.where(counts, found - wanted, 0)
    total = counts.sum(-1)
    mean = np.where(counts, wanted, 0).sum(-1, keepdims=True) / total[..., None]
    spread = np.where(counts, wanted - mean, 0)
    ratio = np.sqrt((error**2).sum(-1) / np.maximum((spread**2).sum(-1), 1e-30))
    same = found.argmax(-1) == wanted.argmax(-1)
    return float(np.median(ratio)), float(same.mean())


def weights_size(folder: Path) -> int:
    """Bytes of a folder's weights."""
    return sum(os.stat(path).st_size for path in folder.glob("*.safetensors"))
