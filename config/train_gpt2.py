# GPT-2 (124M) from scratch on OpenWebText, on 8 GPUs:
#   torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
# 12 sequences x 1024 tokens x 40 micro-batches (5 on each GPU) = 491,520 tokens per iteration
# 600,000 iterations = 295B tokens
# Expect a val loss of about 2.85 after about 4 days on 8 A100 40GB, as nanoGPT reports.

wandb_log = True
wandb_run_name = 'gpt2-124M'

batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8

max_iters = 600000
lr_decay_iters = 600000

eval_interval = 1000
log_interval = 10
