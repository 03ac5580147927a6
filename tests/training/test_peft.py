"""LoRA on every part of the model: gradients, saving, reloading, merging into official names."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from builders import tiny_model, token_ids
from packaging.version import Version
from safetensors import safe_open
from tolerance import assert_close
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.integrations.peft import MIN_PEFT_VERSION

from kimi_linear import KimiLinearCache, KimiLinearForCausalLM
from kimi_linear.checkpoints.names import official_shapes
from kimi_linear.training.lora import EXPERT_PARAMETERS, LORA_GROUPS, lora_targets

pytestmark = [pytest.mark.finetune, pytest.mark.transformers]

peft = pytest.importorskip("peft", reason="adapters need PEFT: pip install '.[finetune]'")

EXPERTS = ("eager", "grouped_mm", "batched_mm")
IDS = token_ids(2, 21)
# Of what is adapted, by group, in the four layers of the "alternating" model: dense KDA, then MLA,
# KDA and MLA with experts.
SIZES = {
    "attention": 2 * 9 + 2 * 4,
    "kda": 2 * 9,
    "mla": 2 * 4,
    "dense": 3,
    "shared": 3 * 3,
    "experts": 3 * 2,
    "all": 2 * 9 + 2 * 4 + 3 + 3 * 3 + 3 * 2,
}


def adapted(*groups: str, seed: int = 0, **fields: Any) -> Any:
    """A model with adapters of rank 3 that change something."""
    model = tiny_model("alternating", **fields)
    model.set_experts_implementation("grouped_mm")
    config = peft.LoraConfig(
        r=3, lora_alpha=6, task_type="CAUSAL_LM", **lora_targets(model.config, *groups)
    )
    model = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05, generator=generator)
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits


def adapters(model: Any) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


# ---- targets ------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", LORA_GROUPS)
def test_a_group_is_what_its_name_says(group: str) -> None:
    """As many adapters as there are matrices in it, each of two factors."""
    names = adapters(adapted(group))
    assert len(names) == 2 * SIZES[group]
    for name in names:
        is_mla = ".layers.1." in name or ".layers.3." in name
        part = {
            "kda": "self_attn" in name and not is_mla,
            "mla": "self_attn" in name and is_mla,
            "attention": "self_attn" in name,
            "dense": ".mlp." in name,
            "shared": "shared_experts" in name,
            "experts": ".experts." in name,
            "all": True,
        }
        assert part[group], name


def test_all_is_every_linear_layer_but_the_head() -> None:
    for fields in ({}, {"q_lora_rank": 10}):
        model = tiny_model("alternating", **fields)
        targets = lora_targets(model.config, "all")
        linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        reached = {
            name
            for name in linear
            if any(name.endswith("." + t) for t in targets["target_modules"])
        }
        assert linear - reached == {"lm_head"}
        for target in targets["target_modules"]:
            assert any(name.endswith("." + target) for name in linear), target
        assert targets["target_parameters"] == list(EXPERT_PARAMETERS)


def test_wrong_groups_are_named() -> None:
    config = tiny_model("all_mla").config
    with pytest.raises(ValueError, match="group 'kda' is not allowed: this model has no such part"):
        lora_targets(config, "mla", "kda")
    with pytest.raises(ValueError, match="group 'mlp' is not allowed: it must be one of"):
        lora_targets(config, "mlp")
    with pytest.raises(ValueError, match="groups are missing"):
        lora_targets(config)


# ---- computation --------------------------------------------------------------------------------


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("packed", [False, True])
def test_every_adapter_gets_its_gradient(experts: str, packed: bool) -> None:
    """That of the same factors multiplied into plain weights, whatever computes the experts."""
    model = adapted("all")
    model.base_model.model.set_experts_implementation(experts)
    positions = torch.arange(21).expand(2, -1) % 8 if packed else None
    model.train()
    loss = model(input_ids=IDS, labels=IDS, position_ids=positions).loss
    loss.backward()
    found = {name: parameter.grad for name, parameter in adapters(model).items()}
    assert len(found) == 2 * SIZES["all"]
    expected_loss, expected = gradients_of_factors(model, positions)
    assert_close(loss, expected_loss, torch.float32)
    for name, gradient in found.items():
        assert gradient is not None and gradient.abs().max() > 0, name
        assert_close(gradient, expected[name], torch.float32, name)


def gradients_of_factors(
    model: Any, positions: torch.Tensor | None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients by the chain rule alone: from the gradients of a plain model's weights."""
    plain = tiny_model("alternating").train()
    plain.set_experts_implementation("eager")
    weights = dict(plain.named_parameters())
    factors: dict[str, tuple[str, str, Any]] = {}
    for name, module in model.named_modules():
        if not isinstance(module, peft.tuners.lora.LoraLayer):
            continue
        base = name.removeprefix("base_model.model.")
        is_wrapper = isinstance(module, peft.tuners.lora.ParamWrapper)
        own = base.replace(".base_layer", "")
        weight = f"{own}.{module.parameter_name}" if is_wrapper else f"{own}.weight"
        with torch.no_grad():
            weights[weight] += module.get_delta_weight("default")
        factors[weight] = (f"{name}.lora_A.default.weight", f"{name}.lora_B.default.weight", module)
    loss = plain(IDS, labels=IDS, position_ids=positions).loss
    loss.backward()
    gradients = {}
    for weight, (name_a, name_b, module) in factors.items():
        gradient = weights[weight].grad
        assert gradient is not None
        scaled = gradient * module.scaling["default"]
        a, b = (getattr(module, key)["default"].weight.detach() for key in ("lora_A", "lora_B"))
        if gradient.ndim == 2:
            gradients[name_a], gradients[name_b] = b.T @ scaled, scaled @ a.T
            continue
        E = gradient.shape[0]
        a_ErI, b_OrE = a.unflatten(0, (E, -1)), b.unflatten(1, (-1, E))
        gradients[name_a] = torch.einsum("eoi,ore->eri", scaled, b_OrE).flatten(0, 1)
        gradients[name_b] = torch.einsum("eoi,eri->ore", scaled, a_ErI).flatten(1)
    return loss.detach(), gradients


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(use_reentrant: bool) -> None:
    found = []
    for is_checkpointing in (False, True):
        model = adapted("all").train()
        if is_checkpointing:
            model.enable_input_require_grads()
            model.base_model.model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        found.append({name: parameter.grad for name, parameter in adapters(model).items()})
    for name, gradient in found[0].items():
        assert_close(found[1][name], gradient, torch.float32, name)


def test_generation_with_a_cache_reads_the_adapters() -> None:
    """Latent attention folds kv_b_proj into queries and outputs when it decodes."""
    model = adapted("all")
    ids = model.generate(input_ids=IDS, max_new_tokens=6, do_sample=False)
    for length in range(IDS.shape[1], ids.shape[1]):
        with torch.no_grad():
            choice = model(ids[:, :length]).logits[:, -1].argmax(-1)
        assert (choice == ids[:, length]).all()


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_biases_of_adapters_count_with_a_cache_too(backend: str) -> None:
    model = tiny_model("alternating", attn_implementation=backend)
    config = peft.LoraConfig(target_modules=["kv_b_proj"], lora_bias=True, task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.3)
    cache = KimiLinearCache(model.config)
    with torch.no_grad():
        expected = model(IDS).logits
        found = [model(ids, cache=cache).logits for ids in IDS.split([9, 11, 1], dim=1)]
    assert_close(torch.cat(found, dim=1), expected, torch.float32)


# ---- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", ["attention", "experts", "all"])
def test_saved_adapters_reload_to_the_same_bits(group: str, tmp_path: Path) -> None:
    model = adapted(group)
    model.save_pretrained(tmp_path)
    base = tiny_model("alternating")
    base.set_experts_implementation("grouped_mm")
    again = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    assert torch.equal(logits(again), logits(model))
    with again.disable_adapter():
        plain = tiny_model("alternating")
        plain.set_experts_implementation("grouped_mm")
        assert torch.equal(logits(again), logits(plain))


@pytest.mark.skipif(
    Version(peft.__version__) < Version(MIN_PEFT_VERSION),
    reason=f"model.load_adapter() of Transformers {transformers.__version__} asks for PEFT "
    f"{MIN_PEFT_VERSION}, PEFT {peft.__version__} is installed; 0.22 was not out when 5.24 was",
)
def test_transformers_loads_a_folder_of_adapters(tmp_path: Path) -> None:
    """Its own integration reads an adapter's file as it reads a model's, which was an error once:
    all the model's tensors are missing in it."""
    base = tiny_model("alternating")
    base.save_pretrained(tmp_path / "base")
    base = KimiLinearForCausalLM.from_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=3, task_type="CAUSAL_LM", **lora_targets(base.config, "all"))
    model = peft.get_peft_model(base, config).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(tmp_path / "adapter")
    expected = logits(model)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter", trust_remote_code=False)
    assert type(loaded) is KimiLinearForCausalLM and torch.equal(logits(loaded), expected)
    added = KimiLinearForCausalLM.from_pretrained(tmp_path / "base")
    added.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(logits(added), expected)
    added.save_pretrained(tmp_path / "again")  # of a model with adapters, these alone
    base = KimiLinearForCausalLM.from_pretrained(tmp_path / "base")
    again = peft.PeftModel.from_pretrained(base, tmp_path / "again").eval()
    assert torch.equal(logits(again), expected)


@pytest.mark.parametrize("training", [False, True])
def test_prefix_tuning_is_refused_by_its_name(training: bool) -> None:
    """It fills a cache with keys and values of its own."""
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(tiny_model(), config).train(training)
    ids = token_ids(2, 7)
    with pytest.raises(ValueError, match="prefix tuning"):
        model(input_ids=ids, labels=ids if training else None)


def test_prompt_tuning_generates_the_text_of_a_loop_without_a_cache() -> None:
    """PEFT puts its virtual tokens into the first step's inputs, where `generate()` sees none."""
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(tiny_model(), config).eval()
    ids = expected = IDS[:1, :7]
    with torch.no_grad():
        for _ in range(6):
            best = model(expected, use_cache=False).logits[:, -1:].argmax(-1)
            expected = torch.cat([expected, best], dim=1)
    for more in (1, 2, 6):
        text = model.generate(input_ids=ids, max_new_tokens=more, do_sample=False, eos_token_id=95)
        assert torch.equal(text, expected[:, : 7 + more])


@pytest.mark.parametrize("group", LORA_GROUPS)
def test_merged_weights_give_the_adapters_logits(group: str) -> None:
    model = adapted(group)
    expected, plain = logits(model), logits(tiny_model("alternating"))
    assert (expected - plain).abs().max() > 1e-2
    assert_close(logits(model.merge_and_unload()), expected, torch.float32)


@pytest.mark.parametrize("group", ["all", "experts"])
def test_a_merged_model_is_saved_under_the_official_names(group: str, tmp_path: Path) -> None:
    merged = adapted(group).merge_and_unload()
    assert type(merged) is KimiLinearForCausalLM
    merged.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        saved = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert saved == official_shapes(tiny_model("alternating"))
    assert any(".experts.5.w2.weight" in name for name in saved)
    again, info = KimiLinearForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    again.set_experts_implementation("grouped_mm")
    assert torch.equal(logits(again.eval()), logits(merged))


def test_adapters_of_a_16_bit_model_are_trained_in_float32() -> None:
    model = tiny_model("alternating").to(torch.bfloat16)
    config = peft.LoraConfig(r=3, task_type="CAUSAL_LM", **lora_targets(model.config, "all"))
    model = peft.get_peft_model(model, config).train()
    assert {parameter.dtype for parameter in adapters(model).values()} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=IDS, labels=IDS).loss.backward()
    for name, parameter in adapters(model).items():
        is_first = "lora_A" in name  # its gradient is 0, since the other factor is
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert is_first or parameter.grad.abs().max() > 0, name
