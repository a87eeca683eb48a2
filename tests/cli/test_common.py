"""What commands have in common."""

from __future__ import annotations

import argparse
import errno
import os
import pwd

import pytest

from pyramid_mailqueue.cli.common import blaming, complain, duration, exit_status_of, refuse_root
from pyramid_mailqueue.exceptions import ConfigurationError, QueueError

NOBODY = 65534


class Owner:
    def __init__(self, uid):
        self.st_uid = uid


class Directory:
    """A queue directory that belongs to somebody."""

    parents = ()

    def __init__(self, uid):
        self._uid = uid

    def __truediv__(self, name):
        return self

    def __str__(self):
        return '/srv/queue'

    def exists(self):
        return True

    def stat(self):
        return Owner(self._uid)


@pytest.fixture
def root(monkeypatch):
    monkeypatch.setattr(os, 'geteuid', lambda: 0)


def test_root_may_work_in_its_own_queue(root):
    refuse_root(Directory(0), 'mq-queue')
    refuse_root(None, 'mq-queue')


def test_root_may_not_work_in_the_queue_of_somebody_else(root):
    name = pwd.getpwuid(NOBODY).pw_name

    with pytest.raises(ConfigurationError) as raised:
        refuse_root(Directory(NOBODY), 'mq-queue')

    assert str(raised.value) == (
        f'mailqueue.queue_dir = /srv/queue belongs to the user {name}, and this is root: the application could not '
        f'open the files that root leaves there. Run mq-queue as {name}, for instance with: sudo -u {name} mq-queue ...'
    )


def test_an_owner_without_a_name_is_told_by_number(root, monkeypatch):
    def getpwuid(uid):
        raise KeyError(uid)

    monkeypatch.setattr(pwd, 'getpwuid', getpwuid)

    with pytest.raises(ConfigurationError, match='belongs to the user #65534,'):
        refuse_root(Directory(NOBODY), 'mq-queue')


def test_everybody_else_is_left_to_the_permissions(monkeypatch):
    monkeypatch.setattr(os, 'geteuid', lambda: 1000)

    refuse_root(Directory(NOBODY), 'mq-queue')


def test_a_queue_directory_that_cannot_be_looked_at_is_told(monkeypatch):
    class Broken(Directory):
        def stat(self):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, 'geteuid', lambda: 0)

    with pytest.raises(QueueError, match=r'^The queue directory /srv/queue cannot be used: Input/output error$'):
        refuse_root(Broken(NOBODY), 'mq-run')


def test_each_line_of_an_error_names_the_file_once():
    with pytest.raises(ConfigurationError) as raised, blaming('/srv/app.ini#shop'):
        raise ConfigurationError(
            'mailqueue.queue_dir is missing\n/srv/app.ini, line 3: no section\nNo tables: mq-queue app.ini init'
        )

    assert str(raised.value).splitlines() == [
        '/srv/app.ini#shop: mailqueue.queue_dir is missing',
        '/srv/app.ini, line 3: no section',
        '/srv/app.ini#shop: No tables: mq-queue app.ini init',
    ]


def test_a_complaint_is_text_in_lines_of_its_own(capsys):
    complain('mq-queue', 'one\ntwo \x1b[31m')

    assert capsys.readouterr().err == 'mq-queue: one\nmq-queue: two \\x1b[31m\n'


def test_a_time_span_that_is_none_is_told():
    assert duration('1.5h') == 5400
    with pytest.raises(argparse.ArgumentTypeError, match='must be seconds such as 300, or 90s, 5m'):
        duration('soon')


@pytest.mark.parametrize(
    ('error', 'status', 'told'),
    [
        (ConfigurationError('app.ini: bad'), 78, 'mq-queue: app.ini: bad\n'),
        (QueueError('The folder cannot be read'), 75, 'mq-queue: The folder cannot be read\n'),
        (KeyboardInterrupt(), 130, ''),
    ],
)
def test_what_ends_a_command_has_a_status_and_words(capsys, error, status, told):
    def work():
        raise error

    assert exit_status_of('mq-queue', work) == status
    assert capsys.readouterr().err == told


def test_a_command_that_ends_well_has_its_own_status():
    assert exit_status_of('mq-queue', lambda: 1) == 1
