# GPT-2 (124M) on OpenWebText in a thirtieth of train_gpt2.py's tokens, by today's recipe, for 8 GPUs of 80 GB:
#   torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_fast.py
# 60 rows x 1024 tokens x 8 micro-batches (1 on each of 8 GPUs) = 491,520 tokens an iteration, the rows of train_gpt2.py
# 491,520 x 20,000 iterations = 9.8B tokens; smaller GPUs: --batch_size=30 --gradient_accumulation_steps=16: the same rows
# expected, not measured: a validation loss of about 3.0

wandb_log = True
wandb_project = 'owt'
wandb_run_name = 'gpt2-124M-fast'

batch_size = 60
gradient_accumulation_steps = 8

optimizer_type = 'muon'
muon_scale = 1.0  # AdamW's rates, as Liu et al. 2025 take them
learning_rate = 1.8e-3
lr_schedule = 'wsd'
max_iters = 20000
lr_decay_iters = 20000
decay_share = 0.4
min_lr = 0.0
warmup_iters = 250

eval_interval = 1000
log_interval = 10
