# Evaluates OpenAI's gpt2-xl (1558M parameters) on OpenWebText.
# 8 rows x 1024 tokens x 500 batches = 4.1M tokens of each split
# expected, as nanoGPT reports it: train loss 2.56, val loss 2.54

init_from = 'gpt2-xl'
eval_only = True
eval_iters = 500
batch_size = 8
