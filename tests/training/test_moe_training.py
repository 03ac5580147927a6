"""Training of the router: its losses, what is counted of its choice, the correction bias."""

import copy

import moe_worker
import processes
import pytest
import torch
import torch.nn.functional as F
from builders import tiny_config, tiny_model, token_ids
from tolerance import assert_close
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from kimi_linear import KimiLinearConfig
from kimi_linear.layers.moe import KimiLinearRouter
from kimi_linear.modeling_kimi_linear import (
    KimiLinearForCausalLM,
    KimiLinearForSequenceClassification,
    KimiLinearForTokenClassification,
)
from kimi_linear.training.bias_callback import ExpertBalanceCallback, balance_experts
from kimi_linear.training.expert_loads import ExpertLoads, load_statistics

pytestmark = [pytest.mark.core, pytest.mark.kernels]

BALANCE = {"router_aux_loss_coef": 0.3}
BOTH = {"router_aux_loss_coef": 0.3, "router_z_loss_coef": 0.2}
CHECKPOINTING = [None, {"use_reentrant": False}, {"use_reentrant": True}]


def routers(model):
    return [each for each in model.modules() if isinstance(each, KimiLinearRouter)]


def biases(model):
    return torch.stack([router.e_score_correction_bias.clone() for router in routers(model)])


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def padded():
    """Ids [3, 20] and a mask with padding left, right and inside."""
    ids, mask = token_ids(3, 20), torch.ones(3, 20, dtype=torch.int64)
    mask[0, :4] = mask[1, 13:] = mask[2, 5:8] = 0
    return ids, mask


# ---- routing and experts -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "fields", [{}, {"num_expert_group": 3, "topk_group": 1}], ids=["plain", "groups"]
)
def test_routing_is_the_same_in_training_and_inference(fields, dtype):
    model, ids = tiny_model(**fields, **BOTH).to(dtype), token_ids(2, 30)
    seen = {True: [], False: []}
    for router in routers(model):
        router.register_forward_hook(
            lambda module, inputs, output: seen[module.training].append((module, inputs[0], output))
        )
    ExpertLoads(model)
    model.train()(ids, labels=ids)
    with torch.no_grad():
        model.eval()(ids)
    assert len(seen[True]) == len(seen[False]) == 3
    for (router, x, trained), (_, _, used) in list(zip(seen[True], seen[False], strict=True)):
        with torch.no_grad():  # the same numbers in, the same bits out
            torch.testing.assert_close(router.eval()(x), trained, rtol=0, atol=0)
        if dtype == torch.float32:  # hidden states differ by rounding, which the choice survives
            assert torch.equal(trained[2], used[2])
            assert_close(trained[1], used[1], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_experts_get_the_same_gradients_by_every_implementation(dtype):
    model, ids = tiny_model().to(dtype).train(), token_ids(2, 30)
    found = {}
    for name in ("eager", "grouped_mm", "batched_mm"):
        model.set_experts_implementation(name)
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        found[name] = gradients(model)
    expert_names = [name for name in found["eager"] if ".experts." in name or ".gate." in name]
    assert len(expert_names) == 3 * 3
    assert all(found["eager"][name].abs().max() > 0 for name in expert_names)
    for implementation in ("grouped_mm", "batched_mm"):
        for name, grad in found["eager"].items():
            assert_close(found[implementation][name], grad, dtype, f"{implementation} {name}")


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("function", ["sigmoid", "softmax"])
def test_gradients_through_the_scores(function, renormalize):
    fields = {"moe_router_activation_func": function, "moe_renormalize": renormalize}
    torch.manual_seed(0)
    router = KimiLinearRouter(tiny_config(**fields)).double()
    nn.init.normal_(router.weight, std=0.3)
    router.e_score_correction_bias.normal_(0, 0.1)
    x = torch.randn(11, 40, dtype=torch.float64, requires_grad=True)
    logits, weights, experts = router(x)
    seed, logits_seed = torch.randn_like(weights), torch.randn_like(logits)
    actual = torch.autograd.grad(
        (weights * seed).sum() + (logits * logits_seed).sum(), (x, router.weight)
    )
    plain = x @ router.weight.T
    scores = plain.sigmoid() if function == "sigmoid" else plain.exp() / plain.exp().sum(1, True)
    rows = torch.arange(11)[:, None]
    chosen = scores[rows, experts]
    if renormalize:
        chosen = chosen / chosen.sum(1, True)
    expected = torch.autograd.grad(
        (chosen * 2.446 * seed).sum() + (plain * logits_seed).sum(), (x, router.weight)
    )
    for name, each, wanted in zip(("x", "weight"), actual, expected, strict=True):
        assert_close(each, wanted, torch.float64, name)


# ---- losses --------------------------------------------------------------------------------------


def plain_losses(logits_of_layers, sequences, config):
    """Equations 17 to 20 for each list of places, and the mean of its tokens' z-losses, written
    out: [S] each."""
    E, k = config.num_experts, config.num_experts_per_token
    balance = z = torch.zeros(len(sequences), dtype=torch.float64)
    for logits in logits_of_layers:
        is_sigmoid = config.moe_router_activation_func == "sigmoid"
        s = logits.sigmoid() if is_sigmoid else logits.softmax(-1)
        found = []
        for places in sequences:
            T = len(places)
            chosen = torch.zeros(T, E).to(s.dtype)
            chosen[torch.arange(T)[:, None], s[places].topk(k).indices] = 1
            f = E / (k * T) * chosen.sum(0)
            P = (s[places] / s[places].sum(1, True)).mean(0)
            found.append((f * P).sum())
        balance = balance + torch.stack(found)
        z_of_places = logits.exp().sum(1).log().square()
        z = z + torch.stack([z_of_places[places].mean() for places in sequences])
    return balance, z


def cases():
    ids, mask = padded()
    flat = torch.arange(60).view(3, 20)
    positions = torch.cat([torch.arange(7), torch.arange(13), torch.arange(20), torch.arange(20)])
    rows = [flat[i][mask[i] > 0].tolist() for i in range(3)]
    yield "plain", ids, {}, flat.tolist()
    yield "padded", ids, {"attention_mask": mask}, rows
    empty = mask.clone()
    empty[1] = 0
    yield "empty row", ids, {"attention_mask": empty}, [rows[0], rows[2]]
    parts = [flat[0, :7].tolist(), flat[0, 7:].tolist(), flat[1].tolist(), flat[2].tolist()]
    yield "packed", ids, {"position_ids": positions.view(3, 20)}, parts
    cut = [[p for p in part if mask.flatten()[p]] for part in parts]
    both = {"attention_mask": mask, "position_ids": positions.view(3, 20)}
    yield "packed and padded", ids, both, cut


CASES = {name: rest for name, *rest in cases()}


@pytest.mark.parametrize("function", ["sigmoid", "softmax"])
@pytest.mark.parametrize("case", CASES)
def test_losses_and_their_gradients(case, function):
    ids, inputs, sequences = CASES[case]
    model = tiny_model(moe_router_activation_func=function, **BOTH).double().train()
    out = model(ids, labels=ids, output_router_logits=True, **inputs)
    balance, z = plain_losses(out.router_logits, sequences, model.config)
    assert_close(out.aux_loss, balance.mean(), torch.float64)
    out.loss.backward()
    actual = gradients(model)

    model.zero_grad()
    model.config.router_aux_loss_coef = model.config.router_z_loss_coef = 0.0
    plain = model(ids, labels=ids, output_router_logits=True, **inputs)
    balance, z = plain_losses(plain.router_logits, sequences, model.config)
    labels = torch.tensor([len(places) - 1 for places in sequences]).double()  # all but the first
    weights = labels / labels.sum()
    expected = plain.loss + (weights * (0.3 * balance + 0.2 * z)).sum()
    assert_close(out.loss, expected, torch.float64)
    expected.backward()
    for name, grad in gradients(model).items():
        assert_close(actual[name], grad, torch.float64, name)


def test_a_sequence_loses_the_same_alone_padded_and_packed():
    model, ids = tiny_model(**BALANCE).double().train(), token_ids(2, 20)
    alone = [model(row[None], output_router_logits=True) for row in (ids[0], ids[1, :9])]
    expected = sum(model.model(row[None]).router_losses for row in (ids[0], ids[1, :9])) / 2
    assert all(out.loss is None for out in alone)
    mask = torch.ones(2, 20, dtype=torch.int64)
    mask[1, 9:] = 0
    together = model.model(ids, attention_mask=mask).router_losses
    assert_close(together[0], expected[0], torch.float64)
    packed = torch.cat([ids[0], ids[1, :9]])[None]
    positions = torch.cat([torch.arange(20), torch.arange(9)])[None]
    assert_close(
        model.model(packed, position_ids=positions).router_losses[0], expected[0], torch.float64
    )


def test_losses_are_off_by_default_in_eval_and_without_gradients():
    ids = token_ids(2, 20)
    default, model = tiny_model().train(), tiny_model(**BOTH).train()
    plain = default(ids, labels=ids)
    assert plain.aux_loss is None and default.config.router_aux_loss_coef == 0
    out = model(ids, labels=ids)
    assert out.loss > plain.loss + 0.3 and out.aux_loss > 0.5 and out.router_logits is None
    with torch.no_grad():
        assert model(ids, labels=ids).aux_loss is None
    evaluated = model.eval()(ids, labels=ids, output_router_logits=True)
    assert_close(evaluated.loss, plain.loss, torch.float32)
    assert evaluated.aux_loss > 0.5  # TRL reads it in evaluation too


@pytest.mark.parametrize("checkpointing", CHECKPOINTING[1:], ids=["new", "reentrant"])
def test_losses_under_gradient_checkpointing(checkpointing):
    model, ids = tiny_model(**BOTH).double().train(), token_ids(2, 20)
    model.set_experts_implementation("eager")  # without gradients, no other is of float64
    expected_loss = model(ids, labels=ids).loss
    expected_loss.backward()
    expected = gradients(model)
    model.zero_grad()
    model.gradient_checkpointing_enable(checkpointing)
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert_close(loss, expected_loss, torch.float64)
    for name, grad in gradients(model).items():
        assert_close(grad, expected[name], torch.float64, name)


def test_calls_of_one_step_add_up_to_a_mean():
    model, ids = tiny_model(**BOTH).double().train(), token_ids(4, 20)
    whole = model(ids, labels=ids).loss
    items = torch.tensor(4 * 19)
    parts = [model(rows, labels=rows, num_items_in_batch=items).loss for rows in ids.split(1)]
    assert_close(sum(parts), whole, torch.float64)


@pytest.mark.parametrize(
    "kind", [KimiLinearForSequenceClassification, KimiLinearForTokenClassification]
)
def test_classifiers_add_them_too(kind):
    ids, mask = padded()
    labels = torch.tensor([0, 1, 1]) if "Sequence" in kind.__name__ else ids % 2
    torch.manual_seed(0)
    model = kind(tiny_config(classifier_dropout=0.0, num_labels=2)).train()
    plain = model(ids, attention_mask=mask, labels=labels).loss
    model.config.router_aux_loss_coef = 0.3
    parts, sequence, _ = model.model(ids, attention_mask=mask).router_losses_by_place
    balance = torch.stack([parts[sequence == i, 0].sum() for i in range(3)])
    weights = torch.full((3,), 1 / 3) if "Sequence" in kind.__name__ else mask.sum(1) / mask.sum()
    if "Token" in kind.__name__:
        labels = labels.masked_fill(mask == 0, -100)
        plain = kind.forward(model.eval(), ids, attention_mask=mask, labels=labels).loss
        model.train()
    added = 0.3 * (weights * balance).sum()
    assert_close(model(ids, attention_mask=mask, labels=labels).loss, plain + added, torch.float32)


class UnequalRows(torch.utils.data.Dataset):
    """Rows of 3 to 24 tokens; some begin with tokens without a label, two have no label at all."""

    def __init__(self, kind):
        self.rows = []
        for i, length in enumerate((24, 3, 17, 9, 20, 5, 12, 7)):
            ids = token_ids(1, length, seed=i)[0]
            labels = ids.clone() if kind is KimiLinearForCausalLM else ids % 2
            labels[: (0, 1, 11, 9)[i % 4]] = -100
            label = torch.tensor(i % 2) if kind is KimiLinearForSequenceClassification else labels
            self.rows.append({"input_ids": ids, "labels": label})

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]

    @staticmethod
    def collate(rows):
        def padded_to_longest(name, value):
            return nn.utils.rnn.pad_sequence([row[name] for row in rows], True, value)

        ids = [row["input_ids"] for row in rows]
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(each) for each in ids], True)
        is_scalar = rows[0]["labels"].ndim == 0
        return {
            "input_ids": padded_to_longest("input_ids", 0),
            "attention_mask": mask,
            "labels": torch.stack([row["labels"] for row in rows])
            if is_scalar
            else padded_to_longest("labels", -100),
        }


@pytest.mark.parametrize(
    "kind",
    [
        KimiLinearForCausalLM,
        KimiLinearForSequenceClassification,
        KimiLinearForTokenClassification,
    ],
)
def test_accumulated_rows_of_unequal_length_train_as_one_large_batch(kind, tmp_path):
    def train(batch, accumulated):
        torch.manual_seed(0)
        model = kind(tiny_config(classifier_dropout=0.0, num_labels=2, **BOTH)).double()
        model.requires_grad_(False)
        for router in routers(model):  # of these, the losses' gradients are no small part
            router.requires_grad_(True)
        before = torch.cat([each.weight.detach().flatten() for each in routers(model)])
        run = trainer(
            tmp_path,
            model,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulated,
            max_steps=1,
            optim="sgd",
            learning_rate=1.0,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            logging_steps=1,
        )
        run.train_dataset, run.data_collator = UnequalRows(kind), UnequalRows.collate
        run.train()
        after = torch.cat([each.weight.detach().flatten() for each in routers(model)])
        return after - before, run.state.log_history[0]["loss"]

    whole, loss = train(8, 1)
    for batch, accumulated in ((2, 4), (1, 8)):
        parts, sum_of_losses = train(batch, accumulated)
        assert whole.abs().max() > 1e-3
        torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-9)
        assert sum_of_losses == pytest.approx(loss, rel=1e-3)


def test_configuration_of_router_training(tmp_path):
    fields = {**BOTH, "router_bias_update_rate": 0.01}
    tiny_config(**fields).save_pretrained(tmp_path)
    loaded = KimiLinearConfig.from_pretrained(tmp_path)
    assert {name: getattr(loaded, name) for name in fields} == fields
    assert KimiLinearConfig(aux_loss_alpha=0.01, seq_aux=True).router_aux_loss_coef == 0.01
    for name in fields:
        for value in (-1.0, float("inf"), float("nan"), True, "0.1", None):
            with pytest.raises(ValueError, match=f"{name}=.* is not allowed: .*at least 0"):
                tiny_config(**{name: value})
    with pytest.raises(ValueError, match="seq_aux=False is not allowed: it must be True"):
        tiny_config(seq_aux=False)


# ---- loads ---------------------------------------------------------------------------------------


def plain_counts(model, ids, mask=None, **inputs):
    """[L, E]: choices of the real tokens."""
    chosen = []
    hooks = [
        r.register_forward_hook(lambda m, i, o: chosen.append(o[2].clone())) for r in routers(model)
    ]
    with torch.no_grad():
        model(ids, attention_mask=mask, **inputs)
    for hook in hooks:
        hook.remove()
    real = torch.ones(ids.numel(), dtype=torch.bool) if mask is None else mask.flatten() > 0
    size = model.config.num_experts
    return torch.stack([torch.bincount(each[real].flatten(), minlength=size) for each in chosen])


@pytest.mark.parametrize("checkpointing", CHECKPOINTING, ids=["off", "new", "reentrant"])
def test_tokens_are_counted_once_and_padding_never(checkpointing):
    model, (ids, mask) = tiny_model().train(), padded()
    expected = plain_counts(model, ids, mask)
    if checkpointing is not None:
        model.gradient_checkpointing_enable(checkpointing)
    loads = ExpertLoads(model)
    for _ in range(2):  # two calls of one step
        model(ids, attention_mask=mask, labels=ids).loss.backward()
    counts = loads.take()
    assert loads.layers == [1, 2, 3] and counts.sum() == 2 * 3 * 2 * mask.sum()
    assert torch.equal(counts, 2 * expected)
    assert not loads.take().any()


def test_nothing_is_counted_in_eval_mode_without_gradients_or_after_stop():
    model, ids = tiny_model(), token_ids(2, 20)
    loads = ExpertLoads(model)
    model(ids)
    with torch.no_grad():
        model.train()(ids)
    model.eval().generate(ids, max_new_tokens=2, do_sample=False)
    assert not loads.take().any()
    model.train()(ids)
    assert loads.take().any()
    other = ExpertLoads(model)
    loads.stop()
    assert model.model.expert_loads is other
    other.stop()
    model(ids)
    assert not other.take().any()


def test_loads_need_experts():
    with pytest.raises(ValueError, match="model=Linear is not allowed: it must be a Kimi Linear"):
        ExpertLoads(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="with experts"):
        ExpertLoads(tiny_model(first_k_dense_replace=4))


def test_statistics():
    counts = torch.tensor([[4, 0, 2, 2], [1, 7, 0, 0]])
    assert load_statistics(counts, [1, 5]) == {
        "experts/max_load": 3.5,
        "experts/dead": 3,
        "experts/layer_1/max_load": 2.0,
        "experts/layer_1/dead": 1,
        "experts/layer_5/max_load": 3.5,
        "experts/layer_5/dead": 2,
    }
    assert load_statistics(torch.zeros(2, 4, dtype=torch.int64), [1, 5]) == {}


# ---- correction bias -----------------------------------------------------------------------------


def test_sign_rule():
    model = tiny_model()
    loads, before = ExpertLoads(model), biases(model)
    counts = torch.tensor([[9, 1, 5, 5, 6, 4], [5, 5, 5, 5, 5, 5], [30, 0, 0, 0, 0, 0]])
    loads.update_biases(counts, 0.01)
    signs = torch.tensor([[-1, 1, 0, 0, -1, 1], [0] * 6, [-1, 1, 1, 1, 1, 1]])
    assert_close(biases(model), before + 0.01 * signs, torch.float32)
    after = biases(model)
    loads.update_biases(counts, 0.0)
    assert torch.equal(biases(model), after)
    with pytest.raises(ValueError, match="rate=-0.1 is not allowed"):
        loads.update_biases(counts, -0.1)


def test_small_steps_of_16_bit_biases_are_not_lost():
    model = tiny_model().to(torch.bfloat16)
    for router in routers(model):
        router.e_score_correction_bias.fill_(1.0)
    loads = ExpertLoads(model)
    counts = torch.tensor([[2, 0, 0, 0, 0, 0]]).expand(3, -1)
    for _ in range(20):
        loads.update_biases(counts, 0.001)
    expected = torch.tensor([0.98, *[1.02] * 5]).to(torch.bfloat16)
    assert torch.equal(biases(model), expected.expand(3, -1))
    routers(model)[0].e_score_correction_bias.fill_(2.0)  # someone else's value counts
    loads.update_biases(counts, 0.5)
    assert routers(model)[0].e_score_correction_bias.tolist() == [1.5, *[2.5] * 5]


def test_imbalance_falls():
    model, ids = tiny_model().train(), token_ids(8, 40)
    for router in routers(model):  # one expert that all want, one that none wants
        router.e_score_correction_bias.copy_(torch.tensor([0.5, -0.5, 0, 0, 0, 0]))
    loads, history = ExpertLoads(model), []
    for _ in range(60):
        model(ids)
        counts = loads.take()
        history.append(load_statistics(counts, loads.layers))
        loads.update_biases(counts, 0.02)
    assert history[0]["experts/dead"] == 3 and history[0]["experts/max_load"] == 3.0
    assert history[-1]["experts/dead"] == 0 and history[-1]["experts/max_load"] < 1.5


def test_two_processes_update_as_one_on_the_joined_batch(tmp_path):
    processes.run(2, [moe_worker.save_biases], tmp_path)
    first, second = (torch.load(tmp_path / f"biases.{rank}") for rank in range(2))
    assert torch.equal(first, second)
    assert torch.equal(first, moe_worker.train(0, 1))
    assert not torch.equal(first, biases(tiny_model()))


def test_biases_are_saved_and_loaded(tmp_path):
    model, ids = tiny_model().train(), token_ids(2, 20)
    loads = ExpertLoads(model)
    model(ids)
    loads.update_biases(loads.take(), 0.01)
    model.save_pretrained(tmp_path)
    assert torch.equal(biases(type(model).from_pretrained(tmp_path)), biases(model))


# ---- Trainer -------------------------------------------------------------------------------------


class Reporter(TrainerCallback):
    def __init__(self):
        self.rows = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.rows.append(dict(logs))


def trainer(tmp_path, model, **arguments):
    rows = [{"input_ids": ids, "labels": ids} for ids in token_ids(16, 24)]
    defaults = {"max_steps": 4, "gradient_accumulation_steps": 2, "save_strategy": "no"}
    defaults |= {"per_device_train_batch_size": 2, "logging_steps": 2}
    arguments = TrainingArguments(
        tmp_path,
        report_to=[],
        use_cpu=True,
        **{**defaults, **arguments},
    )
    return Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)


@pytest.mark.parametrize("rate", [0.0, 0.01, None])
def test_callback_updates_and_logs(tmp_path, rate):
    model = tiny_model(router_bias_update_rate=0.02)
    before = biases(model)
    run = trainer(tmp_path, model, eval_strategy="steps", eval_steps=2)
    reporter = Reporter()
    run.add_callback(reporter)
    run.callback_handler.callbacks.insert(0, run.pop_callback(reporter))  # as reporters are
    balance_experts(run, rate)
    run.train()
    moved = (biases(model) - before).abs().amax()
    step = 0.02 if rate is None else rate
    assert moved <= 4 * step + 1e-6 and (moved > 0) == (step > 0)
    steps = [row for row in reporter.rows if "loss" in row]
    assert len(steps) == 2 and all(1 <= row["experts/max_load"] <= 3 for row in steps)
    assert all("experts/layer_3/dead" in row for row in steps)
    assert not any("experts/dead" in row for row in reporter.rows if "loss" not in row)
    assert steps[0].items() <= run.state.log_history[0].items()
    assert model.model.expert_loads is None


def test_a_callback_given_to_trainer_balances_and_checkpoints_keep_biases(tmp_path):
    model = tiny_model()
    before = biases(model)
    run = trainer(tmp_path, model, gradient_checkpointing=True, save_strategy="steps", save_steps=4)
    run.add_callback(ExpertBalanceCallback(0.01))
    run.train()
    assert "experts/dead" in run.state.log_history[0]
    assert not torch.equal(biases(model), before)
    saved = type(model).from_pretrained(tmp_path / "checkpoint-4")
    assert torch.equal(biases(saved), biases(model))


def test_a_model_that_is_off_trains_as_before(tmp_path):
    one, two = tiny_model(), tiny_model()
    plain, counted = trainer(tmp_path / "1", one), trainer(tmp_path / "2", two)
    balance_experts(counted)  # the configuration's rate is 0
    plain.train(), counted.train()
    for (name, a), b in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_models_with_counters_can_be_copied():
    model = tiny_model().train()
    ExpertLoads(model)
    twin, ids = copy.deepcopy(model), token_ids(2, 9)
    assert F.mse_loss(twin(ids).logits, model(ids).logits) == 0
