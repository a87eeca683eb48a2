"""
The demo with one command: ``python -m demo [INI]``.

Needs no other server.  It creates the database, the queue and the inbox in ``demo/var``, starts the SMTP server and
the web server, and says what to try.
"""

from __future__ import annotations

import contextlib
import errno
import sys
from pathlib import Path

import plaster
from pyramid.paster import get_app, setup_logging
from waitress import create_server

from demo.relay import RelayError
from demo.views.live import mq_run

WELCOME = """
  The demo of pyramid_mailqueue is running:  {url}

  1. Sign up.  The row and the welcome mail are committed together, and the mail arrives.
  2. Press "Sign up, but fail afterwards".  The view raises after the mail was sent: no row, no mail.
  3. Turn the SMTP server off on the page, and sign up.  The page is as fast as before, and one mail waits.
  4. Turn the server on again.  What waits leaves by itself in a few seconds, or at once with this, in another terminal:

       {mq_run}

  5. Open the dashboard, {url}mailqueue, to see what waits, and to hold, retry or delete it.

  Ctrl-C ends the demo.  What it wrote stays in {var}
"""


def main(argv):
    """Run the demo until Ctrl-C; return the exit status."""
    ini = str(Path(argv[0] if argv else Path(__file__).with_name('development.ini')).resolve())
    setup_logging(ini)
    try:
        app = get_app(ini)
    except RelayError as error:
        print(error, file=sys.stderr)
        return 1
    server = listen(app, plaster.get_settings(ini, 'server:main')['listen'])
    url = f'http://{server.effective_host}:{server.effective_port}/'
    var = Path(app.registry.settings['demo.inbox_dir']).parent
    print(WELCOME.format(url=url, mq_run=mq_run(ini), var=var), flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        server.run()
    print('\n  The demo has ended.')
    return 0


def listen(app, address):
    """Return a web server at *address*, ``host:port``; at a free port of that host if this one is taken."""
    host, _, port = address.rpartition(':')
    try:
        return create_server(app, host=host, port=port)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
    server = create_server(app, host=host, port=0)
    print(f'Port {port} is taken, so the demo takes {server.effective_port}.')
    return server


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
