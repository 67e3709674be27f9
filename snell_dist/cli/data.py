"""Data: checked, recorded, packed."""

from __future__ import annotations

import argparse
from pathlib import Path

from snell_dist.cli._common import Commands, takes_config
from snell_dist.config import ConfigError
from snell_dist.exits import Exit


def add(commands: Commands) -> None:
    data = commands.add_parser("data", help="is the data there and whole; record it; pack it into shards")
    verbs = data.add_subparsers(required=True, metavar="check|manifest|pack")
    checked = verbs.add_parser("check", help="what of VTAB-1k and FGVC a folder holds, and whether it is whole")
    checked.add_argument("folder", type=Path, metavar="DIR", help="the folder of the datasets, or a dataset's own")
    checked.add_argument("--quick", action="store_true", help="open only the images' headers")
    checked.add_argument("--json", action="store_true", help="for machines")
    checked.add_argument("--against", type=Path, metavar="FILE", help="compare with a manifest instead")
    checked.set_defaults(command=_data_check)
    manifest = verbs.add_parser("manifest", help="record counts and hashes of what is there")
    manifest.add_argument("folder", type=Path, metavar="DIR")
    manifest.add_argument("--out", type=Path, required=True, metavar="FILE")
    manifest.set_defaults(command=_data_manifest)
    packed = verbs.add_parser("pack", help="write a configuration's images into tar shards, for data.name=webdataset")
    takes_config(packed)
    packed.add_argument("--to", type=Path, required=True, metavar="DIR", help="a folder that is not there yet")
    packed.add_argument(
        "--shard-size", default="256MiB", metavar="SIZE", help="bytes, or a number of images (default: 256MiB)"
    )
    packed.set_defaults(command=_data_pack)


def _data_check(args: argparse.Namespace) -> int:
    from snell_dist.data_tools import check, manifest

    if args.against:
        different = manifest.differences(args.folder, args.against)
        print("\n".join(different) or f"{args.folder}: as in {args.against}")
        return Exit.BAD_INPUT if different else 0
    found, missing = check.look(args.folder, args.quick, contents=False)
    print(manifest.as_json(found, missing) if args.json else check.report(found, missing))
    return 0 if all(f.sound for f in found) else Exit.BAD_INPUT


def _data_manifest(args: argparse.Namespace) -> int:
    from snell_dist.data_tools import manifest

    found = manifest.write(args.folder, args.out)
    print(f"{args.out}: {len(found)} datasets")
    return 0


def _data_pack(args: argparse.Namespace) -> int:
    from snell_dist.config import load
    from snell_dist.run_config import Run

    loaded = load(args.config, args.overrides, Run)
    from snell_dist import log
    from snell_dist.data_tools.pack import Limit, pack

    log.set_up()
    try:
        index = pack(loaded.config.data, args.to, Limit.parse(args.shard_size))
    except ConfigError as error:
        raise loaded.locate(error) from None
    parts = [index.train, index.val, index.test]
    train, val, test = (sum(shard.samples for shard in part) for part in parts)
    print(f"{args.to}: {train} train, {val} val and {test} test images in {sum(map(len, parts))} shards")
    return 0
