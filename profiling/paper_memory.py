"""Memory in the paper's setting: predicted here, printed there, and what makes the difference.

    python profiling/paper_memory.py [--out profiling/results]

Predicts SNELL-8, LoRA-8, full sparse tuning and full tuning on ViT-B, L and H as `configs/scale/paper_memory.yaml` has
them, PEFT's LoRA-8 by the same ledger, and SNELL-8 by the operator that keeps every intermediate, as the paper's code
does. Writes paper_memory.md and paper_memory.json. No GPU is asked for; nothing is trained.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, ClassVar, Literal
from unittest import mock

from demo import environment, where_run
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from snell_dist import ops
from snell_dist.anatomy import Backbone
from snell_dist.config import load
from snell_dist.footprint import Footprint, plain
from snell_dist.memory.predict import predict
from snell_dist.methods import BesidesMethod
from snell_dist.run_config import Run

OURS = ops.snell_linear
CONFIG, MB = "scale/paper_memory", 1e6  # the paper's MB, by its LoRA figures
SIZES = {"base": "ViT-B/16", "large": "ViT-L/16", "huge": "ViT-H/14"}
PAPER = {  # Tables A8 and A12 of SNELL (NeurIPS 2024)
    "lora": {"base": 1546, "large": 4325, "huge": 9325},
    "snell": {"base": 1673, "large": 4519, "huge": 9692},
    "sparse": {"base": 2428, "large": 7522, "huge": 16119},
}
ROWS = {
    "lora": "LoRA-8",
    "peft": "LoRA-8 of PEFT",
    "snell": "SNELL-8",
    "released": "SNELL-8 in the structure of the paper's code",
    "sparse": "full sparse tuning",
    "full": "full tuning",
}


class PeftLora(BesidesMethod):
    """LoRA by the PEFT library, in its own layers."""

    name: Literal["peft"]
    about: ClassVar[str] = "PEFT's LoRA"
    rank: int = 8

    def inject(self, backbone: Backbone) -> None:
        from peft import LoraConfig, inject_adapter_in_model

        targets = [target.layer for target in backbone.targets]
        inject_adapter_in_model(LoraConfig(r=self.rank, target_modules=targets), backbone.model)

    def added(self, backbone: Backbone) -> list[str]:
        return [name for name, _ in backbone.model.named_parameters() if "lora_" in name]


def by_peft(config: Run) -> Run:
    """With PEFT's LoRA-8 in place of the method."""
    return config.model_copy(update={"method": PeftLora(name="peft")})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("profiling/results"))
    args = parser.parse_args()
    found = {row: {size: footprint(row, size) for size in SIZES} for row in ROWS}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "paper_memory.json").write_text(json.dumps(as_json(found), indent=1) + "\n")
    text = report(found)
    (args.out / "paper_memory.md").write_text(text)
    print(text)
    return 0


def footprint(row: str, size: str) -> Footprint:
    method = {"released": "snell", "peft": "lora"}.get(row, row)
    overrides = [f"backbone.size={size}", f"method.name={method}", "method.rank=8"]
    config = load(CONFIG, overrides, Run, sweeping=True).config
    if row == "peft":
        config = by_peft(config)
    if row != "released":
        return predict(config).footprint
    with mock.patch.object(ops, "snell_linear", released):
        return predict(config).footprint


def released(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, **options: Any) -> Tensor:
    """The structure of the paper's code: the whole delta, made again in backward, in a product of its own."""
    options = options | {"state": None, "impl": "reference"}

    def delta(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return OURS(x, None, None, a, b, **options)

    return F.linear(x, weight, bias) + checkpoint(delta, x, a, b, use_reentrant=False)


def as_json(found: dict[str, dict[str, Footprint]]) -> dict[str, Any]:
    return {
        row: {
            size: {
                "peak_bytes": f.peak_bytes,
                "categories": plain(f.peak.bytes),
                "paper_mb": PAPER.get(row, {}).get(size),
            }
            for size, f in sizes.items()
        }
        for row, sizes in found.items()
    }


def report(found: dict[str, dict[str, Footprint]]) -> str:
    lines = [
        "# Memory in the paper's setting",
        "",
        where_run(environment()),
        "",
        "Predicted peaks of one training step in MB (10^6 bytes): batch 8, float32, the attention matrix stored, AdamW,"
        " no dropout on the delta. In brackets what the paper prints, and how far ours is from it.",
        "",
        f"| | {' | '.join(SIZES.values())} |",
        f"|---|{'---|' * len(SIZES)}",
    ]
    for row, label in ROWS.items():
        cells = [_cell(found[row][size], _paper(row, size)) for size in SIZES]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    lines += ["", "| ratio of peaks | " + " | ".join(SIZES.values()) + " |", f"|---|{'---|' * len(SIZES)}"]
    for one, two in (("snell", "peft"), ("snell", "lora"), ("snell", "sparse"), ("snell", "full")):
        ratios = [f"{found[one][s].peak_bytes / found[two][s].peak_bytes:.3f}" for s in SIZES]
        lines.append(f"| {ROWS[one]} over {ROWS[two]} | {' | '.join(ratios)} |")
    return "\n".join([*lines, "", *WHY, ""])


WHY = [
    "- LoRA holds the same tensors in both; what is left may be what no tensor is, such as the allocator's rounding.",
    "- SNELL-8 is below the paper's, whose code makes each layer's delta whole, with its distances, magnitudes and a"
    " sort of them beside it, all there at once when backward is in the largest layer; ours goes by tiles. In that"
    " structure the same ledger gives the row below; the sort's own workspace on a GPU is no tensor and comes on top.",
    "- Full sparse tuning is the paper's GPS, which tunes the weights themselves. Ours keeps the base frozen beside a"
    " dense delta, one copy of the weights more, so that one base serves many tasks.",
]


def _paper(row: str, size: str) -> int | None:
    return PAPER.get(row, {}).get(size)


def _cell(found: Footprint, paper: int | None) -> str:
    size = found.peak_bytes / MB
    return f"{size:,.0f}" + ("" if paper is None else f" ({paper:,}, {size / paper - 1:+.1%})")


if __name__ == "__main__":
    raise SystemExit(main())
