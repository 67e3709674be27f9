"""The serving check, against timm by hand, on pictures in files."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import timm
import torch
from conftest import snell
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits

import snell_dist
from snell_dist import formats, log
from snell_dist.cli import main
from snell_dist.config import UserError
from snell_dist.run_folder import read_summary

CLASSES = ["five", "six", "seven", "eight", "nine"]
INKS = load_digits().data.reshape(-1, 8, 8)[5:12]  # 0..16


@pytest.fixture(scope="module")
def exported(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    to = tmp_path_factory.mktemp("exported") / "timm"
    formats.export(finished, "timm", to)
    return to


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven digits in two folders, the third of which is cut off; a text is beside them."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "more").mkdir()
    for i, ink in enumerate(INKS):
        picture = Image.fromarray((ink * 15).astype("uint8"))
        picture.save(folder / ("more" if i > 4 else "") / f"{i}.png")
    whole = (folder / "2.png").read_bytes()
    (folder / "2.png").write_bytes(whole[: len(whole) // 2])
    (folder / "about.txt").write_text("no picture")
    return folder


def by_hand(folder: Path) -> torch.Tensor:
    """Probabilities [7, 5] of timm's model on the same digits."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        return model(torch.tensor(INKS, dtype=torch.float32).unsqueeze(1) / 8 - 1).softmax(1)


def test_lines_come_in_order_with_the_probabilities_of_timm(exported: Path, pictures: Path) -> None:
    done = snell("predict", exported, pictures, "--batch-size", "3", "--top", "2", "--device", "cpu")
    assert done.returncode == 2, done.stderr
    assert not done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    names = ["0.png", "1.png", "2.png", "3.png", "4.png", "more/5.png", "more/6.png"]
    assert [row["file"] for row in rows] == [str(pictures / name) for name in names]
    assert rows[2].keys() == {"file", "error"}
    assert rows[2]["error"].startswith("is no whole image")
    best = by_hand(exported).topk(2)
    for i, row in enumerate(rows):
        if i != 2:
            assert [said["class"] for said in row["predictions"]] == [CLASSES[c] for c in best.indices[i]]
            found = [said["probability"] for said in row["predictions"]]
            assert found == pytest.approx(best.values[i].tolist(), abs=2e-6)


def test_a_run_and_what_was_exported_of_it_say_the_same_in_python(
    finished: Path, exported: Path, pictures: Path
) -> None:
    run, model = snell_dist.load(finished, device="cpu"), snell_dist.load(exported, device="cpu")
    assert run.classes == model.classes == CLASSES
    files = [pictures / "0.png", str(pictures / "1.png"), Image.open(pictures / "3.png")]
    expected = by_hand(exported)[[0, 1, 3]]
    for found in (run.predict(files, top=9), model.predict(files, top=9)):
        for guesses, row in zip(found, expected, strict=True):
            assert {g.name: g.probability for g in guesses} == pytest.approx(
                dict(zip(CLASSES, row.tolist(), strict=True)), abs=1e-5
            )
            assert [g.probability for g in guesses] == sorted((g.probability for g in guesses), reverse=True)
    assert run.predict(pictures / "0.png", top=1) == run.predict([pictures / "0.png"], top=1)[0]
    assert run.predict([]) == []
    with pytest.raises(UserError, match=r"2\.png: is no whole image"):
        run.predict(pictures / "2.png")


def test_a_picture_in_colour_of_another_size_is_prepared(exported: Path, tmp_path: Path) -> None:
    wide = Image.fromarray((INKS[0] * 15).astype("uint8")).resize((32, 16), Image.Resampling.NEAREST).convert("RGBA")
    wide.save(tmp_path / "wide.png")
    best = snell_dist.load(exported, device="cpu").predict(tmp_path / "wide.png", top=5)
    assert sum(guess.probability for guess in best) == pytest.approx(1, abs=1e-5)


def test_weights_that_diverged_are_an_error_in_each_line(
    exported: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(exported, broken)
    tensors = load_file(broken / "model.safetensors")
    save_file(tensors | {"head.bias": torch.full((5,), torch.nan)}, broken / "model.safetensors", {"format": "pt"})
    assert main(["predict", str(broken), str(pictures / "0.png")]) == 2
    assert "nothing finite" in json.loads(capsys.readouterr().out)["error"]
    with pytest.raises(UserError, match="nothing finite"):
        snell_dist.load(broken, device="cpu").predict(pictures / "0.png")


@pytest.mark.parametrize("name", ["run", "timm", "hf", "delta", "clip run", "open_clip", "clip hf", "clip delta"])
def test_a_model_goes_whole_to_another_device(name: str, finished: Path, finished_clip: Path, tmp_path: Path) -> None:
    """To `meta`, where a tensor that stayed behind on the CPU is an error."""
    run = finished_clip if "clip" in name else finished
    format = name.removeprefix("clip ")
    if format != "run":
        formats.export(run, format, tmp_path / "model")
    served = formats.serve(run if format == "run" else tmp_path / "model")
    assert served.to(torch.device("meta")).type == "meta"
    with torch.inference_mode():
        logits = served.logits(torch.zeros(2, *served.image_shape, device="meta"))
    assert (logits.device.type, logits.shape) == ("meta", (2, 5))
    picture = Image.fromarray((INKS[0] * 15).astype("uint8"))
    sent = pickle.loads(pickle.dumps(served.prepare))  # to a process that reads images
    assert torch.equal(sent(picture), served.prepare(picture))


def test_globs_folders_and_files_are_named_once_each(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from snell_dist.predict import find

    monkeypatch.chdir(pictures)
    assert [str(f) for f in find(["4.png", "**/[56].png", "."])] == [
        "4.png", "more/5.png", "more/6.png", "0.png", "1.png", "2.png", "3.png",
    ]  # fmt: skip
    assert [str(f) for f in find(["about.txt"])] == ["about.txt"], "a file is taken at its word"
    with pytest.raises(UserError) as error:
        find(["0.png", "x.png", "y*.png"])
    assert str(error.value).splitlines() == ["x.png: no such file", "y*.png: matches no file"]


def evaluated(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    log.set_up()
    status = main(["eval", *map(str, arguments), "train.device=cpu"])
    said = capsys.readouterr()
    return status, said.out or said.err.splitlines()[-1]


def test_what_was_exported_is_as_accurate_as_the_run(
    finished: Path, exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = read_summary(finished)
    status, line = evaluated(capsys, exported, "--data", finished)
    assert status == 0
    assert line.startswith(f"test accuracy {said['test_accuracy']:.4f} loss {said['test_loss']:.4f} ")
    # the same classes in another order are the same classes
    status, turned = evaluated(capsys, exported, "--data", "demo", "data.classes=[9,8,7,6,5]")
    assert (status, turned) == (0, line)
    status, wrong = evaluated(capsys, exported, "--data", "demo", "data.classes=[0,8,7,6,5]")
    assert status == 2
    assert "knows other classes than the data of demo, which has zero" in wrong
    status, wrong = evaluated(capsys, exported, "--data", "demo", "data.classes=[6,5]")
    assert "knows 5 classes, and the data of demo has 2" in wrong
    status, wrong = evaluated(capsys, exported)
    assert status == 2
    assert "say whose images it shall look at: --data CONFIG" in wrong


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "nowhere: no such folder; expected is a run folder, or what snell export wrote as delta, hf,"),
        (["."], ".: is no model; expected is a run folder, or what snell export wrote as delta, hf,"),
        (["nowhere", "--top", "0"], "--top 0 --batch-size 32: both must be at least 1"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], said: str, pictures: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(pictures)
    assert main(["predict", arguments[0], "0.png", *arguments[1:]]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert said in line
