"""What the driver says of a GPU, through a stand-in for the driver: no machine of ours has one."""

from types import SimpleNamespace

import pynvml
import pytest
import torch

from snell_dist.observers.telemetry import Telemetry


def test_without_a_gpu_it_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    assert Telemetry(torch.device("cpu")).read() == {}
    assert capfd.readouterr() == ("", "")


def test_cuda_without_a_driver_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """nvidia-ml-py itself, which finds no driver here."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="x"))
    assert Telemetry(torch.device("cuda", 0)).read() == {}


def test_figures_are_those_of_torchs_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(handle: str) -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=f"uuid-{device.index}")
    )
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", lambda uuid: uuid)
    monkeypatch.setattr(
        pynvml, "nvmlDeviceGetMemoryInfo", lambda h: SimpleNamespace(used={"GPU-uuid-1": 3 * 2**30}.get(h, 0))
    )
    monkeypatch.setattr(pynvml, "nvmlDeviceGetUtilizationRates", lambda h: SimpleNamespace(gpu=87))
    monkeypatch.setattr(pynvml, "nvmlDeviceGetPowerUsage", lambda h: 412_500)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetTemperature", lambda h, kind: 61)
    found = Telemetry(torch.device("cuda", 1)).read()
    assert found == {
        "gpu_memory_mib": 3072, "gpu_utilisation": 87, "gpu_power_w": 412.5, "gpu_temperature_c": 61,
    }  # fmt: skip
    monkeypatch.setattr(pynvml, "nvmlDeviceGetPowerUsage", refuses)
    assert "gpu_power_w" not in Telemetry(torch.device("cuda", 1)).read(), "what the driver does not tell is left out"
