"""The flow map of chats, after train.py config/chat.py.

    python distill.py config/distill_chat.py
"""

out_dir = "out/chat"
dataset = "chat"
diagonal_share = 0.25
full_jump_share = 0.8
full_jump_ramp = True
target_ema = True                # keeps the student's jitter out of its targets: a higher rate
context_share = 0.3
batch_size = 128
max_iters = 1600                 # from 500 on full jumps improved little
learning_rate = 3e-3
min_lr = 2e-5
optimizer = "muon"
warmup_iters = 100
eval_interval = 500
log_interval = 100
