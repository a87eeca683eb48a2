"""
django-post_office in as little of Django as it takes, over SQLite.

    python -m benchmarks.post_office send FOLDER PORT

Five threads, as its default is, and larger batches than its default: after each it connects anew.
"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.common import RECIPIENT, SENDER, new_message

THREADS = 5
BATCH = 1000


def set_up(folder: Path, port: int = 25) -> None:
    import django
    from django.conf import settings

    settings.configure(
        DATABASES={'default': {'ENGINE': 'django.db.backends.sqlite3', 'NAME': folder / 'post_office.sqlite'}},
        DEFAULT_AUTO_FIELD='django.db.models.AutoField',
        EMAIL_HOST='127.0.0.1',
        EMAIL_PORT=port,
        INSTALLED_APPS=['django.contrib.contenttypes', 'post_office'],
        POST_OFFICE={'BATCH_SIZE': BATCH, 'THREADS_PER_PROCESS': THREADS},
        TEMPLATES=[{'BACKEND': 'django.template.backends.django.DjangoTemplates'}],
    )
    django.setup()


def fill(folder: Path, messages: int, size: int) -> None:
    set_up(folder)
    from django.core.management import call_command
    from post_office import mail

    call_command('migrate', verbosity=0)
    message = new_message(size)
    parts = {
        'recipients': [RECIPIENT],
        'sender': SENDER,
        'subject': message['Subject'],
        'message': message.get_content(),
    }
    for start in range(0, messages, BATCH):
        mail.send_many([parts] * min(BATCH, messages - start))


def send(folder: Path, port: int) -> None:
    set_up(folder, port)
    from django.core.management import call_command

    call_command('send_queued_mail', lockfile=str(folder / 'lock'))


if __name__ == '__main__':
    send(Path(sys.argv[2]), int(sys.argv[3]))
