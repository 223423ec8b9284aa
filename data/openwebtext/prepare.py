"""
OpenWebText (Gokaslan & Cohen 2019) in GPT-2's BPE, each document ended by <|endoftext|>.

    python data/openwebtext/prepare.py
    python data/openwebtext/prepare.py --files='my/*.jsonl' --out_dir=data/my

0.05% of the 8,013,769 documents are held out for validation. train.bin has 9,035,582,198 tokens
(18 GB), val.bin 4,434,897. Hugging Face's cache takes another 64 GB, which you can delete later.
"""

import glob
import multiprocessing
import os
import signal
import sys
import threading
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import datasets
import numpy as np
from huggingface_hub import constants
from tqdm import tqdm

from configurator import UserError, configure
from data.common import encode_gpt2, gpt2_bpe, replace_dataset

files = ''  # a path or glob: .json, .jsonl or .parquet with a 'text' field; each .txt is a document
revision = 'b4325f019c648b1641a1784748667e8b74e5e064'  # commit of Skylion007/openwebtext
num_proc = os.cpu_count()  # processes
out_dir = str(HERE)  # where train.bin and val.bin go

known_counts = {revision: {"documents": 8_013_769, "train": 9_035_582_198, "val": 4_434_897}}
configure(globals())

FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}
CACHE = (f"{datasets.config.HF_DATASETS_CACHE}/Skylion007___openwebtext "
         f"and {constants.HF_HUB_CACHE}/datasets--Skylion007--openwebtext")
BATCH = 200  # documents that a worker process tokenizes in one go
main_process = os.getpid()


def load_documents():
    """The documents as a datasets.Dataset with a column 'text'."""
    source, options = "Skylion007/openwebtext", dict(revision=revision)
    if files:
        source, options = FORMATS.get(Path(files).suffix), dict(data_files=files)
        if source is None:
            raise UserError(f"files={files!r} must end in {', '.join(FORMATS)}")
        if not any(os.path.isfile(path) for path in glob.glob(files, recursive=True)):
            raise UserError(f"files={files!r} matches no file")
    if source == "text":
        options["sample_by"] = "document"
    try:
        documents = datasets.load_dataset(source, split="train", num_proc=num_proc, **options)
    except Exception as error:  # a damaged file can raise anything
        while error.__cause__:
            error = error.__cause__
        hint = "" if files else f"; if a download is damaged, remove {CACHE}"
        raise UserError(f"cannot load {files or source}: {type(error).__name__}: {error}{hint}"
                         ) from None
    # note: if the hub fails, `datasets` falls back to any revision that its cache has
    if not files and revision not in str(documents.cache_files):
        raise UserError(f"cannot get commit {revision} from the hub, and the cache has another "
                         "one: try again later")
    if "text" not in documents.column_names or len(documents) < 2:
        raise UserError(f"{files or source} has {len(documents)} documents with the columns "
                         f"{documents.column_names}: two or more with a column 'text' are needed")
    return documents


def check_count(name, count):
    """Compares a count with what the pinned commit is known to have."""
    if not files and revision in known_counts and count != known_counts[revision][name]:
        raise UserError(f"{name}: {count:,} instead of {known_counts[revision][name]:,}; a "
                         f"download is damaged: remove {CACHE} and try again")


def start_worker(split):
    """Runs first in each worker process: keeps the documents, and ends with the parent process."""
    global worker_documents
    worker_documents = split
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)
    threading.Thread(target=end_with_parent, daemon=True).start()


def tokenize(start):
    """The token ids of a batch of documents, each ended by end-of-text: uint16, (tokens,)."""
    bpe = gpt2_bpe()
    ids = []
    for text in worker_documents[start:start + BATCH]["text"]:
        ids.append(encode_gpt2(bpe, text or ""))
        ids.append(np.array([bpe.eot_token], dtype="<u2"))
    return np.concatenate(ids)


def tokenize_in_parallel(split):
    """Yields the token ids of a split's batches, in order."""
    with ProcessPoolExecutor(num_proc, initializer=start_worker, initargs=(split,)) as executor:
        yield from executor.map(tokenize, range(0, len(split), BATCH))


def on_signal(number, frame):
    """Ends the run in one line; temporary files are removed on the way out."""
    if os.getpid() != main_process:  # a worker process of `datasets`
        os._exit(128 + number)
    print("stopped; downloads are kept for the next run", file=sys.stderr)
    sys.exit(128 + number)


if __name__ == "__main__":  # worker processes may import this file
    if num_proc < 1:
        raise UserError(f"num_proc={num_proc} must be at least 1")
    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()

    gpt2_bpe()  # fetched once, before the worker processes need it
    documents = load_documents()
    check_count("documents", len(documents))
    splits = documents.train_test_split(test_size=0.0005, seed=2357, shuffle=True)

    with replace_dataset(out_dir) as tmp_folder:
        for name, split in (("val", splits["test"]), ("train", splits["train"])):
            path = os.path.join(tmp_folder, f"{name}.bin")
            bar = tqdm(total=len(split), desc=f"{name}.bin", unit="documents", disable=None)
            try:
                with open(path, "wb") as file, bar:
                    for ids in tokenize_in_parallel(split):
                        file.write(ids)
                        bar.update(BATCH)
            except (BrokenProcessPool, ValueError) as error:  # of a worker process
                raise UserError(f"cannot tokenize {name}.bin: {error}") from None
            tokens = os.path.getsize(path) // 2
            check_count(name, tokens)
            print(f"{name}.bin {tokens:,} tokens")
