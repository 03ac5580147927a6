"""scripts/quantize.py: what it makes of small models, what it refuses, its memory."""

import json
import shutil
from pathlib import Path

import commands
import pytest
import quantize
import torch
from builders import token_ids
from one_thread import one_thread  # noqa: F401
from quantize_runs import (
    INDEX,
    PARTS,
    SCRIPTS,
    assert_same,
    calibration,
    contents,
    logits,
    make_snapshot,
    make_text,
    run,
    settings,
    shard_of_experts,
    tensors_of,
)
from safetensors.torch import load_file, save_file

from kimi_linear import KimiLinearForCausalLM
from kimi_linear.checkpoints.experts import ExpertMatrix
from kimi_linear.checkpoints.flat_copy import package_code
from kimi_linear.checkpoints.packed import packed_entries
from kimi_linear.configuration_quantization import KimiLinearQuantizationConfig
from kimi_linear.ops.packed.rounding import quantize as rounded
from kimi_linear.ops.packed.weights import PackedWeights

pytestmark = pytest.mark.transformers

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "tiktoken.model", "chat_template.jinja")
MEMORY = Path("/proc/self/clear_refs")
# Prints by how much the peak of memory in a run is above what was in use before.
MEASURED = f"""
import json, sys, torch
torch.set_num_threads(1)
sys.path.insert(0, {str(SCRIPTS)!r})
import quantize
def read(name):
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if name in line)
quantize.main(**json.loads(sys.argv[1]))  # whatever a first run loads
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
before = read("VmRSS")
quantize.main(**json.loads(sys.argv[2]))
print(read("VmHWM") - before)
"""


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_snapshot(tmp_path_factory.mktemp("original"))


@pytest.fixture
def snapshot(original: Path, tmp_path: Path) -> Path:
    """One that a test may break."""
    return Path(shutil.copytree(original, tmp_path / "snapshot"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def output(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run without data makes."""
    return run(original, tmp_path_factory.mktemp("data-free") / "out")


def as_it_is_held(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """What stands in the output for a tensor of the snapshot."""
    config = KimiLinearQuantizationConfig(
        experts={"bits": 3, "group": 32},
        shared_experts={"bits": 4, "group": 32, "is_symmetric": False},
        attention={"bits": 8, "group": None},
        embeddings={"bits": 8, "group": 64},
        head={"bits": 8, "group": 128},
    )
    matrix = ExpertMatrix.from_name(name)
    scheme = config.scheme_of(matrix.prefix[:-1] if matrix else name.removesuffix(".weight"))
    if scheme is None:
        return {name: tensor}
    return dict(packed_entries(name, rounded(tensor, scheme)))


# ---- what comes out ------------------------------------------------------------------------------


def test_each_tensor_is_held_as_asked(original: Path, output: Path) -> None:
    wanted: dict[str, torch.Tensor] = {}
    for name, tensor in tensors_of(original).items():
        wanted |= as_it_is_held(name, tensor)
    found = tensors_of(output)
    assert_same(found, wanted)
    index = json.loads((output / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in found.values())
    assert index["weight_map"].keys() == found.keys()
    for name, file in index["weight_map"].items():
        assert name in load_file(output / file)


def test_the_folder_is_whole_and_nothing_else_is_left(original: Path, output: Path) -> None:
    before = contents(original)
    assert [path.name for path in output.parent.iterdir()] == ["out"]
    names = {path.name for path in output.iterdir()}
    shards = {f"model-{i:05d}-of-00006.safetensors" for i in range(1, 7)}
    others = {INDEX, "config.json", "generation_config.json", *TOKENIZER}
    assert names == shards | others | set(package_code()) | names & {"special_tokens_map.json"}
    assert all((output / name).read_bytes() == before[name] for name in TOKENIZER)
    fields = json.loads((output / "config.json").read_text())
    assert fields.pop("quantization_config")["quant_method"] == "compressed-tensors"
    assert fields == json.loads(before["config.json"])


def test_the_model_loads_packed_and_answers_as_its_weights_say(
    original: Path, output: Path, tmp_path: Path
) -> None:
    packed = KimiLinearForCausalLM.from_pretrained(output, dtype="auto").eval()
    held = {name: x for name, x in packed.named_parameters() if isinstance(x, PackedWeights)}
    assert "lm_head.weight" in held and "model.layers.1.block_sparse_moe.experts.down_proj" in held
    ids = token_ids(2, 24)
    wide, found = logits(original, ids), logits(output, ids)
    assert (found - wide).norm() < 0.25 * wide.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes_and_fused_experts(dtype: torch.dtype, tmp_path: Path) -> None:
    source = make_snapshot(tmp_path / "source", dtype)
    plain = tensors_of(run(source, tmp_path / "plain"))
    assert plain["lm_head.weight_scale"].dtype == dtype
    joined, alone = {}, tensors_of(source)
    model = KimiLinearForCausalLM.from_pretrained(source, dtype="auto")
    for name, tensor in model.state_dict().items():
        joined[name] = alone.get(name, tensor).contiguous()
    for path in (*source.glob("*.safetensors"), source / INDEX):
        path.unlink()
    save_file(joined, source / "model.safetensors", {"format": "pt"})
    assert_same(tensors_of(run(source, tmp_path / "fused")), plain)


def test_tied_embeddings(tmp_path: Path) -> None:
    source = make_snapshot(tmp_path / "source", tie_word_embeddings=True)
    with pytest.raises(ValueError, match="head=.*is not allowed: with tie_word_embeddings"):
        run(source, tmp_path / "out")
    out = run(source, tmp_path / "out", head=PARTS["embeddings"])
    assert not any(name.startswith("lm_head") for name in tensors_of(out))
    assert logits(out, token_ids(1, 8)).isfinite().all()


def test_presets_and_parts(original: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"mlp.down_proj.weight: group=128 is not allowed: .* 192"):
        quantize.main(snapshot=original, output=tmp_path / "out", preset="24gb")
    some = {"shared_experts": "none", "attention": "none"}
    out = quantize.main(snapshot=original, output=tmp_path / "out", preset="24gb", **some)
    held = {name.rpartition("weight")[0] for name in tensors_of(out) if name.endswith("_packed")}
    parts = {name.split(".experts.")[0] for name in held}
    moe = {f"model.layers.{i}.block_sparse_moe" for i in (1, 2, 3)}
    assert parts == {"lm_head.", "model.embed_tokens.", *moe}


def test_blocks_of_float8(original: Path, tmp_path: Path) -> None:
    blocks = "bits=8,group=32,float=true,rows=32,activations=dynamic"
    parts = dict.fromkeys(("experts", "shared_experts", "attention"), blocks)
    out = run(original, tmp_path / "out", **parts, embeddings="none", head="none")
    fields = json.loads((out / "config.json").read_text())["quantization_config"]
    assert fields["quant_method"] == "fp8"
    found = tensors_of(out)["model.layers.1.block_sparse_moe.experts.3.w1.weight_scale_inv"]
    assert found.shape == (2, 4)
    assert logits(out, token_ids(1, 8)).isfinite().all()


# ---- refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "16gb"}, "--preset '16gb' is not allowed: it must be one of 24gb"),
        ({"experts": "bits=5"}, r"experts\.bits=5 is not allowed"),
        ({"experts": "bits=4,group=48"}, "experts.group=48 is not allowed"),
        ({"experts": "bits=4;group=64"}, "--experts 'bits=4;group=64' is not allowed"),
        (
            {"experts": "size=4"},
            "--experts 'size=4' is not allowed: it must be none, fp8, fp8w, or fields",
        ),
        ({"experts": "bits=4,bits=3"}, "--experts 'bits=4,bits=3' is not allowed"),
        ({"experts": "4"}, "--experts '4' is not allowed"),
        ({"experts": "group=64"}, r"experts\.bits"),
        ({"attention": "bits=8,group=128"}, r"self_attn.o_proj.weight: group=128 is not allowed"),
        (dict.fromkeys(PARTS, "none"), "no part is to be quantised: give --preset"),
        (dict.fromkeys(PARTS), "no part is to be quantised: give --preset"),
        ({"experts": "bits=8,float=true,rows=48"}, "w1.weight: rows=48 is not allowed: .* 64 rows"),
        ({"device": "gpu"}, "--device 'gpu' is not allowed"),
        ({"read_ahead": 0}, "--read-ahead 0 is not allowed"),
        ({"calibrate": "missing.txt"}, "--calibrate .*missing.txt is not there"),
    ],
    ids=str,
)
def test_wrong_flags(options: dict, message: str, original: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        run(original, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_a_snapshot_that_is_quantised(snapshot: Path, output: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"quantization_config is there \(quant_method='compress"):
        run(output, tmp_path / "twice")
    path, tensors, name = shard_of_experts(snapshot)
    save_file({**tensors, name: tensors[name].to(torch.float8_e4m3fn)}, path)
    with pytest.raises(ValueError, match=f"tensor {name} is in F8_E4M3, as of .* BF16"):
        run(snapshot, tmp_path / "out")


def test_an_incomplete_snapshot(snapshot: Path, tmp_path: Path) -> None:
    path = sorted(snapshot.glob("*.safetensors"))[2]
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(
        ValueError, match=rf"{path.name}: truncated at .* bytes, tensor model\..* end"
    ):
        run(snapshot, tmp_path / "out")
    path.unlink()
    with pytest.raises(ValueError, match=f"{path.name}: the shard is missing"):
        run(snapshot, tmp_path / "out")
    path.write_bytes(whole)
    tensors = load_file(path)
    name = next(iter(tensors))
    save_file({key: x for key, x in tensors.items() if key != name}, path)
    with pytest.raises(ValueError, match=f"tensor {name} is listed in {path.name} and found in no"):
        run(snapshot, tmp_path / "out")
    index = json.loads((snapshot / INDEX).read_text())
    del index["weight_map"][name]
    (snapshot / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"1 tensors of the model are missing: {name}"):
        run(snapshot, tmp_path / "out")
    assert not (tmp_path / "_unfinished-out-to-resume").exists()


@pytest.mark.parametrize("is_calibrated", [False, True])
def test_a_tensor_that_is_not_finite(
    is_calibrated: bool, snapshot: Path, text: Path, tmp_path: Path
) -> None:
    path, tensors, name = shard_of_experts(snapshot)
    tensors[name][3, 5] = float("nan")
    save_file(tensors, path)
    with pytest.raises(ValueError, match=f"{path.name}: {name} has numbers that are not finite"):
        run(snapshot, tmp_path / "out", **(calibration(text) if is_calibrated else {}))
    assert not (tmp_path / "out").exists()


def test_outputs_that_are_in_use(snapshot: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is in the snapshot, which must not change"):
        run(snapshot, snapshot / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes").write_text("mine")
    with pytest.raises(ValueError, match="output=.* is not empty; allowed: a new or an empty fold"):
        run(snapshot, tmp_path / "out")
    with pytest.raises(ValueError, match="output=.* is a file; allowed"):
        run(snapshot, tmp_path / "out" / "notes")
    (tmp_path / "out" / "notes").unlink()
    run(snapshot, tmp_path / "out")


def test_the_command(original: Path, output: Path, tmp_path: Path) -> None:
    flags = [f"--{part.replace('_', '-')}={value}" for part, value in PARTS.items()]
    command = [SCRIPTS / "quantize.py", original, "--output", tmp_path / "out", "--device", "cpu"]
    done = commands.run([*command, *flags])
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == contents(output)
    assert "00006-of-00006" in done.stderr and "GB of" in done.stdout
    done = commands.run([*command, *flags])
    assert done.returncode == 1 and done.stderr.startswith("error: output="), done.stderr


# ---- memory --------------------------------------------------------------------------------------


@pytest.mark.skipif(not MEMORY.exists(), reason="Linux alone tells")
def test_memory_does_not_grow_with_the_snapshot(tmp_path: Path) -> None:
    layers = {"linear_attn_config": {"head_dim": 32, "num_heads": 4, "short_conv_kernel_size": 4}}
    fields = {"moe_intermediate_size": 512, "num_experts": 24, "hidden_size": 256, **layers}
    small = make_snapshot(tmp_path / "small")
    large = make_snapshot(tmp_path / "large", num_hidden_layers=4, **fields)
    size = sum(path.stat().st_size for path in large.glob("*.safetensors"))
    assert size > 60_000_000
    options = {"read_ahead": 4 << 20}
    first = settings(small, tmp_path / "first", **options)
    second = settings(large, tmp_path / "second", **options)
    done = commands.run(["-c", MEASURED, json.dumps(first), json.dumps(second)])
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 24_000_000
