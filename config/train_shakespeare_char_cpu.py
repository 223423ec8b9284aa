# A character model of 0.8M parameters on tiny Shakespeare, on a laptop's CPU.
#   python data/shakespeare_char/prepare.py && python train.py config/train_shakespeare_char_cpu.py
# 12 sequences x 64 tokens x 2000 iterations = 1.5M tokens: the text one and a half times
# Expect a val loss of 1.90 on all of val.

out_dir = 'out-shakespeare-char'
eval_interval = 250
eval_iters = 50  # a third of the validation text; with 20, estimates are off by up to 0.015
log_interval = 10
always_save_checkpoint = False  # keep the best

wandb_project = 'shakespeare-char'
wandb_run_name = 'mini-gpt-cpu'

dataset = 'shakespeare_char'
gradient_accumulation_steps = 1
batch_size = 12
block_size = 64

n_layer = 4
n_head = 4
n_embd = 128
dropout = 0.0  # too few tokens to overfit

learning_rate = 1e-3
max_iters = 2000
lr_decay_iters = 2000
min_lr = 1e-4
warmup_iters = 100
beta2 = 0.99  # a longer average, because there are few tokens per iteration
