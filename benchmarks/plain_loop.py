"""
The unit of the rates: the system calls that it takes to drain a queue directory, and nothing else.

    python plain_loop.py QUEUE_DIR PORT CONNECTIONS

Each message is locked, renamed to ``cur/``, read, sent and unlinked; its MAIL, RCPT and DATA leave in the same write as
the end of the message before it.  After 100 messages ``cur/`` is made durable.  Nothing is checked but the replies.
"""

# Single system calls are the subject here.
# ruff: noqa: PTH104, PTH108, PTH208

import fcntl
import itertools
import os
import socket
import sys
import threading

SYNC_EVERY = 100


def main() -> None:
    folder, port, connections = sys.argv[1:]
    os.chdir(folder)
    # next() of a list's iterator is one step for all threads.
    names = iter(sorted(os.listdir('new')))
    unlinked = itertools.count(1)
    threads = [threading.Thread(target=drain, args=(names, int(port), unlinked)) for _ in range(int(connections))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sync()


def drain(names, port, unlinked):
    server = socket.create_connection(('127.0.0.1', port))
    server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    replies = server.makefile('rb')
    expect(replies, b'220')
    server.sendall(b'EHLO plain.example\r\n')
    expect(replies, b'250')
    message = claim(names)
    server.sendall(message[2] if message else b'QUIT\r\n')
    while message:
        fd, path, _, content = message
        following = claim(names)
        for code in (b'250', b'250', b'354'):
            expect(replies, code)
        server.sendall(content + (following[2] if following else b'QUIT\r\n'))
        expect(replies, b'250')
        os.unlink(path)
        os.close(fd)
        if next(unlinked) % SYNC_EVERY == 0:
            sync()
        message = following
    expect(replies, b'221')


def claim(names):
    """Return descriptor, path, commands and content of the next message; None if there is no more."""
    name = next(names, None)
    if name is None:
        return None
    fd = os.open(f'new/{name}', os.O_RDWR)
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    path = f'cur/{name}'
    os.rename(f'new/{name}', path)
    head, _, content = os.read(fd, 1 << 20).partition(b'X-Queue-Meta-End: end\r\n')
    sender, recipient, *_ = (line.partition(b': ')[2] for line in head.split(b'\r\n'))
    commands = b'MAIL FROM:%b\r\nRCPT TO:<%b>\r\nDATA\r\n' % (sender, recipient)
    return fd, path, commands, content.replace(b'\r\n.', b'\r\n..') + b'.\r\n'


def expect(replies, code):
    line = replies.readline()
    while line[3:4] == b'-':
        line = replies.readline()
    assert line.startswith(code), line


def sync():
    fd = os.open('cur', os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


if __name__ == '__main__':
    main()
