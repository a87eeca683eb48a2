"""The mails that arrived: a Maildir, so that mutt or ``less`` can read it too."""

from __future__ import annotations

import mailbox
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from pyramid_mailqueue.queues.contents import read_contents

__all__ = ['Inbox', 'Mail']


@dataclass(frozen=True)
class Mail:
    """
    One mail as it arrived.

    :param key: its name in the inbox
    :param arrived: when, in the local time zone
    :param recipient: the one named in the SMTP dialog; the header may differ
    :param source: the text of the whole file
    """

    key: str
    arrived: datetime
    sender: str
    recipient: str
    subject: str
    text: str
    source: str


class Inbox:
    """A directory of mails; may be used from any thread, for each call opens it anew."""

    def __init__(self, path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._maildir()

    def store(self, sender, recipients, content):
        """Keep one copy for each recipient; on the disk before this returns."""
        maildir = self._maildir()
        for recipient in recipients:
            head = f'Return-Path: <{sender}>\r\nDelivered-To: {recipient}\r\n'
            maildir.add(head.encode() + content)

    def latest(self, limit):
        """Return the last *limit* mails, newest first."""
        maildir = self._maildir()
        newest = sorted(maildir.keys(), key=_arrival, reverse=True)[:limit]
        return [_read(maildir, key) for key in newest]

    def get(self, key):
        """Return the mail of this name, or None."""
        maildir = self._maildir()
        return _read(maildir, key) if key in maildir else None

    def __len__(self):
        return len(self._maildir())

    def _maildir(self):
        return mailbox.Maildir(self.path, factory=None, create=True)


def _arrival(key):
    # A name starts with "seconds.M<microseconds>P<pid>Q<count>"; the microseconds are not padded.
    seconds, rest = key.split('.')[:2]
    microseconds, _, count = rest.removeprefix('M').partition('P')
    return int(seconds), int(microseconds), int(count.partition('Q')[2])


def _read(maildir, key):
    source = maildir.get_bytes(key)
    # Not by the email package alone: it raises exceptions for some real mail, and the page has to be shown.
    contents = read_contents(source)
    fields = {name.lower(): value for name, value in reversed(contents.header)}
    return Mail(
        key=key,
        arrived=datetime.fromtimestamp(_arrival(key)[0], timezone.utc).astimezone(),
        sender=fields.get('from') or fields.get('return-path', ''),
        recipient=fields.get('delivered-to', ''),
        subject=fields.get('subject') or '(no subject)',
        text='\n'.join(contents.text or ()),
        source=source.decode('utf-8', 'replace').replace('\r\n', '\n'),
    )
