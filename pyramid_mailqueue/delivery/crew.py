"""
The thread that delivers in one run, and the one that waits for it.

One delivers, see :mod:`~.engine`; the other can always be told to stop.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from pyramid_mailqueue.delivery.engine import Engine
from pyramid_mailqueue.delivery.report import what_waits
from pyramid_mailqueue.delivery.routes import Routes
from pyramid_mailqueue.delivery.run import STOP_SECONDS, Due, RunReport, Stop
from pyramid_mailqueue.exceptions import QueueError, ServerTrouble
from pyramid_mailqueue.interfaces import IClaim
from pyramid_mailqueue.logs import Log
from pyramid_mailqueue.results import SendResult

__all__ = ['Crew']

log = Log('mailqueue.delivery')

#: How long it waits for a thread whose connections it has broken off.
ABORT_SECONDS = 2


class Crew:
    """The thread that delivers in one run, and the one that waits for it."""

    def __init__(
        self,
        handler: Routes,
        due: Due,
        stop: Stop,
        report: RunReport,
        on_progress: Callable[[RunReport], None] | None,
        hurry: Callable[[float], None],
    ) -> None:
        self._handler = handler
        self._hurry = hurry
        self._due = due
        due.take_from_rate = handler.take_from_rate
        due.on_ended = self._note
        self._stop = stop
        self._report = report
        self._on_progress = on_progress
        self._engine = Engine(handler, connections=handler.connections, has_helpers=True)
        # A daemon: at the end it may hang in what cannot be broken off.
        self._thread = threading.Thread(target=self._deliver, name='mailqueue-run', daemon=True)
        self._is_at_work = False
        self._is_server_lost = False
        self._is_cut_short = False
        self._defect: BaseException | None = None

    def work(self, max_seconds: float | None) -> None:
        """Return when the run is over.  Raises what the thread could not cope with."""
        self._start()
        try:
            self._wait_for_the_end(max_seconds)
        except BaseException:
            # Nobody is to take a message that is still being delivered.
            self._due.end()
            self._break_off()
            raise
        error = self._defect or self._due.error
        if error is not None:
            raise error
        self._report.rate_reached = self._due.is_rate_reached
        if self._report.done and not self._is_server_lost:
            # The server could be used; its disconnects have been told of.
            self._report.trouble = None

    def _start(self) -> None:
        self._is_at_work = True
        try:
            self._thread.start()
        except RuntimeError as error:
            raise QueueError(
                f'No thread can be started to deliver mail ({error}). Check the limits of the user and of the '
                'service: ulimit -u, TasksMax.'
            ) from error

    def _wait_for_the_end(self, max_seconds: float | None) -> None:
        deadline = None if max_seconds is None else time.monotonic() + max_seconds
        while self._is_at_work and not (self._stop.requested or _has_passed(deadline)):
            self._stop.wait(_until(deadline))
        if _has_passed(deadline) and self._is_at_work and not (self._report.done or self._engine.is_sending):
            self._report.trouble = ServerTrouble(f'No session was opened in the {max_seconds:g} seconds of this run.')
        self._end()

    def _end(self) -> None:
        """Wait for the messages in hand, if there are any; after a request to stop not for ever."""
        self._due.end()
        self._engine.wake()
        deadline = None
        while self._is_at_work and not (_has_passed(deadline) or self._stop.urgent):
            if self._stop.requested and deadline is None:
                self._hurry(STOP_SECONDS)
                if self._engine.is_sending:
                    self._stop.on_ending()
                deadline = time.monotonic() + STOP_SECONDS
            self._stop.wait(_until(deadline))
        if self._is_at_work:
            # What is broken off is given back.
            self._hurry(ABORT_SECONDS)
            self._break_off()
        # Where nothing is left nothing was stopped.
        self._report.stopped = self._stop.requested and (self._is_cut_short or self._is_at_work or self._due.has_more())

    def _break_off(self) -> None:
        self._handler.abort()
        deadline = time.monotonic() + ABORT_SECONDS
        while self._is_at_work and not _has_passed(deadline):
            self._stop.wait(_until(deadline))

    # --- in the thread that delivers ---

    def _deliver(self) -> None:
        try:
            self._engine.run(self._due)
        except BaseException as error:  # noqa: BLE001 - it is raised again where the run was started
            self._defect = error
            self._due.lost()
        finally:
            # In this order.  Whether the thread is alive tells nothing: it still is, when it wakes the other one.
            self._is_at_work = False
            self._stop.wake()

    def _note(self, claim: IClaim, result: SendResult) -> None:
        """Count a message, and learn from it whether to go on."""
        if result.unwritten is not None:
            self._due.fail(result.unwritten)
        trouble, report = result.trouble, self._report
        if trouble is not None:
            if trouble.in_message:
                log.warning('%s %s', trouble, what_waits(claim.id, result))
            if self._handler.is_backing_off or not trouble.in_message:
                self._is_server_lost = True
                self._due.end()
        report.trouble = trouble or report.trouble
        if result.settlement is not None:
            report.count(result.settlement)
            self._is_cut_short |= bool(result.settlement.waiting and not result.settlement.counted)
        if self._on_progress is not None:
            self._on_progress(report)


def _has_passed(deadline: float | None) -> bool:
    return deadline is not None and time.monotonic() >= deadline


def _until(deadline: float | None) -> float | None:
    return None if deadline is None else max(0.0, deadline - time.monotonic())
