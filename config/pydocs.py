"""The prose of Python's own documentation, by byte pairs: the demo. Six minutes on two CPU cores.

    python data/pydocs/prepare.py
    python train.py config/pydocs.py
    python distill.py config/distill_pydocs.py
    python sample.py --steps 1

train.py's own defaults are made for this set; what is here is what the set asks for.
"""

out_dir = "out/pydocs"
dataset = "pydocs"
max_iters = 1500                 # 20 epochs of 0.3 M tokens
dropout = 0.0                    # a short run does not overfit; dropout costs a fifth of the time
eval_iters = 4
clock_embedding_share = 0.5      # V = 1,024 tokens in d = 256 dimensions: the published clock ends
                                 # before rare tokens can be told apart; it hardly ever writes them
