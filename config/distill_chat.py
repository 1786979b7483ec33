"""The flow map of chats, after train.py config/chat.py.

    python distill.py config/distill_chat.py
"""

out_dir = "out/chat"
dataset = "chat"
diagonal_share = 0.25
full_jump_share = 0.8
full_jump_ramp = True
target_ema = True                # keeps the student's jitter out of its targets: a higher rate
batch_size = 256
max_iters = 3000
learning_rate = 3e-3
min_lr = 2e-5
optimizer = "muon"
eval_interval = 500
log_interval = 100
