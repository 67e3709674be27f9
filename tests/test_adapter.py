"""The adapter file: small, whole, and only for the base that it was trained on."""

from pathlib import Path

import pytest
import torch
from conftest import TINY, train, trained

from snell_dist.adapter import ADAPTER, load
from snell_dist.build import build
from snell_dist.config import UserError
from snell_dist.config import load as load_config
from snell_dist.run_config import Run
from snell_dist.tensor_files import read_metadata


def test_an_adapter_file_gives_the_same_logits_on_the_same_base(tmp_path: Path) -> None:
    outcome = train(tmp_path, "method.rank=4")
    assert outcome.folder is not None
    file = outcome.folder / ADAPTER
    config = load_config(str(outcome.folder / "config.yaml"), [], Run).config
    built = build(config, None, torch.device("cpu"))
    built.engine.load_weights(load(file, built.engine.weights(), built.fingerprint))
    measured = built.task.evaluate(built.engine, built.splits.test, config.data)
    assert measured.metrics["accuracy"] == outcome.summary["test_accuracy"]
    metadata = read_metadata(file)
    assert metadata["base_sha256"] == built.fingerprint
    assert metadata["classes"] == '["five", "six", "seven", "eight", "nine"]'
    assert '"rank":4' in metadata["method"]

    with pytest.raises(UserError, match=r"was trained on .* not 000000000000"):
        load(file, built.engine.weights(), "0" * 64)
    other = build(load_config("demo/lora", [*TINY, "method.rank=2"], Run).config, None, torch.device("cpu"))
    with pytest.raises(UserError, match="does not fit this model"):
        load(file, other.engine.weights())
    (tmp_path / "broken").write_bytes(file.read_bytes()[:900])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        load(tmp_path / "broken", built.engine.weights())
    with pytest.raises(UserError, match="not an adapter file"):
        load(outcome.folder / "best.safetensors", built.engine.weights())


def test_an_adapter_holds_what_trains_and_nothing_else(tmp_path: Path) -> None:
    names = set(trained(train(tmp_path, "method.rank=4").folder))
    factors = {
        f"blocks.{i}.{layer}.{f}"
        for i in (0, 1)
        for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
        for f in "ab"
    }
    assert names == factors | {"head.weight", "head.bias", "cls_token"}
