"""The inbox of a developer: files that mail programs open."""

from __future__ import annotations

import os
import stat
import threading
from email import message_from_bytes, policy
from email.utils import parsedate_to_datetime

import pytest
from zope.interface.verify import verifyObject

from pyramid_mailqueue.delivery.handler import MessageHandler
from pyramid_mailqueue.interfaces import ITransport
from pyramid_mailqueue.transports.debug import DebugInbox

RECIPIENTS = ('ada@x.example', 'bob@x.example')
CONTENT = b'From: shop@site.example\r\nSubject: hello\r\n\r\nHow are you?\r\n'


@pytest.fixture
def inbox(tmp_path):
    return DebugInbox(tmp_path / 'some' / 'inbox')


def mails(inbox):
    return [path.read_bytes() for path in sorted(inbox.path.iterdir())]


def test_it_is_a_transport(inbox):
    assert verifyObject(ITransport, inbox)


@pytest.mark.parametrize('umask', [0, 0o022, 0o077, 0o777])
def test_the_folder_is_created_with_the_first_message_and_all_is_private_whatever_the_umask(tmp_path, umask):
    inbox = DebugInbox(tmp_path / 'inbox')
    before = inbox.path.exists()
    umask = os.umask(umask)
    try:
        inbox.send('shop@site.example', RECIPIENTS, CONTENT)
    finally:
        os.umask(umask)

    (mail,) = inbox.path.iterdir()
    assert not before
    assert stat.S_IMODE(inbox.path.stat().st_mode) == 0o700
    assert stat.S_IMODE(mail.stat().st_mode) == 0o600


def test_a_folder_that_is_there_keeps_its_mode(inbox):
    inbox.path.mkdir(parents=True)
    inbox.path.chmod(0o750)
    inbox.send('shop@site.example', RECIPIENTS, CONTENT)

    assert stat.S_IMODE(inbox.path.stat().st_mode) == 0o750


def test_everybody_is_accepted_and_the_reply_names_the_file(inbox):
    result = inbox.send('shop@site.example', RECIPIENTS, CONTENT)

    (path,) = inbox.path.iterdir()
    assert result.accepted == RECIPIENTS
    assert {str(reply) for reply in result.replies.values()} == {f'250 2.0.0 kept in {path}'}
    assert not any(reply.from_server for reply in result.replies.values())


def test_a_mail_is_the_content_with_its_envelope_on_top(inbox):
    inbox.send('shop@site.example', RECIPIENTS, CONTENT)

    (mail,) = mails(inbox)
    message = message_from_bytes(mail, policy=policy.default)
    assert mail.endswith(b'\r\n' + CONTENT)
    assert message['Return-Path'] == '<shop@site.example>'
    assert message.get_all('X-Envelope-To') == list(RECIPIENTS)
    assert parsedate_to_datetime(message['X-Delivery-Date'])
    assert message['Subject'] == 'hello'
    assert [path.suffix for path in inbox.path.iterdir()] == ['.eml']


def test_the_null_sender_and_international_addresses_are_shown(inbox):
    inbox.send('', ('jörg@bücher.example',), CONTENT)

    (mail,) = mails(inbox)
    assert mail.startswith('Return-Path: <>\r\nX-Envelope-To: jörg@bücher.example\r\n'.encode())


def test_mails_from_many_threads_are_all_there(inbox):
    def send():
        for _ in range(50):
            inbox.send('', RECIPIENTS, CONTENT)

    threads = [threading.Thread(target=send) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(mails(inbox)) == 200
    assert all(mail.endswith(CONTENT) for mail in mails(inbox))


def test_where_it_cannot_write_mail_is_deferred(inbox):
    inbox.path.parent.write_text('a file in the place of the folder')

    result = MessageHandler([inbox]).send_message(CONTENT, sender='', recipients=RECIPIENTS)

    assert result.deferred == RECIPIENTS
