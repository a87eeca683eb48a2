"""
The application whose requests are timed: one view, which sends one mail in a transaction.

    python request_app.py nothing|ours|ours-same|pyramid_mailer SETTINGS_JSON REQUESTS

Prints the seconds of each request, one a line.  ``ours-same`` sends the message object of pyramid_mailer.
"""

from __future__ import annotations

import json
import sys
import time
from email.message import EmailMessage

from pyramid.config import Configurator
from pyramid.response import Response
from webob import Request

# Four KiB, as most of a newsletter or an order confirmation is.
BODY = ''.join(f'{number:4} A line of text, as long as a line of a mail is.\n' for number in range(75))


def send_ours(request):
    message = EmailMessage()
    message['From'], message['To'], message['Subject'] = 'shop@site.example', 'someone@site.example', 'Your order'
    message.set_content(BODY)
    request.mailer.send(message)
    return Response('sent')


def their_message():
    from pyramid_mailer.message import Message

    return Message('Your order', ['someone@site.example'], BODY, sender='shop@site.example')


def send_theirs_with_ours(request):
    request.mailer.send(their_message())
    return Response('sent')


def send_with_pyramid_mailer(request):
    send = request.mailer.send_to_queue if 'mail.queue_path' in request.registry.settings else request.mailer.send
    send(their_message())
    return Response('sent')


def send_nothing(request):
    return Response('sent')


WAYS = {
    'nothing': (send_nothing, None),
    'ours': (send_ours, 'pyramid_mailqueue'),
    'ours-same': (send_theirs_with_ours, 'pyramid_mailqueue'),
    'pyramid_mailer': (send_with_pyramid_mailer, 'pyramid_mailer'),
}


def make_app(which, settings):
    with Configurator(settings=settings) as config:
        config.include('pyramid_tm')
        view, package = WAYS[which]
        if package:
            config.include(package)
        config.add_route('send', '/')
        config.add_view(view, route_name='send')
    return config.make_wsgi_app()


def main():
    which, settings, requests = sys.argv[1:]
    app = make_app(which, json.loads(settings))
    for number in range(int(requests) + 20):
        request = Request.blank('/')
        start = time.perf_counter()
        response = request.get_response(app)
        seconds = time.perf_counter() - start
        assert response.status_code == 200, response
        # The first ones warm up.
        if number >= 20:
            print(seconds)
        # As between the requests of one process on a busy site: nobody's background work piles up for ever.
        time.sleep(0.002)


if __name__ == '__main__':
    main()
