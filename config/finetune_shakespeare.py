# Finetunes OpenAI's largest GPT-2 on tiny Shakespeare. For a smaller machine: --init_from=gpt2
#   python data/shakespeare/prepare.py && python train.py config/finetune_shakespeare.py
# 1 sequence x 32 micro-batches x 1024 tokens = 32,768 tokens per iteration
# 20 iterations = 655,360 tokens: the text 2.2 times over
import time

out_dir = 'out-shakespeare'
eval_interval = 5
eval_iters = 40
always_save_checkpoint = False  # keep the best

wandb_project = 'shakespeare'
wandb_run_name = 'ft-' + time.strftime('%Y%m%d-%H%M%S')

dataset = 'shakespeare'
init_from = 'gpt2-xl'

batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20

learning_rate = 3e-5  # low and constant
decay_lr = False
