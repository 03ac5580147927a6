"""llama.cpp's own converter, told what `plan.py` found. A process of its own runs it.

    python -P converter.py < job.json

It imports the checkout's `convert_hf_to_gguf` and `gguf`, never this package. The converter knows
tokenizers by a hash of ids, which only the released vocabulary can meet; ours cut text as its
"kimi-k2" does, and are named so here.

Source: `convert_hf_to_gguf.py` and `conversion/kimi_linear.py` of llama.cpp.
"""

import contextlib
import json
import logging
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def main(job: dict[str, Any]) -> None:
    """Convert a folder.

    Args:
        job: "llama_cpp", a checkout; "folder"; "output"; "type", of `--outtype`; "template" of
            chats; and of the plan "fields", "zeros", "padded", "ties_head", "expert_groups".
    """
    sys.path.insert(0, job["llama_cpp"])
    # Before the first import of `gguf`: it puts the checkout's own before an installed one.
    import convert_hf_to_gguf
    from conversion import ModelBase
    from conversion.kimi_linear import KimiLinearModel

    logging.basicConfig(level=logging.WARNING)
    # The converter writes counts of heads a second time, by layer, and warns of it.
    logging.getLogger("gguf.gguf_writer").setLevel(logging.ERROR)
    ModelBase.load_hparams = staticmethod(lambda *_: dict(job["fields"]))
    _mend(KimiLinearModel, job)
    command = [job["folder"], "--outfile", job["output"], "--outtype", job["type"]]
    sys.argv = ["convert_hf_to_gguf.py", *command]
    with contextlib.redirect_stdout(sys.stderr):
        convert_hf_to_gguf.main()


def _mend(model: Any, job: dict[str, Any]) -> None:
    """Replace methods of the converter's class."""
    modify, write = model.modify_tensors, model.set_gguf_parameters

    def extra_tensors(self: Any) -> Iterator[tuple[str, Tensor]]:
        if job["ties_head"]:
            yield "lm_head.weight", self.model_tensors["model.embed_tokens.weight"]()
        for name, shape in job["zeros"].items():
            yield name, torch.zeros(shape)

    def modify_tensors(self: Any, data: Tensor, name: str, layer: int | None) -> Any:
        if name in job["padded"]:
            axis, size = job["padded"][name]
            after = data.dim() - 1 - axis
            data = F.pad(data, (0, 0) * after + (0, size - data.shape[axis]))
        yield from modify(self, data, name, layer)

    def set_gguf_parameters(self: Any) -> None:
        write(self)
        if job["expert_groups"]:
            self.gguf_writer.add_expert_group_count(job["expert_groups"])

    def set_vocab(self: Any) -> None:
        add = self.gguf_writer.add_chat_template
        self.gguf_writer.add_chat_template = lambda found: add(job["template"] or found)
        self._set_vocab_gpt2()

    model.get_vocab_base_pre = lambda self, tokenizer: "kimi-k2"
    model.set_vocab = set_vocab
    model.generate_extra_tensors = extra_tensors
    model.modify_tensors = modify_tensors
    model.set_gguf_parameters = set_gguf_parameters


if __name__ == "__main__":
    main(json.load(sys.stdin))
