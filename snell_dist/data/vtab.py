"""VTAB-1k: 19 tasks with 1,000 labelled images each (Zhai et al., 2019), in the layout that tuning papers share.

    ROOT/<dataset>/train800.txt  val200.txt  train800val200.txt  test.txt     lines `relative/path label`
    ROOT/<dataset>/classes.txt                                                names, one a line; optional

Other data in this layout works too: a folder with a classes.txt may have any name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from snell_dist.data import Splits, Transforms
from snell_dist.data._benchmark import BenchmarkSection

# dataset: (classes, test images), of the benchmark
DATASETS = {
    "cifar": (100, 10000),
    "caltech101": (102, 6084),
    "dtd": (47, 1880),
    "oxford_flowers102": (102, 6149),
    "oxford_iiit_pet": (37, 3669),
    "svhn": (10, 26032),
    "sun397": (397, 21750),
    "patch_camelyon": (2, 32768),
    "eurosat": (10, 5400),
    "resisc45": (45, 6300),
    "diabetic_retinopathy": (5, 42670),
    "clevr_count": (8, 15000),
    "clevr_dist": (6, 15000),
    "dmlab": (6, 22735),
    "kitti": (4, 711),
    "dsprites_loc": (16, 73728),
    "dsprites_ori": (16, 73728),
    "smallnorb_azi": (18, 12150),
    "smallnorb_ele": (9, 12150),
}
SPLITS = {"train800": 800, "val200": 200, "train800val200": 1000}
HOW = "the archives of VTAB-1k that tuning papers share, such as those named in the READMEs of NOAH, FacT and SSF"


class Vtab(BenchmarkSection):
    classes: ClassVar[Mapping[str, int]] = {dataset: count for dataset, (count, _) in DATASETS.items()}
    inside: ClassVar[tuple[str, ...]] = ("vtab-1k", "vtab")
    marker: ClassVar[str] = "train800.txt"

    name: Literal["vtab"]

    def load(self, all_labelled: bool) -> Splits:
        from snell_dist.data import _files

        folder = self.folder()
        names = self.class_names(folder)
        transforms = self.transforms()
        trained = "train800val200" if all_labelled else "train800"
        train, val, test = (
            _files.Files(folder, *_files.lines(folder / f"{split}.txt", len(names)), transforms.evaluation)
            for split in (trained, "val200", "test")
        )
        return Splits(
            train,
            val,
            test,
            classes=names,
            image_shape=(3, self.image_size, self.image_size),
            preprocessing=transforms.preprocessing,
            about={
                "dataset": self.title("VTAB-1k"),
                "split": f"{trained}, val200, test",
                **transforms.about,
            },
            val_trains=all_labelled,
        )

    def transforms(self) -> Transforms:
        from snell_dist.data import _transforms

        said = _transforms.squeeze(self.image_size, self.normalisation)
        whole = _transforms.plain(said)
        about = {
            "resize": f"whole picture to {self.image_size} x {self.image_size}, bicubic",
            "normalisation": self.normalisation,
            "augmentation": "none",
        }
        return Transforms(training=whole, evaluation=whole, augments=False, about=about, preprocessing=said)
