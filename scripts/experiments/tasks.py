"""The report's synthetic tasks (arXiv 2510.26692, section 5.1), made on the device that reads them.

    palindrome  O G R S <sep> S R G O: random tokens and, behind a separator, the same ones
                reversed. The first reversed token is given, the others are to be predicted.
    mqar        A 1 C 3 B 0 <sep> B A: pairs of a key and a value, then queries, at each of which
                its value is to be predicted; keys differ from each other. There are a quarter as
                many pairs as tokens; what remains is queries.
    stack       <push> 1 G <pop> 1 G: 64 stacks, last in, first out. At the stack's number in a pop
                the element is to be predicted that was pushed last. Half of the operations are
                pops, of stacks that hold something.

What the report leaves open, and is chosen here: how many symbols there are, the number of pairs,
and which stacks are taken (uniformly).

Shapes: N sequences, T tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

IGNORED = -100
NUM_STACKS = 64
MIN_LENGTH = 8


@dataclass(frozen=True)
class Task:
    """A kind of sequences.

    Attributes:
        name: One of `TASKS`.
        length: T, at most.
        symbols: How many random tokens there are (of "mqar": keys, and as many values).
    """

    name: str
    length: int
    symbols: int

    def __post_init__(self) -> None:
        if self.name not in TASKS:
            raise ValueError(f"task {self.name!r} is not allowed: it must be one of {TASKS}")
        if self.length < MIN_LENGTH:
            raise ValueError(f"length {self.length} is not allowed: at least {MIN_LENGTH}")
        least = self.length // 4 if self.name == "mqar" else 2
        if self.symbols < least:
            raise ValueError(
                f"symbols={self.symbols} is not allowed: {self.name} of length {self.length} needs "
                f"at least {least}"
            )

    @property
    def vocab_size(self) -> int:
        """Ids in use, rounded up to a multiple of 8."""
        used = {
            "palindrome": self.symbols + 1,
            "mqar": 2 * self.symbols + 1,
            "stack": self.symbols + NUM_STACKS + 2,
        }[self.name]
        return -(-used // 8) * 8

    def sample(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Random sequences.

        Args:
            count: N.
            generator: On the device where they are made.

        Returns:
            ids [N, T] and labels [N, T], int64: at each token what is to be predicted there (not
            shifted), -100 where nothing is.
        """
        return _MAKERS[self.name](self, count, generator)


def generators(seed: int, device: torch.device) -> tuple[torch.Generator, torch.Generator]:
    """Of training and of test sequences, which never have the same seed."""
    return tuple(  # type: ignore[return-value]
        torch.Generator(device).manual_seed(2 * seed + is_test) for is_test in (0, 1)
    )


def _palindrome(task: Task, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    half, device = task.length // 2, generator.device
    text = torch.randint(task.symbols, (count, half), generator=generator, device=device)
    separator = torch.full_like(text[:, :1], task.symbols)
    back = text.flip(1)
    ids = torch.cat([text, separator, back[:, :-1]], dim=1)
    return ids, torch.cat([torch.full_like(ids[:, : half + 1], IGNORED), back[:, 1:]], dim=1)


def _mqar(task: Task, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    pairs, device, symbols = task.length // 4, generator.device, task.symbols
    queries = task.length - 2 * pairs - 1
    order = torch.rand(count, symbols, generator=generator, device=device)
    keys = order.argsort(dim=1)[:, :pairs]
    values = symbols + torch.randint(symbols, (count, pairs), generator=generator, device=device)
    chosen = torch.randint(pairs, (count, queries), generator=generator, device=device)
    separator = torch.full_like(keys[:, :1], 2 * symbols)
    shown = torch.stack([keys, values], dim=2).flatten(1)
    ids = torch.cat([shown, separator, keys.gather(1, chosen)], dim=1)
    ignored = torch.full_like(ids[:, : 2 * pairs + 1], IGNORED)
    return ids, torch.cat([ignored, values.gather(1, chosen)], dim=1)


def _stack(task: Task, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    steps, device, symbols = task.length // 3, generator.device, task.symbols
    push, pop = symbols + NUM_STACKS, symbols + NUM_STACKS + 1
    rows = torch.arange(count, device=device)
    wants_pop = torch.rand(count, steps, generator=generator, device=device) < 0.5
    elements = torch.randint(symbols, (count, steps), generator=generator, device=device)
    depth = torch.zeros(count, NUM_STACKS, dtype=torch.int64, device=device)
    held = torch.zeros(count, NUM_STACKS, steps, dtype=torch.int16, device=device)
    ids, labels = [], []
    for i in range(steps):
        scores = torch.rand(count, NUM_STACKS, generator=generator, device=device)
        filled = depth > 0
        pops = wants_pop[:, i] & filled.any(1)
        stack = (scores + (filled & pops[:, None])).argmax(1)  # of a pop: among those filled
        top = depth[rows, stack]
        popped = held[rows, stack, (top - 1).clamp(min=0)].long()
        element = torch.where(pops, popped, elements[:, i])
        place = torch.where(pops, top - 1, top)
        held[rows, stack, place] = element.short()  # of a pop: what is there already
        depth[rows, stack] += 1 - 2 * pops.long()
        ids += [torch.where(pops, pop, push), symbols + stack, element]
        nothing = torch.full_like(element, IGNORED)
        labels += [nothing, torch.where(pops, element, IGNORED), nothing]
    return torch.stack(ids, dim=1), torch.stack(labels, dim=1)


_MAKERS: dict[str, Callable[[Task, int, torch.Generator], tuple[Tensor, Tensor]]] = {
    "palindrome": _palindrome,
    "mqar": _mqar,
    "stack": _stack,
}
TASKS = tuple(_MAKERS)
