"""The addresses of the app."""

from __future__ import annotations


def includeme(config):
    """Register the routes and the static files."""
    config.add_static_view('static', 'static', cache_max_age=None)
    config.add_route('home', '/')
    config.add_route('live', '/live')
    config.add_route('relay', '/relay')
    config.add_route('mail', '/inbox/{key}')
