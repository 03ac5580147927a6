"""The command that puts our code beside weights: links, a config, and nothing else touched."""

import json
import os
import shutil
import signal
from pathlib import Path

import add_code
import commands
import official
import pytest
import torch
from builders import tiny_config, tiny_model, token_ids
from remote_code import LOGITS, code_in, run_stranger
from safetensors.torch import load_file, save_file

from kimi_linear import KimiLinearForCausalLM
from kimi_linear.checkpoints.code_in_folder import code_files
from kimi_linear.checkpoints.flat_copy import package_code
from kimi_linear.checkpoints.pretrained import AUTO_MAP

pytestmark = pytest.mark.transformers

OTHER_CODE = {
    "configuration_kimi.py": "raise ImportError('the other configuration')\n",
    "modeling_kimi.py": "from .configuration_kimi import KimiLinearConfig\nraise ImportError\n",
    "tokenization_kimi.py": "from .tool_declaration import encode\n",
    "tool_declaration.py": "def encode(): ...\n",
}
TEXTS = {
    "README.md": "# A model\n",
    "chat_template.jinja": "{{ messages }}\n",
    "tiktoken.model": "YQ== 0\n",
    "generation_config.json": '{"max_length": 99}\n',
    "tokenizer_config.json": json.dumps(
        {"auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]}}
    ),
}


@pytest.fixture(scope="module")
def model() -> KimiLinearForCausalLM:
    return tiny_model()


@pytest.fixture(scope="module")
def original(model, tmp_path_factory) -> Path:
    """A snapshot as Moonshot publishes it, of a tiny model."""
    folder = tmp_path_factory.mktemp("original")
    model.save_pretrained(folder, max_shard_size="60KB")
    for path in folder.glob("*.py"):
        path.unlink()
    saved = json.loads((folder / "config.json").read_text())
    fields = {
        key: value if key in ("auto_map", "model_type", "architectures") else saved[key]
        for key, value in official.CONFIG.items()
    }
    (folder / "config.json").write_text(json.dumps(fields, indent=2))
    for name, text in (OTHER_CODE | TEXTS).items():
        (folder / name).write_text(text)
    (folder / "figures").mkdir()
    (folder / "figures" / "plot.png").write_bytes(b"png")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("{{ 1 }}")
    return folder


@pytest.fixture
def snapshot(original, tmp_path) -> Path:
    """One that a test may break."""
    return Path(shutil.copytree(original, tmp_path / "snapshot"))


@pytest.fixture
def cached(original, tmp_path) -> Path:
    """The same in the layout of the Hugging Face cache: links into a folder of blobs."""
    root = tmp_path / "hub" / "models--them--tiny"
    folder = root / "snapshots" / "0123abcd"
    (root / "blobs").mkdir(parents=True)
    for number, path in enumerate(sorted(original.rglob("*"))):
        if path.is_file():
            blob = root / "blobs" / f"{number:040x}"
            shutil.copyfile(path, blob)
            link = folder / path.relative_to(original)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))
    return folder


def state_of(folder: Path) -> dict:
    """Everything one can change about a folder."""
    return {
        str(path.relative_to(folder)): (
            os.readlink(path) if path.is_symlink() else None,
            path.lstat().st_mtime_ns,
            path.read_bytes() if path.is_file() else None,
        )
        for path in sorted(folder.rglob("*"))
    }


def index_of(folder: Path) -> dict[str, str]:
    return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]


@pytest.mark.parametrize("copy", [False, True])
def test_links_code_and_config(original, tmp_path, copy):
    before = state_of(original)
    output = add_code.main(snapshot=original, output=tmp_path / "ours", copy=copy)
    assert state_of(original) == before
    assert output == tmp_path / "ours"

    shards = sorted(set(index_of(original).values()))
    kept = {*TEXTS, "tokenization_kimi.py", "tool_declaration.py"}
    folders = {"figures", "additional_chat_templates"}
    kept.add("model.safetensors.index.json")
    made = {*folders, *shards, *package_code(), "config.json"}
    assert {path.name for path in output.iterdir()} == kept | made
    assert len(shards) > 3
    for name in shards:
        assert (output / name).is_symlink() and (output / name).samefile(original / name)
    assert not any((output / name).is_symlink() for name in folders)
    for name in (*kept, "figures/plot.png", "additional_chat_templates/rag.jinja"):
        is_copied = copy or name.endswith((".json", ".jinja", ".md"))
        assert (output / name).is_symlink() == (not is_copied), name
    for name in TEXTS:
        assert (output / name).read_bytes() == (original / name).read_bytes()
    assert (output / "figures" / "plot.png").read_bytes() == b"png"
    # through a link to a folder saving would reach the snapshot; a push would not follow it
    assert output / "additional_chat_templates" / "rag.jinja" in set(output.rglob("*"))

    fields = json.loads((output / "config.json").read_text())
    theirs = json.loads((original / "config.json").read_text())
    assert list(fields) == list(theirs)
    assert fields == {**theirs, "auto_map": AUTO_MAP}
    # all but the lines of auto_map are the same text
    ours, text = (
        (folder / "config.json").read_text().splitlines() for folder in (output, original)
    )
    assert [line for line in text if "_kimi." not in line] == [
        line for line in ours if "_kimi_linear." not in line
    ]


def test_the_folders_load_for_strangers(original, cached, model, tmp_path):
    before = [state_of(snapshot) for snapshot in (original, cached)]
    outputs = [
        add_code.main(snapshot=snapshot, output=tmp_path / f"Ours-0.{number}b")
        for number, snapshot in enumerate((original, cached))
    ]
    with torch.no_grad():
        expected = model(token_ids(2, 13)).logits
    for results in run_stranger(LOGITS, outputs, tmp_path / "stranger"):
        torch.testing.assert_close(results["logits"], expected, rtol=1e-5, atol=1e-5)
    assert [state_of(snapshot) for snapshot in (original, cached)] == before


def test_saving_into_the_folder_leaves_the_snapshot_alone(original, tmp_path):
    """A file written through a link would change the snapshot."""
    output = add_code.main(snapshot=original, output=tmp_path / "ours")
    before = state_of(original)
    loaded = KimiLinearForCausalLM.from_pretrained(output)
    with torch.no_grad():
        loaded.model.norm.weight.add_(1)
    loaded.generation_config.max_length = 77
    for shard in ("60KB", "30KB"):  # the same names of shards, then others
        loaded.save_pretrained(output, max_shard_size=shard)
    assert state_of(original) == before
    again = KimiLinearForCausalLM.from_pretrained(output)
    assert torch.equal(again.model.norm.weight, loaded.model.norm.weight)


def test_relative_paths(original, tmp_path, monkeypatch):
    """Links lead to the right place although they stand in another folder."""
    shutil.copytree(original, tmp_path / "in")
    monkeypatch.chdir(tmp_path)
    output = add_code.main(snapshot="in", output="deep/er/ours")
    assert output == tmp_path / "deep" / "er" / "ours"
    assert all(path.exists() for path in output.iterdir())


def test_snapshot_without_auto_map(snapshot, tmp_path):
    fields = json.loads((snapshot / "config.json").read_text())
    del fields["auto_map"]
    (snapshot / "config.json").write_text(json.dumps(fields))
    output = add_code.main(snapshot=snapshot, output=tmp_path / "ours")
    assert json.loads((output / "config.json").read_text()) == {**fields, "auto_map": AUTO_MAP}


def test_an_earlier_version_of_our_code_is_replaced(snapshot, tmp_path):
    (snapshot / "modeling_kimi_linear.py").write_text("raise ImportError('stale')\n")
    output = add_code.main(snapshot=snapshot, output=tmp_path / "ours")
    assert "stale" not in (output / "modeling_kimi_linear.py").read_text()
    assert "stale" in (snapshot / "modeling_kimi_linear.py").read_text()


# ---- refused


def drop_tensor(folder: Path, name: str, replacement: torch.Tensor | None) -> None:
    path = folder / index_of(folder)[name]
    tensors = load_file(path)
    del tensors[name]
    save_file(tensors | ({} if replacement is None else {name: replacement}), path)


def change_config(folder: Path, **fields) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


EXPERT = "model.layers.2.block_sparse_moe.experts.3.w2.weight"
BROKEN = {
    "missing_shard": (
        lambda folder: (folder / index_of(folder)[EXPERT]).unlink(),
        r"model-0000\d-of-0000\d\.safetensors: the shard is missing",
    ),
    "truncated_shard": (
        lambda folder: os.truncate(folder / index_of(folder)[EXPERT], 8_000),
        r"model-0000\d-of-0000\d\.safetensors: truncated at 8000 bytes, tensor model\.layers",
    ),
    "missing_tensor": (
        lambda folder: drop_tensor(folder, EXPERT, None),
        f"index.json: tensor {EXPERT} .* found in no shard",
    ),
    "wrong_shape": (
        lambda folder: drop_tensor(folder, EXPERT, torch.zeros(40, 23)),
        rf"tensor {EXPERT} has shape \[40, 23\], the model needs \[40, 24\]",
    ),
    "whole_numbers": (
        lambda folder: drop_tensor(folder, EXPERT, torch.zeros(40, 24, dtype=torch.int64)),
        f"tensor {EXPERT} is in I64, the model needs floating point",
    ),
    "no_weights": (
        lambda folder: (folder / "model.safetensors.index.json").unlink(),
        "model.safetensors and model.safetensors.index.json",
    ),
    "no_config": (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
    "no_json": (
        lambda folder: (folder / "config.json").write_text("{"),
        "config.json is not JSON",
    ),
    "another_model": (
        lambda folder: change_config(folder, model_type="deepseek_v3"),
        "config.json: model_type is 'deepseek_v3'; allowed: 'kimi_linear'",
    ),
    "another_class": (
        lambda folder: change_config(folder, architectures=["KimiK3ForCausalLM"]),
        "config.json: architectures is .*KimiK3.*; allowed: one of .*KimiLinearForCausalLM",
    ),
    "unsupported_field": (
        lambda folder: change_config(folder, mla_use_nope=False),
        "mla_use_nope=False",
    ),
    "another_size": (
        lambda folder: change_config(folder, moe_intermediate_size=32),
        r"tensor model\.layers\.1\.block_sparse_moe\S+ has shape",
    ),
    "tokenizer_code_missing": (
        lambda folder: (folder / "tokenization_kimi.py").unlink(),
        "tokenization_kimi.py is missing; auto_map of .*tokenizer_config.json needs it",
    ),
    "tokenizer_code_is_no_python": (
        lambda folder: (folder / "tokenization_kimi.py").write_text("def broken(:"),
        "tokenization_kimi.py is not Python",
    ),
    "tokenizer_settings_in_a_list": (
        lambda folder: (folder / "tokenizer_config.json").write_text("[]"),
        "tokenizer_config.json holds a list; allowed: an object",
    ),
    "tokenizer_code_in_a_list": (
        lambda folder: (folder / "tokenizer_config.json").write_text('{"auto_map": [1]}'),
        r"tokenizer_config.json: auto_map is \[1\]; allowed: an object",
    ),
    "number_for_tokenizer_code": (
        lambda folder: (folder / "tokenizer_config.json").write_text('{"auto_map": {"a": 3}}'),
        r"tokenizer_config.json: auto_map\['a'\] is 3; allowed: 'module.Class'",
    ),
    "dangling_link": (
        lambda folder: (folder / "LICENSE").symlink_to("../../blobs/77"),
        "LICENSE is a link to .*blobs/77, which is missing",
    ),
}


def test_a_killed_command_begins_anew(snapshot, tmp_path, monkeypatch):
    """Bug: what it had written made its own output "not empty"."""

    def killed(path, target, *, copy):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(add_code, "_place", killed)
    output = tmp_path / "made" / "ours"
    process = os.fork()
    if not process:
        add_code.main(snapshot=snapshot, output=output)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
    assert [path.name for path in output.parent.iterdir()] == ["_unfinished-ours"]
    monkeypatch.undo()
    add_code.main(snapshot=snapshot, output=output)
    assert [path.name for path in output.parent.iterdir()] == ["ours"]
    KimiLinearForCausalLM.from_pretrained(output)


@pytest.mark.parametrize("case", BROKEN)
def test_broken_snapshots_are_refused_by_name(snapshot, tmp_path, case):
    break_it, message = BROKEN[case]
    break_it(snapshot)
    with pytest.raises(ValueError, match=message):
        add_code.main(snapshot=snapshot, output=tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_output_in_use(snapshot, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("text")
    (tmp_path / "alias").symlink_to(snapshot)
    for output, message in {
        tmp_path / "full": "output=.*full is not empty",
        tmp_path / "file": "output=.*file is a file",
        snapshot: "is in the snapshot",
        snapshot / "ours": "is in the snapshot",
        tmp_path / "alias" / "ours": "is in the snapshot",
    }.items():
        with pytest.raises(ValueError, match=message):
            add_code.main(snapshot=snapshot, output=output)
    assert not (snapshot / "ours").exists()
    (tmp_path / "empty").mkdir()
    add_code.main(snapshot=snapshot, output=tmp_path / "empty")


def test_command_line(original, tmp_path):
    command = [add_code.__file__, str(original), "--output", str(tmp_path / "ours")]
    done = commands.run([*command, "--copy"])
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "ours" / "README.md").is_file()
    assert str(tmp_path / "ours") in done.stdout
    again = commands.run(command)
    assert again.returncode == 1
    assert again.stderr.strip().splitlines()[-1].startswith("error: output=")
    (tmp_path / "file").write_text("")
    nowhere = commands.run([*command[:-1], str(tmp_path / "file" / "ours")])
    assert nowhere.returncode == 1 and "Traceback" not in nowhere.stderr
    assert nowhere.stderr.strip().splitlines()[-1].startswith("error: [Errno ")


def test_a_link_to_an_empty_folder_stays_one(snapshot, tmp_path):
    """Bug: a folder took the link's place, and where it led stayed empty."""
    (tmp_path / "large disk").mkdir()
    (tmp_path / "ours").symlink_to("large disk")
    add_code.main(snapshot=snapshot, output=tmp_path / "ours")
    assert (tmp_path / "ours").is_symlink()
    KimiLinearForCausalLM.from_pretrained(tmp_path / "large disk")


def test_a_missing_file_of_the_tokenizers_code_is_named(tmp_path):
    (tmp_path / "tokenization.py").write_text("from .pieces import cut\n")
    with pytest.raises(ValueError, match="pieces.py is missing; .*tokenization.py needs it"):
        code_files(tmp_path, ["tokenization.Tokenizer"], "auto_map")


def test_a_folder_without_weights(original, tmp_path):
    """`from_config` builds a model from it in one line."""
    sizes = [add_code.main(preset="20m", output=tmp_path / "preset")]
    sizes += [add_code.main(config=original, output=tmp_path / "config")]
    for folder in sizes:
        assert code_in(folder) == package_code()
        fields = json.loads((folder / "config.json").read_text())
        assert fields["auto_map"] == AUTO_MAP
        assert fields["architectures"] == ["KimiLinearForCausalLM"]
    assert fields["hidden_size"] == tiny_config().hidden_size
    with pytest.raises(ValueError, match="exactly one of snapshot, --preset and --config"):
        add_code.main(preset="20m", snapshot=original, output=tmp_path / "both")
    with pytest.raises(ValueError, match="output=.*preset is not empty"):
        add_code.main(preset="20m", output=tmp_path / "preset")
