"""Lightning: any method under automatic optimization, and averages of the weights, as callbacks.

    def configure_optimizers(self):
        return flatmin.SAM(torch.optim.SGD(self.parameters(), lr=0.1), rho=0.05)

    trainer = Trainer(callbacks=[FlatCallback()], accumulate_grad_batches=4, gradient_clip_val=1.0)

Lightning's own pass over a micro-batch is the first probe. Once the last micro-batch of the step has been evaluated,
the callback evaluates all of them again for each later probe, through the trainer's strategy and precision plugin. Then
Lightning unscales, clips and steps, once.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor

from flatmin.extras import need
from flatmin.integrations.unwrap import flat_optimizer
from flatmin.notices import warn
from flatmin.optim.companions.averaging import Averager
from flatmin.optim.engine.window import Window

Callback: Any = need("lightning.pytorch", "lightning").Callback

MANUAL = (
    "FlatCallback is for automatic optimization. In manual optimization write the loop: opt = self.optimizers(), then "
    "for probe in opt.optimizer.probes(): self.manual_backward(loss), then opt.step()."
)
NO_REPLAY = "FlatCallback cannot evaluate a batch again with {what}."


class FlatCallback(Callback):
    """Runs a flatmin optimizer under automatic optimization: any precision, clipping, accumulation.

    Hooks around the batch and around the optimizer's step run once; those around `backward` run for each evaluation.
    What `training_step` logs, and what it adds to `torchmetrics`, is that of Lightning's own pass. The step equals that
    of a plain loop: four micro-batches of 16 equal one batch of 64.

    Cost: the gradients of the method. Memory: the micro-batches of one step are kept until it ends.

    Raises:
        ValueError: when training starts: for manual optimization, an optimizer that is not one of flatmin's, a
            `training_step` that reads a `dataloader_iter`, a strategy that accumulates by itself (DeepSpeed).
    """

    def __init__(self) -> None:
        self._window: Window | None = None
        self._batches: list[tuple[Any, ...]] = []
        self._again = False  # whether a batch is being evaluated for a later probe

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuses what could not be right."""
        if not pl_module.automatic_optimization:
            raise ValueError(MANUAL)
        for optimizer in trainer.optimizers:
            flat_optimizer(optimizer, "FlatCallback")
        if "dataloader_iter" in inspect.signature(pl_module.training_step).parameters:
            raise ValueError(NO_REPLAY.format(what="training_step(self, dataloader_iter)"))
        if trainer.strategy.handles_gradient_accumulation:
            raise ValueError(NO_REPLAY.format(what=f"the strategy {type(trainer.strategy).__name__}"))

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """The weights go to the first probe."""
        if self._window is None:
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            optimizer = flat_optimizer(trainer.optimizers[0], "FlatCallback")
            self._window = Window(optimizer, trainer.strategy.model, scaler)
        takes_number = len(inspect.signature(pl_module.training_step).parameters) > 1
        self._batches.append((batch, batch_idx) if takes_number else (batch,))
        self._window.away()

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        """The weights come back; after the last micro-batch the later probes are evaluated."""
        if self._window is None or self._again:
            return
        self._window.home()
        if not trainer.fit_loop._should_accumulate():
            self._again = True
            try:
                with _not_counted(pl_module):
                    self._window.finish(lambda number: self._evaluate(trainer, number))
            finally:
                self._again = False
            self._window, self._batches = None, []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """A batch that `training_step` skipped, by returning None, had no backward."""
        if self._window is not None:
            self._window.home()
            if not trainer.fit_loop._should_accumulate():
                self._close()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """An epoch that was cut short leaves no step behind."""
        self._close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """The weights are brought back before anybody saves them."""
        self._close()

    def _evaluate(self, trainer: Any, number: int) -> None:
        """One micro-batch again; between processes gradients are reduced on the last one only."""
        strategy, is_last = trainer.strategy, number == len(self._batches) - 1
        waits = not is_last and hasattr(strategy, "block_backward_sync")
        with strategy.block_backward_sync() if waits else nullcontext():
            output = strategy.training_step(*self._batches[number])
            loss = output["loss"] if isinstance(output, Mapping) else output
            if loss is not None:
                strategy.backward(loss / trainer.accumulate_grad_batches, trainer.optimizers[0])

    def _close(self) -> None:
        if self._window is not None:
            self._window.close()
        self._window, self._batches = None, []


@contextmanager
def _not_counted(pl_module: Any) -> Iterator[None]:
    """Inside, `self.log` does nothing; afterwards the metrics of the module are as before."""
    metric_class = need("torchmetrics", "lightning").Metric
    metrics = [m for m in pl_module.modules() if isinstance(m, metric_class)]
    before = [(m, m._update_count, {k: _copied(v) for k, v in m.metric_state.items()}) for m in metrics]
    pl_module.log = lambda *_, **__: None
    try:
        yield
    finally:
        del pl_module.log
        for metric, count, state in before:
            metric._update_count, metric._computed = count, None
            for name, value in state.items():
                setattr(metric, name, value)


def _copied(state: Any) -> Any:
    return state.clone() if isinstance(state, Tensor) else list(state)


class AveragingCallback(Callback):
    """Averages the weights after each step; validation, tests and predictions use the average.

    Checkpoints hold the weights of training, and the average beside them, so that a run that is resumed between epochs
    equals an uninterrupted one (within an epoch, as far as Lightning's loaders go on).
    `trainer.test(model, data, ckpt_path="best")` takes both from there, in a fresh trainer too. After training,
    `with callback.averager.applied(): ...` gives the model the average; a model with batch norm needs
    `callback.averager.refresh(loader)` first.

    Args:
        options: of `flatmin.Averager`, e.g. `kind="ema", decay=0.99`. `num_steps` is taken from the trainer.

    Attributes:
        averager: the `flatmin.Averager`, once training has started or a checkpoint was evaluated.

    Warns:
        if a checkpoint that has no average is evaluated: then its weights are used.
    """

    def __init__(self, **options: Any) -> None:
        self._options = options
        self.averager: Averager | None = None
        self._loaded: dict[str, Any] | None = None
        self._of: Any = None  # the module whose weights are averaged
        self._is_read = False  # whether this run has looked into a checkpoint
        self._seen = 0
        self._worn: AbstractContextManager[Any] | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """A run begins, and has read no checkpoint yet."""
        self._is_read, self._loaded = False, None

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """To evaluate a checkpoint means its own average."""
        self._is_read = True
        if trainer.state.fn != "fit":
            state = checkpoint["callbacks"].get(self.state_key, {}).get("averager")
            self._build(pl_module, {"kind": "mean"}, state)  # only to be worn: what it averages does not matter
            if state is None:
                self._miss(trainer.ckpt_path)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Builds the averager, with the state of a checkpoint if there is one."""
        steps = trainer.estimated_stepping_batches
        known = {"num_steps": int(steps)} if steps not in (-1, float("inf")) else {}
        self._build(pl_module, {**known, **self._options}, self._loaded)

    def _build(self, pl_module: Any, options: dict[str, Any], state: dict[str, Any] | None) -> None:
        self.averager, self._of = Averager(pl_module, **options), pl_module
        if state is not None:
            self.averager.load_state_dict(state)
        self._loaded = None

    def _miss(self, where: Any) -> None:
        self.averager = None
        warn(
            f"the checkpoint {where} has no average (was it saved with save_weights_only=True, or without "
            "AveragingCallback?): its weights are evaluated as they are.",
        )

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Steps are counted from here (a resumed run does not start at 0)."""
        self._seen = trainer.global_step

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Takes the weights in, if the optimizer has stepped."""
        if self.averager is not None and trainer.global_step > self._seen:
            self._seen = trainer.global_step
            self.averager.update()

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """The model gets the average."""
        if trainer.state.fn != "fit" and trainer.ckpt_path is not None and not self._is_read:
            self._miss(trainer.ckpt_path)
        if self.averager is not None and self._of is pl_module:
            self._worn = self.averager.applied()
            self._worn.__enter__()

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """And loses it again."""
        if self._worn is not None:
            self._worn.__exit__(None, None, None)
            self._worn = None

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        """As for validation."""
        self.on_validation_start(trainer, pl_module)

    def on_test_end(self, trainer: Any, pl_module: Any) -> None:
        """As for validation."""
        self.on_validation_end(trainer, pl_module)

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        """As for validation."""
        self.on_validation_start(trainer, pl_module)

    def on_predict_end(self, trainer: Any, pl_module: Any) -> None:
        """As for validation."""
        self.on_validation_end(trainer, pl_module)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """The weights of training come back before anybody saves them."""
        self.on_validation_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """The average, for Lightning's checkpoint."""
        return {} if self.averager is None else {"averager": self.averager.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from a checkpoint, once the model is there."""
        self._loaded = state_dict.get("averager")
