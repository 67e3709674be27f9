"""What only a GPU shows: an estimate, by name, that can be changed, and that is never mixed into what is predicted.

context        CUDA's own memory and the kernels that are loaded; the allocator does not know of it, nvidia-ml-py does
workspace      what cuBLAS keeps for each handle and stream (CUBLAS_WORKSPACE_CONFIG), and cuDNN for convolutions
communicators  NCCL's buffers, where there are other ranks
fragmentation  what the allocator has reserved and cannot give out, as a share of the predicted peak

The figures are middles of what is reported of such systems, not measurements of ours; `make gpu-report` measures them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace

from snell_dist.config import UserError, nearest
from snell_dist.memory.gpus import MIB, in_words, parse_size


@dataclass(frozen=True)
class Overhead:
    context: int = 450 * MIB
    workspace: int = 96 * MIB
    communicators: int = 250 * MIB
    fragmentation: float = 0.03

    def parts(self, peak_bytes: int, many: bool) -> dict[str, int]:
        """Bytes by name. many: whether there are other ranks."""
        return {
            "context": self.context,
            "workspace": self.workspace,
            "communicators": self.communicators if many else 0,
            "fragmentation": round(self.fragmentation * peak_bytes),
        }

    def changed(self, said: Iterable[str]) -> Overhead:
        """With such as context=600MiB or fragmentation=0.05. UserError where that cannot be read."""
        found = self
        for text in said:
            name, _, value = text.partition("=")
            names = [field.name for field in fields(self)]
            if name not in names:
                raise UserError(f"--overhead {text}: unknown{nearest(name, names)} (allowed: {', '.join(names)})")
            if name != "fragmentation":
                found = replace(found, **{name: parse_size(value, f"--overhead {name}=")})
                continue
            try:
                share = float(value)
            except ValueError:
                share = -1.0
            if not 0 <= share < 1:
                raise UserError(f"--overhead {text}: must be a share from 0 to below 1, such as 0.03")
            found = replace(found, fragmentation=share)
        return found

    def __str__(self) -> str:
        sizes = (f"{name} {in_words(getattr(self, name))}" for name in ("context", "workspace", "communicators"))
        return f"{', '.join(sizes)}, fragmentation {self.fragmentation:.0%}"
