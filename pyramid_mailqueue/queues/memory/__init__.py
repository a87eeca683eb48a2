"""The queue in memory, for tests; it ends with its process."""

from pyramid_mailqueue.queues.memory.queue import MemoryQueue

__all__ = ['MemoryQueue']
