r"""OpenWebText, the published recipe: the small network (170 M parameters) on 8 GPUs of 80 GB.

    python data/owt/prepare.py
    torchrun --nproc_per_node=8 train.py config/owt.py
    # two nodes of 8 GPUs; on the other one --node_rank=1
    torchrun --nnodes=2 --node_rank=0 --master_addr=HOST --nproc_per_node=8 train.py config/owt.py \
        --batch_size=32 --gradient_accumulation_steps=16

512 sequences a step = 8 processes x 64 sequences x 1 micro-step, 524,288 tokens. One such process
does 145,000 tokens/s on an H100, compiled (docs/speed.md). Its memory by arithmetic, not measured:
weights, gradients, AdamW's two moments and the moving average take 170 M x 4 bytes x 5 = 3.4 GB.
Activations take 58 d bytes a token and layer (what autograd saves in bfloat16 with dropout, without
torch.compile, counted on a CPU): 58 x 768 x 12 x 65,536 tokens = 35 GB. A slice of logits, its
bfloat16 copy and its log-softmax take 1.3 GB. On fewer or smaller GPUs lower batch_size and raise
gradient_accumulation_steps: their product, 512, is what the recipe fixes.
"""

out_dir = "out/owt"
dataset = "owt"
eval_interval = 5000
eval_iters = 64
log_interval = 100

n_layer = 12
n_head = 12
n_embd = 768
n_time = 128
dropout = 0.1
block_size = 1024
learned_positions = False        # as published; see train.py before you copy it
time_scale = 1.0
attention_softcap = 50.0
logit_softcap = 30.0

batch_size = 64
gradient_accumulation_steps = 8
max_iters = 1_000_000            # 1 to 1.5 million published
learning_rate = 3e-4
schedule = "constant"
warmup_iters = 2500
beta2 = 0.999
ema_decay = 0.9999
compile = True
