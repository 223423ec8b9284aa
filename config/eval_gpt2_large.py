# Evaluates OpenAI's gpt2-large (774M parameters) on OpenWebText.
# 8 rows x 1024 tokens x 500 batches = 4.1M tokens of each split
# expected, as nanoGPT reports it: train loss 2.66, val loss 2.67

init_from = 'gpt2-large'
eval_only = True
eval_iters = 500
batch_size = 8
