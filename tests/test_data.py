import hashlib
import io
import json
import os
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

from data import common

SUMS = {
    "shakespeare_char/input.txt": "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    "shakespeare_char/train.bin": "6ec305602a99ac2802745a134e1f5e33e2231b4855525b00b9aebb730ac2626f",
    "shakespeare_char/val.bin": "d37d30cc0c8327c270d493299c3dca54135f6d5f1c9ef60cda78076e311204b1",
    "shakespeare/train.bin": "502a2bdc8210d1ac5d5674867cb74467dd31db575d25cf6dbb08c8bdbea8680f",
    "shakespeare/val.bin": "68a53422394c26a655ebe641f5c6f49888e8f4e45fe5d6f02abda63ba3ebd65b",
}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of what preparing needs, so that the tests write nothing into the real data/."""
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copy(ROOT / "configurator.py", folder)
    shutil.copytree(ROOT / "data", folder / "data", ignore=shutil.ignore_patterns("*.bin", "*.pkl", "input.txt", "__pycache__"))
    return folder


def prepare(checkout, name, *arguments):
    return subprocess.run([sys.executable, str(checkout / "data" / name / "prepare.py"), *arguments], capture_output=True, text=True,
                          cwd=checkout, env=dict(os.environ, HF_HOME=str(checkout / "hf")))


@pytest.mark.parametrize("name", ["shakespeare_char", "shakespeare"])
def test_tiny_shakespeare_comes_out_byte_for_byte(checkout, name):
    result = prepare(checkout, name)
    assert result.returncode == 0, result.stderr
    for path, expected in SUMS.items():
        if path.startswith(name + "/"):
            assert hashlib.sha256((checkout / "data" / path).read_bytes()).hexdigest() == expected, path
    assert not list((checkout / "data").glob("*/*.tmp"))


def test_another_text_is_not_taken_for_shakespeare(checkout):
    (checkout / "data/shakespeare/input.txt").write_text("To be or not")
    result = prepare(checkout, "shakespeare")
    assert result.returncode == 1 and result.stderr.startswith("error: ") and "input.txt" in result.stderr and result.stderr.count("\n") == 1


@pytest.fixture(scope="module")
def documents():
    rng = np.random.default_rng(0)
    words = ["Zwölf", "boxkämpfer", " jagen", "\n\n", "Viktor", "<|endoftext|>", "日本", "it's", "  ", "1234", "🙂"]
    return [""] + ["".join(rng.choice(words, size=rng.integers(1, 60))) for _ in range(2500)]


@pytest.mark.parametrize("num_proc", [1, 3])
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "txt"])
def test_openwebtext_is_what_the_naive_way_gives(checkout, documents, kind, num_proc):
    import datasets
    if kind == "txt":  # a file is a document
        documents = documents[1:40]
        for i, text in enumerate(documents):
            (checkout / f"{i:05}.txt").write_text(text, newline="")
    elif kind == "parquet":
        datasets.Dataset.from_dict({"text": documents}).to_parquet(checkout / "docs.parquet")
    else:
        (checkout / "docs.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    out_dir = checkout / f"owt-{kind}-{num_proc}"
    pattern = checkout / ("0*.txt" if kind == "txt" else f"docs.{kind}")
    result = prepare(checkout, "openwebtext", f"--files={pattern}", f"--num_proc={num_proc}", f"--out_dir={out_dir}")
    assert result.returncode == 0, result.stderr
    splits = datasets.Dataset.from_dict({"text": documents}).train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    bpe = common.gpt2_bpe()
    for split, name in (("train", "train"), ("test", "val")):
        expected = [i for text in splits[split]["text"] for i in bpe.encode_ordinary(text) + [50256]]
        assert np.fromfile(out_dir / f"{name}.bin", dtype="<u2").tolist() == expected
    assert sorted(os.listdir(out_dir)) == ["train.bin", "val.bin"]


@pytest.mark.parametrize("files", ["nothing.jsonl", "bad.jsonl", "nofield.jsonl", "one.jsonl", "x.zip"])
def test_openwebtext_from_files_that_do_not_fit(checkout, files):
    (checkout / "bad.jsonl").write_text('{"text": "a"}\n{"text": ')
    (checkout / "nofield.jsonl").write_text('{"words": "a"}\n{"words": "b"}\n')
    (checkout / "one.jsonl").write_text('{"text": "a"}\n')
    result = prepare(checkout, "openwebtext", f"--files={checkout / files}", "--num_proc=1", f"--out_dir={checkout / 'none'}")
    assert result.returncode == 1 and result.stderr.splitlines()[-1].startswith("error: "), result.stderr
    assert "Traceback" not in result.stderr and not (checkout / "none").exists()


def test_an_interrupted_write_leaves_what_was_there(tmp_path):
    path = str(tmp_path / "x.bin")
    common.write_ids(path, [1, 2, 50256])
    with pytest.raises(RuntimeError):
        with common.whole(path) as scrap:
            open(scrap, "wb").write(b"half")
            raise RuntimeError("interrupted")
    assert open(path, "rb").read() == b"\x01\x00\x02\x00\x50\xc4" and os.listdir(tmp_path) == ["x.bin"]


def test_characters_round_trip(tmp_path):
    common.write_characters(str(tmp_path), "hello wörld" * 10)
    encode, decode, size, end = common.tokenizer(str(tmp_path), 9)
    assert decode(encode("wörld")) == "wörld" and size == 9 and end is None
    assert len(common.open_ids(str(tmp_path), "train", 8)) == 99 and len(common.open_ids(str(tmp_path), "val", 8)) == 11
    with pytest.raises(ValueError, match="'x'"):
        encode("x")
    with pytest.raises(ValueError, match="9 characters, the model 10"):
        common.tokenizer(str(tmp_path), 10)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("owned",)


def test_a_meta_file_that_would_run_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    meta = dict(vocab_size=1, itos={0: "a"}, stoi={"a": 0}, extra=Evil())
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    with pytest.raises(ValueError, match="meta.pkl.*mkdir"):
        common.read_meta(str(tmp_path))
    assert not os.path.exists("owned")


@pytest.mark.parametrize("content", [b"", b"\x80", pickle.dumps([]), pickle.dumps({}), pickle.dumps(dict(vocab_size=2, itos={0: "a"}, stoi={"a": 0})),
                                     pickle.dumps(dict(vocab_size=1, itos={0: "a"}, stoi={"a": 1})), pickle.dumps(dict(vocab_size="1", itos={}, stoi={}))])
def test_a_damaged_meta_file_is_named(tmp_path, content):
    (tmp_path / "meta.pkl").write_bytes(content)
    with pytest.raises(ValueError, match="meta.pkl"):
        common.read_meta(str(tmp_path))


@pytest.mark.parametrize("content", [None, b"", b"abc", b"ab" * 8])
def test_ids_that_are_missing_odd_or_too_few(tmp_path, content):
    if content is not None:
        (tmp_path / "train.bin").write_bytes(content)
    with pytest.raises(ValueError, match="train.bin"):
        common.open_ids(str(tmp_path), "train", 8)


def test_pickles_of_plain_data_pass():
    data = {"a": [1, 2.5, ("b", None, True)], 3: {"c"}}
    assert common.PlainUnpickler(io.BytesIO(pickle.dumps(data))).load() == data


def test_own_text_by_characters(checkout, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/.git").mkdir()
    for name, text in (("b.txt", "\ufeffzwei ü"), ("notes/2.md", "two"), ("notes/1.md", "one\n"), ("notes/.git/x", "Q"), ("notes/train.bin", "Q")):
        (tmp_path / name).write_text(text, encoding="utf-8")
    result = prepare(checkout, "text", str(tmp_path / "b.txt"), str(tmp_path / "notes"), "--val_share=0.5")
    assert result.returncode == 0, result.stderr
    meta = common.read_meta(str(checkout / "data/text"))
    ids = [*np.fromfile(checkout / "data/text/train.bin", "<u2"), *np.fromfile(checkout / "data/text/val.bin", "<u2")]
    assert "".join(meta["itos"][i] for i in ids) == "zwei ü\none\n\ntwo" and "7 tokens, val.bin 8" in result.stdout


def test_own_text_in_gpt2s_tokens_is_read_in_pieces_without_a_trace(checkout, documents, tmp_path):
    texts = {"a.txt": "".join(documents), "b.txt": "no_space" * 1000, "c.txt": " \n\n \n", "d.txt": "\u3000 x\x1c \n'll we're  1 2\n\n\nend \n" * 500}
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    script = checkout / "data/text/prepare.py"
    small = script.with_name("small.py")  # the same with pieces of 64 characters
    small.write_text(script.read_text().replace("size=2 ** 22", "size=64"))
    (script.parent / "meta.pkl").write_bytes(b"of characters, before")
    for path in (script, small):
        result = subprocess.run([sys.executable, path, tmp_path, "--tokens=gpt2"], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        bpe = common.gpt2_bpe()
        expected = [i for text in texts.values() for i in bpe.encode_ordinary(text) + [bpe.eot_token]]
        train, val = (np.fromfile(script.parent / f"{split}.bin", "<u2") for split in ("train", "val"))
        assert [*train, *val] == expected and len(val) == len(expected) // 10
        assert not (script.parent / "meta.pkl").exists() and not list(script.parent.glob("*.tmp"))


@pytest.mark.parametrize("arguments, named", [([], "which text"), (["nowhere.txt"], "nowhere.txt"), (["{}/x.bin"], "x.bin"),
                                              (["{}/x.bin", "--tokens=words"], "words"), (["{}/x.bin", "--val_share=1.0"], "val_share"),
                                              (["{}/one.txt"], "more text"), (["{}/one.txt", "--tokens=gpt2"], "none to train on"),
                                              (["{}/spaces.txt", "--tokens=gpt2"], "spaces.txt")])
def test_text_that_is_none(checkout, tmp_path, arguments, named):
    (tmp_path / "x.bin").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "one.txt").write_text("")
    (tmp_path / "spaces.txt").write_text("a" + " " * 5_000_000 + "b")
    result = prepare(checkout, "text", *(argument.format(tmp_path) for argument in arguments))
    assert result.returncode == 1 and result.stderr.startswith("error: ") and named in result.stderr and result.stderr.count("\n") == 1


def test_a_picture_of_runs(run, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "matplotlib")
    log = tmp_path / "a/log.csv"
    log.parent.mkdir()
    log.write_text("iter,train_loss,val_loss,loss,lr\n0,4.2,4.1,,0.1\n0,,,4.2,0.1\n1,,,4.0,0.2\n2,3.5,3.6,,0.2\n")
    result = run("data/plot.py", log.parent)
    assert (tmp_path / "a/loss.png").read_bytes().startswith(b"\x89PNG")
    assert result["read_log"](log.parent)["val_loss"] == ([0, 2], [4.1, 3.6])
    run("data/plot.py", log.parent, log.parent, f"--to={tmp_path}/both.svg")
    assert "<svg" in (tmp_path / "both.svg").read_text()
    log.write_text("iter,loss\n0,none\n")
    for mistake, named in (([log.parent], "log.csv"), ([tmp_path], "log.csv"), ([], "which run"), ([log.parent, "--to=a.eps"], "a.eps")):
        with pytest.raises(ValueError, match=named):
            run("data/plot.py", *mistake)
