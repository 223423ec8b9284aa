# A character model of 0.65M parameters on tiny Shakespeare, for a laptop's CPU, by today's recipe: Muon, and a learning rate
# that falls in a line. Made for CPUs with native bfloat16, in which Muon works.
#   python data/shakespeare_char/prepare.py && python train.py config/train_shakespeare_char_fast.py
# 12 rows x 128 tokens x 1500 iterations = 2.3M tokens, 2.3 times the text
# expected: a validation loss of 1.57 over the whole of val (train_shakespeare_char_cpu.py: 1.90, in about two thirds of the time)

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
block_size = 128  # a longer context tells more than a deeper model

n_layer = 2
n_head = 5
n_embd = 160
dropout = 0.0

optimizer_type = 'muon'
muon_scale = 2.0
learning_rate = 4e-3
lr_schedule = 'wsd'
decay_share = 0.9
max_iters = 1500
lr_decay_iters = 1500
min_lr = 0.0
warmup_iters = 50
