"""What an engine cannot do is said in one line, with the key and what is allowed, before anything is written."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from conftest import train

from snell_dist.config import ConfigError

ZERO, FSDP = ["engine.name=zero"], ["engine.name=fsdp"]


def said(tmp_path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        train(tmp_path / "out", "method.rank=4", *overrides)
    assert not (tmp_path / "out").exists()
    return str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([*ZERO, "engine.stage=4"], "engine.stage = 4: unknown value (allowed: 0, 1, 2, 3)"),
        ([*ZERO, "engine.stage=1", "engine.frozen=shard"], "frozen: shard: stage 1 allows replicate"),
        ([*ZERO, "engine.stage=3", "engine.frozen=replicate"], "stage 3 allows shard or offload"),
        ([*ZERO, "engine.stage=0", "engine.offload_optimizer=true"], "offload_optimizer needs stage 1, 2 or 3"),
        ([*ZERO, "engine.nvme_path=/tmp"], "nvme_path needs offload_optimizer: true or frozen: offload"),
        ([*ZERO, "precision.compute=float64"], "precision.compute = 'float64': DeepSpeed reduces no float64"),
        ([*ZERO, "engine.stage=3", "precision.frozen=int8"], "precision.frozen = 'int8': cannot be sharded: use"),
        ([*ZERO, "engine.stage=3", "optim.ema_decay=0.9"], "optim.ema_decay = 0.9: no moving average of what ZeRO-3"),
        ([*ZERO, "engine.stage=1", "optim.name=adamw8bit"], "optim.name = 'adamw8bit': cannot be divided among ranks"),
        ([*FSDP, "engine.replicas=2"], "engine.replicas = 2: must divide world_size 1"),
        ([*FSDP, "precision.frozen=nf4"], "precision.frozen = 'nf4': cannot be sharded: say engine.frozen=replicate"),
        ([*FSDP, "optim.name=adamw8bit"], "optim.name = 'adamw8bit': cannot be sharded: use adamw or engine.name=ddp"),
        (["engine.name=fspd"], "engine.name = 'fspd': unknown name, did you mean 'fsdp'?"),
    ],
)
def test_settings_that_do_not_fit(overrides: list[str], message: str, tmp_path: Path) -> None:
    (line,) = said(tmp_path, *overrides).splitlines()
    assert message in line


@pytest.mark.parametrize(
    ("extra", "lines"),
    [
        ("{optimizer: {type: Adam}}", ["engine.deepspeed_extra.optimizer: is ours: say optim"]),
        (
            "{gradient_clipping: 1.0, zero_optimization: {stage: 1}}",
            ["gradient_clipping: is ours: say optim.clip_norm", "zero_optimization.stage: is ours: say engine.stage"],
        ),
        ("{wall_clock_brakedown: true}", ["wall_clock_brakedown: DeepSpeed does not know this key, did you mean"]),
        ("{zero_optimization: {reduce_bucket_sise: 5}}", ["DeepSpeed refuses: reduce_bucket_sise: "]),
        ("{zero_optimization: {reduce_bucket_size: many}}", ["DeepSpeed refuses: reduce_bucket_size: "]),
    ],
)
def test_deepspeeds_keys_are_ours_or_known(extra: str, lines: list[str], tmp_path: Path) -> None:
    found = said(tmp_path, *ZERO, f"engine.deepspeed_extra={extra}").splitlines()
    assert len(found) == len(lines), found
    assert all(expected in line for expected, line in zip(lines, found, strict=True))


def test_a_known_key_is_passed_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(tmp_path, "method.rank=4", *ZERO, "engine.deepspeed_extra={zero_optimization: {reduce_bucket_size: 4096}}")
    assert '"reduce_bucket_size": 4096' in caplog.text


def test_a_missing_or_broken_deepspeed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A version that is not installed here can only be pretended."""
    import deepspeed

    monkeypatch.setattr(deepspeed, "__version__", "0.19.2")
    message = said(tmp_path, *ZERO, "engine.stage=3")
    assert "engine.stage = 3: DeepSpeed 0.19.2 fails on frozen parameters in recomputed blocks" in message
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    assert "engine.name = 'zero': needs DeepSpeed: pip install 'snell_dist[deepspeed]'" in said(tmp_path, *ZERO)


def test_deepspeed_without_a_launcher_leaves_no_sign_of_one(tmp_path: Path) -> None:
    """accelerate would join a group of ranks that are not there."""
    train(tmp_path, "engine.name=zero", "engine.stage=1")
    assert "LOCAL_RANK" not in os.environ
