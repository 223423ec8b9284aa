# Evaluates OpenAI's gpt2-xl (1558M parameters) on OpenWebText.
# 8 sequences x 1024 tokens x 500 batches = 4.1M tokens of each split
# Expect a train loss of 2.56 and a val loss of 2.54, as nanoGPT reports.

init_from = 'gpt2-xl'
eval_only = True
eval_iters = 500
batch_size = 8
