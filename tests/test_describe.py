"""`snell backbones` and `snell methods`: figures against counts made otherwise, and nothing allocated."""

import re
import resource
import subprocess
import sys

import pytest
import timm
from conftest import command, typed

from snell_dist import describe
from snell_dist.backbones import section
from snell_dist.cli import main

LIMIT = 16 * 2**30  # bytes of address space


def bounded() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT))


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit of address space that is enforced")
@pytest.mark.parametrize(
    ("name", "parameters", "largest"),
    [("clip/ViT-bigG-14", "2,539,567,105", "8192 x 1664"), ("vit/22b", "21,752,322,048", "24576 x 6144")],
)
def test_the_largest_models_are_described_within_16_gib_of_address_space(
    name: str, parameters: str, largest: str
) -> None:
    shown = subprocess.run(
        command("backbones", "show", name), capture_output=True, text=True, timeout=60, check=False, preexec_fn=bounded
    )
    assert shown.returncode == 0, shown.stderr
    assert parameters in shown.stdout
    assert re.search(rf"fc1 .* {largest} +48 ", shown.stdout)


def test_flops_are_those_of_the_formula() -> None:
    """ViT-B/16 in products: 12 blocks of 197 tokens, the patches' embedding, the classifier."""
    tokens, width = 197, 768
    block = tokens * (4 * width**2 + 2 * width * 4 * width) + 2 * tokens**2 * width
    products = 12 * block + (tokens - 1) * width * 3 * 16 * 16 + width * describe.CLASSES
    (said,) = re.findall(r"([\d.]+) G an image", describe.backbone(section("vit/base")))
    assert float(said) == pytest.approx(2 * products / 1e9, abs=0.06)


def test_what_is_shown_is_what_is_there() -> None:
    shown = describe.backbone(section("swin/base", image_size=448))
    model = timm.create_model("swin_base_patch4_window7_224", img_size=448, num_classes=0)
    count = sum(p.numel() for p in model.parameters())
    assert f"{count:,} without a classifier" in shown
    assert f"float32 {4 * count / 2**30:.2f} GiB, bfloat16 {2 * count / 2**30:.2f} GiB" in shown
    assert re.search(r"q, k, v +blocks\.\*\.attn\.qkv +3 x 512 x 512 +18 ", shown)
    rows = [line.split()[-1] for line in shown.splitlines() if "blocks.*." in line]
    inside = sum(m.weight.numel() for n, m in model.named_modules() if re.search(r"blocks\.\d.*(qkv|proj|fc[12])$", n))
    assert sum(int(number.replace(",", "")) for number in rows) == inside


def test_methods_with_their_counts_in_a_backbone() -> None:
    """The paper's: 1,327,104 factors of SNELL-8 in ViT-B, as many of LoRA-8, and the class token."""
    lines = {line.split()[0]: line for line in describe.methods(section("vit/base")).splitlines()}
    assert lines.keys() >= {"snell", "snella", "lora", "sparse", "full", "linear", "bias", "adapter", "prompt"}
    assert f"{1_327_104 + 768:,}" in lines["snell"]
    assert f"{1_327_104 + 768:,}" in lines["lora"]
    assert f"{12 * 10 * 768 + 768:,}" in lines["prompt"]
    assert f"{12 * (2 * 8 * 768 + 8 + 768) + 768:,}" in lines["adapter"]
    biases = 12 * (3 * 768 + 768 + 3072 + 768 + 2 * 768) + 768 + 768  # and the embedding's, and the last norm's
    assert f"{biases + 768:,}" in lines["bias"]
    assert " 100.00%" in lines["full"]
    swin = {line.split()[0]: line for line in describe.methods(section("swin/tiny")).splitlines()}
    assert "take no plain tokens" in swin["prompt"]


def test_names_are_listed_by_glob_or_part() -> None:
    assert "clip/ViT-bigG-14\n" in typed("backbones", "ls", "clip/*-14").stdout
    listed = typed("backbones", "ls", "dinov2").stdout.splitlines()
    assert "vit/vit_large_patch14_dinov2" in listed
    assert all("dinov2" in name for name in listed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["backbones", "show", "clip/ViT-bigG-15"], "did you mean 'ViT-bigG-14'"),
        (["backbones", "show", "vti/base"], "did you mean 'vit'"),
        (["backbones", "show", "vit/base", "image_size=225"], "must be a multiple of patch_size 16"),
        (["backbones", "show", "vit/base", "image_size"], "expected key=value"),
        (["backbones", "show", "vit/base", "image_szie=32"], "did you mean 'image_size'"),
        (["backbones", "ls", "nothing"], "matches no model"),
        (["methods", "ls", "--backbone", "vit/bsae"], "did you mean 'base'"),
        (["eval", "no_such"], "no such YAML file"),
        (["eval", "."], "is no run folder"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path_factory.mktemp("empty"))
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
