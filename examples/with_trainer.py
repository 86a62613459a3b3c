"""The Transformers Trainer: NSO on a small vision transformer, with accumulation, evaluated on an average."""

import tempfile

import torch
from sklearn.datasets import load_digits
from transformers import TrainingArguments, ViTConfig, ViTForImageClassification

import flatmin
from flatmin.integrations.transformers import FlatTrainer

x, y = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
x = x.float().view(-1, 1, 8, 8) / 16
data = [{"pixel_values": image, "labels": label} for image, label in zip(x, y, strict=True)]

torch.manual_seed(0)
heads = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
config = ViTConfig.from_dict({"image_size": 8, "patch_size": 2, "num_channels": 1, "num_labels": 10, **heads})
arguments = TrainingArguments(
    tempfile.mkdtemp(),
    use_cpu=True,
    num_train_epochs=5,
    per_device_eval_batch_size=500,
    per_device_train_batch_size=8,
    gradient_accumulation_steps=2,
    learning_rate=2e-3,
    report_to="none",
    save_strategy="no",
    disable_tqdm=True,
)
trainer = FlatTrainer(
    model=ViTForImageClassification(config),
    args=arguments,
    train_dataset=data[:480],
    eval_dataset=data[480:980],
    compute_metrics=lambda found: {"accuracy": (found.predictions.argmax(1) == found.label_ids).mean()},
    method=lambda base: flatmin.NSO(base, sigma=0.002),
    averaging={"kind": "tail", "start": 0.75},
)
trainer.train()
accuracy = trainer.evaluate()["eval_accuracy"]
print(f"test accuracy of the average {accuracy:.3f} after {trainer.state.global_step} steps")
assert accuracy > 0.5
