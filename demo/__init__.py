"""A small Pyramid app: a sign-up makes a row in the database and a mail, both or neither."""

from __future__ import annotations

import warnings

# Pyramid 2.1 uses pkg_resources; without this, the demo would begin its output with that.
warnings.filterwarnings('ignore', 'pkg_resources is deprecated', UserWarning)

from pyramid.config import Configurator  # noqa: E402 - behind the filter

__all__ = ['main']


def main(global_config, **settings):
    """Return the WSGI app, with its SMTP server running: what ``pserve`` and ``python -m demo`` call."""
    # The path of the ini file as mq-run needs it, in any directory.
    settings['demo.ini'] = global_config['__file__']
    with Configurator(settings=settings) as config:
        config.include('pyramid_jinja2')
        config.include('pyramid_tm')
        config.include('pyramid_retry')
        config.include('pyramid_mailqueue')
        config.include('pyramid_mailqueue.dashboard', route_prefix='/mailqueue')
        config.include('.models')
        config.include('.relay')
        config.include('.security')
        config.include('.routes')
        config.scan('.views')
        return config.make_wsgi_app()
