"""
Any text of yours as a data set: UTF-8 files, and folders of them.

    python data/text/prepare.py my.txt notes/                  its characters
    python data/text/prepare.py my.txt notes/ --tokens=gpt2    GPT-2's tokens, each file ended by <|endoftext|>
    python train.py config/train_shakespeare_char_cpu.py --dataset=text --out_dir=out-text

The last tenth validates. For GPT-2's tokens files are read in pieces, and may be larger than memory.
"""

import os
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import numpy as np
from tqdm import tqdm

from configurator import configure
from data.common import gpt2_bpe, whole, write_characters

paths = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
sys.argv[1:] = [argument for argument in sys.argv[1:] if argument.startswith("-")]

tokens = 'characters'  # 'gpt2': GPT-2's BPE
val_share = 0.1  # of the tokens, at the end
out_dir = str(HERE)  # where train.bin and val.bin go

configure(globals())


def pieces(path, size=2 ** 22):
    """The text of a file in pieces of about `size` characters, cut where GPT-2's tokenizer can't tell: before a space."""
    rest = ""
    try:
        with open(path, encoding="utf-8-sig") as file:  # a mark at the start is Windows'
            while new := file.read(size):
                rest += new
                word_end = re.match(r"(?s).*\S(?=[ \n])", rest)  # the last one
                if word_end:
                    yield word_end[0]
                    rest = rest[word_end.end():]
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} is not UTF-8 text ({error}): leave it out, or convert it") from None
    yield rest


if tokens not in ("characters", "gpt2"):
    raise ValueError(f"tokens={tokens!r} is none of 'characters', 'gpt2'")
if not 0 < val_share < 1:
    raise ValueError(f"val_share={val_share} is out of range: it must lie between 0 and 1")
files = []
for path in map(Path, paths):
    inside = sorted(child for child in path.rglob("*") if child.is_file() and child.suffix not in (".bin", ".pkl"))  # of an earlier run
    files += [child for child in inside if not any(part[0] == "." for part in child.relative_to(path).parts)] if path.is_dir() else [path]
if not files:
    raise ValueError("which text? name files or folders: python data/text/prepare.py my.txt")

os.makedirs(out_dir, exist_ok=True)
if tokens == "characters":
    print(write_characters(out_dir, "\n".join("".join(pieces(path)) for path in files), 1 - val_share))
    sys.exit()

bpe, total = gpt2_bpe(), 0
train, val = (os.path.join(out_dir, f"{split}.bin") for split in ("train", "val"))
with whole(train) as train_scrap, whole(val) as val_scrap:
    with open(train_scrap, "wb") as out, tqdm(total=sum(path.stat().st_size for path in files), unit="B", unit_scale=True,
                                              disable=not sys.stderr.isatty()) as bar:
        for path in files:
            for piece in pieces(path):
                try:
                    ids = bpe.encode_to_numpy(piece, allowed_special=set(), disallowed_special=())
                except ValueError as error:  # at a megabyte of spaces it gives up
                    raise ValueError(f"the tokenizer cannot take {str(path)!r}: {error}; leave it out") from None
                total += out.write(ids.astype("<u2").tobytes()) // 2
                bar.update(len(piece.encode()))
            total += out.write(np.array([bpe.eot_token], "<u2").tobytes()) // 2
    cut = total - max(1, int(total * val_share))
    if cut < 1:
        raise ValueError(f"of {total} tokens, val_share={val_share} leaves none to train on: take more text, or a smaller share")
    np.memmap(train_scrap, "<u2", "r")[cut:].tofile(val_scrap)
    os.truncate(train_scrap, 2 * cut)
Path(out_dir, "meta.pkl").unlink(missing_ok=True)  # of characters, before
print(f"{len(files)} files; train.bin {cut:,} tokens, val.bin {total - cut:,}")
