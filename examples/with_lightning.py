"""Lightning, automatic optimization: SAM with accumulation and clipping, validated on an average of the weights."""

import torch
from lightning.pytorch import LightningModule, Trainer
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import flatmin
from flatmin.integrations.lightning import AveragingCallback, FlatCallback

x, y = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
x = x.float() / 16


class Digits(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)  # once a step, whatever the method costs
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("accuracy", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):  # the only line of the module that names flatmin
        return flatmin.SAM(torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9), rho=0.05)


torch.manual_seed(0)
callbacks = [FlatCallback(), AveragingCallback(kind="tail", start=0.5)]
trainer = Trainer(
    max_epochs=10,
    accelerator="cpu",
    callbacks=callbacks,
    accumulate_grad_batches=2,
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
)
train, test = TensorDataset(x[:480], y[:480]), TensorDataset(x[480:], y[480:])
trainer.fit(Digits(), DataLoader(train, 16, shuffle=True), DataLoader(test, 1000))
print(f"test accuracy of the average {trainer.callback_metrics['accuracy']:.3f} after {trainer.global_step} steps")
assert trainer.global_step == 150
assert trainer.callback_metrics["accuracy"] > 0.8
