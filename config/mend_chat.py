"""The last stage of chats, for fewer steps, after distill.py config/distill_chat.py.

    python distill.py config/mend_chat.py
"""

out_dir = "out/chat"
dataset = "chat"
mend = True
noise_scale = 0.7                # not searched: between 0.5, that of stories, and 1
diagonal_share = 0.0
full_jump_share = 0.75
context_share = 0.3
target_ema = True                # drafts by the average, which writes better ones
batch_size = 128
max_iters = 400
learning_rate = 2e-3
min_lr = 2e-5
optimizer = "muon"
warmup_iters = 30
eval_interval = 400
log_interval = 50
