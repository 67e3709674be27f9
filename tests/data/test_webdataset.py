"""Tar shards: exact wherever training stands, named where they are damaged, fetched once where they are streams."""

import functools
import http.server
import json
import multiprocessing
import shutil
import struct
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_feed import as_rank
from webdataset import TarWriter

from snell_dist.config import Plugin, UserError, check
from snell_dist.data import PADDING
from snell_dist.data.digits import Digits
from snell_dist.data.webdataset import Webdataset
from snell_dist.data_tools.pack import Limit, pack
from snell_dist.feed import Feed, batch_indices, every_once


def section(**said: Any) -> Webdataset:
    made = check({"name": "webdataset", "workers": 0, **said}, Plugin("data").find("webdataset"))
    assert isinstance(made, Webdataset)
    return made


@functools.cache
def content(number: int) -> bytes:
    """A PNG of 4 x 4 pixels, whose red is the number."""
    import io

    stream = io.BytesIO()
    Image.new("RGB", (4, 4), (number, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


def write_shard(file: Path, numbers: range) -> Path:
    """As a user of webdataset writes it: a class and further members of which we know nothing."""
    with TarWriter(str(file), mtime=0) as tar:
        for number in numbers:
            tar.write({"__key__": f"{number:04d}", "png": content(number), "cls": number, "json": {"n": number}})
    return file


def write_shards(folder: Path, sizes: list[int]) -> str:
    """Shards of unequal sizes; image i is number i. Returns how to name them."""
    first = 0
    folder.mkdir(parents=True, exist_ok=True)
    for n, size in enumerate(sizes):
        write_shard(folder / f"part-{n:03d}.tar", range(first, first + size))
        first += size
    return f"{folder}/part-{{000..{len(sizes) - 1:03d}}}.tar"


def of_shards(urls: str, **said: Any) -> Webdataset:
    """Pixels from 0 to 1 as they are."""
    own = {"train": urls, "val": urls, "test": urls, "classes": 256, "image_size": 4, "resize": "squeeze"}
    return section(**own | {"augment": False, "normalisation": "half"} | said)


def line(match: str, **said: Any) -> None:
    """One line says what is wrong."""
    with pytest.raises(UserError) as caught:
        of_shards(**said).load(False)
    (first, *_) = str(caught.value).splitlines()
    assert match in first, caught.value


# ---- exact ----


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_no_sample_is_lost_or_doubled(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Ranks x reading processes x shards x a break; fewer shards than readers, and unequal ones, too."""
    sizes = data.draw(st.lists(st.integers(1, 15), min_size=1, max_size=5), label="shards")
    ranks = data.draw(st.integers(1, 4), label="ranks")
    batch = ranks * data.draw(st.integers(1, 6), label="images")
    count = sum(sizes)
    steps = -(-count // batch)
    stop = data.draw(st.integers(0, 2 * steps), label="break")
    urls = write_shards(tmp_path_factory.mktemp("shards"), sizes)
    steps_seen: dict[int, list[int]] = {step: [] for step in range(2 * steps)}
    evaluated, lengths = [], set()
    with pytest.MonkeyPatch.context() as patched:
        for rank in range(ranks):
            as_rank(patched, rank, ranks)
            workers = data.draw(st.sampled_from([0, 0, 0, 1, 2]), label="workers")
            made = of_shards(urls, batch_size=batch, eval_batch_size=3, workers=workers)
            splits = made.load(False)
            for start, end in ((0, stop), (stop, 2 * steps)):
                feed = Feed(splits.train, made, 3, start, end)
                for step in range(start, end):
                    for b in feed.step():
                        real = b.labels != PADDING
                        reds = ((b.images[real][:, 0, 0, 0] + 1) / 2 * 255).round().long()
                        assert torch.equal(reds, b.labels[real]), "an image comes with its own label"
                        steps_seen[step] += b.labels[real].tolist()
            batches = list(every_once(splits.test, made))
            lengths.add(len(batches))
            evaluated += [i for b in batches for i in b.labels.tolist() if i != PADDING]
    assert sorted(evaluated) == list(range(count))
    assert len(lengths) == 1, "equally many batches, so no rank waits for another"
    for step, seen in steps_seen.items():
        assert seen == batch_indices(count, batch, step, 3), "whatever the ranks, readers and breaks"
    for epoch in (0, 1):
        seen = [i for step in range(epoch * steps, (epoch + 1) * steps) for i in steps_seen[step]]
        assert sorted(seen) == list(range(count))


def test_shards_that_people_have(tmp_path: Path) -> None:
    """Folders, dots, upper case, members of no sample, the same keys in each shard, class names in a file."""
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            for name, said in (("a/x.seg.png", 9), ("a/x.cls", 0), ("a/x.JPG", 2), ("README", 1), ("b.1/y.png", 3)):
                file = tmp_path / "member"
                file.write_bytes(str(said).encode() if name.endswith(("cls", "README")) else content(said))
                tar.add(file, name)
            (tmp_path / "member").write_text("1\n")
            tar.add(tmp_path / "member", "b.1/y.cls")
            tar.add(tmp_path, "folder", recursive=False)
    splits = of_shards(f"{tmp_path}/{{0..1}}.tar", classes=str(tmp_path / "names.txt")).load(False)
    assert splits.classes == ["cat", "dog"]
    assert list(splits.train.labels) == [0, 1, 0, 1]
    assert [splits.train.picture(i).getpixel((0, 0))[0] for i in range(4)] == [2, 3, 2, 3]  # type: ignore[index]
    names = [splits.train.name(i) for i in range(4)]
    assert names == [f"{tmp_path}/{n}.tar/{name}" for n in (0, 1) for name in ("a/x.JPG", "b.1/y.png")]


def test_what_is_wrong_with_a_sample_is_one_line(tmp_path: Path) -> None:
    urls = write_shards(tmp_path, [3])
    line("sample '0002': label '2': must be from 0 to 1", urls=urls, classes=2)
    line("sample '0000' has no label (txt); it has cls, json, png", urls=urls, label="txt")
    line("sample '0000' has no image (jpg, jpeg); it has cls, json, png", urls=urls, images="jpg;jpeg")
    line("data.train = 'part-{0..3.tar': its braces cannot be expanded", urls="part-{0..3.tar")
    line("names a shard twice", urls=f"{tmp_path}/part-00{{0,0}}.tar")
    line("names.txt: no such file", urls=urls, classes="names.txt")
    with TarWriter(str(tmp_path / "text.tar"), mtime=0) as tar:
        tar.write({"__key__": "a", "png": b"no image", "cls": "0"})
    line(f"text.tar: byte 1536: {tmp_path}/text.tar/a.png: is no image", urls=f"{tmp_path}/text.tar")
    with TarWriter(str(tmp_path / "empty.tar")):
        pass
    line("train has no images", urls=f"{tmp_path}/empty.tar")


@pytest.mark.parametrize("said", [{}, {"root": "x", "train": "y"}, {"train": "a", "val": "b", "test": "c"}])
def test_one_origin(said: dict[str, str]) -> None:
    with pytest.raises(UserError, match="must say either root, or train, val, test and classes"):
        section(**said)


# ---- damaged ----


def headers(whole: bytes) -> list[int]:
    """Where the members' headers are, by the standard's own fields: a size in octal at byte 124."""
    places, at = [], 0
    while any(whole[at : at + 512]):
        places.append(at)
        at += 512 + -(-int(whole[at + 124 : at + 135], 8) // 512) * 512
    return [*places, at]


def flipped(whole: bytes, at: int) -> bytes:
    return whole[:at] + struct.pack("B", whole[at] ^ 0x10) + whole[at + 1 :]


DAMAGE: dict[str, tuple[Callable[[bytes, list[int]], bytes], Callable[[list[int]], int]]] = {
    "cut in data": (lambda whole, at: whole[: at[7] + 600], lambda at: at[7] + 600),
    "cut at a block border": (lambda whole, at: whole[: at[7]], lambda at: at[7]),
    "cut in a header": (lambda whole, at: whole[: at[7] + 100], lambda at: at[7]),
    "empty": (lambda whole, at: b"", lambda at: 0),
    "flipped header byte": (lambda whole, at: flipped(whole, at[6] + 3), lambda at: at[6]),
    "flipped size of a member": (lambda whole, at: flipped(whole, at[6] + 130), lambda at: at[6]),
    "missing end": (lambda whole, at: whole[: at[-1]], lambda at: at[-1]),
    "half of the end": (lambda whole, at: whole[: at[-1] + 512], lambda at: at[-1]),
    "something after the end": (lambda whole, at: whole + b"x" * 512, lambda at: at[-1]),
}


@pytest.mark.parametrize("kind", sorted(DAMAGE))
def test_a_damaged_shard_is_named_with_its_byte_and_skipped_only_if_allowed(kind: str, tmp_path: Path) -> None:
    urls = write_shards(tmp_path, [5, 6, 4])
    file = tmp_path / "part-001.tar"
    whole = file.read_bytes()
    damage, byte = DAMAGE[kind]
    file.write_bytes(damage(whole, headers(whole)))
    good = write_shard(tmp_path / "good.tar", range(3))
    said: dict[str, Any] = {"val": str(good), "test": str(good)}
    line(f"{file}: is damaged or cut off at byte {byte(headers(whole))}, after ", urls=urls, **said)
    splits = of_shards(urls, max_damaged=1, **said).load(False)
    assert list(splits.train.labels) == [*range(5), *range(11, 15)]
    assert str(file) in splits.about["missing"]


def test_a_missing_shard_and_a_compressed_one(tmp_path: Path) -> None:
    urls = write_shards(tmp_path, [2, 2])
    (tmp_path / "part-001.tar").unlink()
    line("part-001.tar: no such shard", urls=urls)
    with pytest.raises(UserError) as caught:
        of_shards(urls, max_damaged=2).load(False)
    assert str(caught.value).splitlines()[3:] == [
        "data.max_damaged = 2: 3 cannot be used: mend or fetch what is damaged, or allow so many"
    ]
    with TarWriter(str(tmp_path / "part-001.tar.gz")) as tar:
        tar.write({"__key__": "a", "png": content(0), "cls": 0})
    line("part-001.tar.gz: is no tar, or a compressed one", urls=f"{tmp_path}/part-001.tar.gz")


@pytest.fixture(scope="module")
def digits_pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    to = tmp_path_factory.mktemp("packs") / "digits"
    pack(Digits(name="digits", classes=[0, 1]), to, Limit(images=50))
    return to


def test_a_damaged_pack(digits_pack: Path, tmp_path: Path) -> None:
    root = tmp_path / "pack"
    whole = section(root=str(digits_pack)).load(False)

    def damaged(change: Callable[[Path], object]) -> Webdataset:
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(digits_pack, root)
        change(root / "train-000001.tar")
        return section(root=str(root))

    def write(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
        return lambda file: file.write_bytes(change(file.read_bytes()))

    for change, message in (
        (lambda file: file.unlink(), r"no such shard; it holds 50 samples"),
        (write(lambda b: b[:-512]), r"has \d+ bytes, not \d+; it holds 50 samples"),
        (write(lambda b: b""), r"has 0 bytes, not \d+; it holds 50 samples"),
    ):
        made = damaged(change)
        with pytest.raises(UserError, match=rf"^{root}/train-000001\.tar: {message}\ndata\.max_damaged = 0: "):
            made.load(False)
        skipping = made.model_copy(update={"max_damaged": 1}).load(False)
        assert list(skipping.train.labels) == [*whole.train.labels[:50], *whole.train.labels[100:]]
        assert len(skipping.test) == len(whole.test)
        assert "50 samples" in skipping.about["missing"]

    # what tar's own headers say matters to nobody who has the index
    header = damaged(write(lambda b: flipped(b, headers(b)[1] + 3))).load(False)
    assert header.sha256() == whole.sha256()
    assert all(torch.equal(header.train[i][0], whole.train[i][0]) for i in range(len(whole.train)))

    image = damaged(write(lambda b: flipped(b, headers(b)[3] + 512 + 20)))
    splits = image.load(False)
    with pytest.raises(UserError, match=rf"^{root}/train-000001\.tar: byte \d+: digit_\d+: .* CRC-32 differs"):
        splits.train[51]
    assert torch.equal(splits.train[50][0], whole.train[50][0])
    (root / "train-000003.tar").unlink()
    with pytest.raises(UserError, match=r"train-000003\.tar: byte \d+: digit_\d+: cannot be read: No such file"):
        splits.train[151]
    (root / "train-000002.tar").write_bytes(b"")
    with pytest.raises(UserError, match=r"train-000002\.tar: byte \d+: digit_\d+: the shard was cut off"):
        splits.train[101]


def test_a_damaged_index(digits_pack: Path, tmp_path: Path) -> None:
    root = tmp_path / "pack"
    shutil.copytree(digits_pack, root)
    whole = (root / "index.json").read_text()
    for change, message in (
        (lambda said: said.update(format=2), "is no index of a pack: format: must be less than or equal to 1"),
        (lambda said: said.update(source={"name": "digit"}), "source.name: unknown name, did you mean 'digits'?"),
        (lambda said: said["train"][0].update(file="../x.tar"), "'../x.tar': must be a name without a folder"),
        (lambda said: said["train"][0].update(file="/x.tar"), "'/x.tar': must be a name without a folder"),
        (lambda said: said["val"][0]["names"].pop(), "val.0: must have 50 entries in each column"),
        (lambda said: said["classes"].pop(), "has labels in train-000001.tar above its 1 classes"),
        (lambda said: said.update(all_labelled={"about": {}, "order": [900]}), "all_labelled.order above its"),
    ):
        said = json.loads(whole)
        change(said)
        (root / "index.json").write_text(json.dumps(said))
        with pytest.raises(UserError) as caught:
            section(root=str(root)).load(False)
        assert str(caught.value).startswith(f"{root}/index.json: ")
        assert message in str(caught.value)
        assert len(str(caught.value)) < 300, "and not the whole index"
    (root / "index.json").write_text(whole[:100])
    with pytest.raises(UserError, match=r"index\.json: is no valid JSON"):
        section(root=str(root)).load(False)
    (root / "index.json").unlink()
    with pytest.raises(UserError, match=r"index\.json: no such file, so .* is no pack of snell data pack"):
        section(root=str(root)).load(False)


# ---- fetched ----


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder on this machine and remembers what it was asked for."""

    def __init__(self, folder: Path) -> None:
        self.asked: list[str] = []
        self.promised = 0  # bytes more than there are
        outer = self

        class Handler(http.server.SimpleHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.append(Path(self.path).name)
                super().do_GET()

            def send_header(self, keyword: str, value: str) -> None:
                more = outer.promised if keyword == "Content-Length" else 0
                super().send_header(keyword, str(int(value) + more) if more else value)

            def log_message(self, *args: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
        self.url = f"http://127.0.0.1:{self.server_port}"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    (tmp_path / "served").mkdir()
    with Server(tmp_path / "served") as served:
        thread = threading.Thread(target=served.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield served
        served.shutdown()


def test_a_pack_behind_http_is_fetched_once(server: Server, digits_pack: Path, tmp_path: Path) -> None:
    shutil.copytree(digits_pack, tmp_path / "served" / "digits")
    made = section(root=f"{server.url}/digits", cache=str(tmp_path / "cache"))
    again = made.load(False)
    assert sorted(server.asked) == sorted(p.name for p in digits_pack.iterdir()), "each file once"
    server.shutdown()
    for splits in (again, made.load(False)):
        here = section(root=str(digits_pack)).load(False)
        assert splits.sha256() == here.sha256()
        assert all(torch.equal(splits.test[i][0], here.test[i][0]) for i in range(len(here.test)))


def _load(root: str, cache: str, start: Any) -> None:
    start.wait()
    section(root=root, cache=cache).load(False)


def test_processes_of_a_machine_fetch_together_only_once(server: Server, digits_pack: Path, tmp_path: Path) -> None:
    shutil.copytree(digits_pack, tmp_path / "served" / "digits")
    context = multiprocessing.get_context("fork")
    start = context.Barrier(3)
    arguments = (f"{server.url}/digits", str(tmp_path / "cache"), start)
    ranks = [context.Process(target=_load, args=arguments) for _ in range(3)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    assert [process.exitcode for process in ranks] == [0, 0, 0]
    assert sorted(server.asked) == sorted(p.name for p in digits_pack.iterdir())


def test_what_is_wrong_never_enters_the_cache(server: Server, digits_pack: Path, tmp_path: Path) -> None:
    served, cache = tmp_path / "served" / "digits", tmp_path / "cache"
    shutil.copytree(digits_pack, served)
    made = section(root=f"{server.url}/digits", cache=str(cache))
    shard = served / "test-000000.tar"
    whole = shard.read_bytes()
    for content, message in (
        (flipped(whole, 600), r"has SHA-256 \w{12}, not \w{12}; it holds 50 samples"),
        (whole[:-512], r"has \d+ bytes, not \d+"),
        (None, r"cannot be fetched \(exit 22\)"),
    ):
        shard.unlink() if content is None else shard.write_bytes(content)
        with pytest.raises(UserError, match=rf"^{server.url}/digits/test-000000\.tar: {message}"):
            made.load(False)
        assert not [p for p in cache.iterdir() if "test-000000" in p.name]
    shard.write_bytes(whole)
    made.load(False)
    shutil.rmtree(cache)
    server.promised = 1000
    with pytest.raises(UserError, match=r"index\.json: cannot be fetched \(exit 18\)"):
        made.load(False)
    server.promised = 0
    (served / "index.json").write_text("<html>")
    with pytest.raises(UserError, match=rf"^{server.url}/digits/index\.json: is no valid JSON"):
        made.load(False)
    assert [p.name for p in cache.iterdir()] == [".lock"]


def test_pipes(tmp_path: Path) -> None:
    write_shards(tmp_path, [3, 4])
    pipes = f"pipe:cat {tmp_path}/part-{{000..001}}.tar"
    line(f"data.cache: is needed for pipe:cat {tmp_path}/part-000.tar: a stream has no exact order", urls=pipes)
    cache = str(tmp_path / "cache")
    splits = of_shards(pipes, cache=cache).load(False)
    assert list(splits.train.labels) == list(range(7))
    assert splits.train.name(0) == f"pipe:cat {tmp_path}/part-000.tar/0000.png"
    cut = f"pipe:head -c 3000 {tmp_path}/part-000.tar"
    line(f"{cut}: is damaged or cut off at byte 3000", urls=cut, cache=cache)
    line("pipe:exit 3: cannot be fetched (exit 3)", urls="pipe:exit 3", cache=cache)
    line("s3://b/x.tar: unknown scheme s3 (allowed: ", urls="s3://b/x.tar", cache=cache)
    line("for s3, pipe:aws s3 cp s3://b/x.tar -", urls="s3://b/x.tar", cache=cache)
    (tmp_path / "file").write_text("")
    line("data.cache = ", urls=pipes, cache=str(tmp_path / "file"))
