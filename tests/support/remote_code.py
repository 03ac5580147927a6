"""What `trust_remote_code=True` does with a folder where the package is not installed."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from builders import token_ids
from safetensors.torch import load_file, save_file

# Even an installed copy cannot be imported.
HIDE = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "kimi_linear":
            raise ModuleNotFoundError("No module named 'kimi_linear'")

sys.meta_path.insert(0, Hidden())
"""

STRANGER = """
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
*folders, out = sys.argv[1:]
ids = load_file(f"{out}/ids.safetensors")["ids"]
torch.set_num_threads(1)
def load(auto, path, **kwargs):
    loaded, info = auto.from_pretrained(
        path, trust_remote_code=True, output_loading_info=True, **kwargs)
    assert type(loaded).__module__.startswith("transformers_modules."), type(loaded)
    assert not info["mismatched_keys"], info
    return loaded.eval(), info
"""

LOGITS = """
for number, folder in enumerate(folders):
    model, info = load(AutoModelForCausalLM, folder)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    with torch.no_grad():
        save_file({"logits": model(ids).logits}, f"{out}/results-{number}.safetensors")
"""


def run_stranger(
    script: str, folders: list[Path], out: Path, *, installed: bool = False
) -> list[dict[str, torch.Tensor]]:
    """Run `script` where the package cannot be imported, or can be; the tensors it saves by folder.

    `-I` leaves out the working directory and PYTHONPATH, `HIDE` an installed copy.
    """
    surroundings = f"import sys\nsys.path[:] = {sys.path}\n" if installed else HIDE
    out.mkdir(parents=True, exist_ok=True)
    save_file({"ids": token_ids(2, 13)}, out / "ids.safetensors")
    environment = {key: os.environ[key] for key in ("PATH", "TMPDIR", "HOME") if key in os.environ}
    environment |= {"HF_HOME": str(out / "hf"), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [
            sys.executable,
            "-I",
            "-c",
            surroundings + STRANGER + script,
            *map(str, folders),
            str(out),
        ],
        cwd=out,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return [load_file(out / f"results-{number}.safetensors") for number in range(len(folders))]


def code_in(folder: Path) -> dict[str, str]:
    """The text of all Python files by name."""
    return {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.py")}
