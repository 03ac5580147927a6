"""A training by the clock in slices: each ends in time, and the next goes on from what it left.

A folder on the machine holds the last slice's model and optimizer, or the trained model. Batches
depend on the number of the step only, so that a slice sees what it would have seen. A row is read
as one text, whatever files begin in it, so that one recording serves all of them.
"""

import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from learning.optimizers import schedule_factor
from measuring.report import say

from experiments.recorded import RecordedGradients
from experiments.sources import Sources
from kimi_linear import KimiLinearConfig, KimiLinearForCausalLM
from kimi_linear.training.expert_loads import ExpertLoads
from kimi_linear.training.parameter_groups import parameter_groups

CLIP_NORM = 1.0
# Bytes a second that a disk takes at least, and seconds that a slice keeps beside that.
DISK_RATE, MARGIN_SECONDS = 4e8, 3.0
# Seconds between two lines about the loss.
POINT_SECONDS = 20.0


@dataclass(frozen=True)
class Recipe:
    """How a model is trained.

    Attributes:
        seconds: Of the whole training, on the clock; what a slice begins and ends with is no part.
        rows, length: Of a batch.
        learning_rate: The highest.
        weight_decay: Of matrices.
        seed: Of weights and batches.
        bias_rate: Step of the routers' correction biases.
        repeats: How likely a row says a piece of text again and again.
    """

    seconds: float
    rows: int
    length: int
    learning_rate: float
    weight_decay: float
    seed: int
    bias_rate: float
    repeats: float = 0.0


class SlicedTraining:
    """A model on its way.

    Args:
        config: Of the model.
        recipe: How it is trained.
        sources: What on.
        folder: What earlier slices have left; made if it is not there.
        device: Where.

    Attributes:
        name: The model's own, by which lines tell it from one of another training.
    """

    def __init__(
        self,
        config: KimiLinearConfig,
        recipe: Recipe,
        sources: Sources,
        folder: Path,
        device: torch.device,
    ) -> None:
        self.recipe, self.sources, self.folder, self.device = recipe, sources, folder, device
        folder.mkdir(parents=True, exist_ok=True)
        self.name, self.step, self.seconds = uuid.uuid4().hex[:8], 0, 0.0
        torch.manual_seed(recipe.seed)
        with device:
            self.model = KimiLinearForCausalLM(config)
        is_cuda = device.type == "cuda"
        groups = parameter_groups(self.model, recipe.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=is_cuda)
        if self._file.exists():
            self._load()

    @property
    def _file(self) -> Path:
        return self.folder / "slice.pt"

    @property
    def progress(self) -> float:
        """Fraction of the training that is done."""
        return min(1.0, self.seconds / self.recipe.seconds)

    @property
    def num_tokens(self) -> int:
        """Read so far."""
        return self.step * self.recipe.rows * self.recipe.length

    def saving_seconds(self) -> float:
        """What it takes to write a slice down, at most."""
        numbers = sum(each.numel() for each in self.model.parameters())
        return 3 * 4 * numbers / DISK_RATE + MARGIN_SECONDS

    def run(self, deadline: float, tell: Callable[..., Any]) -> bool:
        """Train until it is done or the time is up, and save; whether it is done.

        Args:
            deadline: In `time.monotonic()`'s seconds, saving included.
            tell: Takes figures of a point on the way.
        """
        end = deadline - self.saving_seconds()
        self.model.train()
        loads = ExpertLoads(self.model)
        gradients = RecordedGradients(
            lambda ids: self._gradients(ids, loads), self._batch(), self.optimizer.zero_grad
        )
        begin = last = time.monotonic()
        losses: list[torch.Tensor] = []
        while self.progress < 1 and time.monotonic() < end:
            losses.append(self._update(gradients, loads))
            now = time.monotonic()
            self.seconds, last = self.seconds + now - last, now
            if now - begin > POINT_SECONDS or self.progress >= 1 or now > end:
                tokens = len(losses) * self.recipe.rows * self.recipe.length
                tell(
                    step=self.step,
                    train_seconds=self.seconds,
                    loss=float(torch.stack(losses).mean()),
                    tokens_per_second=tokens / (now - begin),
                )
                losses, begin = [], time.monotonic()
                last = begin
        loads.stop()
        if self.progress < 1:
            self._save()
        return self.progress >= 1

    def _batch(self) -> torch.Tensor:
        """[B, T] int64 of the next step."""
        recipe = self.recipe
        seed = (recipe.seed << 32) + self.step
        ids, _ = self.sources.rows(recipe.rows, recipe.length, seed, recipe.repeats)
        return ids.to(self.device)

    def _gradients(self, ids: torch.Tensor, loads: ExpertLoads) -> tuple[torch.Tensor, ...]:
        """Loss, the gradients' norm before they are clipped, and loads of experts."""
        loads.reset()  # of a recording that was broken off
        # without autocast's cache of cast weights, which a recording would read after it is gone
        with torch.autocast(
            self.device.type, torch.bfloat16, self.device.type == "cuda", cache_enabled=False
        ):
            loss = self.model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM)
        return loss.detach(), norm, loads.take()

    def _update(self, gradients: RecordedGradients, loads: ExpertLoads) -> torch.Tensor:
        """One step and its loss."""
        loss, norm, counts = gradients(self._batch())
        self.step += 1
        rate = self.recipe.learning_rate * schedule_factor("wsd", self.progress)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if bool(norm.isfinite()):  # which waits for the device, and so the clock does
            self.optimizer.step()
            loads.update_biases(counts, self.recipe.bias_rate)
        else:
            say(f"step {self.step}: gradients are not finite, no update")
        return loss.clone()

    def _save(self) -> None:
        start = time.monotonic()
        part = self._file.with_suffix(".part")
        state = {
            "name": self.name,
            "step": self.step,
            "seconds": self.seconds,
            "recipe": asdict(self.recipe),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        torch.save(state, part)
        part.replace(self._file)
        say(f"{self._file} saved in {time.monotonic() - start:.1f} s")

    def _load(self) -> None:
        state = torch.load(self._file, map_location=self.device)
        before = {**state["recipe"], "seconds": self.recipe.seconds}  # which may change on the way
        if before != asdict(self.recipe):
            raise ValueError(
                f"--folder {str(self.folder)!r} is not allowed: it holds a training of other "
                f"settings ({state['recipe']})"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.name, self.step, self.seconds = state["name"], state["step"], state["seconds"]
        say(f"goes on from step {self.step}, {100 * self.progress:.0f} % done")


def save_trained(training: SlicedTraining, file: Path, dtype: torch.dtype, **more: Any) -> None:
    """Write the model down in a dtype, and remove what the slices left."""
    model = training.model.to(dtype)
    part = file.with_suffix(".part")
    torch.save({"name": training.name, "model": model.state_dict(), **more}, part)
    part.replace(file)
    (training.folder / "slice.pt").unlink(missing_ok=True)


def load_trained(
    file: Path, config: KimiLinearConfig, device: torch.device
) -> tuple[KimiLinearForCausalLM, dict[str, Any]]:
    """The model in eval mode, and what else was written down."""
    state = torch.load(file, map_location=device)
    weights = state.pop("model")
    with torch.device("meta"):
        model = KimiLinearForCausalLM(config)
    model.load_state_dict(weights, assign=True)
    return model.eval().requires_grad_(False), state
