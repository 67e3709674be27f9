"""Files of tensors: the format's own library reads what is streamed, and a failure leaves nothing."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from snell_dist.config import UserError
from snell_dist.tensor_files import read_metadata, read_tensors, stream_tensors, write_tensors

MANY = {
    "bytes": torch.arange(5, dtype=torch.uint8),
    "matrix": torch.randn(3, 4),
    "scalar": torch.tensor(2.5),
    "half": torch.randn(7).bfloat16(),
    "turned": torch.randn(2, 5).t(),
    "mask": torch.tensor([True, False, True]),
    "none": torch.empty(0, 4),
    "long": torch.tensor([2**40, -1]),
}


def shapes(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}


def test_what_is_streamed_is_read_by_the_library_to_the_bit(tmp_path: Path) -> None:
    file = tmp_path / "many.safetensors"
    stream_tensors(file, shapes(MANY), MANY)
    found = load_file(file)
    assert found.keys() == MANY.keys()
    for name, tensor in MANY.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}, "transformers asks for it"
    assert [f.name for f in tmp_path.iterdir()] == ["many.safetensors"]


def test_a_tensor_is_asked_for_once_and_cast_to_what_was_said(tmp_path: Path) -> None:
    asked: list[str] = []

    class Lazily(Mapping[str, Tensor]):
        def __getitem__(self, name: str) -> Tensor:
            asked.append(name)
            return torch.full((2,), 1 / 3)

        def __iter__(self) -> Iterator[str]:
            return iter("ab")

        def __len__(self) -> int:
            return 2

    stream_tensors(
        tmp_path / "f", {name: torch.empty(2, dtype=torch.float16, device="meta") for name in "ab"}, Lazily()
    )
    assert asked == ["a", "b"]
    assert torch.equal(read_tensors(tmp_path / "f")["a"], torch.full((2,), 1 / 3).half())


def test_a_failure_leaves_no_file(tmp_path: Path) -> None:
    class Broken(dict[str, Tensor]):
        def __getitem__(self, name: str) -> Tensor:
            raise UserError("its base is gone")

    with pytest.raises(UserError, match="gone"):
        stream_tensors(tmp_path / "f", shapes(MANY), Broken())
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="cannot be written"):
        stream_tensors(tmp_path / "nowhere" / "f", shapes(MANY), MANY)


def test_others_may_read_what_is_written(tmp_path: Path) -> None:
    """As any new file, by the process's mask; safetensors' own writer keeps it to its owner."""
    write_tensors(tmp_path / "f", MANY, {"step": "1"})
    (tmp_path / "plain").write_text("")
    assert (tmp_path / "f").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert read_metadata(tmp_path / "f") == {"step": "1"}
