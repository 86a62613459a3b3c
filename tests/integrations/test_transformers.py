"""The Transformers Trainer, the real one, on the CPU, with tiny models made from configurations (no downloads)."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback, TrainingArguments

import flatmin
from flatmin.integrations.transformers import FlatTrainer
from tests.contracts.cases import METHODS, build
from tests.integrations.cpu import fp16_on_cpu

WHOLE = [m for m in METHODS if m not in ("sap", "esam", "nso-split", "rwp")]
TOKENS = torch.randint(16, (64, 8), generator=torch.Generator().manual_seed(1))
LABELS = TOKENS.clone()
LABELS[torch.rand(TOKENS.shape, generator=torch.Generator().manual_seed(2)) < 0.3] = -100  # ragged counts of items
LABELS[:, 0] = -100  # nothing predicts it, though the Trainer would count it
DATA: Any = [{"input_ids": row, "labels": labels} for row, labels in zip(TOKENS, LABELS, strict=True)]


def gpt(dropout: float = 0.0) -> Any:
    torch.manual_seed(0)
    probabilities = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    return GPT2LMHeadModel(GPT2Config(vocab_size=16, n_positions=8, n_embd=8, n_layer=1, n_head=2, **probabilities))


def base_of(params) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


def arguments(folder, accumulate: int = 1, **options) -> TrainingArguments:
    defaults = {"num_train_epochs": 2, "max_grad_norm": 0.0, "lr_scheduler_type": "constant", "save_strategy": "no"}
    return TrainingArguments(
        str(folder),
        use_cpu=True,
        per_device_train_batch_size=32 // accumulate,
        gradient_accumulation_steps=accumulate,
        report_to="none",
        disable_tqdm=True,
        logging_steps=1,
        **{**defaults, **options},
    )


class InOrder(FlatTrainer):
    """Batches in the order of the data, so that a plain loop can follow."""

    def _get_train_sampler(self, *_):
        return torch.utils.data.SequentialSampler(DATA)


def trained(method: str, folder, accumulate: int = 1, model: Any = None, fp16: bool = False, **options) -> Any:
    """A trainer that has trained."""
    model = gpt() if model is None else model
    extras = {k: options.pop(k) for k in ("callbacks", "averaging", "eval_dataset") if k in options}
    resume = options.pop("resume", None)
    opt = build(method, base_of(p for p in model.parameters() if p.requires_grad))
    trainer = InOrder(
        model=model,
        args=arguments(folder, accumulate, **options),
        train_dataset=DATA,
        optimizers=(opt, None),
        **extras,
    )
    if fp16:
        fp16_on_cpu(trainer.accelerator)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def plain(method: str, epochs: int = 2, clip: float | None = None) -> Any:
    """Whole batches of 32, the loss a mean over the items of the batch."""
    model = gpt().train()
    opt: Any = build(method, base_of(model.parameters()))
    for _ in range(epochs):
        for tokens, labels in zip(TOKENS.split(32), LABELS.split(32), strict=True):
            for _probe in opt.probes():
                outputs = model(input_ids=tokens).logits[:, :-1]
                nn.functional.cross_entropy(outputs.reshape(-1, 16), labels[:, 1:].reshape(-1)).backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            opt.step()
    return model


def assert_close(a: Any, b: Any, atol: float = 2e-6) -> None:
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=atol, rtol=0)


@pytest.mark.parametrize("method", WHOLE)
def test_four_micro_batches_equal_one_batch_and_the_plain_loop(method, tmp_path):
    # The Trainer divides by the items of the whole window; a mean over micro-batches would not equal the plain loop.
    trainer = trained(method, tmp_path, 4)
    assert_close(trainer.model, plain(method))
    assert trainer.state.global_step == 4
    assert trainer.optimizer.optimizer.num_steps == 4


@pytest.mark.parametrize("method", ["sam", "nso"])
@pytest.mark.parametrize("fp16", [False, True])
def test_clipping_with_and_without_a_scaler(method, fp16, tmp_path):
    trainer = trained(method, tmp_path, 2, fp16=fp16, max_grad_norm=0.1)
    # Accelerate runs the forward in half precision where there is a scaler.
    assert_close(trainer.model, plain(method, clip=0.1), atol=2e-5 if fp16 else 2e-6)
    assert not trainer.accelerator.optimizer_step_was_skipped


def test_an_overflow_skips_the_step(tmp_path):
    class Poison(InOrder):
        calls = 0

        def compute_loss(self, *args, **kwargs):
            self.calls += 1
            return super().compute_loss(*args, **kwargs) * (float("inf") if self.calls == 2 else 1.0)

    model, start = gpt(), gpt()
    trainer: Any = Poison(
        model=model,
        args=arguments(tmp_path, max_steps=1),
        train_dataset=DATA,
        optimizers=(flatmin.SAM(base_of(model.parameters())), None),  # type: ignore[arg-type]
    )
    fp16_on_cpu(trainer.accelerator)
    trainer.train()
    assert trainer.accelerator.optimizer_step_was_skipped
    assert_close(model, start, atol=0)
    assert trainer.accelerator.scaler.get_scale() == 32768.0


def test_the_logged_loss_is_that_of_the_trainers_own_pass(tmp_path):
    logged = trained("sam", tmp_path, 4, num_train_epochs=1).state.log_history
    at_the_weights = gpt()(input_ids=TOKENS[:32], labels=LABELS[:32]).loss
    assert logged[0]["loss"] == pytest.approx(at_the_weights.item(), abs=1e-4)


@pytest.mark.parametrize("method", ["sam", "nso"])
def test_a_resumed_run_equals_an_uninterrupted_one(method, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6, "averaging": {"kind": "mean"}}
    whole = trained(method, tmp_path / "a", 2, gpt(dropout=0.1), **options)
    again = trained(method, tmp_path / "b", 2, gpt(dropout=0.1), resume=str(tmp_path / "a" / "checkpoint-3"), **options)
    assert again.state.global_step == 6
    assert_close(again.model, whole.model, atol=0)
    a, b = again.averager.state_dict(), whole.averager.state_dict()
    assert a["num_averaged"] == b["num_averaged"] == 6
    assert all(torch.equal(a["averages"][name], b["averages"][name]) for name in b["averages"])


def test_evaluation_uses_the_average(tmp_path):
    path = []

    class Path(TrainerCallback):
        def on_step_end(self, args, state, control, model: Any = None, **_):
            path.append(model.transformer.wte.weight.detach().clone())

    class Seen(InOrder):
        seen: Any = None

        def prediction_step(self, model, *args, **kwargs):
            self.seen = model.transformer.wte.weight.detach().clone()
            return super().prediction_step(model, *args, **kwargs)

    model = gpt()
    trainer: Any = Seen(
        model=model,
        args=arguments(tmp_path),
        train_dataset=DATA,
        eval_dataset=DATA[:8],
        averaging={"kind": "mean"},
        callbacks=[Path()],
        optimizers=(flatmin.SAM(base_of(model.parameters())), None),
    )
    trainer.train()
    trainer.evaluate()
    torch.testing.assert_close(trainer.seen, torch.stack(path).mean(0))
    assert torch.equal(model.transformer.wte.weight, path[-1])
    assert_close(model, plain("sam"))


def test_the_method_wraps_the_trainers_own_optimizer(tmp_path):
    trainer: Any = FlatTrainer(
        model=gpt(),
        args=arguments(tmp_path, max_steps=1, weight_decay=0.1),
        train_dataset=DATA,
        method=lambda base: flatmin.NSO(base, sigma=0.01),
    )
    trainer.train()
    opt = trainer.optimizer.optimizer
    assert type(opt) is flatmin.NSO
    assert type(opt.base) is torch.optim.AdamW
    assert [group["weight_decay"] for group in opt.param_groups] == [0.1, 0.0]
    assert all(group["sigma"] == 0.01 for group in opt.param_groups)


def test_an_optimizer_that_is_not_ours_is_named(tmp_path):
    trainer: Any = FlatTrainer(model=gpt(), args=arguments(tmp_path), train_dataset=DATA)
    with pytest.raises(ValueError, match=r"FlatTrainer needs a flatmin optimizer, got AdamW"):
        trainer.train()


def test_an_exception_leaves_the_weights_as_they_were(tmp_path):
    class Fails(InOrder):
        def compute_loss(self, *_, **__):
            raise RuntimeError("the data is broken")

    model = gpt()
    opt = flatmin.NSO(base_of(model.parameters()))
    trainer: Any = Fails(model=model, args=arguments(tmp_path), train_dataset=DATA, optimizers=(opt, None))
    with pytest.raises(RuntimeError, match="the data is broken"):
        trainer.train()
    assert_close(model, gpt(), atol=0)


def test_an_epoch_stopped_within_a_step_leaves_nothing_behind(tmp_path):
    class Stop(TrainerCallback):
        seen = 0

        def on_substep_end(self, args, state, control, **_):
            self.seen += 1
            control.should_epoch_stop = self.seen == 1

    trainer = trained("nso", tmp_path, 4, callbacks=[Stop()])
    control = plain("nso", epochs=1)
    assert trainer.state.global_step == 2
    assert_close(trainer.model, control)


def test_between_micro_batches_the_weights_are_at_home(tmp_path):
    class Watch(TrainerCallback):
        seen: Any = None

        def on_substep_end(self, args, state, control, model: Any = None, **_):
            if state.global_step == 0:
                self.seen = model.transformer.wte.weight.detach().clone()

    watch = Watch()
    trained("nso", tmp_path, 4, callbacks=[watch])
    assert torch.equal(watch.seen, gpt().transformer.wte.weight)


def test_only_adapters_are_perturbed_and_trained(tmp_path):
    config = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
    model: Any = get_peft_model(gpt(), config)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    moves = []

    class Watch(InOrder):
        def compute_loss(self, *args, **kwargs):
            here = dict(self.model.named_parameters())
            moves.append({name: (here[name].detach() - start[name]).norm() for name in start})
            return super().compute_loss(*args, **kwargs)

    opt = flatmin.SAM(base_of(p for p in model.parameters() if p.requires_grad), rho=0.05)
    trainer: Any = Watch(model=model, args=arguments(tmp_path, max_steps=1), train_dataset=DATA, optimizers=(opt, None))
    trainer.train()
    ascent = moves[1]
    assert all(ascent[name] == 0 for name in start if "lora" not in name)
    size = torch.stack([ascent[name] for name in start if "lora" in name]).norm()
    torch.testing.assert_close(size, torch.tensor(0.05))  # the norm is over the adapters
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], start[name]) for name in start if "lora" not in name)
    assert not all(torch.equal(after[name], start[name]) for name in start if "lora" in name)


@pytest.mark.parametrize("only_model", [False, True])
def test_the_best_model_comes_with_its_own_average(only_model, tmp_path):
    class Scored(InOrder):
        def evaluate(self, *args, **kwargs):
            metrics = super().evaluate(*args, **kwargs)
            metrics["eval_score"] = abs(self.state.global_step - 2)  # the best one is in the middle
            return metrics

    steps = {"strategy": "steps", "steps": 1}
    options = {f"{kind}_{k}": v for kind in ("save", "eval") for k, v in steps.items()}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "score", "greater_is_better": False}
    trainer: Any = Scored(
        model=gpt(),
        args=arguments(tmp_path, max_steps=4, save_only_model=only_model, **options, **best),
        train_dataset=DATA,
        eval_dataset=DATA[:8],
        averaging={"kind": "ema", "decay": 0.5},
        method=flatmin.SAM,
    )
    with pytest.warns(UserWarning, match="no average beside") if only_model else nullcontext():
        trainer.train()
    losses = {line["step"]: line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line}
    assert losses[2] != losses[4]
    assert (trainer.evaluate()["eval_loss"] == losses[2]) is not only_model


def test_each_training_begins_a_new_average(tmp_path):
    trainer: Any = InOrder(
        model_init=lambda: gpt(),
        args=arguments(tmp_path, max_steps=3),
        train_dataset=DATA,
        eval_dataset=DATA[:8],
        averaging={"kind": "mean"},
        method=flatmin.SAM,
    )
    losses = []
    for _ in range(2):
        trainer.train()
        assert trainer.averager.state_dict()["num_averaged"] == 3
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[0] == losses[1]


def test_a_method_beside_an_optimizer_that_is_given(tmp_path):
    model = gpt()
    given = flatmin.SAM(torch.optim.SGD(model.parameters(), lr=0.1)), None
    with pytest.raises(ValueError, match="method= wraps the optimizer that the Trainer makes"):
        FlatTrainer(model=model, args=arguments(tmp_path), train_dataset=DATA, method=flatmin.NSO, optimizers=given)
