"""Lightning, the real one, on the CPU: automatic optimization equals the plain loop, and counts everything once."""

from typing import Any

import pytest
import torch
import torchmetrics
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.utils.data import DataLoader, TensorDataset

from flatmin.integrations.lightning import AveragingCallback, FlatCallback
from tests.contracts.cases import METHODS, build

WHOLE = [m for m in METHODS if m not in ("sap", "esam", "nso-split", "rwp")]
X = torch.randn(128, 6, generator=torch.Generator().manual_seed(1))
Y = torch.randint(3, (128,), generator=torch.Generator().manual_seed(2))


class Net(LightningModule):
    net: Any

    def __init__(self, method: str, batch_norm: bool = False):
        super().__init__()
        torch.manual_seed(0)
        middle = nn.BatchNorm1d(8) if batch_norm else nn.Identity()
        self.net = nn.Sequential(nn.Linear(6, 8), middle, nn.Tanh(), nn.Linear(8, 3))
        self.method = method
        self.seen = torchmetrics.SumMetric()
        self.events: list[str] = []

    def loss(self, batch):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def training_step(self, batch, batch_idx) -> Any:
        loss = self.loss(batch)
        self.seen(len(batch[0]))
        self.log("loss", loss, on_step=True, on_epoch=True, batch_size=len(batch[0]))
        return {"loss": loss}

    def on_before_optimizer_step(self, optimizer):
        self.events.append("optimizer step")

    def configure_optimizers(self):
        return build(self.method, torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9))


class Validated(Net):
    def __init__(self, method: str):
        super().__init__(method)
        self.validated_at: list[torch.Tensor] = []

    def validation_step(self, batch, batch_idx):
        self.validated_at.append(self.net[0].weight.detach().clone())


class Recorder(DummyLogger):
    def __init__(self):
        super().__init__()
        self.losses: list[float] = []

    def log_metrics(self, metrics, step=None):
        self.losses += [metrics["loss_step"]] if "loss_step" in metrics else []


def trainer_of(*callbacks, precision="32-true", epochs=2, **options) -> Any:
    if precision == "16-mixed":
        scaler = GradScaler("cpu", init_scale=65536.0, growth_interval=1000)
        options["plugins"] = [MixedPrecision("16-mixed", "cpu", scaler)]
    else:
        options["precision"] = precision
    return Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[FlatCallback(), *callbacks],
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        **{"enable_checkpointing": False, "logger": False, "num_sanity_val_steps": 0, **options},
    )


def batches(size: int) -> DataLoader:
    return DataLoader(TensorDataset(X, Y), batch_size=size)


def fit(method: str, accumulate: int = 1, model: Net | None = None, **options) -> tuple[Any, Any]:
    model = Net(method) if model is None else model
    trainer = trainer_of(accumulate_grad_batches=accumulate, **options)
    trainer.fit(model, batches(64 // accumulate))
    return model, trainer


def plain(
    method: str, precision: str = "32-true", clip: float | None = None, by: str = "norm", accumulate: int = 1
) -> Any:
    model = Net(method)
    opt = model.configure_optimizers()
    dtype = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}[precision]
    for _ in range(2):
        for x, y in zip(X.split(64), Y.split(64), strict=True):
            for _probe in opt.probes():
                for rows in torch.arange(64).chunk(accumulate):
                    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32, cache_enabled=False):
                        loss = model.loss((x[rows], y[rows])) / accumulate
                    loss.backward()
            if clip is not None and by == "norm":
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            elif clip is not None:
                nn.utils.clip_grad_value_(model.parameters(), clip)
            opt.step()
    return model


def assert_close(a: nn.Module, b: nn.Module, atol: float = 1e-6) -> None:
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=atol, rtol=0)


@pytest.mark.parametrize("method", WHOLE)
def test_it_equals_the_plain_loop(method):
    model, trainer = fit(method)
    assert_close(model, plain(method), atol=1e-7)
    assert trainer.global_step == 4


@pytest.mark.parametrize("method", WHOLE)
def test_four_micro_batches_of_16_equal_one_batch_of_64(method):
    model, trainer = fit(method, 4)
    assert_close(model, plain(method))
    assert trainer.global_step == 4


@pytest.mark.parametrize("method", ["sam", "nso", "monge-sam", "momentum-sam"])
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_mixed_precision_with_clipping(method, precision, accumulate):
    model, trainer = fit(method, accumulate, precision=precision, gradient_clip_val=0.1)
    # A scaled gradient is not rounded to half precision as an unscaled one.
    atol = 1e-6 if precision == "bf16-mixed" else 2e-5
    assert_close(model, plain(method, precision, 0.1, accumulate=accumulate), atol)
    assert trainer.optimizers[0].num_skipped == 0
    assert trainer.global_step == 4
    assert len(model.events) == 4  # clipped once a step


@pytest.mark.parametrize("by", ["norm", "value"])
def test_clipping(by):
    model, _ = fit("sam", 2, gradient_clip_val=0.01, gradient_clip_algorithm=by)
    assert_close(model, plain("sam", clip=0.01, by=by))
    with pytest.raises(AssertionError):
        assert_close(model, plain("sam"))


@pytest.mark.parametrize("method", ["sam", "nso"])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_losses_and_metrics_are_counted_once(method, accumulate):
    logger = Recorder()
    model, trainer = fit(method, accumulate, logger=logger)
    assert len(logger.losses) == trainer.global_step == 4
    assert model.seen.compute() == 2 * len(X)
    if (method, accumulate) == ("sam", 1):  # it evaluates at the weights first; later evaluations are not logged
        start = Net("sam").loss((X[:64], Y[:64]))
        assert logger.losses[0] == pytest.approx(start.item())


def test_batch_norm_counts_each_micro_batch_once():
    model, _ = fit("sam", 4, model=Net("sam", batch_norm=True))
    assert model.net[1].num_batches_tracked == 16


def test_a_validation_within_a_window_sees_the_weights():
    model, at = Validated("nso"), []

    class Watch(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx % 4 == 0:
                at.append(pl_module.get_parameter("net.0.weight").detach().clone())

    trainer = trainer_of(accumulate_grad_batches=4, val_check_interval=1)
    trainer.callbacks.insert(0, Watch())
    trainer.fit(model, batches(16), batches(128))
    for number in (0, 1, 2):  # after each micro-batch of the first window but the last
        assert torch.equal(model.validated_at[number], at[0])
    assert torch.equal(model.validated_at[3], at[1])


def test_an_overflow_skips_the_step_and_halves_the_scale():
    class Poison(Callback):
        calls = 0

        def on_after_backward(self, trainer, pl_module):
            Poison.calls += 1
            if Poison.calls == 2:  # the ascent of the first step
                next(pl_module.parameters()).grad.fill_(torch.inf)  # type: ignore[union-attr]

    model, start = Net("sam"), [p.detach().clone() for p in Net("sam").parameters()]
    trainer = trainer_of(precision="16-mixed", max_steps=1)
    trainer.callbacks.insert(0, Poison())
    trainer.fit(model, batches(64))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), start, strict=True))
    assert trainer.precision_plugin.scaler.get_scale() == 32768.0
    trainer.optimizers[0].zero_grad()
    assert trainer.optimizers[0].num_skipped == 1


@pytest.mark.parametrize("method", ["nso", "sam"])
def test_a_resumed_run_equals_an_uninterrupted_one(method, tmp_path):
    averaging = {"kind": "mean"}
    first = AveragingCallback(**averaging)
    trainer = trainer_of(first, epochs=1, accumulate_grad_batches=2)
    trainer.fit(Net(method), batches(32))
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    again, second = Net(method), AveragingCallback(**averaging)
    trainer = trainer_of(second, accumulate_grad_batches=2)
    trainer.fit(again, batches(32), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert trainer.global_step == 4
    whole, third = Net(method), AveragingCallback(**averaging)
    trainer_of(third, accumulate_grad_batches=2).fit(whole, batches(32))
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), whole.parameters(), strict=True))
    a, b = second.state_dict()["averager"], third.state_dict()["averager"]
    assert a["num_averaged"] == b["num_averaged"] == 4
    assert all(torch.equal(a["averages"][name], b["averages"][name]) for name in a["averages"])


def test_evaluation_uses_the_average_and_training_goes_on_without_it():
    path = []

    class Path(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            path.append(pl_module.get_parameter("net.0.weight").detach().clone())

    model, averaging = Validated("sam"), AveragingCallback(kind="mean")
    trainer_of(Path(), averaging).fit(model, batches(64), batches(128))
    torch.testing.assert_close(model.validated_at[-1], torch.stack(path).mean(0))
    assert torch.equal(model.net[0].weight, path[-1])
    assert_close(model, plain("sam"), atol=1e-7)


@pytest.mark.filterwarnings("ignore:.*returned `None`")
def test_a_batch_may_be_skipped():
    class Skips(Net):
        def training_step(self, batch, batch_idx) -> Any:
            return None if batch_idx == 1 else self.loss(batch)

    model = Skips("sam")
    _, trainer = fit("sam", model=model)
    assert model.configure_optimizers().num_steps == 0  # a fresh one, for comparison
    assert trainer.optimizers[0].num_steps == 2
    assert not torch.equal(model.net[0].weight, Net("sam").net[0].weight)


@pytest.mark.filterwarnings("ignore:.*returned `None`")
def test_a_skipped_batch_within_a_window_leaves_the_weights_at_home():
    class Skips(Net):
        def training_step(self, batch, batch_idx) -> Any:
            return None if batch_idx == 0 else self.loss(batch)

        def on_train_batch_end(self, outputs, batch, batch_idx):
            if batch_idx == 0 and self.current_epoch == 0:
                assert torch.equal(self.net[0].weight, Net("nso").net[0].weight)

    _, trainer = fit("nso", 2, model=Skips("nso"))
    assert trainer.optimizers[0].num_steps == 4


def test_an_exception_leaves_the_weights_as_they_were():
    class Fails(Net):
        def training_step(self, batch, batch_idx) -> Any:
            raise RuntimeError("the data is broken")

    model, start = Fails("nso"), [p.detach().clone() for p in Net("nso").parameters()]
    with pytest.raises(RuntimeError, match="the data is broken"):
        fit("nso", model=model)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), start, strict=True))


def test_an_epoch_that_is_cut_short_leaves_the_weights_as_they_were():
    class Stops(Net):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if batch_idx == 1 else None

    model = Stops("nso")
    fit("nso", 2, model=model)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), Net("nso").parameters(), strict=True))


def test_what_could_not_be_right_is_refused():
    class Manual(Net):
        automatic_optimization: Any = False

    class Plain(Net):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer = trainer_of()
    trainer.callbacks = [c for c in trainer.callbacks if not isinstance(c, FlatCallback)]
    with pytest.raises(ValueError, match=r"FlatCallback\(\)"):
        trainer.fit(Net("sam"), batches(64))
    with pytest.raises(ValueError, match=r"manual_backward"):
        fit("sam", model=Manual("sam"))
    with pytest.raises(ValueError, match=r"FlatCallback needs a flatmin optimizer, got SGD"):
        fit("sam", model=Plain("sam"))


class Scored(Validated):
    """Logs the validation loss, which is lowest in the middle of training: the best checkpoint is not the last one."""

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.log("score", abs(self.trainer.global_step - 4.0))

    def test_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)

    def predict_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        return batch[0]


@pytest.mark.filterwarnings("ignore:Be aware that when using")  # that the fresh trainer saves no checkpoints
def test_a_checkpoint_is_evaluated_with_its_own_average(tmp_path):
    model, averaging = Scored("sam"), AveragingCallback(kind="ema", decay=0.5)
    best = ModelCheckpoint(tmp_path, monitor="score")
    trainer = trainer_of(averaging, best, epochs=4, enable_checkpointing=True)
    trainer.fit(model, batches(64), batches(128))
    expected, last = model.validated_at[1], model.validated_at[-1]  # two steps an epoch
    assert not torch.equal(expected, last)
    for run in (trainer, trainer_of(AveragingCallback(kind="ema", decay=0.5))):
        other = model if run is trainer else Scored("sam")
        for evaluate in (run.validate, run.test, run.predict):
            path = "best" if run is trainer else best.best_model_path
            evaluate(other, batches(128), ckpt_path=path, weights_only=True)
            assert torch.equal(other.validated_at[-1], expected)
    trainer_of(averaging).fit(Net("sam"), batches(64))  # the checkpoint was evaluated; this training begins anew
    assert averaging.state_dict()["averager"]["num_averaged"] == 4


@pytest.mark.filterwarnings("ignore:Be aware that when using")
def test_an_average_of_every_second_iterate_is_evaluated_too(tmp_path):
    model, averaging = Scored("sam"), AveragingCallback(kind="mean", every=2)
    trainer = trainer_of(averaging, epochs=2)
    trainer.fit(model, batches(64), batches(128))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    other = Scored("sam")
    callback = AveragingCallback(kind="mean", every=2)
    trainer_of(callback).test(other, batches(128), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert callback.averager is not None
    assert callback.averager.num_averaged == 2


def test_a_checkpoint_without_an_average_is_evaluated_as_it_is(tmp_path):
    model, averaging = Scored("sam"), AveragingCallback(kind="mean")
    trainer = trainer_of(averaging, epochs=2)
    trainer.fit(model, batches(64), batches(128))
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    weights = model.net[0].weight.detach().clone()
    with pytest.warns(UserWarning, match="has no average"):
        trainer.test(model, batches(128), ckpt_path=tmp_path / "weights.ckpt", weights_only=True)
    assert torch.equal(model.validated_at[-1], weights)


@pytest.mark.parametrize("method", ["sam", "nso", "looksam"])
def test_manual_optimization_is_the_plain_loop(method):
    class Manual(Net):
        automatic_optimization: Any = False

        def training_step(self, batch, batch_idx):
            opt: Any = self.optimizers()
            for _probe in opt.optimizer.probes():
                self.manual_backward(self.loss(batch))
            opt.step()

    model, trainer = Manual(method), trainer_of()
    trainer.callbacks = [c for c in trainer.callbacks if not isinstance(c, FlatCallback)]
    trainer.fit(model, batches(64))
    assert trainer.global_step == 4
    assert model.events == ["optimizer step"] * 4
    assert_close(model, plain(method), atol=0)
