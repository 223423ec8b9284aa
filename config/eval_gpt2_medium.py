# Evaluates OpenAI's gpt2-medium (350M parameters) on OpenWebText.
# 8 rows x 1024 tokens x 500 batches = 4.1M tokens of each split
# expected, as nanoGPT reports it: train loss 2.85, val loss 2.84

init_from = 'gpt2-medium'
eval_only = True
eval_iters = 500
batch_size = 8
