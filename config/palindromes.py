"""Palindromes: four random letters and their mirror image, the smallest set on which one step must
carry correlations.

    python data/palindromes/prepare.py
    python train.py config/palindromes.py
    python distill.py config/distill_palindromes.py
    python sample.py --out_dir=out/palindromes --steps=1 --num_samples=8

Every letter is uniform on its own and certain given its partner, so letters drawn independently
make a palindrome once in 26^4 = 456,976 times. A quarter of an hour on one core, both stages.
"""

out_dir = "out/palindromes"
dataset = "palindromes"
n_layer = 3
n_head = 4
n_embd = 128
block_size = 8
position_std = 3.0               # at first larger than the noise: layer norm divides by the length
                                 # of position + noise, then nearly equal for both of a pair; in
                                 # training the noise grows as E does
time_scale = 1000.0              # better at one step, worse at several
batch_size = 128
max_iters = 1000
learning_rate = 3e-3
min_lr = 2e-5
optimizer = "muon"
eval_interval = 500
log_interval = 100
