"""scripts/experiment_ablation.py: its variants, its text, and a small run."""

import json
from pathlib import Path
from typing import Any

import experiment_ablation
import pytest
import torch
from experiments.text import Corpus, random_pieces, rows_of
from experiments.variants import (
    VARIANTS,
    build_variant,
    count_parameters,
    full_layers,
    matched_width,
    rotated,
)
from one_thread import one_thread  # noqa: F401
from tolerance import assert_close
from torch import Tensor

from kimi_linear import KimiLinearForCausalLM
from kimi_linear.inputs.layout import SequenceLayout
from kimi_linear.layers import latent_attention as layers_kimi_linear

SIZES: dict[str, int] = {"num_layers": 8, "num_heads": 2, "head_dim": 16}
SMALL: dict[str, Any] = {
    "device": "cpu",
    "layers": 4,
    "heads": 2,
    "head_dim": 16,
    "length": 32,
    "batch_tokens": 512,
    "steps": 4,
    "eval_every": 4,
    "warmup": 1,
    "vocab_size": 512,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two dozen short modules."""
    root = tmp_path_factory.mktemp("corpus")
    for i in range(24):
        lines = [f"def function_{i}_{j}(x):\n    return x + {i * j}\n" for j in range(8)]
        (root / f"module_{i}.py").write_text("\n".join(lines))
    return root


def logits(model: KimiLinearForCausalLM, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def loud(variant: str) -> KimiLinearForCausalLM:
    """A variant with the same large weights as the others, as far as it has the same ones."""
    model = build_variant(variant, 64, 0, num_layers=4, num_heads=2, head_dim=16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and parameter.ndim > 1 and "A_log" not in name:
                generator = torch.Generator().manual_seed(len(name) + parameter.numel())
                parameter.normal_(0, 0.3, generator=generator)
    return model


def test_layers_of_each_ratio() -> None:
    assert full_layers("3:1", 8) == full_layers("rope", 8) == (4, 8)
    assert full_layers("0:1-rope", 3) == (1, 2, 3)
    assert full_layers("0:1", 3) == (1, 2, 3) and full_layers("1:0", 3) == ()
    assert full_layers("1:1", 4) == (2, 4) and full_layers("7:1", 8) == (8,)
    with pytest.raises(ValueError, match="num_layers=4 is not allowed: 7:1 needs a multiple of 8"):
        full_layers("7:1", 4)
    with pytest.raises(ValueError, match="variant '2:1' is not allowed"):
        full_layers("2:1", 6)


def test_variants_have_about_as_many_parameters() -> None:
    target = count_parameters(build_variant("3:1", 64, 0, **SIZES))
    for variant in VARIANTS:
        width = matched_width(variant, target, 64, **SIZES)
        found = count_parameters(build_variant(variant, 64, 0, width=width, **SIZES))
        step = 8 * 3 * 32 * 8  # eight more columns in every MLP
        assert abs(found - target) <= step / 2, variant


def test_variants_compute_something_else() -> None:
    ids = torch.randint(64, (2, 20))
    base = logits(loud("3:1"), ids)
    alone = logits(loud("0:1"), ids)
    for variant in ("no-gate", "swish-gate", "no-conv", "rope", "0:1-rope"):
        changed = logits(loud(variant), ids)
        assert changed.isfinite().all()
        plain = alone if variant == "0:1-rope" else base
        assert (changed - plain).abs().max() > 1e-3, variant


def test_without_convolution_a_kda_layer_sees_single_tokens() -> None:
    model = build_variant("no-conv", 64, 0, num_layers=4, num_heads=2, head_dim=16)
    conv = model.model.layers[0].self_attn.q_conv1d
    x = torch.randn(2, 7, 32)
    out, _ = conv(x, None, False, SequenceLayout())
    assert_close(out, torch.nn.functional.silu(x), torch.float32)
    assert not conv.weight.requires_grad


def test_rotation_is_relative() -> None:
    query, key = torch.randn(16).double(), torch.randn(16).double()
    q, k = (rotated(x.expand(1, 12, 16), dim=1)[0] for x in (query, key))
    scores = q @ k.T
    for distance in range(12):
        same = scores.diagonal(-distance)
        assert_close(same, same[:1].expand_as(same), torch.float32)
    assert_close(q.norm(dim=-1), query.norm().expand(12), torch.float32)


def test_rope_tells_orders_apart_that_mla_alone_cannot() -> None:
    """Without positions one MLA layer reads a set; rotation makes it a sequence."""
    model = build_variant("0:1", 64, 0, num_layers=1, num_heads=2, head_dim=16)
    ids = torch.randint(64, (1, 20))
    swapped = ids.clone()
    swapped[:, [3, 9]] = swapped[:, [9, 3]]
    assert_close(logits(model, ids)[:, -1], logits(model, swapped)[:, -1], torch.float32)
    first, second = (logits(loud("rope"), x)[:, -1] for x in (ids, swapped))
    assert (first - second).abs().max() > 1e-3


def test_a_long_call_is_rotated_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without gradients MLA makes many queries in tiles of 1,024 tokens and more."""
    monkeypatch.setattr(layers_kimi_linear, "FUSED_QUERY_TOKENS", 1)
    model, ids = loud("rope"), torch.randint(64, (1, 1100))
    whole = model(ids, use_cache=False).logits.detach()
    assert_close(logits(model, ids), whole, torch.float32)


def test_text_is_whole_and_held_out_by_file(folder: Path) -> None:
    corpus = Corpus.load(512, folder)
    assert corpus.train.dtype == torch.int64 and corpus.vocab_size == 512
    end = corpus.train[-1]
    files = [int((part == end).sum()) for part in (corpus.train, corpus.held_out)]
    assert sum(files) == 24 and files[0] > files[1] > 0  # an end token behind each
    size = sum(file.stat().st_size for file in folder.iterdir())
    assert corpus.train_bytes + corpus.held_out_bytes == size
    with pytest.raises(ValueError, match="holds no Python modules"):
        Corpus.load(512, folder / "none")


def test_pieces_and_rows() -> None:
    tokens = torch.arange(50)
    pieces = random_pieces(tokens, 8, 7, torch.Generator().manual_seed(0))
    assert pieces.shape == (8, 7) and bool((pieces.diff(dim=1) == 1).all())
    assert len(pieces[:, 0].unique()) > 1
    assert rows_of(tokens, 20).tolist() == [list(range(20)), list(range(20, 40))]
    with pytest.raises(ValueError, match="length 51 is not allowed"):
        random_pieces(tokens, 1, 51, torch.Generator())


def test_a_run_is_not_repeated(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "lines.jsonl"
    options = {**SMALL, "corpus": folder, "output": output, "seeds": (0, 1)}
    variants = ("3:1", "0:1")
    lines = experiment_ablation.main(**options, variants=variants[:1], parallel=1)
    lines += experiment_ablation.main(**options, variants=variants)
    assert [json.loads(text) for text in output.read_text().splitlines()] == lines
    runs = [line for line in lines if line["event"] == "run"]
    assert sorted((run["variant"], run["seed"]) for run in runs) == sorted(
        (variant, seed) for variant in variants for seed in (0, 1)
    )
    for run in runs:
        assert run["step"] == 4 and run["tokens"] == 4 * 512
        assert run["validation_perplexity"] == pytest.approx(
            torch.tensor(run["validation_loss"]).exp().item(), rel=1e-3
        )
    losses = {run["validation_loss"] for run in runs}
    assert len(losses) == len(runs)  # seeds and variants make a difference


def test_seed_decides(folder: Path) -> None:
    options = {**SMALL, "corpus": folder, "variants": ("3:1",), "seeds": (3,)}
    first, second = (experiment_ablation.main(**options)[-1] for _ in range(2))
    assert first["validation_loss"] == second["validation_loss"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variants": ("2:1",)}, "--variants '2:1' is not allowed"),
        ({"layers": 6}, "num_layers=6 is not allowed: 3:1"),
        ({"length": 2000}, "--length 2000 is not allowed"),
        ({"seeds": ()}, "--seeds"),
        ({"vocab_size": 100}, "--vocab-size 100"),
        ({"learning_rate": 0.0}, "--learning-rate 0.0"),
    ],
)
def test_what_the_script_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        experiment_ablation.main(**{**SMALL, "variants": ("3:1",), **options})
