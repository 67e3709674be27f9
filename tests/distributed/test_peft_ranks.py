"""Real processes under torchrun: a PEFT user's script by accelerate's DDP and FSDP2 gives what one process gives."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import ENVIRONMENT
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file

SCRIPT = Path(__file__).with_name("peft_ranks.py")
FILE = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the adapters are, and how many parameters each rank held."""
    folder = tmp_path_factory.mktemp("ranks")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(SCRIPT)]
    done = subprocess.run(
        [*launcher, str(folder)], env=ENVIRONMENT, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_ranks_train_the_adapter_of_one_process(way: str, ranks: Path, tmp_path: Path) -> None:
    from peft_ranks import adapted, base, train

    model = train(Accelerator(cpu=True), tmp_path)
    AcceleratorState._reset_state(reset_partial_state=True)
    one, many = load_file(tmp_path / FILE), load_file(ranks / way / FILE)
    start = get_peft_model_state_dict(adapted())
    assert one.keys() == many.keys() == start.keys()
    for name, tensor in many.items():
        torch.testing.assert_close(tensor, one[name], rtol=1e-4, atol=1e-6)
        assert not torch.equal(tensor, start[name])
    again = PeftModel.from_pretrained(base(), ranks / way).eval()
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(again(images).logits, model.eval()(images).logits, rtol=1e-4, atol=1e-5)
    said = [(ranks / f"{way}_{rank}.held").read_text().split() for rank in (0, 1)]
    held = [int(here) / int(whole) for here, whole in said]
    assert held == [1, 1] if way == "ddp" else max(held) < 0.6
