"""The measurement is fair: every source reads the same pixels."""

import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from torchvision.transforms.functional import pil_to_tensor

sys.path.insert(0, str(ROOT / "profiling"))
import bench_data

from snell_dist.data.image_folder import ImageFolder
from snell_dist.data_tools.pack import Limit, pack


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bench")
    bench_data.write_photographs(root / "files", 9)
    pack(ImageFolder(name="image_folder", root=str(root / "files")), root / "tar", Limit(images=4))
    return root


@pytest.mark.parametrize("decoded", [True, False])
def test_sources_read_the_same_images(decoded: bool, root: Path) -> None:
    def pixels(item: object) -> torch.Tensor:
        item = item[0] if isinstance(item, tuple) else item
        return item if isinstance(item, torch.Tensor) else pil_to_tensor(item)  # type: ignore[arg-type]

    read = {name: [pixels(item) for item in make()] for name, make in bench_data.contenders(root, decoded).items()}
    rival = read[bench_data.RIVAL]
    for name in ("files", "tar"):
        assert all(torch.equal(a, b) for a, b in zip(read[name], rival, strict=True))
    places = [next(i for i, b in enumerate(rival) if torch.equal(a, b)) for a in read["stream"]]
    assert sorted(places) == list(range(9)), "the stream has its own order"
    sides = {side for image in rival for side in image.shape[1:]}
    assert all(256 <= side <= 500 for side in sides) if decoded else sides == {224}


def test_rates_are_compared_within_a_round(root: Path) -> None:
    found = bench_data.rates(root, rounds=2, decoded=True)
    assert found["ratio"][bench_data.RIVAL] == 1
    assert all(r["least"] <= r["median"] <= r["most"] for r in found["per_second"].values())
