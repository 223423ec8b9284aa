# GPT-2 (124M) on OpenWebText with the recipe of train_gpt2_fast.py, on one GPU of 24 GB:
#   python train.py config/train_gpt2_1gpu.py
# 20 sequences x 1024 tokens x 24 micro-batches = 491,520 tokens per iteration
# 20,000 iterations = 9.8B tokens
# On 80 GB: --batch_size=40 --gradient_accumulation_steps=12 trains on the same data.
# Expect about 26 hours on an RTX 4090 (106K tokens/s, as users of nanoGPT report) or 6 hours on an
# H100 (about 450K tokens/s, as the fastest trainers report), and a val loss of about 3.0. We have
# measured none of this.

out_dir = 'out-gpt2-1gpu'

batch_size = 20
gradient_accumulation_steps = 24

optimizer_type = 'muon'
muon_lr_scale = 1.0  # Muon takes AdamW's learning rates (Liu et al. 2025)
learning_rate = 1.8e-3
lr_schedule = 'wsd'
max_iters = 20000
lr_decay_iters = 20000
decay_frac = 0.4
min_lr = 0.0
warmup_iters = 250

eval_interval = 1000
log_interval = 10
