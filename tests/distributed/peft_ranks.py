"""A PEFT user's training script under accelerate: `torchrun peft_ranks.py FOLDER` trains by DDP, then by FSDP2.

Each writes its adapter to FOLDER/WAY; each rank, how many parameters it holds and there are, to FOLDER/WAY_RANK.held.
`train` alone is one process that sees all of every batch.
"""

import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from peft import PeftModel, get_peft_model
from torch.distributed.tensor import DTensor

from snell_dist.peft import SnellConfig

STEPS, BATCH = 3, 4
WAYS: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp": {"fsdp_version": 2, "auto_wrap_policy": "transformer_based_wrap", "reshard_after_forward": True},
}


def base() -> torch.nn.Module:
    torch.manual_seed(0)
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=16,
            patch_size=4, num_labels=5,
        )
    )  # fmt: skip


def adapted() -> PeftModel:
    besides: dict[str, Any] = {"modules_to_save": ["classifier"], "parameters_to_save": ["*cls_token", "*_before.bias"]}
    return get_peft_model(base(), SnellConfig(rank=4, sparsity=0.5, seed=1, **besides))


def train(accelerator: Accelerator, folder: Path, checkpointing: bool = False) -> PeftModel:
    model = adapted()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.5)
    model, optimizer = accelerator.prepare(model, optimizer)
    generator = torch.Generator().manual_seed(2)
    rank, ranks = accelerator.process_index, accelerator.num_processes
    for _ in range(STEPS):
        images, labels = torch.randn(BATCH, 3, 16, 16, generator=generator), torch.arange(BATCH)
        loss = model(pixel_values=images[rank::ranks], labels=labels[rank::ranks]).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    state = accelerator.get_state_dict(model)
    whole = accelerator.unwrap_model(model)
    if accelerator.is_main_process:  # who alone has all of a sharded model's tensors
        whole.save_pretrained(folder, state_dict=state)
    accelerator.wait_for_everyone()
    return whole


def main(folder: Path) -> None:
    for way, said in WAYS.items():
        AcceleratorState._reset_state(reset_partial_state=False)
        plugin = FullyShardedDataParallelPlugin(**said, transformer_cls_names_to_wrap=["ViTLayer"]) if said else None
        accelerator = Accelerator(cpu=True)
        if plugin is not None:  # accelerate asks for a GPU first, and its code then needs none
            PartialState().distributed_type = accelerator.state.distributed_type = DistributedType.FSDP
            accelerator.state.fsdp_plugin = plugin
        model = train(accelerator, folder / way, checkpointing=way == "fsdp")
        here = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in model.parameters())
        held = f"{here} {sum(p.numel() for p in model.parameters())}"
        (folder / f"{way}_{accelerator.process_index}.held").write_text(held)  # lines of two ranks may run together


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    torch.distributed.destroy_process_group()
