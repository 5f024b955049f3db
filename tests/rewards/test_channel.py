import socket
import struct
import threading
import time

import pytest

from deltarl.channel import Channel


@pytest.fixture
def ends():
    ours, theirs = socket.socketpair()
    yield ours, theirs
    ours.close()
    theirs.close()


def receive(channel, count, seconds=20):
    """The next messages, `count` of them."""
    messages = []
    while len(messages) < count:
        messages += channel.receive(seconds)
    return messages


def test_messages_arrive_whole_and_in_order(ends):
    here, there = map(Channel, ends)
    sent = [b"", b"x", bytes(range(256)) * 10_000, b"last"]
    sender = threading.Thread(target=lambda: [here.send(message) for message in sent])
    sender.start()
    assert receive(there, len(sent)) == sent
    sender.join()


def test_messages_that_wait_come_at_once(ends):
    here, there = map(Channel, ends)
    for message in (b"one", b"", b"three"):
        here.send(message)
    assert there.receive(0.0) == [b"one", b"", b"three"]


def test_a_message_of_which_a_part_came_is_waited_for_no_longer(ends):
    channel = Channel(ends[0])
    ends[1].sendall(struct.pack("!Q", 10) + b"12345")
    with pytest.raises(TimeoutError):
        channel.receive(0.05)
    ends[1].sendall(b"67890")
    assert channel.receive(0.0) == [b"1234567890"]


def test_what_came_before_the_call_is_seen_without_waiting(ends):
    here, there = map(Channel, ends)
    here.send(b"early")
    time.sleep(0.01)
    assert there.receive(0.0) == [b"early"]


def test_a_post_never_blocks_and_the_rest_of_it_goes_out_during_receive(ends):
    here, there = map(Channel, ends)
    sent = [bytes([i]) * 3_000_000 for i in range(3)]
    for message in sent:
        here.post(message)
    with pytest.raises(TimeoutError):
        here.receive(0.05)
    echo = threading.Thread(target=lambda: [there.send(message) for message in receive(there, 3)])
    echo.start()
    assert receive(here, 3) == sent
    echo.join()


def test_what_an_end_sent_before_it_went_is_seen_even_when_a_post_to_it_failed(ends):
    here, there = map(Channel, ends)
    here.post(b"never read")
    there.send(b"last words")
    there.close()
    here.post(b"too late")
    assert here.receive(5) == [b"last words"]
    with pytest.raises((EOFError, OSError)):
        here.receive(5)


def test_a_closed_end_is_the_end_of_the_stream(ends):
    here, there = map(Channel, ends)
    copy = ends[0].dup()
    here.send(b"last")
    here.close()
    assert there.receive(5) == [b"last"]
    with pytest.raises(EOFError):
        there.receive(5)
    with pytest.raises(OSError):
        there.send(b"x" * 10)
    there.close()
    copy.close()


def test_what_is_no_message_is_refused_after_those_before_it(ends):
    channel = Channel(ends[0], longest=100)
    ends[1].sendall(struct.pack("!Q", 2) + b"ok" + b"not a message at all")
    assert channel.receive(5) == [b"ok"]
    with pytest.raises(ConnectionError, match="limit 100"):
        channel.receive(5)
