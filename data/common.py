"""
The files of a data set: a folder with train.bin and val.bin, raw little-endian uint16 token ids.

They are GPT-2's, unless there is a tokenizer.json (of Hugging Face's `tokenizers`), or a meta.pkl
with `vocab_size` and, for characters, `itos` {id: character}.
"""

import contextlib
import hashlib
import math
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
from tqdm import tqdm

from configurator import UserError
from data.vocab import END_OF_TEXT, make_tokenizer, stoi_of, write_vocabulary

DATA = Path(__file__).resolve().parent
# In the order in which they get their names: ids without a vocabulary would be taken for GPT-2's.
DATASET_FILES = ("meta.pkl", "tokenizer.json", "val.bin", "train.bin")

# ---- writing ----


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
    """
    Writes two texts as a data set and prints its size. Unless tokens are characters, END_OF_TEXT
    separates the documents in a text.
    """
    encode, _, _, end_token = make_tokenizer(**vocabulary)
    stoi = stoi_of(vocabulary["tokenizer"])
    all_ids, all_skipped = {}, []
    for name, text in (("train", train), ("val", val)):
        documents = [text] if stoi else text.split(END_OF_TEXT)
        ids, skipped = encode_documents(tqdm(documents, name, disable=None), encode, end_token)
        all_ids[name] = ids if end_token is None else ids[:-1]  # no document after the last marker
        all_skipped += skipped
        if len(all_ids[name]) == 0:
            raise UserError(f"too little text: {name}.bin would be empty "
                            f"({len(skipped)} documents cannot be encoded)")
    with replace_dataset(folder) as tmp_folder:
        for name, ids in all_ids.items():
            ids.tofile(tmp_folder / f"{name}.bin")
        write_vocabulary(tmp_folder, vocabulary["tokenizer"])
    print_skipped(all_skipped)
    counts = ", ".join(f"{name}.bin {len(ids):,} tokens" for name, ids in all_ids.items())
    print(f"{len(stoi)} characters; {counts}" if stoi else counts)


# ---- reading ----


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
