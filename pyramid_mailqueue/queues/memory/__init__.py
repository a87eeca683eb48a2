"""The queue of tests, which ends with its process."""

from pyramid_mailqueue.queues.memory.queue import MemoryQueue

__all__ = ['MemoryQueue']
