# Finetunes OpenAI's largest GPT-2 on tiny Shakespeare.
#   python data/shakespeare/prepare.py && python train.py config/finetune_shakespeare.py
# 1 sequence x 32 micro-batches x 1024 tokens = 32,768 tokens per iteration
# 20 iterations = 655,360 tokens: the text 2.2 times over
# Memory in GiB, computed, and another 1 to 2 for CUDA itself:
#   --init_from=               gpt2   gpt2-medium   gpt2-large   gpt2-xl
#   as it is (AdamW)            2.9           7.3         15.0      29.2
#   --gradient_checkpointing=True
#                               2.4           6.0         12.3      24.1
#   and --optimizer_type=muon   2.1           4.9          9.7      18.7   fits on 24 GB
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
