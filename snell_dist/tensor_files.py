"""Files of tensors by name, in the format safetensors: read, written, and written one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from snell_dist.config import UserError, first_line
from snell_dist.files import sync

if TYPE_CHECKING:
    from torch import Tensor

NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
ALIGNED = 8  # bytes
FOR_TORCH = {"format": "pt"}  # what Transformers asks for


def read_tensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU. UserError where it is missing or damaged."""
    try:
        return load_file(file)
    except FileNotFoundError:
        raise UserError(f"{file}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: not a whole safetensors file ({error}); was its copy cut off?") from None


def read_metadata(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return opened.metadata() or {}


def write_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A safetensors file, whole or absent, on the disk when this returns. UserError where it cannot be written."""
    stream_tensors(file, tensors, tensors, metadata)


def stream_tensors(
    file: Path, shapes: Mapping[str, Tensor], tensors: Mapping[str, Tensor], metadata: Mapping[str, str] = FOR_TORCH
) -> None:
    """As `write_tensors`, holding one tensor at a time: `shapes` says what will come (tensors on the meta device), and
    in which order `tensors`, which makes each when it is asked for, is asked; their order in the file is that of names.
    UserError where the file cannot be written.
    """
    names = sorted(shapes, key=lambda name: (-shapes[name].element_size(), name))  # large elements first: all aligned
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    starts, end = {}, 0
    for name in names:
        starts[name], end = end, end + shapes[name].numel() * shapes[name].element_size()
        place = [starts[name], end]
        said = {"dtype": NAMES[shapes[name].dtype], "shape": list(shapes[name].shape), "data_offsets": place}
        header[name] = said
    words = json.dumps(header, separators=(",", ":")).encode()
    words += b" " * (-len(words) % ALIGNED)
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        with temporary.open("wb") as stream:
            stream.write(len(words).to_bytes(8, "little") + words)
            first = stream.tell()
            for name in shapes:
                tensor = tensors[name].detach().to(device="cpu", dtype=shapes[name].dtype).contiguous()
                assert tensor.shape == shapes[name].shape, name
                stream.seek(first + starts[name])
                stream.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
        sync(temporary)
        temporary.replace(file)
    except OSError as error:
        raise UserError(f"{file}: cannot be written: {first_line(error)}") from None
    finally:
        temporary.unlink(missing_ok=True)
