"""Draw the package: which room imports which, and a token's way through them.

The rooms and their order come from the import contract in `setup.cfg`, the arrows from the code's
imports. `docs/rooms.svg` is what this writes; a test holds it to the present code.

Examples:
    make drawing
    python scripts/draw_rooms.py --output docs/rooms.svg
"""

import argparse
import ast
import configparser
from collections.abc import Iterator
from html import escape
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = "kimi_linear"
SANS = "DejaVu Sans, Verdana, sans-serif"
MONO = "DejaVu Sans Mono, Menlo, Consolas, monospace"
INK, PALE, RED = "#22272e", "#6b7480", "#c0392b"
# One colour a floor, top to bottom: fill, and line of the arrows that start there.
FLOORS = [
    ("#e9edf8", "#3b5bb5"),
    ("#e4f1ee", "#23806c"),
    ("#fbf0dc", "#b57614"),
    ("#f9e6f0", "#a8326f"),
    ("#f0e8f6", "#7d4fa3"),
    ("#e6eff6", "#2f78a8"),
    ("#eeeeec", "#6b7480"),
]
WIDTH, MARGIN, ROW, GAP = 1040, 24, 30, 10
TEXT_WIDTH = 704  # of a room's box; arrows are right of it
STATION, HEIGHT, LEFT = 116, 50, 160  # of the lower drawing: boxes, and where its columns begin
CELL = (WIDTH - LEFT - MARGIN - 2 * GAP) / 3

NOTES = {
    "modeling_kimi_linear": "embedding, decoder layers, heads: one call from ids to logits or loss",
    "generation": "what generate() does here: its cache, its checks, sessions",
    "decode": "one token a row as one recorded CUDA graph, with its kernels",
    "training": "router losses and loads, safe trainer, LoRA, quantised experts",
    "parallel": "tensors, experts and tokens on several processes",
    "quantization": "weights in few bits: packed as they load, or in place",
    "checkpoints": "official names in and out, the flat copy of the code",
    "layers": "KDA, latent attention, MLP, experts: the equations; a call's plan",
    "cache": "KDA states and MLA latents: grow, crop, fork, store",
    "inputs": "padding, packing and trees of one call, in one form",
    "ops": "one entry an operation, torch reference and kernels beside it",
    "upstream": "what Transformers does not document, in one place",
    "configuration_kimi_linear": "official field names and their defaults",
    "configuration_plans": "how Transformers divides the model among processes",
    "configuration_rules": "what each field may be",
    "outputs_kimi_linear": "what a call returns",
    "configuration_quantization": "which part is held in how many bits; presets",
    "schemes": "how a matrix is held in few bits",
    "presets": "named sizes, 2M to 48B",
}

# Station, then what runs there in prefill, in a decoding step and in training: a path of the
# package and a line about it.
WAY = [
    (
        ("token ids", "one call"),
        ("inputs", "padding and packing become one layout"),
        ("decode", "a recording fits the call, or layers run"),
        ("inputs", "sequences of a packed row never mix"),
    ),
    (
        ("embedding", ""),
        ("modeling_kimi_linear.py", "[B, T] to [B, T, D]"),
        ("decode", "read inside the graph"),
        ("modeling_kimi_linear.py", "whole rows, or this process' tokens"),
    ),
    (
        ("KDA", "in 3 layers of 4"),
        ("ops/kda", "chunks of tokens; the cache takes the state"),
        ("decode", "updates the float32 state in place"),
        ("ops/short_conv", "six projections as one product, one kernel"),
    ),
    (
        ("or MLA", "in the 4th"),
        ("ops/latent_attention", "expands keys or absorbs them: the cheaper"),
        ("decode", "absorbed: reads each cached latent once"),
        ("layers", "expanded keys, the configured backend"),
    ),
    (
        ("MoE", "dense in layer 0"),
        ("ops/experts", "sorted by expert; two grouped products"),
        ("decode", "reads the chosen experts alone"),
        ("ops/experts", "keeps gate and up for the backward pass"),
    ),
    (
        ("norm, head", ""),
        ("modeling_kimi_linear.py", "logits of the last token alone"),
        ("decode", "[rows, vocabulary], inside the graph"),
        ("ops/cross_entropy", "loss by chunks, never all logits"),
    ),
    (
        ("next", ""),
        ("generation", "generate() samples, and calls again"),
        ("generation", "reads one step late whether to stop"),
        ("training", "optimizer, router biases, checkpoints"),
    ),
]
MODES = ["prefill", "decoding step", "training"]


def floors(config: Path = ROOT / "setup.cfg") -> list[list[str]]:
    """The rooms of each floor, top first, as the import contract has them."""
    parser = configparser.ConfigParser()
    parser.read(config, encoding="utf-8")
    lines = parser["importlinter:contract:rooms"]["layers"].strip().splitlines()
    return [[room.strip() for room in line.replace("|", ":").split(":")] for line in lines]


def _imported(path: Path) -> Iterator[str]:
    """The rooms that a file imports from."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            package, _, rest = name.partition(".")
            if package == PACKAGE and rest:
                yield rest.partition(".")[0]


def room_imports(rooms: list[str]) -> list[tuple[str, str]]:
    """Pairs of a room and one that it imports, sorted as `rooms` are."""
    found = set()
    for room in rooms:
        files = (ROOT / room).rglob("*.py") if (ROOT / room).is_dir() else [ROOT / f"{room}.py"]
        found |= {(room, other) for path in files for other in _imported(path)}
    pairs = [(a, b) for a, b in found if a != b and b in rooms]
    return sorted(pairs, key=lambda pair: (rooms.index(pair[0]), rooms.index(pair[1])))


def _text(x: float, y: float, text: str, size: float = 13, **style: str) -> str:
    attributes = {"font_family": SANS, "fill": INK, **style}
    written = " ".join(f'{key.replace("_", "-")}="{value}"' for key, value in attributes.items())
    return f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" {written}>{escape(text)}</text>'


def _path_name(x: float, y: float, path: str, size: float, color: str) -> str:
    return _text(x, y, path, size, font_family=MONO, font_weight="bold", fill=color)


def _box(x: float, y: float, width: float, height: float, fill: str, line: str = "none") -> str:
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="7" '
        f'fill="{fill}" stroke="{line}"/>'
    )


def _arrow_head(x: float, y: float, angle: int, fill: str) -> str:
    return (
        f'<path d="M0 0L-9 -4.5L-9 4.5Z" fill="{fill}" '
        f'transform="translate({x:g} {y:g}) rotate({angle})"/>'
    )


def _draw_rooms(top: float) -> tuple[list[str], float]:
    """The rooms by floor, and the y below them."""
    parts = [_text(MARGIN, top, "Rooms: an arrow is an import, and goes down", 18)]
    lines: dict[str, str] = {}
    middles: dict[str, float] = {}
    y = top + 20
    for (fill, line), rooms in zip(FLOORS, floors(), strict=True):
        parts.append(_box(MARGIN, y, TEXT_WIDTH, ROW * len(rooms) + 8, fill))
        for i, room in enumerate(rooms):
            lines[room], middles[room] = line, y + 4 + ROW * (i + 0.5)
            name = room if (ROOT / room).is_dir() else f"{room}.py"
            parts.append(_path_name(MARGIN + 14, middles[room] + 5, name, 13, line))
            parts.append(_text(MARGIN + 254, middles[room] + 4.5, NOTES[room], 12.5))
        y += ROW * len(rooms) + 8 + GAP
    arrows = _draw_imports(lines, middles)
    note = "The tokenizer stands alone."
    if any(RED in arrow for arrow in arrows):
        note += " A dashed red arrow still goes up."
    parts.append(_text(MARGIN + 14, y + 8, note, 12.5, fill=PALE))
    return parts + arrows, y + 26


def _draw_imports(lines: dict[str, str], middles: dict[str, float]) -> list[str]:
    """Arrows between the rooms whose colours and heights are given."""
    parts, edge = [], MARGIN + TEXT_WIDTH
    imports = room_imports(list(middles))
    longest = max(middles.values()) - min(middles.values())
    widest = (WIDTH - MARGIN - edge) / 0.75  # a curve reaches three quarters of its handles
    for importer, imported in imports:
        start, end = middles[importer] + 3, middles[imported] - 3
        color, dashes = lines[importer], ""
        if start > end and color != lines[imported]:  # within a floor either way is right
            color, dashes = RED, ' stroke-dasharray="5 3"'
        reach = edge + 30 + (widest - 30) * abs(end - start) / longest
        parts.append(
            f'<path d="M{edge:g} {start:g}C{reach:g} {start:g} {reach:g} {end:g} '
            f'{edge + 9:g} {end:g}" fill="none" stroke="{color}" stroke-width="1.4" '
            f'opacity="0.8"{dashes}/>'
        )
    for imported in sorted({imported for _, imported in imports}):
        parts.append(_arrow_head(edge + 1, middles[imported] - 3, 180, INK))
    return parts


def _draw_way(top: float) -> tuple[list[str], float]:
    """A token's way through the rooms, and the y below it."""
    parts = [_text(MARGIN, top, "A token's way", 18)]
    columns = [LEFT + i * (CELL + GAP) for i in range(len(MODES))]
    for x, mode in zip(columns, MODES, strict=True):
        parts.append(_text(x + 10, top + 30, mode, 14, font_weight="bold"))
    y = top + 42
    middles: dict[str, float] = {}
    for (name, note), *cells in WAY:
        parts += _draw_station(y, name, note, is_first=not middles)
        for x, (path, says) in zip(columns, cells, strict=True):
            parts += _draw_cell(x, y, path, says)
        middles[name] = y + HEIGHT / 2
        y += HEIGHT + GAP
    again, last = middles["KDA"], middles["MoE"]  # one layer after the other
    way_back = f"M{MARGIN:g} {last:g}H{MARGIN - 12:g}V{again:g}H{MARGIN - 2:g}"
    parts.append(f'<path d="{way_back}" fill="none" stroke="{PALE}"/>')
    parts.append(_arrow_head(MARGIN - 0.5, again, 0, PALE))
    note = (
        "Between steps the cache room keeps states and latents. "
        "On a CPU and wherever no graph fits, a step runs through the layers, as prefill does."
    )
    parts.append(_text(MARGIN, y + 12, note, 12, fill=PALE))
    return parts, y + 30


def _draw_station(y: float, name: str, note: str, *, is_first: bool) -> list[str]:
    """A part of the model, with an arrow from the one before it."""
    centre, parts = MARGIN + STATION / 2, [_box(MARGIN, y, STATION, HEIGHT, "#ffffff", PALE)]
    style = {"text_anchor": "middle", "font_weight": "bold"}
    parts.append(_text(centre, y + (22 if note else 29), name, 13, **style))
    if note:
        parts.append(_text(centre, y + 38, note, 11, text_anchor="middle", fill=PALE))
    if not is_first:
        parts.append(f'<path d="M{centre:g} {y - GAP:g}V{y - 2:g}" stroke="{PALE}"/>')
        parts.append(_arrow_head(centre, y - 0.5, 90, PALE))
    return parts


def _draw_cell(x: float, y: float, path: str, says: str) -> list[str]:
    """What runs there, in the colour of its room."""
    if not (ROOT / path).exists():
        raise FileNotFoundError(f"the drawing names {path}, which is not in the package")
    room = path.partition("/")[0].removesuffix(".py")
    fill, line = next(color for color, rooms in zip(FLOORS, floors(), strict=True) if room in rooms)
    return [
        _box(x, y, CELL, HEIGHT, fill),
        _path_name(x + 10, y + 20, path, 12, line),
        _text(x + 10, y + 38, says, 11.5),
    ]


def draw() -> str:
    """The drawing as SVG; the same text for the same code."""
    house, below = _draw_rooms(40)
    way, height = _draw_way(below + 34)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" '
        f'width="{WIDTH}" height="{height:g}">'
    )
    ground = f'<rect width="{WIDTH}" height="{height:g}" fill="#ffffff"/>'
    return "\n".join([head, ground, *house, *way, "</svg>", ""])


def main(*, output: Path) -> None:
    """Write the drawing."""
    output.write_text(draw(), encoding="utf-8")
    print(f"wrote {output}")


def _parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "rooms.svg")
    return parser.parse_args()


if __name__ == "__main__":
    main(**vars(_parse_args()))
