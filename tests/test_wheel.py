"""What a user gets who has no checkout: the wheel, in an environment and a folder of its own."""

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from conftest import ENVIRONMENT, ROOT, TINY

# Two builds at once would write into the same build folder of the checkout.
pytestmark = pytest.mark.xdist_group("wheel")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.glob("*.whl")
    return built


def test_the_wheel_trains_the_demo_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    site = next((tmp_path / "venv").glob("lib/python*/site-packages"))
    # The dependencies are lent by this environment, the package itself comes from the wheel alone.
    dependencies = next(p for p in map(Path, sys.path) if p.name == "site-packages" and (p / "torch").is_dir())
    zipfile.ZipFile(wheel).extractall(site)
    run = {"capture_output": True, "text": True, "timeout": 300, "check": False, "cwd": tmp_path}
    environment = {k: v for k, v in ENVIRONMENT.items() if k != "PYTHONPATH"} | {"PYTHONPATH": str(dependencies)}
    where = [str(python), "-c", "import snell_dist; print(snell_dist.__file__)"]
    assert subprocess.run(where, env=environment, **run).stdout.startswith(str(site))
    listed = subprocess.run([str(python), "-m", "snell_dist", "config", "ls"], env=environment, **run)
    assert "demo/pretrain" in listed.stdout
    command = [str(python), "-m", "snell_dist", "train", "demo", *TINY, "method.rank=4"]
    done = subprocess.run(command, env=environment, **run)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs/demo/001/adapter.safetensors").exists()
    command = [str(python), "-m", "snell_dist", "launch", "demo", "--via", "torchrun", "--submit"]
    done = subprocess.run(command, env=environment | {"DRY_RUN": "1"}, **run)
    assert "-m torch.distributed.run --nnodes=1" in done.stdout, done.stderr
    command = [str(python), "-m", "snell_dist", "reproduce", "vtab", "--methods", "lora", "--table"]
    assert "0 of 57 runs are done" in subprocess.run(command, env=environment, **run).stdout
    command = [str(python), "-m", "snell_dist", "report", "runs"]
    assert subprocess.run(command, env=environment, **run).stdout.startswith("report.html: 1 runs, ")


def test_the_wheel_holds_the_package_its_configurations_and_scripts_only(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert "snell_dist/configs/demo.yaml" in names
    assert "snell_dist/configs/demo/lora.yaml" in names
    assert "snell_dist/launch/scripts/slurm/torchrun.sbatch" in names
    assert "snell_dist/launch/scripts/hostfile.example" in names
    tops = {name.split("/")[0] for name in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"snell_dist"}
