"""
OpenWebText (Gokaslan & Cohen 2019) in GPT-2's BPE, each document ended by <|endoftext|>.

    python data/openwebtext/prepare.py
    python data/openwebtext/prepare.py --files='my/*.jsonl.gz' --tokens=data/text --out_dir=data/my

0.05% of the 8,013,769 documents are held out for validation. train.bin has 9,035,582,198 tokens
(18 GB), val.bin 4,434,897. Hugging Face's cache takes another 64 GB, which you can delete later.
"""

import glob
import io
import itertools
import json
import os
import re
import signal
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import datasets
import pyarrow
from pyarrow import parquet
from tqdm import tqdm

from configurator import UserError, check_ranges, configure
from data import common

files = ''  # instead, a path or glob: .jsonl, .json or .parquet with a 'text' each, .txt; also .gz
tokens = 'gpt2'  # or a tokenizer.json, or a folder that has one
num_proc = os.cpu_count()  # processes
out_dir = str(HERE)  # where train.bin and val.bin go

check_ranges(configure(globals()), "num_proc", 1)

REVISION = "b4325f019c648b1641a1784748667e8b74e5e064"  # commit of Skylion007/openwebtext
BATCH = 200  # documents that a worker process tokenizes in one go


def read_rows(path):
    """Yields the documents of a local file: dicts that may have a 'text'."""
    if path.endswith(".parquet"):
        for batch in parquet.ParquetFile(path).iter_batches(columns=["text"]):
            yield from batch.to_pylist()
        return
    with io.TextIOWrapper(pyarrow.input_stream(path, compression="detect"), "utf-8-sig") as file:
        first = file.readline()
        if re.search(r"\.txt(\.gz|\.bz2|\.zst)?$", path):
            yield {"text": first + file.read()}
        elif first.startswith("["):  # one list, on any number of lines
            yield from json.loads(first + file.read())
        else:
            for line in itertools.chain([first], file):
                if line.strip():
                    yield json.loads(line)


def read_documents(paths):
    """Yields {'text': str or None} for the documents in local files."""
    for path, _ in paths:
        try:
            for row in read_rows(path):
                text = row.get("text")
                if isinstance(text, str):  # JSON can have half of a surrogate pair
                    text = text.encode(errors="replace").decode()
                yield {"text": text}
        except Exception as error:  # a damaged file can raise anything
            raise UserError(f"{path!r}: {error}") from None


def load_documents():
    """The documents as a datasets.Dataset with a column 'text'."""
    # In one process: worker processes of `datasets` can hang after a signal.
    try:
        if files:
            names = sorted(glob.glob(files, recursive=True))
            if not names:
                raise ValueError(f"files={files!r} matches no file")
            # note: what comes from the cache has the same names and times
            paths = [(name, os.stat(name).st_mtime_ns) for name in names]
            features = datasets.Features(text=datasets.Value("large_string"))
            documents = datasets.Dataset.from_generator(
                read_documents, features, gen_kwargs={"paths": paths})
        else:
            documents = datasets.load_dataset("Skylion007/openwebtext", revision=REVISION,
                                              split="train")
            if len(documents) != 8_013_769:
                raise ValueError(f"{len(documents):,} documents instead of 8,013,769: remove "
                                 f"{datasets.config.HF_DATASETS_CACHE} and try again")
    except Exception as error:
        raise UserError(f"cannot load the documents: {error.__cause__ or error}") from None
    num_texts = len(documents) - documents.data.column("text").null_count
    if num_texts < 2:
        raise UserError(f"two or more documents with a 'text' are needed, not {num_texts}")
    return documents


def start_worker(split, vocabulary):
    """Runs first in each worker process, and keeps what `tokenize` needs."""
    global worker_documents, encode, end_token
    worker_documents = split
    encode, _, _, end_token = common.make_tokenizer(**vocabulary)
    if not files and tokens == "gpt2":  # in OpenWebText itself <|endoftext|> is ordinary text
        encode = common.gpt2_bpe().encode_ordinary
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def tokenize(start):
    """The token ids of a batch of documents, uint16, and the documents that are skipped."""
    documents = worker_documents[start:start + BATCH]["text"]
    return common.encode_documents(documents, encode, end_token)


if __name__ == "__main__":  # worker processes may import this file
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # temporary files are removed
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    vocabulary = common.read_vocabulary(tokens)
    common.make_tokenizer(**vocabulary)  # downloads GPT-2's once for all
    documents = load_documents()
    splits = documents.train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    all_skipped = []
    with common.replace_dataset(out_dir) as tmp_folder:
        for name, split in (("val", splits["test"]), ("train", splits["train"])):
            starts = range(0, len(split), BATCH)
            workers = ProcessPoolExecutor(num_proc, initializer=start_worker,
                                          initargs=(split, vocabulary))
            with workers, open(tmp_folder / f"{name}.bin", "wb") as file:
                batches = workers.map(tokenize, starts)
                for ids, skipped in tqdm(batches, f"{name}.bin", len(starts), disable=None):
                    file.write(ids)
                    all_skipped += skipped
                print(f"{name}.bin {file.tell() // 2:,} tokens")
        common.write_vocabulary(tmp_folder, vocabulary["tokenizer"])
    common.print_skipped(all_skipped)
