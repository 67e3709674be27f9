from pathlib import Path

import pytest
import torch
from conftest import TINY, train, trained

from snell_dist.checkpoint import ADAPTER, load_adapter, read_metadata, save
from snell_dist.config import UserError, load
from snell_dist.run_config import Run


def test_an_adapter_file_gives_the_same_logits_on_the_same_base(tmp_path: Path) -> None:
    from snell_dist.build import build

    outcome = train(tmp_path, "method.rank=4")
    assert outcome.folder is not None
    config = load(str(outcome.folder / "config.yaml"), [], Run).config
    built = build(config, None, torch.device("cpu"))
    load_adapter(outcome.folder / ADAPTER, built.engine.model, built.fingerprint)
    measured = built.task.evaluate(built.engine, built.splits.test, config.data)
    assert measured.metrics["accuracy"] == outcome.summary["test_accuracy"]
    metadata = read_metadata(outcome.folder / ADAPTER)
    assert metadata["base_sha256"] == built.fingerprint
    assert metadata["classes"] == '["five", "six", "seven", "eight", "nine"]'
    assert '"rank":4' in metadata["method"]

    with pytest.raises(UserError, match=r"was trained on .* not 000000000000"):
        load_adapter(outcome.folder / ADAPTER, built.engine.model, "0" * 64)
    other = build(load("demo/lora", [*TINY, "method.rank=2"], Run).config, None, torch.device("cpu"))
    with pytest.raises(UserError, match="does not fit this model"):
        load_adapter(outcome.folder / ADAPTER, other.engine.model)
    (tmp_path / "broken").write_bytes((outcome.folder / ADAPTER).read_bytes()[:900])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        load_adapter(tmp_path / "broken", built.engine.model)
    with pytest.raises(UserError, match="not an adapter file"):
        load_adapter(outcome.folder / "checkpoints/step_00000006/state.safetensors", built.engine.model)


def test_an_adapter_holds_what_trains_and_nothing_else(tmp_path: Path) -> None:
    names = set(trained(train(tmp_path, "method.rank=4").folder))
    factors = {
        f"blocks.{i}.{layer}.{f}"
        for i in (0, 1)
        for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
        for f in "ab"
    }
    assert names == factors | {"head.weight", "head.bias", "cls_token"}


def test_a_checkpoint_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer that fails half-way leaves the older checkpoint as the newest one."""
    from snell_dist import checkpoint
    from snell_dist.build import build

    built = build(load("demo", [*TINY, "method.rank=4"], Run).config, None, torch.device("cpu"))
    save(tmp_path, built.engine.state(), 2, keep=2)

    def fails(path: Path) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "_sync", fails)
        with pytest.raises(OSError, match="no space"):
            save(tmp_path, built.engine.state(), 4, keep=2)
    assert checkpoint.newest(tmp_path)[0] == 2
    save(tmp_path, built.engine.state(), 4, keep=2)
    save(tmp_path, built.engine.state(), 6, keep=2)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step_00000004", "step_00000006"]


def test_another_configurations_checkpoint_is_refused(tmp_path: Path) -> None:
    from snell_dist.build import build
    from snell_dist.checkpoint import newest

    snell = build(load("demo", [*TINY, "method.rank=4"], Run).config, None, torch.device("cpu"))
    linear = build(load("demo/linear", TINY, Run).config, None, torch.device("cpu"))
    save(tmp_path, snell.engine.state(), 2, keep=2)
    with pytest.raises(UserError, match="another run's"):
        linear.engine.load_state(newest(tmp_path)[1])
