# A character model of 1.8M parameters on tiny Shakespeare, in 15 minutes on a laptop's CPU.
#   python data/shakespeare_char/prepare.py
#   python train.py config/train_shakespeare_char_15min.py
# 12 sequences x 256 tokens x 4800 iterations = 15M tokens: the text 15 times over
# Expect a val loss of 1.46 to 1.47 on all of val. nanoGPT reports 1.4697 for 10.7M parameters and
# 3 minutes of an A100.
# Shape, rates and dropout were chosen on the last tenth of the training text, not on val.

out_dir = 'out-shakespeare-char'
eval_interval = 960
eval_iters = 0  # all of val
log_interval = 10
always_save_checkpoint = False  # keep the best

wandb_project = 'shakespeare-char'
wandb_run_name = 'mini-gpt-15min'

dataset = 'shakespeare_char'
gradient_accumulation_steps = 1
batch_size = 12
block_size = 256

n_layer = 4
n_head = 3
n_embd = 192
dropout = 0.1  # the text is read many times

optimizer_type = 'muon'
learning_rate = 2e-3
lr_schedule = 'wsd'
decay_frac = 0.9
max_iters = 4800
lr_decay_iters = 4800
min_lr = 0.0
warmup_iters = 50
