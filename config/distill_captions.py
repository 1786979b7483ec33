"""The flow map of captions, after train.py config/captions.py.

    python distill.py config/distill_captions.py
"""

out_dir = "out/captions"
dataset = "captions"
diagonal_share = 0.25
full_jump_share = 0.8
full_jump_ramp = True
target_ema = True                # keeps the student's jitter out of its targets: a higher rate
context_share = 0.3
batch_size = 256
max_iters = 3000
learning_rate = 3e-3
min_lr = 2e-5
optimizer = "muon"
eval_interval = 500
log_interval = 100
