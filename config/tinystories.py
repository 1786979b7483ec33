"""TinyStories on one GPU: an hour with the map, by arithmetic; not measured.

    python data/tinystories/prepare.py
    python train.py config/tinystories.py
    python distill.py config/distill_tinystories.py
    python sample.py --out_dir=out/tinystories --steps=1

A token costs 6 FLOP a weight: 8 layers x 12 x 512^2 = 25 M weights and 2 M in the head, 170 MFLOP
with attention. An H100 made 145,000 tokens/s of config/owt.py (docs/speed.md), 855 MFLOP each: 124
TFLOP/s. With half of that in a network so small, 360,000 tokens/s: 12,000 steps of 65,536 tokens
take 36 minutes and see the set's 480 M tokens 1.6 times. Activations take 19 GB by the arithmetic
of config/lm1b.py, less without dropout; on a smaller GPU halve batch_size and take two micro-steps.
"""

out_dir = "out/tinystories"
dataset = "tinystories"
n_layer = 8
n_head = 8
n_embd = 512
block_size = 128
clock_embedding_share = 0.5      # V = 4,096 tokens in 512 dimensions: the published clock ends
                                 # before rare tokens can be told apart
batch_size = 512
max_iters = 12_000
learning_rate = 2e-3
min_lr = 2e-5
optimizer = "muon"
warmup_iters = 500
eval_interval = 1000
log_interval = 100
compile = True
