"""
Your own text as a data set: UTF-8 files, and folders of them.

    python data/text/prepare.py my.txt notes/                  # tokens are characters
    python data/text/prepare.py my.txt notes/ --tokens=gpt2    # GPT-2's BPE
    python train.py config/train_shakespeare_char_cpu.py --dataset=text --out_dir=out-text

Files are read in the order given, and those of a folder in sorted order. Hidden files in folders,
and those that are not UTF-8 text, are skipped. With GPT-2's BPE each file ends with <|endoftext|>.
"""

import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import numpy as np
from tqdm import tqdm

from configurator import UserError, configure
from data.common import encode_gpt2, gpt2_bpe, replace_dataset, write_characters

tokens = 'characters'  # or 'gpt2': GPT-2's BPE
val_frac = 0.1  # fraction of the tokens, at the end, held out for validation
out_dir = str(HERE)  # where train.bin and val.bin go

paths = []  # from the command line
configure(globals(), paths=paths)


def files_in(folder):
    """The files in a folder and below, sorted; without hidden ones and those of data sets."""
    files = []
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.is_file() and not hidden and path.suffix not in (".bin", ".pkl"):
            files.append(path)
    return files


if tokens not in ("characters", "gpt2"):
    raise UserError(f"tokens={tokens!r} must be 'characters' or 'gpt2'")
if not 0 < val_frac < 1:
    raise UserError(f"val_frac={val_frac} must be between 0 and 1")
if not paths:
    raise UserError("no text given; name files or folders: python data/text/prepare.py my.txt")

given = [Path(path) for path in paths]
files = []
for path in given:
    if path.is_dir():
        files += files_in(path)
    elif path.is_file():
        files.append(path)
    else:
        raise UserError(f"{str(path)!r} is neither a file nor a folder; check the path")


def read_texts():
    """Yields (path, text) of the files that are UTF-8."""
    skipped = 0
    for path in tqdm(files, disable=None):
        try:
            yield path, path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError:
            if path in given:
                raise UserError(f"{str(path)!r} is not UTF-8 text; convert it or leave it out"
                                 ) from None
            skipped += 1
    if skipped > 0:
        print(f"skipped {skipped} files that are not UTF-8 text")


if tokens == "characters":
    text = "\n".join(text for _, text in read_texts())
    print(write_characters(out_dir, text, val_frac))
    sys.exit()

bpe = gpt2_bpe()
end_of_text = np.array([bpe.eot_token], dtype="<u2")
with replace_dataset(out_dir) as tmp_folder:
    train_tmp = os.path.join(tmp_folder, "train.bin")
    with open(train_tmp, "wb") as file:
        for path, text in read_texts():
            try:
                file.write(encode_gpt2(bpe, text))
            except ValueError as error:
                raise UserError(f"{str(path)!r}: {error}; leave it out") from None
            file.write(end_of_text)
        total = file.tell() // 2
    val_tokens = max(1, int(total * val_frac))
    train_tokens = total - val_tokens
    if train_tokens < 1:
        raise UserError(f"cannot split {total} tokens with val_frac={val_frac}; use more text")
    val_ids = np.memmap(train_tmp, dtype="<u2", mode="r")[train_tokens:]
    val_ids.tofile(os.path.join(tmp_folder, "val.bin"))
    os.truncate(train_tmp, 2 * train_tokens)
print(f"train.bin {train_tokens:,} tokens, val.bin {val_tokens:,}")
