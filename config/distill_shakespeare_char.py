"""The flow map of tiny Shakespeare: one GPU, some minutes.

    python distill.py config/distill_shakespeare_char.py
"""

out_dir = "out/shakespeare_char"
dataset = "shakespeare_char"
batch_size = 64
max_iters = 5000
learning_rate = 1e-3
