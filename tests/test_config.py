import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TINY

from snell_dist.config import ConfigError, UserError, full_schema, load, shipped
from snell_dist.job import run
from snell_dist.run_config import Run


def problems(source: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(source, list(overrides), Run)
    return str(caught.value).splitlines()


def write(tmp_path: Path, text: str, name: str = "mine.yaml") -> str:
    (tmp_path / name).write_text(text)
    return str(tmp_path / name)


def test_every_problem_is_reported_at_once_with_its_line(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        "include: demo\nmethod: {name: snell, rnak: 8, sparsity: 1.0}\n"
        "train:\n  steps: many\ndata: {name: digitz}\nengine: {nmae: ddp}\noptimiser: {}\n",
    )
    said = problems(file)
    assert len(said) == 6
    assert any(line.startswith(f"{file}:2: method.rnak = 8: unknown key, did you mean 'rank'?") for line in said)
    assert any(line.startswith(f"{file}:2: method.sparsity = 1.0: must be less than 1") for line in said)
    assert any(line.startswith(f"{file}:4: train.steps = 'many': must be a valid integer, not str") for line in said)
    assert any(
        line.startswith(f"{file}:5: data.name = 'digitz': unknown name, did you mean 'digits'?") for line in said
    )
    assert any(line.startswith(f"{file}:6: engine.nmae") and "'name'" in line for line in said)
    assert any(line.startswith(f"{file}:7: optimiser") and "did you mean 'optim'?" in line for line in said)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method.rank=7", "method.rank = 7: must be even"),
        ("method.rank=0", "method.rank = 0: must be greater than or equal to 1"),
        ("method.rank=8.0", "must be a valid integer"),
        ("method.rank='8'", "must be a valid integer, not str"),
        ("method.sparsity=-0.1", "must be greater than or equal to 0"),
        ("method.sparsity=.nan", "must be a finite number"),
        ("method.sparsify=sfot", "allowed: released, paper, hard"),
        ("method.name=snel", "did you mean 'snell'?"),
        ("optim.lr=0", "must be greater than 0"),
        ("train.seed=true", "must be a valid integer"),
        ("data.classes=[3, 3]", "must be different digits"),
        ("backbone=vit", "backbone"),
    ],
)
def test_values_out_of_range_name_what_is_allowed(override: str, message: str) -> None:
    (line,) = problems("demo", override)
    assert line.startswith("command line: ")
    assert message in line


def test_overrides_reach_any_depth_and_naming_another_plugin_starts_afresh() -> None:
    loaded = load("demo", ["method.rank=4", "method.name=lora", "optim.lr=1e-3"], Run)
    assert (loaded.config.method.name, loaded.config.method.rank) == ("lora", 4)
    assert loaded.config.optim.lr == 1e-3
    assert loaded.config.optim.warmup_steps == load("demo", [], Run).config.optim.warmup_steps


def test_a_delta_changes_what_it_says_and_nothing_else(tmp_path: Path) -> None:
    base = load("demo", [], Run).config.model_dump()
    file = write(tmp_path, "include: demo\ntrain: {steps: 7}\n")
    delta = load(file, [], Run).config.model_dump()
    assert delta["train"].pop("steps") == 7
    base["train"].pop("steps")
    assert delta == base


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("method: [", "not valid YAML"),
        ("- a\n", "a mapping of sections is expected"),
        ("train: {steps: 1}\ntrain: {steps: 2}\n", "mine.yaml:2: train: this key is said twice"),
        ("include: dmeo\n", "did you mean 'demo'?"),
        ("include: mine\n", "in a circle"),
        ("include: {a: 1}\n", "mine.yaml:1: include"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load(write(tmp_path, text), [], Run)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_yaml_that_would_run_code_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path, "method: !!python/object/apply:os.system ['touch ran']\n")
    with pytest.raises(UserError, match="not valid YAML"):
        load(file, [], Run)


@pytest.mark.parametrize("name", shipped())
def test_shipped_configurations_satisfy_the_json_schema(name: str) -> None:
    """The schema, checked by another library, agrees with ours on files, resolved and as they stand."""
    import jsonschema
    import yaml

    from snell_dist.config import CONFIGS

    schema = full_schema(Run)
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(json.loads(json.dumps(load(name, [], Run).config.model_dump())), schema)
    raw = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    if not raw.get("include"):
        jsonschema.validate(raw, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**raw, "methd": {}}, schema)


@pytest.mark.parametrize("name", shipped())
def test_line_one_of_every_shipped_file_is_its_command(name: str) -> None:
    from snell_dist.config import CONFIGS

    lines = (CONFIGS / f"{name}.yaml").read_text().splitlines()
    command = lines[0].removesuffix(" data.dataset=NAME").removesuffix(" data.root=DIR")  # which only the user knows
    launched = r"torchrun --nproc-per-node=\d -m snell_dist"
    many = rf"snell launch {name} data\.root=DIR --via slurm --nodes \d+ --gpus-per-node \d --submit"
    asks = rf"snell plan {name} --gpus 1 --gpu \w+"
    assert re.fullmatch(rf"# ((snell|{launched}) train {name}|{many}|{asks})", command)
    assert lines[1].startswith("# ")


# Those of the benchmarks train in test_recipes; those of scale need a large machine.
ELSEWHERE = ("vtab/", "fgvc/", "scale/", "mini/")


@pytest.mark.parametrize("name", [name for name in shipped() if not name.startswith(ELSEWHERE)])
def test_every_shipped_configuration_trains_a_step(name: str, tmp_path: Path) -> None:
    outcome = run(load(name, [*TINY, "train.steps=1"], Run), tmp_path)
    assert outcome.summary["steps"] == 1


@pytest.fixture(scope="module")
def mini_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = tmp_path_factory.mktemp("mini") / "data"
    subprocess.run([sys.executable, ROOT / "profiling/mini_tasks.py", "--out", data], check=True)
    return data


@pytest.mark.parametrize("name", [name for name in shipped() if name.startswith("mini/")])
def test_every_configuration_of_the_mini_benchmark_trains(name: str, mini_data: Path, tmp_path: Path) -> None:
    root = mini_data / "pretrain" if name == "mini/pretrain" else mini_data
    short = ["train.epochs=1", "train.eval_epochs=1", f"data.root={root}", "backbone.weights=null", "backbone.depth=1"]
    outcome = run(load(name, short, Run), tmp_path)
    assert outcome.summary["steps"] > 0
