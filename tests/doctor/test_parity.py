"""Parity: real engines are green, and every kind of difference is red."""

import json
import re
import shutil
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from snell_dist.config import UserError
from snell_dist.doctor import parity, trace
from snell_dist.doctor.trace import Plan, Trace

ENGINES = ["ddp", "fsdp", "zero3"]


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> tuple[parity.Setting, Path, parity.Report]:
    """Two real processes, three engines, with and without remat."""
    out = tmp_path_factory.mktemp("parity")
    setting = parity.choose(None, ["train.device=cpu"], processes=2, steps=3, engines=ENGINES)
    return setting, out, parity.run(setting, out, limit_s=240)


@pytest.mark.xdist_group("parity")
def test_engines_equal_one_process_to_the_bit(real: tuple[parity.Setting, Path, parity.Report]) -> None:
    _, _, report = real
    assert [(row.engine, row.remat) for row in report.rows[1:]] == [(e, p) for e in ENGINES for p in parity.POLICIES]
    assert not report.reasons() and not report.red
    for row in report.rows[1:]:
        assert row.difference is not None
        assert row.difference.loss == row.difference.trained == 0
        assert row.same is (True if row.remat == "block" else None)
    assert report.bits == ENGINES


@pytest.mark.xdist_group("parity")
def test_what_is_altered_on_disk_is_red(real: tuple[parity.Setting, Path, parity.Report], tmp_path: Path) -> None:
    """The last bit of one number, a loss, a moved base, a missing gradient, a damaged file, a missing tensor."""
    setting, good, _ = real
    out = tmp_path / "out"
    shutil.copytree(good, out)

    def verdicts() -> dict[str, str]:
        return {f"{row.engine} {row.remat}": row.verdict for row in parity.compare(setting, out).rows[1:]}

    file = out / f"{parity.case('fsdp', 'block')}.safetensors"
    tensors = load_file(file)
    name = next(iter(tensors))
    tensors[name].view(-1)[0] = torch.nextafter(tensors[name].view(-1)[0], torch.tensor(9.0))
    save_file(tensors, file)
    assert [which for which, verdict in verdicts().items() if verdict == "red"] == ["fsdp block"]
    (row,) = [row for row in parity.compare(setting, out).rows if row.verdict == "red"]
    assert row.same is False and any("remat changes" in why for why in row.wrong)

    for what in (
        {"losses": [1.0, 1.0, 1.0]},
        {"losses": [float("nan")] * 3},
        {"norms": [1.0, 1.0, 1.0]},
        {"frozen_moved": True},
        {"without_gradient": ["head.bias"]},
        {"died": "killed", "losses": None},
    ):
        was = Trace.read(out, parity.case("ddp", "block"))
        replace(was, **what).write(out)
        assert verdicts()["ddp block"] == "red", what
        was.write(out)
    assert verdicts()["ddp block"] == "green"
    del tensors[name]
    save_file(tensors, out / f"{parity.case('zero3', 'none')}.safetensors")
    file.write_bytes(file.read_bytes()[:99])
    assert [which for which, verdict in verdicts().items() if verdict == "red"] == [
        "fsdp block",
        "zero3 none",
        "zero3 block",
    ]


@pytest.mark.xdist_group("parity")
def test_the_report_is_a_table_and_json(real: tuple[parity.Setting, Path, parity.Report]) -> None:
    report = real[2]
    text = report.text()
    assert "demo: 3 steps of 12 images on cpu; 2 processes against one that accumulates 2 micro-batches" in text
    assert text.count("green") == 7 and "red" not in text
    said = json.loads(report.json())
    assert said["green"] and len(said["rows"]) == 7 and said["rows"][1]["trace"]["losses"]


@pytest.fixture
def follow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., parity.Report]:
    """One process plays both parts: what an "engine" adds to the reference's settings is the difference."""

    def run(engines: dict[str, str], *overrides: str) -> parity.Report:
        settings = {name: ["engine.name=ddp", "data.micro_batch_size=6", words] for name, words in engines.items()}
        monkeypatch.setattr(parity, "ENGINES", parity.ENGINES | settings)
        setting = parity.choose(None, overrides, 2, 3, list(engines))
        cases = [*setting.alone(), *setting.together()]
        trace.follow(Plan(setting.source, cases, setting.steps, "cpu", tmp_path))
        return parity.compare(setting, tmp_path)

    return run


@pytest.mark.parametrize("clip", [[], ["optim.clip_norm=0.5"]])
def test_real_differences_are_red(clip: list[str], follow: Callable[..., parity.Report]) -> None:
    """To the bit, and within what rounding may do where gradients are clipped."""
    broken = ["train.seed=1", "optim.lr=0.101", "optim.weight_decay=0", "optim.eps=1e-4", "task.label_smoothing=0.001"]
    report = follow({f"with {words}": words for words in broken}, *clip)
    assert (report.bits == []) is bool(clip)
    assert [row.verdict for row in report.rows] == ["green"] + ["red"] * 2 * len(broken), report.text()


def test_rounding_alone_is_green(follow: Callable[..., parity.Report]) -> None:
    report = follow({"coarser": "data.micro_batch_size=12"}, "optim.clip_norm=0.5")
    assert not report.red, report.text()
    assert report.rows[1].difference and report.rows[1].difference.trained > 0


def test_a_refusal_is_neither_green_nor_red(follow: Callable[..., parity.Report]) -> None:
    report = follow({"other": "engine.replicas=2"})
    assert [row.verdict for row in report.rows] == ["green", "refused", "refused"]
    assert not report.red and "replicas" in report.reasons()[0]


def test_what_ranks_draw_is_turned_off_and_said() -> None:
    overrides = ["method.dropout=0.1", "task.mixup=0.8", "optim.warmup_steps=0", "optim.warmup_epochs=3"]
    setting = parity.choose("demo", overrides, 2, 3, [])
    off = ["backbone.weights=config:demo/pretrain", "method.dropout=0.1", "task.mixup=0.8", "optim.warmup_epochs=3"]
    assert parity.turned_off(setting) == off
    assert setting.engines == list(parity.ENGINES)


def test_mistakes_are_said_before_anything_starts() -> None:
    for arguments, message in (
        ((["data.batch_size=13"], 2, 3, []), "data.batch_size = 13: must be a multiple of --processes 2"),
        (([], 2, 3, ["zero4"]), "unknown, did you mean 'zero3'?"),
        (([], 0, 3, []), "both must be at least 1"),
        ((["train.device=cuda"], 99, 3, []), "GPUs for 99 processes"),
    ):
        with pytest.raises(UserError, match=message.replace("?", "\\?")):
            parity.choose(None, *arguments)


@pytest.mark.parametrize(
    ("accident", "said"),
    [
        ("raise RuntimeError('the cable is cut')", "ended with status 1: .*RuntimeError: the cable is cut"),
        ("time.sleep(99)", "no end after 25 s: .*in losing"),
    ],
)
def test_processes_that_die_or_hang_are_reported(
    accident: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A module of the trace's name that has an accident in its second case; what follows a death still runs."""
    (tmp_path / "stand_in.py").write_text(
        textwrap.dedent(f"""\
        import faulthandler, json, os, signal, sys, time
        from pathlib import Path
        faulthandler.register(signal.SIGTERM, chain=True)
        plan = json.loads(Path(sys.argv[1]).read_text())
        def losing():
            {accident}
        for case in plan["cases"]:
            file = Path(plan["out"]) / (case["name"] + ".json")
            if not file.exists() and os.environ["RANK"] == "0":
                if case["name"] == "ddp, remat block":
                    losing()
                file.write_text(json.dumps({{"name": case["name"]}}))
        time.sleep(99 if os.environ["RANK"] == "1" and "sleep" in {accident!r} else 0)
        """)
    )
    monkeypatch.setattr(parity, "TRACE", "stand_in")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    setting = parity.choose(None, [], 2, 3, ["ddp", "fsdp"])
    plan = Plan("demo", setting.together(), 3, "cpu", tmp_path)
    parity.follow(plan, 2, limit_s=25)  # for the start of torchrun on a busy machine, too
    died = Trace.read(tmp_path, "ddp, remat block").died
    assert died is not None
    assert re.search(said, died, re.DOTALL), died
    assert Trace.read(tmp_path, "ddp, remat none").died is None
    rest = Trace.read(tmp_path, "fsdp, remat none")
    assert (rest.refused is not None) is ("sleep" in accident) and rest.died is None
