"""
The GPT-2 model: its layers, its optimizers, sampling from it.

    model = GPT(GPTConfig(n_layer=6, n_head=6, n_embd=384))   new weights
    model = GPT.from_pretrained('gpt2')                       OpenAI's weights, or a folder
    logits, loss = model(idx, targets)                        one of them is None

Letters in shapes: B sequences, T tokens in each, C = n_embd, nh heads of size hs = C / nh,
V = vocab_size. Radford et al. 2019, "Language Models are Unsupervised Multitask Learners".
"""

import dataclasses
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils import skip_init
from torch.utils.checkpoint import checkpoint as recompute

from checkpoint import read_checkpoint, read_huggingface, write_huggingface
from configurator import UserError, check_ranges
from muon import Muon
from runtime import peak_flops


@dataclasses.dataclass
class GPTConfig:
    block_size: int = 1024  # longest context, in tokens
    vocab_size: int = 50304  # GPT-2's 50257, padded to a multiple of 64 for speed
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # in linear layers and layer norms, as in OpenAI's weights

    def __post_init__(self):
        check_ranges(vars(self), "block_size vocab_size n_layer n_head n_embd", 1)
        check_ranges(vars(self), "dropout", 0, 0.999999)
        if self.n_embd % self.n_head:
            raise UserError(f"n_embd={self.n_embd} must be a multiple of n_head={self.n_head}")


def linear(n_in, n_out, bias, std=0.02):
    """nn.Linear with weights from N(0, std²) and biases 0, not torch's own."""
    layer = skip_init(nn.Linear, n_in, n_out, bias=bias)
    nn.init.normal_(layer.weight, std=std)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def projection(n_in, config):
    """Into the residual stream, which adds up 2 n_layer of them (Radford et al. 2019, 2.3)."""
    return linear(n_in, config.n_embd, config.bias, std=0.02 / math.sqrt(2 * config.n_layer))


def embedding(num_ids, n_embd):
    weight = torch.empty(num_ids, n_embd).normal_(std=0.02)
    return nn.Embedding.from_pretrained(weight, freeze=False)


class KVCache:
    """Keys and values of one layer for the tokens so far, in buffers for `capacity` tokens."""

    def __init__(self, capacity):
        self.capacity = capacity
        self.length = 0

    def append(self, k, v):
        """Adds k, v (B, nh, T, hs) and returns all keys and values, each (B, nh, length, hs)."""
        B, nh, T, hs = k.shape
        if self.length == 0:
            self.kv = k.new_empty(2, B, nh, self.capacity, hs)
        start, self.length = self.length, self.length + T
        self.kv[:, :, :, start:self.length] = torch.stack([k, v])
        return self.kv[:, :, :, :self.length].unbind(0)


def causal_attention(q, k, v, dropout):
    """
    Attention of q, k, v (B, nh, T, hs) as two batched matrix products. On CPUs in bfloat16 this is
    faster than scaled_dot_product_attention, but needs memory for B * nh matrices of T x T.
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
        self.c_attn = linear(config.n_embd, 3 * config.n_embd, config.bias)
        self.c_proj = projection(config.n_embd, config)
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
        self.c_fc = linear(config.n_embd, 4 * config.n_embd, config.bias)
        self.c_proj = projection(4 * config.n_embd, config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        # note: OpenAI trained with this approximation of GELU; the exact one changes the logits
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
        self.gradient_checkpointing = False
        # Names are those of OpenAI's published weights.
        self.transformer = nn.ModuleDict()
        self.transformer.wte = embedding(config.vocab_size, config.n_embd)
        self.transformer.wpe = embedding(config.block_size, config.n_embd)
        self.transformer.drop = nn.Dropout(config.dropout)
        self.transformer.h = nn.ModuleList([Block(config) for _ in range(config.n_layer)])
        self.transformer.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.lm_head = linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight

    def forward(self, idx, targets=None, caches=None):
        """
        Maps token ids `idx` (B, T) to (logits (B, T, V), None), or with `targets` (B, T), where -1
        is ignored, to (None, mean cross entropy in nats): the logits can then be freed.
        With `caches`, one per layer, `idx` is the prompt, then single tokens; logits (B, 1, V).
        """
        start = max(cache.length for cache in caches) if caches else 0
        end = start + idx.size(1)
        if end > self.config.block_size:
            raise ValueError(f"{end} tokens do not fit into block_size={self.config.block_size}")
        x = self.transformer.wte(idx) + self.transformer.wpe.weight[start:end]  # (B, T, C)
        x = self.transformer.drop(x)
        for layer, block in enumerate(self.transformer.h):
            if self.gradient_checkpointing and self.training:
                x = recompute(block, x, use_reentrant=False)
            else:
                x = block(x, caches[layer] if caches else None)
        if caches:
            x = x[:, -1:]
        logits = self.lm_head(self.transformer.ln_f(x))
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

    def estimate_mfu(self, fwdbwd_per_iter, dt):
        """
        Model FLOPs utilization (Chowdhery et al. 2022, PaLM, appendix B): the fraction of the
        device's peak, if `fwdbwd_per_iter` sequences take `dt` seconds. nan if it is not known.
        """
        config = self.config
        attention = 12 * config.n_layer * config.n_embd * config.block_size
        flops_per_token = 6 * self.get_num_params() + attention
        tokens_per_s = fwdbwd_per_iter * config.block_size / dt
        return flops_per_token * tokens_per_s / peak_flops(next(self.parameters()).device)

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type,
                             optimizer_type="adamw"):
        """AdamW (Loshchilov & Hutter 2019) for all, or 'muon': for all but `block_matrices`."""
        muon_params = set(self.block_matrices()) if optimizer_type == "muon" else set()
        params = [p for p in self.parameters() if p not in muon_params]
        matrices = [p for p in params if p.dim() >= 2]  # and embeddings
        vectors = [p for p in params if p.dim() < 2]
        groups = [dict(params=matrices, weight_decay=weight_decay),
                  dict(params=vectors, weight_decay=0.0)]
        fused = device_type in ("cuda", "cpu", "mps")
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=fused)

    def configure_muon(self, weight_decay, learning_rate, lr_scale=1.0):
        """Muon for the matrices of the blocks, with learning rates `lr_scale` times AdamW's."""
        group = dict(params=self.block_matrices(), lr_scale=lr_scale)
        return Muon([group], learning_rate, weight_decay)

    def block_matrices(self):
        return [p for p in self.transformer.h.parameters() if p.dim() == 2]

    def crop_block_size(self, block_size):
        """Shortens the context to `block_size` tokens, for finetuning."""
        check_ranges(dict(block_size=block_size), "block_size", 1, self.config.block_size)
        self.config.block_size = block_size
        weight = self.transformer.wpe.weight[:block_size].detach().clone()
        self.transformer.wpe.weight = nn.Parameter(weight)

    # ---- sampling ----

    @torch.no_grad()
    def generate_stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None,
                        vocab_limit=None):
        """
        Continues the sequences `idx` (B, T), T >= 1: yields the next token of each, (B, 1),
        `max_new_tokens` times.

        temperature   divides the logits; 0 is greedy
        top_k         draws from the k most probable tokens (None or 0: all)
        top_p         draws from the most probable tokens of this total probability (None or 1: all;
                      nucleus sampling, Holtzman et al. 2020)
        vocab_limit   tokens from this id on, the padding of the vocabulary, are never drawn

        Keys and values are cached. Greedy tokens equal those of the plain forward pass up to
        block_size tokens; then the later half of the context is read again, as a new one.
        """
        block_size = self.config.block_size
        capacity = min(block_size, idx.size(1) + max_new_tokens)
        caches = [KVCache(capacity) for _ in self.transformer.h]
        context = idx[:, -block_size:]  # the latest tokens
        new_tokens = context  # those that the caches do not have yet
        for _ in range(max_new_tokens):
            if max(cache.length for cache in caches) + new_tokens.size(1) > block_size:
                new_tokens = context[:, -max(1, block_size // 2):]
                caches = [KVCache(capacity) for _ in self.transformer.h]
            logits = self(new_tokens, caches=caches)[0][:, -1, :vocab_limit].float()  # (B, V)
            new_tokens = sample_token(logits, temperature, top_k, top_p)  # (B, 1)
            yield new_tokens
            context = torch.cat([context[:, 1 - block_size:], new_tokens], dim=1)

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, **options):
        """`idx` (B, T) and `max_new_tokens` more tokens; options as in `generate_stream`."""
        stream = self.generate_stream(idx, max_new_tokens, temperature, top_k, **options)
        return torch.cat([idx, *stream], dim=1)

    # ---- weights from disk, and back: see checkpoint.py ----

    @classmethod
    def from_state(cls, model_args, weights):
        """
        A model of this shape with a float32 copy of `weights`. Fields of GPTConfig that
        `model_args` lacks take their defaults, with a note. UserError for what does not fit.
        """
        fields = dataclasses.asdict(GPTConfig())
        for name in model_args.keys() - fields:
            raise UserError(f"the model has {name}={model_args[name]!r}, and GPTConfig has no such "
                            "field: use the model.py that it was trained with")
        for name in fields.keys() - model_args.keys():
            print(f"note: the model was made without {name}: it has the default {fields[name]!r}")
        model = cls(GPTConfig(**model_args))
        try:
            model.load_state_dict(weights)
        except Exception as error:  # weights made by hand can raise anything
            raise UserError(f"the weights do not fit {model_args}: {error}") from None
        for name, p in model.named_parameters():  # a buffer may be infinite, as masks are
            if not p.isfinite().all():
                raise UserError(f"{name} has values that are not finite: use another checkpoint")
        return model

    @classmethod
    def from_pretrained(cls, name_or_folder, override_args=None):
        """
        OpenAI's 'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl', or a folder in Hugging Face's
        format. `override_args` may set dropout. Raises UserError for anything that is not GPT-2.
        """
        model_args, weights = read_huggingface(name_or_folder)
        return cls.from_state(model_args | (override_args or {}), weights)

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


def load_model(init_from, out_dir, **override_args):
    """
    (model in evaluation mode, checkpoint) of the run in `out_dir` if `init_from` is 'resume', or
    in the folder `init_from`. (pretrained model, None) for what is no run.
    """
    is_own = init_from == "resume"
    checkpoint = read_checkpoint(out_dir if is_own else init_from, best=True, required=is_own)
    if checkpoint:
        model_args = checkpoint["model_args"] | override_args
        return GPT.from_state(model_args, checkpoint["model"]).eval(), checkpoint
    return GPT.from_pretrained(init_from, override_args).eval(), None
