"""Products of many rows by float8 weights, at the 48B model's sizes on one GPU: tiles and rows.

For each number of rows, the experts' two products and each linear layer: in bfloat16, as weights
that are unpacked for 16-bit activations ("fp8w"), and with quantised activations ("fp8") for each
of the tiles below, the time of quantising beside it, and of linear layers by cuBLAS. A line of JSON
each: milliseconds, operations a second, and how far the result is from that of 16-bit activations
(some 0.03 for one product).
What to set by it: LARGE_TILE and USES_DESCRIPTORS in `ops/packed/float8.py`, GATE_UP_TILES,
DOWN_TILES, MANY_ROWS and FEW_ROWS in `ops/experts/float8_kernels.py`, FLOAT8_TOKENS in
`ops/experts/packed.py`, MANY_ROWS and MANY_OUTPUTS in `ops/projections.py`.

    python benchmarks/float8_h200.py --record benchmarks/results/float8_h200.jsonl
    python benchmarks/float8_h200.py --pointers --record benchmarks/results/float8_pointers.jsonl
    python benchmarks/float8_h200.py --rows 64,128,256,512 --tiles chosen
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from common import Recorder, make_parser, setting
from measuring.packed import fill_packed
from triton.testing import do_bench

from kimi_linear.ops.experts import float8_kernels, packed, prefill_kernels
from kimi_linear.ops.experts.sort import sort_pairs
from kimi_linear.ops.packed import float8
from kimi_linear.ops.packed.weights import PackedWeights
from kimi_linear.schemes import NAMED, Scheme

# Hidden size, expert width, experts, experts of a token.
D, I, E, K = 2304, 1024, 256, 8  # noqa: E741
# Outputs and inputs: q, k, v of KDA; its output and MLA's; MLA's queries; its latents; the inner
# halves of gates; the shared expert; the dense MLP.
LINEARS = (
    *((4096, D), (D, 4096), (6144, D), (576, D), (128, D), (I, D), (D, I), (9216, D)),
    (D, 9216),
)
# Rows, warps and stages; rows, columns, halves, warps and stages.
GATE_UP_TILES = (
    *((128, 8, 2), (128, 8, 3), (128, 8, 4), (128, 16, 3), (128, 16, 4)),
    *((64, 8, 2), (64, 8, 3), (64, 8, 4), (64, 4, 2), (64, 4, 3), (64, 4, 4)),
)
TILES = (
    *((128, 128, 2, 8, 3), (128, 128, 2, 8, 4), (128, 128, 2, 16, 4), (128, 256, 1, 16, 3)),
    *((128, 128, 1, 8, 3), (128, 128, 1, 8, 4), (128, 128, 1, 16, 4), (128, 64, 2, 8, 4)),
    *((64, 128, 2, 8, 3), (64, 128, 2, 8, 4), (64, 128, 1, 4, 3), (64, 128, 1, 4, 4)),
)


def random_weights(shape: tuple[int, ...], name: str = "fp8") -> Any:
    weights = PackedWeights.empty(shape, Scheme(**NAMED[name]), torch.bfloat16, "cuda")
    fill_packed("weight", weights, shape[-1] ** -0.5)
    return weights


def as_16_bits(weights: Any) -> Any:
    """The same weights, whose activations are not quantised."""
    scheme = Scheme(**NAMED["fp8w"])
    return PackedWeights(
        weights.planes, weights.scale, None, scheme, weights.shape[-1], weights.dtype
    )


class Lines:
    """Measures, and writes lines about one product of some rows."""

    def __init__(self, record: Recorder, operations: int, **fields: Any) -> None:
        self.record, self.operations, self.fields = record, operations, fields

    def line(self, form: str, run: Callable[[], Any], expected: Any = None, **more: Any) -> Any:
        """What `run` gives; None if it cannot be launched."""
        fields = {"case": "float8", **self.fields, "form": form, **more}
        fields["has_descriptors"] = float8.USES_DESCRIPTORS
        try:
            out = run()
            milliseconds = do_bench(run, warmup=20, rep=100, return_mode="median")
        except Exception as error:  # more shared memory or registers than there are
            self.record.tell({**fields, "error": f"{type(error).__name__}: {error}"[:200]})
            return None
        fields["milliseconds"] = round(milliseconds, 4)
        if form != "quantise":
            fields["operations_per_second"] = round(self.operations / milliseconds * 1e3)
        if expected is not None:
            difference = (out.float() - expected.float()).norm() / expected.float().norm()
            fields["relative_error"] = round(float(difference), 5)
        self.record.tell(fields)
        return out


def measure_experts(record: Recorder, num_rows: int, sweep: bool, weights: Any) -> None:
    gate_up, down, plain_gate_up, plain_down = weights
    x = torch.randn(num_rows, D, device="cuda", dtype=torch.bfloat16)
    index = torch.rand(num_rows, E, device="cuda").topk(K, dim=-1).indices
    order, ends, _, places = sorted_pairs = sort_pairs(index, E)
    pairs = num_rows * K
    lines = Lines(record, 6 * pairs * D * I, product="experts", rows=num_rows)

    def plain() -> Any:
        inner = prefill_kernels.gate_up(x, order, ends, plain_gate_up, K)
        return prefill_kernels.down(inner, order, ends, plain_down)

    expected = lines.line("bf16", plain)
    wide = as_16_bits(gate_up), as_16_bits(down)
    lines.line("fp8w", lambda: packed.packed_products(x, sorted_pairs, wide), expected)

    quantised = gate_up, down
    lines.line("fp8", lambda: packed.packed_products(x, sorted_pairs, quantised), expected)
    lines.line("quantise", lambda: float8.quantize_rows(x, places))
    if not sweep:
        return
    rows = float8.quantize_rows(x, places)
    inner = float8_kernels.gate_up(rows, ends, gate_up)
    lines = Lines(record, 4 * pairs * D * I, product="gate_up", rows=num_rows)
    lines.line("bf16", lambda: prefill_kernels.gate_up(x, order, ends, plain_gate_up, K))
    chosen = float8_kernels.GATE_UP_TILES, float8_kernels.DOWN_TILES
    for tile in GATE_UP_TILES:
        float8_kernels.GATE_UP_TILES = 4 * (tile,)
        lines.line("fp8", lambda: float8_kernels.gate_up(rows, ends, gate_up), tile=tile)
    lines = Lines(record, 2 * pairs * D * I, product="down", rows=num_rows)
    wide_inner = torch.randn(pairs, I, device="cuda", dtype=torch.bfloat16)
    lines.line("bf16", lambda: prefill_kernels.down(wide_inner, order, ends, plain_down))
    for tile in TILES:
        float8_kernels.DOWN_TILES = 4 * (tile,)
        run = lambda: float8_kernels.down(inner, order, ends, down, x.dtype)  # noqa: E731
        lines.line("fp8", run, tile=tile)
    float8_kernels.GATE_UP_TILES, float8_kernels.DOWN_TILES = chosen


def measure_linear(record: Recorder, num_rows: int, sweep: bool, shape: tuple[int, int]) -> None:
    num_outputs, num_inputs = shape
    weights = random_weights(shape)
    wide, plain = as_16_bits(weights), weights.dequantized()
    x = torch.randn(num_rows, num_inputs, device="cuda", dtype=torch.bfloat16)
    fields = {"product": "linear", "rows": num_rows, "shape": shape}
    lines = Lines(record, 2 * num_rows * num_outputs * num_inputs, **fields)
    expected = lines.line("bf16", lambda: F.linear(x, plain))
    lines.line("fp8w", lambda: F.linear(x, wide), expected)
    rows = float8.quantize_rows(x)
    lines.line("quantise", lambda: float8.quantize_rows(x))
    product = lambda: float8.float8_linear(rows, weights, x.dtype)  # noqa: E731
    if float8.has_block_products(float8.architecture(x.device)):
        lines.line("cublas", product, expected)
    chosen, float8.USES_LIBRARY = float8.LARGE_TILE, False
    for tile in TILES if sweep else (chosen,):
        float8.LARGE_TILE = tile
        lines.line("fp8", product, expected, tile=tile)
    float8.LARGE_TILE, float8.USES_LIBRARY = chosen, True


@torch.no_grad()
def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--rows", default="256,1024,4096,32768", help="tokens of a call")
    parser.add_argument("--tiles", choices=("all", "chosen"), default="all")
    parser.add_argument("--products", default="experts,linear")
    parser.add_argument("--pointers", action="store_true", help="no hardware copies of tiles")
    args = parser.parse_args()
    float8.USES_DESCRIPTORS = not args.pointers
    packed.FLOAT8_TOKENS = 0
    record, sweep = Recorder(args.record), args.tiles == "all"
    record.tell(setting())
    all_rows = [int(each) for each in args.rows.split(",")]
    torch.manual_seed(0)
    if "experts" in args.products:
        gate_up, down = random_weights((E, 2 * I, D)), random_weights((E, D, I))
        weights = gate_up, down, gate_up.dequantized(), down.dequantized()
        for num_rows in all_rows:
            measure_experts(record, num_rows, sweep, weights)
        del weights, gate_up, down
    if "linear" in args.products:
        for num_rows in all_rows:
            for shape in LINEARS:
                measure_linear(record, num_rows, sweep and shape in LINEARS[:2], shape)


if __name__ == "__main__":
    main()
