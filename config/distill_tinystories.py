"""The flow map of TinyStories, after train.py config/tinystories.py: 20 minutes on one GPU.

    python distill.py config/distill_tinystories.py

By arithmetic, not measured: distillation made 69,000 tokens/s where training made 145,000
(docs/speed.md), so 170,000 here; 6,000 steps of 32,768 tokens take 19 minutes.
"""

out_dir = "out/tinystories"
dataset = "tinystories"
diagonal_share = 0.25
full_jump_share = 0.8
full_jump_ramp = True
target_ema = True                # keeps the student's jitter out of its targets: a higher rate
batch_size = 256
max_iters = 6000
learning_rate = 2e-3
min_lr = 2e-5
optimizer = "muon"
warmup_iters = 500
eval_interval = 1000
log_interval = 100
compile = True
