"""
Weights on disk: checkpoints, ours and nanoGPT's, and Hugging Face's format, in and out.

A checkpoint is a dict of tensors and plain values. Its keys `model`, `optimizer`, `model_args`,
`iter_num`, `best_val_loss` and `config` are nanoGPT's; the others are what an exact resume needs.
"""

import contextlib
import json
import math
import os
import pickle
import re
import zipfile
from pathlib import Path

import torch

from configurator import UserError

VERSION = "0.12.0"
GPT2_VOCAB_SIZE = 50257  # 256 bytes, 50,000 merges, <|endoftext|>

# ---- checkpoints ----


@contextlib.contextmanager
def atomic_write(path):
    """Opens a temporary file that replaces `path` at the end; after an error, `path` is intact."""
    tmp_path = f"{path}.{os.environ.get('RANK', 0)}.tmp"  # after an error, each process may write
    try:
        with open(tmp_path, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(tmp_path, path)
    finally:
        Path(tmp_path).unlink(missing_ok=True)


def save_checkpoint(path, state, **values):
    """
    Writes `state`, a dict of plain values and things with a state_dict, and `values`, atomically.
    UserError if the disk is full or not writable.
    """
    contents = {key: value.state_dict() if hasattr(value, "state_dict") else value
                for key, value in state.items()}
    # A name that is used twice is a TypeError.
    checkpoint = dict(**contents, **values, version=VERSION, torch_version=str(torch.__version__))
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with atomic_write(path) as file:
            torch.save(checkpoint, file)
            file.flush()
            torch.load(file.name, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path!r} could not be read again: `state`, settings and GPTConfig may "
                         f"hold tensors and plain values only ({error})") from None
    except (OSError, RuntimeError) as error:
        raise UserError(f"cannot save {path!r}, earlier checkpoints are intact: {error}") from None


def load_checkpoint(path):
    """A checkpoint, ours or nanoGPT's, memory-mapped on the CPU. UserError if it is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:  # torch.load does not check
            raise ValueError(f"checksum mismatch in {damaged}")
        # weights_only: a stranger's file cannot run code
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        weights = {name.removeprefix("_orig_mod."): p for name, p in checkpoint["model"].items()}
        if "version" not in checkpoint:  # nanoGPT's
            # without causal masks, and without the dtype, which a CPU does not use
            weights = {name: p for name, p in weights.items() if not name.endswith(".attn.bias")}
            checkpoint["config"].pop("dtype", None)
        checkpoint["model"] = weights
        # a tensor in nanoGPT's, or nan
        checkpoint["best_val_loss"] = min(math.inf, float(checkpoint["best_val_loss"]))
        nanogpt_lacks = dict(scaler={}, wandb_id=None, tokenizer=None, data={})
        return nanogpt_lacks | checkpoint
    except Exception as error:  # a damaged file can raise anything
        raise UserError(f"cannot use the checkpoint {path!r}: {error!r}") from None


def read_checkpoint(out_dir, best=False, required=False):
    """
    The checkpoint to resume, the later of ckpt.pt and last.pt, or with `best` the one to sample
    from, ckpt.pt if it exists; if that one is damaged, the other. If neither exists, None, or a
    UserError if one is `required`.
    """
    found, errors = [], []
    for name in ("ckpt.pt", "last.pt"):
        path = os.path.join(out_dir, name)
        if os.path.exists(path) and not (best and found):
            try:
                found.append(load_checkpoint(path))
            except UserError as error:
                errors.append(error)
    if errors and not found:
        raise errors[0]
    if required and not found:
        raise UserError(f"there is no ckpt.pt or last.pt in out_dir={out_dir!r}: name another "
                        "--out_dir, or start the run (again) without --init_from")
    for error in errors:
        print(f"note: {error}; using the other one")
    # on a tie ckpt.pt, the first: it was written later
    return max(found, key=lambda checkpoint: checkpoint["iter_num"], default=None)


def restore(state, checkpoint):
    """Restores what `save_checkpoint` wrote of `state`."""
    for key, value in state.items():
        if key not in checkpoint:
            print(f"note: the checkpoint has no {key}: it starts anew")
        elif isinstance(value, torch.optim.Optimizer):
            load_optimizer(value, checkpoint[key])
        elif not hasattr(value, "load_state_dict"):
            state[key] = checkpoint[key]
        elif checkpoint[key]:  # a disabled GradScaler's is empty
            value.load_state_dict(checkpoint[key])


def load_optimizer(optimizer, saved):
    """Restores an optimizer's state; its options, such as weight decay, stay as they are now."""
    try:
        own_groups = optimizer.state_dict()["param_groups"]
        # params as saved: torch compares their number; lr as saved: a scheduler may read it
        groups = [dict(own, params=old["params"], lr=old["lr"])
                  for own, old in zip(own_groups, saved["param_groups"], strict=True)]
        optimizer.load_state_dict(dict(param_groups=groups, state=saved["state"]))
        for p, values in optimizer.state.items():
            for key, value in values.items():
                # Fused kernels assume contiguous states of the shape of p.
                if isinstance(value, torch.Tensor):
                    values[key] = value.clone(memory_format=torch.contiguous_format)
                is_moment = key != "step" and optimizer.defaults.get("fused")
                if is_moment and value.shape != p.shape:
                    raise ValueError(f"{key} has shape {list(value.shape)}")
    except Exception as error:  # of another optimizer, or made by hand
        raise UserError(f"the optimizer state of the checkpoint does not fit ({error!r}): resume "
                        "with the optimizer that it was made with, or start anew") from None


# ---- the folder of a run ----


def back_up(out_dir):
    """Renames the files of an earlier run: its checkpoints to ckpt.1.pt and so on, log.1.csv."""
    number = 1
    while list(Path(out_dir).glob(f"*.{number}.*")):
        number += 1
    for path in sorted(Path(out_dir).iterdir()):
        is_of_run = path.suffix == ".pt" or path.name in ("log.csv", "loss.png")
        if is_of_run and not re.search(r"\.\d+$", path.stem):  # else it is a backup already
            backup = path.with_stem(f"{path.stem}.{number}")
            path.rename(backup)
            print(f"backed up {path} of an earlier run as {backup}")


def trim_log(path, columns, iter_num):
    """Starts log.csv, or keeps those rows that a run resumed at `iter_num` will not write again."""
    content = ",".join(columns) + "\n"
    if os.path.exists(path):
        old_content = Path(path).read_text(errors="replace")
        for row, iteration in re.findall(r"^((\d+),.*\n)", old_content, re.MULTILINE):
            if int(iteration) < iter_num:
                content += row
    with atomic_write(path) as file:
        file.write(content.encode())


# ---- Hugging Face's format ----

HUB_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
TRANSPOSED = ("c_attn", "c_proj", "c_fc")  # weights are (in, out) there, (out, in) here

ARCHITECTURE = dict(  # what is the same in all of OpenAI's config.json
    model_type="gpt2", activation_function="gelu_new", layer_norm_epsilon=1e-5, n_inner=None,
    scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False,
    tie_word_embeddings=True)


def read_huggingface(source):
    """(model_args, weights) of a GPT-2 from the hub or a folder; UserError for anything else."""
    if not os.path.isdir(source) and source not in HUB_NAMES:
        raise UserError(f"there is no model {source!r} to start from: name one of {HUB_NAMES}, "
                        "a folder with a config.json and a model.safetensors, or one of a run")
    from safetensors.torch import load_file
    weights = {}
    try:
        folder = source
        if not os.path.isdir(source):
            from huggingface_hub import snapshot_download
            folder = snapshot_download(f"openai-community/{source}",
                                       allow_patterns=["config.json", "model.safetensors"])
        config = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
        for key, value in ARCHITECTURE.items():
            if config.get(key, value) != value:
                raise ValueError(f"{key} is {config[key]!r}, not {value!r} as in OpenAI's GPT-2")
        sizes = {key: config[key] for key in ("n_layer", "n_head", "n_embd", "vocab_size")}
        model_args = dict(sizes, block_size=config["n_positions"], bias=True, dropout=0.0)
        paths = list(Path(folder).glob("model.safetensors"))
        if not paths:  # a large model is in several files
            paths = Path(folder).glob("model-*-of-*.safetensors")
        for path in paths:
            for name, tensor in load_file(path).items():
                name = "transformer." + name.removeprefix("transformer.")
                is_mask = name.endswith((".attn.bias", ".attn.masked_bias"))
                if name.removesuffix(".weight").endswith(TRANSPOSED):
                    tensor = tensor.t()
                if not is_mask and not name.endswith("lm_head.weight"):
                    weights[name] = tensor
        weights["lm_head.weight"] = weights["transformer.wte.weight"]
    except Exception as error:  # offline, missing, damaged: many kinds
        cause = f"{type(error).__name__}: {error}"
        raise UserError(f"cannot read a GPT-2 from {source!r}: {cause}") from None
    return model_args, weights


def write_huggingface(model_args, weights, folder):
    """Writes a GPT-2 for transformers: zeros for missing biases, no padding of the vocabulary."""
    from safetensors.torch import save_file
    C, V, T = model_args["n_embd"], model_args["vocab_size"], model_args["block_size"]
    shapes = {"transformer.wte": (V, C), "transformer.wpe": (T, C), "transformer.ln_f": (C,),
              "lm_head": (V, C)}
    for i in range(model_args["n_layer"]):
        layers = {"ln_1": (C,), "attn.c_attn": (3 * C, C), "attn.c_proj": (C, C),
                  "ln_2": (C,), "mlp.c_fc": (4 * C, C), "mlp.c_proj": (C, 4 * C)}
        shapes |= {f"transformer.h.{i}.{layer}": shape for layer, shape in layers.items()}
    biases = {f"{layer}.bias" for layer in shapes if layer.endswith(("ln_f", *layers))}
    found = {name.removesuffix(".weight"): tuple(tensor.shape) for name, tensor in weights.items()
             if name not in biases}
    different = dict(found.items() ^ shapes.items()).keys()
    if different or not torch.equal(weights["lm_head.weight"], weights["transformer.wte.weight"]):
        raise UserError("only a GPT-2 can be exported; what differs is "
                        + ", ".join(different or ["lm_head, which is not tied to transformer.wte"]))

    vocab_size = GPT2_VOCAB_SIZE if V == 50304 else V
    del shapes["lm_head"]  # tied
    tensors = {}
    for layer, shape in shapes.items():
        weight = weights[layer + ".weight"].float().cpu()
        if layer.endswith(TRANSPOSED):
            weight = weight.t()
        if layer == "transformer.wte":
            weight = weight[:vocab_size]
        elif layer != "transformer.wpe":
            bias = weights.get(layer + ".bias", torch.zeros(shape[0]))
            tensors[layer + ".bias"] = bias.float().cpu()
        tensors[layer + ".weight"] = weight.contiguous()
    end_token = vocab_size - 1 if vocab_size == GPT2_VOCAB_SIZE else None
    special = dict(bos_token_id=end_token, eos_token_id=end_token)
    dropout = model_args["dropout"]
    config = dict(
        ARCHITECTURE, architectures=["GPT2LMHeadModel"], dtype="float32", vocab_size=vocab_size,
        n_positions=T, n_ctx=T, n_embd=C, n_layer=model_args["n_layer"],
        n_head=model_args["n_head"], attn_pdrop=dropout, embd_pdrop=dropout, resid_pdrop=dropout,
        **special)
    # transformers' pipeline adds 256 tokens by default
    generation_config = special | (dict(max_length=T) if T <= 512 else {})
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, "model.safetensors")
    save_file(tensors, path, metadata={"format": "pt"})
    os.chmod(path, 0o644)  # safetensors lets nobody else read it
    for name, content in (("config", config), ("generation_config", generation_config)):
        Path(folder, name + ".json").write_text(json.dumps(content, indent=2))
