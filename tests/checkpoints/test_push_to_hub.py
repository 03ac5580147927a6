"""scripts/push_to_hub.py: what it refuses, what the card says, what reaches the server."""

import importlib
import inspect
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import huggingface_hub
import pytest
import torch
from builders import tiny_model
from hub import TOKEN, Hub
from huggingface_hub import ModelCard
from official import CONFIG as OFFICIAL
from official import tensors as official_tensors
from safetensors.torch import load_file, save_file

from kimi_linear import KimiLinearConfig, engine_problems
from kimi_linear.checkpoints.engines import ENGINES
from kimi_linear.tokenizer.convert import convert_tiktoken
from kimi_linear.tokenizer.train import train_bpe

pytestmark = pytest.mark.transformers

SCRIPTS = Path(__file__).parents[2] / "scripts"
REPO = "me/model"
INDEX = "model.safetensors.index.json"
VOCAB = 520


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        yield importlib.import_module("push_to_hub")


@pytest.fixture(scope="module")
def cards(script: ModuleType) -> ModuleType:
    return importlib.import_module("publishing.model_card")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole folder, in several shards."""
    folder = tmp_path_factory.mktemp("saved")
    texts = ["def first(x):\n    return x\n", "def second(x):\n    return first(x)\n"]
    convert_tiktoken(train_bpe(texts, VOCAB, show_progress=False), folder)
    save_model(folder, "100KB")
    return folder


def save_model(folder: Path, max_shard_size: str = "5GB") -> None:
    model = tiny_model(vocab_size=VOCAB, bos_token_id=None, eos_token_id=None, pad_token_id=519)
    model.save_pretrained(folder, max_shard_size=max_shard_size)


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    with Hub() as running:
        yield running


def stored(server: Hub, revision: str = "main") -> dict[str, bytes]:
    return server.files(REPO, revision)


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def edit_config(**fields: Any) -> Callable[[Path], object]:
    return lambda folder: edit_json(folder / "config.json", lambda value: value.update(fields))


def truncate_shard(folder: Path) -> None:
    shard = shards(folder)[0]
    shard.write_bytes(shard.read_bytes()[:-10])


def edit_shard(change: Callable[[dict[str, torch.Tensor], str], object]) -> Callable[[Path], None]:
    """Change the tensor of the first expert in its shard, given all tensors there and its name."""

    def damage(folder: Path) -> None:
        name = "model.layers.1.block_sparse_moe.experts.0.w1.weight"
        shard = folder / json.loads((folder / INDEX).read_text())["weight_map"][name]
        content = load_file(shard)
        change(content, name)
        save_file(content, shard, metadata={"format": "pt"})

    return damage


def transpose(content: dict[str, torch.Tensor], name: str) -> None:
    content[name] = content[name].T.contiguous()


def forget_tensor_and_entry(folder: Path) -> None:
    edit_shard(lambda content, name: content.pop(name))(folder)
    edit_json(
        folder / INDEX,
        lambda value: value["weight_map"].pop(
            "model.layers.1.block_sparse_moe.experts.0.w1.weight"
        ),
    )


def point_shards_at(name: Any) -> Callable[[Path], object]:
    def change(index: dict[str, Any]) -> None:
        index["weight_map"] = dict.fromkeys(index["weight_map"], name)

    return lambda folder: edit_json(folder / INDEX, change)


EXPERT = r"model\.layers\.1\.block_sparse_moe\.experts\.0\.w1\.weight"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), r"config\.json is missing"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), r"config\.json is not JSON"),
    "other model": (edit_config(model_type="llama"), r"model_type is 'llama'; allowed"),
    "other class": (edit_config(architectures=["Llama"]), r"architectures is \['Llama'\]"),
    "no auto_map": (edit_config(auto_map={}), r"auto_map\['AutoConfig'\] is None"),
    "other code": (
        edit_config(auto_map={"AutoConfig": "configuration_kimi.KimiLinearConfig"}),
        r"is 'configuration_kimi\.KimiLinearConfig'; allowed: 'configuration_kimi_linear\.",
    ),
    "no code": (
        lambda f: (f / "modeling_kimi_linear.py").unlink(),
        r"modeling_kimi_linear\.py is missing; auto_map",
    ),
    "no sibling": (
        lambda f: (f / "ops_kda.py").unlink(),
        r"ops_kda\.py is missing; .*\.py needs it",
    ),
    "no class": (
        lambda f: (f / "configuration_kimi_linear.py").write_text("x = 1\n"),
        r"defines no class KimiLinearConfig",
    ),
    "bad code": (
        lambda f: (f / "ops_kda.py").write_text("def broken(:\n"),
        r"ops_kda\.py is not Python",
    ),
    "no weights": (lambda f: (f / INDEX).unlink(), r"one is needed, and both are missing"),
    "two kinds": (
        lambda f: shutil.copy(shards(f)[0], f / "model.safetensors"),
        r"one is needed, and both are there",
    ),
    "no shard": (lambda f: shards(f)[1].unlink(), r"model-00002-of-\d+\.safetensors: .*missing"),
    "cut shard": (truncate_shard, r"model-00001-of-\d+\.safetensors: truncated"),
    "old shard": (
        lambda f: shutil.copy(shards(f)[0], f / "model-00009-of-00009.safetensors"),
        r"model-00009-of-00009\.safetensors is left over",
    ),
    "not in shard": (
        edit_shard(lambda content, name: content.pop(name)),
        rf"tensor {EXPERT} is listed in model-\d+-of-\d+\.safetensors and found in no shard",
    ),
    "not in model": (
        edit_shard(lambda content, name: content.update(extra=content[name].clone())),
        r"tensor extra is listed in no shard and found in model-",
    ),
    "nowhere": (forget_tensor_and_entry, rf"missing: {EXPERT}"),
    "wrong shape": (edit_shard(transpose), rf"{EXPERT} has shape \[40, 24\].*\[24, 40\]"),
    "outside": (point_shards_at("../outside/x.safetensors"), r"names .*\.\./outside/x.*outside of"),
    "absolute": (point_shards_at("/x.safetensors"), r"names /x\.safetensors; allowed: names in"),
    "no names": (point_shards_at(3), r"weight_map must be an object with a file by tensor"),
    "whole numbers": (
        edit_shard(lambda content, name: content.update({name: content[name].int()})),
        rf"{EXPERT} is in I32, the model needs floating point",
    ),
    "truths": (
        edit_shard(lambda content, name: content.update({name: content[name] > 0})),
        rf"{EXPERT} is in BOOL, the model needs floating point",
    ),
    "no tokenizer config": (
        lambda f: (f / "tokenizer_config.json").unlink(),
        r"tokenizer_config\.json is missing",
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), r"tokenizer\.json is missing"),
    "no tokenizer code": (
        lambda f: edit_json(
            f / "tokenizer_config.json",
            lambda value: value.update(auto_map={"AutoTokenizer": ["tokenization_x.X", None]}),
        ),
        r"tokenization_x\.py is missing",
    ),
    "large ids": (
        lambda f: edit_json(
            f / "tokenizer.json", lambda value: value["added_tokens"][-1].update(id=VOCAB)
        ),
        rf"token id {VOCAB} is too large; allowed: below vocab_size {VOCAB}",
    ),
}


def edit_tokenizer(**fields: Any) -> Callable[[Path], object]:
    return lambda folder: edit_json(folder / "tokenizer.json", lambda value: value.update(fields))


def write_tokenizer_config(value: Any) -> Callable[[Path], object]:
    return lambda folder: (folder / "tokenizer_config.json").write_text(json.dumps(value))


DAMAGES |= {
    "list for auto_map": (
        edit_config(auto_map=[1]),
        r"/config\.json: auto_map is \[1\]; allowed: an object",
    ),
    "list for tokenizer's auto_map": (
        write_tokenizer_config({"auto_map": [1]}),
        r"tokenizer_config\.json: auto_map is \[1\]; allowed: an object",
    ),
    "number for a class": (
        write_tokenizer_config({"auto_map": {"a": 3}}),
        r"tokenizer_config\.json: auto_map\['a'\] is 3; allowed: 'module\.Class', or",
    ),
    "class elsewhere": (
        write_tokenizer_config({"auto_map": {"a": ["../secret.X", None]}}),
        r"tokenizer_config\.json: auto_map\['a'\] is \['\.\./secret\.X', None\]; allowed",
    ),
    "list for settings": (write_tokenizer_config([]), r"tokenizer_config\.json holds a list"),
    "no tokenizer model": (
        edit_tokenizer(model=3),
        r"tokenizer\.json: model\.vocab is of type None",
    ),
    "number for tokens": (
        edit_tokenizer(model={"vocab": 3}),
        r"tokenizer\.json: model\.vocab is of type int; allowed: the tokens",
    ),
    "word for an id": (
        edit_tokenizer(model={"vocab": {"a": "b"}}),
        r"tokenizer\.json: model\.vocab\['a'\] is 'b'; allowed: a whole number",
    ),
    "no id": (
        edit_tokenizer(added_tokens=[{}]),
        r"tokenizer\.json: id of added_tokens\[0\] is None; allowed: a whole number",
    ),
    "object for a list": (
        edit_tokenizer(added_tokens={"a": 1}),
        r"tokenizer\.json: added_tokens is of type dict; allowed: the tokens",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_folder_is_refused_by_name(script: ModuleType, folder: Path, name: str) -> None:
    damage, message = DAMAGES[name]
    damage(folder)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        script.check_folder(folder)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_are_looked_at_on_request(script: ModuleType, folder: Path, value: float) -> None:
    options = {"path": folder, "repo_id": REPO, "dry_run": True}
    script.main(**options, check_values=True)
    edit_shard(lambda content, name: content[name][1].fill_(value))(folder)
    script.main(**options)
    with pytest.raises(ValueError, match=rf"tensor {EXPERT} holds NaN or Inf"):
        script.main(**options, check_values=True)


def test_a_whole_folder_passes(script: ModuleType, folder: Path) -> None:
    checkpoint = script.check_folder(folder)
    expected = {
        name: tensor.shape for shard in shards(folder) for name, tensor in load_file(shard).items()
    }
    assert checkpoint.shapes == {name: tuple(shape) for name, shape in expected.items()}
    with pytest.raises(ValueError, match="is no folder"):
        script.check_folder(folder / "absent")


def test_code_of_another_repository_is_not_looked_for(script: ModuleType, folder: Path) -> None:
    """Bug: "owner/repo--module.py is missing"."""
    elsewhere = {"AutoTokenizer": ["owner/repo--tokenization_x.X", None]}
    edit_config(auto_map=json.loads((folder / "config.json").read_text())["auto_map"] | elsewhere)(
        folder
    )
    edit_json(folder / "tokenizer_config.json", lambda value: value.update(auto_map=elsewhere))
    expected = script.check_folder(folder).files
    assert not any("--" in name for name in expected)
    (folder / "tokenizer.json").unlink()  # that code reads tiktoken.model
    assert script.check_folder(folder).files == expected


def test_the_official_checkpoint_is_counted(cards: ModuleType) -> None:
    config = KimiLinearConfig(**{k: v for k, v in OFFICIAL.items() if k != "auto_map"})
    shapes = {name: shape for name, (shape, _) in official_tensors().items()}
    total, active = cards.count_parameters(shapes, config)
    assert total == 49_122_681_728
    idle_experts = 26 * (256 - 8) * 3 * 1024 * 2304
    assert active == total - idle_experts - 163840 * 2304
    assert 2.9e9 < active < 3.2e9  # "A3B"
    rows = dict(cards.architecture_rows(config, shapes))
    assert rows["Layers"] == "27: 20 KDA, 7 MLA (MLA in 4, 8, 12, 16, 20, 24, 27, from 1)"
    assert rows["KDA"] == "32 heads of size 128, convolution over 4 tokens"
    assert rows["Feed-forward"] == (
        "1 dense, 9,216 wide; 26 with 256 experts of 1,024, of which a token uses 8, and 1 shared"
    )
    assert rows["Weights"] == "bfloat16"


@pytest.mark.parametrize("pattern", ["all_kda", "all_mla"])
def test_tied_weights_and_pure_patterns(cards: ModuleType, pattern: str) -> None:
    model = tiny_model(pattern, tie_word_embeddings=True, first_k_dense_replace=4)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    total, active = cards.count_parameters(shapes, model.config)
    assert total == active == sum(math.prod(shape) for shape in shapes.values())
    rows = dict(cards.architecture_rows(model.config, shapes))
    assert rows["Layers"] == ("4, all KDA" if pattern == "all_kda" else "4, all MLA")
    assert rows["Feed-forward"] == "4 dense, 52 wide"


def test_the_card_says_what_was_stated(
    script: ModuleType, cards: ModuleType, folder: Path, tmp_path: Path
) -> None:
    metrics = tmp_path / "metrics.json"
    metrics.write_text(
        json.dumps(
            [
                {"name": "bits_per_byte", "value": 1.23456789, "dataset": "held-out files"},
                {"name": "steps", "value": 12000},
            ]
        )
    )
    checkpoint = script.check_folder(folder)
    statements = cards.Statements(
        metrics=cards.read_metrics(metrics),
        datasets=["roneneldan/TinyStories", "the standard library's source"],
        license="mit",
        languages=["en"],
        base_model="me/base",
    )
    text = cards.model_card(REPO, checkpoint.config, checkpoint.shapes, statements)
    card = ModelCard(text)
    assert card.data.license == "mit" and card.data.language == ["en"]
    assert card.data.datasets == ["roneneldan/TinyStories"]
    assert card.data.base_model == "me/base" and card.data.pipeline_tag == "text-generation"
    assert [(entry.metric_type, entry.metric_value) for entry in card.data.eval_results] == [
        ("bits_per_byte", 1.23456789)
    ]
    total = sum(math.prod(shape) for shape in checkpoint.shapes.values())
    for part in (
        f"| Parameters | {total:,} |",
        "| Layers | 4: 3 KDA, 1 MLA (MLA in 4, from 1) |",
        "| bits_per_byte | held-out files | 1.2346 |",
        "| steps |  | 12,000 |",
        "- the standard library's source",
        "trust_remote_code=True",
        "2510.26692",
        "Weights: mit.",
        f'name = "{REPO}"',
    ):
        assert part in text
    code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    for block in code:
        compile(block, "card", "exec")
    assert len(code) == 1


def test_the_card_says_what_was_not_stated(
    script: ModuleType, cards: ModuleType, folder: Path
) -> None:
    checkpoint = script.check_folder(folder)
    text = cards.model_card(REPO, checkpoint.config, checkpoint.shapes, cards.Statements())
    data = ModelCard(text).data
    assert data.license is None and data.datasets is None and data.eval_results is None
    assert "## Training data\n\nNot stated." in text and "## Metrics\n\nNone stated." in text
    assert "Weights: not stated." in text and "training data was not stated" in text


def test_the_card_says_what_other_engines_take_otherwise(
    script: ModuleType, cards: ModuleType, folder: Path
) -> None:
    checkpoint = script.check_folder(folder)
    config, shapes = checkpoint.config, checkpoint.shapes
    config.rms_norm_eps = 1e-6
    text = cards.model_card(REPO, config, shapes, cards.Statements())
    section = text[text.index("## Other engines") : text.index("## Licence")]
    for engine in ENGINES:
        row = next(line for line in section.splitlines() if line.startswith(f"| {engine} "))
        for problem in engine_problems(config, engine):
            assert str(problem) in row
    assert "rms_norm_eps=1e-06: KDA's output norm takes 1e-5, without an error" in section


@pytest.mark.parametrize(("fields", "is_mended"), [({"hidden_act": "gelu"}, False), ({}, True)])
def test_the_card_says_what_the_export_mends(
    cards: ModuleType, fields: dict[str, str], is_mended: bool
) -> None:
    config = KimiLinearConfig.from_preset("2m", **fields)
    assert engine_problems(config, "llama.cpp")  # 4 KDA heads, 2 MLA heads
    text = cards.model_card(REPO, config, {}, cards.Statements())
    (row,) = (line for line in text.splitlines() if line.startswith("| llama.cpp "))
    assert ("export_gguf.py` of the package's repository mends this" in row) == is_mended


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("3", "holds a int"),
        ('{"loss": NaN}', "loss of .* is nan"),
        ('{"loss": null}', "loss of .* is None"),
        ('{"loss": true}', "loss of .* is True"),
        ('[{"name": "loss"}]', "entry 0 of"),
        ('[{"name": "loss", "value": 1, "split": "x"}]', "entry 0 of"),
    ],
)
def test_wrong_metrics_are_refused(
    cards: ModuleType, tmp_path: Path, content: str, message: str
) -> None:
    file = tmp_path / "metrics.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        cards.read_metrics(file)
    with pytest.raises(ValueError, match="does not exist"):
        cards.read_metrics(tmp_path / "absent.json")


def test_a_trainers_results_are_metrics(cards: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "eval_results.json"
    file.write_text('{"epoch": 1.0, "eval_loss": 2.5}')
    found = [(metric.name, metric.value, metric.dataset) for metric in cards.read_metrics(file)]
    assert found == [("epoch", 1.0, None), ("eval_loss", 2.5, None)]


def push(script: ModuleType, server: Hub, folder: Path, **options: Any) -> str:
    return script.main(path=folder, repo_id=REPO, endpoint=server.endpoint, token=TOKEN, **options)


def test_what_is_pushed_is_the_model(
    script: ModuleType, server: Hub, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bug: what training, killed runs and other tools leave in a folder was pushed with it."""
    wanted = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    wanted |= {"README.md", "LICENSE", "eval_results.json", "additional_chat_templates/rag.jinja"}
    unwanted = (
        "_unfinished-4/checkpoint-4/optimizer.pt",
        "unfinished-replaced-x/model.safetensors",
        "deep/.env.local",
        "checkpoint-2/model.safetensors",
        "wandb/run-1/config.yaml",
        "__pycache__/kda.cpython-311.pyc",
        ".git/config",
        "keys/LICENSE",
        "additional_chat_templates/drafts/rag.jinja",
        "additional_chat_templates/.rag.jinja",
        "optimizer.pt",
        "optimizer_0/__0_0.distcp",
        "training_args.bin",
        "model.safetensors.part",
        "chat.safetensors",
        "metrics.jsonl.part",
        "id_rsa",
        "key.pem",
        "notes.py",
        ".env",
        ".netrc",
    )
    for name in ("LICENSE", "eval_results.json", "additional_chat_templates/rag.jinja", *unwanted):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    url = push(script, server, folder, private=True, license="mit", message="My model")
    printed = capsys.readouterr().out
    assert url == f"{server.endpoint}/{REPO}" == printed.splitlines()[-1]
    repo = server.repos[REPO]
    assert repo.private and repo.commit_at("main").title == "My model"
    files = stored(server)
    del files[".gitattributes"]
    assert files == {name: (folder / name).read_bytes() for name in wanted}
    named = re.search("not pushed, no part of a model: (.*) [(]--include", printed)[1].split(", ")
    tops = {name.partition("/")[0] + "/ (1 files)" * ("/" in name) for name in unwanted}
    tops ^= {"additional_chat_templates/ (1 files)", "additional_chat_templates/ (2 files)"}
    assert set(named) == tops


def test_more_is_pushed_on_request(script: ModuleType, server: Hub, folder: Path) -> None:
    (folder / "figures").mkdir()
    (folder / "figures" / "[1].png").write_bytes(b"x")
    (folder / "figures" / "1.svg").write_bytes(b"x")
    push(script, server, folder, include=["figures/*.png"])
    assert {name for name in stored(server) if "/" in name} == {"figures/[1].png"}
    server.requests.clear()
    with pytest.raises(ValueError, match=r"include: '\*.gif' is no file of"):
        push(script, server, folder, include=["*.gif"])
    assert not server.requests


@pytest.mark.parametrize(
    ("pattern", "taken"),
    [
        ("*", {"notes.txt"}),
        ("*/*", {"deep/notes.txt"}),
        ("deep/*", {"deep/notes.txt"}),
        ("?env", set()),
        (".env", {".env"}),
        (".*", {".env", ".netrc"}),
        ("deep/.*", {"deep/.env"}),
        (".git/*", {".git/config"}),
    ],
)
def test_patterns_take_what_they_spell(
    script: ModuleType, folder: Path, pattern: str, taken: set[str]
) -> None:
    """Bug: "*" took secrets, and what lay in folders."""
    checkpoint = script.check_folder(folder)
    belong = set(script.files_to_push(checkpoint))
    for name in ("notes.txt", ".env", ".netrc", "deep/notes.txt", "deep/.env", ".git/config"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")
    if taken:
        assert set(script.files_to_push(checkpoint, [pattern])) - belong == taken
    else:
        with pytest.raises(ValueError, match=r"include: '\?env' is no file of .*begins with a dot"):
            script.files_to_push(checkpoint, [pattern])


def test_links_that_lead_to_no_file_are_named(
    script: ModuleType, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bug: they were neither pushed nor named."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "x.jinja").write_text("x")
    (folder / "runs").mkdir()
    for name, target in (("data", "data"), ("runs/latest", "data"), ("lost", "absent")):
        (folder / name).symlink_to(tmp_path / target)
    script.files_to_push(script.check_folder(folder))
    assert (
        "not pushed, no part of a model: data (link to a folder), lost (link to nothing), "
        "runs/latest (link to a folder) (--incl"
    ) in capsys.readouterr().out


def test_images_of_the_card_are_pushed(
    script: ModuleType, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bug: the card's figures were missing on the Hub."""
    checkpoint = script.check_folder(folder)
    belong = set(script.files_to_push(checkpoint))
    (folder / "README.md").write_text(
        "![a](figures/a.png) [![b](./b.SVG 'title')](https://b.org) <img width=3 src='c d.jpg'>\n"
        "![e](<e f.png>) ![g](g%20h.gif#top) ![i](i_(1).webp) ![j][j] [secret](.env) `k.png`\n"
        "![up](../up.png) ![root](/etc/root.png) ![far](https://far.org/l.png)\n\n"
        "[j]: figures/j.jpeg\n"
    )
    linked = {"figures/a.png", "b.SVG", "c d.jpg", "e f.png", "g h.gif", "i_(1).webp"}
    linked.add("figures/j.jpeg")
    (folder / "figures").mkdir()
    for name in (*linked, "k.png", "l.png", ".env", "figures/other.png", "../up.png"):
        (folder / name).write_text("x")
    assert set(script.files_to_push(checkpoint)) - belong == {"README.md", *linked}
    capsys.readouterr()
    script.main(path=folder, repo_id=REPO, dry_run=True, overwrite_card=True)
    assert "  figures/a.png" not in capsys.readouterr().out  # the new card shows none


REFUSALS = {
    "unknown token": ("POST /api/repos/create", 401, "the token is not valid: .*401"),
    "no right": ("POST /api/models/.*/commit", 403, "the token may not write there.*403"),
    "busy": ("POST /api/models/.*/commit", 409, "try again.*409"),
    "moved on": ("POST /api/models/.*/commit", 412, "try again.*412"),
    "upload": ("PUT /lfs/upload", 403, "the token may not write there.*403"),
    "cut off": ("POST /api/models/.*/commit", 0, "(Protocol|Read)Error"),
    "cut off in an upload": ("PUT /lfs/upload", 0, "(Protocol|Read)Error"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_failed_push_is_one_line(
    script: ModuleType,
    server: Hub,
    folder: Path,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bug: tracebacks, and messages of many lines."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the client's retries
    request, status, message = REFUSALS[name]
    server.refusals[request] = status
    with pytest.raises(script.PushError, match=f"^{REPO} was not pushed: .*{message}") as error:
        push(script, server, folder)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
    server.refusals.clear()
    push(script, server, folder)
    assert "config.json" in stored(server)


def test_servers_and_file_names_cannot_command_the_terminal(
    script: ModuleType, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(script.PushError, match=r": OSError: \\x1b\[31mno$"):  # noqa: SIM117
        with script._one_line_errors(REPO):
            raise OSError("\x1b[31mno")
    (folder / "\x1b[31mlog").write_text("")
    script.main(path=folder, repo_id=REPO, dry_run=True, include=["*log"])
    script.main(path=folder, repo_id=REPO, dry_run=True)
    printed = capsys.readouterr().out
    assert printed.count(r"\x1b[31mlog") == 2 and "\x1b" not in printed


def test_a_server_that_is_not_there_is_one_line(script: ModuleType, folder: Path) -> None:
    with pytest.raises(script.PushError, match=f"^{REPO} was not pushed: ConnectError: "):
        script.main(path=folder, repo_id=REPO, endpoint="http://127.0.0.1:9", token=TOKEN)


def test_a_card_is_kept_here_and_there_unless_told_otherwise(
    script: ModuleType, server: Hub, folder: Path
) -> None:
    card = folder / "README.md"
    card.write_text("---\nlicense: mit\n---\nmine\n")
    push(script, server, folder)
    assert stored(server)["README.md"] == card.read_bytes() == b"---\nlicense: mit\n---\nmine\n"
    card.unlink()
    push(script, server, folder)
    assert not card.exists() and stored(server)["README.md"].endswith(b"mine\n")
    push(script, server, folder, overwrite_card=True)
    assert stored(server)["README.md"] == card.read_bytes()
    assert b"2510.26692" in card.read_bytes() and b"mine" not in card.read_bytes()


def test_shards_of_an_earlier_push_do_not_stay(
    script: ModuleType, server: Hub, folder: Path
) -> None:
    push(script, server, folder)
    before = {name for name in stored(server) if name.startswith("model")}
    assert INDEX in before and len(before) > 2
    for file in [*shards(folder), folder / INDEX]:
        file.unlink()
    save_model(folder)
    push(script, server, folder)
    after = {name for name in stored(server) if name.startswith("model")}
    assert after == {"model.safetensors", "modeling_kimi_linear.py"}


def test_a_revision_is_a_branch_of_its_own(script: ModuleType, server: Hub, folder: Path) -> None:
    url = push(script, server, folder, revision="step-500")
    assert url == f"{server.endpoint}/{REPO}/tree/step-500"
    assert set(stored(server)) == {".gitattributes"}
    assert "config.json" in stored(server, "step-500")
    push(script, server, folder, revision="step-500", message="again")


def test_a_dry_run_writes_nothing_and_asks_nobody(
    script: ModuleType, server: Hub, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert push(script, server, folder, dry_run=True) is None
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert server.requests == []
    printed = capsys.readouterr().out
    assert "config.json" in printed and "| Parameters |" in printed


def test_wrong_arguments_are_refused_before_any_request(
    script: ModuleType, server: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="Repo id"):
        script.main(path=folder, repo_id="a/b/c", endpoint=server.endpoint)
    monkeypatch.setattr(script, "get_token", lambda: None)
    with pytest.raises(ValueError, match="token is None; allowed"):
        script.main(path=folder, repo_id=REPO, endpoint=server.endpoint)
    assert server.requests == []


def test_flags_are_arguments_of_main(script: ModuleType) -> None:
    flags = "x --repo-id me/m --private --revision r --message m --metrics j --license mit"
    more = "--dataset a/b --dataset c --language en --base-model me/b --overwrite-card --dry-run"
    given = vars(script.parse_args(f"{flags} {more} --include x --check-values".split()))
    assert given["datasets"] == ["a/b", "c"] and given["dry_run"] and given["private"]
    assert set(given) == set(inspect.signature(script.main).parameters) - {"endpoint", "token"}
    plain = vars(script.parse_args(["x", "--repo-id", "me/m"]))
    defaults = inspect.signature(script.main).parameters
    for name, value in plain.items():
        if name not in ("path", "repo_id"):
            wanted = defaults[name].default
            assert (tuple(value) if isinstance(value, list) else value) == wanted, name
