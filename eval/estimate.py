"""What several GPUs would wait for, on paper: the gradients that a step sums, over which links.

    python eval/bench.py estimate --gpus=8 --nodes=4

Every process has the whole network and its own texts (DistributedDataParallel). At the end of a
step all need the sum of all gradients, P float32 numbers. A ring moves 2 (n - 1) / n of them
through each of n links: first within a node, then between nodes. DDP starts with the layers whose
gradients are ready first, while the backward pass goes on. So the head's and the blocks' are sent
meanwhile. The embedding's come last, since E makes the noise and the state that the first block
reads: nothing is left to hide them behind.

Not in it: latency, stragglers, and what a link loses of its nominal speed.
"""

# GB/s in one direction, nominal: within a node for each GPU, between nodes for each node.
WITHIN = {"NVLink 4": 450.0, "PCIe 5 x16": 63.0}
BETWEEN = {"8 x 400 Gb/s": 400.0, "400 Gb/s": 50.0, "100 GbE": 12.5}


def seconds(numbers: float, size: int, gpus: int, nodes: int, within: float, between: float
            ) -> float:
    """Seconds to reduce so many numbers of `size` bytes over nodes x gpus, links in GB/s."""
    ring = lambda n: 2 * (n - 1) / n
    return numbers * size / 1e9 * (ring(gpus) / within + ring(nodes) / between)


def estimate(embedding: int, head: int, others: int, step: float, last: float, gpus: int,
             nodes: int) -> list[dict]:
    """A row for each pair of links: the seconds that the sum takes in float32, those that are left
    when the backward pass has hidden what it can, and what is left as a share of the step; the same
    in bfloat16. embedding, head, others: numbers of weights; step: seconds without other GPUs;
    last: those of its last micro-step, the only one that sums."""
    # Of the three products with a weight, two are the backward pass's. The head has done its own
    # before that starts.
    backward = last * 2 / 3 * others / (others + head)
    rows = []
    for name, within in WITHIN.items():
        for other, between in BETWEEN.items() if nodes > 1 else [("", 1.0)]:
            row = dict(links=f"{name}, {other}" if other else name)
            for kind, size in (("float32", 4), ("bfloat16", 2)):
                cost = lambda numbers: seconds(numbers, size, gpus, nodes, within, between)
                left = max(0.0, cost(head + others) - backward) + cost(embedding)
                row[kind] = dict(all=cost(embedding + head + others), left=left,
                                 share=left / (step + left))
            rows.append(row)
    return rows


def table(rows: list[dict]) -> str:
    """The rows as text, times in milliseconds."""
    lines = [f"{'links':26}{'all, ms':>9}{'left':>7}{'of a step':>11}"
             f"{'bfloat16: all':>16}{'left':>7}{'of a step':>11}"]
    for row in rows:
        lines.append(f"{row['links']:26}" + "".join(
            f"{of['all'] * 1e3:{width}.1f}{of['left'] * 1e3:7.1f}{of['share']:11.1%}"
            for of, width in ((row["float32"], 9), (row["bfloat16"], 16))))
    return "\n".join(lines)
