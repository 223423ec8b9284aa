# Evaluates OpenAI's gpt2 (124M parameters) on OpenWebText.
# 8 rows x 1024 tokens x 500 batches = 4.1M tokens of each split
# expected, as nanoGPT reports it: train loss 3.11, val loss 3.12

init_from = 'gpt2'
eval_only = True
eval_iters = 500
batch_size = 8
