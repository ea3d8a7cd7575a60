"""How the processes of a launch find each other, and how one notices that others are lost."""

import contextlib
import os
import threading
import time
import uuid

import torch

PAUSE = 0.1  # seconds between two looks at a key
BEAT = 2.0  # seconds between two signs of life
PATIENCE = 30  # so many beats without a sign, and a process is lost


def connect(rank, timeout):
    """Return the store that torchrun's processes share; those that are not there yet may come."""
    shared = os.environ["TORCHELASTIC_USE_AGENT_STORE"] == "True"  # torchrun itself has one
    return torch.distributed.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=rank == 0 and not shared,
        wait_for_workers=False,
        timeout=timeout,
    )


def read(store, key):
    """Return the words of a key that another process wrote; None where there are none yet."""
    return store.get(key).decode().split() if store.check([key]) else None


def meet(
    store,  # a torch.distributed Store that all processes reach, and that may hold keys of old
    rank,
    world_size,
):
    """Return a name of this attempt, for its keys: torchrun keeps those of one that it restarts.

    Each process calls itself by a new name. The main one answers with its own until the other has
    repeated it, so that neither takes what a dead process wrote for an answer."""
    name = uuid.uuid4().hex
    if rank > 0:
        store.set(f"name of {rank}", f"{name} unknown")
        answer = None
        while answer is None or answer[0] != name:
            time.sleep(PAUSE)
            answer = read(store, f"answer to {rank}")
        store.set(f"name of {rank}", f"{name} {answer[1]}")
        return answer[1]
    missing = set(range(1, world_size))
    while missing:
        for other in sorted(missing):
            names = read(store, f"name of {other}")
            if names is None:
                continue
            store.set(f"answer to {other}", f"{names[0]} {name}")
            if names[1] == name:
                missing.remove(other)
        time.sleep(PAUSE)
    return name


class Watch:
    """A watch that ends this process soon after the next one is lost, until its block ends.

    A machine that loses power closes no connection: who waits for it would wait for hours."""

    def __init__(
        self,
        store,  # of this attempt, with a connection of its own
        rank,
        world_size,
        stderr,
    ):
        self.store = store
        self.rank = rank
        self.other = (rank + 1) % world_size
        self.stderr = stderr
        self.silent = 0  # beats since the other's last sign of life
        self.closed = threading.Event()
        for function in (self.beat, self.check):
            threading.Thread(target=function, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.closed.set()

    def beat(self):
        """Give a sign of life at each beat, and look for one of the other."""
        before = None
        with contextlib.suppress(RuntimeError):  # the store is lost, and its machine
            while not self.closed.wait(BEAT):
                self.store.add(f"beats of {self.rank}", 1)
                beats = self.store.add(f"beats of {self.other}", 0)
                if beats != before:
                    self.silent = 0
                before = beats

    def check(self):
        """Count the beats without a sign; a process that was asleep itself has counted none."""
        while not self.closed.wait(BEAT):
            self.silent += 1
            if self.silent > PATIENCE:
                self.stderr.write(f"error: process {self.other} was lost, or its machine\n")
                self.stderr.flush()
                os._exit(1)  # whatever it waits for
