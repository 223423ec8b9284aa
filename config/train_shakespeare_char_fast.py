# A character model of 0.65M parameters on tiny Shakespeare, on a laptop's CPU, with Muon and a
# learning rate that decays linearly. Fastest on CPUs with native bfloat16.
#   python data/shakespeare_char/prepare.py && python train.py config/train_shakespeare_char_fast.py
# 12 sequences x 128 tokens x 1500 iterations = 2.3M tokens: the text 2.3 times over
# Expect a val loss of 1.57 to 1.59 on all of val after about a minute on two cores.

out_dir = 'out-shakespeare-char'
eval_interval = 500
eval_iters = 0  # all of val
log_interval = 10
always_save_checkpoint = False  # keep the best

wandb_project = 'shakespeare-char'
wandb_run_name = 'mini-gpt-fast'

dataset = 'shakespeare_char'
gradient_accumulation_steps = 1
batch_size = 12
block_size = 128  # a longer context helps more than a deeper model

n_layer = 2
n_head = 5
n_embd = 160

optimizer_type = 'muon'
learning_rate = 4e-3
lr_schedule = 'wsd'
decay_frac = 0.9
max_iters = 1500
lr_decay_iters = 1500
min_lr = 0.0
warmup_iters = 50
