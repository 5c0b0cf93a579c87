"""A run: data, model, training, report, in that order."""

import dataclasses
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import keras

from experiment import model as models
from experiment import settings
from experiment import startup
from experiment.console import Console
from experiment.datasets import DATASETS
from experiment.datasets.arrays import evaluation_steps
from experiment.devices import STRATEGIES
from experiment.devices.one import OneDevice
from experiment.devices.one import Share
from experiment.errors import Diverged
from experiment.errors import Stopped
from experiment.errors import UserError
from experiment.networks import NETWORKS
from experiment.runfolder import checkpoint
from experiment.runfolder import lock
from experiment.runfolder import writer
from experiment.runfolder.progress import Progress
from experiment.runfolder.termination import Termination
from keras_fa.callbacks import AlignmentMonitor
from keras_fa.methods import METHODS

EVALUATION_BATCH_SIZE = 256
# Images on which alignment is measured; photos are of 224x224 pixels.
PROBE_SIZE, PHOTO_PROBE_SIZE = 256, 64


def run_folder(config: SimpleNamespace) -> Path:
    """Where a run is written."""
    return Path(config.runs_dir).expanduser() / (
        f"{config.dataset}-{config.model}-{config.method}-s{config.seed}"
    )


def train(config: SimpleNamespace) -> None:
    """The experiment, from the devices to the report.

    Of several workers each does this, and the chief alone uses the folder.
    """
    settings.check(config)
    termination = Termination()
    try:
        placement = STRATEGIES[config.strategy].open(config)
        # After that: TensorFlow's workers hear SIGTERM themselves.
        with termination, ExitStack() as stack:
            stack.enter_context(placement.watched())
            Run(config, placement, termination, stack).go()
    except Stopped as stopped:
        if termination.interrupted:
            raise KeyboardInterrupt(stopped) from stopped
        # Below Keras's progress bar, where there is one.
        print("\n" * sys.stdout.isatty() + str(stopped), flush=True)


@dataclasses.dataclass
class Run:
    """A run on its devices, step by step: `go` has them in their order.

    The stack keeps the folder for this process. `recorded` are the settings
    that are recorded, and what there is to know of the data.
    """

    config: SimpleNamespace
    placement: OneDevice
    termination: Termination
    stack: ExitStack

    def __post_init__(self) -> None:
        self.folder = run_folder(self.config)
        self.recorded = {
            name: getattr(self.config, name) for name in settings.RECORDED
        }
        self.progress = Progress()

    def go(self) -> None:
        """All of it."""
        self._agree()
        if self.progress.result and self._trained:
            print(f"{self.folder}: finished already, {self.progress.place}.")
            report(self.folder, self.progress.result)
            return
        keras.utils.set_random_seed(self.config.seed)
        keras.config.set_dtype_policy(self.config.dtype_policy)
        self._read()
        self._build()
        self._stop_if_asked()
        self.placement.tell(lambda: self._make_folder())
        self._announce()
        self.termination.saves = True
        with (
            self.source.reading(),
            writer.written_to(self.folder, self.progress),
        ):
            self._train()
            # The only use of the test images.
            self._stop_if_asked()
            result = self._result(self._test())
            if not self.placement.chief:
                return
            if startup.installed("tensorflow", "tensorboard"):
                from experiment import board

                board.finish(self.folder, result)
            writer.write_result(self.folder, result)
        report(self.folder, result)

    def _agree(self) -> None:
        """What all workers have to know of each other and of the folder."""

        def begin() -> dict[str, Any]:
            self._make_folder = self.stack.enter_context(lock.held(self.folder))
            self.progress = checkpoint.look(
                self.folder, vars(self.config), self.config.resume
            )
            return {
                "progress": self.progress.told(),
                "settings": self.recorded,
            }

        self._make_folder = None
        told = self.placement.tell(begin)
        others = [
            n for n, v in self.recorded.items() if told["settings"][n] != v
        ]
        if self.placement.agree(bool(others)):
            named = ", ".join(map(settings.flag, others)) or "other flags"
            raise UserError(
                f"The workers were started with different flags (here: "
                f"{named}). Start all of them with the same command."
            )
        if not self.placement.chief:
            self.progress = Progress.of(told["progress"])

    def _read(self) -> None:
        """Data."""
        if self.config.batch_size % self.placement.replicas:
            raise UserError(
                f"--batch_size={self.config.batch_size} cannot be shared by "
                f"{self.placement.replicas} replicas. Give a multiple of "
                f"{self.placement.replicas}."
            )
        config = self.config
        self.source = DATASETS[config.dataset].open(config)
        self.recorded["training_images"] = self.source.training_images
        self.recorded["workers"] = self.placement.workers
        network = NETWORKS[config.model]
        self.recorded["augmentation"] = DATASETS[config.dataset].augmentation(
            network.input_shape, network.pad
        )
        checkpoint.check_data(self.folder, self.progress, self.recorded)
        steps = self.source.training_images // config.batch_size
        self.steps_per_epoch = steps - steps % config.steps_per_execution
        if not self.steps_per_epoch:
            raise UserError(
                f"--batch_size={config.batch_size} with --steps_per_execution="
                f"{config.steps_per_execution} needs more than the "
                f"{self.source.training_images} training images of "
                f"{config.dataset}. Give smaller ones."
            )

    @property
    def _trained(self) -> bool:
        return self.progress.epoch >= self.config.epochs

    def _stop_if_asked(self, batch: int = 0, logs: dict | None = None) -> None:
        if self.placement.agree(self.termination.asked):
            raise Stopped(f"{self.folder}: stopped; go on with --resume.")

    def _build(self) -> None:
        """Model and optimizer, as they were left."""
        with self.placement.scope():
            model = models.build(self.config)
        self.model = self.placement.adopt(
            model,
            lambda model: models.compile_model(
                model, self.config, self.steps_per_epoch
            ),
        )
        if self.progress.checkpoint is not None:
            self.placement.restore(
                self.model,
                self.progress.checkpoint,
                lambda file: checkpoint.restore(
                    self.progress, self.model, file
                ),
            )

    def _announce(self) -> None:
        done = (
            f"{self.progress.epoch} of {self.config.epochs} epochs are trained"
        )
        if self.progress.partial.step:
            done += (
                f", and {self.progress.partial.step} of {self.steps_per_epoch} "
                "steps"
            )
        source = self.source
        images = (
            f"{source.training_images} training, {source.validation_images} "
            f"validation and {source.test_images if self.config.test else 0} "
            "test images"
        )
        if self.config.test and not source.test_images:
            images = (
                f"{source.training_images} training images and "
                f"{source.validation_images} for validation, which are tested "
                "on, too"
            )
        print(
            f"{self.config.method} on {self.config.dataset}: {images}; {done}."
        )
        whole = DATASETS[self.config.dataset].images
        if source.training_images < whole and self.config.test:
            print(
                f"This is a sample: {self.config.dataset} has {whole:,} "
                "training images. Its errors say nothing of the whole."
            )

    def _train(self) -> None:
        """Training, to the last epoch."""
        lengths = self.progress.lengths
        if lengths and lengths[-1] != self.config.epochs:
            lengths.append(self.config.epochs)
        if len(lengths) > 1:
            # Not what a run of this length in one piece would have been.
            self.recorded["lengths"] = lengths
        callbacks = self._callbacks()
        validation = self._evaluation(
            self.source.validation, self.source.validation_images
        )
        try:
            while not self._trained:
                fit(
                    self.model,
                    self.progress,
                    callbacks,
                    self._training,
                    validation,
                    self.steps_per_epoch,
                    self.config.epochs,
                    verbose=self.placement.chief,
                )
        except (Stopped, Diverged):
            for callback in callbacks:
                callback.on_train_end()
            raise

    def _training(self, first_step: int) -> Any:
        """The training batches from a step on, counted over all epochs."""
        return self.placement.feed(
            lambda share: self.source.training(
                share,
                batch_size=self.config.batch_size,
                steps_per_epoch=self.steps_per_epoch,
                seed=self.config.seed,
                first_step=first_step,
                epochs=self.config.epochs,
            )
        )

    def _evaluation(
        self, batches: Callable[[Share, int, int], Any], images: int
    ) -> dict[str, Any]:
        """What `evaluate` takes of a part of the data."""
        batch_size, steps = evaluation_steps(
            images,
            EVALUATION_BATCH_SIZE,
            self.placement.replicas,
            self.config.steps_per_execution,
        )
        return {
            "x": self.placement.feed(
                lambda share: batches(share, batch_size, steps)
            ),
            "steps": steps,
        }

    def _callbacks(self) -> list[keras.callbacks.Callback]:
        """The method's, those that look on, and what writes the folder."""
        callbacks = METHODS[self.config.method].callbacks()
        monitor = None
        if self.placement.measures:
            watching, monitor = self._watchers()
            callbacks += watching
        if self.placement.chief:
            callbacks.append(Console(self.config.epochs, self.steps_per_epoch))
        return [
            *callbacks,
            keras.callbacks.TerminateOnNaN(),
            writer.RunWriter(
                self.folder,
                self.recorded,
                self.progress,
                examples_per_epoch=self.steps_per_epoch
                * self.config.batch_size,
                metrics=models.metrics_of(self.config),
                monitor=monitor,
                minutes=self.config.checkpoint_minutes,
                keep=self.config.keep_checkpoints,
                terminated=lambda: self.termination.asked,
                agree=self.placement.agree,
                writes=self.placement.chief,
            ),
        ]

    def _watchers(
        self,
    ) -> tuple[list[keras.callbacks.Callback], AlignmentMonitor | None]:
        """The callbacks that look on; which of them measures alignment."""
        config = self.config
        curves = startup.installed("tensorflow", "tensorboard")
        callbacks, monitor = [], None
        if config.alignment_every:
            streamed = DATASETS[config.dataset].streamed
            monitor = AlignmentMonitor(
                probe=tuple(
                    self.source.probe(
                        PHOTO_PROBE_SIZE if streamed else PROBE_SIZE
                    )
                ),
                log_dir=str(self.folder)
                if curves and self.placement.chief
                else None,
                every=config.alignment_every,
            )
            callbacks.append(monitor)
        if curves:
            from experiment.board import Board

            callbacks.append(
                Board(
                    self.folder,
                    self.recorded,
                    config.alignment_every,
                    writes=self.placement.chief,
                )
            )
        elif self.placement.chief:
            print("No TensorBoard files: tensorflow or tensorboard is missing.")
        return callbacks, monitor

    def _test(self) -> dict[str, float]:
        """The accuracies on the test images, if they are to be looked at."""
        if not self.config.test:
            return {}
        if not self.source.test_images:
            # ImageNet's test labels are not public.
            last = self.progress.rows[-1]
            return {name: last[f"val_{name}"] for name in models.ACCURACIES}
        return self.model.evaluate(
            **self._evaluation(self.source.test, self.source.test_images),
            callbacks=[
                keras.callbacks.LambdaCallback(
                    on_test_batch_end=self._stop_if_asked
                )
            ],
            verbose=0,
            return_dict=True,
        )

    def _result(self, tests: dict[str, float]) -> dict[str, Any]:
        """What `result.json` holds."""
        last = self.progress.rows[-1]
        return {
            **self.recorded,
            **errors("test", tests),
            **errors("train", last),
            **errors("validation", last, "val_"),
            "seconds": round(self.progress.seconds, 2),
            "examples_per_second": round(self.progress.examples_per_second, 1),
            "steps_per_epoch": self.steps_per_epoch,
            "replicas": self.placement.replicas,
            "parameters": models.parameters(self.model),
            "versions": startup.versions(
                "keras_fa", "keras", self.config.backend
            ),
        }


def fit(
    model: keras.Model,
    progress: Progress,
    callbacks: list[keras.callbacks.Callback],
    training: Callable[[int], Any],
    validation: dict[str, Any],
    steps_per_epoch: int,
    epochs: int,
    verbose: bool,
) -> None:
    """Trains to the end, or, where an epoch was left inside, to its end.

    Args:
        model: The compiled model.
        progress: How far it is; the `RunWriter` among the callbacks adds to it.
        callbacks: Of the training.
        training: Gives the batches from a step on, counted over all epochs.
        validation: Batches and steps of the evaluation after each epoch.
        steps_per_epoch, epochs: Those of the whole run.
        verbose: Whether to tell how it goes.
    """
    done = progress.partial.step
    if done == steps_per_epoch:
        writer.finish_epoch(
            model,
            progress,
            callbacks,
            lambda events: model.evaluate(
                **validation, callbacks=events, verbose=0, return_dict=True
            ),
        )
        return
    if done:
        # It makes the metrics' variables, whose values are then put back.
        model.evaluate(
            validation["x"], steps=model.steps_per_execution, verbose=0
        )
    model.fit(
        training(progress.epoch * steps_per_epoch + done),
        validation_data=validation["x"],
        validation_steps=validation["steps"],
        epochs=epochs,
        initial_epoch=progress.epoch,
        steps_per_epoch=steps_per_epoch - done,
        callbacks=callbacks,
        shuffle=False,
        verbose=(1 if sys.stdout.isatty() else 2) if verbose else 0,
    )


def error(accuracy: float) -> float:
    """The share of wrong answers in percent."""
    return round(100 * (1 - accuracy), 4)


def errors(
    part: str, metrics: dict[str, float], prefix: str = ""
) -> dict[str, float | None]:
    """The entries of `result.json` on a part of the data.

    `None` if there are no accuracies, for it was not looked at.
    """
    found = {
        f"{part}_{kind}": error(metrics[prefix + name])
        for name, kind in models.ACCURACIES.items()
        if prefix + name in metrics
    }
    return found or {f"{part}_error": None}


def report(folder: Path, result: dict) -> None:
    """The last words on the console."""
    if result["test_error"] is None:
        print("The test images were not looked at.")
    else:
        print(
            f"Test error {result['test_error']:.2f} %{_top5(result)}"
            f"{_of_a_sample(result)}."
        )
    print(
        f"Training error {result['train_error']:.2f} %, validation error "
        f"{result['validation_error']:.2f} % after epoch {result['epochs']}, "
        f"{result['seconds']:.0f} s."
    )
    print(f"Run folder: {folder}")
    if startup.installed("tensorboard"):
        print(f"Curves: tensorboard --logdir {folder.parent}")


def _top5(result: dict) -> str:
    if result.get("test_top5_error") is None:
        return ""
    return f", top-5 {result['test_top5_error']:.2f} %"


def _of_a_sample(result: dict) -> str:
    images, dataset = result.get("training_images"), result["dataset"]
    if images is None or images >= DATASETS[dataset].images:
        return ""
    return f" on a sample, which says nothing of the whole of {dataset}"
