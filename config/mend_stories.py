"""The last stage of stories, for few steps, after distill.py config/distill_stories.py.

    python distill.py config/mend_stories.py
"""

out_dir = "out/stories"
dataset = "stories"
mend = True
diagonal_share = 0.0
full_jump_share = 0.75
context_share = 0.3
target_ema = True                # drafts by the average, which writes better ones
batch_size = 32
max_iters = 500
learning_rate = 3e-3
min_lr = 2e-5
optimizer = "muon"
warmup_iters = 50
eval_iters = 4
