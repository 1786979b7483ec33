"""The flow map of OpenWebText, the published recipe: 128 sequences a step on 8 GPUs of 80 GB.

    torchrun --nproc_per_node=8 distill.py config/distill_owt.py

128 sequences = 8 processes x 16 sequences x 1 micro-step. Student and teacher take 4 GB with
optimizer and average, the student's activations about 9 GB for 16 x 1,024 tokens; targets keep
none. On an H100 nvidia-smi showed 15.3 GiB.
"""

out_dir = "out/owt"
dataset = "owt"
eval_interval = 5000
eval_iters = 64
log_interval = 100

dropout = 0.1
batch_size = 16
gradient_accumulation_steps = 8
max_iters = 1_000_000            # up to a million published
learning_rate = 3e-4
schedule = "constant"
warmup_iters = 2500
ema_decay = 0.9999
compile = True
