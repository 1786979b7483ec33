"""The flow map of Python's documentation. Six minutes on two CPU cores, after train.py config/pydocs.py.

    python distill.py config/distill_pydocs.py
"""

out_dir = "out/pydocs"
dataset = "pydocs"
max_iters = 600
eval_iters = 4
full_jump_share = 0.8            # in so short a run the full jump needs more than 1/32 to be learned at all
full_jump_ramp = True
target_ema = True
split = 0.25                     # a jump's target: a short jump, whose end is nearer the truth, then a long one
teacher_temperature = 1.2
learning_rate = 4e-3             # with targets from the moving average it can be higher than the flow's
