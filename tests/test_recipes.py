"""Every released training script against the shipped configuration of the same name, field by field."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mini_layouts import write_fgvc, write_vtab

from snell_dist.anatomy import Backbone
from snell_dist.backbones import BackboneSection
from snell_dist.build import build
from snell_dist.config import CONFIGS, load, shipped
from snell_dist.data.fgvc import Fgvc
from snell_dist.data.vtab import Vtab
from snell_dist.feed import Feed, steps_per_epoch
from snell_dist.optim import lr_at
from snell_dist.run_config import Run
from snell_dist.train import check_gradients

GOLDEN = Path(__file__).parent / "golden"
RELEASED = yaml.safe_load((GOLDEN / "recipes.yaml").read_text())
COMMON = RELEASED["common"]
BENCHMARKS = "vtab", "fgvc"
RIVALS = {
    f"{benchmark}/{name}"
    for benchmark in BENCHMARKS
    for name in ("adapter", "bias", "full", "linear", "lora", "sparse")
}
# What a script need not say, and what it says of itself.
UNSAID = {"amp": COMMON["amp"], "ema_decay": None, "allocator": {"enabled": False}}
OF_ITSELF = {"script", "program", "note"}
TINY = [
    "backbone={weights: null, image_size: 16, patch_size: 8, width: 32, depth: 1, heads: 2}",
    "data.image_size=16", "data.workers=0",
]  # fmt: skip
METRICS = {"sensitivity": "ipt", "magnitude": "mag"}


def name_of(recipe: dict[str, Any]) -> str:
    """`vtab/cifar_snella32`: the script's folder, and the data set."""
    return f"{recipe['benchmark']}/{recipe['dataset']}_{recipe['script'].split('/')[2]}"


RECIPES = {name_of(recipe): recipe for recipe in RELEASED["recipes"]}
UNRELEASED = {
    f"vtab/{dataset}_snell{rank}" for group in RELEASED["vtab_groups"].values() for dataset in group for rank in (8, 16)
}
OURS = [name for name in shipped() if name.startswith(BENCHMARKS)]


def resolved(name: str, *overrides: str) -> Run:
    return load(name, overrides, Run).config


@functools.cache
def made(backbone: BackboneSection) -> Backbone:
    with torch.device("meta"):
        return backbone.make(5)


def words(config: Run) -> dict[str, Any]:
    """A configuration in the words of the scripts."""
    method: Any = config.method
    allocator = getattr(method, "allocator", None)
    allocated = {"enabled": allocator is not None}
    if allocator is not None:
        allocated |= {key: getattr(allocator, key) for key in ("target_sparsity", "init_warmup", "final_warmup")}
        allocated |= {"mask_interval": allocator.interval, "beta1": allocator.beta1, "beta2": allocator.beta2}
        allocated |= {"metric": METRICS[allocator.metric]}
    return {
        "benchmark": config.data.name,
        "dataset": config.data.dataset,
        "method": method.name,
        "rank": method.rank,
        "sparsity": 0 if method.name == "mixk" else method.sparsity,  # it has no such key, and keeps all
        "lr": config.optim.lr,
        "weight_decay": config.optim.weight_decay,
        "batch_size": config.data.batch_size,
        "epochs": config.train.epochs,
        "val_interval": config.train.eval_epochs,
        "allocator": allocated,
        "ema_decay": config.optim.ema_decay,
        "amp": config.precision.compute == "bfloat16",
    }


def common_words(config: Run) -> dict[str, Any]:
    """What all scripts share, in their words; the data's part is in the tests of the data."""
    backbone, method, optim, task = (getattr(config, key) for key in ("backbone", "method", "optim", "task"))
    assert backbone.name == "vit" and backbone.head == "new"
    model = made(backbone)
    assert {model.image_shape, (3, config.data.image_size, config.data.image_size)} == {(3, 224, 224)}
    assert config.method.sparsify == "released" if hasattr(config.method, "sparsify") else method.name == "mixk"
    assert method.dropout_on == ["q", "k", "v", "fc1", "fc2"], "the input of proj's delta is not dropped"
    assert config.data.normalisation == "imagenet", RELEASED[config.data.name]["normalise"]
    assert config.data.name == "vtab" or config.data.augment
    return {
        "model": f"{model.name}_in21k",
        "weights": f"{backbone.weights} (supervised, ImageNet-21k)",
        "image_size": config.data.image_size,
        "optimizer": optim.name,
        "betas": optim.betas,
        "eps": optim.eps,
        "warmup_epochs": optim.warmup_epochs,
        "warmup_lr": optim.warmup_lr,
        "min_lr": optim.min_lr,
        "schedule": {"cosine_epochs": "cosine, stepped once an epoch"}[optim.schedule],
        "clip_grad": optim.clip_norm,
        "drop_path": backbone.drop_path,
        "adapter_dropout": method.dropout,
        "delta_drop_path": method.drop_path,
        "mixup": task.mixup,
        "cutmix": task.cutmix,
        "label_smoothing": task.label_smoothing,
        "seed": config.train.seed,
        "workers": config.data.workers,
        "drop_last": steps_per_epoch(range(1000), 16) == 1000 // 16,
    }


@pytest.mark.parametrize("name", RECIPES)
def test_every_field_of_every_script(name: str) -> None:
    recipe, config = RECIPES[name], resolved(name)
    expected = {key: value for key, value in (UNSAID | recipe).items() if key not in OF_ITSELF}
    if not expected["allocator"]["enabled"]:  # its other words have no effect
        expected["allocator"] = {"enabled": False}
    assert words(config) == expected
    ema = recipe["program"] == "train_alloc_ema.py"
    assert (config.optim.ema_decay is not None) == ema
    if expected["allocator"]["enabled"]:  # that program allocates for 100 epochs, the other one for all
        assert config.method.allocator.epochs == (100 if ema else None)
    lines = (CONFIGS / f"{name}.yaml").read_text().splitlines()
    assert lines[0] == f"# snell train {name} data.root=DIR"
    assert lines[1].endswith(f"source: {recipe['script']}")


@pytest.mark.parametrize("name", RECIPES)
def test_what_all_scripts_share(name: str) -> None:
    """But amp, which some switch on, the looks at test, and the cool-down, which comes after the last epoch."""
    config = resolved(name)
    elsewhere = {"amp", "cooldown_epochs", "trained_on", "evaluated_on"}
    assert common_words(config) == {key: value for key, value in COMMON.items() if key not in elsewhere}
    assert json.loads((GOLDEN / "lr_schedule.json").read_text())["cooldown_epochs"] == COMMON["cooldown_epochs"]
    assert config.protocol.select == "val", "the default"
    released = resolved(name, "protocol.select=paper_compat")
    assert released.protocol.looks_at == COMMON["evaluated_on"]
    looks = [epoch for epoch in range(1, config.train.epochs + 1) if config.train.looks(epoch * 63, 63)]
    wanted = {*range(0, config.train.epochs + 1, RECIPES[name]["val_interval"])} - {0}
    assert looks == sorted(wanted | {*range(config.train.epochs - 9, config.train.epochs + 1)})


def test_there_are_all_scripts_and_no_others() -> None:
    assert len(RECIPES) == len(RELEASED["recipes"]) == 48
    assert set(OURS) == {*RECIPES} | UNRELEASED | RIVALS | {"vtab/default", "fgvc/default"}
    for name in UNRELEASED:
        base, rank = name.rsplit("_snell", 1)
        settings = [resolved(each).model_dump() for each in (name, f"{base}_snell32")]
        assert settings[0]["method"].pop("rank") == int(rank)
        assert settings[1]["method"].pop("rank") == 32
        assert settings[0] == settings[1]


@pytest.mark.parametrize("name", sorted(RIVALS))
def test_rivals_have_the_settings_of_the_papers_text(name: str) -> None:
    config = resolved(name)
    benchmark, method = name.split("/")
    assert (config.data.name, config.method.name) == (benchmark, method)
    assert config.method.model_dump().get("rank", 8) == 8
    assert config.optim.lr == (1e-4 if method == "full" else 1e-3)
    assert (config.optim.weight_decay, config.data.batch_size, config.train.epochs) == (1e-4, 32, 100)


def test_classes_and_groups_are_the_benchmarks_own() -> None:
    own = {**Vtab.classes, **Fgvc.classes}
    assert own == RELEASED["classes"]
    assert list(Vtab.classes) == [dataset for group in RELEASED["vtab_groups"].values() for dataset in group]
    assert {recipe["dataset"] for recipe in RELEASED["recipes"]} == own.keys()


@pytest.fixture(scope="module")
def miniature(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every data set in its true layout, with a few images in each split."""
    root = tmp_path_factory.mktemp("data")
    write_vtab(root / "vtab", Vtab.classes, train=4, val=2, test=2)
    write_fgvc(root / "fgvc", Fgvc.classes, train=4, val=2, test=2)
    return root


@pytest.mark.parametrize("name", [name for name in OURS if name not in UNRELEASED])
def test_every_one_trains_a_step(name: str, miniature: Path) -> None:
    config = resolved(name, *TINY, f"data.root={miniature / name.split('/')[0]}")
    built = build(config, None, torch.device("cpu"))
    assert len(built.splits.classes) == RELEASED["classes"][config.data.dataset]
    built.engine.model.train()
    loss = built.task.step(built.engine, Feed(built.splits.train, config.data, 0, 0, 1).step())
    assert loss.isfinite() and loss > 0
    check_gradients(built)
    built.engine.step(lr_at(config.optim, 0, built.steps, built.steps_per_epoch))
