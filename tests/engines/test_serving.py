"""docs/serving.md: engines take the commands there, and llama-server our chat template."""

import argparse
import importlib
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import export_gguf
import pytest
import torch
from engine_models import write_engine_model
from transformers import AutoTokenizer

from kimi_linear import KimiLinearForCausalLM

pytestmark = pytest.mark.engines

PAGE = Path(__file__).parents[2] / "docs" / "serving.md"
PATIENCE = 120  # seconds until a server answers
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a place.",
            "parameters": {
                "type": "object",
                "properties": {"place": {"type": "string"}, "Days": {"type": "integer"}},
                "required": ["place"],
            },
        },
    }
]
CALL = {"name": "weather", "arguments": '{"place": "Köln"}'}
CHATS: dict[str, dict[str, Any]] = {
    "a question": {"messages": [{"role": "user", "content": "What is 6 * 7?"}]},
    "three turns": {
        "messages": [
            {"role": "system", "content": "Be short."},
            {"role": "user", "content": "月 or moon?"},
            {"role": "assistant", "content": "Both."},
            {"role": "user", "content": "Why?\n"},
        ]
    },
    "tools": {
        "messages": [
            {"role": "user", "content": "The weather in Köln?"},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"id": "functions.weather:0", "type": "function", "function": CALL}],
            },
            {"role": "tool", "tool_call_id": "functions.weather:0", "content": "Rain."},
        ],
        "tools": TOOLS,
    },
}


def commands() -> dict[str, list[str]]:
    """The page's commands by their first words."""
    block = re.search(r"```\n(vllm serve.*?)```", PAGE.read_text(), re.DOTALL)
    assert block is not None
    lines = [shlex.split(line) for line in block[1].splitlines()]
    return {line[0] if line[0] != "python" else line[2]: line for line in lines}


class Parsed(Exception):
    """A parser has taken a whole command line."""


@pytest.fixture
def stops_when_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = argparse.ArgumentParser.parse_args

    def parse(self: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)


def test_the_page_has_all_of_them() -> None:
    names = {"vllm", "sglang.launch_server", "llama-server", "mlx_lm.server", "transformers"}
    assert commands().keys() == names


def test_mlx_lm(stops_when_parsed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    resource = importlib.import_module("resource")
    monkeypatch.setattr(resource, "setrlimit", lambda *_: None)
    server = pytest.importorskip("mlx_lm.server", exc_type=ImportError)
    monkeypatch.setattr(sys, "argv", commands()["mlx_lm.server"])
    with pytest.raises(Parsed):
        server.main()
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--no-such-flag"])
    with pytest.raises(SystemExit):
        server.main()


def test_transformers() -> None:
    typer = pytest.importorskip("typer")
    serve = importlib.import_module("transformers.cli.serve").Serve
    app = typer.Typer()
    app.command()(serve)
    command, words = typer.main.get_command(app), commands()["transformers"][2:]
    assert command.make_context("serve", [*words]).params["force_model"] == words[0]
    with pytest.raises(Exception, match="No such option"):
        command.make_context("serve", [*words, "--no-such-flag"])


def test_vllm() -> None:
    cli_args = pytest.importorskip("vllm.entrypoints.common.cli_args", exc_type=ImportError)
    utils = importlib.import_module("vllm.utils.argparse_utils")
    parser = cli_args.make_arg_parser(utils.FlexibleArgumentParser())
    found = parser.parse_args(commands()["vllm"][2:])
    assert found.tool_call_parser == "kimi_k2"


def test_sglang() -> None:
    server_args = pytest.importorskip("sglang.srt.server_args", exc_type=ImportError)
    parser = argparse.ArgumentParser()
    server_args.ServerArgs.add_cli_args(parser)
    found = parser.parse_args(commands()["sglang.launch_server"][3:])
    assert found.tool_call_parser == "kimi_k2"


def test_llama_server_takes_the_command(llama_cpp: Path) -> None:
    """`--version` ends it once what stands before is parsed."""
    program = _server(llama_cpp)
    words = commands()["llama-server"][1:]
    done = subprocess.run([program, *words, "--version"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    done = subprocess.run([program, *words, "--no-such-flag"], capture_output=True, text=True)
    assert done.returncode != 0 and "--no-such-flag" in done.stderr + done.stdout


def _server(llama_cpp: Path) -> Path:
    program = llama_cpp / "build" / "bin" / "llama-server"
    if not program.is_file():
        pytest.skip("llama-server is not built")
    return program


Ask = Callable[[str, dict[str, Any]], dict[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_engine_model(tmp_path_factory.mktemp("served") / "model")


@pytest.fixture(scope="module")
def ask(folder: Path, llama_cpp: Path) -> Iterator[Ask]:
    """Asks a llama-server."""
    program = _server(llama_cpp)
    file = export_gguf.main(folder=folder, llama_cpp=llama_cpp, type="f32", compare=0, threads=1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    command = [program, "-m", file, "-c", "1024", "-np", "1", "-t", "1", "--port", str(port)]
    command += ["-ngl", "0", "-ctk", "f32", "-ctv", "f32"]
    environment = {**os.environ, "GGML_NO_BACKTRACE": "1"}

    def post(path: str, content: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(f"{address}{path}", json.dumps(content).encode())
        request.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()) from error

    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([str(part) for part in command], env=environment, **quiet) as process:
        try:
            _wait(f"{address}/health", process)
            yield post
        finally:
            process.kill()


def _wait(address: str, process: subprocess.Popen[bytes]) -> None:
    for _ in range(PATIENCE * 5):
        assert process.poll() is None, "llama-server has ended"
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    raise AssertionError("llama-server does not answer")


@pytest.mark.parametrize("name", CHATS)
def test_llama_server_writes_our_prompts(name: str, folder: Path, ask: Ask) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    wanted = tokenizer.apply_chat_template(
        CHATS[name]["messages"],
        CHATS[name].get("tools"),
        tokenize=False,
        add_generation_prompt=True,
    )
    assert ask("/apply-template", CHATS[name])["prompt"] == wanted


def test_llama_server_writes_our_text(folder: Path, ask: Ask) -> None:
    """Greedy: the same 64 tokens, one by one behind a prompt."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = KimiLinearForCausalLM.from_pretrained(folder).eval()
    text = "the other thing in an inn: 中文, naïve"
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.inference_mode():
        out = model.generate(input_ids=ids, max_new_tokens=64, do_sample=False)
    wanted = out[0, ids.shape[1] :].tolist()
    question = {"prompt": text, "n_predict": 64, "temperature": 0, "return_tokens": True}
    found = ask("/completion", {**question, "ignore_eos": False})["tokens"]
    assert ask("/tokenize", {"content": text})["tokens"] == ids[0].tolist()
    assert found == [token for token in wanted if token != tokenizer.eos_token_id]
