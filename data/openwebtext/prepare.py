"""
OpenWebText (Gokaslan & Cohen 2019) in GPT-2's BPE: 8,013,769 documents, of which 4,007 validate; train.bin 9,035,582,198
tokens (18 GB), val.bin 4,434,897. Takes about 60 GB of disk in Hugging Face's cache and another 18 here while it works.

    python data/openwebtext/prepare.py
    python data/openwebtext/prepare.py --files='my/*.jsonl'     any documents of yours: json, jsonl, parquet, txt
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import datasets
import numpy as np

from configurator import configure
from data.common import gpt2_bpe

files = ''  # local files instead, a path or a glob; a 'text' field in each row, but a whole .txt file is one document
revision = 'b4325f019c648b1641a1784748667e8b74e5e064'  # of Skylion007/openwebtext on the hub
num_proc = os.cpu_count()  # processes
out_dir = str(HERE)  # where train.bin and val.bin go

configure(globals())


def tokenize(batch, rank, folder):
    """Appends the ids of a batch of documents, each ended by end-of-text, to the file of process `rank`."""
    bpe, ids = gpt2_bpe(), []
    for text in batch["text"]:
        # what encode_ordinary returns, without a list of Python integers
        ids += [bpe.encode_to_numpy(text or "", allowed_special=set(), disallowed_special=()), [bpe.eot_token]]
    with open(os.path.join(folder, f"{rank or 0:05}"), "ab") as file:
        np.concatenate(ids, dtype="<u2", casting="unsafe").tofile(file)


if __name__ == "__main__":  # where processes are spawned, not forked, each imports this file
    if num_proc < 1:
        raise ValueError(f"num_proc={num_proc} is out of range: it must be at least 1")
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()

    kind = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}.get(Path(files).suffix)
    if files and kind is None:
        raise ValueError(f"files={files!r} must end in .json, .jsonl, .parquet or .txt")
    options = dict(data_files=files) if files else dict(revision=revision)
    if kind == "text":
        options["sample_by"] = "document"
    try:
        documents = datasets.load_dataset(kind or "Skylion007/openwebtext", split="train", num_proc=num_proc, **options)
    except Exception as error:  # a damaged file can raise anything
        remedy = "" if files else "; go online, or give --files"
        raise ValueError(f"cannot load {files or 'OpenWebText'}: {type(error).__name__}: {error}{remedy}") from None
    if getattr(documents.features.get("text"), "dtype", "") not in ("string", "large_string") or len(documents) < 2:
        raise ValueError(f"{len(documents)} documents with {documents.features}: it takes two or more, with text in a 'text' field")

    gpt2_bpe()  # fetched once, before the processes ask for it
    splits = documents.train_test_split(test_size=0.0005, seed=2357, shuffle=True)

    os.makedirs(out_dir, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out_dir, prefix="parts-") as parts:
        for split, name in (("test", "val"), ("train", "train")):
            folder = os.path.join(parts, name)
            os.mkdir(folder)
            # each process takes a stretch of the documents, in order: the parts in order are the whole
            splits[split].map(tokenize, batched=True, batch_size=200, with_rank=True, fn_kwargs=dict(folder=folder),
                              num_proc=min(num_proc, len(splits[split])), desc=f"tokenizing {name}")
        for name in ("val", "train"):
            first, *rest = sorted(Path(parts, name).iterdir())
            with open(first, "ab") as file:
                for part in rest:
                    with open(part, "rb") as source:
                        shutil.copyfileobj(source, file, 2 ** 24)
                    part.unlink()
            tokens = first.stat().st_size // 2
            os.replace(first, os.path.join(out_dir, f"{name}.bin"))
            print(f"{name}.bin {tokens:,} tokens")
