"""Holding files: on a real file system, between real processes."""

from __future__ import annotations

import gc
import os
import socket
import stat
import threading
from pathlib import Path

import pytest

from pyramid_mailqueue.queues.maildir.locked_file import Holder, sync_folder
from tests.parts.children import Child, no_open_files_are_left, open_files, run_in_child
from tests.parts.faults import Log, intercepted

CONTENT = b'octets'


@pytest.fixture
def holder():
    return Holder()


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / 'file')


@pytest.fixture
def free_path(path, holder):
    """The path of a file that nobody holds."""
    holder.create(path, [CONTENT]).close()
    return path


def is_held(path):
    """Whether somebody holds the file, as another process sees it."""

    def is_held():
        file = Holder().take(path)
        return file is None

    return run_in_child(is_held)


def before(name, action):
    """Do *action* once, before the first call of this name."""
    todo = [action]

    def around(call):
        if call.name == name and todo:
            todo.pop()()
        return call()

    return around


# --- create -----------------------------------------------------------------


def test_a_new_file_is_held_from_its_first_moment_on(path, holder):
    file = holder.create(path, [CONTENT, b'', b' more'])

    assert is_held(path)
    assert file.read() == CONTENT + b' more'
    assert (file.name, file.path, file.closed) == ('file', path, False)


def test_a_new_file_is_locked_before_anything_is_written_to_it(path, holder):
    with intercepted(Log()) as log:
        file = holder.create(path, [CONTENT], modified=1)

    assert not file.closed
    assert log.names == ['open', 'fchmod', 'flock', 'writev', 'utime', 'fsync']


@pytest.mark.parametrize('umask', [0, 0o022, 0o077, 0o777])
def test_a_new_file_can_be_read_and_written_by_its_owner_and_by_nobody_else(path, umask):
    def create():
        os.umask(umask)
        Holder().create(path, [CONTENT]).close()

    run_in_child(create)

    assert stat.S_IMODE(Path(path).stat().st_mode) == 0o600


def test_a_new_file_can_be_given_its_time_of_modification(path, holder):
    file = holder.create(path, [CONTENT], modified=1234567890.5)

    assert file.modified == Path(path).stat().st_mtime == 1234567890.5


def test_everything_is_written_even_if_the_system_takes_it_in_small_pieces(path, holder):
    pieces = [b'0123456789' * 10, b'', b'abcdef' * 50]

    def three_octets(call):
        if call.name != 'writev':
            return call()
        fd, buffers = call.args
        return os.write(fd, b''.join(buffers)[:3])

    with intercepted(three_octets):
        file = holder.create(path, pieces)

    assert file.read() == b''.join(pieces)


def test_a_file_that_is_there_already_is_not_touched(free_path, holder):
    with no_open_files_are_left(), pytest.raises(FileExistsError):
        holder.create(free_path, [b'other'])

    assert holder.take(free_path).read() == CONTENT


def test_an_interrupt_while_a_file_is_written_leaves_nothing_behind(path, holder):
    def interrupt(call):
        if call.name == 'fsync':
            raise KeyboardInterrupt
        return call()

    with no_open_files_are_left(), intercepted(interrupt), pytest.raises(KeyboardInterrupt):
        holder.create(path, [CONTENT])

    assert not Path(path).exists()


# --- take -------------------------------------------------------------------


def test_a_free_file_can_be_taken_once(free_path, holder):
    file = holder.take(free_path)

    assert file.read() == CONTENT
    assert is_held(free_path)
    assert holder.take(free_path) is None, 'not even by the same process'
    assert Holder().take(free_path) is None


def test_one_of_many_threads_gets_the_file(free_path):
    ready = threading.Barrier(8)
    taken = []

    def take():
        ready.wait()
        taken.append(Holder().take(free_path))

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(taken) == 8
    assert sum(file is not None for file in taken) == 1


def test_one_of_many_processes_gets_the_file(free_path):
    def take(connection):
        connection.recv()
        file = Holder().take(free_path)
        connection.send(file is not None)
        connection.recv()

    children = [Child(take) for _ in range(4)]
    for child in children:
        child.tell()
    taken = [child.hear() for child in children]
    for child in children:
        child.kill()

    assert sorted(taken) == [False, False, False, True]


def test_a_file_can_be_taken_when_its_holder_lets_go_or_dies(free_path, holder):
    holder.take(free_path).close()

    def take_and_wait(connection):
        file = Holder().take(free_path)
        connection.send(file is not None)
        connection.recv()

    with Child(take_and_wait) as child:
        assert child.hear()
        assert holder.take(free_path) is None
        child.kill()

        assert holder.take(free_path) is not None


def make_fifo(path):
    os.mkfifo(path)


def make_folder(path):
    Path(path).mkdir()


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)


def make_link(path):
    target = Path(f'{path}.target')
    target.write_bytes(CONTENT)
    Path(path).symlink_to(target)


def make_nothing(path):
    pass


@pytest.mark.parametrize('make', [make_nothing, make_folder, make_link, make_fifo, make_socket])
def test_what_is_no_file_cannot_be_taken(path, holder, make):
    make(path)

    with no_open_files_are_left():
        assert holder.take(path) is None


def test_a_link_is_not_followed(path, holder):
    make_link(path)

    with intercepted(Log()) as log:
        holder.take(path)

    assert log.names == ['open']


def test_a_file_that_may_not_be_opened_is_an_error(free_path, holder):
    def refuse(call):
        raise PermissionError(call.args[0])

    with intercepted(refuse), pytest.raises(PermissionError):
        holder.take(free_path)


def remove(path):
    Path(path).unlink()


def move_away(path):
    Path(path).rename(f'{path}.elsewhere')


def replace(path):
    Holder().create(f'{path}.new', [b'new version']).close()
    Path(f'{path}.new').rename(path)


@pytest.mark.parametrize('change', [remove, move_away, replace])
def test_a_file_that_changed_its_name_while_it_was_opened_is_not_taken(free_path, holder, change):
    with no_open_files_are_left(), intercepted(before('flock', lambda: change(free_path))):
        assert holder.take(free_path) is None


@pytest.mark.parametrize('change', [remove, move_away])
def test_a_file_that_loses_its_name_after_it_was_locked_is_not_taken(free_path, holder, change):
    with no_open_files_are_left(), intercepted(before('stat', lambda: change(free_path))):
        assert holder.take(free_path) is None


# --- hold -------------------------------------------------------------------


def test_a_held_file_keeps_its_lock_when_it_moves(path, tmp_path, holder):
    file = holder.create(path, [CONTENT])

    file.move(str(tmp_path / 'elsewhere'))

    assert file.name == 'elsewhere'
    assert is_held(file.path)
    assert not Path(path).exists()


def test_a_file_that_cannot_move_stays_where_it_is(path, tmp_path, holder):
    file = holder.create(path, [CONTENT])

    with pytest.raises(FileNotFoundError):
        file.move(str(tmp_path / 'missing' / 'file'))

    assert file.path == path
    assert is_held(path)


def test_a_removed_file_is_gone_and_may_be_removed_again(path, holder):
    file = holder.create(path, [CONTENT])

    file.remove()
    file.remove()

    assert not Path(path).exists()


def test_closing_twice_does_not_close_the_file_of_somebody_else(path, holder):
    file = holder.create(path, [CONTENT])
    number = file.fd
    file.close()
    other = os.open('/dev/null', os.O_RDONLY)
    # The number is used again, as it may be at any time.
    os.dup2(other, number)

    file.close()
    file.abandon()

    for used in {other, number}:
        os.close(used)


def test_a_closed_file_cannot_be_read(path, holder):
    file = holder.create(path, [CONTENT])
    file.close()

    assert file.closed
    with pytest.raises(OSError, match='Bad file descriptor'):
        file.read()


def test_a_file_that_is_shorter_than_it_says_is_an_error(path, holder):
    file = holder.create(path, [CONTENT])

    def shorten(call):
        return call()[:3] if call.name == 'pread' else call()

    with intercepted(shorten), pytest.raises(OSError, match='only 3 of 6 octets'):
        file.read()


def test_a_forgotten_file_is_let_go_of(path, holder):
    with no_open_files_are_left():
        holder.create(path, [CONTENT])
        gc.collect()

    assert not is_held(path)


def test_programs_that_are_started_do_not_inherit_a_held_file(path, holder):
    assert not os.get_inheritable(holder.create(path, [CONTENT]).fd)
    assert not os.get_inheritable(holder.create(f'{path}.2', [CONTENT]).fd)


# --- forked children --------------------------------------------------------


@pytest.mark.parametrize('end', ['close', 'abandon'])
def test_a_forked_child_lets_go_of_the_file_and_its_parent_keeps_it(path, holder, end):
    file = holder.create(path, [CONTENT])

    def end_it(connection):
        was_closed = file.closed
        getattr(file, end)()
        connection.send((was_closed, path in open_files().values()))
        connection.recv()

    with Child(end_it) as child:
        assert child.hear() == (True, False)
        assert is_held(path), 'while the child lives'
        child.kill()
    assert is_held(path), 'when the child is dead'


def test_a_child_that_still_shares_the_open_file_cannot_keep_it_locked(path, holder):
    file = holder.create(path, [CONTENT])
    # What a child has before it comes to close it.
    shared = os.dup(file.fd)

    file.close()

    assert not is_held(path)
    os.close(shared)


def test_a_child_that_was_forked_while_a_file_was_being_written_lets_go_of_it(path, holder):
    children = []

    def inherits(connection):
        connection.send(path in open_files().values())

    with intercepted(before('fsync', lambda: children.append(Child(inherits)))):
        holder.create(path, [CONTENT])

    with children.pop() as child:
        assert child.hear() is False


# --- sync_folder ------------------------------------------------------------


def test_a_folder_is_synced_and_closed(tmp_path):
    with no_open_files_are_left(), intercepted(Log()) as log:
        sync_folder(str(tmp_path))

    assert log.names == ['open', 'fsync', 'close']


def test_a_folder_that_is_missing_cannot_be_synced(path):
    with pytest.raises(FileNotFoundError):
        sync_folder(path)
