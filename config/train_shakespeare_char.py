# A character model of 10.7M parameters on tiny Shakespeare, on one GPU.
#   python data/shakespeare_char/prepare.py && python train.py config/train_shakespeare_char.py
# 64 sequences x 256 tokens x 5000 iterations = 82M tokens: the text 82 times over
# Expect a best val loss of 1.4697 after about 3 minutes on an A100, as nanoGPT reports.

out_dir = 'out-shakespeare-char'
eval_interval = 250
eval_iters = 200
log_interval = 10
always_save_checkpoint = False  # it overfits towards the end: keep the best

wandb_project = 'shakespeare-char'
wandb_run_name = 'mini-gpt'

dataset = 'shakespeare_char'
gradient_accumulation_steps = 1
batch_size = 64
block_size = 256

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2

learning_rate = 1e-3  # small models tolerate a higher rate
max_iters = 5000
lr_decay_iters = 5000
min_lr = 1e-4
warmup_iters = 100
beta2 = 0.99  # a longer average, because there are few tokens per iteration
