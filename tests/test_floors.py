"""Imports go one way: a file imports only from floors below its own, and files of one folder not from each other."""

import ast
from pathlib import Path

import snell_dist

ROOT = Path(snell_dist.__file__).parent
FLOORS = [
    ["exits"],
    ["config"],
    ["files", "limits", "network", "standing"],
    ["dist", "tensor_files"],
    ["heartbeat", "log", "meeting"],
    ["hang", "observers"],
    ["anatomy", "ops", "packed", "weights"],
    ["adapted", "prompts"],
    ["footprint", "inventory"],
    ["backbones", "data", "ema", "engines", "start", "methods", "optim", "precision", "protocol", "remat"],
    ["adapter", "checkpoint", "delta", "feed", "peft", "run_folder"],
    ["checkpoint_tools", "data_tools", "evaluate", "keep"],
    ["mistakes"],
    ["tasks"],
    ["run_config"],
    ["build", "preflight"],
    ["memory"],
    ["audit", "describe"],
    ["finished", "results", "selection"],
    ["card"],
    ["formats"],
    ["hub", "predict", "train"],
    ["doctor", "job", "report", "status"],
    ["imported"],
    ["benchmarks", "launch"],
    ["cli"],
    ["__main__"],
]
# folders whose files are parts of one thing
WHOLES = "benchmarks", "cli", "data_tools", "doctor", "launch", "memory", "ops", "peft", "report", "weights"
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}


def imports(file: Path) -> set[str]:
    """Modules of snell_dist that a file imports when it runs (not for type checking alone), anywhere in it."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("snell_dist"):
            assert node.level == 0
            for alias in node.names:
                below = f"{node.module}.{alias.name}".removeprefix("snell_dist.").replace(".", "/")
                found.add(
                    below if (ROOT / below).exists() or (ROOT / f"{below}.py").exists() else below.rpartition("/")[0]
                )
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("snell_dist.") for a in node.names if a.name.startswith("snell_dist")}
    return found - {""}


def test_every_file_has_a_floor() -> None:
    names = {p.stem for p in ROOT.iterdir() if p.suffix == ".py" or (p.is_dir() and any(p.glob("*.py")))}
    assert names - {"__init__"} == set(FLOOR)


def test_imports_point_downward() -> None:
    wrong = []
    for file in ROOT.rglob("*.py"):
        parts = file.relative_to(ROOT).with_suffix("").parts
        if parts == ("__init__",):
            continue
        for name in imports(file):
            home = name.split("/")[0]
            inside = home == parts[0]
            if inside and parts[0] not in WHOLES:  # a plug-in file may use its folder's contract and its _helpers
                allowed = parts[-1] != "__init__" and (name == home or name.split("/")[-1].startswith("_"))
            else:
                allowed = inside or FLOOR[home] < FLOOR[parts[0]]
            if not allowed:
                wrong.append(f"{'/'.join(parts)} imports {name}")
    assert not wrong


def test_setup_cfg_lists_every_package() -> None:
    import configparser

    config = configparser.ConfigParser()
    config.read(ROOT.parent / "setup.cfg")
    listed = set(config["options"]["packages"].split())
    there = {
        "snell_dist" + "".join(f".{p}" for p in f.relative_to(ROOT).parent.parts) for f in ROOT.rglob("__init__.py")
    }
    assert listed == there | {"snell_dist.configs", "snell_dist.launch.scripts"}


def test_profiling_is_no_package() -> None:
    """Python 3.15 has a standard module `profiling`, which torch imports: ours must never shadow it."""
    assert not (ROOT.parent / "profiling" / "__init__.py").exists()
