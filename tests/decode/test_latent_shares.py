"""The step's attention to latents, in shares that are joined: against the softmax in float64."""

import pytest
import torch
from decode_models import DEVICES, check
from torch import Tensor

from kimi_linear.decode.addresses import Counters, LatentAddresses, padded
from kimi_linear.decode.attention_kernels import attend_kernel, mix_kernel
from kimi_linear.decode.step import LOG2_E, MOST_WAVES, SPLITS, shares_of_rows
from kimi_linear.ops.runtime import power_of_two

pytestmark = [pytest.mark.kernels, pytest.mark.interpreted]
on_each_device = pytest.mark.parametrize("device", DEVICES)
B, H, N, V, L, P = 2, 3, 16, 16, 32, 16
R = L + P


class Latents:
    """Of B rows, around which memory is NaN."""

    def __init__(self, tokens: int, device: str, dtype: torch.dtype) -> None:
        self.held = torch.full((B, tokens + 5, R), float("nan"), device=device, dtype=dtype)
        self.held[:, :tokens].normal_()
        self.tokens = tokens

    @property
    def real(self) -> Tensor:
        return self.held[:, : self.tokens]


def attention(
    query: Tensor,
    table: Tensor,
    counts: Tensor,
    real: Tensor,
    shares: int,
    block: int,
    *,
    page: int = 0,
    has_padding: bool = False,
) -> Tensor:
    """[B, H, L], by the kernels."""
    like = {"device": query.device, "dtype": torch.float32}
    mixed = query.new_full((B, shares, H, L), float("nan"))
    weight = torch.full((B, shares, 2, H), float("nan"), **like)
    out = torch.empty(B, H, L, device=query.device, dtype=query.dtype)
    place = torch.tensor([real.data_ptr(), real.stride(0)], device=query.device)
    attend_kernel[(B, shares)](
        query,
        table,
        counts,
        place,
        mixed,
        weight,
        0.3 * LOG2_E,
        1,
        H=H,
        HEADS=16,
        L=L,
        P=P,
        SPLITS=shares,
        BLOCK=block,
        PIECE=16,
        PAGE=page,
        HAS_PADDING=has_padding,
        IS_LINKED=False,
    )
    mix_kernel[(B, H, 1)](
        mixed,
        weight,
        query,
        out,
        *(out,) * 4,
        0,
        FIXED=0,
        H=H,
        N=N,
        V=V,
        L=L,
        SPLITS=shares,
        PLACES=power_of_two(shares),
        GROUP=min(4, power_of_two(shares)),
        BLOCK=V,
        HAS_VALUES=False,
        IS_LINKED=False,
    )
    return out


def expected(query: Tensor, latents: Tensor, real: Tensor) -> Tensor:
    """[B, H, L], in float64."""
    latents = latents.double()
    scores = 0.3 * torch.einsum("bhr,bsr->bhs", query.double(), latents)
    scores = scores.masked_fill(real[:, None, : latents.shape[1]] == 0, float("-inf"))
    return scores.softmax(-1) @ latents[..., :L]


@pytest.mark.parametrize("has_padding", [False, True])
@pytest.mark.parametrize("block", [16, 32, 64])
@pytest.mark.parametrize("shares", [1, 3, 7])
# nothing whole; whole blocks alone; more blocks than shares; what is left of one, or of both
@pytest.mark.parametrize("tokens", [(0, 1), (0, 64), (0, 300), (70, 1), (64, 130), (37, 101)])
@on_each_device
def test_shares_of_a_prefix_and_a_tail(tokens, shares, block, has_padding, device):
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    prefix, tail = (Latents(n, device, dtype) for n in tokens)
    query = torch.randn(B, H, R, device=device, dtype=dtype)
    real = torch.ones(B, sum(tokens), device=device, dtype=torch.uint8)
    if has_padding:  # all but the last third, or here and there
        real[0, : sum(tokens) * 2 // 3] = 0
        real[1, :-1:3] = 0
    address = LatentAddresses(
        prefix.held.data_ptr(),
        prefix.tokens,
        prefix.held.stride(0),
        tail.held.data_ptr(),
        tail.held.stride(0),
    )
    table = torch.tensor(padded([address]), device=device)
    counts = [Counters(cached=sum(tokens) - 1, row=row) for row in range(B)]
    counts = torch.tensor(counts, device=device)
    out = attention(query, table, counts, real, shares, block, has_padding=has_padding)
    check(out, expected(query, torch.cat([prefix.real, tail.real], 1), real))


@pytest.mark.parametrize("tokens", [5, 64, 230])
@on_each_device
def test_shares_of_pages(tokens, device):
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    page = 64
    pool = torch.full((8, page, R), float("nan"), device=device, dtype=dtype)
    pages = torch.tensor([[6, 1, 4, 2], [3, 0, 7, 5]], device=device, dtype=torch.int32)
    texts = torch.randn(B, tokens, R, device=device, dtype=dtype)
    for row in range(B):
        for i, part in enumerate(texts[row].split(page)):
            pool[pages[row, i], : len(part)] = part
    query = torch.randn(B, H, R, device=device, dtype=dtype)
    address = LatentAddresses(
        tail=pool.data_ptr(), pages=pages.data_ptr(), pages_stride=pages.stride(0)
    )
    table = torch.tensor(padded([address]), device=device)
    counts = torch.tensor([Counters(cached=tokens - 1, row=row) for row in range(B)], device=device)
    real = torch.ones(B, tokens, device=device, dtype=torch.uint8)
    out = attention(query, table, counts, real, 3, 32, page=page)
    check(out, expected(query, texts, real))


def test_shares_fill_the_chip():
    for num_rows in range(1, 257):
        programs = num_rows * shares_of_rows(num_rows)
        waves = -(-programs // SPLITS)
        assert waves <= MOST_WAVES
        assert programs >= 0.75 * waves * SPLITS
    known = {1: 264, 2: 132, 4: 66, 5: 52, 32: 8, 38: 20, 64: 4, 128: 2, 256: 1, 5000: 1}
    assert {num_rows: shares_of_rows(num_rows) for num_rows in known} == known
