"""The flow map of Python's documentation. Six minutes on two CPU cores, after its flow.

    python distill.py config/distill_pydocs.py
"""

out_dir = "out/pydocs"
dataset = "pydocs"
max_iters = 600
eval_iters = 4
full_jump_share = 0.8            # a run so short learns nothing of the full jump from 1/32
full_jump_ramp = True
target_ema = True
split = 0.25                     # targets: a short jump, whose end is nearer the truth, then a long
teacher_temperature = 1.2
learning_rate = 4e-3             # higher than the flow's: the moving average makes the targets
