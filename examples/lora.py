"""LoRA: SAM over the adapters of a small language model; the frozen weights are not moved, and not trained."""

import tempfile

import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments

import flatmin
from flatmin.integrations.transformers import FlatTrainer

torch.manual_seed(0)
counting = (torch.arange(16) + torch.arange(64)[:, None]) % 32  # 0 1 2 3 ..., 1 2 3 4 ..., and so on
data = [{"input_ids": row, "labels": row} for row in counting]
model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=32, n_layer=1, n_head=2))
model = get_peft_model(
    model, LoraConfig(r=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, task_type="CAUSAL_LM")
)
arguments = TrainingArguments(
    tempfile.mkdtemp(),
    use_cpu=True,
    num_train_epochs=5,
    per_device_train_batch_size=8,
    gradient_accumulation_steps=2,
    learning_rate=1e-2,
    report_to="none",
    save_strategy="no",
    disable_tqdm=True,
)
trainer = FlatTrainer(
    model=model,
    args=arguments,
    train_dataset=data,
    eval_dataset=data,
    method=lambda base: flatmin.SAM(base, rho=0.05),
)
before = trainer.evaluate()["eval_loss"]
trainer.train()
after = trainer.evaluate()["eval_loss"]
print(f"loss {before:.3f} before, {after:.3f} after training {model.num_parameters(only_trainable=True)} parameters")
assert after < before
