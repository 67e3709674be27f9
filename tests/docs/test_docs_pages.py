"""The pages say what is so: what they tell readers to type is carried out, or at least understood."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ENVIRONMENT, ROOT
from pages import blocks, carry_out, commands, pages
from safetensors.torch import load_file

from snell_dist import cli
from snell_dist.config import load, shipped
from snell_dist.run_config import Run

CARRIED_OUT = "tutorial", "own_data", "method"


def test_pages_build_without_a_warning(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "--quiet", "docs", tmp_path / "html"],
        cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    settings = (tmp_path / "html/reference/settings.html").read_text()
    assert all(key in settings for key in ("method.sparsity", "backbone.min_match", "engine.offload_optimizer"))
    assert "snell checkpoint verify" in (tmp_path / "html/reference/commands.html").read_text()
    assert not [page for page in (tmp_path / "html").rglob("*.html") if 'src="http' in page.read_text()], (
        "a page loads from elsewhere"
    )


def test_readme_points_at_what_is_there() -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)", (ROOT / "README.md").read_text())
    assert len(links) > 10
    assert not [link for link in links if not (ROOT / link).exists()]


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_command_on_a_page_is_one(page: Path) -> None:
    for block, words in commands(page):
        try:
            args = cli._parse(words)
        except SystemExit as error:
            assert not error.code, f"{block}: snell {' '.join(words)}"
            continue
        if page.stem not in CARRIED_OUT and getattr(args, "config", None) in shipped():
            load(args.config, getattr(args, "overrides", []), Run)


def test_the_tutorial_does_what_it_says(tmp_path: Path) -> None:
    carry_out(ROOT / "docs/tutorial.md", tmp_path)


def test_own_images_are_trained_on_as_the_page_says(tmp_path: Path) -> None:
    carry_out(ROOT / "docs/howto/own_data.md", tmp_path)


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_configuration_on_a_page_is_one(page: Path, tmp_path: Path) -> None:
    for block in blocks(page):
        if name := block.file:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(block.text)
            if name.endswith(".yaml"):
                load(str(tmp_path / name), [], Run)


def test_a_method_of_ones_own_is_one_file(tmp_path: Path) -> None:
    for folder in ("snell_dist", "configs", "launch"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    carry_out(ROOT / "docs/howto/method.md", tmp_path, package=tmp_path)
    trained = load_file(tmp_path / "scaled/adapter.safetensors")
    assert trained["blocks.0.mlp.fc1.s"].abs().max() > 0, "it trains"
