"""The protocol of a run: which images it may learn from, when it looks at its weights, and which it keeps.

    select        trains on                          looks at   reports
    val           train without val                  val        the best look's weights, on test once
    last          all labelled images (VTAB: 1,000)  val        the last weights, on test once
    paper_compat  all labelled images                test       the best look at test

`paper_compat` is what the released code of SNELL does: its number is chosen on the test images, and is marked so
wherever it is shown.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from snell_dist.config import Section


class Protocol(Section):
    select: Literal["val", "last", "paper_compat"] = Field(
        "val", description="the weights that are reported: best on val, last, or best on test as released (marked)"
    )

    @property
    def all_labelled(self) -> bool:
        """Whether val's images train as well, where the benchmark has it so."""
        return self.select != "val"

    @property
    def looks_at(self) -> Literal["val", "test"]:
        return "test" if self.select == "paper_compat" else "val"

    def chosen(self, step: int, steps: int, looks: int) -> str:
        """How the reported weights were chosen, in words."""
        if self.select == "last":
            return f"last weights, after step {steps}"
        where = "on the TEST images, as the released code does" if self.select == "paper_compat" else "on val"
        return f"best of {looks} looks {where}: after step {step} of {steps}"
