import torch

from snell_dist.memory.measure import memory_profiler, peak_of


def test_the_peak_is_what_was_alive_together() -> None:
    with memory_profiler() as profiler:
        first = torch.empty(1000, dtype=torch.float32)
        second = torch.empty(3000, dtype=torch.float32)
        del first
        third = torch.empty(500, dtype=torch.float32)
        del second, third
    assert 16_000 <= peak_of(profiler) < 16_000 + 2_000
