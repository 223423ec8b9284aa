# The baseline for train_gpt2_fast.py: the same data, batch and schedule, AdamW at a tuned rate.
#   torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_adamw.py
# 30 sequences x 1024 tokens x 16 micro-batches (2 on each GPU) = 491,520 tokens per iteration
# 20,000 iterations = 9.8B tokens
# Run the pair to see what Muon gains. Published comparisons find matrix optimizers about 1.4 times
# ahead of a well-tuned AdamW at this size (Wen et al. 2025, arXiv 2509.02046). Not measured here.

wandb_log = True
wandb_run_name = 'gpt2-124M-adamw'

batch_size = 30  # with 60, the logits have more than 2^31 elements: wrong in some versions of torch
gradient_accumulation_steps = 16

learning_rate = 1.8e-3  # three times GPT-3's rate for this size; llm.c's AdamW runs found it good
lr_schedule = 'wsd'
max_iters = 20000
lr_decay_iters = 20000
decay_frac = 0.4
min_lr = 0.0
warmup_iters = 250

eval_interval = 1000
log_interval = 10
