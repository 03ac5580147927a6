"""What few bits cost a trained model: bits per byte of held-out text, and how far its predictions
are from those of the same model in 16 bits, by scheme, with and without calibration.

A model of a preset's layers, with a tokenizer of its own, is trained for --train-minutes on the
source of Python's standard library and of installed packages; whole files of the library are held
out. Then its weights are quantised and judged, one form after the other (`measuring/forms.py` has
their names), in this order:

    main               the presets 24gb, 48gb and 80gb, fp8 and fp8w, all parts in 3, 4 and 8 bits;
                       no data
    calibrated         those of 3 and 4 bits with GPTQ, on --calibration-tokens of the training text
    parts              one part alone in 3 and in 4 bits
    groups             experts alone, with groups of 32, 64 and 128 and with zeros
    calibrated-groups  some of these with GPTQ

The experts' width is --expert-width, which groups of 128 divide, not the preset's.

A check that it runs, on a CPU, and the whole on one GPU. It runs in slices: called again with the
same --folder and --output it goes on where --time-limit ended it, until "slice" says is_done. The
folder, on a local disk, takes 14 GB meanwhile:

    python scripts/experiment_quantization.py --preset 2m --expert-width 128 --train-minutes 0.5 \\
        --vocab-size 1024 --packages 0 --length 256 --rows 2 --folder /tmp/small
    python scripts/experiment_quantization.py --train-minutes 20 --time-limit 590 \\
        --folder /tmp/quantization --output /tmp/quantization/quality.jsonl

Lines: "train", the loss on the way; "trained", what came out; "quality", figures of one form;
"slice", whether all is done. "bits_per_byte" is that of the held-out text, "kl" nats a token from
the 16-bit model's predictions, "agreement" how often the likeliest token is the same,
"held_bytes" what all weights take, and "held_bytes_48b" what those of the 48B model would.
"""

import copy
import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from experiments.calibrating import calibrate_model
from experiments.judging import Judge, packed_model
from experiments.runs import Clock, Lines, RunSettings
from experiments.slices import Recipe, SlicedTraining, load_trained, save_trained
from experiments.sources import Sources
from measuring.autotuning import limit_autotuning
from measuring.device import Rates, collect_garbage, synchronise
from measuring.forms import NONE, bits_of, quantization
from measuring.limits import Limits
from measuring.packed import held_bytes
from measuring.report import Line, say
from options.settings import command_parser, run_main, setting

from kimi_linear import PRESETS, KimiLinearConfig
from kimi_linear.configuration_quantization import PARTS

MESSAGE_LENGTH = 300
FULL_SIZE = "48b-a3b"
# Slices end this much before their time, for what a measurement takes longer than the one before.
PATIENCE = 1.5


def everything(bits: str) -> str:
    """The form in which all parts are held in the same way."""
    return "+".join(f"{part}={bits}" for part in PARTS)


def in_each(bits: Sequence[str]) -> tuple[str, ...]:
    """Forms in which one part alone is held so."""
    return tuple(f"{part}={each}" for each in bits for part in PARTS)


MAIN = ("24gb", "48gb", "80gb", "fp8", "fp8w", *map(everything, ("3/64", "4/64", "8/64")))
GROUPED = ("3/32", "3/128", "3/32z", "3/64z", "3/128z", "4/32", "4/128", "4/64z")
SECTIONS: dict[str, tuple[str, ...]] = {
    "main": (NONE, *MAIN),
    "calibrated": ("24gb", "48gb", *map(everything, ("3/64", "4/64"))),
    "parts": in_each(("3/64", "4/64")),
    "groups": tuple(f"experts={bits}" for bits in GROUPED),
    "calibrated-groups": tuple(f"experts={bits}" for bits in ("3/32", "3/64", "3/128", "3/64z")),
}


@dataclass(frozen=True, kw_only=True)
class Settings(RunSettings):
    """What is trained and measured."""

    preset: str = setting("1b-a0.3b", "size, see presets.py", choices=PRESETS)
    expert_width: int = setting(512, "in place of the preset's", least=32)
    train_minutes: float = setting(20.0, "of the whole training", above=0)
    vocab_size: int = setting(16384, "of the tokenizer", least=512)
    corpus: str | None = setting(None, "folder of Python files; else the library", metavar="DIR")
    packages: float = setting(100.0, "megabytes of installed packages", least=0, metavar="MB")
    rows: int = setting(2, "of a batch", least=1)
    length: int = setting(8192, "tokens of a row", least=16)
    learning_rate: float = setting(6e-4, "the highest", above=0)
    weight_decay: float = setting(0.1, "of matrices", least=0)
    bias_rate: float = setting(1e-3, "step of the routers' correction biases", least=0)
    repeats: float = setting(
        0.0, "how likely a row says a piece of text again and again", least=0, most=1
    )
    seed: int = setting(0, "of weights and batches", least=0)
    sections: Sequence[str] = setting(tuple(SECTIONS), "in this order", choices=SECTIONS)
    eval_tokens: int = setting(1 << 17, "of held-out text", least=2)
    calibration_tokens: int = setting(1 << 17, "of training text", least=2048)
    autotune: int = setting(0, "choices of autotuners; 0: all", least=0)
    folder: str = setting("/tmp/kimi-quantization", "what slices leave to the next ones")

    def recipe(self) -> Recipe:
        """How it is trained."""
        return Recipe(
            seconds=60 * self.train_minutes,
            rows=self.rows,
            length=self.length,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            seed=self.seed,
            bias_rate=self.bias_rate,
            repeats=self.repeats,
        )

    def config(self, sources: Sources) -> KimiLinearConfig:
        """The model's."""
        found = KimiLinearConfig.from_preset(self.preset)
        width = self.expert_width
        return KimiLinearConfig.from_preset(
            self.preset,
            moe_intermediate_size=width,
            intermediate_size=width * (found.num_experts_per_token + 1),
            **sources.special,
        )


def main(**options: Any) -> list[Any]:
    """Train if that is not done, then measure what is not in the file yet.

    Args:
        **options: Fields of `Settings`.

    Returns:
        The lines.

    Raises:
        ValueError: For an option out of range.
    """
    settings = Settings(**options)
    clock, where, lines = settings.start("quantization")
    limit_autotuning(settings.autotune)
    folder, dtype = Path(settings.folder), _dtype(where)
    root = None if settings.corpus is None else Path(settings.corpus)
    sources = Sources.load(folder, settings.vocab_size, root, settings.packages)
    config = settings.config(sources)
    held_out = sum(map(len, sources.held_out))
    lines.begin(where, settings, train_tokens=len(sources.train), held_out_tokens=held_out)
    file = folder / "trained.pt"
    if not file.exists() and not _train(settings, config, sources, clock, where, file, lines):
        say("the training is not done: call again with the same settings")
        lines.tell("slice", is_done=False)
        return lines.lines
    collect_garbage(where)
    model, state = load_trained(file, config, where)
    assert model.dtype == dtype
    is_done = _Measurement(settings, sources, model, state["name"], lines).run(clock)
    lines.tell("slice", is_done=is_done)
    return lines.lines


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _train(
    settings: Settings,
    config: KimiLinearConfig,
    sources: Sources,
    clock: Clock,
    device: torch.device,
    file: Path,
    lines: Lines,
) -> bool:
    """A slice of the training; whether it is done, and the model in the file."""
    folder = Path(settings.folder)
    training = SlicedTraining(config, settings.recipe(), sources, folder, device)
    is_done = training.run(clock.end, functools.partial(lines.tell, "train", model=training.name))
    if is_done:
        parameters = sum(each.numel() for each in training.model.parameters())
        lines.tell(
            "trained",
            model=training.name,
            preset=settings.preset,
            parameters=parameters,
            steps=training.step,
            tokens=training.num_tokens,
            train_seconds=training.seconds,
        )
        save_trained(training, file, _dtype(device), config=config.to_dict())
    return is_done


class _Measurement:
    """Forms of one trained model.

    Args:
        settings: What is measured.
        sources: The text.
        model: In the dtype without packed weights.
        name: The model's.
        lines: Where the figures go.
    """

    def __init__(
        self, settings: Settings, sources: Sources, model: Any, name: str, lines: Lines
    ) -> None:
        self.settings, self.sources, self.model = settings, sources, model
        self.name, self.lines = name, lines
        self.judge = Judge(model, sources.held_out, sources.held_out_bytes, settings.eval_tokens)

    def run(self, clock: Clock) -> bool:
        """Measure what is not done yet, as far as there is time; whether all is done."""
        longest: dict[bool, float] = {}
        for section in self.settings.sections:
            is_calibrated = section.startswith("calibrated")
            for form in SECTIONS[section]:
                if (form, is_calibrated) in self._done():
                    continue
                start = time.monotonic()
                if start + PATIENCE * longest.get(is_calibrated, 0.0) > clock.end:
                    say(f"{section} {form}: not run, --time-limit is spent")
                    return False
                self._tell(section, form, is_calibrated)
                took = time.monotonic() - start
                longest[is_calibrated] = max(took, longest.get(is_calibrated, 0.0))
        return True

    def _done(self) -> set[tuple[str, bool]]:
        """What was measured, and in this run found impossible."""
        before = [line for line in self.lines.before if "error" not in line]
        return {
            (line["form"], line["is_calibrated"])
            for line in (*before, *self.lines.lines)
            if line["event"] == "quality" and line["model"] == self.name
        }

    def _tell(self, section: str, form: str, is_calibrated: bool) -> Line:
        """Measure one form; whatever goes wrong becomes the line's "error"."""
        place = {"model": self.name, "form": form, "is_calibrated": is_calibrated}
        say(f"{section} {form} ...")
        try:
            figures = self._figures(form, is_calibrated)
        # any kind: what cannot be held so is a result, and the others are still wanted
        except Exception as error:
            figures = {"error": f"{type(error).__name__}: {error}"[:MESSAGE_LENGTH]}
        collect_garbage(self.model.device)
        return self.lines.tell("quality", section=section, **place, **figures)

    def _figures(self, form: str, is_calibrated: bool) -> dict[str, Any]:
        start = time.monotonic()
        model = self._quantised(form, is_calibrated)
        synchronise(self.model.device)
        middle = time.monotonic()
        figures = self.judge.figures(model)
        return {
            "bits": bits_of(form, self.model.dtype),
            **figures,
            "held_bytes": sum(map(held_bytes, model.parameters())),
            "held_bytes_48b": full_bytes(form),
            "eval_tokens": self.judge.num_tokens,
            "quantize_seconds": middle - start,
            "eval_seconds": time.monotonic() - middle,
        }

    def _quantised(self, form: str, is_calibrated: bool) -> Any:
        found = quantization(form)
        if found is None:
            return self.model
        if not is_calibrated:
            return packed_model(self.model, found)
        made = copy.deepcopy(self.model)
        length = 2048
        count = self.settings.calibration_tokens // length
        # from places that no training step has read together
        rows = self.sources.rows(count, length, seed=self.settings.seed + 1)
        calibrate_model(made, rows, found)
        return made


@functools.cache
def full_bytes(form: str) -> int:
    """What the 48B model's weights take in a form, in bfloat16 where they are not packed."""
    config = KimiLinearConfig.from_preset(FULL_SIZE)
    return Limits.of(config, torch.bfloat16, Rates(1, 1), quantization(form)).total_bytes


if __name__ == "__main__":
    run_main(main, command_parser(__doc__, Settings))
