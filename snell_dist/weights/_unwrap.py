"""The model's tensors inside what training scripts save around them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from snell_dist.weights._files import Unreadable

# Averaged weights first: they are what a file that has both was evaluated with.
WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model", "model_state_dict", "module", "teacher")
PREFIXES = ("module.", "_orig_mod.", "model.", "timm_model.", "backbone.", "encoder.")


def tensors(tree: Any) -> dict[str, Tensor]:
    """The innermost dictionary that the known wrappers lead to, tensors only."""
    while isinstance(tree, Mapping) and (inner := [tree[w] for w in WRAPPERS if isinstance(tree.get(w), Mapping)]):
        tree = inner[0]
    found = {str(name): t for name, t in tree.items() if isinstance(t, Tensor)} if isinstance(tree, Mapping) else {}
    if not found:
        said = f"holds {', '.join(map(str, list(tree)[:4]))}" if isinstance(tree, Mapping) else "holds no dictionary"
        raise Unreadable(f"has no tensors by name: it {said} (looked in: {', '.join(WRAPPERS)})")
    return found


def views(state: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """The state as it is, then without the prefixes that most of its names share, one after another."""
    yield state
    for prefix in PREFIXES:
        inside = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
        if 2 * len(inside) > len(state):
            yield from views({n: t for n, t in state.items() if not n.startswith(prefix)} | inside)
