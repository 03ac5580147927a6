"""scripts/experiment_report.py: tables, figures and the page, from lines such as scripts write."""

import json
from pathlib import Path
from typing import Any

import experiment_report
import pytest
from experiment_report import FILES, NO_RESULTS, ROOT, TABLES, replace_section
from experiments.quality import form_name, quantization_table
from experiments.tables import (
    ablation_table,
    best_runs,
    decays_table,
    decoding_table,
    kernels_table,
    needle_table,
    synthetic_table,
)

PNG_SIGNATURE = b"\x89PNG"


def run(model: str, seed: int, rate: float, reached: int | None, best: float) -> dict[str, Any]:
    place = {"task": "mqar", "length": 256, "model": model, "seed": seed, "learning_rate": rate}
    figures = {"steps": reached or 900, "steps_to_target": reached, "best_accuracy": best}
    return {"experiment": "synthetic", "event": "run", **place, **figures, "accuracy": best}


def synthetic_lines() -> list[dict[str, Any]]:
    lines = [
        run("kda", 0, 1e-3, 300, 0.995),
        run("kda", 0, 5e-4, None, 0.9),
        run("kda", 1, 5e-4, 200, 0.991),
        run("kda", 1, 1e-3, 400, 0.999),
        run("mamba2", 0, 1e-3, None, 0.12),
    ]
    for model, top in (("kda", 0.995), ("mamba2", 0.12)):
        for step, share in ((100, 0.5), (300, 1.0)):
            point = run(model, 0, 1e-3, None, 0.0)
            lines.append({**point, "event": "point", "step": step, "accuracy": top * share})
    return lines


def decode(model: str, context: int, rows: int, ms: float) -> dict[str, Any]:
    size = context * 1152 * (7 if model == "kimi" else 27)
    return {
        "experiment": "decoding",
        "event": "decode",
        "model": model,
        "context": context,
        "rows": rows,
        "ms_per_token": ms / rows,
        "limit_ms": ms / 2,
        "cache_bytes_needed": size * rows,
    }


def decoding_lines() -> list[dict[str, Any]]:
    lines = [decode("kimi", 1 << 20, 1, 5.0), decode("mla", 1 << 20, 1, 12.0)]
    lines += [decode("kimi", 1 << 20, 5, 20.0), decode("kimi", 4096, 1, 2.0)]
    failed = {"experiment": "decoding", "event": "decode", "model": "mla", "context": 4096}
    return [*lines, {**failed, "rows": 1, "error": "OutOfMemoryError"}]


def kernel_lines() -> list[dict[str, Any]]:
    base = {"experiment": "kernels", "event": "kernel", "length": 2048}
    times = {("kda", "forward"): 1.0, ("dplr", "forward"): 1.8, ("kda", "forward+backward"): 3.0}
    lines = [{**base, "operator": o, "pass": p, "ms": ms} for (o, p), ms in times.items()]
    apart = {"experiment": "kernels", "event": "agreement", "operator": "dplr"}
    lines.append({**apart, "relative_error": 0.00412})
    return [*lines, {**base, "operator": "package", "pass": "forward", "error": "no"}]


def ablation_lines() -> list[dict[str, Any]]:
    base = {"experiment": "ablation", "event": "run", "parameters": 9_000_000, "tokens": 6_553_600}
    losses = {("3:1", 0): 2.0, ("3:1", 1): 2.2, ("0:1", 0): 2.1, ("0:1", 1): 2.4}
    return [
        {
            **base,
            "variant": v,
            "seed": s,
            "train_loss": x / 2,
            "validation_loss": x,
            "validation_perplexity": 10 * x,
        }
        for (v, s), x in losses.items()
    ]


def decays_lines() -> list[dict[str, Any]]:
    lives = {"first_half_lives": [[1.0, 2.4, 9.0], [2.0, 3.0, 4.0]]}
    lives |= {"half_lives": [[40.0, 1200.0, 9000.0], [2.0, 50.0, 400.0]]}
    lines: list[dict[str, Any]] = []
    for model, seed, reached in (("gdn", 0, 600), ("kda", 0, None), ("kda", 1, 900)):
        end = {**run(model, seed, 1e-3, reached, 0.98), "experiment": "decays"}
        lines += [{**end, "event": "point", "step": 500, "accuracy": 0.9}, {**end, **lives}]
    return lines


def needle_lines() -> list[dict[str, Any]]:
    base = {"experiment": "needle", "event": "cell"}
    accuracies = {(0, 0.0): 1.0, (0, 1.0): 0.5, (1, 0.0): 0.8, (1, 1.0): 0.5}
    settings = {"pairs": 8, "repeats": 3, "steps": 900, "learning_rate": 1e-3}
    begin = {"experiment": "needle", "event": "environment", "settings": settings}
    cells = [
        {**base, "model": "kda", "length": 512, "seed": s, "depth": d, "accuracy": a}
        for (s, d), a in accuracies.items()
    ]
    return [begin, *cells]


def quality(form: str, bits: float, is_calibrated: bool = False, gap: float = 0.0) -> Any:
    return {
        "experiment": "quantization",
        "event": "quality",
        "model": "b",
        "form": form,
        "is_calibrated": is_calibrated,
        "bits_per_byte": 1.2 + gap,
        "kl": gap * 2,
        "agreement": 1 - gap,
        "held_bytes": int(1.4e8 * bits),
        "held_bytes_48b": int(6.1e9 * bits),
        "eval_tokens": 1000,
    }


def quantization_lines() -> list[dict[str, Any]]:
    every = "+".join(
        f"{part}=4/64" for part in ("experts", "shared_experts", "attention", "embeddings", "head")
    )
    trained = {"experiment": "quantization", "event": "trained", "model": "b"}
    trained |= {"parameters": 1.2e9, "tokens": 2e8, "train_seconds": 1200}
    failed = {"experiment": "quantization", "event": "quality", "model": "b", "form": "fp8"}
    return [
        {**quality("24gb", 9, gap=0.5), "model": "a"},  # of a model before this one
        trained,
        quality("none", 16),
        quality("24gb", 3.5, gap=0.05),
        quality("24gb", 3.5, is_calibrated=True, gap=0.02),
        quality(every, 4.25, gap=-0.0001),
        {**failed, "is_calibrated": False, "error": "OutOfMemoryError"},
        quality("head=3/64", 15.5, gap=0.004),
        quality("experts=3/32z", 4, gap=0.003),
    ]


LINES = {
    "synthetic": synthetic_lines(),
    "decays": decays_lines(),
    "decoding": decoding_lines(),
    "kernels": kernel_lines(),
    "ablation": ablation_lines(),
    "needle": needle_lines(),
    "quantization": quantization_lines(),
}


def test_the_best_learning_rate_of_each_seed_counts() -> None:
    runs = best_runs(LINES["synthetic"])
    assert [x["learning_rate"] for x in runs["mqar", 256, "kda"]] == [1e-3, 5e-4]
    rows = synthetic_table(LINES["synthetic"]).splitlines()[2:]
    assert rows[0] == "| mqar | 256 | KDA | 300, 200 | 99.5, 99.1 | 0.001, 0.0005 | 0, 1 |"
    assert "| Mamba2 | not in 900 | 12.0 |" in rows[1]
    same = [run("kda", seed, 1e-3, 300, 0.995) for seed in (0, 1)]
    assert "| 99.5, 99.5 | 0.001 | 0, 1 |" in synthetic_table(same)


def test_decays_table() -> None:
    kda, gdn = decays_table(LINES["decays"]).splitlines()[2:]
    lives = "2, 3; 2, 3 | 1,200, 50; 1,200, 50"
    assert kda == f"| mqar | 256 | KDA | not in 900, 900 | 90.0, 90.0 | {lives} |"
    assert "| Gated DeltaNet | 600 | 90.0 |" in gdn


def test_embeddings_of_other_sizes_stand_apart() -> None:
    larger = [{**line, "embedding_scale": 16.0} for line in ablation_lines()[:1]]
    text = ablation_table([*ablation_lines(), *larger])
    assert text.endswith(ablation_table(ablation_lines()))
    assert text.startswith("With embeddings of 0.32 at first, 6.6M tokens:")
    assert "With embeddings of 0.02 at first, 6.6M tokens:" in text


def test_what_no_text_was_read_twice_for_stands_apart() -> None:
    """The point at 20 tokens of 25, not the one at 40, and each run's own."""
    settings = {"batch_tokens": 2, "train_tokens": 25}
    lines: list[dict[str, Any]] = [
        {"experiment": "ablation", "event": "environment", "settings": settings}
    ]
    for run_line, loss in zip(ablation_lines(), (3.0, 3.2, 3.4, 3.8), strict=True):
        for step, each in ((5, 9.0), (10, loss), (20, 1.0)):
            lines.append({**run_line, "event": "point", "step": step, "validation_loss": each})
        lines.append(run_line)
    table = ablation_table(lines)
    assert "| validation loss after 0.0M, none read twice |" in table
    assert "| 1.05 | 3.10 (3.00 to 3.20) | 2 |" in table
    assert "| 3.60 (3.40 to 3.80) | 2 |" in table
    assert "none read twice" not in ablation_table(ablation_lines())


def test_decoding_table() -> None:
    short, long = decoding_table(LINES["decoding"]).splitlines()[2:]
    assert long == (
        "| 1,048,576 | 8.46, 32.61 (3.9) | 5.00, 12.00 (2.4) | 2.50, 6.00 (2.4) | 5 and 1 "
        "| 4.00, 12.00 (3.0) |"
    )
    assert short.startswith("| 4,096 | 0.03, - | 2.00, - |")
    packed = decode("kimi", 4096, 1, 1.0) | {"quantize": "24gb"}
    *_, last = decoding_table([*LINES["decoding"], packed]).splitlines()
    assert last.startswith("| 4,096, 24gb | 0.03, - | 1.00, - |")


def test_other_tables() -> None:
    forward, backward, apart = kernels_table(LINES["kernels"]).split("\n\n")
    assert apart == "Difference from `kda`, root mean squares' ratio: dplr 4.1e-03."
    assert forward.splitlines()[2] == "| 2,048 | 1.00 | 1.80 | 1.80 | - | - | - | - |"
    assert backward.splitlines()[2] == "| 2,048 | 3.00 | - | - | - | - | - | - |"
    base, full = ablation_table(LINES["ablation"]).splitlines()[4:]
    assert "| 2.1000 (2.0000 to 2.2000) | 21.00 | +0.0000 | 1.05 | 2 | 9.00 | 9.23, 5.65 |" in base
    assert "| 2.2500 (2.1000 to 2.4000) | 22.50 | +0.1500 |" in full
    recipe, _, _, _, needle = needle_table(LINES["needle"]).splitlines()
    assert recipe.startswith(
        "8 pairs, each asked for 3 times in a row, 900 steps at a rate of 0.001"
    )
    assert needle == "| KDA only | 75, 65 (50) | 0, 1 |"


def test_quantization_tables() -> None:
    text, whole, part, experts = quantization_table(LINES["quantization"]).split("\n\n")
    assert text.startswith("1.20B parameters, 200M tokens in 20 minutes; 1.2000 bits a byte")
    assert whole.splitlines()[2:] == [
        "| 24gb | 0.49 | 21.4 | +4.17, +1.67 | 0.1, 0.04 | 95.0, 98.0 |",
        "| every part in 4 bits, groups of 64 | 0.59 | 25.9 | -0.01 | -0.0002 | 100.0 |",
    ]
    assert part.splitlines()[2].startswith("| head in 3 bits, groups of 64 | 2.17 |")
    assert experts.splitlines()[2].startswith("| experts in 3 bits, groups of 32 with zeros |")
    assert form_name("none") == "16 bits" and form_name("fp8") == "fp8"
    assert form_name("head=8/row+shared_experts=4") == (
        "head in 8 bits, a scale per row; shared experts in 4 bits"
    )


def test_page_with_and_without_results(tmp_path: Path) -> None:
    page, results = tmp_path / "page.md", tmp_path / "results"
    results.mkdir()
    committed = (ROOT / "docs" / "experiments.md").read_text()
    page.write_text(committed)
    assert not any(experiment_report.main(page=page, results=results).values())
    empty = page.read_text()
    assert (
        empty.count(NO_RESULTS) == len(LINES)
        and "![" not in empty
        and not list(tmp_path.glob("*.png"))
    )
    for name, lines in LINES.items():
        environment = {"experiment": name, "event": "environment", "gpu": "NVIDIA H200"}
        texts = [json.dumps(line) for line in [{**environment, "torch": "2.11"}, *lines]]
        file = FILES.get(name, f"experiment_{name}")
        (results / f"{file}.jsonl").write_text("\n".join(texts) + "\n")
    assert all(experiment_report.main(page=page, results=results).values())
    filled = page.read_text()
    measured = filled.count("Measured on NVIDIA H200, torch 2.11")
    assert NO_RESULTS not in filled and measured == len(LINES)
    for name in TABLES:
        assert f"![{name}](experiment_{name}.png)" in filled
        image = tmp_path / f"experiment_{name}.png"
        assert image.read_bytes().startswith(PNG_SIGNATURE)
    assert experiment_report.main(page=page, results=results)
    assert page.read_text() == filled
    for path in results.iterdir():
        path.unlink()
    experiment_report.main(page=page, results=results)
    assert page.read_text() == empty


def test_the_committed_page_is_what_the_command_writes(tmp_path: Path) -> None:
    committed = (ROOT / "docs" / "experiments.md").read_text()
    page = tmp_path / "experiments.md"
    page.write_text(committed)
    found = experiment_report.main(page=page)
    assert page.read_text() == committed
    for name, has_results in found.items():
        assert (ROOT / "docs" / f"experiment_{name}.png").exists() == has_results


def test_what_the_command_refuses(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must have <!-- results: needle -->"):
        replace_section("nothing", "needle", "x")
    with pytest.raises(ValueError, match="--page .* is not allowed"):
        experiment_report.main(page=tmp_path / "none.md")
    page = tmp_path / "page.md"
    page.write_text("")
    with pytest.raises(ValueError, match="--results .* is not allowed"):
        experiment_report.main(page=page, results=tmp_path / "none")
