"""What a run leaves for others: merged, exported, proven."""

from __future__ import annotations

import argparse
from pathlib import Path

from snell_dist.cli._common import Commands, takes_config
from snell_dist.exits import Exit


def add(commands: Commands) -> None:
    merged = commands.add_parser(
        "merge",
        help="a finished run as plain weights in the files of its model's own library",
        description="Folds a finished run's delta into its base, and writes timm's or open_clip's own files.",
    )
    exported = commands.add_parser(
        "export",
        help="a finished run in the files of timm, open_clip, transformers, PEFT, ONNX; or its sparse delta alone",
        description="Writes a finished run in another library's format, and compares what that library makes of it.",
    )
    exported.add_argument(
        "--format", required=True, metavar="FORMAT", help="timm, open_clip, hf, onnx, peft, peft_hf, delta"
    )
    for verb in (merged, exported):
        verb.add_argument("run", type=Path, metavar="RUN", help="a finished run's folder")
        verb.add_argument("--to", type=Path, required=True, metavar="DIR", help="a folder that is not there yet")
        verb.add_argument(
            "--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="default: float32"
        )
        verb.add_argument(
            "--unproven", action="store_true", help="do not reload it and compare, which takes the memory of the model"
        )
        verb.set_defaults(command=_export)
    brought = commands.add_parser(
        "import",
        help="a PEFT adapter as a finished run: tested, and ready to be predicted with, merged and exported",
        description="Puts a PEFT adapter (SNELL or LoRA; of timm's model, or of Transformers' with the same weights) on"
        " the base and the data of a configuration, whose method it replaces, and tests it.",
    )
    brought.add_argument("adapter", type=Path, metavar="FOLDER", help="with adapter_config.json")
    takes_config(brought)
    brought.add_argument("--to", type=Path, required=True, metavar="RUN", help="a folder that is not there yet")
    brought.add_argument("--out", type=Path, default=Path("runs"), help="where bases are trained (default: runs)")
    brought.set_defaults(command=_import)


def _export(args: argparse.Namespace) -> int:
    from snell_dist import formats, log

    log.set_up()
    name = args.format if "format" in args else formats.own(args.run)
    made = formats.export(args.run, name, args.to, args.dtype, proven=not args.unproven)
    proven = "unproven" if made.error is None else f"reloaded, its logits differ by {made.error:.1e}, relative"
    print(f"{made.folder}: {name}, {made.bytes / 2**20:.1f} MiB; {proven}")
    return Exit.DONE


def _import(args: argparse.Namespace) -> int:
    from snell_dist.config import load
    from snell_dist.run_config import Run

    loaded = load(args.config, args.overrides, Run)
    from snell_dist import imported, log

    log.set_up()
    said = imported.bring(loaded, args.adapter, args.to, args.out).summary
    print(f"test accuracy {said['test_accuracy']:.4f} on {said['test_images']} images  {args.to}")
    return Exit.DONE
