"""
The SMTP server of the demo: a real one, on a socket of 127.0.0.1, with a switch.

It runs in a thread of the web process, but the web process does not depend on that: it speaks SMTP to it as to any
other server, and so does ``mq-run``, which reads the address in the same ini file.
"""

from __future__ import annotations

import logging
import socket
import threading
import weakref

from aiosmtpd.controller import Controller
from pyramid.events import ApplicationCreated

from demo.inbox import Inbox

__all__ = ['Relay', 'RelayError', 'includeme']

log = logging.getLogger(__name__)

HOST = '127.0.0.1'
REFUSED = 'nobody@'


class RelayError(Exception):
    """The SMTP server cannot be started."""


class Relay:
    """
    The server and its switch.

    :param inbox: where arriving mails are kept
    :param port: the TCP port on 127.0.0.1
    """

    def __init__(self, inbox, port):
        self.inbox = inbox
        self.port = port
        self._controller = None
        self._lock = threading.Lock()

    @property
    def on(self):
        """Whether it is running."""
        return self._controller is not None

    def switch_on(self):
        """Start listening, if it does not yet.  Raises :class:`RelayError`."""
        with self._lock:
            if self.on:
                return
            try:
                listening = socket.create_server((HOST, self.port))
            except OSError as error:
                raise RelayError(
                    f'The SMTP server of the demo cannot listen on {HOST}:{self.port}: {error.strerror}.  Stop the '
                    f'program that uses this port (is the demo running already?), or set another number as '
                    f'mailqueue.smtp_port in the ini file.'
                ) from error
            controller = _Controller(_Handler(self.inbox), listening)
            controller.start()
            self._controller = controller
            log.info('the SMTP server listens on %s:%s', HOST, self.port)

    def switch_off(self):
        """Stop listening and hang up, if it is running."""
        with self._lock:
            if self.on:
                self._controller.stop()
                self._controller = None
                log.info('the SMTP server is off')


class _Controller(Controller):
    """The server in its thread; a new one for each time it is switched on."""

    def __init__(self, handler, listening):
        host, port = listening.getsockname()
        # A server_hostname, so that aiosmtpd does not look up ours in the DNS.
        super().__init__(handler, hostname=host, port=port, server_hostname='localhost', ident='ESMTP of the demo')
        self._listening = listening
        self._sessions = weakref.WeakSet()

    def _create_server(self):
        # The socket is there already: a port that is taken is an error in the thread that can report it.
        return self.loop.create_server(self._factory_invoker, sock=self._listening)

    def factory(self):
        session = super().factory()
        self._sessions.add(session)
        return session

    def cancel_tasks(self, stop_loop=True):
        # Runs in the server's thread.  A client may hold an idle session for later: without the hang-up it would wait
        # for the answer of a server that is gone.
        for session in self._sessions:
            if session.transport is not None:
                session.transport.abort()
        super().cancel_tasks(stop_loop)


class _Handler:
    def __init__(self, inbox):
        self._inbox = inbox

    async def handle_RCPT(self, server, session, envelope, address, options):
        if address.lower().startswith(REFUSED):
            return '550 5.1.1 No such user here'
        envelope.rcpt_tos.append(address)
        return '250 2.1.5 OK'

    async def handle_DATA(self, server, session, envelope):
        self._inbox.store(envelope.mail_from, envelope.rcpt_tos, envelope.content)
        return '250 2.0.0 Kept'


def includeme(config):
    """Make the server of ``mailqueue.smtp_port`` the registry's ``demo.relay``, and start it when the app is made."""
    settings = config.get_settings()
    relay = Relay(Inbox(settings['demo.inbox_dir']), int(settings['mailqueue.smtp_port']))
    config.registry['demo.relay'] = relay
    config.add_subscriber(lambda event: relay.switch_on(), ApplicationCreated)
