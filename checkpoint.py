"""
Weights on disk: checkpoints, ours and nanoGPT's, and Hugging Face's format, in and out.

A checkpoint is a dict of tensors and plain values. Its keys `model`, `optimizer`, `model_args`,
`iter_num`, `best_val_loss` and `config` are nanoGPT's; the others are what an exact resume needs.
"""

import contextlib
import dataclasses
import glob
import json
import os
import pickle
import re
import sys
import zipfile

import torch

from configurator import UserError

VERSION = "0.10.0"
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
        if os.path.exists(tmp_path):
            os.remove(tmp_path)


def save_checkpoint(path, state, **values):
    """
    Writes `state`, a dict of plain values and things with a state_dict, and `values` atomically.
    Raises UserError if the disk is full or not writable.
    """
    checkpoint = dict(values, version=VERSION, torch_version=str(torch.__version__))
    for key, value in state.items():
        if key in checkpoint:
            raise ValueError(f"rename {key!r} in `state`: checkpoints use the name themselves")
        checkpoint[key] = value.state_dict() if hasattr(value, "state_dict") else value
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with atomic_write(path) as file:
            torch.save(checkpoint, file)
            file.flush()
            torch.load(file.name, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path!r} could not be read again: keep tensors and plain values of "
                         f"Python only in `state`, settings and GPTConfig ({one_line(error)})"
                         ) from None
    except (OSError, RuntimeError) as error:
        raise UserError(f"cannot save {path!r}, earlier checkpoints are intact: {error} "
                        "(if the disk is full, make room and resume)") from None


def load_checkpoint(path):
    """
    Reads a checkpoint, ours or nanoGPT's, its tensors memory-mapped on the CPU. Only plain data is
    read: a file from a stranger cannot run code. Raises UserError for a damaged file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:  # torch.load does not check
            raise ValueError(f"checksum mismatch in {damaged}")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        checkpoint["iter_num"] = int(checkpoint["iter_num"])
        best_val_loss = float(checkpoint["best_val_loss"])  # nanoGPT's may be a tensor, or nan
        checkpoint["best_val_loss"] = min(1e9, best_val_loss)
        weights = checkpoint["model"].items()
        checkpoint["model"] = {name.removeprefix("_orig_mod."): p for name, p in weights}
        checkpoint["config"] = dict(checkpoint["config"])
        checkpoint["model_args"] = dict(checkpoint["model_args"])
        if "version" not in checkpoint:  # nanoGPT's CPU runs store a float16 that they do not use
            checkpoint["config"].pop("dtype", None)
        nanogpt_lacks = dict(scaler={}, wandb_id=None, itos=None, tokenizer=None, data=None)
        return nanogpt_lacks | checkpoint
    except Exception as error:  # a damaged file can raise anything
        refused = re.search(r"Unsupported .*|GLOBAL \S+", str(error))  # what it tried to call
        cause = refused[0] if refused else f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"cannot use the checkpoint {path!r}: {cause}") from None


def read_checkpoint(out_dir, best=False, required=False):
    """
    The checkpoint in a folder to resume from, the later one of ckpt.pt and last.pt, or with `best`
    the one to sample from, ckpt.pt if there is one. If it is damaged, the other one. Without
    either, None, or a UserError if it is `required`.
    """
    paths = [os.path.join(out_dir, name) for name in ("last.pt", "ckpt.pt")]
    paths = [path for path in paths if os.path.exists(path)]
    if required and not paths:
        raise UserError(f"there is no ckpt.pt in out_dir={out_dir!r}: train first, name another "
                        "--out_dir, or choose another --init_from")
    if not best:
        paths.sort(key=read_iter_num)  # on a tie ckpt.pt stays last: it was written later
    while paths:
        try:
            return load_checkpoint(paths.pop())
        except UserError as error:
            if not paths:
                raise
            print(f"note: {error}; using {paths[0]!r} instead")
    return None


def read_iter_num(path):
    """The iteration of a checkpoint, without reading its tensors."""
    try:
        return int(torch.load(path, map_location="cpu", weights_only=True, mmap=True)["iter_num"])
    except Exception:  # load_checkpoint will say what is wrong
        return float("inf")


def build_model(model_class, config_class, model_args, weights):
    """
    A model of the shape `model_args` with a copy of `weights`. Fields of the config that
    `model_args` lacks take their defaults, with a note. Raises UserError for what does not fit.
    """
    fields = {field.name for field in dataclasses.fields(config_class)}
    for name in model_args.keys() - fields:
        raise UserError(f"the model has {name}={model_args[name]!r}, and {config_class.__name__} "
                        "no such field: use the model.py that it was trained with")
    model = model_class(config_class(**model_args))
    for name in fields - model_args.keys():
        value = getattr(model.config, name)
        print(f"note: the model was made without {name}: it takes the default {value!r}")
    names = model.state_dict().keys()
    for name in list(weights):
        if name.endswith(".attn.bias") and name not in names:
            del weights[name]  # a causal mask, in older checkpoints of nanoGPT
    try:
        model.load_state_dict(weights)
    except Exception as error:  # weights made by hand can raise anything
        raise UserError(f"the weights do not fit {model_args}: {one_line(error)}") from None
    for name, p in model.named_parameters():  # a buffer may be infinite, as masks are
        if not p.isfinite().all():
            raise UserError(f"{name} has values that are not finite: use another checkpoint")
    return model


def one_line(error):
    return " ".join(str(error).split())[:500]


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
    """
    Restores an optimizer's state; its options, such as weight decay, stay as they are set now.
    Raises UserError for the state of another optimizer or model.
    """
    own = optimizer.state_dict()
    try:
        for group, saved_group in zip(own["param_groups"], saved["param_groups"], strict=True):
            group["params"] = saved_group["params"]  # torch compares their number
            group["lr"] = saved_group["lr"]  # a scheduler in `state` may read it
        optimizer.load_state_dict(dict(own, state=saved["state"]))
        for p, values in optimizer.state.items():
            for key, value in values.items():
                if not isinstance(value, torch.Tensor):
                    continue
                # Fused kernels write as if a state was contiguous and had the shape of p, and a
                # file may say otherwise.
                values[key] = value.clone(memory_format=torch.contiguous_format)
                if optimizer.defaults.get("fused") and key != "step" and value.shape != p.shape:
                    raise ValueError(f"{key} has shape {list(value.shape)}")
    except Exception as error:  # of another optimizer, or made by hand
        raise UserError(f"the optimizer state of the checkpoint does not fit ({error!r}): resume "
                        "with the optimizer that it was made with, or start anew") from None


# ---- the folder of a run ----


def back_up(out_dir):
    """Renames the files of an earlier run: its checkpoints to ckpt.1.pt and so on, log.1.csv."""
    number = 1
    while glob.glob(os.path.join(glob.escape(out_dir), f"*.{number}.*")):
        number += 1
    for name in sorted(os.listdir(out_dir)):
        stem, extension = os.path.splitext(name)
        is_of_run = extension == ".pt" or name in ("log.csv", "loss.png")
        if is_of_run and not re.search(r"\.\d+$", stem):  # else it is a backup already
            path = os.path.join(out_dir, name)
            backup = os.path.join(out_dir, f"{stem}.{number}{extension}")
            os.rename(path, backup)
            print(f"backed up {path} of an earlier run as {backup}")


def trim_log(path, columns, iter_num):
    """Starts log.csv, or keeps those rows that a run resumed at `iter_num` will not write again."""
    lines = [",".join(columns) + "\n"]
    if os.path.exists(path):
        with open(path, errors="replace") as file:
            for line in file:
                iteration = line.split(",")[0]
                is_whole_row = line.endswith("\n") and iteration.isdecimal()
                if is_whole_row and int(iteration) < iter_num:
                    lines.append(line)
    with atomic_write(path) as file:
        file.write("".join(lines).encode())


# ---- Hugging Face's format ----

HUB_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
TRANSPOSED = ("c_attn", "c_proj", "c_fc")  # weights are (in, out) there, (out, in) here

ARCHITECTURE = dict(  # what is the same in all of OpenAI's config.json
    model_type="gpt2", activation_function="gelu_new", layer_norm_epsilon=1e-5, n_inner=None,
    scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False,
    tie_word_embeddings=True)


def read_huggingface(source):
    """
    (model_args, weights) of a GPT-2 in Hugging Face's format: one of HUB_NAMES, or a folder.
    Raises UserError for what cannot be read, or is not built as OpenAI's GPT-2.
    """
    if not os.path.isdir(source) and source not in HUB_NAMES:
        raise UserError(f"there is no model {source!r} to start from: name one of {HUB_NAMES}, "
                        "a folder with a config.json and a model.safetensors, or one of a run")
    from safetensors.torch import load_file
    weights = {}
    try:
        with open(find_file(source, "config.json"), encoding="utf-8") as file:
            model_args = read_model_args(json.load(file))
        paths = glob.glob(os.path.join(glob.escape(source), "model-*-of-*.safetensors"))
        if not paths or os.path.exists(os.path.join(source, "model.safetensors")):
            paths = [find_file(source, "model.safetensors")]
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
        raise UserError(f"cannot read a GPT-2 from {source!r}: {type(error).__name__}: "
                        f"{one_line(error)}") from None
    return model_args, weights


def read_model_args(config):
    n_embd = config.get("n_embd", 768)
    if config.get("n_inner") == 4 * n_embd:
        config["n_inner"] = None
    if config.get("activation_function") == "gelu_pytorch_tanh":
        config["activation_function"] = "gelu_new"  # another name
    for key, value in ARCHITECTURE.items():
        if config.get(key, value) != value:
            raise ValueError(f"not OpenAI's architecture: {key} is {config[key]!r}, not {value!r}")
    return dict(n_layer=config.get("n_layer", 12), n_head=config.get("n_head", 12), n_embd=n_embd,
                block_size=config.get("n_positions", 1024), bias=True,
                vocab_size=config.get("vocab_size", GPT2_VOCAB_SIZE), dropout=0.0)


def find_file(source, name):
    """The path of a model's file: in the folder `source`, or downloaded to the hub's cache."""
    if os.path.isdir(source):
        return os.path.join(source, name)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import disable_progress_bars
    if not sys.stderr.isatty():
        disable_progress_bars()
    return hf_hub_download(f"openai-community/{source}", name)


def write_huggingface(model_args, weights, folder):
    """
    Writes a model for transformers, without the padding of the vocabulary and with zeros for
    missing biases. Raises UserError if it is no GPT-2, or cannot be written.
    """
    from safetensors.torch import save_file
    C, V, T = model_args["n_embd"], model_args["vocab_size"], model_args["block_size"]
    shapes = {"transformer.wte": (V, C), "transformer.wpe": (T, C), "transformer.ln_f": (C,),
              "lm_head": (V, C)}
    for i in range(model_args["n_layer"]):
        layers = {"ln_1": (C,), "attn.c_attn": (3 * C, C), "attn.c_proj": (C, C),
                  "ln_2": (C,), "mlp.c_fc": (4 * C, C), "mlp.c_proj": (C, 4 * C)}
        shapes |= {f"transformer.h.{i}.{layer}": shape for layer, shape in layers.items()}
    found = {name.removesuffix(".weight"): tuple(tensor.shape) for name, tensor in weights.items()
             if not name.endswith(".bias")}
    different = dict(found.items() ^ shapes.items()).keys()
    if different:
        raise UserError(f"only a GPT-2 can be exported; what differs is {', '.join(different)}")
    if not torch.equal(weights["lm_head.weight"], weights["transformer.wte.weight"]):
        raise UserError("only a GPT-2 can be exported; lm_head is not tied to transformer.wte")

    vocab_size = min(V, GPT2_VOCAB_SIZE)
    tensors = {}
    for layer, shape in shapes.items():
        tensor = weights[layer + ".weight"].to("cpu", torch.float32)
        if layer == "transformer.wte":
            tensor = tensor[:vocab_size]
        elif layer not in ("transformer.wpe", "lm_head"):
            bias = weights.get(layer + ".bias", torch.zeros(shape[0]))
            tensors[layer + ".bias"] = bias.to("cpu", torch.float32)
        if layer.endswith(TRANSPOSED):
            tensor = tensor.t()
        tensors[layer + ".weight"] = tensor.contiguous()
    del tensors["lm_head.weight"]  # tied
    end_token = vocab_size - 1 if vocab_size == GPT2_VOCAB_SIZE else None
    special = dict(bos_token_id=end_token, eos_token_id=end_token)
    dropout = model_args["dropout"]
    config = dict(
        ARCHITECTURE, architectures=["GPT2LMHeadModel"], dtype="float32", vocab_size=vocab_size,
        n_positions=T, n_ctx=T, n_embd=C, n_layer=model_args["n_layer"],
        n_head=model_args["n_head"], attn_pdrop=dropout, embd_pdrop=dropout, resid_pdrop=dropout,
        **special)
    generation_config = dict(special)
    if T <= 512:  # transformers' pipeline adds 256 tokens by default
        generation_config["max_length"] = T
    try:
        os.makedirs(folder, exist_ok=True)
        path = os.path.join(folder, "model.safetensors")
        save_file(tensors, path, metadata={"format": "pt"})
        os.chmod(path, 0o644)  # safetensors lets nobody else read it
        for name, content in (("config", config), ("generation_config", generation_config)):
            with open(os.path.join(folder, name + ".json"), "w", encoding="utf-8") as file:
                json.dump(content, file, indent=2)
    except Exception as error:  # safetensors has its own kind of exception
        raise UserError(f"cannot write a model to {folder!r}: {error}") from None
