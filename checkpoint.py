"""
Weights on disk: checkpoints, ours and nanoGPT's, and Hugging Face's format, in and out.

A checkpoint is a dict of tensors and plain values. Its keys `model`, `optimizer`, `model_args`,
`iter_num`, `best_val_loss` and `config` are nanoGPT's; the others are what an exact resume needs.
"""

import contextlib
import glob
import json
import math
import os
import re
import sys
import time
import zipfile

import torch

from configurator import UserError

VERSION = "0.9.0"
GPT2_VOCAB_SIZE = 50257  # 256 bytes, 50,000 merges, <|endoftext|>
MODEL_ARGS = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")

# ---- checkpoints ----


@contextlib.contextmanager
def atomic_write(path):
    """Opens a temporary file that replaces `path` at the end; after an error, `path` is intact."""
    tmp_path = path + ".tmp"
    try:
        with open(tmp_path, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(tmp_path, path)
    finally:
        if os.path.exists(tmp_path):
            os.remove(tmp_path)


def save_checkpoint(checkpoint, path):
    """Writes a checkpoint atomically. Raises ValueError if the disk is full or not writable."""
    checkpoint = dict(checkpoint, version=VERSION, torch_version=str(torch.__version__))
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with atomic_write(path) as file:
            torch.save(checkpoint, file)
    except (OSError, RuntimeError) as error:
        raise UserError(f"cannot save {path!r}, earlier checkpoints are intact: {error} "
                         "(if the disk is full, make room and resume)") from None


def load_checkpoint(path):
    """
    Reads a checkpoint, ours or nanoGPT's, its tensors memory-mapped on the CPU. Only plain data is
    read: a file from a stranger cannot run code. Raises ValueError for a damaged file.
    """
    try:
        check_archive(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        checkpoint["iter_num"] = int(checkpoint["iter_num"])
        checkpoint["best_val_loss"] = float(checkpoint["best_val_loss"])
        if math.isnan(checkpoint["best_val_loss"]):  # no later loss would be lower
            raise UserError("best_val_loss is nan")
        checkpoint["model_args"] = {name: checkpoint["model_args"][name] for name in MODEL_ARGS}
        checkpoint["config"] = dict(checkpoint["config"])
        state = {}
        for name, tensor in checkpoint["model"].items():
            if not tensor.isfinite().all():
                raise UserError(f"{name} are not finite floating-point numbers")
            if not name.endswith(".attn.bias"):  # a causal mask of older versions of nanoGPT
                state[name.removeprefix("_orig_mod.")] = tensor
        checkpoint["model"] = state
        if "version" not in checkpoint:  # nanoGPT's CPU runs store a float16 that they do not use
            checkpoint["config"].pop("dtype", None)
        nanogpt_lacks = dict(skipped=0, skipped_in_a_row=0, best_iter=None, scaler=None,
                             wandb_id=None, itos=None, data=None)
        return nanogpt_lacks | checkpoint
    except Exception as error:  # a damaged file can raise anything
        refused = re.search(r"Unsupported .*|GLOBAL \S+", str(error))  # what it tried to call
        cause = refused[0] if refused else str(error).split("\n")[0][:200]
        cause = f"{type(error).__name__}: {cause}"
        raise UserError(f"cannot use the checkpoint {path!r}: {cause}") from None


def check_archive(path):
    """Raises ValueError for what torch.load does not notice: flipped bits, and compression."""
    with zipfile.ZipFile(path) as archive:
        if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
            raise UserError("the archive is compressed: save it with torch.save")
        damaged = archive.testzip()
        if damaged:
            raise UserError(f"checksum mismatch in {damaged}")


def newest_checkpoint(out_dir):
    """The later of ckpt.pt and last.pt, or the other if it is damaged. None without either."""
    paths = [os.path.join(out_dir, name) for name in ("ckpt.pt", "last.pt")]
    paths = [path for path in paths if os.path.exists(path)]
    paths.sort(key=read_iter_num)
    while paths:
        try:
            return load_checkpoint(paths.pop())
        except ValueError as error:
            if not paths:
                raise
            print(f"note: {error}; resuming from {paths[0]!r} instead")
    return None


def read_iter_num(path):
    """The iteration of a checkpoint, without reading its tensors."""
    try:
        return int(torch.load(path, map_location="cpu", weights_only=True, mmap=True)["iter_num"])
    except Exception:  # load_checkpoint will say what is wrong
        return math.inf


def back_up(out_dir, names, move):
    """Moves files of an earlier run to ckpt.1.pt, log.1.csv and so on, by os.rename or a copy."""
    number = 1
    while glob.glob(os.path.join(glob.escape(out_dir), f"*.{number}.*")):
        number += 1
    for name in names:
        path = os.path.join(out_dir, name)
        if os.path.exists(path):
            stem, extension = os.path.splitext(path)
            backup = f"{stem}.{number}{extension}"
            move(path, backup)
            print(f"backed up {path} of an earlier run as {backup}")


def load_optimizer(optimizer, saved):
    """
    Restores moments and step counts. Options such as weight decay stay as they are set now.
    Raises ValueError for the state of another optimizer or model.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    is_adamw = isinstance(optimizer, torch.optim.AdamW)
    moments = ("exp_avg", "exp_avg_sq") if is_adamw else ("momentum_buffer",)
    state = {}
    try:
        if saved["state"] and len(saved["state"]) != len(parameters):
            raise UserError(f"{len(saved['state'])} states for {len(parameters)} parameters")
        for i, saved_state in saved["state"].items():
            state[i] = {}
            if is_adamw:
                state[i]["step"] = torch.tensor(float(saved_state["step"]))
            for name in moments:
                moment = saved_state[name]
                if moment.shape != parameters[i].shape or not moment.isfinite().all():
                    raise UserError(f"{name} {i} has shape {list(moment.shape)} or is not finite")
                # a contiguous copy: the file is mapped, and its strides cannot be trusted
                state[i][name] = torch.empty(moment.shape).copy_(moment)
    except Exception as error:  # of another optimizer, or made by hand
        raise UserError(f"the optimizer state of the checkpoint does not fit ({error!r}): resume "
                         "with the optimizer_type that it was made with, or start anew") from None
    optimizer.load_state_dict(dict(optimizer.state_dict(), state=state))


# ---- Hugging Face's format ----

HUB_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # (in, out) there, (out, in) here

# what config.json may say, its default first; anything else is another architecture
OPENAI_ARCHITECTURE = {
    "model_type": ["gpt2"],
    "activation_function": ["gelu_new", "gelu_pytorch_tanh"],
    "layer_norm_epsilon": [1e-5],
    "scale_attn_weights": [True],
    "scale_attn_by_inverse_layer_idx": [False],
    "add_cross_attention": [False],
    "tie_word_embeddings": [True],
}


def read_huggingface(source):
    """
    (model_args, state dict) of a GPT-2 in Hugging Face's format: one of HUB_NAMES, or a folder.
    Raises ValueError for what cannot be read, or is not built as OpenAI's GPT-2.
    """
    if not os.path.isdir(source) and source not in HUB_NAMES:
        raise UserError(f"there is no model {source!r} to start from: name one of {HUB_NAMES}, "
                         "or a folder with a config.json and a model.safetensors")
    from safetensors.torch import load_file
    names = ["model.safetensors"]
    index_path = os.path.join(source, "model.safetensors.index.json")
    state = {}
    try:
        if os.path.exists(index_path) and not os.path.exists(os.path.join(source, names[0])):
            with open(index_path, encoding="utf-8") as file:
                names = sorted(set(json.load(file)["weight_map"].values()))
        with open(find_file(source, "config.json"), encoding="utf-8") as file:
            config = json.load(file)
        model_args = read_model_args(config)
        for name in names:
            state.update(load_file(find_file(source, name)))
    except Exception as error:  # offline, missing, damaged: many kinds
        cause = " ".join(str(error).split())
        raise UserError(f"cannot read a GPT-2 from {source!r}: {type(error).__name__}: {cause}; "
                         "name a folder with a config.json and a model.safetensors") from None
    return model_args, from_huggingface_names(state)


def read_model_args(config):
    for key, allowed in OPENAI_ARCHITECTURE.items():
        value = config.get(key, allowed[0])
        if value not in allowed:
            raise UserError(f"not OpenAI's architecture: {key} is {value!r}, not {allowed[0]!r}")
    n_embd = config.get("n_embd", 768)
    if config.get("n_inner") not in (None, 4 * n_embd):
        raise UserError(f"not OpenAI's architecture: n_inner is not 4 * n_embd = {4 * n_embd}")
    return dict(n_layer=config.get("n_layer", 12), n_head=config.get("n_head", 12), n_embd=n_embd,
                block_size=config.get("n_positions", 1024), bias=True,
                vocab_size=config.get("vocab_size", GPT2_VOCAB_SIZE), dropout=0.0)


def from_huggingface_names(tensors):
    state = {}
    for name, tensor in tensors.items():
        name = "transformer." + name.removeprefix("transformer.")
        if name.endswith((".attn.bias", ".attn.masked_bias", "lm_head.weight")):
            continue  # causal masks, and the tied matrix
        state[name] = tensor.t() if name.endswith(TRANSPOSED) else tensor
    return state


def find_file(source, name):
    """The path of a model's file: in the folder `source`, in the hub's cache, or downloaded."""
    if os.path.isdir(source):
        return os.path.join(source, name)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError
    from huggingface_hub.utils import disable_progress_bars
    if not sys.stderr.isatty():
        disable_progress_bars()
    repo = f"openai-community/{source}"
    with contextlib.suppress(LocalEntryNotFoundError):
        return hf_hub_download(repo, name, local_files_only=True)
    for pause in (2, 10, None):  # seconds between tries
        try:
            return hf_hub_download(repo, name)
        except LocalEntryNotFoundError as error:  # no connection; the library has tried again
            raise (error.__cause__ or error) from None
        except Exception as error:
            status = getattr(getattr(error, "response", None), "status_code", 0)
            is_final = 400 <= status < 429
            if is_final or pause is None:
                raise
        time.sleep(pause)


def write_huggingface(model_args, state, folder):
    """Writes a model for transformers: no padding of the vocabulary, zeros for missing biases."""
    from safetensors.torch import save_file
    vocab_size = min(model_args["vocab_size"], GPT2_VOCAB_SIZE)
    tensors = {}
    for name, tensor in state.items():
        if name == "lm_head.weight":
            continue  # tied to wte
        tensor = tensor.to("cpu", torch.float32)
        if name.endswith("wte.weight"):
            tensor = tensor[:vocab_size]
        is_embedding = name.endswith(("wte.weight", "wpe.weight"))
        bias_name = name.replace("weight", "bias")
        if not is_embedding and bias_name not in state:
            tensors[bias_name] = torch.zeros(tensor.size(0))
        if name.endswith(TRANSPOSED):
            tensor = tensor.t()
        tensors[name] = tensor.contiguous()

    end_token = vocab_size - 1 if vocab_size == GPT2_VOCAB_SIZE else None
    special = dict(bos_token_id=end_token, eos_token_id=end_token)
    dropout = model_args["dropout"]
    config = dict(
        architectures=["GPT2LMHeadModel"], model_type="gpt2", activation_function="gelu_new",
        vocab_size=vocab_size, n_positions=model_args["block_size"], n_embd=model_args["n_embd"],
        n_layer=model_args["n_layer"], n_head=model_args["n_head"], layer_norm_epsilon=1e-5,
        attn_pdrop=dropout, embd_pdrop=dropout, resid_pdrop=dropout,
        tie_word_embeddings=True, dtype="float32", **special)
    generation_config = dict(special)
    if model_args["block_size"] <= 512:  # transformers' pipeline adds 256 tokens by default
        generation_config["max_length"] = model_args["block_size"]
    try:
        os.makedirs(folder, exist_ok=True)
        save_file(tensors, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
        for name, content in (("config", config), ("generation_config", generation_config)):
            with open(os.path.join(folder, name + ".json"), "w", encoding="utf-8") as file:
                json.dump(content, file, indent=2)
    except Exception as error:  # safetensors has its own kind of exception
        raise UserError(f"cannot write a model to {folder!r}: {error}") from None
