"""Sentences of chats: V = 1,000 words, rows of 16.

    python data/chat/prepare.py
    python train.py config/chat.py
    python distill.py config/distill_chat.py
    python sample.py --out_dir=out/chat --steps=1
"""

out_dir = "out/chat"
dataset = "chat"
block_size = 16
batch_size = 256
max_iters = 3000                 # 13 epochs of 58,000 sentences
learning_rate = 3e-3
min_lr = 2e-5
optimizer = "muon"
eval_interval = 500
log_interval = 100
