"""Push over HTTP by each way there is, load in a fresh process with an empty cache: same logits.

The pushing process has the package, the loading one has not: there, all code comes from the Hub.
"""

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hub import Hub, environment, run
from safetensors import safe_open

from kimi_linear.checkpoints.flat_copy import package_code

pytestmark = pytest.mark.transformers

SCRIPT = Path(__file__).parents[2] / "scripts" / "push_to_hub.py"

PUSH = """
import runpy
import sys
from pathlib import Path

import torch
from builders import tiny_model
from kimi_linear.tokenizer.convert import convert_tiktoken
from kimi_linear.tokenizer.train import train_bpe
from transformers import Trainer, TrainingArguments

folder = Path(sys.argv[1])
torch.set_num_threads(1)
texts = ["def first(x):\\n    return x\\n", "def second(x):\\n    return first(x)\\n"]
tokenizer = convert_tiktoken(train_bpe(texts, 520, show_progress=False), folder / "tokenizer")
size = dict(vocab_size=520, bos_token_id=None, eos_token_id=None, pad_token_id=519)
inputs = tokenizer(texts[1], return_tensors="pt")
logits = {}

def keep(name, model):
    with torch.no_grad():
        logits[name] = model.eval()(**inputs).logits.float()

model = tiny_model(seed=1, **size)
keep("me/model@main", model)
model.push_to_hub("me/model", max_shard_size="100KB")
tokenizer.push_to_hub("me/model")

other = tiny_model("alternating", seed=2, tie_word_embeddings=True, **size)
other = other.to(torch.bfloat16)
keep("me/model@other", other)
other.push_to_hub("me/model", revision="other", commit_message="Another one")
tokenizer.push_to_hub("me/model", revision="other")

model = tiny_model(seed=3, **size)
model.save_pretrained(folder / "local", max_shard_size="100KB")
tokenizer.save_pretrained(folder / "local")
keep("me/scripted@main", model)

ids = inputs["input_ids"][0].tolist()
trainer = Trainer(
    model,
    TrainingArguments(
        folder / "run", max_steps=2, save_steps=1, learning_rate=0.01, use_cpu=True, report_to=[],
        push_to_hub=True, hub_model_id="me/trained", hub_private_repo=True,
        hub_strategy="every_save", disable_tqdm=True,
    ),
    train_dataset=[{"input_ids": ids, "labels": ids}] * 16,
    processing_class=tokenizer,
)
trainer.train()
trainer.push_to_hub()
keep("me/trained@main", model)
assert (logits["me/trained@main"] - logits["me/scripted@main"]).abs().max() > 1e-3
torch.save({"inputs": dict(inputs), "logits": logits}, folder / "expected.pt")

sys.argv = [sys.argv[2], str(folder / "local"), "--repo-id", "me/scripted", "--license", "mit"]
runpy.run_path(sys.argv[0], run_name="__main__")
"""

LOAD = """
import copy
import json
import sys
from importlib.abc import MetaPathFinder

class NotInstalled(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "kimi_linear":
            raise ImportError(f"{name} is not installed here")

sys.meta_path.insert(0, NotInstalled())
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

torch.set_num_threads(1)
folder, names = sys.argv[1], sys.argv[2:]
expected = torch.load(f"{folder}/expected.pt")
logits, report = {}, {}

def load(name):
    repo, revision = name.split("@")
    where = dict(revision=revision, code_revision=revision, trust_remote_code=True)
    config = AutoConfig.from_pretrained(repo, **where)
    model, info = AutoModelForCausalLM.from_pretrained(
        repo, dtype="auto", output_loading_info=True, **where
    )
    tokenizer = AutoTokenizer.from_pretrained(repo, revision=revision, trust_remote_code=True)
    inputs = tokenizer("def second(x):\\n    return first(x)\\n", return_tensors="pt")
    assert torch.equal(inputs["input_ids"], expected["inputs"]["input_ids"])
    with torch.no_grad():
        logits[name] = model(**inputs).logits.float()
        generated = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    check_training(copy.deepcopy(model), inputs["input_ids"], logits[name])
    report[name] = {
        "config_module": type(config).__module__,
        "model_module": type(model).__module__,
        "dtype": str(model.dtype),
        "A_log": str(model.model.layers[0].self_attn.A_log.dtype),
        "problems": {key: sorted(map(str, value)) for key, value in info.items() if value},
        "new_tokens": generated.shape[1] - inputs["input_ids"].shape[1],
    }
    return model

def check_training(model, ids, before):
    model.train()(ids, labels=ids).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    model.eval().save_pretrained(f"{folder}/trained")
    again = AutoModelForCausalLM.from_pretrained(
        f"{folder}/trained", dtype="auto", trust_remote_code=True)
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits)
        assert (again(ids).logits - before).abs().max() > 1e-3

for name in names:
    model = load(name)
model.push_to_hub("me/again")
tokenizer = AutoTokenizer.from_pretrained(names[-1].split("@")[0])
tokenizer.push_to_hub("me/again")
load("me/again@main")
exec(open(f"{folder}/usage.py").read(), {})
report["package"] = "kimi_linear" in sys.modules
torch.save(logits, f"{folder}/loaded.pt")
print(json.dumps(report))
"""
NAMES = ["me/model@main", "me/model@other", "me/scripted@main", "me/trained@main"]


@dataclass
class Published:
    """What the two processes left behind."""

    server: Hub
    folder: Path
    report: dict[str, Any]
    expected: dict[str, torch.Tensor]
    loaded: dict[str, torch.Tensor]

    def files(self, name: str) -> dict[str, bytes]:
        """A repository's files as the server stores them."""
        return self.server.files(*name.split("@"))


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Published]:
    folder = tmp_path_factory.mktemp("hub")
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    path = os.pathsep.join(filter(None, sys.path))
    with Hub(part_bytes=60_000) as server:
        pushing = environment(server, folder / "home", PYTHONPATH=path)
        run(["-c", PUSH, str(folder), str(SCRIPT)], pushing, elsewhere)
        card = (folder / "local" / "README.md").read_text()
        (folder / "usage.py").write_text(card.split("```python\n")[1].split("```")[0])
        loading = environment(server, folder / "empty")
        printed = run(["-I", "-c", LOAD, str(folder), *NAMES], loading, elsewhere)
        yield Published(
            server,
            folder,
            json.loads(printed.splitlines()[-1]),
            torch.load(folder / "expected.pt")["logits"],
            torch.load(folder / "loaded.pt"),
        )


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_the_pushing_process(published: Published, name: str) -> None:
    torch.testing.assert_close(published.loaded[name], published.expected[name], rtol=0, atol=1e-6)


def test_a_model_loaded_from_the_hub_can_be_pushed_again(published: Published) -> None:
    again, first = published.files("me/again@main"), published.files("me/trained@main")
    expected = published.expected["me/trained@main"]
    torch.testing.assert_close(published.loaded["me/again@main"], expected, rtol=0, atol=1e-6)
    assert (
        json.loads(again["config.json"])["auto_map"] == json.loads(first["config.json"])["auto_map"]
    )
    code = {name: content for name, content in first.items() if name.endswith(".py")}
    assert {name: content for name, content in again.items() if name.endswith(".py")} == code


@pytest.mark.parametrize("name", [*NAMES, "me/again@main"])
def test_all_code_came_from_the_hub(published: Published, name: str) -> None:
    report = published.report[name]
    assert report["model_module"].startswith("transformers_modules.")
    assert report["config_module"].startswith("transformers_modules.")
    assert not published.report["package"]
    assert report["problems"] == {}
    assert report["new_tokens"] == 3
    assert report["A_log"] == "torch.float32"
    assert report["dtype"] == ("torch.bfloat16" if name.endswith("@other") else "torch.float32")


@pytest.mark.parametrize("name", [*NAMES, "me/again@main"])
def test_repositories_hold_code_weights_and_tokenizer_and_nothing_else(
    published: Published, name: str
) -> None:
    files = published.files(name)
    code = {path: text.decode() for path, text in files.items() if path.endswith(".py")}
    assert code == package_code()
    assert {"config.json", "tokenizer.json", "tokenizer_config.json", "README.md"} <= set(files)
    allowed = (".py", ".json", ".jinja", ".md", ".safetensors", ".gitattributes", "tiktoken.model")
    others = {path for path in files if not path.endswith(allowed)}
    assert others == ({"training_args.bin"} if name.startswith("me/trained") else set())


def test_shards_are_stored_as_lfs_files_with_the_official_names(
    published: Published, tmp_path: Path
) -> None:
    files = published.files("me/model@main")
    index = json.loads(files["model.safetensors.index.json"])["weight_map"]
    assert len(set(index.values())) > 1
    entries = published.server.repos["me/model"].commit_at("main").files
    found = {}
    for shard in set(index.values()):
        assert entries[shard].is_lfs
        (tmp_path / shard).write_bytes(files[shard])
        with safe_open(tmp_path / shard, "pt") as opened:
            found |= dict.fromkeys(opened.keys(), shard)
    assert found == index
    assert "model.layers.0.self_attn.q_conv1d.weight" in found
    assert "model.layers.1.block_sparse_moe.experts.5.w3.weight" in found
    assert any("/lfs/part/" in path for _, path, _ in published.server.requests)


def test_the_trainer_pushed_at_every_save_and_privately(published: Published) -> None:
    repo = published.server.repos["me/trained"]
    assert repo.private
    assert not published.server.repos["me/model"].private
    titles = [commit.title for commit in repo.branches["main"]]
    assert any("step 1" in title for title in titles), titles


def test_the_script_wrote_the_card(published: Published) -> None:
    card = published.files("me/scripted@main")["README.md"].decode()
    assert "license: mit" in card and "trust_remote_code=True" in card
    assert (published.folder / "usage.py").read_text() in card  # the loading process ran it
    assert card == (published.folder / "local" / "README.md").read_text()


def test_the_server_knew_every_request(published: Published) -> None:
    """Optional files may be missing and repositories exist already; all else is served."""
    allowed = {404: ("/resolve/", "/tree/"), 409: ("/api/repos/create", "/branch/")}
    surprises = [
        entry
        for entry in published.server.requests
        if entry[2] >= 400 and not any(part in entry[1] for part in allowed.get(entry[2], ()))
    ]
    assert surprises == []
