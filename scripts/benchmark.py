"""Measure this package and Transformers' own Kimi Linear side by side, beside what is possible.

Both models are built from one preset with the same random weights, one after the other. Every
figure is a line of JSON on stdout, and beside it the least time that the weights, states and
latents take to move at the device's measured rate, or the operations to be done, whichever is
longer (`measuring/limits.py`). What fails, for instance for want of memory, is a line with "error".
Progress and a table go to stderr.

On a CPU, in less than a minute if nobody else uses it:

    python scripts/benchmark.py
    python scripts/benchmark.py --preset 20m --contexts 1k,4k --batches 1,2 --plot speed.png

The 48B model's shape on one GPU that holds it, eight minutes at most, and a training step of a
smaller one; then the longest context with this package only:

    python scripts/benchmark.py --preset 48b-a3b --train-preset 1b-a0.3b --train-tokens 8k \\
        --contexts 4k,32k,128k --batches 1,8,32,128 --new-tokens 128 --time-limit 480 \\
        --output both.jsonl
    python scripts/benchmark.py --preset 48b-a3b --models ours --measure decode,first-token \\
        --contexts 1m --new-tokens 128 --output long.jsonl

Packed weights beside 16-bit ones, in one run so that they can be compared, and whether a model and
its text fit a card:

    python scripts/benchmark.py --preset 48b-a3b --models ours --quantize none,48gb,24gb,fp8 \\
        --measure generate,prefill --batches 1,8,32,128 --contexts 4k,32k --new-tokens 64 \\
        --time-limit 540 --output benchmarks/results/low_bits.jsonl --append
    python scripts/benchmark.py --preset 48b-a3b --models ours --quantize 24gb,80gb,fp8 \\
        --measure memory --contexts 32k,128k --new-tokens 64 --time-limit 300 \\
        --output benchmarks/results/low_bits.jsonl --append

Calls of several tokens, as drafts are checked:

    python scripts/benchmark.py --preset 48b-a3b --models ours --measure step,generate \\
        --batches 1 --new-tokens 64 --time-limit 200 --output benchmarks/results/requests.jsonl

Many requests, of different lengths:

    python scripts/benchmark.py --preset 48b-a3b --models ours --measure requests --batches 64 \\
        --prompt-length 1024 --new-tokens 64 --time-limit 400 \\
        --output benchmarks/results/requests.jsonl --append

Draw what was measured, without measuring:

    python scripts/benchmark.py --plot-from both.jsonl long.jsonl --plot speed.png \\
        --plot-limits limits.png

The kinds of measurement:

    prefill      reading a text of each of --contexts, in pieces of --prefill-chunk if given
    decode       generate() of one row behind a cache of each of --contexts, which is filled by
                 reading a text in pieces
    generate     generate() of each of --batches rows with prompts of --prompt-length
    step         calls of each of --step-tokens tokens of one row behind a prompt of
                 --prompt-length, half, three quarters or all of which are kept (speculative
                 decoding)
    requests     --request-count requests with prompts and answers of different lengths
                 (--request-prompts, --request-answers), in each of --batches rows at most, beside
                 generate of that many rows; and how long one that arrives while all other rows
                 decode waits for its first token
    first-token  reading the longest of --contexts in pieces, to the first new token
    train        forward, loss and backward of one packed row of --train-tokens, no optimiser
    first-call   the first generate() of a new process: with empty disk caches, and again with what
                 that left in them
    memory       a new process that reads a text of each of --contexts and writes --new-tokens: what
                 it takes altogether, while its allocator may take --memory-limit or, without that,
                 what a card of the size in the weights' name has left beside CUDA's own memory

`generate()` is timed by the difference between a run of 1 + --new-tokens tokens and a run of one:
reading the prompt and what a call costs once drop out, and are "first_token_ms". On a GPU
"device_ms_per_token" is the time between the beginning and the end of a forward as CUDA events see
it, and "host_ms_per_token" the rest.

--quantize says how weights of this package's model are held, one model after the other:

    none                 as --dtype says
    24gb, 48gb, 80gb     the presets of `KimiLinearQuantizationConfig`
    fp8                  experts, shared experts and attention in float8 blocks of 128 x 128, many
                         rows of activations too; fp8w: activations always in 16 bits
    experts=3/64+head=8  parts of it (experts, shared_experts, attention, embeddings, head) in 3, 4,
                         8 bits, fp8 or fp8w; "/64": inputs that share a scale, "/row": a scale per
                         row, "z" behind that: a zero for each group; behind a name from above: but
                         for these parts

Packed weights are random codes, with scales that give weights of a usual size. Lines of them say
"quantize", "bits" (of a weight of each packed part, scales counted) and "held_bytes" (of all
weights). They are frozen, so train leaves them out.
"""

import functools
import importlib.util
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from measuring.bench import Bench, Effort, TimeLimitError
from measuring.child import ChildError, run_child
from measuring.device import collect_garbage, measure_rates
from measuring.forms import NONE, bits_of, quantization
from measuring.limits import Limits
from measuring.limits_plot import plot_limits
from measuring.long_text import LongText
from measuring.memory import allocator_limit, default_chunk
from measuring.models import build
from measuring.plot import plot_lines
from measuring.report import Line, Recorder, environment, read_lines, say, table
from measuring.requests import Requests, Workload
from measuring.settings import Settings
from options.settings import command_parser, run_main

from kimi_linear import KimiLinearConfig

MESSAGE_LENGTH = 300
# Where what is compiled is kept from one process to the next.
DISK_CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")


class Subject:
    """A model that is built when the first figure of it is wanted.

    Args:
        make_bench: Builds it.
        longest: The longest context behind which tokens will be decoded.
        workload: What requests ask.
    """

    def __init__(self, make_bench: Callable[[], Bench], longest: int, workload: Workload) -> None:
        self.make_bench, self.longest, self.workload = make_bench, longest, workload

    @functools.cached_property
    def bench(self) -> Bench:
        """The model, for what begins with an empty cache."""
        return self.make_bench()

    @functools.cached_property
    def long_text(self) -> LongText:
        """The text in a cache, for what goes on from there."""
        return LongText(self.bench, self.longest)

    def measure(self, measure: str, place: int) -> dict[str, Any]:
        """Figures of one kind of measurement, at a context, batch or number of tokens."""
        source: Any = self.bench
        if measure in ("decode", "first-token"):
            source = self.long_text
        elif measure == "requests":
            source = Requests(self.bench, self.workload)
        figures = getattr(source, measure.replace("-", "_"))(place)
        return {"held_bytes": self.bench.held_bytes, **figures}


class Run:
    """One run over models and measurements.

    Args:
        settings: What is measured.
        recorder: Where the lines go.
    """

    def __init__(self, settings: Settings, recorder: Recorder) -> None:
        self.settings, self.recorder = settings, recorder
        self.device, self.dtype = settings.torch_device(), settings.torch_dtype()
        seconds = settings.time_limit
        self.deadline = float("inf") if seconds is None else time.monotonic() + seconds

    def run(self, command: Sequence[str]) -> None:
        """Measure everything."""
        if self.settings.threads is not None:
            torch.set_num_threads(self.settings.threads)
        self.rates = measure_rates(self.device, self.dtype)
        collect_garbage(self.device)
        self.recorder.tell(
            {
                "measure": "environment",
                **environment(self.device, command, self.settings.commit),
                "device": self.device.type,
                "dtype": str(self.dtype).removeprefix("torch."),
                "copy_bytes_per_second": self.rates.copy_bytes_per_second,
                "operations_per_second": self.rates.operations_per_second,
            }
        )
        subjects, wanted = self.settings.subjects(), self.settings.measure
        for measure in ("first-call", "memory"):
            for kind, form in subjects if measure in wanted else ():
                self._new_processes(measure, kind, form)
        if "train" in wanted:
            preset = self.settings.train_preset or self.settings.preset
            places = [("train", {"tokens": self.settings.train_tokens})]
            for kind, form in subjects:
                if form == NONE:
                    self._with_model(kind, form, preset, self.deadline, places)
        places = self._inference_places()
        for i, (kind, form) in enumerate(subjects if places else ()):
            now = time.monotonic()
            share = now + (self.deadline - now) / (len(subjects) - i)
            self._with_model(kind, form, self.settings.preset, share, places)

    def _inference_places(self) -> list[tuple[str, dict[str, int]]]:
        """Measurements and where they are made, cheap ones first, contexts in rising order."""
        wanted, contexts = self.settings.measure, sorted(set(self.settings.contexts))
        places = []
        if "generate" in wanted:
            places += [("generate", {"batch": batch}) for batch in self.settings.batches]
        if "requests" in wanted:
            places += [("requests", {"batch": batch}) for batch in self.settings.batches]
        if "step" in wanted:
            places += [("step", {"tokens": tokens}) for tokens in self.settings.step_tokens]
        if "prefill" in wanted:
            places += [("prefill", {"context": context}) for context in contexts]
        for context in contexts:
            if "first-token" in wanted and context == contexts[-1]:
                places.append(("first-token", {"context": context}))
            if "decode" in wanted:
                places.append(("decode", {"context": context}))
        return places

    def _with_model(
        self,
        kind: str,
        form: str,
        preset: str,
        deadline: float,
        places: list[tuple[str, dict[str, int]]],
    ) -> None:
        """Build a model, measure, and free it."""
        subject = Subject(
            lambda: self._bench(kind, form, preset, deadline),
            max(self.settings.contexts),
            self.settings.workload(),
        )
        for measure, place in places:
            line = {**self._line(measure, kind, form, preset), **place}
            call = functools.partial(subject.measure, measure, *place.values())
            self._attempt(line, call, deadline)
        del subject, call
        collect_garbage(self.device)
        if self.device.type == "cuda" and (left := torch.cuda.memory_allocated(self.device)):
            say(f"{kind} {form}: {left / 1e9:.2f} GB of it are still there")

    def _line(self, measure: str, kind: str, form: str, preset: str) -> dict[str, Any]:
        """How the lines of a model begin."""
        line = {"measure": measure, "model": kind, "preset": preset}
        if form != NONE:
            line |= {"quantize": form, "bits": bits_of(form, self.dtype)}
        return line

    def _bench(self, kind: str, form: str, preset: str, deadline: float) -> Bench:
        """A model with random weights, ready to be measured."""
        settings, start = self.settings, time.perf_counter()
        config, held = KimiLinearConfig.from_preset(preset), quantization(form)
        limits = Limits.of(config, self.dtype, self.rates, held)
        model = build(kind, config, device=self.device, dtype=self.dtype, quantization=held)
        effort = Effort(
            repeats=settings.repeats,
            new_tokens=settings.new_tokens,
            prompt_length=settings.prompt_length,
            prefill_chunk=settings.prefill_chunk,
            deadline=deadline,
        )
        say(f"{kind} {form}: {preset} built in {time.perf_counter() - start:.1f} s")
        return Bench(kind, model, limits, effort)

    def _new_processes(self, measure: str, kind: str, form: str) -> None:
        """Measurements in processes of their own."""
        options = {
            "kind": kind,
            "form": form,
            "preset": self.settings.preset,
            "device": self.device.type,
            "dtype": str(self.dtype).removeprefix("torch."),
            "new_tokens": self.settings.new_tokens,
        }
        line = self._line(measure, kind, form, self.settings.preset)
        if measure == "first-call":
            self._first_calls(line, options)
        else:
            self._memories(line, options)

    def _first_calls(self, line: Line, options: dict[str, Any]) -> None:
        """Two new processes, one after the other, with disk caches of their own."""
        options = {**options, "prompt_length": self.settings.prompt_length}
        with tempfile.TemporaryDirectory() as folder:
            variables = {name: f"{folder}/{name}" for name in DISK_CACHES}
            for caches in ("empty", "filled"):
                call = functools.partial(self._child, "first_call", options, variables)
                self._attempt({**line, "disk_caches": caches}, call, self.deadline)

    def _memories(self, line: Line, options: dict[str, Any]) -> None:
        """A new process for each context."""
        settings = self.settings
        limit = allocator_limit(options["form"], settings.memory_limit)
        options = {**options, "chunk": settings.prefill_chunk or default_chunk(options["form"])}
        for context in sorted(set(settings.contexts)):
            collect_garbage(self.device)
            is_cuda = self.device.type == "cuda"
            free = torch.cuda.mem_get_info(self.device)[0] if is_cuda else None
            more = {"context": context, "limit_bytes": limit, "free_bytes": free}
            call = functools.partial(self._child, "memory", {**options, **more})
            place = {"context": context, "limit_bytes": limit}
            self._attempt({**line, **place}, call, self.deadline)

    def _child(
        self, module: str, options: dict[str, Any], variables: dict[str, str] | None = None
    ) -> dict[str, Any]:
        seconds = self.deadline - time.monotonic()
        return run_child(f"measuring.{module}", options, seconds, variables)

    def _attempt(self, line: Line, call: Callable[[], Line], deadline: float) -> None:
        """Measure and record one line; whatever goes wrong becomes the line's "error"."""
        name = " ".join(str(value) for value in line.values() if not isinstance(value, dict))
        spent = f"--time-limit {self.settings.time_limit} is spent"
        start = time.monotonic()
        if start > deadline:
            say(f"{name}: not run, {spent}")
            self.recorder.tell({**line, "error": f"not run: {spent}"})
            return
        say(f"{name} ...")
        try:
            result = {**line, **call()}
        except TimeLimitError:
            result = {**line, "error": f"not finished: {spent}"}
        except ChildError as error:
            text = f"not finished: {spent}" if error.is_late else f"RuntimeError: {error}"
            result = {**line, **error.figures, "error": text[:MESSAGE_LENGTH]}
        # any kind: what a model refuses or cannot do is a result, and the others are still wanted
        except Exception as error:
            result = {**line, "error": f"{type(error).__name__}: {error}"[:MESSAGE_LENGTH]}
        collect_garbage(self.device)
        self.recorder.tell(result)
        say(f"{name}: {result.get('error', 'done')}, {time.monotonic() - start:.1f} s")


def main(**options: Any) -> list[Line]:
    """Measure, or read what was measured; print a table and draw a figure.

    Args:
        **options: Fields of `Settings`; `plot_from` are files of earlier runs, to draw instead of
            measuring.

    Returns:
        The lines.

    Raises:
        ValueError: For an option out of range.
    """
    settings = Settings(**options)
    output = settings.output
    plots = {"plot": plot_lines, "plot_limits": plot_limits}
    wanted = {name: getattr(settings, name) for name in plots if getattr(settings, name)}
    if wanted and importlib.util.find_spec("matplotlib") is None:
        name, path = next(iter(wanted.items()))
        option = f"--{name.replace('_', '-')} {path}"
        raise ValueError(f"{option} is not allowed: it needs matplotlib, which is not there")
    if settings.plot_from:
        lines = read_lines([Path(path) for path in settings.plot_from])
    else:
        recorder = Recorder(None if output is None else Path(output), settings.append)
        Run(settings, recorder).run(["python", *sys.argv])
        lines = recorder.lines
    say("\n" + table(lines))
    for name, path in wanted.items():
        plots[name](lines, Path(path))
        say(f"\ndrawn: {path}")
    return lines


if __name__ == "__main__":
    parser = command_parser(__doc__, Settings)
    text = "draw these lines, measure none"
    parser.add_argument("--plot-from", metavar="FILE", nargs="+", default=(), help=text)
    run_main(main, parser)
