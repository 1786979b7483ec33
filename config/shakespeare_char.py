"""Tiny Shakespeare by characters: one GPU, some minutes. On a laptop add the last line's settings.

    python data/shakespeare_char/prepare.py
    python train.py config/shakespeare_char.py
    python train.py config/shakespeare_char.py --n_layer=4 --n_embd=128 --n_head=4 \\
        --block_size=64 --max_iters=2000
"""

out_dir = "out/shakespeare_char"
dataset = "shakespeare_char"
n_layer = 6
n_head = 6
n_embd = 384
block_size = 256
dropout = 0.1                    # one megabyte of text is soon seen too often
batch_size = 64
max_iters = 5000
learning_rate = 1e-3
