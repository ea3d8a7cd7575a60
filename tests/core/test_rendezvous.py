"""How processes find each other beside the keys of dead ones, and notice a loss."""

import io
import threading
from datetime import timedelta

import torch.distributed as dist

from ddp import rendezvous
from ddp.rendezvous import Watch, connect, meet


def server():
    return dist.TCPStore("localhost", 0, is_master=True, timeout=timedelta(seconds=20))


def meet_all(port, world_size):
    """Return the names on which so many processes agree; here they are threads."""
    names = [None] * world_size

    def join(rank):
        names[rank] = meet(dist.TCPStore("localhost", port), rank, world_size)

    threads = [threading.Thread(target=join, args=(rank,)) for rank in range(world_size)]
    for thread in reversed(threads):  # the main process comes last
        thread.start()
    for thread in threads:
        thread.join(20)
    return names


def test_each_attempt_has_a_name_of_its_own_on_a_store_that_stays():
    store = server()
    attempts = [meet_all(store.port, count) for count in (3, 2, 4)]  # one is lost, two come
    assert [len(set(names)) for names in attempts] == [1, 1, 1]
    assert None not in attempts[0]
    assert len({names[0] for names in attempts}) == 3


def test_what_a_dead_process_wrote_is_no_answer():
    store = server()
    store.set("name of 1", "dead unknown")  # it was killed before it had an answer
    store.set("answer to 1", "dead gone")
    names = meet_all(store.port, 2)
    assert names[0] == names[1]
    assert names[0] not in (None, "dead", "gone")


def test_connect_waits_for_nobody(monkeypatch):
    store = server()
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    connect(1, timedelta(seconds=20)).set("key", "value")
    assert store.get("key") == b"value"


def watched(monkeypatch, signs):
    """Return what a watch says, and its exit code, when the other gives so many signs of life."""
    monkeypatch.setattr(rendezvous, "BEAT", 0.01)
    monkeypatch.setattr(rendezvous, "PATIENCE", 30)
    exited = threading.Event()
    codes = []

    def leave(code):
        codes.append(code)
        exited.set()
        watch.closed.set()

    monkeypatch.setattr(rendezvous.os, "_exit", leave)
    store = server()
    stderr = io.StringIO()
    watch = Watch(store.clone(), 2, 3, stderr)
    with watch:
        for _ in range(signs):
            store.add("beats of 0", 1)
            exited.wait(0.01)
        alive = not codes
        assert exited.wait(20)
    assert alive
    assert store.add("beats of 2", 0) > 0
    return stderr.getvalue(), codes[0]


def test_who_gives_no_more_signs_of_life_is_lost(monkeypatch):
    said, code = watched(monkeypatch, signs=50)  # of more beats than the patience
    assert said == "error: process 0 was lost, or its machine\n"
    assert code == 1


def test_a_lost_store_is_a_lost_process(monkeypatch):
    """Its machine may be that of the store."""
    monkeypatch.setattr(rendezvous, "BEAT", 0.01)
    monkeypatch.setattr(rendezvous, "PATIENCE", 10)
    left = threading.Event()
    monkeypatch.setattr(rendezvous.os, "_exit", lambda code: left.set() or watch.closed.set())

    class Lost:
        def add(self, key, number):
            raise dist.DistNetworkError("it is gone")

    watch = Watch(Lost(), 0, 2, io.StringIO())
    assert left.wait(20)


def test_a_watch_that_ended_ends_nothing(monkeypatch):
    monkeypatch.setattr(rendezvous, "BEAT", 0.01)
    monkeypatch.setattr(rendezvous, "PATIENCE", 3)
    codes = []
    monkeypatch.setattr(rendezvous.os, "_exit", codes.append)
    with Watch(server().clone(), 0, 2, io.StringIO()) as watch:
        pass
    threading.Event().wait(0.2)
    assert codes == []
    assert watch.silent <= 1
