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
import multiprocessing
import os
import re
import signal
import sys
import threading
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
from data.vocab import gpt2_bpe, make_tokenizer, read_vocabulary, stoi_of, write_vocabulary

files = ''  # instead, a path or glob: .jsonl, .json or .parquet with a 'text' each, .txt; also .gz
tokens = 'gpt2'  # or a tokenizer.json, or a folder that has one
revision = 'b4325f019c648b1641a1784748667e8b74e5e064'  # commit of Skylion007/openwebtext
num_proc = os.cpu_count()  # processes
out_dir = str(HERE)  # where train.bin and val.bin go

known_counts = {revision: {"documents": 8_013_769, "train": 9_035_582_198, "val": 4_434_897}}
check_ranges(configure(globals()), "num_proc", 1)

BATCH = 200  # documents that a worker process tokenizes in one go


def read_rows(path):
    """Yields the documents of a local file: dicts that may have a 'text'."""
    kind = Path(re.sub(r"\.(gz|bz2|zst)$", "", path)).suffix
    if kind == ".parquet":
        for batch in parquet.ParquetFile(path).iter_batches(columns=["text"]):
            yield from batch.to_pylist()
        return
    with io.TextIOWrapper(pyarrow.input_stream(path, compression="detect"), "utf-8-sig") as file:
        first = file.readline()
        if kind == ".txt":
            yield {"text": first + file.read()}
        elif first.startswith("["):  # one list, on any number of lines
            yield from json.loads(first + file.read())
        else:
            yield from (json.loads(line) for line in itertools.chain([first], file) if line.strip())


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
    paths = [path for path in sorted(glob.glob(files, recursive=True)) if os.path.isfile(path)]
    if files and not paths:
        raise UserError(f"files={files!r} matches no file")
    # In one process: worker processes of `datasets` can hang after a signal.
    try:
        if files:
            features = datasets.Features(text=datasets.Value("large_string"))
            # note: what comes from the cache has the same names and times
            times = [(path, os.stat(path).st_mtime_ns) for path in paths]
            documents = datasets.Dataset.from_generator(
                read_documents, features, gen_kwargs={"paths": times})
        else:
            documents = datasets.load_dataset("Skylion007/openwebtext", revision=revision,
                                              split="train")
    except Exception as error:
        raise UserError(f"cannot load the documents: {error.__cause__ or error}") from None
    # note: if the hub fails, `datasets` falls back to any revision that its cache has
    if not files and revision not in str(documents.cache_files):
        raise UserError(f"cannot get commit {revision} from the hub, and the cache has another "
                        "one: try again later")
    num_texts = len(documents) - documents.data.column("text").null_count
    if num_texts < 2:
        raise UserError(f"two or more documents with a 'text' are needed, not {num_texts}")
    return documents


def check_count(name, count):
    """Compares a count with what the pinned commit is known to have."""
    is_known = not files and tokens == "gpt2" and revision in known_counts
    if is_known and count != known_counts[revision][name]:
        raise UserError(f"{name}: {count:,} instead of {known_counts[revision][name]:,}; a damaged "
                        f"download? Remove {datasets.config.HF_DATASETS_CACHE} and try again")


def start_worker(split, tokenizer, vocab_size):
    """Runs first in each worker process: keeps the documents, and ends with the parent process."""
    global worker_documents, encode, end_token
    worker_documents = split
    encode, _, _, end_token = make_tokenizer(tokenizer, vocab_size)
    if not files and tokens == "gpt2":  # in OpenWebText itself <|endoftext|> is ordinary text
        encode = gpt2_bpe().encode_ordinary
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)
    threading.Thread(target=end_with_parent, daemon=True).start()


def tokenize(start):
    """The token ids of a batch of documents, uint16, and the documents that are skipped."""
    documents = worker_documents[start:start + BATCH]["text"]
    return common.encode_documents(documents, encode, end_token)


def on_signal(number, frame):
    """Ends the run in one line; temporary files are removed on the way out."""
    print("stopped; downloads are kept for the next run", file=sys.stderr)
    sys.exit(128 + number)


if __name__ == "__main__":  # worker processes may import this file
    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    vocabulary = read_vocabulary(tokens)
    tokenizer, vocab_size = vocabulary["tokenizer"], vocabulary["vocab_size"]
    if stoi_of(tokenizer):
        raise UserError(f"tokens={tokens!r} has characters: use data/text/prepare.py")
    make_tokenizer(tokenizer, vocab_size)  # downloads GPT-2's once for all
    documents = load_documents()
    check_count("documents", len(documents))
    splits = documents.train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    all_skipped = []
    with common.replace_dataset(out_dir) as tmp_folder:
        for name, split in (("val", splits["test"]), ("train", splits["train"])):
            path = tmp_folder / f"{name}.bin"
            bar = tqdm(total=len(split), desc=f"{name}.bin", unit="documents", disable=None)
            workers = ProcessPoolExecutor(num_proc, initializer=start_worker,
                                          initargs=(split, tokenizer, vocab_size))
            with workers, bar, open(path, "wb") as file:
                for ids, skipped in workers.map(tokenize, range(0, len(split), BATCH)):
                    file.write(ids)
                    all_skipped += skipped
                    bar.update(BATCH)
            num_tokens = os.path.getsize(path) // 2
            check_count(name, num_tokens)
            print(f"{name}.bin {num_tokens:,} tokens")
        write_vocabulary(tmp_folder, tokenizer)
    common.print_skipped(all_skipped)
