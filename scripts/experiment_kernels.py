"""Time of Kimi Delta Attention's kernels beside the general DPLR operator over the length of the
input (arXiv 2510.26692, section 3.2 and figure 2), forward, and forward with backward.

A KDA step is the DPLR step S_t = (Diag(exp g) + b a^T) S_{t-1} + k w^T with a = k * exp(g),
b = -beta k and w = beta v (section 6.2, in FLA's order of a and b), so all compute the same numbers
from the same inputs:

    kda      FLA's `chunk_kda` on normalised keys, log decays and betas
    dplr     FLA's `chunk_dplr_delta_rule` on a and b made of them; making them is not timed
    kda-safe, dplr-safe  the same, told that no log decay is below -5, which the inputs keep to and
             for which FLA has other kernels
    package  `kda_attention` of this package as its layers call it: norms, gate and sigmoid inside

One row, 16 heads of 128 as in figure 2, bfloat16, on one GPU; without a GPU only "package" runs.
Processes beside each other compile what the autotuners choose among, before anything is timed; the
choice is then made among all of it.

    python scripts/experiment_kernels.py --lengths 64,256 --heads 2
    python scripts/experiment_kernels.py --time-limit 480 \\
        --output benchmarks/results/experiment_kernels.jsonl

Lines: "agreement", how far each is from "kda" at the shortest length; "kernel", milliseconds at a
length, with "pass" forward or forward+backward.
"""

import functools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from experiments.runs import Clock, Lines, RunSettings, parse_share
from measuring.autotuning import limit_autotuning
from measuring.device import collect_garbage, synchronise
from measuring.report import say
from options.settings import command_parser, require, run_main, setting
from torch import Tensor

from kimi_linear.ops.kda import kda_attention

OPERATORS = ("kda", "dplr", "kda-safe", "dplr-safe", "package")
PASSES = ("forward", "forward+backward")
LENGTHS = tuple(1 << n for n in range(11, 17))
WARM_UPS = 2
MESSAGE_LENGTH = 300


@dataclass(frozen=True, kw_only=True)
class Settings(RunSettings):
    """What is measured."""

    operators: Sequence[str] = setting(OPERATORS, choices=OPERATORS)
    lengths: Sequence[int] = setting(LENGTHS, "such as 2k,64k", least=16)
    heads: int = setting(16, "heads", least=1)
    head_dim: int = setting(128, "key and value size of a head")
    repeats: int = setting(10, "runs of which the median counts", least=1)
    autotune: int = setting(0, "choices of autotuners; 0: all", least=0)
    processes: int = setting(8, "compile beforehand; 0: none", least=0, recorded=False)
    warm_share: tuple[int, int] | None = setting(
        None, "compile this share only", parse=parse_share, metavar="I/N", recorded=False
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        allowed = "a power of two from 16 to 256"
        require(self.head_dim in (16, 32, 64, 128, 256), "head_dim", self.head_dim, allowed)


@dataclass(frozen=True)
class Inputs:
    """What all operators compute from.

    Attributes:
        q, k, v, raw_g: [1, T, H, K] before norm, and before bias and softplus.
        raw_beta: [1, T, H] before the sigmoid.
        A_log, dt_bias: [H] and [H * K], float32.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    raw_g: Tensor
    raw_beta: Tensor
    A_log: Tensor
    dt_bias: Tensor

    @classmethod
    def random(
        cls, length: int, settings: Settings, device: torch.device, dtype: torch.dtype
    ) -> "Inputs":
        """Log decays above -5: with A of at most 16, softplus stays below 0.29."""
        generator = torch.Generator(device).manual_seed(length)
        shape = (1, length, settings.heads, settings.head_dim)

        def normal(*sizes: int) -> Tensor:
            return torch.randn(*sizes, generator=generator, device=device)

        q, k, v, g = (normal(*shape).to(dtype) for _ in range(4))
        A_log = (1 + 15 * torch.rand(settings.heads, generator=generator, device=device)).log()
        g = g.clamp(-1.9, 1.9)
        bias = (normal(settings.heads * settings.head_dim) - 4).clamp(max=-3)
        return cls(q, k, v, g, normal(*shape[:3]).to(dtype), A_log, bias)

    def log_decay(self) -> Tensor:
        """[1, T, H, K] float32."""
        H, K = self.q.shape[2:]
        wide = self.raw_g.float() + self.dt_bias.view(H, K)
        return -self.A_log.exp().view(H, 1) * torch.nn.functional.softplus(wide)


def normalised(x: Tensor) -> Tensor:
    """Vectors of length 1, as KDA makes its queries and keys."""
    wide = x.float()
    return (wide * (wide.square().sum(-1, keepdim=True) + 1e-6).rsqrt()).to(x.dtype)


def kda_arguments(x: Inputs) -> dict[str, Tensor]:
    """Of `chunk_kda`."""
    g, beta = x.log_decay(), x.raw_beta.sigmoid()
    return {"q": normalised(x.q), "k": normalised(x.k), "v": x.v, "g": g, "beta": beta}


def dplr_arguments(x: Inputs) -> dict[str, Tensor]:
    """Of `chunk_dplr_delta_rule`, for the same result."""
    kda = kda_arguments(x)
    k, beta, g = kda["k"], kda["beta"].unsqueeze(-1), kda["g"]
    a, b = (k.float() * g.exp()).to(k.dtype), -beta * k
    return {"q": kda["q"], "k": k, "v": beta * x.v, "a": a, "b": b, "gk": g}


def package_arguments(x: Inputs) -> dict[str, Tensor]:
    """Of `kda_attention`."""
    return {"q": x.q, "k": x.k, "v": x.v, "g": x.raw_g, "beta": x.raw_beta}


def operator(name: str, x: Inputs) -> tuple[Callable[..., Any], dict[str, Tensor]]:
    """A function and its tensors, those that get gradients.

    Raises:
        ImportError: Where FLA is not installed.
    """
    if name == "package":
        call = functools.partial(kda_attention, A_log=x.A_log, dt_bias=x.dt_bias)
        return call, package_arguments(x)
    is_safe = name.endswith("-safe")
    if name.startswith("dplr"):
        from fla.ops.generalized_delta_rule.dplr import chunk_dplr_delta_rule

        return functools.partial(chunk_dplr_delta_rule, safe_gate=is_safe), dplr_arguments(x)
    from fla.ops.kda import chunk_kda

    return functools.partial(chunk_kda, safe_gate=is_safe), kda_arguments(x)


class Runner:
    """One operator at one length.

    Args:
        name: One of `OPERATORS`.
        x: Its inputs.
    """

    def __init__(self, name: str, x: Inputs) -> None:
        self.device = x.q.device
        call, tensors = operator(name, x)
        self.tensors = {key: tensor.detach().contiguous() for key, tensor in tensors.items()}
        self.call = call
        self.gradient = torch.randn_like(x.v)

    def forward(self) -> Tensor:
        """[1, T, H, K]."""
        return self.call(**self.tensors)[0]

    def run(self, kind: str) -> None:
        """One of `PASSES`."""
        if kind == "forward":
            with torch.no_grad():
                self.forward()
            return
        for tensor in self.tensors.values():
            tensor.requires_grad_()
            tensor.grad = None
        self.forward().backward(self.gradient)

    def milliseconds(self, kind: str, repeats: int) -> list[float]:
        """Of single runs, after a warm-up."""
        for _ in range(WARM_UPS):
            self.run(kind)
        times = []
        for _ in range(repeats):
            synchronise(self.device)
            start = time.perf_counter()
            self.run(kind)
            synchronise(self.device)
            times.append(1e3 * (time.perf_counter() - start))
        return times


def main(**options: Any) -> list[Any]:
    """Measure every operator at every length.

    Args:
        **options: Fields of `Settings`.

    Returns:
        The lines.

    Raises:
        ValueError: For an option out of range.
    """
    settings = Settings(**options)
    clock, where, lines = settings.start("kernels")
    dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    limit_autotuning(settings.autotune, settings.warm_share or (0, 1))
    if settings.warm_share is not None:
        _compile(settings, where, dtype)
        return []
    lines.begin(where, settings, dtype=str(dtype)[6:])
    if where.type == "cuda" and settings.processes:
        _compile_beforehand(settings, clock)
    lengths = sorted(set(settings.lengths))
    _compare(settings, Inputs.random(lengths[0], settings, where, dtype), lines)
    for length in lengths:
        x = Inputs.random(length, settings, where, dtype)
        for name in settings.operators:
            for kind in PASSES:
                place = {"operator": name, "length": length, "pass": kind}
                if clock.is_over:
                    lines.tell("kernel", **place, error="not run: --time-limit is spent")
                    continue
                figures = _guarded(functools.partial(_measure, name, x, kind, settings.repeats))
                lines.tell("kernel", **place, heads=settings.heads, **figures)
                collect_garbage(where)
    return lines.lines


def _guarded(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Figures, or what went wrong as "error": the others are still wanted."""
    try:
        return measure()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:MESSAGE_LENGTH]}


def _measure(name: str, x: Inputs, kind: str, repeats: int) -> dict[str, Any]:
    runner, is_cuda = Runner(name, x), x.q.is_cuda
    if is_cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    times = runner.milliseconds(kind, repeats)
    figures: dict[str, Any] = {"ms": statistics.median(times), "ms_best": min(times)}
    if is_cuda:
        figures["peak_bytes"] = torch.cuda.max_memory_allocated() - before
    return figures


def _compare(settings: Settings, x: Inputs, lines: Lines) -> None:
    """Root mean square of the difference from "kda", over that of the values."""

    def output(name: str) -> Tensor:
        with torch.no_grad():
            return Runner(name, x).forward().float()

    def difference(name: str) -> dict[str, Any]:
        expected = output("kda")
        error = (output(name) - expected).square().mean().sqrt()
        return {"relative_error": float(error / expected.square().mean().sqrt())}

    for name in settings.operators:
        if name != "kda":
            found = _guarded(functools.partial(difference, name))
            lines.tell("agreement", operator=name, length=x.q.shape[1], **found)


def _compile(settings: Settings, device: torch.device, dtype: torch.dtype) -> None:
    """Run each operator once, for what that leaves in Triton's cache on disk."""
    x = Inputs.random(min(settings.lengths), settings, device, dtype)
    for name in settings.operators:
        for kind in PASSES:
            found = _guarded(lambda name=name, kind=kind: Runner(name, x).run(kind) or {})
            if "error" in found:  # of a choice that does not fit the chip
                say(f"{name} {kind}: {found['error']}")


def _compile_beforehand(settings: Settings, clock: Clock) -> None:
    """Processes of this script beside each other, each with its share of the configurations."""
    processes = settings.processes
    say(f"{processes} processes compile ...")
    start = time.monotonic()
    command = [sys.executable, __file__, "--autotune", str(settings.autotune)]
    command += ["--operators", ",".join(settings.operators)]
    command += ["--lengths", str(min(settings.lengths))]
    command += ["--heads", str(settings.heads), "--head-dim", str(settings.head_dim)]
    shares = [[*command, "--warm-share", f"{i}/{processes}"] for i in range(processes)]
    running = [subprocess.Popen(share, stdout=subprocess.DEVNULL) for share in shares]
    for process in running:
        left = None if clock.end == float("inf") else max(1.0, clock.end - time.monotonic())
        try:
            process.wait(left)
        except subprocess.TimeoutExpired:
            process.kill()
    say(f"compiled in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    run_main(main, command_parser(__doc__, Settings))
