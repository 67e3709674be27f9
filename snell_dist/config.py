"""Strict YAML to typed sections: includes, dotted overrides, and every problem reported at once.

A section is a pydantic model that lives in the file it configures. A section that a plug-in folder
serves (`methods/`, `backbones/`, `data/`, `engines/`) is chosen by its `name`, which is a file of that
folder: `method: {name: snell}` is the class `Snell` in `methods/snell.py`.
"""

from __future__ import annotations

import copy
import difflib
import errno
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar, Union

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from snell_dist.exits import Exit

PACKAGE = Path(__file__).parent
# In a wheel the folder lies inside the package, in a checkout beside it.
CONFIGS = next((p for p in (PACKAGE / "configs", PACKAGE.parent / "configs") if p.is_dir()), PACKAGE / "configs")


BROKEN = errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.EROFS, errno.ENOTCONN, errno.ETIMEDOUT


class UserError(Exception):
    """What the user can mend: one clear line a problem; the command line prints it and exits with `status`."""

    status = Exit.BAD_INPUT


class MachineError(UserError):
    """Nothing that was said is wrong: a disk is full, a host is gone. Another attempt may succeed."""

    status = Exit.MACHINE


def trouble(said: str, error: OSError) -> UserError:
    """Of a file system: a MachineError where it is full or broken, else something that the user named is not right."""
    kind = MachineError if error.errno in BROKEN else UserError
    return kind(f"{said}: {(error.strerror or str(error)).lower()}")


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a configuration. `where` is `file:line` or `command line`."""

    key: str
    message: str
    value: Any = None
    where: str = ""

    def __str__(self) -> str:
        said = "" if self.value is None else f" = {self.value!r}"
        return f"{self.where + ': ' if self.where else ''}{self.key}{said}: {self.message}"


class ConfigError(UserError):
    """Problems of one configuration, all of them."""

    def __init__(self, *problems: Problem) -> None:
        self.problems = problems
        super().__init__("\n".join(map(str, problems)))


class Section(BaseModel):
    """A part of the configuration: closed (unknown keys are errors), frozen, no silent conversions."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


@dataclass(frozen=True)
class Plugin:
    """Marks a field whose class is the file `snell_dist/<folder>/<name>.py`, named by the section's `name`."""

    folder: str
    default: str | None = None

    def names(self) -> list[str]:
        files = (PACKAGE / self.folder).glob("*.py")
        return sorted(f.stem for f in files if not f.stem.startswith("_"))

    def unknown(self, name: object) -> str:
        """What to say of a name that is no file of the folder."""
        return f"unknown name{nearest(name, self.names())} (allowed: {', '.join(self.names())})"

    def find(self, name: str) -> type[Section]:
        """The class `Name` of the file `name`; KeyError where there is no such file."""
        if name not in self.names():
            raise KeyError(name)
        module = import_module(f"snell_dist.{self.folder}.{name}")
        return getattr(module, "".join(word.title() for word in name.split("_")))


def nearest(word: object, known: Iterable[str]) -> str:
    """`, did you mean 'x'?` or nothing."""
    match = difflib.get_close_matches(str(word), list(known), n=1)
    return f", did you mean '{match[0]}'?" if match else ""


Schema = TypeVar("Schema", bound=Section)


def first_line(error: BaseException) -> str:
    """What a library's error says, in one line; its type where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@dataclass(frozen=True)
class Loaded(Generic[Schema]):
    """A checked configuration and where each of its keys was said."""

    name: str
    config: Schema
    origins: dict[str, str] = field(repr=False)

    def locate(self, error: ConfigError) -> ConfigError:
        """The same problems with the file and line of each key."""
        return _located(error.problems, self.origins)


def load(source: str, overrides: Sequence[str], schema: type[Schema], sweeping: bool = False) -> Loaded[Schema]:
    """Reads a YAML file, or a shipped configuration by name, and applies `key=value` overrides.

    sweeping: overrides that only another plug-in of the kind takes (`method.name=full method.rank=8`) are left out,
    so that one command line serves for all.
    Raises ConfigError with all problems found, UserError where a file cannot be read.
    """
    path = locate(source)
    tree, origins = _read(path, ())
    if sweeping:
        overrides = [override for override in overrides if not _others(override, overrides, schema)]
    # A section's name comes first: naming another plug-in starts the section afresh.
    for override in sorted(overrides, key=lambda o: not o.partition("=")[0].endswith(".name")):
        _apply(override, tree, origins)
    return Loaded(config_name(path), check(tree, schema, origins), origins)


def _others(override: str, overrides: Sequence[str], schema: type[Section]) -> bool:
    """Whether an override is a setting of another plug-in than the one that the overrides name."""
    section, _, key = override.partition("=")[0].partition(".")
    plugin = dict(_plugins(schema)).get(section)
    named = [o.partition("=")[2] for o in overrides if o.startswith(f"{section}.name=")]
    if plugin is None or not named or named[-1] not in plugin.names() or key in plugin.find(named[-1]).model_fields:
        return False
    return any(key in plugin.find(name).model_fields for name in plugin.names())


def shipped() -> list[str]:
    """Names of the configurations that come with the package, such as `demo/lora`."""
    return sorted(p.relative_to(CONFIGS).with_suffix("").as_posix() for p in CONFIGS.rglob("*.yaml"))


def locate(source: str, beside: Path | None = None) -> Path:
    """The file that a user names: a path (also relative to the file that includes it), or a shipped name."""
    near = [beside.parent / source, beside.parent / f"{source}.yaml"] if beside else []
    for path in (*near, Path(source), CONFIGS / f"{source}.yaml"):
        if path.suffix in (".yaml", ".yml") and path.is_file():
            return path
    said = f"{beside}: include" if beside else "config"
    raise UserError(
        f"{said} = {source!r}: no such YAML file and no shipped configuration{nearest(source, shipped())}"
        " (snell config ls shows them)"
    )


def config_name(path: Path) -> str:
    """`demo/lora` for a shipped file, else the file's stem."""
    try:
        return path.resolve().relative_to(CONFIGS.resolve()).with_suffix("").as_posix()
    except ValueError:
        return path.stem


def check(tree: dict[str, Any], schema: type[Schema], origins: dict[str, str] | None = None) -> Schema:
    """The typed configuration of a plain tree; ConfigError with every problem."""
    problems: list[Problem] = []
    tree = copy.deepcopy(tree)
    concrete = _with_plugins(schema, tree, problems)
    try:
        config = concrete.model_validate(tree)
    except ValidationError as error:
        unknown = {p.key.removesuffix(".name") for p in problems}
        problems += [p for p in _problems(error, concrete) if p.key.partition(".")[0] not in unknown]
    if problems:
        raise _located(problems, origins or {})
    return config


def full_schema(schema: type[Section]) -> dict[str, Any]:
    """JSON schema over every plug-in, for editors that complete and check the YAML."""
    fields: dict[str, Any] = {"include": (list[str], Field([], description="configurations that this one starts from"))}
    for key, plugin in _plugins(schema):
        classes: Any = Union[tuple(plugin.find(name) for name in plugin.names())]  # noqa: UP007 (made at run time)
        several = len(plugin.names()) > 1
        fields[key] = (Annotated[classes, Field(discriminator="name")] if several else classes, ...)
    whole: type[Section] = create_model("Config", __base__=schema, **fields)
    result = whole.model_json_schema()
    # A file may be a delta, so it need not say all.
    for part in (result, *result["$defs"].values()):
        part["required"] = [key for key in part.get("required", ()) if key == "name"]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **result}


def _plugins(schema: type[Section]) -> list[tuple[str, Plugin]]:
    return [(k, m) for k, f in schema.model_fields.items() for m in f.metadata if isinstance(m, Plugin)]


def _with_plugins(schema: type[Schema], tree: dict[str, Any], problems: list[Problem]) -> type[Schema]:
    """The schema with each plug-in field narrowed to the class that the tree names."""
    fields: dict[str, Any] = {}
    for key, plugin in _plugins(schema):
        if plugin.default is not None:
            tree.setdefault(key, {})
            if isinstance(tree[key], dict):
                tree[key].setdefault("name", plugin.default)
        said = tree.get(key)
        if not isinstance(said, dict):
            continue
        name = said.get("name")
        try:
            fields[key] = (plugin.find(str(name)), ...)
        except KeyError:
            allowed = f"required key is missing (allowed: {', '.join(plugin.names())})"
            problems.append(Problem(f"{key}.name", allowed if name is None else plugin.unknown(name), name))
    return create_model(schema.__name__, __base__=schema, **fields) if fields else schema


def _problems(error: ValidationError, schema: type[Section]) -> list[Problem]:
    return [_problem(item, schema) for item in error.errors()]


def _problem(item: Any, schema: type[Section]) -> Problem:
    *parents, last = item["loc"] or ("",)
    key = ".".join(map(str, item["loc"]))
    section: Any = schema
    for parent in parents:
        known = getattr(section, "model_fields", {})
        section = known[parent].annotation if parent in known else section
    message, value = item["msg"].replace("Input should be", "must be"), item["input"]
    if item["type"] == "extra_forbidden":
        known = list(section.model_fields)
        message = f"unknown key{nearest(last, known)} (allowed: {', '.join(known)})"
    elif item["type"] == "missing":
        message, value = "required key is missing", None
    elif item["type"] == "literal_error":
        known = re.split(", | or ", item["ctx"]["expected"].replace("'", ""))
        message = f"unknown value{nearest(value, known)} (allowed: {', '.join(known)})"
    elif item["type"] == "value_error":
        message = str(item["ctx"]["error"])
    elif item["type"].endswith("_type"):
        message = f"{message}, not {type(value).__name__}"
    return Problem(key, message, value)


def _located(problems: Iterable[Problem], origins: dict[str, str]) -> ConfigError:
    return ConfigError(*(Problem(p.key, p.message, p.value, p.where or _origin(origins, p.key)) for p in problems))


def _origin(origins: dict[str, str], key: str) -> str:
    """Where a key was said, or else the nearest of its parents that was."""
    while key and key not in origins:
        key = key.rpartition(".")[0]
    return origins.get(key, "")


class _Yaml(yaml.SafeLoader):
    """Safe YAML in which 1e-3 is a number, as everyone who writes a learning rate expects."""


_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _read(path: Path, above: tuple[Path, ...]) -> tuple[dict[str, Any], dict[str, str]]:
    """The tree of a file over the trees that it includes, and the origin of every key."""
    if path.resolve() in above:
        raise UserError(f"{path}: include: the files include each other in a circle")
    try:
        loader = _Yaml(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        own_origins: dict[str, str] = {}
        own = {} if node is None else _plain(loader, node, str(path), "", own_origins)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(own, dict):
        raise UserError(f"{path}: a mapping of sections is expected, not {type(own).__name__}")
    includes = own.pop("include", [])
    includes = [includes] if isinstance(includes, str) else includes
    if not isinstance(includes, list) or not all(isinstance(name, str) for name in includes):
        raise UserError(f"{own_origins['include']}: include = {includes!r}: a name or a list of names is expected")
    tree: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for name in includes:
        base, base_origins = _read(locate(name, beside=path), (*above, path.resolve()))
        tree, origins = _merge(tree, base), origins | base_origins
    return _merge(tree, own), origins | own_origins


def _plain(loader: _Yaml, node: yaml.Node, file: str, key: str, origins: dict[str, str]) -> Any:
    origins[key] = f"{file}:{node.start_mark.line + 1}"
    if not isinstance(node, yaml.MappingNode):
        return loader.construct_object(node, deep=True)
    loader.flatten_mapping(node)
    result: dict[str, Any] = {}
    for key_node, child in node.value:
        name = str(loader.construct_object(key_node))
        dotted = f"{key}.{name}" if key else name
        if name in result:
            raise UserError(f"{file}:{key_node.start_mark.line + 1}: {dotted}: this key is said twice")
        result[name] = _plain(loader, child, file, dotted, origins)
        origins[dotted] = f"{file}:{key_node.start_mark.line + 1}"
    return result


def _merge(base: dict[str, Any], delta: dict[str, Any]) -> dict[str, Any]:
    """Deep merge; a section that names another plug-in starts afresh instead of inheriting foreign keys."""
    result = dict(base)
    for key, value in delta.items():
        old = result.get(key)
        if isinstance(old, dict) and isinstance(value, dict) and value.get("name") in (None, old.get("name")):
            value = _merge(old, value)
        result[key] = value
    return result


def settings(overrides: Sequence[str]) -> dict[str, Any]:
    """`key=value` words as a tree. UserError where one is none."""
    tree: dict[str, Any] = {}
    for override in overrides:
        _apply(override, tree, {})
    return tree


def _apply(override: str, tree: dict[str, Any], origins: dict[str, str]) -> None:
    key, separator, text = override.partition("=")
    if not separator or not re.fullmatch(r"\w+(\.\w+)*", key):
        raise UserError(f"command line: {override!r}: expected key=value, such as method.rank=8")
    try:
        value = yaml.load(text, _Yaml)
    except yaml.YAMLError:
        raise UserError(f"command line: {key} = {text!r}: not valid YAML") from None
    delta = value
    for part in reversed(key.split(".")):
        delta = {part: delta}
    merged = _merge(tree, delta)
    tree.clear()
    tree.update(merged)
    origins[key] = "command line"
