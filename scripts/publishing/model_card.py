"""The model card of a Kimi Linear checkpoint: the README.md of its repository on the Hub.

Everything in it comes from the checkpoint's config and weight shapes and from what the caller
states. What was not stated is said to be unknown.
"""

import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporting.plan import ENGINE as EXPORT
from exporting.plan import make_plan
from huggingface_hub import EvalResult, ModelCardData

from kimi_linear import KimiLinearConfig, engine_problems
from kimi_linear.checkpoints.engines import ENGINES
from kimi_linear.upstream.stored import entry_of

ROUTED_EXPERT = re.compile(r"\.experts\.\d+\.")
EMBEDDING = "embed_tokens.weight"
TASKS = {
    "KimiLinearForCausalLM": ("text-generation", "AutoModelForCausalLM"),
    "KimiLinearForSequenceClassification": (
        "text-classification",
        "AutoModelForSequenceClassification",
    ),
    "KimiLinearForTokenClassification": (
        "token-classification",
        "AutoModelForTokenClassification",
    ),
    "KimiLinearBackbone": ("feature-extraction", "AutoModel"),
}
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
HARM = "It writes what is likely after the text so far, which need not be true or harmless."
CITATION = """\
@misc{kimi2025linear,
  title         = {Kimi Linear: An Expressive, Efficient Attention Architecture},
  author        = {{Kimi Team}},
  year          = {2025},
  eprint        = {2510.26692},
  archivePrefix = {arXiv},
  primaryClass  = {cs.CL}
}"""


@dataclass(frozen=True)
class Metric:
    """One measured value, and what it was measured on."""

    name: str
    value: float | int | str
    dataset: str | None = None


@dataclass(frozen=True)
class Statements:
    """What a user says about a model, beyond what the checkpoint shows.

    Args:
        metrics: What was measured.
        datasets: Training data: ids of Hub datasets, paths, or words.
        license: The weights' licence as the Hub spells it (`mit`, `apache-2.0`, ...), or None.
        languages: Codes such as `en`.
        base_model: Hub id of the model that this one was trained from, or None.
    """

    metrics: Sequence[Metric] = ()
    datasets: Sequence[str] = ()
    license: str | None = None
    languages: Sequence[str] = ()
    base_model: str | None = None


def count_parameters(
    shapes: dict[str, tuple[int, ...]], config: KimiLinearConfig
) -> tuple[int, int]:
    """Count parameters, all of them and those that one token uses.

    Args:
        shapes: Shape by name of the checkpoint's tensors.
        config: The model's config.

    Returns:
        All parameters; and the parameters that take part in computing one token: of the routed
        experts the share that the router picks, and not the embedding table, which is a look-up
        (unless it is also the output layer).
    """
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    routed = sum(size for name, size in sizes.items() if ROUTED_EXPERT.search(name))
    idle = 0
    if routed:
        idle = routed - routed * config.num_experts_per_token // config.num_experts
    if not config.tie_word_embeddings:
        idle += sum(size for name, size in sizes.items() if name.endswith(EMBEDDING))
    total = sum(sizes.values())
    return total, total - idle


def read_metrics(path: str | os.PathLike[str]) -> list[Metric]:
    """Read measured values from JSON.

    Args:
        path: A file with either one object, metric name to value (as Trainer's `eval_results.json`
            is), or a list of objects with `name`, `value` and, if wanted, `dataset`.

    Returns:
        The metrics, in the file's order.

    Raises:
        ValueError: The file is missing, is not JSON, or has another form; the message names the
            entry.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"metrics: {path} does not exist; allowed: a JSON file")
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"metrics: {path} is not JSON ({error})") from error
    if isinstance(value, dict):
        value = [{"name": name, "value": entry} for name, entry in value.items()]
    if not isinstance(value, list):
        raise ValueError(f"metrics: {path} holds a {type(value).__name__}; allowed: object or list")
    return [_metric(path, index, entry) for index, entry in enumerate(value)]


def _metric(path: str | os.PathLike[str], index: int, entry: Any) -> Metric:
    allowed = {"name", "value", "dataset"}
    if not isinstance(entry, dict) or not {"name", "value"} <= set(entry) <= allowed:
        raise ValueError(
            f"metrics: entry {index} of {path} is {entry!r}; allowed: an object with name, value "
            "and perhaps dataset"
        )
    value = entry["value"]
    good = isinstance(value, int | float | str) and not isinstance(value, bool)
    if not good or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError(
            f"metrics: {entry['name']} of {path} is {value!r}; allowed: a finite number or a text"
        )
    return Metric(str(entry["name"]), value, entry.get("dataset"))


def model_card(
    repo_id: str,
    config: KimiLinearConfig,
    shapes: dict[str, tuple[int, ...]],
    statements: Statements,
) -> str:
    """Write the card.

    Args:
        repo_id: The repository, `user/name`.
        config: The model's config.
        shapes: Shape by name of the checkpoint's tensors.
        statements: What the user says about the model.

    Returns:
        Markdown with YAML front matter.
    """
    task, auto_class = TASKS[(config.architectures or ["KimiLinearForCausalLM"])[0]]
    name = repo_id.split("/")[-1]
    sections = [
        f"---\n{_metadata(name, task, statements)}\n---\n\n# {name}",
        "A language model of the Kimi Linear architecture: Kimi Delta Attention (KDA, linear "
        "attention with a state of fixed size), multi-head latent attention without positions "
        "(MLA), and a mixture of experts.",
        f"## Architecture\n\n{_table(('', ''), architecture_rows(config, shapes))}",
        f"## Training data\n\n{_training_data(statements)}",
        f"## Metrics\n\n{_metrics_table(statements.metrics)}",
        f"## Usage\n\n{_usage(repo_id, task, auto_class)}",
        f"## Limits\n\n{_limits(config, task, statements)}",
        f"## Other engines\n\n{_engines(config)}",
        f"## Licence\n\n{_licence(statements)}",
        f"## Citation\n\nThe architecture:\n\n```bibtex\n{CITATION}\n```",
    ]
    return "\n\n".join(sections) + "\n"


def architecture_rows(
    config: KimiLinearConfig, shapes: dict[str, tuple[int, ...]]
) -> list[tuple[str, str]]:
    """The rows of the card's architecture table: name and value."""
    linear = config.linear_attn_config
    assert linear is not None
    total, active = count_parameters(shapes, config)
    rows = [
        ("Parameters", f"{total:,}"),
        ("Parameters used per token", f"{active:,} (without the embedding look-up)"),
        ("Layers", _layers(config)),
        ("Hidden size", f"{config.hidden_size:,}"),
        (
            "KDA",
            f"{linear['num_heads']} heads of size {linear['head_dim']}, convolution over "
            f"{linear['short_conv_kernel_size']} tokens",
        ),
        (
            "MLA",
            f"{config.num_attention_heads} heads, keys {config.qk_nope_head_dim} + "
            f"{config.qk_rope_head_dim} wide, values {config.v_head_dim} wide, latent of "
            f"{config.kv_lora_rank}",
        ),
        ("Feed-forward", _feed_forward(config)),
        ("Vocabulary", f"{config.vocab_size:,}"),
        ("Context", f"{config.model_max_length:,} tokens"),
    ]
    if config.tie_word_embeddings:
        rows[1] = (rows[1][0], f"{active:,}")
    if config.dtype is not None:
        rows.append(("Weights", str(config.dtype).removeprefix("torch.")))
    entry = entry_of(config)
    if entry is not None:
        rows.append(("Quantised", str(entry.get("format", entry["quant_method"]))))
    return rows


def _layers(config: KimiLinearConfig) -> str:
    number, types = config.num_hidden_layers, config.layer_types
    full = [layer for layer, kind in enumerate(types, start=1) if kind == "full_attention"]
    if not full:
        return f"{number}, all KDA"
    if len(full) == number:
        return f"{number}, all MLA"
    places = ", ".join(str(layer) for layer in full)
    return f"{number}: {number - len(full)} KDA, {len(full)} MLA (MLA in {places}, from 1)"


def _feed_forward(config: KimiLinearConfig) -> str:
    number = config.num_hidden_layers
    sparse = sum(config.is_moe_layer(index) for index in range(number))
    parts = []
    if sparse < number:
        parts.append(f"{number - sparse} dense, {config.intermediate_size:,} wide")
    if sparse:
        shared = config.num_shared_experts or 0
        parts.append(
            f"{sparse} with {config.num_experts} experts of {config.moe_intermediate_size:,}, of "
            f"which a token uses {config.num_experts_per_token}"
            + (f", and {shared} shared" if shared else "")
        )
    return "; ".join(parts)


def _metadata(name: str, task: str, statements: Statements) -> str:
    """The card's YAML, without the lines around it."""
    results = [
        EvalResult(
            task_type=task,
            dataset_type=metric.dataset,
            dataset_name=metric.dataset,
            metric_type=metric.name,
            metric_value=metric.value,
        )
        for metric in statements.metrics
        if metric.dataset
    ]
    data = ModelCardData(
        language=list(statements.languages) or None,
        license=statements.license,
        library_name="transformers",
        pipeline_tag=task,
        tags=["kimi_linear", "linear-attention", "mixture-of-experts", "custom_code"],
        datasets=[entry for entry in statements.datasets if HUB_ID.fullmatch(entry)] or None,
        base_model=statements.base_model,
        model_name=name if results else None,
        eval_results=results or None,
    )
    return data.to_yaml()


def _training_data(statements: Statements) -> str:
    lines = [
        f"- [{entry}](/datasets/{entry})" if HUB_ID.fullmatch(entry) else f"- {entry}"
        for entry in statements.datasets
    ]
    if statements.base_model:
        base = f"[{statements.base_model}](/{statements.base_model})"
        lines.insert(0, f"- starting from {base}")
    return "\n".join(lines) or "Not stated."


def _metrics_table(metrics: Sequence[Metric]) -> str:
    if not metrics:
        return "None stated."
    rows = [(metric.name, metric.dataset or "", _shown(metric.value)) for metric in metrics]
    if not any(dataset for _, dataset, _ in rows):
        return _table(("Metric", "Value"), [(name, value) for name, _, value in rows])
    return _table(("Metric", "Measured on", "Value"), rows)


def _shown(value: float | int | str) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.5g}" if isinstance(value, float) else value


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in line) + " |"
        for line in lines
    )


def _usage(repo_id: str, task: str, auto_class: str) -> str:
    lines = [
        f"from transformers import {auto_class}, AutoTokenizer",
        "",
        f'name = "{repo_id}"',
        "tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)",
        f'model = {auto_class}.from_pretrained(name, trust_remote_code=True, dtype="auto")',
        'inputs = tokenizer("Once upon a time", return_tensors="pt")',
    ]
    if task == "text-generation":
        lines += [
            "tokens = model.generate(**inputs, max_new_tokens=64)",
            "print(tokenizer.decode(tokens[0], skip_special_tokens=True))",
        ]
    else:
        lines += ["outputs = model(**inputs)"]
    return (
        "```bash\npip install 'transformers>=5.17,<6' torch\n"
        "pip install 'fla-core>=0.5.1'  # the kernels, for a GPU\n```\n\n"
        "```python\n" + "\n".join(lines) + "\n```\n\n"
        "`trust_remote_code=True` runs the Python files of this repository. Read them, and pass "
        "`revision=` with a commit id so that they cannot change under you."
    )


def _limits(config: KimiLinearConfig, task: str, statements: Statements) -> str:
    lines = [
        f"- Contexts are meant to hold at most {config.model_max_length:,} tokens.",
        "- Without a GPU it runs on plain PyTorch, which is slower.",
    ]
    if task == "text-generation":
        lines.insert(0, f"- {HARM}")
    if not statements.metrics:
        lines.insert(0, "- No evaluation was stated.")
    if not statements.datasets:
        lines.insert(0, "- The training data was not stated, so neither are its biases.")
    return "\n".join(lines)


def _engines(config: KimiLinearConfig) -> str:
    """What engines make of this configuration, as far as their sources say."""
    rows = []
    for engine, (version, _) in ENGINES.items():
        problems = engine_problems(config, engine)
        texts = "; ".join(map(str, problems)) or "nothing that is known"
        if problems and engine == EXPORT and _can_be_exported(config):
            texts += " (`scripts/export_gguf.py` of the package's repository mends this)"
        rows.append((f"{engine} {version}", texts))
    note = "Of checkpoints in 16 bits, in these releases."
    return f"{_table(('Engine', 'What it takes otherwise'), rows)}\n\n{note}"


def _can_be_exported(config: KimiLinearConfig) -> bool:
    """Whether zeros make it a model that llama.cpp computes."""
    try:
        make_plan(config, config.to_dict())
    except ValueError:
        return False
    return True


def _licence(statements: Statements) -> str:
    weights = statements.license or "not stated"
    return f"Weights: {weights}. The modelling code in this repository: MIT."
