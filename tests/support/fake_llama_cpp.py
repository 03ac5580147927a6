"""A checkout of llama.cpp for tests that have none: the converter's outside, and what its file must
say. `tests/engines` has the tests with the real one."""

import os
from pathlib import Path

import exporting
import gguf

CONVERTER = """
import argparse, json, sys
import conversion
from conversion.kimi_linear import KimiLinearModel
from conversion.fake import write

def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    for name in ("--outfile", "--outtype"):
        parser.add_argument(name)
    arguments = parser.parse_args()
    print("the converter's own words")
    fields = conversion.ModelBase.load_hparams(arguments.folder, False)
    write(KimiLinearModel(arguments.folder, fields), arguments, BREAKS)
"""
CONVERSION = """
class ModelBase:
    @staticmethod
    def load_hparams(folder, is_mistral_format):
        raise AssertionError("the plan's fields come instead")
"""
MODEL = """
class KimiLinearModel:
    def __init__(self, folder, fields):
        self.folder, self.hparams, self.groups = folder, fields, 0
        self.gguf_writer = self

    def add_expert_group_count(self, count):
        self.groups = count

    def set_gguf_parameters(self):
        pass

    def modify_tensors(self, data, name, layer):
        yield name, data
"""
WRITER = f"""
import json, sys
import numpy as np, torch
from pathlib import Path
import gguf
from safetensors.torch import load_file
sys.path.insert(0, {str(Path(exporting.__file__).parent.parent)!r})
from exporting.checks import expected_keys, expected_tensors
from kimi_linear import KimiLinearConfig

def write(model, arguments, breaks):
    folder, fields = Path(model.folder), dict(model.hparams)
    fields.pop("auto_map", None)
    config = KimiLinearConfig.from_dict(fields)
    model.model_tensors = {{}}
    for file in folder.glob("*.safetensors"):
        for name, data in load_file(file).items():
            model.model_tensors[name] = lambda data=data: data
    pairs = [*model.generate_extra_tensors(), *((n, t()) for n, t in model.model_tensors.items())]
    sizes = 0
    for name, data in pairs:
        sizes += sum(part.numel() for _, part in model.modify_tensors(data, name, None))
    shapes = expected_tensors(config)
    assert sizes == sum(int(np.prod(shape)) for shape in shapes.values()), "tensors of another size"
    model.set_gguf_parameters()
    writer = gguf.GGUFWriter(arguments.outfile, "kimi-linear")
    for key, value in expected_keys(config, model.groups).items():
        if key == "general.architecture" or value is None:
            continue
        kinds = {{int: writer.add_uint32, float: writer.add_float32, list: writer.add_array}}
        kinds[type(value)](key, value)
    content = json.loads((folder / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"] | {{t["content"]: t["id"] for t in content["added_tokens"]}}
    tokens = [f"[PAD{{i}}]" for i in range(config.vocab_size)]
    for token, index in vocab.items():
        tokens[index] = token
    if breaks == "tokens":
        tokens[300], tokens[301] = tokens[301], tokens[300]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(model.get_vocab_base_pre(None))
    writer.add_token_list(tokens)
    model.gguf_writer, model._set_vocab_gpt2 = writer, lambda: gguf.SpecialVocab(
        folder, load_merges=True
    ).add_to_gguf(writer)
    model.set_vocab()
    for name, shape in shapes.items():
        if breaks != "tensors" or "attn_v" not in name:
            writer.add_tensor(name, np.zeros(shape[::-1], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if breaks == "end":
        raise SystemExit(3)
"""
# Copies its input, as if that were fewer bits.
QUANTIZE = """\
#!/bin/sh
echo "[   1/   2] token_embd.weight"
echo "[   2/   2] output.weight"
if [ "$3" != Q4_K_M ]; then echo "no such type"; exit 1; fi
cp "$1" "$2"
"""


def make_checkout(folder: Path, breaks: str = "", *, programs: bool = False) -> Path:
    """Make one.

    Args:
        folder: To make.
        breaks: What its file is wrong in: "tokens", "tensors"; "end": it fails after writing it.
        programs: Whether `llama-quantize` is built.
    """
    files = {
        "convert_hf_to_gguf.py": CONVERTER.replace("BREAKS", repr(breaks)),
        "conversion/__init__.py": CONVERSION,
        "conversion/kimi_linear.py": MODEL,
        "conversion/fake.py": WRITER,
    }
    if programs:
        files["build/bin/llama-quantize"] = QUANTIZE
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    (folder / "gguf-py").mkdir()
    os.symlink(Path(gguf.__file__).parent, folder / "gguf-py" / "gguf")
    return folder
