"""The queue in a directory."""

from pyramid_mailqueue.queues.maildir.queue import MaildirQueue

__all__ = ['MaildirQueue']
