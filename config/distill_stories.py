"""The flow map of stories, after train.py config/stories.py.

    python distill.py config/distill_stories.py
"""

out_dir = "out/stories"
dataset = "stories"
diagonal_share = 0.25
full_jump_share = 0.8
full_jump_ramp = True            # without, it tells few of the plots
context_share = 0.3
target_ema = True                # keeps the student's jitter out of its targets: a higher rate
batch_size = 32
max_iters = 1000
learning_rate = 3e-3
min_lr = 2e-5
optimizer = "muon"
warmup_iters = 50
eval_iters = 4
