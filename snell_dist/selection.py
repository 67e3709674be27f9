"""Which weights a run reports: those of its best look, kept in a file from look to look; see protocol.py."""

from __future__ import annotations

from pathlib import Path

from snell_dist import dist
from snell_dist.checkpoint import read_metadata, read_tensors, write_tensors
from snell_dist.engines import Engine
from snell_dist.protocol import Protocol


class Selection:
    """The best look so far, in `best.safetensors` of the run folder, so that a resumed run knows it too."""

    def __init__(self, protocol: Protocol, folder: Path, steps: int) -> None:
        self._protocol, self._steps = protocol, steps
        self._file = folder / "best.safetensors"
        known = read_metadata(self._file) if self._file.exists() else {"step": "0", "accuracy": "-1"}
        self.step, self.accuracy = int(known["step"]), float(known["accuracy"])

    def consider(self, engine: Engine, done: int, accuracy: float) -> None:
        """After a look at the weights in force, `done` steps done; the earlier of two equals stays."""
        if not (done == self._steps if self._protocol.select == "last" else accuracy > self.accuracy):
            return
        self.step, self.accuracy = done, accuracy
        state = {name: tensor for name, tensor in engine.state().items() if name.startswith("model/")}
        if dist.rank() == 0:
            write_tensors(self._file, state, {"step": str(done), "accuracy": repr(accuracy)})
        dist.barrier()

    def restore(self, engine: Engine) -> None:
        """Puts the selected weights in force, at the end of training."""
        engine.load_state(read_tensors(self._file))
