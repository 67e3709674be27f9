"""A run's weights under the names and in the shapes of another library, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from torch import Tensor

from snell_dist.finished import Folded

Publish = Callable[[str, Tensor], Iterator[tuple[str, Tensor]]]


class Renamed(Mapping[str, Tensor]):
    """What `publish` makes of each weight, made when it is asked for; `shapes`: the same on the meta device.

    All that one weight became stays until another is needed, so a fused matrix is folded once for q, k and v.
    """

    def __init__(self, weights: Folded, publish: Publish) -> None:
        self._weights, self._publish = weights, publish
        self.shapes: dict[str, Tensor] = {}
        self._source: dict[str, str] = {}
        for source, tensor in weights.shapes.items():
            for name, part in publish(source, tensor):
                self.shapes[name], self._source[name] = part, source
        self._made: dict[str, Tensor] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._made:
            self._made.clear()
            source = self._source[name]
            self._made.update(self._publish(source, self._weights[source]))
        return self._made[name]
