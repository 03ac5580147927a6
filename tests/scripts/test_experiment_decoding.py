"""scripts/experiment_decoding.py: its two models, its caches, and small runs."""

import json
from pathlib import Path
from typing import Any

import experiment_decoding
import pytest
import torch
from experiment_decoding import Settings, Subject
from measuring.device import Rates
from measuring.limits import Limits
from one_thread import one_thread  # noqa: F401
from tolerance import assert_close

from kimi_linear.decode.obstacles import config_obstacle

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {"preset": "2m", "device": "cpu", "steps": 2, "repeats": 1}


def subject(pattern: str) -> Subject:
    settings = Settings(preset="2m", steps=2, repeats=1)
    limits = Limits.of(settings.config(pattern), torch.float32, Rates(1e10, 1e11))
    return Subject(settings, "none", limits, CPU)


def test_patterns_differ_in_attention_only() -> None:
    kimi, mla = (Settings().config(pattern) for pattern in ("kimi", "mla"))
    assert kimi.layer_types.count("full_attention") == 7
    assert mla.layer_types == ["full_attention"] * 27
    for field in ("hidden_size", "num_experts", "kv_lora_rank", "vocab_size"):
        assert getattr(kimi, field) == getattr(mla, field)
    rates = Rates(4.24e12, 7e14)
    limits = [Limits.of(config, torch.bfloat16, rates) for config in (kimi, mla)]
    assert limits[1].latent_bytes() / limits[0].latent_bytes() == pytest.approx(27 / 7)
    assert limits[1].cache_bytes(1 << 20) == 27 * 1152 * (1 << 20)


def test_decode_graph_takes_both() -> None:
    for pattern in ("kimi", "mla"):
        assert config_obstacle(Settings().config(pattern)) == ""


def test_fewer_experts() -> None:
    config = Settings(experts=64).config("mla")
    assert config.num_experts == 64 and config.num_experts_per_token == 8


@pytest.mark.parametrize("pattern", ["kimi", "mla"])
@torch.no_grad()
def test_a_cache_is_as_full_as_if_it_had_been_read(pattern: str) -> None:
    model = subject(pattern)
    cache, token = model._filled_cache(300, 3)
    assert token.shape == (3, 1)
    assert {layer.num_tokens for layer in cache.layers} == {300}
    latents = [torch.cat(x.segments(), dim=1) for x in cache.layers if hasattr(x, "segments")]
    for latent in latents:
        assert latent.shape[:2] == (3, 300)
        assert_close(latent[:, 150:], latent[:, :150], torch.float32)
    out = model.model(token, cache=cache).logits
    assert out.isfinite().all() and cache.get_seq_length() == 301


def test_a_run_of_both_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment_decoding, "WARM_UP_STEPS", 1)
    output = tmp_path / "lines.jsonl"
    lines = experiment_decoding.main(**SMALL, contexts=(64, 300), max_rows=3, output=output)
    assert [json.loads(text) for text in output.read_text().splitlines()] == lines
    found = [line for line in lines if line["event"] == "decode"]
    places = {(line["model"], line["context"], line["rows"]) for line in found}
    assert places == {(m, c, r) for m in ("kimi", "mla") for c in (64, 300) for r in (1, 2)}
    for line in found:
        assert "error" not in line
        assert line["ms_per_token"] == pytest.approx(line["ms_per_step"] / line["rows"], rel=1e-3)
        held = sum(line["cache_bytes"].values())
        assert held >= line["cache_bytes_needed"]  # room, and what crop needs
        assert line["backend"] == "layer by layer: no CUDA"
    sizes = {
        (line["model"], line["context"]): line["cache_bytes_needed"]
        for line in found
        if line["rows"] == 1
    }
    growth = {m: sizes[m, 300] - sizes[m, 64] for m in ("kimi", "mla")}
    assert growth["mla"] == 4 * growth["kimi"]  # of four layers, one is MLA


def test_packed_weights_beside_plain_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment_decoding, "WARM_UP_STEPS", 1)
    form = "experts=3/32"
    lines = experiment_decoding.main(
        **SMALL, contexts=(64,), models=("kimi",), quantize=("none", form), max_rows=1
    )
    plain, packed = (line for line in lines if line["event"] == "decode")
    assert "quantize" not in plain and packed["quantize"] == form
    assert "error" not in packed and packed["parameters"] == plain["parameters"]
    assert packed["limit"]["weight_bytes"] < plain["limit"]["weight_bytes"]
    assert packed["limit"]["latent_bytes"] == plain["limit"]["latent_bytes"]


def test_failures_are_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Subject, context: int, rows: int) -> dict[str, Any]:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(Subject, "decode", fail)
    lines = experiment_decoding.main(**SMALL, contexts=(64,), models=("mla",))
    assert [line["error"] for line in lines[1:]] == ["OutOfMemoryError: no room"]


def test_time_limit() -> None:
    lines = experiment_decoding.main(**SMALL, contexts=(64,), models=("mla",), time_limit=1e-3)
    assert [line["error"] for line in lines[1:]] == ["not run: --time-limit is spent"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "3m"}, "--preset '3m' is not allowed"),
        ({"models": ("gdn",)}, "--models 'gdn'"),
        ({"contexts": (8,)}, "--contexts"),
        ({"steps": 0}, "--steps 0"),
        ({"quantize": ("2gb",)}, "--quantize '2gb' is not allowed"),
        ({"quantize": ()}, "--quantize"),
        ({"spare_gigabytes": -1.0}, "--spare-gigabytes -1.0"),
    ],
)
def test_what_the_script_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        experiment_decoding.main(**{**SMALL, **options})
