"""What the comments of configs/scale say of memory is what is predicted today."""

from __future__ import annotations

from pathlib import Path

import pytest
import scale_memory

from snell_dist.config import CONFIGS, load
from snell_dist.memory.gpus import find
from snell_dist.run_config import Run

FILES = scale_memory.files()
MODELS = {"vit_l", "vit_h", "clip_l", "clip_h", "clip_bigg", "vit_22b"}


def test_every_model_is_there_on_one_gpu_and_on_many() -> None:
    assert {file.stem for file in FILES} == {f"{model}_{gpus}" for model in MODELS for gpus in (1, 8, 64, 1024)}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_comment_is_the_prediction(file: Path) -> None:
    said = scale_memory.second_line(file)
    assert said == scale_memory.predicted(file), "python profiling/scale_memory.py --write brings it up to date"
    match = scale_memory.SAID.fullmatch(said)
    assert match is not None and match["config"] == f"scale/{file.stem}"
    assert float(match["needs"]) <= find(match["gpu"], None).memory / 2**30


def test_the_papers_setting_can_be_swept() -> None:
    for method in ("snell", "lora", "sparse", "full"):
        overrides = [f"method.name={method}", "method.rank=8", "backbone.size=huge"]
        config = load(str(CONFIGS / "scale/paper_memory.yaml"), overrides, Run, sweeping=True).config
        assert config.method.name == method and getattr(config.method, "rank", 8) == 8
