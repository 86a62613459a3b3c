"""The Transformers Trainer: any method by overriding one method, evaluation on averages of the weights.

    trainer = FlatTrainer(model=model, args=args, train_dataset=data, method=lambda base: flatmin.SAM(base, rho=0.05))
    trainer.train()

The Trainer's own pass over a micro-batch is the first probe. With the last micro-batch of a step, all of them are
evaluated again for each later probe, by the same `training_step`, so with the same `num_items_in_batch`. Then the
Trainer unscales, clips and steps, as always.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from flatmin.extras import need
from flatmin.integrations.unwrap import flat_optimizer
from flatmin.notices import warn
from flatmin.optim.companions.averaging import Averager
from flatmin.optim.engine.window import Window

Trainer: Any = need("transformers", "hf").Trainer
TrainerCallback: Any = need("transformers", "hf").TrainerCallback

AVERAGES = "averager.safetensors"  # in each checkpoint


class FlatMixin:
    """Adds a method, and averages, to a Trainer: `class MyTrainer(FlatMixin, Seq2SeqTrainer)`.

    Accumulation, clipping, `num_items_in_batch`, mixed precision and resuming are the Trainer's own. Only parameters
    that are trained are perturbed, so with PEFT only the adapters.

    Args:
        args: of the Trainer, positional.
        method: wraps the base optimizer that the Trainer makes of its arguments, e.g.
            `lambda base: flatmin.NSO(base, sigma=0.01)`. `None` if `optimizers=` has a flatmin optimizer already.
        averaging: options of `flatmin.Averager`, e.g. `{"kind": "ema", "decay": 0.99}`; then evaluation and prediction
            use the average, and checkpoints keep it beside the weights of training. `num_steps` is the Trainer's. Each
            `train()` begins a new average, and `load_best_model_at_end` brings back that of the best checkpoint.
        kwargs: of the Trainer, by name.

    Attributes:
        averager: the `flatmin.Averager`, once training has started, if `averaging` was given.

    Cost: the gradients of the method. Memory: the micro-batches of one step are kept until it ends.

    Raises:
        ValueError: when training starts, if the optimizer is not one of flatmin's.
    """

    optimizer: Any
    accelerator: Any
    args: Any
    model: Any
    state: Any
    add_callback: Callable[[Any], None]

    def __init__(
        self,
        *args: Any,
        method: Callable[[Optimizer], Optimizer] | None = None,
        averaging: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ):
        self._method = method
        self._averaging = averaging
        self.averager: Averager | None = None
        self._resumes = False  # whether `averager` was loaded for the training that begins
        self._window: Window | None = None
        self._batches: list[tuple[Any, ...]] = []
        super().__init__(*args, **kwargs)
        if method is not None and self.optimizer is not None:
            raise ValueError(
                "method= wraps the optimizer that the Trainer makes, and optimizers= gives one. Wrap that one "
                "yourself, optimizers=(flatmin.SAM(optimizer), None), or leave optimizers= out."
            )
        self.add_callback(_Events(self))

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Optimizer:
        """The Trainer's optimizer, inside the method."""
        is_given = self.optimizer is not None  # by an earlier call
        base = super().create_optimizer(*args, **kwargs)  # type: ignore[misc]
        if self._method is not None and not is_given:
            self.optimizer = self._method(base)
        flat_optimizer(self.optimizer, type(self).__name__)
        return self.optimizer

    def training_step(self, model: nn.Module, *batch: Any, **kwargs: Any) -> Tensor:
        """One micro-batch at the first probe; with the last one of a step, all of them at the later probes."""
        if self._window is None:
            optimizer = flat_optimizer(self.optimizer, type(self).__name__)
            self._window = Window(optimizer, model, self.accelerator.scaler)
        step = super().training_step  # type: ignore[misc]
        self._batches.append((batch, kwargs))
        try:
            self._window.away()
            loss = step(model, *batch, **kwargs)
            self._window.home()
            if self.accelerator.sync_gradients:
                self._window.finish(lambda number: self._again(step, model, number))
                self._window, self._batches = None, []
        except BaseException:
            self._drop()
            raise
        return loss

    def _again(self, step: Callable[..., Any], model: nn.Module, number: int) -> None:
        batch, kwargs = self._batches[number]
        is_last = number == len(self._batches) - 1
        with nullcontext() if is_last else self.accelerator.no_sync(model):
            step(model, *batch, **kwargs)

    def _drop(self) -> None:
        """What is left of a step that was not finished."""
        if self._window is not None:
            self._window.close()
        self._window, self._batches = None, []

    # -- averages ------------------------------------------------------------------------------------------------

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluation and prediction, on the average if there is one."""
        with nullcontext() if self.averager is None else self.averager.applied():
            return super().evaluation_loop(*args, **kwargs)  # type: ignore[misc]

    def _start_averaging(self) -> None:
        if self._averaging is not None and not self._resumes:
            self.averager = Averager(self.model, **{"num_steps": self.state.max_steps, **self._averaging})
        self._resumes = False

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
        if self.averager is not None:
            state = self.averager.state_dict()
            if self.args.should_save:  # one process: it alone has made the folder
                _save(state, Path(output_dir) / AVERAGES)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        if checkpoint is not None and (path := Path(checkpoint) / AVERAGES).exists():
            self._start_averaging()
            if self.averager is not None:
                _load(self.averager, path)
                self._resumes = True

    def _load_best_model(self) -> None:
        super()._load_best_model()  # type: ignore[misc]
        if self.averager is None:
            return
        path = Path(self.state.best_model_checkpoint) / AVERAGES
        if path.exists():
            _load(self.averager, path)
            return
        self.averager = None
        warn(
            f"there is no average beside the best model in {path.parent} (save_only_model=True?): it is evaluated as "
            "it is.",
        )


class _Events(TrainerCallback):
    """What happens between micro-batches."""

    def __init__(self, trainer: FlatMixin):
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._trainer._start_averaging()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._trainer._drop()  # of an epoch that was stopped within a step

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._trainer.averager is not None:
            self._trainer.averager.update()


class FlatTrainer(FlatMixin, Trainer):
    """`transformers.Trainer` with a flatmin method, and averages.

    Example:
        trainer = FlatTrainer(model=model, args=args, train_dataset=data, method=lambda base: flatmin.NSO(base))
        trainer.train()

    See FlatMixin for the arguments.
    """


def _save(state: dict[str, Any], path: Path) -> None:
    counts = {name: str(state[name]) for name in ("num_updates", "num_averaged")}
    tensors = {f"{kind}/{k}": v.contiguous() for kind in ("averages", "statistics") for k, v in state[kind].items()}
    need("safetensors.torch", "hf").save_file(tensors, path, metadata=counts)


def _load(averager: Averager, path: Path) -> None:
    state: dict[str, Any] = {"averages": {}, "statistics": {}}
    with need("safetensors", "hf").safe_open(path, framework="pt") as file:
        state.update({name: int(value) for name, value in file.metadata().items()})
        for key in file.keys():  # noqa: SIM118, a file is no mapping
            kind, _, name = key.partition("/")
            state[kind][name] = file.get_tensor(key)
    averager.load_state_dict(state)
