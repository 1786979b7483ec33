"""The flow map of One Billion Words, the published recipe: 512 sequences a step on 8 GPUs.

    torchrun --nproc_per_node=8 distill.py config/distill_lm1b.py

512 sequences = 8 processes x 64 sequences x 1 micro-step. Of the flow that the authors released:

    python data/lm1b/prepare.py --vocabulary=vocab.txt --out_dir=data/lm1b_bert
    ... config/distill_lm1b.py --dataset=lm1b_bert --teacher_path=lm1b_flm.ckpt --trust_checkpoint
"""

out_dir = "out/lm1b"
dataset = "lm1b"
eval_interval = 5000
keep_best = True                 # fmlm.best.pt: the authors advise it; see keep_best in distill.py
eval_iters = 64
log_interval = 100

dropout = 0.1
batch_size = 64
gradient_accumulation_steps = 8
max_iters = 1_000_000
learning_rate = 3e-4
schedule = "constant"
warmup_iters = 2500
beta2 = 0.999                    # of the released run; the paper has 0.95
ema_decay = 0.9999
compile = True
