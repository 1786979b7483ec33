"""Palindromes: four random letters and their mirror image, the smallest set on which one step must carry correlations.

    python data/palindromes/prepare.py
    python train.py config/palindromes.py
    python distill.py config/distill_palindromes.py
    python sample.py --out_dir=out/palindromes --steps=1 --num_samples=8

Every letter is uniform on its own and certain given its partner, so letters drawn independently make a palindrome once
in 26^4 = 456,976 times. Minutes on a laptop.
"""

out_dir = "out/palindromes"
dataset = "palindromes"
n_layer = 3
n_head = 4
n_embd = 128
block_size = 8
dropout = 0.0          # 1.6 M fresh tokens for a few million seen: nothing to overfit
batch_size = 128
max_iters = 1500
learning_rate = 3e-3
dtype = "float32"      # two mirrored letters must take the same decision: bfloat16 rounds close calls differently
