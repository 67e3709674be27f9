"""A finished run's folder without its training: a random base in a file, and random numbers for what would train."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from snell_dist import adapter, methods, run_folder
from snell_dist.anatomy import fingerprint
from snell_dist.config import check
from snell_dist.data import Preprocessing
from snell_dist.run_config import Run

CLASSES = "two words", "b", "c"
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def finish(
    folder: Path, backbone: Mapping[str, Any], method: Mapping[str, Any], *, task: str = "classify",
    classes: Sequence[str] = CLASSES, scale: float = 0.2, resize: str = "squeeze", **sections: Any,
) -> Path:  # fmt: skip
    """Writes the folder, with the base's weights beside it. The base's are normal of deviation `scale`, vectors about
    1; what trains is that far from where it starts. Returns the folder.
    """
    torch.manual_seed(len(classes))
    said = {"name": "digits", "image_size": 8}
    sections = {"data": said, "task": {"name": task}, "train": {"steps": 1}, **sections}
    config = check({"backbone": dict(backbone), "method": dict(method), **sections}, Run)
    base = folder.with_name(f"{folder.name}.base.safetensors")
    base.parent.mkdir(parents=True, exist_ok=True)
    family = config.backbone
    bare = family.towers() if family.head == "zeroshot" else config.task.build(family, list(classes))  # type: ignore[comparison-overlap]
    for tensor in bare.model.state_dict().values():
        if tensor.is_floating_point():
            tensor.normal_(0, scale).add_(1.0 if tensor.ndim < 2 else 0.0)
    save_file({family.library_name(name): t.contiguous() for name, t in bare.model.state_dict().items()}, base)
    family = family.model_copy(update={"weights": str(base.resolve())})
    config = config.model_copy(update={"backbone": family})
    built = config.task.build(family, list(classes))
    identity = fingerprint(built.model, built.head)
    config.method.inject(built)
    names = config.method.trainable(built)
    for name, parameter in built.model.named_parameters():
        if name in names:
            parameter.data.add_(scale * torch.randn_like(parameter))
    for buffer in methods.remembered(built.model).values():
        buffer.copy_(torch.rand(buffer.shape) < 0.1 if buffer.dtype == torch.bool else buffer)
    state = built.model.state_dict()
    kept = {name: state[name] for name in [*names, *methods.remembered(built.model)]}
    run_folder.create(folder.parent, folder.name, config, folder)
    belongs = adapter.Belongs(built.name, identity, config.method.model_dump(), list(classes))
    adapter.save(folder / adapter.ADAPTER, kept, belongs)
    channels, size, _ = built.image_shape
    preprocessing = Preprocessing(size, channels, resize, "bicubic", MEAN[:channels], STD[:channels])  # type: ignore[arg-type]
    summary = {
        "method": config.method.name, "base": built.name, "base_weights": str(base.resolve()),
        "base_sha256": identity, "classes": list(classes), "preprocessing": asdict(preprocessing),
        "trainable_parameters": sum(kept[name].numel() for name in names),
        "parameters": sum(tensor.numel() for tensor in state.values()), "test_accuracy": 1 / len(classes),
        "protocol": {
            "dataset": "made-up images", "select": "last", "chosen": "no step was made", "marked": False,
            "test_looks": 0, "steps": 0, "epochs": 0.0, "seed": 0, "batch_size": 1, "world_size": 1,
        },
    }  # fmt: skip
    run_folder.write_summary(folder, summary)
    return folder
