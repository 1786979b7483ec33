"""One Billion Words, the published recipe with GPT-2's vocabulary: the small network on 8 GPUs.

    python data/lm1b/prepare.py
    torchrun --nproc_per_node=8 train.py config/lm1b.py

512 sequences of 128 tokens a step = 8 processes x 64 sequences x 1 micro-step, 65,536 tokens: an
eighth of a step on OpenWebText. 3.4 GB for weights and optimizer, 5.4 GB for activations, by the
arithmetic of config/owt.py with 72 d bytes for 58 d: so short, attention keeps its (L, L) matrices.
"""

out_dir = "out/lm1b"
dataset = "lm1b"
eval_interval = 5000
eval_iters = 64
log_interval = 100

n_layer = 12
n_head = 12
n_embd = 768
n_time = 128
dropout = 0.1
block_size = 128
learned_positions = False        # as published; see train.py before you copy it
time_scale = 1.0
attention_softcap = 50.0
logit_softcap = 30.0

batch_size = 64
gradient_accumulation_steps = 8
max_iters = 1_000_000
learning_rate = 3e-4
schedule = "constant"
warmup_iters = 2500
beta2 = 0.999
ema_decay = 0.9999
compile = True
