"""Many processes under torchrun: who computes what, and sums whose order none of them changes.

A batch is cut into parts, its shards. What is computed of a part does not depend on the process
that computes it, and sums over parts run along one binary tree, ((0 + 1) + (2 + 3)) + ..., so the
bits of a run do not depend on the number of processes. This is the only file that knows of ranks;
without torchrun there is one process, and torch.distributed is not touched.
"""

import contextlib
import itertools
import os
import pickle
import platform
import sys
from datetime import timedelta

import torch
import torch.nn.functional as F

from ddp.rendezvous import Watch, connect, meet

RANK, WORLD = 0, 1  # this process's number, and how many there are; set by `processes`
TIMEOUT = timedelta(hours=3)  # of a process that waits while another works alone
STORE = None  # what all processes of a launch can write to
FAILED = False  # whether this process has
REDUCTIONS = ("tree", "fast")


@contextlib.contextmanager
def processes():
    """Join the other processes when torchrun started this one, until the block ends.

    All but the first print nothing; yields the stderr that shows why one failed. After a failure
    the others are not waited for."""
    global RANK, WORLD, STORE
    if "TORCHELASTIC_RUN_ID" not in os.environ:  # torchrun's
        yield sys.stderr
        return
    dist = torch.distributed
    backend = "cpu:gloo"
    if torch.cuda.is_available():
        backend += ",cuda:nccl"
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    RANK = int(os.environ["RANK"])
    WORLD = int(os.environ["WORLD_SIZE"])
    store = connect(RANK, TIMEOUT)
    store = dist.PrefixStore(meet(store, RANK, WORLD), store)
    STORE = dist.PrefixStore("ddp", store)
    group = {"store": store, "rank": RANK, "world_size": WORLD, "timeout": TIMEOUT}
    dist.init_process_group(backend, **group)
    streams = sys.stdout, sys.stderr
    watch = contextlib.nullcontext()
    if os.environ["GROUP_WORLD_SIZE"] != "1":  # within a machine the system closes connections
        watch = Watch(STORE.clone(), RANK, WORLD, sys.stderr)
    try:
        with open(os.devnull, "w") as null, watch:
            if RANK > 0:
                sys.stdout = sys.stderr = null
            yield streams[1]
            if not FAILED:
                dist.barrier()  # else the first to end would look like one that was lost
                dist.destroy_process_group()
    finally:
        sys.stdout, sys.stderr = streams
        RANK, WORLD, STORE = 0, 1, None


def leave(code):
    """End this process of a launch as soon as all others come here, too; without torchrun, return.

    At once, with its exit code: while Python tidies up, the threads of gloo and of the store may
    abort a process whose work is done. A process that failed does not come here: while it tidies
    up, the others learn of it and write what they have."""
    if STORE is None:
        return
    torch.distributed.barrier()  # else the first to end would look like one that was lost
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def is_first_failure():
    """Remember that this process failed; return whether it was the first, whose cause is shown."""
    global FAILED
    FAILED = True
    if WORLD == 1:
        return True
    try:
        return STORE.add("failures", 1) == 1
    except (RuntimeError, AttributeError):  # torchrun itself has gone, or no STORE is there yet
        return is_main()


def is_lost_process(error):
    """Return whether an error says that another process has ended."""
    signs = ("gloo", "NCCL", "Connection closed by peer", "Connection reset", "Broken pipe")
    return WORLD > 1 and isinstance(error, RuntimeError) and any(s in str(error) for s in signs)


def world_size():
    """Return how many processes there are."""
    return WORLD


def local_processes():
    """Return how many processes of the launch share the memory of this machine."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if WORLD > 1 else 1


def is_main():
    """Return whether this process writes files and prints."""
    return RANK == 0


def launch_id():
    """Return what tells a launch of torchrun from all others, restarts aside; None without it."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    job = os.environ["TORCHELASTIC_RUN_ID"]
    return f"{platform.node()}-{os.getppid()}" if job == "none" else job  # "none": not given


def default_shards():
    """Return the parts of a batch where nothing else is said: one for each process, at least.

    A power of two, as a binary tree needs."""
    return 1 << (WORLD - 1).bit_length()


def parts_line(config):
    """Return a line on how batches are cut and summed, or None where they are not."""
    shards = config.shards
    if shards == 1 and WORLD == 1:
        return None
    line = f"parts: {shards} of {config.batch_size // shards} items on {WORLD} processes"
    if shards < WORLD:
        line += f", of which {WORLD - shards} train nothing; give shards={default_shards()} or more"
    if config.reduce == "fast" and WORLD > 1:
        line += "; reduce=fast: the last bits depend on the number of processes"
    return line


# ---- what one process does for all, and each for all ----


def maximum(number):
    """Return the largest of the numbers that the processes have."""
    if WORLD == 1:
        return number
    tensor = torch.tensor(float(number), dtype=torch.float64)
    torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX)
    return type(number)(tensor.item())


def broadcast(value):
    """Return the value that the main process has, on every process."""
    if WORLD == 1:
        return value
    values = [value]
    torch.distributed.broadcast_object_list(values, src=0, device=torch.device("cpu"))
    return values[0]


def on_main(function, *args, **kwargs):
    """Call a function on the main process; return on every process what it returns or raises."""
    if WORLD == 1:
        return function(*args, **kwargs)
    result = error = None
    if is_main():
        try:
            result = function(*args, **kwargs)
        except Exception as raised:
            error = as_sent(raised)
    result, error = broadcast((result, error))
    if error is not None:
        raise error
    return result


def as_sent(error):
    """Return an exception that another process can be sent: itself, or one that says the same."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:  # whatever its own constructor wants
        return OSError(str(error))


@contextlib.contextmanager
def main_first():
    """Let the first process of each machine go through the block before the others do."""
    is_first = WORLD == 1 or os.environ["LOCAL_RANK"] == "0"
    if not is_first:
        torch.distributed.barrier()
    yield
    if is_first and WORLD > 1:
        torch.distributed.barrier()


@contextlib.contextmanager
def alone():
    """Let each process compute all parts of its batches by itself, until the block ends."""
    global RANK, WORLD
    numbers = RANK, WORLD
    RANK, WORLD = 0, 1
    try:
        yield
    finally:
        RANK, WORLD = numbers


def in_order(compute, items, everywhere=True):
    """Yield compute(item) of each item, in order; the processes take turns to compute one.

    What compute returns lies on the CPU. everywhere=False: only the main process yields."""
    items = iter(items)
    try:
        while turn := list(itertools.islice(items, WORLD)):
            result = compute(turn[RANK]) if len(turn) > RANK else None
            results = gather(result, everywhere)
            if everywhere or is_main():
                yield from results[: len(turn)]
    finally:
        del items  # closes a progress bar before an error is shown


def gather(value, everywhere=True):
    """Return the values of all processes in a list; [] on all but the main one, unless wanted."""
    if WORLD == 1:
        return [value]
    values = [None] * WORLD
    if everywhere:
        torch.distributed.all_gather_object(values, value)
        return values
    torch.distributed.gather_object(value, values if is_main() else None)
    return values if is_main() else []


# ---- sums over the parts of a batch ----


def parts_of(rank, shards):
    """Return which of `shards` parts a process computes: a range."""
    return range(rank * shards // WORLD, (rank + 1) * shards // WORLD)


def my_parts(shards):
    """Return which of `shards` parts this process computes: a range."""
    return parts_of(RANK, shards)


class TreeSum:
    """A sum over parts 0, 1, ... that are added in runs, each node of a binary tree when it is due.

    `nodes`: (first part, number of parts, their sum); two that are siblings become one."""

    def __init__(self):
        self.nodes = []

    def add(self, first, count, value):
        self.nodes.append((first, count, value))
        while len(self.nodes) > 1:
            (first, count, left), (_, right_count, right) = self.nodes[-2:]
            if count != right_count or first % (2 * count):
                return
            self.nodes[-2:] = [(first, 2 * count, left + right)]


def nodes_of(rank, shards):
    """Return the (first part, number of parts) of what a process's TreeSum comes to."""
    tree = TreeSum()
    for part in parts_of(rank, shards):
        tree.add(part, 1, 0)
    return [(first, count) for first, count, _ in tree.nodes]


def sum_over_parts(
    tree,  # a TreeSum of the vectors (P,) of my_parts(shards)
    shards,
    size,  # P
    device,
    reduce="tree",  # fast: by the backend's own order, which may change the last bits
):
    """Return the sum over all parts, (P,), on every process.

    Each process sums a slice of all vectors (reduce-scatter by all-to-all), and hands it round
    (all-gather): as many bytes as a ring all-reduce sends, in an order of our own."""
    if WORLD == 1:
        return tree.nodes[0][2]
    dist = torch.distributed
    vectors = [vector for _, _, vector in tree.nodes]
    if reduce == "fast":
        total = sum(vectors) if vectors else torch.zeros(size, device=device)
        dist.all_reduce(total)
        return total
    slice_size = -(-size // WORLD)
    padding = WORLD * slice_size - size
    sent = torch.empty(0, device=device)
    if vectors:  # (nodes, P) -> (WORLD, nodes, slice)
        sent = F.pad(torch.stack(vectors), (0, padding)).unflatten(1, (WORLD, slice_size))
        sent = sent.transpose(0, 1).contiguous()
    nodes = [nodes_of(rank, shards) for rank in range(WORLD)]
    counts = [len(its_nodes) for its_nodes in nodes]
    received = torch.empty(sum(counts), slice_size, device=device)
    dist.all_to_all_single(
        received.flatten(),
        sent.flatten(),
        [count * slice_size for count in counts],
        [counts[RANK] * slice_size] * WORLD,
    )
    whole = TreeSum()
    for (first, count), vector in zip(itertools.chain(*nodes), received, strict=True):
        whole.add(first, count, vector)
    total = torch.empty(WORLD, slice_size, device=device)
    dist.all_gather(list(total), whole.nodes[0][2].contiguous())
    return total.flatten()[:size]
