"""One measurement of `gpu_report.py`, in a process of its own, so that whatever becomes of it costs one row.

    python profiling/gpu_case.py '{"kind": "memory", ...}'

What needs no device comes first (imports, the prediction); then it says "ready" and waits for a line, by which it has
the device to itself. What it found is the last line of its output, as JSON.
"""

from __future__ import annotations

import gc
import json
import os
import pickle
import signal
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import bench_operator
import compare
import paper_memory
import torch
from demo import environment

from snell_dist import dist
from snell_dist.config import load
from snell_dist.memory import device as device_memory
from snell_dist.memory import profile, rehearsal
from snell_dist.memory.rehearsal import Rehearsal
from snell_dist.memory.standin import AMPERE
from snell_dist.run_config import Run

PEFT = "PEFT LoRA-8"
SMALL: dict[str, dict[str, Any]] = {  # for the rehearsal on a CPU
    "ViT small": {
        "name": "vit", "size": "tiny", "image_size": 32, "patch_size": 8, "width": 96, "depth": 5, "heads": 4,
    },
    "CLIP small": {
        "name": "clip", "size": "ViT-B-32", "image_size": 32, "patch_size": 8, "width": 96, "depth": 5, "heads": 4,
        "features": 32, "text_width": 32, "text_depth": 2, "text_heads": 2, "context": 12,
    },
}  # fmt: skip
ROUNDS = 5
WARM_UP = {"cuda": 3, "cpu": 1}
STEPS_A_TURN = {"cuda": 2, "cpu": 1}  # so many in a row, so that a GPU never waits to be told
CALLS_A_TURN = {"cuda": 10, "cpu": 1}
TURNS_S = 15.0  # of contenders taking turns
HISTORY = 100_000  # of the allocator's events, in the snapshot

SETTINGS = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "CUBLAS_WORKSPACE_CONFIG", "CUDA_MODULE_LOADING"

Labels = Mapping[str, Any]
Measure = Callable[[torch.device], dict[str, Any]]


def main() -> None:
    dist.end_with_parent(signal.SIGKILL)
    said = json.loads(sys.argv[1])
    measure = KINDS[said["kind"]](said)
    print("ready", flush=True)
    sys.stdin.readline()
    found = measure(dist.pick_device(said["device"]))
    print(json.dumps(found))
    dist.leave(0)  # at once: nobody needs the model taken apart


def configuration(labels: Labels) -> Run:
    """Attention written out is the paper's setting, which has a configuration of its own."""
    backbone = (compare.BACKBONES | SMALL)[labels["backbone"]]
    method = compare.METHODS["LoRA-8" if labels["method"] == PEFT else labels["method"]]
    if labels["attention"] == "explicit":
        sections = {"backbone": backbone, "method": method, "data": {"batch_size": labels["batch"]}}
        overrides = [f"{name}.{key}={value}" for name, section in sections.items() for key, value in section.items()]
        config = load(paper_memory.CONFIG, overrides, Run, sweeping=True).config
    else:
        config = compare.config(backbone, method, labels["batch"], labels["precision"], labels["remat"])
    return paper_memory.by_peft(config) if labels["method"] == PEFT else config


def made_there(config: Run, device: torch.device) -> Rehearsal:
    """Everything of a step, made on the device itself, since a host fills a large model slowly; its images are not."""
    size = config.data.batch_size
    with device:
        made = rehearsal.prepare(config, device, size)
    made = replace(made, micro_batch_size=size, micro_batches=1)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what making the model has left
    return made


def machine(said: Mapping[str, Any]) -> Measure:
    """What there is to measure on."""

    def measure(device: torch.device) -> dict[str, Any]:
        about = environment() | {"device": device.type, "capability": AMPERE}
        about["float32_products"] = torch.get_float32_matmul_precision()
        if device.type == "cuda":
            torch.ones(1, device=device).item()
            properties = torch.cuda.get_device_properties(device)
            about |= {
                "device": properties.name,
                "capability": (properties.major, properties.minor),
                "uuid": str(properties.uuid),
                "memory_bytes": properties.total_memory,
                "driver": driver(),
                "settings": {name: os.environ[name] for name in SETTINGS if name in os.environ},
                "first_figures": asdict(device_memory.figures(device)),
            }
            about["versions"] |= {"CUDA": torch.version.cuda, "cuDNN": torch.backends.cudnn.version()}
        return about

    return measure


def driver() -> str | None:
    """The version of NVIDIA's driver, where it tells."""
    import pynvml

    try:
        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except pynvml.NVMLError:
        return None


def memory(said: Mapping[str, Any]) -> Measure:
    """A step beside its prediction."""
    config = configuration(said["labels"])
    share = profile.predicted(config, said["device"], tuple(said["capability"]))

    def measure(device: torch.device) -> dict[str, Any]:
        made = made_there(config, device)
        found = profile.as_json(profile.measured(made, share, device))
        return found | {"trainable": sum(weight.numbers for weight in made.weights if weight.trains)}

    return measure


def steps(said: Mapping[str, Any]) -> Measure:
    """A whole training step of several methods, in turns."""
    configs = {name: configuration({**said["labels"], "method": name}) for name in said["methods"]}

    def measure(device: torch.device) -> dict[str, Any]:
        calls = {name: made_there(config, device).step for name, config in configs.items()}
        turns = bench_operator.interleaved(
            calls, said["rounds"], device, WARM_UP[device.type], STEPS_A_TURN[device.type], TURNS_S
        )
        return {"seconds_by_method": medians(turns)}

    return measure


def operator(said: Mapping[str, Any]) -> Measure:
    """One layer's forward and backward, ours and its rivals', in turns."""
    case, dtype = bench_operator.Case(**said["case"]), getattr(torch, said["precision"])

    def measure(device: torch.device) -> dict[str, Any]:
        calls = bench_operator.contenders(case, device, dtype)
        turns = bench_operator.interleaved(
            calls, said["rounds"], device, WARM_UP[device.type], CALLS_A_TURN[device.type], TURNS_S
        )
        peaks = {name: bench_operator.peak_mib(call, device) for name, call in calls.items()}
        product = 2 * case.tokens * case.in_features * case.out_features
        return {"seconds_by_method": medians(turns), "peak_mib": peaks, "product_gflop": product / 1e9}

    return measure


def snapshot(said: Mapping[str, Any]) -> Measure:
    """The allocator's history of one step, for the public viewer; nothing on a CPU."""
    config, file = configuration(said["labels"]), Path(said["file"])

    def measure(device: torch.device) -> dict[str, Any]:
        made = made_there(config, device)
        made.step()
        if device.type != "cuda":
            return {"file": None}
        torch.cuda.memory._record_memory_history(context="alloc", stacks="python", max_entries=HISTORY)
        made.step()
        written = device_memory.snapshot(file)
        torch.cuda.memory._record_memory_history(enabled=None)
        if written is None:
            raise OSError(f"{file}: the allocator's snapshot could not be written")
        with written.open("rb") as stream:
            found = pickle.load(stream)  # which this very process has just written
        events = sum(map(len, found["device_traces"]))
        return {
            "file": file.name,
            "bytes": written.stat().st_size,
            "segments": len(found["segments"]),
            "events": events,
        }

    return measure


def medians(turns: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(seconds) for name, seconds in turns.items()}


KINDS: dict[str, Callable[[Mapping[str, Any]], Measure]] = {
    each.__name__: each for each in (machine, memory, steps, operator, snapshot)
}


if __name__ == "__main__":
    main()
