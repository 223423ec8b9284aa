# Evaluates OpenAI's gpt2 (124M parameters) on OpenWebText.
# 8 sequences x 1024 tokens x 500 batches = 4.1M tokens of each split
# Expect a train loss of 3.11 and a val loss of 3.12, as nanoGPT reports.

init_from = 'gpt2'
eval_only = True
eval_iters = 500
batch_size = 8
