"""What there is: backbones, methods, configurations."""

from __future__ import annotations

import argparse
from pathlib import Path

from snell_dist.cli._common import Commands, takes_config
from snell_dist.config import CONFIGS, UserError


def add(commands: Commands) -> None:
    backbones = commands.add_parser("backbones", help="the models that can be named, and what is in one")
    verbs = backbones.add_subparsers(required=True, metavar="ls|show")
    listed = verbs.add_parser("ls", help="families and sizes")
    listed.add_argument("pattern", nargs="?", default="*", help="a glob or a part of the name: clip, *-14, vit/base")
    listed.set_defaults(command=_backbones_ls)
    described = verbs.add_parser("show", help="blocks, targets, parameters, bytes, FLOPs; nothing is allocated")
    described.add_argument("name", help="family/size, such as clip/ViT-bigG-14")
    described.add_argument("overrides", nargs="*", metavar="key=value", help="settings, such as image_size=384")
    described.set_defaults(command=_backbones_show)

    methods = commands.add_parser("methods", help="how a model can be adapted")
    verbs = methods.add_subparsers(required=True, metavar="ls")
    listed = verbs.add_parser("ls", help="every method; with --backbone, what it trains there")
    listed.add_argument("--backbone", metavar="NAME", help="family/size, such as vit/base")
    listed.set_defaults(command=_methods_ls)

    config = commands.add_parser("config", help="list, show, copy and describe configurations")
    verbs = config.add_subparsers(required=True, metavar="ls|show|cp|schema")
    listed = verbs.add_parser("ls", help="the configurations that come with the package")
    listed.add_argument("pattern", nargs="?", default="*", help="a glob or a part of the name: vtab, *_snell32")
    listed.set_defaults(command=_config_ls)
    show = verbs.add_parser("show", help="a configuration, resolved: every key with its value")
    takes_config(show)
    show.set_defaults(command=_config_show)
    copy = verbs.add_parser("cp", help="copy a shipped configuration, to change it")
    copy.add_argument("name")
    copy.add_argument("target", type=Path, nargs="?", default=Path("."), help="a file or a folder (default: here)")
    copy.set_defaults(command=_config_cp)
    verbs.add_parser("schema", help="the JSON schema, for editors").set_defaults(command=_config_schema)


def _backbones_ls(args: argparse.Namespace) -> int:
    from fnmatch import fnmatch

    from snell_dist.config import Plugin, nearest

    plugin = Plugin("backbones")
    names = [f"{family}/{size}" for family in plugin.names() for size in plugin.find(family).sizes()]  # type: ignore[attr-defined]
    chosen = [name for name in names if fnmatch(name, args.pattern) or args.pattern in name]
    if not chosen:
        raise UserError(f"backbones ls: {args.pattern!r}: matches no model{nearest(args.pattern, names)}")
    print("\n".join(chosen))
    return 0


def _backbones_show(args: argparse.Namespace) -> int:
    from snell_dist import describe
    from snell_dist.backbones import section
    from snell_dist.config import settings

    print(describe.backbone(section(args.name, **settings(args.overrides))))
    return 0


def _methods_ls(args: argparse.Namespace) -> int:
    from snell_dist import describe
    from snell_dist.backbones import section

    print(describe.methods(section(args.backbone) if args.backbone else None))
    return 0


def _config_ls(args: argparse.Namespace) -> int:
    from fnmatch import fnmatch

    from snell_dist.config import nearest, shipped

    names = [name for name in shipped() if fnmatch(name, args.pattern) or args.pattern in name]
    if not names:
        raise UserError(f"config ls: {args.pattern!r}: matches no configuration{nearest(args.pattern, shipped())}")
    width = max(map(len, names))
    for name in names:
        about = [line for line in (CONFIGS / f"{name}.yaml").read_text().splitlines() if line.startswith("# ")]
        print(f"{name:{width}}  {about[1].removeprefix('# ') if len(about) > 1 else ''}".rstrip())
    return 0


def _config_show(args: argparse.Namespace) -> int:
    import yaml

    from snell_dist.config import load
    from snell_dist.run_config import Run

    print(yaml.safe_dump(load(args.config, args.overrides, Run).config.model_dump(), sort_keys=False), end="")
    return 0


def _config_cp(args: argparse.Namespace) -> int:
    from snell_dist.config import nearest, shipped

    if args.name not in shipped():
        raise UserError(f"config cp: {args.name!r}: no such shipped configuration{nearest(args.name, shipped())}")
    source = CONFIGS / f"{args.name}.yaml"
    target = args.target / source.name if args.target.is_dir() else args.target
    try:
        with target.open("x", encoding="utf-8") as stream:
            stream.write(source.read_text(encoding="utf-8"))
    except FileExistsError:
        raise UserError(f"config cp: {target}: exists and stays as it is; name another file") from None
    except OSError as error:
        raise UserError(f"config cp: {target}: cannot be written: {error.strerror}") from None
    print(target)
    return 0


def _config_schema(args: argparse.Namespace) -> int:
    import json

    from snell_dist.config import full_schema
    from snell_dist.run_config import Run

    print(json.dumps(full_schema(Run), indent=2))
    return 0
