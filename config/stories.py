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
n_layer = 9                      # thin and deep: mlp_ratio 2 pays for three of them
n_embd = 128
mlp_ratio = 2
position_std = 1.0               # as large as pure noise; with 0.1 half as many were valid
learning_rate = 6e-3
embed_lr_scale = 0.3             # at 1 the noise outgrows the positions, and half are valid
min_lr = 2e-5
optimizer = "muon"
replaced_share = 0.15            # without, it keeps the wrong words of its own flow
batch_size = 32                  # more steps for the same texts
warmup_iters = 100
max_iters = 2000
eval_iters = 4
