"""A finished run, away from its processes: its model built again, or its plain weights, one at a time.

`Folded` is what the formats of `snell export` are written from. Where the base's file says all that the model needs,
nothing of the base is held: each weight is read when it is asked for, its delta is added, and it is forgotten.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from snell_dist import adapter, dist, methods, precision, run_folder, weights
from snell_dist.adapted import AdaptedLinear
from snell_dist.anatomy import Backbone, fingerprint, fingerprint_of
from snell_dist.config import UserError, load
from snell_dist.data import Preprocessing
from snell_dist.packed import Kind, PackedLinear, plain
from snell_dist.run_config import Run
from snell_dist.tensor_files import read_metadata, read_tensors

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Finished:
    """What a complete run folder holds."""

    folder: Path
    config: Run
    summary: Mapping[str, Any]
    tensors: Mapping[str, Tensor]  # what trained, and what its method remembers
    preprocessing: Preprocessing

    @property
    def classes(self) -> list[str]:
        return self.summary["classes"]

    @property
    def prepare(self) -> Callable[[Image.Image], Tensor]:
        """From a picture to what the model takes [C, H, W]."""
        from snell_dist.data import _transforms

        return _transforms.Prepare(self.preprocessing.channels, _transforms.plain(self.preprocessing))

    @property
    def base_sha256(self) -> str:
        return self.summary["base_sha256"]

    @cached_property
    def weights(self) -> str | None:
        """Where the base's are. UserError where they are no longer there."""
        said = self.summary["base_weights"]
        if said is not None and weights.is_gone(said):
            where = f"is not where it was (seen from {Path.cwd()})"
            raise UserError(f"{self.folder}: its base {said} {where}: put it back, or go where the run was started")
        return said

    def empty(self) -> Backbone:
        """The model without numbers, on the meta device, and nothing of the method in it."""
        nothing = self.config.backbone.model_copy(update={"weights": None, "head": "new"})
        with torch.device("meta"):
            return self.config.task.build(nothing, self.classes)

    def base(self) -> Backbone:
        """The model with the base's numbers, in memory. UserError where they are not those of the run."""
        dist.seed_everything(self.config.train.seed)  # of what no file fills
        section = self.config.backbone.model_copy(update={"weights": self.weights})
        backbone = self.config.task.build(section, self.classes)
        self.check_base(fingerprint(backbone.model, backbone.head))
        return backbone

    def check_base(self, found: str) -> None:
        if found != self.base_sha256:
            hashes = f"{self.base_sha256[:12]}, and {self.summary['base_weights']} gives {found[:12]}"
            raise UserError(f"{self.folder}: was trained on base weights {hashes}: is it another model's file?")

    def backbone(self) -> Backbone:
        """The adapted model, evaluating, on the CPU; stored as the run stored it, computing in float32."""
        backbone = self.base()
        self.config.method.inject(backbone)
        self.check_tensors(backbone)
        precision.apply(self.config.precision, backbone.model, self.trained(backbone))
        for tensor in (*backbone.model.parameters(), *backbone.model.buffers()):
            if tensor.is_floating_point():
                tensor.data = tensor.data.float()
        state = backbone.model.state_dict()
        with torch.no_grad():
            for name, tensor in self.tensors.items():
                state[name].copy_(tensor)
        backbone.model.eval()
        return backbone

    def check_tensors(self, injected: Backbone) -> None:
        """UserError where the adapter file is not of this configuration, or of another number of classes."""
        shapes = {name: list(tensor.shape) for name, tensor in injected.model.state_dict().items()}
        for name, tensor in self.tensors.items():
            if shapes.get(name) != list(tensor.shape):
                made = f"{len(self.classes)} classes make {shapes[name]}" if name in shapes else "make none such"
                said = f"{self.folder / adapter.ADAPTER}: has {name} {list(tensor.shape)}, but config.yaml and"
                raise UserError(f"{said} {made}")

    def trained(self, injected: Backbone) -> list[str]:
        return self.config.method.trainable(injected)


def read(folder: Path) -> Finished:
    """UserError where the folder is not that of a complete run."""
    config = load(str(run_folder.config_of(folder)), [], Run).config
    if not run_folder.is_complete(folder):
        raise UserError(f"{folder}: the run is not complete; snell status {folder} says how far it is")
    summary, file = run_folder.read_summary(folder), folder / adapter.ADAPTER
    tensors = read_tensors(file)
    if read_metadata(file).get("format") != adapter.FORMAT:
        raise UserError(f"{file}: not an adapter file of this version")
    if not summary.get("preprocessing"):
        raise UserError(f"{folder}: does not say how its images are prepared, since an older version made it")
    said = summary["preprocessing"]
    preprocessing = Preprocessing(**{**said, "mean": tuple(said["mean"]), "std": tuple(said["std"])})
    return Finished(folder, config, summary, tensors, preprocessing)


class Folded(Mapping[str, Tensor]):
    """The plain weights of a finished run under our names for the model's, every delta added; each is made when it is
    asked for. float32. `shapes`: the same without numbers, on the meta device.

    Raises UserError where no plain weight can hold what the method adds, and where the base is not the run's.
    """

    def __init__(self, run: Finished) -> None:
        self._run = run
        empty, injected = run.empty(), run.empty()
        self.shapes = {name: _float32(tensor) for name, tensor in empty.model.state_dict().items()}
        with torch.device("meta"):
            run.config.method.inject(injected)
        methods.check_mergeable(injected.model)
        run.check_tensors(injected)
        self._stored = _stored(run, injected)
        self._model = injected.model
        self._base = _numbers(run, empty)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    @torch.no_grad()
    def __getitem__(self, name: str) -> Tensor:
        if name in self._run.tensors:
            return self._run.tensors[name]
        tensor = self._base[name].to(self.shapes[name].dtype)
        path, _, leaf = name.rpartition(".")
        module = self._model.get_submodule(path)
        kind = self._stored.get(name)
        if kind == "bfloat16":
            tensor = tensor.bfloat16().float()
        packing = None if kind == "bfloat16" else kind
        if leaf == "weight" and isinstance(module, AdaptedLinear):
            return self._merged(path, module, tensor, packing)
        return PackedLinear(plain(tensor, None), packing).merged().weight if packing else tensor

    @torch.no_grad()
    def deltas(self) -> Iterator[tuple[str, Tensor]]:
        """The names of the adapted weights, and what is added to each of them, whole [out, in].

        Where the base is kept in float32, `self[name]` is the base's weight plus this, to the bit.
        """
        for path, layer in methods.adapted_layers(self._model):
            yield f"{path}.weight", self._merged(path, layer, torch.zeros(layer.weight.shape), None)

    def _merged(self, path: str, empty: AdaptedLinear, weight: Tensor, packing: Kind | None) -> Tensor:
        layer = copy.deepcopy(empty)
        layer.bias = None  # type: ignore[assignment]
        own = {name: self._run.tensors[f"{path}.{name}"] for name in (*empty.factor_names, *empty.buffer_names)}
        layer.load_state_dict({"weight": weight, **own}, assign=True)
        if packing:
            layer.pack(packing)
        return layer.merged().weight


def in_dtype(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Those of floating point in another dtype."""
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def _float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _numbers(run: Finished, empty: Backbone) -> Mapping[str, Tensor]:
    """The base's tensors by name, still in their file where that has all of them."""
    section, said = run.config.backbone, run.weights
    if said is not None and section.head != "zeroshot":
        keep = section.head == "file"
        ready, _ = weights.fitted(
            empty.model, section.published(said), head=empty.head, keep_head=keep, least=section.min_match
        )
        shapes = empty.model.state_dict()
        new = tuple(f"{name}." for name in empty.head)  # the classifier, which the run trained
        if all(name in run.tensors and name.startswith(new) for name in shapes.keys() - ready.keys()):
            entries = ((name, ready[name].to(shapes[name].dtype)) for name in shapes if name in ready)
            run.check_base(fingerprint_of(entries, empty.head))
            return ready
    return run.base().model.state_dict()


def _stored(run: Finished, injected: Backbone) -> dict[str, Literal["bfloat16", "int8", "nf4"]]:
    """Weights that the run kept in fewer bits, and in which; see `precision.apply`."""
    said, trained = run.config.precision, set(run.trained(injected))
    packed = said.frozen if said.frozen in ("int8", "nf4") else None
    halved: Literal["bfloat16"] | None = "bfloat16" if said.compute == "bfloat16" and said.frozen != "float32" else None
    found = {}
    for path, module in injected.model.named_modules():
        name = f"{path}.weight".removeprefix(".")
        kind = packed if packed and isinstance(module, nn.Linear) else halved
        if kind and isinstance(module, (nn.Linear, nn.Conv2d, nn.Embedding)) and name not in trained:
            found[name] = kind
    return found
