"""Short stories for children, the default set: the demo.

    python data/stories/prepare.py
    python train.py config/stories.py
    python distill.py config/distill_stories.py
    python sample.py --steps=1,2,4,8 --flow_steps=64

Each word of a story must agree with what was told before, as each letter of a palindrome with its
partner. Depth and positions as large as the noise help that most, width little: see
results/stories/tried.md. The number of steps is a guess.
"""

out_dir = "out/stories"
dataset = "stories"
n_layer = 6
n_embd = 128
position_std = 1.0               # 0.1 has the same loss, but half as many valid stories
learning_rate = 6e-3
min_lr = 2e-5
optimizer = "muon"
warmup_iters = 50
max_iters = 1000
eval_iters = 4
