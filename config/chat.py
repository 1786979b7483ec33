"""Sentences of chats: V = 1,000 words, rows of 16.

    python data/chat/prepare.py
    python train.py config/chat.py
    python distill.py config/distill_chat.py
    python sample.py --out_dir=out/chat --steps=1,4

The settings follow those of stories. On one core of an AMD EPYC (AVX2, float32) the flow takes more
than an hour: weights/README.md.
"""

out_dir = "out/chat"
dataset = "chat"
block_size = 16
n_layer = 6
n_embd = 192
mlp_ratio = 2
position_std = 1.0
context_share = 0.3              # for prompts and blanks
batch_size = 128
max_iters = 6000                 # 13 epochs of 58,000 sentences; from 4,500 on little changed
learning_rate = 6e-3
embed_lr_scale = 0.3
min_lr = 2e-5
optimizer = "muon"
warmup_iters = 100
eval_interval = 500
log_interval = 100
