"""
django-post_office in as little of Django as it takes, over SQLite or over a database with a URL.

    python -m benchmarks.post_office fill FOLDER MESSAGES OCTETS [URL]
    python -m benchmarks.post_office send FOLDER PORT PROCESSES [URL]

Five threads in each process, as its default is, and larger batches than its default: after each it connects anew.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from benchmarks.common import RECIPIENT, SENDER, new_message

THREADS = 5
BATCH = 1000


def set_up(folder: Path, port: int = 25, url: str | None = None) -> None:
    import django
    from django.conf import settings

    settings.configure(
        DATABASES={'default': _database(folder, url)},
        DEFAULT_AUTO_FIELD='django.db.models.AutoField',
        EMAIL_HOST='127.0.0.1',
        EMAIL_PORT=port,
        INSTALLED_APPS=['django.contrib.contenttypes', 'post_office'],
        POST_OFFICE={'BATCH_SIZE': BATCH, 'THREADS_PER_PROCESS': THREADS},
        TEMPLATES=[{'BACKEND': 'django.template.backends.django.DjangoTemplates'}],
    )
    django.setup()


def _database(folder: Path, url: str | None) -> dict[str, Any]:
    if url is None:
        return {'ENGINE': 'django.db.backends.sqlite3', 'NAME': folder / 'post_office.sqlite'}
    parts = urlsplit(url)
    options = dict(parse_qsl(parts.query))
    return {
        'ENGINE': 'django.db.backends.postgresql',
        'NAME': parts.path.lstrip('/'),
        'USER': unquote(parts.username or ''),
        'PASSWORD': unquote(parts.password or ''),
        'HOST': options.pop('host', parts.hostname or ''),
        'PORT': options.pop('port', parts.port or ''),
        'OPTIONS': options,
    }


def fill(folder: Path, messages: int, size: int, url: str | None = None) -> None:
    set_up(folder, url=url)
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


def send(folder: Path, port: int, processes: int, url: str | None = None) -> None:
    set_up(folder, port, url)
    from django.core.management import call_command

    call_command('send_queued_mail', lockfile=str(folder / 'lock'), processes=processes)


def main() -> None:
    what, folder, *rest = sys.argv[1:]
    first, second, *url = rest
    {'fill': fill, 'send': send}[what](Path(folder), int(first), int(second), *url)


if __name__ == '__main__':
    main()
