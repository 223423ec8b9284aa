"""
GPT-2: the model, and below the rule what every script needs around it (the device, checkpoints on disk).

    model = GPT(GPTConfig(n_layer=6, n_head=6, n_embd=384))       new weights, drawn from torch's global generator
    model = GPT.from_pretrained('gpt2')                           OpenAI's, or a folder that transformers wrote
    logits, loss = model(idx, targets)                            ids (B, T) in; logits with no targets, the loss with them

Letters in shapes: B rows of a batch, T positions, C = n_embd, nh heads of hs = C / nh, V vocabulary.
Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.3; Vaswani et al. 2017.
"""

import ctypes
import glob
import json
import math
import os
import re
import sys
import zipfile
from dataclasses import dataclass

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # Linux CPUs: huge pages for large tensors, and see setup_device. 0: neither

import torch
import torch.nn as nn
import torch.nn.functional as F

GPT2_VOCAB = 50257  # 256 bytes, 50,000 merges, <|endoftext|>
# dense bfloat16 FLOP/s by the makers' data sheets; the first name found in the device's name counts
PEAK_FLOPS = {"B200": 2250e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "GH200": 989e12,
              "A100": 312e12, "L40S": 362e12, "L4": 121e12, "A10": 125e12, "4090": 165e12, "3090": 71e12, "V100": 125e12, "T4": 65e12}


@dataclass
class GPTConfig:
    block_size: int = 1024  # longest context, in tokens
    vocab_size: int = 50304  # 64 x 786, which suits matrix units; GPT-2 has 50257 tokens
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # of linear layers and norms; OpenAI's weights have it

    def __post_init__(self):
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        if type(self.bias) is not bool:
            raise ValueError(f"bias must be True or False, got {self.bias!r}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} cannot be divided among n_head={self.n_head} heads: choose a multiple")
        if not isinstance(self.dropout, (int, float)) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout!r}")


class KVCache:
    """Keys and values of one layer for the positions read so far, in buffers of (B, nh, capacity, hs)."""

    def __init__(self, capacity):
        self.capacity, self.length, self.kv = capacity, 0, None

    def append(self, k, v):
        """Adds k, v (B, nh, T, hs); returns all there are, each (B, nh, length, hs)."""
        B, nh, T, hs = k.shape
        if self.kv is None:
            self.kv = k.new_empty(2, B, nh, self.capacity, hs)
        self.kv[0, :, :, self.length:self.length + T] = k
        self.kv[1, :, :, self.length:self.length + T] = v
        self.length += T
        return self.kv[:, :, :, :self.length].unbind(0)


class Linear(nn.Linear):
    def reset_parameters(self):
        """Nothing: GPT draws all weights itself, or loads them. (On 'meta', torch takes a second to draw none.)"""

    def forward(self, x):
        # a single row in sampling: on CPUs torch multiplies bfloat16 matrices by a vector faster than by a matrix of one row
        if x.dtype == self.weight.dtype == torch.bfloat16 and x.device.type == "cpu" and x.numel() == x.size(-1):
            y = torch.mv(self.weight, x.flatten()).view(*x.shape[:-1], -1)
            return y if self.bias is None else y + self.bias
        return super().forward(x)


class Embedding(nn.Embedding):
    def reset_parameters(self):
        """Nothing, likewise."""


def attend(q, k, v, dropout):
    """
    Causal attention of q, k, v (B, nh, T, hs) by whole matrices: for CPUs in bfloat16, whose matrix units then do what
    scaled_dot_product_attention leaves to slower code, its backward pass above all. Takes memory for (B, nh, T, T).
    """
    T, hs = q.shape[-2:]
    mask = torch.full((T, T), -math.inf, dtype=q.dtype).triu_(1)
    weights = torch.baddbmm(mask, q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2), alpha=1 / math.sqrt(hs)).softmax(-1, dtype=q.dtype)
    return (F.dropout(weights, dropout) @ v.flatten(0, 1)).view(q.shape)


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # queries, keys, values at once
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, cache=None):
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, nh, T, hs) each
        if cache is not None:
            k, v = cache.append(k, v)  # (B, nh, length, hs)
        dropout = self.dropout if self.training else 0.0
        if q.dtype == torch.bfloat16 and q.device.type == "cpu" and cache is None:
            y = attend(q, k, v, dropout)
        else:
            # with a cache either everything is read at once, or one position that may look at all before it: no mask
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=T > 1)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, C)))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        # note: OpenAI's weights were trained with the tanh approximation of GELU; the exact one gives other logits
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, cache=None):
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """
    All weights start as N(0, 0.02), biases as 0, norms as 1, but the projections back into the residual stream as
    N(0, 0.02 / sqrt(2 n_layer)): the stream adds up 2 n_layer of them (Radford et al. 2019, section 2.3).
    The input embedding and the output layer share one matrix (Press & Wolf 2017).
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        gpt = self.transformer = nn.ModuleDict()  # this and the names below are those of GPT-2's published weights
        gpt.wte = Embedding(config.vocab_size, config.n_embd)
        gpt.wpe = Embedding(config.block_size, config.n_embd)
        gpt.drop = nn.Dropout(config.dropout)
        gpt.h = nn.ModuleList([Block(config) for _ in range(config.n_layer)])
        gpt.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = gpt.wte.weight
        for name, p in self.named_parameters():
            if p.is_meta:
                continue  # it will be loaded
            if p.dim() >= 2:
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def hidden(self, idx, caches=None):
        """Ids (B, T) to the final norm's output (B, T, C). `caches` (one KVCache a layer) holds the positions before."""
        start = caches[0].length if caches else 0
        end = start + idx.size(1)
        if end > self.config.block_size:
            raise ValueError(f"{end} tokens are more than block_size={self.config.block_size}: shorten the input")
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe.weight[start:end])
        for layer, block in enumerate(self.transformer.h):
            x = block(x, caches[layer] if caches else None)
        return self.transformer.ln_f(x)

    def forward(self, idx, targets=None):
        """
        Ids (B, T), and the ids one position on (B, T), -1 where nothing is to be predicted.
        Returns (logits (B, T, V), None) without targets; with them (None, mean cross entropy in nats): whoever needs no
        logits lets them be freed, and the backward pass carries no zeros of their size.
        """
        logits = self.lm_head(self.hidden(idx))
        if targets is None:
            return logits, None
        return None, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.reshape(-1), ignore_index=-1)

    def get_num_params(self, non_embedding=True):
        """Number of parameters, the tied matrix once; without the positions' embedding unless told otherwise."""
        total = sum(p.numel() for p in self.parameters())
        return total - self.transformer.wpe.weight.numel() if non_embedding else total

    def flops_per_token(self):
        """FLOPs of a forward and backward pass for each token (Chowdhery et al. 2022, PaLM, appendix B)."""
        return 6 * self.get_num_params() + 12 * self.config.n_layer * self.config.n_embd * self.config.block_size

    def estimate_mfu(self, fwdbwd_per_iter, dt):
        """
        Share of the device's peak FLOP/s in use when `fwdbwd_per_iter` rows of block_size tokens take `dt` seconds on it;
        None where the peak is not known.
        """
        device = self.lm_head.weight.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        peak = next((peak for key, peak in PEAK_FLOPS.items() if re.search(rf"\b{key}\b", name)), None)
        return peak and self.flops_per_token() * self.config.block_size * fwdbwd_per_iter / dt / peak

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type, optimizer_type="adamw"):
        """
        AdamW (Loshchilov & Hutter 2019) in two groups: matrices and embeddings decay, biases and norms do not.
        With optimizer_type 'muon' the blocks' matrices are left to `configure_muon`.
        """
        others = set(self.block_matrices()) if optimizer_type == "muon" else ()
        matrices = [p for p in self.parameters() if p.dim() >= 2 and p not in others]
        vectors = [p for p in self.parameters() if p.dim() < 2]
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=device_type in ("cuda", "cpu", "mps"))

    def configure_muon(self, weight_decay, learning_rate):
        """Muon (Jordan et al. 2024) for the blocks' matrices; its updates have the size of AdamW's (Liu et al. 2025, section 2.2)."""
        return torch.optim.Muon(self.block_matrices(), lr=learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")

    def block_matrices(self):
        return [p for p in self.transformer.h.parameters() if p.dim() == 2]

    def crop_block_size(self, block_size):
        """Shortens the context to `block_size` positions, to finetune a long model on short blocks."""
        if not 1 <= block_size <= self.config.block_size:
            raise ValueError(f"block_size={block_size}: the model has {self.config.block_size} positions, and can't get more")
        self.config.block_size = block_size
        self.transformer.wpe.weight = nn.Parameter(self.transformer.wpe.weight[:block_size].detach().clone())

    @torch.no_grad()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, vocab_limit=None, stop_token=None):
        """
        Continues each row of `idx` (B, T), T >= 1; yields up to `max_new_tokens` times the next ids (B, 1).

        temperature: divides the logits; 0 takes the likeliest id always. top_k: only the k likeliest ids (None or 0: all).
        top_p: only the likeliest ids that together hold this probability (Holtzman et al. 2020; None or 1: all).
        vocab_limit: ids from here on are never drawn (padding). stop_token: a row that drew it repeats it; when all have,
        the stream ends at the next multiple of 16 tokens.

        Keys and values are cached, so each token costs one position. Positions are absolute: when the context of
        block_size is full, its later half is read again as a new beginning, about once in block_size / 2 tokens.
        Up to there, and for the first token after a longer prompt, the result is that of the plain forward pass.
        """
        size = self.config.block_size
        caches = [KVCache(min(size, idx.size(1) + max_new_tokens)) for _ in range(self.config.n_layer)]
        text, new = [idx], idx[:, -size:]  # all there is, in pieces, and what the model has not read of it
        done = torch.zeros(idx.size(0), 1, dtype=torch.bool, device=idx.device)
        for step in range(1, max_new_tokens + 1):
            if caches[0].length + new.size(1) > size:
                for cache in caches:
                    cache.length = 0
                new = torch.cat(text, dim=1)[:, -max(1, size // 2):]
            logits = self.lm_head(self.hidden(new, caches)[:, -1])[:, :vocab_limit]  # (B, V)
            new = pick(logits.float(), temperature, top_k, top_p)
            if stop_token is not None:
                new = new.masked_fill(done, stop_token)
                done |= new == stop_token
            text.append(new)
            yield new
            if stop_token is not None and step % 16 == 0 and done.all():  # seldom: asking waits for the device
                break

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, **options):
        """`idx` (B, T) continued by up to `max_new_tokens` ids, (B, T + these). Options and limits: see `stream`."""
        return torch.cat([idx, *self.stream(idx, max_new_tokens, temperature, top_k, **options)], dim=1)

    @classmethod
    def from_state(cls, config, state, source):
        """A model of shape `config` with the weights `state` (a state dict), all of which are checked; `source` names them."""
        found = {name: list(p.shape) for name, p in state.items()}
        expected = {"transformer.wte.weight": [config.vocab_size, config.n_embd], "transformer.wpe.weight": [config.block_size, config.n_embd]}
        if config.n_layer > len(state):
            raise ValueError(f"{source} holds {len(state)} tensors, too few for n_layer={config.n_layer}")
        if all(found.get(name) == shape for name, shape in expected.items()):  # a made-up shape is not built, not even on 'meta'
            with torch.device("meta"):  # no memory, no initialization: the weights come from the state
                model = cls(config)
            expected = {name: list(p.shape) for name, p in model.state_dict().items()}
        for name in [name for name in expected | found if expected.get(name) != found.get(name)]:
            raise ValueError(f"{source} does not fit the model: {name} is {found.get(name, 'missing')}, not {expected.get(name, 'there')}")
        # a copy of its own: the file may be mapped, and may hold another precision
        model.load_state_dict({name: p.to("cpu", torch.float32, copy=True) for name, p in state.items()}, assign=True)
        model.lm_head.weight = model.transformer.wte.weight  # two copies were assigned: tied again
        return model

    @classmethod
    def from_checkpoint(cls, checkpoint, dropout=0.0):
        """The model of a checkpoint that `load_checkpoint` read: nanoGPT's too, compiled or from before flash attention."""
        state = {name.removeprefix("_orig_mod."): p for name, p in checkpoint["model"].items()}
        state = {name: p for name, p in state.items() if not name.endswith(".attn.bias")}  # old masks, not weights
        return cls.from_state(GPTConfig(**dict(checkpoint["model_args"], dropout=dropout)), state, "the checkpoint")

    @classmethod
    def from_pretrained(cls, name_or_folder, override_args=None):
        """
        GPT-2's weights: 'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl' (from the Hugging Face hub, kept in its cache), or a
        folder with config.json and model.safetensors. `override_args` may set dropout, and nothing else.
        Raises ValueError for what cannot be fetched, or is not a GPT-2 as OpenAI built it.
        """
        folder = name_or_folder
        if not os.path.isdir(folder):
            if folder not in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"):
                raise ValueError(f"there is no model {folder!r} to start from: take 'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl', or a folder")
            from huggingface_hub import snapshot_download
            try:
                folder = snapshot_download(f"openai-community/{name_or_folder}", allow_patterns=["config.json", "model*.safetensors"])
            except (OSError, ValueError, RuntimeError) as error:  # offline, unknown, refused
                raise ValueError(f"cannot fetch {name_or_folder!r} from the Hugging Face hub ({type(error).__name__}): go online, "
                                 "or give a folder that holds its config.json and model.safetensors") from None
        from safetensors.torch import load_file
        files = sorted(glob.glob(os.path.join(glob.escape(folder), "model*.safetensors")))
        try:
            with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
                given = json.load(file)
            weights = {name: p for path in files for name, p in load_file(path).items()}
        except Exception as error:  # a damaged file can raise anything
            raise ValueError(f"cannot read a GPT-2 from {folder!r}: {type(error).__name__}: {error}") from None
        if not files or not isinstance(given, dict):
            raise ValueError(f"{folder!r} holds no GPT-2: it needs a config.json and a model.safetensors")
        config = GPTConfig(given.get("n_positions", 1024), given.get("vocab_size", GPT2_VOCAB), given.get("n_layer", 12),
                           given.get("n_head", 12), given.get("n_embd", 768), (override_args or {}).get("dropout", 0.0), bias=True)
        built = {"model_type": ["gpt2"], "activation_function": ["gelu_new", "gelu_pytorch_tanh"], "layer_norm_epsilon": [1e-5],
                 "n_inner": [None, 4 * config.n_embd], "scale_attn_weights": [True], "scale_attn_by_inverse_layer_idx": [False],
                 "add_cross_attention": [False], "tie_word_embeddings": [True]}
        for key, good in built.items():
            if given.get(key, good[0]) not in good:
                raise ValueError(f"{folder!r} is not built as OpenAI's GPT-2: {key} is {given[key]!r}, not {good[0]!r}")
        state = {}
        for name, p in weights.items():
            name = name.removeprefix("transformer.")
            if not re.search(r"\.attn\.(masked_)?bias$|^lm_head", name):  # masks; the tied matrix
                # note: OpenAI's layers hold their matrices as (in, out), nn.Linear as (out, in)
                state["transformer." + name] = p.transpose(0, -1).contiguous() if re.search(r"(c_attn|c_proj|c_fc)\.weight$", name) else p
        if "transformer.wte.weight" in state:
            state["lm_head.weight"] = state["transformer.wte.weight"]
        return cls.from_state(config, state, repr(folder))

    def save_pretrained(self, folder):
        """
        Writes config.json and model.safetensors (float32), from which transformers' GPT2LMHeadModel loads the same model.
        Rows of the vocabulary beyond GPT-2's 50257 are cut: padding. The format has biases: missing ones are written as zeros.
        """
        from safetensors.torch import save_file
        vocab_size = min(self.config.vocab_size, GPT2_VOCAB)
        state = {}
        for name, p in self.state_dict().items():
            p = p.to("cpu", torch.float32)
            if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
                p = p.t()
            state[name] = (p[:vocab_size] if name.endswith("wte.weight") else p).contiguous()
            if re.search(r"(ln_.|c_attn|c_proj|c_fc)\.weight$", name):
                state.setdefault(name[:-len("weight")] + "bias", torch.zeros(p.size(-1)))
        del state["lm_head.weight"]
        end = vocab_size - 1 if vocab_size == GPT2_VOCAB else None  # <|endoftext|>
        config = dict(architectures=["GPT2LMHeadModel"], model_type="gpt2", activation_function="gelu_new", vocab_size=vocab_size,
                      n_positions=self.config.block_size, n_embd=self.config.n_embd, n_layer=self.config.n_layer,
                      n_head=self.config.n_head, layer_norm_epsilon=1e-5, tie_word_embeddings=True, bos_token_id=end,
                      eos_token_id=end, dtype="float32", **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), self.config.dropout))
        os.makedirs(folder, exist_ok=True)
        try:
            save_file(state, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
        except Exception as error:  # safetensors' own kind, where others raise an OSError
            raise ValueError(f"cannot write to {folder!r}: {error}") from None
        with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as file:
            json.dump(config, file, indent=2)


def pick(logits, temperature, top_k, top_p):
    """One id a row, (B, 1), drawn from float logits (B, V), or with temperature 0 the likeliest."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    ids, nucleus = None, (top_p or 1) < 1
    if nucleus or top_k and top_k < logits.size(-1):
        logits, ids = logits.topk(min(top_k or logits.size(-1), logits.size(-1)))  # (B, k), in descending order
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature  # at most 0: a tiny temperature can't overflow upwards
    if nucleus:
        p = logits.softmax(-1)
        logits[p.cumsum(-1) - p >= top_p] = -math.inf  # what comes before an id already holds top_p; never true of the first
    # the Gumbel-max trick: like torch.multinomial, which would wait for the device to check its input
    noise = torch.empty_like(logits).exponential_().clamp_min_(1e-10)
    chosen = (logits - noise.log()).argmax(-1, keepdim=True)
    return chosen if ids is None else ids.gather(1, chosen)


# -----------------------------------------------------------------------------
# around the model: the device, and checkpoints on disk


def setup_device(device, dtype, compile, deterministic=False):
    """
    Chooses what is left to 'auto', checks what is not, and sets torch's global switches.
    Returns the device as torch names it ('cuda', 'cuda:1', 'mps', 'cpu'), the dtype's name, and whether to compile.
    """
    local_rank = os.environ.get("LOCAL_RANK")  # set by torchrun
    mps = torch.backends.mps.is_available() and local_rank is None
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if not re.fullmatch(r"(cuda|mps|cpu)(:\d{1,4})?", str(device)):
        raise ValueError(f"device={device!r} is none of 'auto', 'cpu', 'cuda', 'cuda:1', 'mps'")
    kind = device.split(":")[0]
    if kind == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device={device!r}, but torch finds no CUDA GPU here: use --device=cpu, or a CUDA build of torch")
        device = f"cuda:{local_rank}" if local_rank else device
        index = int(device.partition(":")[2] or 0)
        if index >= torch.cuda.device_count():
            raise ValueError(f"device={device!r}, but this machine has {torch.cuda.device_count()} GPUs: start fewer processes")
        torch.cuda.set_device(index)
    if kind == "mps" and not mps:
        raise ValueError(f"device={device!r} takes an Apple GPU, and one process: use --device=cpu")

    if dtype == "auto":
        # is the format native? is_bf16_supported says yes to emulation too unless told not to
        cpu = getattr(torch.cpu, "get_capabilities", dict)()
        native = {"cuda": lambda: torch.cuda.is_bf16_supported(including_emulation=False), "mps": lambda: False,
                  "cpu": lambda: cpu.get("avx512_bf16", False) or cpu.get("amx_bf16", False)}[kind]()
        dtype = "bfloat16" if native else "float16" if kind == "cuda" else "float32"
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype={dtype!r} is none of 'auto', 'float32', 'bfloat16', 'float16'")
    if compile not in ("auto", True, False):
        raise ValueError(f"compile={compile!r} is none of 'auto', True, False")
    compile = kind == "cuda" if compile == "auto" else compile

    torch.set_flush_denormal(True)  # CPUs take tens of times as long over numbers below 1e-38
    if kind == "cpu" and sys.platform == "linux" and os.environ["THP_MEM_ALLOC_ENABLE"] == "1":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda option, value: None)  # glibc's
        # tensors below 64 MiB come from the heap, and it keeps what they free: to take their pages anew in each step costs a
        # tenth of it. note: with larger ones there too, the heap falls into fragments, half as much again at 4 x 1024 tokens
        mallopt(-3, 2 ** 26)  # M_MMAP_THRESHOLD
        mallopt(-1, -1)  # M_TRIM_THRESHOLD
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False
        from torch._inductor import config as inductor
        if hasattr(inductor, "deterministic"):  # from torch 2.10 on
            inductor.deterministic = True  # its autotuning would choose kernels by the clock
    return device, dtype, compile


def save_checkpoint(checkpoint, path):
    """
    Writes a checkpoint (a dict of tensors and plain values) to `path`, whole or not at all: beside its place, flushed to
    the disk, renamed. Raises ValueError when the disk is full or the folder can't be written; what was there stays.
    """
    scrap = os.path.join(os.path.dirname(path), "checkpoint.tmp")  # one name: a crash leaves one at most, for the next save to replace
    try:
        with open(scrap, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scrap, path)
    except (OSError, RuntimeError) as error:
        if os.path.exists(scrap):
            os.remove(scrap)
        raise ValueError(f"cannot save {path!r}, what it held before is intact: {error} (if the disk is full, make room and resume)") from None


def load_checkpoint(path):
    """
    Reads a checkpoint, ours or nanoGPT's, and checks it: the archive's sums, that it holds data alone, and each key.
    Raises ValueError, naming the file, for anything else. Tensors are on the CPU and mapped from the file, not yet read.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # torch itself loads flipped bits without a word
            damaged = archive.testzip()
            if damaged:
                raise RuntimeError(f"the sum of {damaged} is wrong")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        checkpoint["model_args"] = {name: checkpoint["model_args"][name] for name in GPTConfig.__annotations__}
        checkpoint["best_val_loss"] = float(checkpoint["best_val_loss"])
        checkpoint["config"] = {key: value for key, value in checkpoint["config"].items() if type(value) in (bool, int, float, str)}
        scaler = checkpoint["scaler"] = dict(checkpoint.get("scaler", {}))  # this and what follows nanoGPT's do not have
        total, in_a_row = checkpoint["skipped"] = tuple(map(int, checkpoint.get("skipped", (0, 0))))
        checks = dict(
            iter_num=type(checkpoint["iter_num"]) is int and 0 <= checkpoint["iter_num"] < 2 ** 31,
            best_val_loss=not math.isnan(checkpoint["best_val_loss"]), skipped=min(total, in_a_row) >= 0,
            model=all(type(name) is str and p.layout is torch.strided and p.is_floating_point() for name, p in checkpoint["model"].items()),
            scaler=not scaler or scaler.keys() == torch.amp.GradScaler("cpu").state_dict().keys()
            and all(type(value) in (int, float) and 0 <= value < math.inf for value in scaler.values()),
            wandb_id=type(checkpoint.get("wandb_id", "")) in (str, type(None)), optimizer=type(checkpoint["optimizer"]["state"]) is dict)
        if not all(checks.values()):
            raise RuntimeError(f"its {min(checks, key=checks.get)} is not what a checkpoint holds")
    except Exception as error:  # a damaged or hostile file can raise anything
        refused = re.search(r"Unsupported .*|GLOBAL \S+", str(error))  # what it tried to call
        reason = refused[0] if refused else str(error).split("\n")[0]
        raise ValueError(f"cannot use the checkpoint {path!r}: {type(error).__name__}: {reason[:200]}") from None
    return checkpoint


def load_model(init_from, out_dir):
    """
    The model to sample from or to evaluate, on the CPU in float32, and the name of the data set that it was trained on (or None).
    `init_from`: 'resume' (ckpt.pt in `out_dir`, else last.pt), a name of OpenAI's, or a folder; see `from_pretrained`.
    """
    if init_from != "resume":
        return GPT.from_pretrained(init_from), None
    path = next(filter(os.path.exists, [os.path.join(out_dir, name) for name in ("ckpt.pt", "last.pt")]), None)
    if path is None:
        raise ValueError(f"{out_dir!r} holds no ckpt.pt: train first, name its --out_dir, or try --init_from=gpt2")
    checkpoint = load_checkpoint(path)
    return GPT.from_checkpoint(checkpoint), checkpoint["config"].get("dataset")


def load_optimizer(optimizer, saved):
    """Loads the state (moments, steps) that a checkpoint saved; the options, such as betas and decay, stay as they are."""
    shapes = dict(enumerate(p.shape for group in optimizer.param_groups for p in group["params"]))
    muon = isinstance(optimizer, torch.optim.Muon)
    moments = ("momentum_buffer",) if muon else ("exp_avg", "exp_avg_sq")
    try:
        fits = len(saved["state"]) in (0, len(shapes)) and all(state[name].shape == shapes[i] for i, state in saved["state"].items() for name in moments)
        fits = fits and (muon or all(float(state["step"]) >= 0 for state in saved["state"].values()))
    except Exception:  # made by hand, or for another optimizer
        fits = False
    if not fits:
        raise ValueError("the checkpoint's optimizer does not fit its model: resume with the optimizer_type that it was made with, "
                         "or start anew from its weights")
    optimizer.load_state_dict(dict(optimizer.state_dict(), state=saved["state"]))
