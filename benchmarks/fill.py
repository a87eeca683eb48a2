"""
Fill a queue by the API of the package whose queue it is, to be run by a python that has the package.

    python -m benchmarks.fill ours|zope|repoze|runner|post_office FOLDER MESSAGES OCTETS
"""

from __future__ import annotations

import email
import sys
from pathlib import Path

from benchmarks.common import RECIPIENT, SENDER, new_message


def ours(folder: Path, messages: int, size: int) -> None:
    from pyramid_mailqueue.application import build_mailer
    from pyramid_mailqueue.settings import Settings

    settings = {'mailqueue.queue_dir': folder / 'queue', 'mailqueue.smtp_hostname': '127.0.0.1'}
    mailer = build_mailer(Settings.from_mapping({**settings, 'mailqueue.delivery': 'queue'}))
    message = new_message(size)
    for _ in range(messages):
        mailer.enqueue(message)
    mailer.close()


def zope(folder: Path, messages: int, size: int) -> None:
    import transaction
    from zope.sendmail.delivery import QueuedMailDelivery

    delivery = QueuedMailDelivery(str(folder / 'queue'))
    content = new_message(size).as_bytes()
    for _ in range(messages):
        delivery.send(SENDER, [RECIPIENT], content)
        transaction.commit()


def repoze(folder: Path, messages: int, size: int) -> None:
    import transaction
    from repoze.sendmail.delivery import QueuedMailDelivery

    delivery = QueuedMailDelivery(str(folder / 'queue'))
    content = new_message(size).as_bytes()
    for _ in range(messages):
        # It adds Message-ID and Date to the message itself.
        delivery.send(SENDER, [RECIPIENT], email.message_from_bytes(content))
        transaction.commit()


def runner(folder: Path, messages: int, size: int) -> None:
    from schwarz.mailqueue import enqueue_message

    message = new_message(size)
    for _ in range(messages):
        enqueue_message(message, str(folder / 'queue'), SENDER, [RECIPIENT])


def post_office(folder: Path, messages: int, size: int) -> None:
    from benchmarks import post_office as package

    package.fill(folder, messages, size)


PACKAGES = {function.__name__: function for function in (ours, zope, repoze, runner, post_office)}


def main() -> None:
    package, folder, messages, size = sys.argv[1:]
    PACKAGES[package](Path(folder), int(messages), int(size))


if __name__ == '__main__':
    main()
