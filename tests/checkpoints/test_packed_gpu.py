"""Packed checkpoints on a GPU: packed there, from there written."""

import pytest
import torch
from few_bits_models import MIXED, SCHEMES, packed_of, small_model

from kimi_linear import KimiLinearForCausalLM, KimiLinearQuantizationConfig, quantize_model
from kimi_linear.configuration_quantization import PARTS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

WAYS = {
    "3 bits and 8": MIXED,
    "4 bits, zeros": dict.fromkeys(PARTS, SCHEMES["4 bits, zeros"]),
    "float8": dict.fromkeys(PARTS, SCHEMES["float8"]),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_gpu_reads_and_writes_what_a_cpu_does(tmp_path, way):
    model = small_model().to(torch.bfloat16)
    model = quantize_model(model, KimiLinearQuantizationConfig(**WAYS[way]))
    model.save_pretrained(tmp_path / "one")
    before = torch.cuda.memory_allocated()
    loaded = KimiLinearForCausalLM.from_pretrained(tmp_path / "one", device_map={"": "cuda"})
    for name, weights in packed_of(model).items():
        for part, held in weights.parts().items():
            found = packed_of(loaded)[name].parts()[part]
            assert found.is_cuda and torch.equal(found.cpu(), held), f"{name} {part}"
    held = torch.cuda.memory_allocated() - before
    assert held < 1.5 * loaded.get_memory_footprint() + (1 << 20)  # rounded up by the allocator
    loaded.save_pretrained(tmp_path / "two")
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
