"""What the machine does while it trains: this process's memory, and on NVIDIA what the driver says of its GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

MIB = 2**20


class Telemetry:
    """`read()` gives `gpu_memory_mib` (of the whole device), `gpu_utilisation` (%), `gpu_power_w`,
    `gpu_temperature_c`; nothing, and no word of it, where there is no NVIDIA GPU or the driver does not tell.
    """

    def __init__(self, device: torch.device) -> None:
        self._handle: Any = _handle(device) if device.type == "cuda" else None

    def read(self) -> dict[str, float]:
        if self._handle is None:
            return {}
        import pynvml

        asked = {
            "gpu_memory_mib": lambda: pynvml.nvmlDeviceGetMemoryInfo(self._handle).used / MIB,
            "gpu_utilisation": lambda: float(pynvml.nvmlDeviceGetUtilizationRates(self._handle).gpu),
            "gpu_power_w": lambda: pynvml.nvmlDeviceGetPowerUsage(self._handle) / 1000,
            "gpu_temperature_c": lambda: float(
                pynvml.nvmlDeviceGetTemperature(self._handle, pynvml.NVML_TEMPERATURE_GPU)
            ),
        }
        found = {}
        for name, ask in asked.items():
            try:
                found[name] = ask()
            except pynvml.NVMLError:  # MIG slices and some drivers do not tell all
                continue
        return found


def _handle(device: torch.device) -> Any:
    """The driver's handle of torch's device: by UUID, since CUDA_VISIBLE_DEVICES renumbers."""
    import pynvml
    import torch

    try:
        pynvml.nvmlInit()
        return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    except pynvml.NVMLError:
        return None
