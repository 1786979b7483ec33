"""Descriptions of pictures: V = 4,096 words in 256 dimensions, rows of 16.

    python data/captions/prepare.py
    python train.py config/captions.py
    python distill.py config/distill_captions.py
    python sample.py --out_dir=out/captions --steps=1
"""

out_dir = "out/captions"
dataset = "captions"
block_size = 16
context_share = 0.3              # for prompts and blanks
batch_size = 256
max_iters = 3000                 # 9 epochs of 82,000 captions
learning_rate = 3e-3
min_lr = 2e-5
optimizer = "muon"
eval_interval = 500
log_interval = 100
