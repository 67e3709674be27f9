"""The demo's script on small settings: real processes, a real table, a real picture."""

import json
import subprocess
import sys
from pathlib import Path

import yaml
from conftest import ENVIRONMENT, ROOT, TINY

from snell_dist.config import load
from snell_dist.run_config import Run


def test_methods_are_compared_in_a_table_and_a_picture(tmp_path: Path) -> None:
    from PIL import Image

    small = [*TINY, "backbone.depth=3", "train.eval_every=3"]
    for name in ("demo/lora", "demo/linear"):
        config = load(name, small, Run).config.model_dump()
        config["method"] |= {"rank": 4} if name == "demo/lora" else {}
        (tmp_path / f"{Path(name).name}.yaml").write_text(yaml.safe_dump(config))
    done = subprocess.run(
        [sys.executable, ROOT / "profiling/demo.py", "lora.yaml", "linear.yaml"],
        env=ENVIRONMENT, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs/demo/001"
    report = json.loads((folder / "comparison.json").read_text())
    assert [r["method"] for r in report["results"]] == ["lora", "linear"]
    for r in report["results"]:
        assert f"{r['trainable_parameters']:,}" in done.stdout
        assert f"{r['test_accuracy']:.1%}" in (folder / "comparison.md").read_text()
    image = Image.open(folder / "comparison.png")
    assert image.width > 1000
    assert len(image.convert("RGB").getcolors(2**24)) > 100, "something is drawn"


def test_a_configuration_that_fails_ends_the_comparison_with_its_message(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "profiling/demo.py", "dmeo"],
        env=ENVIRONMENT, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "did you mean 'demo'?" in done.stderr
    assert not any(tmp_path.iterdir())
