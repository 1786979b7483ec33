"""Short stories for children, the default set: the demo.

    python data/stories/prepare.py
    python train.py config/stories.py
    python distill.py config/distill_stories.py
    python sample.py --steps=1,2,4,8 --flow_steps=64

Each word of a story must agree with what was told before, as each letter of a palindrome with its
partner. What differs from train.py's defaults is what palindromes found, too.
"""

out_dir = "out/stories"
dataset = "stories"
position_std = 3.0               # at first larger than the noise, see config/palindromes.py
learning_rate = 3e-3
min_lr = 2e-5
optimizer = "muon"               # AdamW at 2e-3 learns half as much in the same steps
warmup_iters = 50
max_iters = 1000
eval_iters = 4
