"""
GPT-2 in memory: the model, its optimizers, sampling.

    model = GPT(GPTConfig(n_layer=6, n_head=6, n_embd=384))   new weights, from torch's generator
    model = GPT.from_pretrained('gpt2')                       OpenAI's weights, or a folder
    logits, loss = model(idx, targets)                        logits without targets, else the loss

Letters in shapes: B sequences, T tokens in each, C = n_embd, nh heads of size hs = C / nh,
V = vocab_size. Radford et al. 2019, "Language Models are Unsupervised Multitask Learners".
"""

import math
import os
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from checkpoint import load_checkpoint, read_huggingface, write_huggingface
from configurator import UserError
from muon import Muon
from runtime import has_native_bfloat16, peak_flops


@dataclass
class GPTConfig:
    block_size: int = 1024  # longest context, in tokens
    vocab_size: int = 50304  # GPT-2's 50257, padded to a multiple of 64 for speed
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # in linear layers and layer norms, as in OpenAI's weights

    def __post_init__(self):
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise UserError(f"{name} must be an integer of at least 1, got {value!r}")
        if self.n_embd % self.n_head:
            raise UserError(f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}: "
                             "choose a multiple")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout must be at least 0 and below 1, got {self.dropout!r}")


class Linear(nn.Linear):
    def reset_parameters(self):
        """Does nothing: GPT initializes all weights itself, or loads them."""


class Embedding(nn.Embedding):
    def reset_parameters(self):
        """Does nothing, as in Linear."""


class KVCache:
    """Keys and values of one layer for the tokens so far: a buffer (2, B, nh, capacity, hs)."""

    def __init__(self, capacity):
        self.capacity = capacity
        self.length = 0
        self.buffer = None

    def append(self, k, v):
        """Adds k, v (B, nh, T, hs) and returns all keys and values, each (B, nh, length, hs)."""
        B, nh, T, hs = k.shape
        if self.buffer is None:
            self.buffer = k.new_empty(2, B, nh, self.capacity, hs)
        start = self.length
        self.length += T
        self.buffer[0, :, :, start:self.length] = k
        self.buffer[1, :, :, start:self.length] = v
        return self.buffer[:, :, :, :self.length].unbind(0)


def causal_attention(q, k, v, dropout):
    """
    Causal attention of q, k, v (B, nh, T, hs) as two batched matrix products. On CPUs in bfloat16
    this is faster than scaled_dot_product_attention, which does not use the CPU's matrix units,
    above all in the backward pass. Memory: B * nh matrices of T x T.
    """
    T, hs = q.shape[-2:]
    q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)  # (B * nh, T, hs)
    mask = torch.full((T, T), -math.inf, dtype=q.dtype).triu_(1)
    scores = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=1 / math.sqrt(hs))
    weights = F.dropout(scores.softmax(-1, dtype=q.dtype), dropout)
    return weights @ v  # (B * nh, T, hs)


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, cache=None):
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, nh, T, hs)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, nh, length, hs)
        dropout = self.dropout if self.training else 0.0
        on_cpu_in_bfloat16 = q.dtype == torch.bfloat16 and q.device.type == "cpu"
        if on_cpu_in_bfloat16 and cache is None:
            y = causal_attention(q, k, v, dropout).view(q.shape)
        else:
            # With a cache, T > 1 is the prompt, and T == 1 a token that sees all before it.
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=T > 1)
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        # note: OpenAI trained with the tanh approximation of GELU; the exact one changes the logits
        x = F.gelu(self.c_fc(x), approximate="tanh")
        return self.dropout(self.c_proj(x))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, cache=None):
        x = x + self.attn(self.ln_1(x), cache)
        x = x + self.mlp(self.ln_2(x))
        return x


class GPT(nn.Module):
    """The token embedding and the output layer share one matrix (Press & Wolf 2017)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        # Names are those of OpenAI's published weights.
        self.transformer = nn.ModuleDict()
        self.transformer.wte = Embedding(config.vocab_size, config.n_embd)
        self.transformer.wpe = Embedding(config.block_size, config.n_embd)
        self.transformer.drop = nn.Dropout(config.dropout)
        self.transformer.h = nn.ModuleList([Block(config) for _ in range(config.n_layer)])
        self.transformer.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight
        if not self.lm_head.weight.is_meta:  # on the meta device weights are about to be loaded
            self.initialize()

    def initialize(self):
        """
        N(0, 0.02) for matrices, 0 for biases, 1 for norms. The projections into the residual stream
        get N(0, 0.02 / sqrt(2 n_layer)), because the stream adds up 2 n_layer of them (Radford et
        al. 2019, section 2.3).
        """
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.config.n_layer))
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def hidden(self, idx, caches=None):
        """Maps token ids (B, T), which continue those in `caches`, to hidden states (B, T, C)."""
        start = caches[0].length if caches else 0
        end = start + idx.size(1)
        if end > self.config.block_size:
            raise UserError(f"{end} tokens do not fit into block_size={self.config.block_size}: "
                             "shorten the input")
        x = self.transformer.wte(idx) + self.transformer.wpe.weight[start:end]
        x = self.transformer.drop(x)
        for layer, block in enumerate(self.transformer.h):
            x = block(x, caches[layer] if caches else None)
        return self.transformer.ln_f(x)

    def forward(self, idx, targets=None):
        """
        Maps token ids `idx` (B, T) to (logits, None), logits (B, T, V). With `targets` (B, T), -1
        being ignored, returns (None, mean cross entropy in nats): the logits can then be freed.
        """
        logits = self.lm_head(self.hidden(idx))
        if targets is None:
            return logits, None
        logits = logits.view(-1, logits.size(-1))  # (B * T, V)
        targets = targets.reshape(-1)  # (B * T,)
        return None, F.cross_entropy(logits, targets, ignore_index=-1)

    def get_num_params(self, non_embedding=True):
        """Number of parameters; `non_embedding` leaves out the position embedding."""
        num_params = sum(p.numel() for p in self.parameters())
        if non_embedding:
            num_params -= self.transformer.wpe.weight.numel()
        return num_params

    def flops_per_token(self):
        """FLOPs of the forward and backward pass (Chowdhery et al. 2022, PaLM, appendix B)."""
        config = self.config
        attention = 12 * config.n_layer * config.n_embd * config.block_size
        return 6 * self.get_num_params() + attention

    def estimate_mfu(self, fwdbwd_per_iter, dt):
        """
        Model FLOPs utilization: the model's FLOP/s as a fraction of the device's peak, when
        `fwdbwd_per_iter` sequences of block_size tokens take `dt` seconds. None if it is unknown.
        """
        peak = peak_flops(self.lm_head.weight.device)
        if peak is None:
            return None
        tokens_per_s = fwdbwd_per_iter * self.config.block_size / dt
        return self.flops_per_token() * tokens_per_s / peak

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type,
                             optimizer_type="adamw"):
        """AdamW (Loshchilov & Hutter 2019), with weight decay for matrices and embeddings only."""
        for_muon = set(self.block_matrices()) if optimizer_type == "muon" else set()
        decayed = [p for p in self.parameters() if p.dim() >= 2 and p not in for_muon]
        others = [p for p in self.parameters() if p.dim() < 2]
        groups = [dict(params=decayed, weight_decay=weight_decay),
                  dict(params=others, weight_decay=0.0)]
        fused = device_type in ("cuda", "cpu", "mps")
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=fused)

    def configure_muon(self, weight_decay, learning_rate):
        """Muon (Jordan et al. 2024) for the matrices of the blocks; see muon.py."""
        is_cuda = self.lm_head.weight.is_cuda
        emulates_bfloat16 = is_cuda and not has_native_bfloat16("cuda")  # V100, T4
        dtype = torch.float32 if emulates_bfloat16 else torch.bfloat16
        return Muon(self.block_matrices(), learning_rate, weight_decay, dtype)

    def block_matrices(self):
        return [p for p in self.transformer.h.parameters() if p.dim() == 2]

    def crop_block_size(self, block_size):
        """Shortens the context to `block_size` tokens, for finetuning on shorter sequences."""
        if not 1 <= block_size <= self.config.block_size:
            raise UserError(f"block_size={block_size} must be from 1 to {self.config.block_size}, "
                             "the context of the pretrained model")
        self.config.block_size = block_size
        weight = self.transformer.wpe.weight[:block_size].detach().clone()
        self.transformer.wpe.weight = nn.Parameter(weight)

    # ---- sampling ----

    @torch.no_grad()
    def generate_stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None,
                        vocab_limit=None, stop_token=None):
        """
        Continues the sequences `idx` (B, T), T >= 1: yields up to `max_new_tokens` times the next
        token of each, (B, 1).

        temperature   divides the logits; 0 is greedy
        top_k         draws from the k most probable tokens only (None or 0: all)
        top_p         draws from the most probable tokens whose probabilities add up to top_p only
                      (nucleus sampling, Holtzman et al. 2020; None or 1: all)
        vocab_limit   tokens from this id on are never drawn (padding of the vocabulary)
        stop_token    ends a sequence, which then repeats it; ends the stream soon after all ended

        Keys and values are cached, so each token costs the forward pass of one position, and greedy
        tokens equal those of the plain forward pass. When the context of block_size is full, the
        later half of it is read again as a new context, about every block_size / 2 tokens.
        """
        if idx.size(1) == 0:
            raise UserError("the prompt (start) is empty: give at least one token")
        block_size = self.config.block_size
        capacity = min(block_size, idx.size(1) + max_new_tokens)
        caches = [KVCache(capacity) for _ in range(self.config.n_layer)]
        context = idx[:, -block_size:]  # the latest tokens
        unread = context  # tokens not yet in the caches
        ended = torch.zeros(idx.size(0), 1, dtype=torch.bool, device=idx.device)
        for step in range(1, max_new_tokens + 1):
            if caches[0].length + unread.size(1) > block_size:
                unread = context[:, -max(1, block_size // 2):]
                for cache in caches:
                    cache.length = 0
            logits = self.lm_head(self.hidden(unread, caches)[:, -1])  # (B, V)
            logits = logits[:, :vocab_limit].float()
            token = sample_token(logits, temperature, top_k, top_p)  # (B, 1)
            if stop_token is not None:
                token = token.masked_fill(ended, stop_token)
                ended |= token == stop_token
            yield token
            # Reading from the device waits for it, so check only every 16 tokens.
            if stop_token is not None and step % 16 == 0 and ended.all():
                return
            unread = token
            context = torch.cat([context[:, 1 - block_size:], token], dim=1)

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, **options):
        """`idx` (B, T) and up to `max_new_tokens` more tokens; options as in `generate_stream`."""
        stream = self.generate_stream(idx, max_new_tokens, temperature, top_k, **options)
        return torch.cat([idx, *stream], dim=1)

    # ---- weights from disk, and back: see checkpoint.py ----

    @classmethod
    def from_state(cls, model_args, state):
        """
        A model of the shape `model_args` with a float32 copy of the weights `state`, which is
        emptied on the way, so that large models are not in memory twice.
        """
        with torch.device("meta"):  # no memory yet, no initialization
            model = cls(GPTConfig(**model_args))
        weights = {}
        try:
            state.setdefault("lm_head.weight", state["transformer.wte.weight"])
            while state:
                name, tensor = state.popitem()
                if not tensor.is_floating_point() or not tensor.isfinite().all():
                    raise UserError(f"{name} are not finite floating-point numbers")
                weights[name] = tensor.to("cpu", torch.float32, copy=True).contiguous()
            if not torch.equal(weights["lm_head.weight"], weights["transformer.wte.weight"]):
                raise UserError("lm_head.weight is not transformer.wte.weight: it must be tied")
            model.load_state_dict(weights, assign=True)
        except Exception as error:  # missing, of another shape, or made by hand
            cause = " ".join(str(error).split())
            raise UserError(f"the weights do not fit {model_args}: {cause}") from None
        model.lm_head.weight = model.transformer.wte.weight  # tied again
        return model

    @classmethod
    def from_pretrained(cls, name_or_folder, override_args=None):
        """
        OpenAI's 'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl', or a folder in Hugging Face's
        format. `override_args` may set dropout. Raises ValueError for anything that is not GPT-2.
        """
        override_args = override_args or {}
        if not set(override_args) <= {"dropout"}:
            raise UserError(f"override_args={override_args} may only set 'dropout'")
        model_args, state = read_huggingface(name_or_folder)
        return cls.from_state(model_args | override_args, state)

    def save_pretrained(self, folder):
        """Writes a folder that transformers' GPT2LMHeadModel and `from_pretrained` load."""
        write_huggingface(vars(self.config), self.state_dict(), folder)


def sample_token(logits, temperature, top_k, top_p):
    """Draws one token for each sequence from float logits (B, V); returns (B, 1)."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    k = logits.size(-1)
    if top_k:
        k = min(top_k, k)
    logits, tokens = logits.topk(k)  # (B, k), most probable first
    # Subtracting the largest keeps a tiny temperature from overflowing.
    logits = (logits - logits[:, :1]) / temperature
    if top_p is not None and top_p < 1:
        probs = logits.softmax(-1)
        probs_before = probs.cumsum(-1) - probs
        logits[probs_before >= top_p] = -math.inf
    # The Gumbel-max trick. torch.multinomial would wait for the device, to check its input.
    noise = torch.empty_like(logits).exponential_().clamp_min_(1e-10)
    choice = (logits - noise.log()).argmax(-1, keepdim=True)
    return tokens.gather(1, choice)


def load_model(init_from, out_dir):
    """(model, checkpoint) of `out_dir` for 'resume', otherwise (pretrained model, None)."""
    if init_from != "resume":
        return GPT.from_pretrained(init_from), None
    for name in ("ckpt.pt", "last.pt"):
        path = os.path.join(out_dir, name)
        if os.path.exists(path):
            checkpoint = load_checkpoint(path)
            return GPT.from_state(checkpoint["model_args"], checkpoint["model"]), checkpoint
    raise UserError(f"there is no ckpt.pt in out_dir={out_dir!r}: train first, name another "
                     "--out_dir, or start from --init_from=gpt2")
