# GPT-2 (124M) on OpenWebText with Muon and a linear decay, on 8 GPUs of 24 GB or more:
#   torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_fast.py
# 30 sequences x 1024 tokens x 16 micro-batches (2 on each GPU) = 491,520 tokens per iteration
# 20,000 iterations = 9.8B tokens, a thirtieth of train_gpt2.py
# Smaller GPUs: --batch_size=15 --gradient_accumulation_steps=32 trains on the same data.
# Expect a val loss of about 3.0. We have not measured it.

wandb_log = True
wandb_run_name = 'gpt2-124M-fast'

batch_size = 30  # with 60, the logits have more than 2^31 elements: wrong in some versions of torch
gradient_accumulation_steps = 16

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
