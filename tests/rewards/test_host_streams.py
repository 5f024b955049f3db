"""Verdicts as they come in, back-pressure, threads and asyncio."""

import asyncio
import itertools
import threading
import time
from pathlib import Path

import pytest

from deltarl.rewards import HostClosed, VerifierHost, VerifierSpec

FAULT = VerifierSpec(f"{Path(__file__).with_name('fault_verifier.py')}:FaultVerifier")
RIGHT = ("a", "a", {})


@pytest.fixture(scope="module")
def host():
    with VerifierHost(FAULT, workers=2, timeout=60.0, max_pending=16) as shared:
        yield shared


def endless(pulled):
    for number in itertools.count():
        pulled.append(number)
        yield (str(number), str(number), {"row": number})


def test_a_verdict_does_not_wait_for_an_earlier_one(host, tmp_path):
    gate = tmp_path / "gate"
    seen = []
    for index, verdict in host.as_completed([(f"wait {gate}", "", {}), *[(str(i), "3", {}) for i in range(1, 9)]]):
        seen.append((index, verdict.status))
        if len(seen) == 8:
            gate.touch()
    assert sorted(seen[:8]) == [(i, "correct" if i == 3 else "incorrect") for i in range(1, 9)]
    assert seen[8:] == [(0, "correct")]


@pytest.mark.parametrize("second", ["a", "exit", "nap 2"])
def test_tasks_given_to_a_worker_that_takes_long_are_answered_by_another(tmp_path, second):
    gate = tmp_path / "gate"
    with VerifierHost(FAULT, workers=2, timeout=60.0) as pool:
        pool.verify([RIGHT] * 300)
        with pool._queue.lock:  # the workers see all forty at once, and take several
            first, *others = [
                pool.submit(item) for item in [(f"wait {gate}", "", {}), (second, "a", {}), *[RIGHT] * 38]
            ]
        statuses = [future.result(timeout=60).status for future in others]
        early = not first.done()
        gate.touch()
        assert first.result(timeout=60).status == "correct"
        assert early
        after = pool.verify([RIGHT] * 50)
        counts = pool.counts()
    assert statuses == ["error" if second == "exit" else "correct", *["correct"] * 38]
    assert [v.status for v in after] == ["correct"] * 50
    assert sum(counts.values()) == 300 + 40 + 50


def test_endless_items_are_taken_no_further_ahead_than_max_pending(host):
    pulled, ahead = [], []
    verdicts = host.as_completed(endless(pulled))
    got = []
    for index, verdict in itertools.islice(verdicts, 3000):
        got.append(index)
        assert verdict.info["row"] == index
        ahead.append(len(pulled) - len(got))
    verdicts.close()
    assert max(ahead) <= host.max_pending
    assert len(set(got)) == 3000 and max(got) < 3000 + host.max_pending
    assert host.verify([RIGHT])[0].status == "correct"


def test_an_iterator_that_is_left_cancels_what_waits(host, tmp_path):
    before = sum(host.counts().values())
    verdicts = host.as_completed([RIGHT, *[(f"wait {tmp_path / 'gate'}", "", {})] * 12])
    assert next(verdicts)[0] == 0
    verdicts.close()
    (tmp_path / "gate").touch()
    host.verify([RIGHT])
    assert sum(host.counts().values()) - before < 12


def test_submit_blocks_while_too_many_wait(tmp_path):
    gate = tmp_path / "gate"
    futures = []
    with VerifierHost(FAULT, workers=1, timeout=60.0, max_pending=4) as pool:
        futures.append(pool.submit((f"wait {gate}", "", {})))
        while not futures[0].running():
            time.sleep(0.005)
        feeder = threading.Thread(target=lambda: futures.extend(pool.submit(RIGHT) for _ in range(50)))
        feeder.start()
        feeder.join(timeout=1.0)
        assert feeder.is_alive() and len(futures) <= 1 + pool.max_pending
        gate.touch()
        feeder.join(timeout=60)
        assert [f.result(timeout=60).status for f in futures] == ["correct"] * 51


def test_close_releases_a_submit_that_blocks(tmp_path):
    pool = VerifierHost(FAULT, workers=1, timeout=60.0, max_pending=1)
    futures, refused = [], []

    def feed():
        try:
            while True:
                futures.append(pool.submit((f"wait {tmp_path / 'never'}", "", {})))
        except HostClosed as error:
            refused.append(error)

    feeder = threading.Thread(target=feed)
    feeder.start()
    time.sleep(0.3)
    assert feeder.is_alive()
    pool.close()
    feeder.join(timeout=20)
    assert len(refused) == 1
    assert all(isinstance(future.exception(timeout=0), HostClosed) for future in futures)


def test_usable_from_threads(host):
    results = {}

    def work(name):
        results[name] = [v.status for v in host.verify([(name, "3", {})] * 40)]

    threads = [threading.Thread(target=work, args=(str(i),)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {str(i): ["correct" if i == 3 else "incorrect"] * 40 for i in range(6)}


def test_a_wait_for_a_verdict_leaves_the_event_loop_free(host, tmp_path):
    gate = tmp_path / "gate"

    async def open_gate():
        await asyncio.sleep(0.2)
        gate.touch()

    async def main():
        held = [host.averify((f"wait {gate}", "", {})) for _ in range(5 * host.max_pending)]
        *verdicts, _ = await asyncio.gather(*held, open_gate())
        return verdicts

    assert [v.status for v in asyncio.run(main())] == ["correct"] * (5 * host.max_pending)


def test_a_coroutine_that_gives_up_disturbs_nobody(host, tmp_path):
    gate = tmp_path / "gate"

    async def main():
        slow = [asyncio.create_task(host.averify((f"wait {gate}", "", {}))) for _ in range(8)]
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(slow[0], 0.2)
        slow[5].cancel()
        gate.touch()
        kept = await asyncio.gather(*slow[1:5], *slow[6:])
        return [v.status for v in kept], (await host.averify(RIGHT)).status

    assert asyncio.run(main()) == (["correct"] * 6, "correct")


@pytest.mark.parametrize("kind", ["iterable", "async iterable"])
def test_async_for_takes_endless_items_no_further_ahead_than_max_pending(host, kind):
    async def asynchronous(items):
        for item in items:
            await asyncio.sleep(0)
            yield item

    async def main():
        pulled, ahead, got = [], [], []
        items = endless(pulled)
        verdicts = host.as_completed_async(items if kind == "iterable" else asynchronous(items))
        async for index, verdict in verdicts:
            got.append(index)
            assert verdict.info["row"] == index
            ahead.append(len(pulled) - len(got))
            if len(got) == 1000:
                break
        await verdicts.aclose()
        return got, max(ahead)

    got, ahead = asyncio.run(main())
    assert len(set(got)) == 1000
    assert ahead <= host.max_pending + 1


def test_async_for_ends_with_its_items_and_raises_what_they_raise(host):
    async def broken():
        for _ in range(5):
            yield RIGHT
        raise OSError("the source is gone")

    async def collect(items):
        return sorted([index async for index, _ in host.as_completed_async(items)])

    assert asyncio.run(collect([])) == []
    assert asyncio.run(collect([RIGHT] * 50)) == list(range(50))
    with pytest.raises(OSError, match="the source is gone"):
        asyncio.run(collect(broken()))


def test_event_loops_of_several_threads_share_a_host(host):
    results = {}

    async def main(name):
        verdicts = await asyncio.gather(*[host.averify((name, "1", {})) for _ in range(50)])
        results[name] = {v.status for v in verdicts}

    threads = [threading.Thread(target=lambda name=str(i): asyncio.run(main(name))) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {"0": {"incorrect"}, "1": {"correct"}, "2": {"incorrect"}}
