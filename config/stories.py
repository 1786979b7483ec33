"""Short stories for children, the default set: the demo.

    python data/stories/prepare.py
    python train.py config/stories.py
    python distill.py config/distill_stories.py
    python sample.py --steps=1,2,4,8 --flow_steps=64 --gamma=1

Each word of a story must agree with what was told before, as each letter of a palindrome with its
partner. Depth, small batches, positions as large as the noise, a slow E, and wrong words in the
input helped most: results/stories/tried.md.
"""

out_dir = "out/stories"
dataset = "stories"
n_layer = 9                      # better than 6 layers with mlp_ratio 4, at a tenth more time
n_embd = 128
mlp_ratio = 2
position_std = 1.0               # on an earlier grammar twice as many were valid as with 0.1
learning_rate = 6e-3
embed_lr_scale = 0.3             # with 1 half as many were valid
min_lr = 2e-5
optimizer = "muon"
replaced_share = 0.15            # without, it keeps the wrong words of its own flow
context_share = 0.3              # for prompts and blanks
batch_size = 32                  # better than 64 for the same number of texts
warmup_iters = 100
max_iters = 2000
eval_iters = 4
