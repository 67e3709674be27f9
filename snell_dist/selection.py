"""Which weights a run reports: those of its best look, kept in a file from look to look; see protocol.py.

With `optim.ema_decay` the weights that are looked at are their moving average.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

from torch import Tensor

from snell_dist import dist
from snell_dist.build import Built
from snell_dist.ema import Average
from snell_dist.engines import Saved
from snell_dist.run_config import Run
from snell_dist.tensor_files import read_metadata, read_tensors, write_tensors


class Selection:
    """The best look so far, in `best.safetensors` of the run folder, so that a resumed run knows it too."""

    def __init__(self, config: Run, folder: Path, built: Built) -> None:
        self._config, self._built = config, built
        self._file = folder / "best.safetensors"
        known = read_metadata(self._file) if self._file.exists() else {"step": "0", "accuracy": "-1"}
        self.step, self.accuracy = int(known["step"]), float(known["accuracy"])
        decay = config.optim.ema_decay
        trains = {name: built.engine.model.get_parameter(name) for name in built.trainable}
        self._average = Average(trains, decay) if decay else None

    def after_step(self) -> None:
        if self._average:
            self._average.update()

    def look(self, done: int) -> dict[str, float]:
        """Measures the weights after `done` steps on the images that the protocol chooses by, and keeps the best.

        Empty where those images were trained on.
        """
        built, where = self._built, self._config.protocol.looks_at
        found: dict[str, float] = {}
        with self._average.in_force() if self._average else nullcontext():
            if where == "test" or not built.splits.val_trains:
                found = built.task.evaluate(built.engine, getattr(built.splits, where), self._config.data).metrics
            self.consider(done, found.get("accuracy", 0.0))
        return {f"{where}_{name}": value for name, value in found.items()}

    def consider(self, done: int, accuracy: float) -> None:
        """Keeps the weights in force if they are the choice so far; the earlier of two equals stays."""
        last = self._config.protocol.select == "last"
        if not (done == self._built.steps if last else accuracy > self.accuracy):
            return
        self.step, self.accuracy = done, accuracy
        said = {"step": str(done), "accuracy": repr(accuracy)}
        weights = dict(self._built.engine.weights())
        dist.first_does(lambda: write_tensors(self._file, weights, said))

    def restore(self) -> None:
        """Puts the selected weights in force, at the end of training."""
        self._built.engine.load_weights(read_tensors(self._file))

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs besides the file."""
        return self._average.state() if self._average else {}

    def load_state(self, saved: Saved) -> None:
        if self._average:
            self._average.load_state(saved)
