"""The sign-up: one row and one mail, in one transaction."""

from __future__ import annotations

from dataclasses import dataclass
from email.message import EmailMessage

from pyramid.httpexceptions import HTTPSeeOther
from pyramid.renderers import render
from pyramid.view import view_config
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError

from demo.models import SignUp
from demo.views.live import live_parts
from pyramid_mailqueue import AddressError, check_address

SENDER = 'Demo Club <welcome@demo.example>'

# Names to sign up with one click.
PEOPLE = (
    ('Ada Lovelace', 'ada@example.org'),
    ('Grace Hopper', 'grace@example.org'),
    ('Katherine Johnson', 'katherine@example.org'),
    ('Alan Turing', 'alan@example.org'),
    ('Radia Perlman', 'radia@example.org'),
    ('Jon Postel', 'jon@example.org'),
    ('Barbara Liskov', 'barbara@example.org'),
    ('Edsger Dijkstra', 'edsger@example.org'),
)


class FailedAfterwardsError(Exception):
    """What the second button is for: something goes wrong in the view after the mail was "sent"."""


@dataclass(frozen=True)
class Form:
    """What the visitor typed, without the blanks around it."""

    name: str = ''
    email: str = ''

    @classmethod
    def from_post(cls, post):
        """Read the fields of a POST."""
        return cls(post.get('name', '').strip(), post.get('email', '').strip())

    def problems(self):
        """Return what is wrong, field by field, as far as it can be seen without the mailer."""
        problems = {}
        if not self.name:
            problems['name'] = 'Please tell us a name.'
        elif len(self.name) > 80 or not self.name.isprintable():
            problems['name'] = 'Please take a name of at most 80 characters, on one line.'
        if not self.email:
            problems['email'] = 'Please tell us where to send the mail.'
        return problems


@view_config(route_name='home', request_method='GET', renderer='demo:templates/home.jinja2')
def home(request):
    """The form, filled in with a name that is not on the list yet."""
    taken = request.dbsession.scalars(select(SignUp.email).where(SignUp.email.in_(dict(PEOPLE).values()))).all()
    free = (Form(name, email) for name, email in PEOPLE if email not in taken)
    return page(request, next(free, Form()))


@view_config(route_name='home', request_method='POST', renderer='demo:templates/home.jinja2')
def sign_up(request):
    """Write the row and send the mail; the commit after this view makes both real, or neither."""
    form = Form.from_post(request.POST)
    if problems := form.problems():
        return again(request, form, problems)

    try:
        request.mailer.send(welcome(request, form))
    except AddressError as error:
        return again(request, form, {'email': str(error)})

    request.dbsession.add(SignUp(name=form.name, email=form.email))
    try:
        request.dbsession.flush()
    except IntegrityError:
        # The mail is part of the transaction already, and is dropped with the row.
        request.tm.abort()
        request.tm.begin()
        return again(request, form, {'email': 'This address is on the list already.'})

    if 'fail' in request.POST:
        raise FailedAfterwardsError(form)
    request.session.flash(f'{form.name} is on the list, and a mail to {form.email} is on its way.')
    return HTTPSeeOther(request.route_url('home'))


def welcome(request, form):
    """Return the welcome mail; raises AddressError."""
    message = EmailMessage()
    message['From'] = SENDER
    # One mailbox: "To" is a list, and without the check the form could send mail to any number of addresses.
    message['To'] = check_address(form.email)
    message['Subject'] = f'Welcome, {form.name}'
    message.set_content(render('demo:templates/welcome.txt.jinja2', {'form': form}, request))
    return message


def again(request, form, problems):
    """Show the form once more, with what is wrong."""
    request.response.status_int = 422
    return page(request, form, problems)


def page(request, form, problems=None):
    """Return what ``home.jinja2`` shows."""
    return {
        'form': form,
        'problems': problems or {},
        'notes': request.session.pop_flash(),
        'flashed_problems': request.session.pop_flash('problem'),
        **live_parts(request),
    }
