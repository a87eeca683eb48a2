from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key

from pyramid_mailqueue import init_smtp_mailer, mailer_from_settings
from pyramid_mailqueue.exceptions import ConfigurationError
from pyramid_mailqueue.settings import Rate, Settings, default_tls, known_keys
from pyramid_mailqueue.testing import make_mailer

ENOUGH = {'queue_dir': '/srv/mailqueue', 'smtp_hostname': 'mail.example.org'}


def read(**values):
    return Settings.from_mapping({f'mailqueue.{key}': value for key, value in {**ENOUGH, **values}.items()})


def problems_of(**values):
    with pytest.raises(ConfigurationError) as caught:
        read(**values)
    return str(caught.value).splitlines()


def problem_of(**values):
    (problem,) = problems_of(**values)
    return problem


# --- the table of keys ------------------------------------------------------


def test_the_defaults_are_those_of_the_contract():
    assert dataclasses.asdict(read()) == {
        'queue': 'maildir',
        'queue_dir': Path('/srv/mailqueue'),
        'transports': ('smtp',),
        'delivery': 'background',
        'default_sender': None,
        'smtp_hostname': 'mail.example.org',
        'smtp_port': 25,
        'smtp_username': None,
        'smtp_password': None,
        'smtp_local_hostname': None,
        'smtp_tls': None,
        'smtp_tls_ca_file': None,
        'smtp_connections': 4,
        'smtp_connect_timeout': 10,
        'smtp_timeout': 300,
        'smtp_data_timeout': 600,
        'smtp_idle_timeout': 30,
        'retry_first': 300,
        'retry_max': 4000,
        'lifetime': 5 * 24 * 60 * 60,
        'max_recipients': 100,
        'rate_limit': None,
        'max_message_size': None,
        'redirect_all_to': None,
        'in_doubt': 'hold',
        'keep_dead': None,
        'sql_url': None,
        'sql_session': 'dbsession',
        'sql_lease': 300,
        'sql_notify': False,
        'plugins': ('*',),
        'logging_conf': None,
        'delivery_log': None,
        'queue_log': None,
    }


def test_every_key_says_what_it_is_for_and_can_be_set_to_its_own_default():
    for name, key in known_keys().items():
        assert key.name == name
        assert key.help.endswith('.')
        if key.default is not None:
            assert getattr(read(**{name: key.default}), name) == getattr(Settings(), name)


def test_settings_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        read().smtp_port = 26


def test_passwords_are_neither_in_the_repr_nor_in_an_error():
    secrets = {'smtp_password': 'pa\nss', 'sql_url': 'postgresql://app:pa\nss@db/app'}
    assert {name for name, key in known_keys().items() if key.secret} == set(secrets)

    assert problems_of(smtp_username='me', **secrets) == [
        'mailqueue.smtp_password = (not shown): must be text in one line.',
        'mailqueue.sql_url = (not shown): must be text in one line.',
    ]
    assert 'hush' not in repr(read(smtp_username='me', smtp_password='hush', sql_url='sqlite:///hush'))


# --- values -----------------------------------------------------------------

A_DAY = 24 * 60 * 60

GOOD = [
    ('queue', 'sql', 'sql'),
    ('queue', 'shop.mail:make_queue', 'shop.mail:make_queue'),
    ('queue', 'shop.mail.Queue', 'shop.mail.Queue'),
    ('queue_dir', Path('/srv/other'), Path('/srv/other')),
    ('queue_dir', '/srv/current/../shared', Path('/srv/current/../shared')),
    ('queue_dir', '~/mail', Path.home() / 'mail'),
    ('transports', 'smtp inbox', ('smtp', 'inbox')),
    ('transports', 'smtp, shop.mail:Backup', ('smtp', 'shop.mail:Backup')),
    ('transports', '\nbackup-relay\nsmtp\n', ('backup-relay', 'smtp')),
    ('transports', ['inbox'], ('inbox',)),
    ('delivery', 'queue', 'queue'),
    ('default_sender', 'noreply@example.org', 'noreply@example.org'),
    ('default_sender', 'Ünal <noreply@example.org>', 'Ünal <noreply@example.org>'),
    ('redirect_all_to', ' me@site.example ', 'me@site.example'),
    ('smtp_hostname', 'localhost', 'localhost'),
    ('smtp_hostname', ' mail.example.org. ', 'mail.example.org.'),
    ('smtp_hostname', 'smtp_relay', 'smtp_relay'),
    ('smtp_hostname', '192.0.2.1', '192.0.2.1'),
    ('smtp_hostname', '::1', '::1'),
    ('smtp_hostname', '[2001:db8::1]', '2001:db8::1'),
    ('smtp_port', '2525', 2525),
    ('smtp_port', 587, 587),
    ('smtp_local_hostname', 'web-1.example.org', 'web-1.example.org'),
    ('smtp_local_hostname', '[192.0.2.1]', '[192.0.2.1]'),
    ('smtp_local_hostname', '[IPv6:2001:db8::1]', '[IPv6:2001:db8::1]'),
    ('smtp_tls', 'opportunistic', 'opportunistic'),
    ('smtp_connections', '1', 1),
    ('smtp_timeout', '1d', A_DAY),
    ('lifetime', '300', 300),
    ('lifetime', '90s', 90),
    ('lifetime', '5 m', 5 * 60),
    ('lifetime', '1.5h', 5400),
    ('lifetime', '5d', 5 * A_DAY),
    ('lifetime', 300, 300),
    ('lifetime', 0.5, 0.5),
    ('max_recipients', '1', 1),
    ('rate_limit', '14/second', Rate(14, 1)),
    ('rate_limit', ' 200 / minute ', Rate(200, 60)),
    ('rate_limit', '5000/hour', Rate(5000, 60 * 60)),
    ('rate_limit', '1000000/day', Rate(1_000_000, A_DAY)),
    ('rate_limit', '1/s', Rate(1, 1)),
    ('rate_limit', '1/sec', Rate(1, 1)),
    ('rate_limit', '1/m', Rate(1, 60)),
    ('rate_limit', '1/min', Rate(1, 60)),
    ('rate_limit', '1/h', Rate(1, 60 * 60)),
    ('rate_limit', '1/d', Rate(1, A_DAY)),
    ('rate_limit', ' none ', None),
    ('rate_limit', Rate(1, 0.5), Rate(1, 0.5)),
    ('max_message_size', '10485760', 10 * 1024**2),
    ('max_message_size', '10M', 10 * 1024**2),
    ('max_message_size', '10 MB', 10 * 1024**2),
    ('max_message_size', '25MiB', 25 * 1024**2),
    ('max_message_size', '1.5k', 1536),
    ('max_message_size', '1g', 1024**3),
    ('max_message_size', 4096, 4096),
    ('in_doubt', 'discard', 'discard'),
    ('keep_dead', 'none', None),
    ('keep_dead', '90d', 90 * 86400.0),
    ('sql_url', 'sqlite:////srv/app.db', 'sqlite:////srv/app.db'),
    ('sql_session', 'db', 'db'),
    ('sql_lease', '1s', 1),
    ('sql_notify', 'Yes', True),
    ('sql_notify', 'off', False),
    ('sql_notify', True, True),
    ('sql_notify', 0, False),
    ('plugins', 'one, two', ('one', 'two')),
    ('plugins', 'none', ()),
    ('plugins', [], ()),
    ('queue_log', '/var/log/queue.log', Path('/var/log/queue.log')),
]


@pytest.mark.parametrize(('name', 'value', 'parsed'), GOOD)
def test_a_value_is_read(name, value, parsed):
    result = getattr(read(**{name: value}), name)

    assert result == parsed
    assert type(result) is (float if isinstance(getattr(Settings(), name), float) else type(parsed))


BAD = [
    ('queue', 'maildri', 'must be maildir, sql, or the dotted name of a factory'),
    ('queue', 7, 'must be text in one line'),
    ('queue_dir', 'var/mail', 'must be an absolute path, such as %(here)s/var/mail in an ini file'),
    ('queue_dir', Path('mail'), 'must be an absolute path'),
    ('queue_dir', '~nobody-of-this-name/mail', 'this one begins with the home directory of an unknown user'),
    ('queue_dir', '/srv/mail\nsmtp_port: 25', 'must be a path in one line'),
    ('queue_dir', b'/srv/mail', 'must be a path in one line'),
    ('transports', [], 'must be one or more of smtp, inbox and names of transports'),
    ('transports', ', ,', 'must be names, separated by blanks or commas'),
    ('transports', 'smtp smtp', 'each only once'),
    ('transports', 'smtp; inbox', 'must be one or more of smtp, inbox and names of transports'),
    ('transports', object, 'must be names, separated by blanks or commas'),
    ('transports', [object], 'must be names, separated by blanks or commas'),
    ('delivery', 'foreground', 'must be background, inline or queue'),
    ('default_sender', 'Shop <noreply>', 'must be one mail address such as Shop <noreply@example.org>. '),
    ('default_sender', '<>', 'must be one mail address such as Shop <noreply@example.org>. '),
    ('default_sender', 'a@x.example, b@x.example', 'is not exactly one address'),
    ('redirect_all_to', 'me@site.example, you@site.example', 'must be one mail address'),
    ('default_sender', 'noreply', 'must be one mail address such as Shop <noreply@example.org>. The address'),
    ('smtp_hostname', 'mail.example.org:587', 'alone; the port is set by smtp_port'),
    ('smtp_hostname', '[::1]:587', 'alone; the port is set by smtp_port'),
    ('smtp_hostname', 'smtp://mail.example.org', 'must be a host name or an IP address'),
    ('smtp_hostname', 'mail example', 'must be a host name or an IP address'),
    ('smtp_hostname', 'mail\r\nRSET', 'must be text in one line'),
    ('smtp_hostname', 'm' * 64, 'must be a host name or an IP address'),
    ('smtp_hostname', 'mail.' * 51, 'must be a host name or an IP address'),
    ('smtp_port', 'smtp', 'must be a whole number from 1 to 65535'),
    ('smtp_port', '0', 'must be a whole number from 1 to 65535'),
    ('smtp_port', 65536, 'must be a whole number from 1 to 65535'),
    ('smtp_port', '2_5', 'must be a whole number from 1 to 65535'),
    ('smtp_port', True, 'must be a whole number from 1 to 65535'),
    ('smtp_port', 25.0, 'must be a whole number from 1 to 65535'),
    ('smtp_local_hostname', 'web_1', 'must be a domain name, or an address such as [192.0.2.1]'),
    ('smtp_local_hostname', '[2001:db8::1]', 'or [IPv6:2001:db8::1]'),
    ('smtp_local_hostname', '[IPv6:192.0.2.1]', 'or [IPv6:2001:db8::1]'),
    ('smtp_local_hostname', '[192.0.2.256]', 'an address such as [192.0.2.1]'),
    ('smtp_local_hostname', 'web.' * 64 + 'x', 'must be a domain name'),
    ('smtp_tls', 'yes', 'must be starttls, implicit, opportunistic or off'),
    ('smtp_tls', False, 'must be starttls, implicit, opportunistic or off'),
    ('smtp_connections', '0', 'must be a whole number from 1 to 100'),
    ('smtp_connections', '101', 'must be a whole number from 1 to 100'),
    ('smtp_connect_timeout', '2d', 'greater than 0, at most 1d'),
    ('smtp_data_timeout', 'never', 'must be seconds such as 300, or 90s, 5m, 1.5h or 2d'),
    ('lifetime', '0', 'greater than 0, at most 3650d'),
    ('lifetime', '-5m', 'must be seconds such as 300'),
    ('lifetime', '5M', 'must be seconds such as 300'),
    ('lifetime', '5w', 'must be seconds such as 300'),
    ('lifetime', 'inf', 'must be seconds such as 300'),
    ('lifetime', float('nan'), 'must be seconds such as 300'),
    ('lifetime', float('inf'), 'at most 3650d'),
    ('lifetime', 10**400, 'at most 3650d'),
    ('lifetime', True, 'must be seconds such as 300'),
    ('max_recipients', '0', 'must be a whole number from 1 to'),
    ('rate_limit', '14', 'must be none, or a number and a time such as 14/second, 200/minute, 5000/hour or 50000/day'),
    ('rate_limit', 14, 'must be none, or a number and a time such as 14/second'),
    ('rate_limit', '14/seconds', 'must be none, or a number and a time such as 14/second'),
    ('rate_limit', '14/month', 'must be none, or a number and a time such as 14/second'),
    ('rate_limit', '14/', 'must be none, or a number and a time such as 14/second'),
    ('rate_limit', 'second/14', 'must be none, or a number and a time such as 14/second'),
    ('rate_limit', '1.5/second', 'must be none, or a number and a time such as 14/second'),
    ('rate_limit', '-1/second', 'the number from 1 to 1000000'),
    ('rate_limit', '0/second', 'the number from 1 to 1000000'),
    ('rate_limit', '1000001/day', 'the number from 1 to 1000000'),
    ('rate_limit', Rate(0, 1), 'the number from 1 to 1000000'),
    ('rate_limit', Rate(1, 0), 'must be none, or a number and a time'),
    ('rate_limit', Rate(1, float('nan')), 'must be none, or a number and a time'),
    ('rate_limit', Rate(1, float('inf')), 'must be none, or a number and a time'),
    ('max_message_size', '10X', 'must be bytes such as 10485760, or 512K, 10M or 1G'),
    ('max_message_size', '0.1', 'at least 1'),
    ('max_message_size', True, 'must be bytes such as 10485760'),
    ('in_doubt', 'ask', 'must be hold, send or discard'),
    ('keep_dead', 'never', 'must be none, or seconds such as 300'),
    ('keep_dead', '0', 'must be none, or seconds such as 300'),
    ('sql_session', 'request.db', 'must be the name of an attribute of the request'),
    ('sql_session', 7, 'must be the name of an attribute of the request'),
    ('sql_lease', '0.5s', 'from 1s to 1d'),
    ('sql_notify', 'perhaps', 'must be true or false'),
    ('delivery_log', 'delivery.log', 'must be an absolute path, such as %(here)s/delivery.log'),
    ('logging_conf', './etc/logging.ini', 'must be an absolute path, such as %(here)s/etc/logging.ini'),
    ('logging_conf', '/nowhere/logging.ini', 'must be a file that can be read (No such file or directory)'),
    ('logging_conf', '/dev', 'must be a file that can be read (it is no regular file)'),
    ('logging_conf', '/dev/null', 'must be a file that can be read (it is no regular file)'),
    ('smtp_tls_ca_file', '/nowhere/ca.pem', 'must be a file that can be read (No such file or directory)'),
]


@pytest.mark.parametrize(('name', 'value', 'allowed'), BAD)
def test_an_error_names_the_key_the_value_and_what_is_allowed(name, value, allowed):
    problem = problem_of(**{name: value})

    assert problem.startswith(f'mailqueue.{name} = {value!r}: must be')
    assert allowed in problem


def test_a_logging_configuration_that_is_there_is_accepted(tmp_path):
    path = tmp_path / 'logging.ini'
    path.touch()

    assert read(logging_conf=str(path)).logging_conf == path


@pytest.mark.parametrize('name', sorted(known_keys().keys() - {'queue_dir', 'smtp_hostname'}))
@pytest.mark.parametrize('empty', ['', ' \n ', None])
def test_an_empty_value_means_not_set(name, empty):
    assert read(**{name: empty}) == read()


def test_blanks_around_a_password_set_in_code_belong_to_it():
    assert read(smtp_username='me', smtp_password=' secret ').smtp_password == ' secret '


# --- unknown keys -----------------------------------------------------------


@pytest.mark.parametrize(
    ('key', 'meant'),
    [('smtp_host', 'smtp_hostname'), ('SMTP_PORT', 'smtp_port'), ('hostname', 'smtp_hostname'), ('retry', 'retry_max')],
)
def test_an_unknown_key_is_an_error_that_names_the_one_which_was_meant(key, meant):
    assert problem_of(**{key: '1'}) == f"mailqueue.{key} = '1': there is no such key. Did you mean mailqueue.{meant}?"


def test_with_a_key_like_no_other_all_that_there_are_are_named():
    assert problem_of(colour='red') == (
        f"mailqueue.colour = 'red': there is no such key. The keys are {', '.join(known_keys())}."
    )


@pytest.mark.parametrize(
    'key',
    ['PASSWORD', 'smtp_pasword', 'smtp_passwd', 'smtp_pw', 'api_token', 'client_secret', 'database_url', 'sql_ulr'],
)
def test_the_value_of_an_unknown_key_is_not_shown_if_it_may_be_a_secret(key):
    problem = problem_of(**{key: 'hush'})

    assert problem.startswith(f'mailqueue.{key} = (not shown): there is no such key.')
    assert 'hush' not in problem


def test_the_keys_of_others_are_left_alone():
    settings = {'mailqueue.queue_dir': '/q', 'mailqueue.smtp_hostname': 'mx', 'mail.host': 'x', 'mailqueues.port': '0'}

    assert Settings.from_mapping(settings) == Settings(queue_dir=Path('/q'), smtp_hostname='mx')


def test_the_prefix_can_be_another_one():
    assert Settings.from_mapping({'mq{}.queue_dir': '/q', 'mq{}.smtp_hostname': 'mx'}, 'mq{}.').smtp_hostname == 'mx'
    with pytest.raises(ConfigurationError, match=r'^mq\.queue_dir is missing: with mq\.queue = maildir '):
        Settings.from_mapping({'mq.smtp_hostname': 'mx', 'mailqueue.queue_dir': '/q'}, 'mq.')


# --- what is missing, what contradicts --------------------------------------


def test_all_problems_are_told_at_once_and_each_only_once():
    assert [problem.split(' ')[0] for problem in problems_of(smtp_port='x', smtp_hostname='', lifetim='5d')] == [
        'mailqueue.smtp_port',
        'mailqueue.lifetim',
        'mailqueue.smtp_hostname',
    ]


def test_a_key_that_cannot_be_read_is_not_reported_as_missing_too():
    assert problem_of(smtp_hostname='a b').startswith('mailqueue.smtp_hostname =')
    assert problem_of(queue_dir='mail').startswith('mailqueue.queue_dir =')
    assert problem_of(smtp_tls='implicit', smtp_port='x').startswith('mailqueue.smtp_port =')
    assert problem_of(smtp_username='me', smtp_password='a\0b').startswith('mailqueue.smtp_password =')


CONTRADICTIONS = [
    ({'queue_dir': ''}, 'mailqueue.queue_dir is missing: with mailqueue.queue = maildir'),
    (
        {'queue': 'shop.mail:Queue', 'queue_dir': '', 'rate_limit': '14/second'},
        'mailqueue.queue_dir is missing: mailqueue.rate_limit is set, and needs a directory',
    ),
    ({'queue_dir': '', 'rate_limit': '14/second'}, 'mailqueue.queue_dir is missing: with mailqueue.queue = maildir'),
    ({'smtp_hostname': ''}, 'mailqueue.smtp_hostname is missing: mailqueue.transports has smtp'),
    ({'smtp_username': 'me'}, 'mailqueue.smtp_password is missing: mailqueue.smtp_username is set'),
    ({'smtp_password': 'x'}, 'mailqueue.smtp_username is missing: mailqueue.smtp_password is set'),
    (
        {'smtp_tls': 'off', 'smtp_username': 'me', 'smtp_password': 'x'},
        'mailqueue.smtp_tls = off would send mailqueue.smtp_password in clear text to mail.example.org',
    ),
    ({'smtp_tls': 'off', 'smtp_port': 465}, 'mailqueue.smtp_tls = off does not go with mailqueue.smtp_port = 465'),
    ({'smtp_tls': 'starttls', 'smtp_port': 465}, 'does not go with mailqueue.smtp_port = 465, where TLS is implicit'),
    ({'smtp_tls': 'opportunistic', 'smtp_port': 465}, 'for starttls the port is usually 587'),
    ({'retry_first': '2h'}, 'mailqueue.retry_first = 7200s is longer than mailqueue.retry_max = 4000s'),
]


@pytest.mark.parametrize(('values', 'text'), CONTRADICTIONS)
def test_a_contradiction_names_both_keys(values, text):
    assert text in problem_of(**values)


@pytest.mark.parametrize(
    'values',
    [
        {'queue': 'sql', 'queue_dir': ''},
        {'queue': 'sql', 'queue_dir': '', 'rate_limit': 'none'},
        {'queue': 'sql', 'rate_limit': '14/second'},
        {'transports': 'inbox', 'smtp_hostname': ''},
        {'smtp_tls': 'off', 'smtp_username': 'me', 'smtp_password': 'x', 'smtp_hostname': '127.0.0.1'},
        {'smtp_tls': 'off', 'smtp_username': 'me', 'smtp_password': 'x', 'smtp_hostname': '', 'transports': 'inbox'},
        {'smtp_tls': 'off'},
        {'smtp_tls': 'implicit', 'smtp_port': '465'},
        *({'smtp_tls': 'implicit', 'smtp_port': port} for port in ('1', '25', 587, '2465', 65535)),
        {'smtp_tls': 'starttls', 'smtp_port': '587'},
        {'retry_first': '4000s'},
    ],
)
def test_what_goes_together_is_accepted(values):
    read(**values)


def empty_revocation_list(authority):
    """A PEM file that OpenSSL takes, although there is no certificate in it."""
    certificate = x509.load_pem_x509_certificate(authority.cert_pem.bytes())
    key = load_pem_private_key(authority.private_key_pem.bytes(), None)
    builder = x509.CertificateRevocationListBuilder().issuer_name(certificate.subject)
    builder = builder.last_update(certificate.not_valid_before_utc).next_update(certificate.not_valid_after_utc)
    return builder.sign(key, SHA256()).public_bytes(Encoding.PEM)


def test_a_file_of_certificates_is_read_at_once(tmp_path):
    certificates, text, empty, revoked = (tmp_path / name for name in ('ca.pem', 'notes.txt', 'empty', 'crl.pem'))
    authority = trustme.CA()
    authority.cert_pem.write_to_path(certificates)
    text.write_text('no certificate in here')
    empty.write_text('')
    revoked.write_bytes(empty_revocation_list(authority))

    assert read(smtp_tls_ca_file=certificates).smtp_tls_ca_file == certificates
    for path in (text, empty, revoked):
        assert problem_of(smtp_tls_ca_file=str(path)).startswith(
            f"mailqueue.smtp_tls_ca_file = '{path}': must be a file of certificates in PEM format"
        )
    assert problem_of(smtp_tls_ca_file='ca.pem').startswith(
        "mailqueue.smtp_tls_ca_file = 'ca.pem': must be an absolute path"
    )


@pytest.fixture
def ca_file(tmp_path):
    trustme.CA().cert_pem.write_to_path(tmp_path / 'ca.pem')
    return tmp_path / 'ca.pem'


@pytest.mark.parametrize('host', ['mail.example.org', 'localhost'])
@pytest.mark.parametrize('mode', ['opportunistic', 'off'])
def test_certificates_contradict_a_mode_that_verifies_none(ca_file, mode, host):
    assert problem_of(smtp_tls=mode, smtp_tls_ca_file=str(ca_file), smtp_hostname=host) == (
        f'mailqueue.smtp_tls_ca_file is of no use with mailqueue.smtp_tls = {mode}, which verifies no certificate. '
        'Remove one of them.'
    )


@pytest.mark.parametrize(
    ('hostname', 'port', 'mode'),
    [('localhost', 25, 'starttls'), ('localhost', 465, 'implicit'), ('mail.site.example', 25, 'starttls')],
)
def test_who_names_certificates_wants_them_verified_on_this_host_too(hostname, port, mode):
    assert default_tls(hostname, port, has_ca_file=True) == mode


@pytest.mark.parametrize(
    ('hostname', 'port', 'mode'),
    [
        ('mail.site.example', 25, 'starttls'),
        ('mail.site.example', 465, 'implicit'),
        ('localhost', 465, 'implicit'),
        ('mail.site.example', 587, 'starttls'),
        ('localhost', 25, 'opportunistic'),
        ('::1', 25, 'opportunistic'),
        ('127.0.0.2', 25, 'opportunistic'),
    ],
)
def test_tls_is_required_unless_the_server_is_this_host(hostname, port, mode):
    assert default_tls(hostname, port, has_ca_file=False) == mode


# --- the database -----------------------------------------------------------


@pytest.mark.parametrize(
    ('own', 'of_the_app', 'url'),
    [
        ({}, {}, None),
        ({}, {'sqlalchemy.url': 'sqlite:///app.db'}, 'sqlite:///app.db'),
        ({'sql_url': ''}, {'sqlalchemy.url': 'sqlite:///app.db'}, 'sqlite:///app.db'),
        ({'sql_url': 'sqlite:///mail.db'}, {'sqlalchemy.url': 'sqlite:///app.db'}, 'sqlite:///mail.db'),
        ({}, {'sqlalchemy.url': SimpleNamespace()}, None),
    ],
)
def test_the_database_is_that_of_the_app_unless_another_is_named(own, of_the_app, url):
    settings = {f'mailqueue.{key}': value for key, value in {**ENOUGH, **own}.items()}

    assert Settings.from_mapping({**settings, **of_the_app}).sql_url == url


@pytest.mark.parametrize(('own', 'port'), [({}, 465), ({'smtp_port': ''}, 465), ({'smtp_port': '25'}, 25)])
def test_implicit_tls_is_on_its_own_port_unless_there_is_another(own, port):
    given = {'smtp_hostname': 'mail.example.org', 'smtp_tls': 'implicit', **own}

    assert read(**given).smtp_port == port
    assert Settings.from_program(given).smtp_port == port
    assert Settings.from_mqrunner_section(given).smtp_port == port


# --- [mqrunner] -------------------------------------------------------------

# A configuration of mailqueue-runner 1.0, with all of its documented keys but logging_conf.
MQRUNNER = {
    'smtp_hostname': 'mail.example.org',
    'smtp_port': '587',
    'smtp_username': 'someuser@site.example',
    'smtp_password': 'secret',
    'smtp_tls': 'yes',
    'smtp_tls_verify': 'yes',
    'queue_dir': '/path/to/mailqueue',
    'from': 'user@host.example',
    'plugins': '*',
    'delivery_log': '/path/to/delivery.log',
    'queue_log': '/path/to/queue.log',
    'here': '/path/to',
    '__file__': '/path/to/mq.conf',
}


def test_a_configuration_of_mailqueue_runner_is_read(tmp_path):
    logging_conf = tmp_path / 'logging.conf'
    logging_conf.touch()

    assert Settings.from_mqrunner_section({**MQRUNNER, 'logging_conf': str(logging_conf)}) == Settings(
        default_sender='user@host.example',
        smtp_hostname='mail.example.org',
        smtp_port=587,
        smtp_username='someuser@site.example',
        smtp_password='secret',
        smtp_tls='starttls',
        queue_dir=Path('/path/to/mailqueue'),
        logging_conf=logging_conf,
        delivery_log=Path('/path/to/delivery.log'),
        queue_log=Path('/path/to/queue.log'),
    )


@pytest.mark.parametrize(('port', 'mode'), [('465', 'implicit'), (465, 'implicit'), ('587', 'starttls')])
def test_smtp_tls_yes_of_mailqueue_runner_fits_the_port(port, mode):
    assert Settings.from_mqrunner_section({**MQRUNNER, 'smtp_port': port}).smtp_tls == mode


def test_mqrunner_may_leave_the_queue_directory_to_the_command_line():
    section = {key: value for key, value in MQRUNNER.items() if key != 'queue_dir'}

    assert Settings.from_mqrunner_section(section).queue_dir is None


@pytest.mark.parametrize(
    ('values', 'text'),
    [
        ({'smtp_port': 'x'}, "[mqrunner] smtp_port = 'x': must be a whole number from 1 to 65535."),
        ({'logging_config': '/x'}, "[mqrunner] logging_config = '/x': must be a file that can be read"),
        ({'from': 'me'}, "[mqrunner] from = 'me': must be one mail address"),
        ({'log': '/x'}, "[mqrunner] log = '/x': there is no such key."),
        ({'smtp_hostname': ''}, '[mqrunner] smtp_hostname is missing: [mqrunner] transports has smtp'),
        (
            {'smtp_tls_verify': 'no'},
            "[mqrunner] smtp_tls_verify = 'no': there is no such key, because certificates are ",
        ),
        ({'smtp_tls': 'no'}, "[mqrunner] smtp_tls = 'no': must be starttls, implicit, opportunistic or off."),
    ],
)
def test_errors_of_mqrunner_name_section_and_key(values, text):
    with pytest.raises(ConfigurationError) as caught:
        Settings.from_mqrunner_section({**MQRUNNER, **values})

    assert str(caught.value).startswith(text)


def test_what_mailqueue_runner_calls_otherwise_is_taken_unless_it_is_there_under_our_name(tmp_path):
    (tmp_path / 'logging.conf').touch()
    theirs = {'from': 'theirs@host.example', 'logging_config': str(tmp_path / 'logging.conf')}
    ours = {'default_sender': 'ours@host.example', 'logging_conf': '/dev/null/nothing'}

    read = Settings.from_mqrunner_section({**MQRUNNER, **theirs})
    assert (read.default_sender, read.logging_conf) == ('theirs@host.example', tmp_path / 'logging.conf')
    with pytest.raises(ConfigurationError, match=r'\[mqrunner\] logging_conf = '):
        Settings.from_mqrunner_section({**MQRUNNER, **theirs, **ours})


@pytest.mark.parametrize(
    ('verify', 'own', 'is_taken'),
    [
        ('yes', {}, True),
        ('true', {'smtp_tls': None}, True),
        (True, {'smtp_tls': None, 'smtp_port': 465}, True),
        ('no', {'smtp_tls': 'opportunistic'}, True),
        ('No', {'smtp_tls': None, 'smtp_hostname': 'localhost'}, True),
        ('', {}, True),
        ('no', {}, False),
        ('yes', {'smtp_tls': 'opportunistic'}, False),
        ('yes', {'smtp_tls': None, 'smtp_hostname': 'localhost'}, False),
        ('no', {'smtp_tls': None, 'smtp_hostname': 'localhost', 'smtp_port': '465'}, False),
        ('maybe', {}, False),
    ],
)
def test_smtp_tls_verify_is_taken_where_it_asks_for_what_is_done_anyway(verify, own, is_taken):
    section = {**MQRUNNER, **own, 'smtp_tls_verify': verify}

    if is_taken:
        assert Settings.from_mqrunner_section(section)
    else:
        with pytest.raises(ConfigurationError, match='certificates are verified wherever TLS is required'):
            Settings.from_mqrunner_section(section)


# --- what a program brings along --------------------------------------------


@pytest.mark.parametrize('prefix', ['', 'mailqueue.'])
def test_a_program_brings_its_keys_with_the_prefix_or_without(prefix):
    given = {'smtp_hostname': 'mail.example.org', 'smtp_port': 587, 'smtp_tls': 'yes', 'plugins': 'one, two'}

    assert Settings.from_program({f'{prefix}{key}': value for key, value in given.items()}) == Settings(
        smtp_hostname='mail.example.org', smtp_port=587, smtp_tls='starttls', plugins=('one', 'two')
    )


def test_a_key_with_the_prefix_goes_before_the_same_without_it():
    given = {'mailqueue.smtp_hostname': 'first.example', 'smtp_hostname': 'second.example', 'smtp_port': '26'}

    assert Settings.from_program(given) == Settings(smtp_hostname='first.example', smtp_port=26)


# What else is in the settings of an app.
OF_AN_APP = {
    'pyramid.reload_templates': True,
    'pyramid.includes': 'pyramid_debugtoolbar',
    'debugtoolbar.hosts': ['127.0.0.1'],
    'session.secret': 'x',
    'mail.host': 'localhost',
    'smtp.host': 'localhost',
    'retry.attempts': '3',
    'tm.manager_hook': 'pyramid_tm.explicit_manager',
    'jinja2.filters': {},
    'here': '/srv/shop',
    '__file__': '/srv/shop/production.ini',
    'shop_name': 'Shop',
    'debug': True,
    'mailqueue': 'x',
    'mailqueue_dir': '/x',
    'Mailqueue.smtp_port': 'x',
    ' mailqueue.smtp_port': 'x',
    '': '',
}


@pytest.mark.parametrize('prefix', ['', 'mailqueue.'])
def test_the_settings_of_an_app_may_be_given_as_they_are(prefix):
    own = {'smtp_hostname': 'mail.example', 'smtp_tls': 'yes', 'from': 'shop@site.example'}
    given = {f'{prefix}{key}': value for key, value in own.items()}

    assert Settings.from_program(OF_AN_APP | given) == Settings(
        smtp_hostname='mail.example', smtp_tls='starttls', default_sender='shop@site.example'
    )
    with pytest.raises(ConfigurationError, match=f'^{prefix}smtp_prot = 25: there is no such key'):
        Settings.from_program(OF_AN_APP | given | {f'{prefix}smtp_prot': 25})


def test_the_settings_of_an_app_name_its_database():
    given = {'mailqueue.smtp_hostname': 'mail.example', 'sqlalchemy.url': 'sqlite://'}

    assert Settings.from_program(given).sql_url == 'sqlite://'
    assert Settings.from_program(given | {'mailqueue.sql_url': 'sqlite:///x'}).sql_url == 'sqlite:///x'


def test_an_app_that_reads_other_keys_of_its_own_about_mail_is_none_of_ours():
    theirs = {'smtp_server': 'other.example', 'smtp_user': 'me'}

    assert Settings.from_program({'mailqueue.smtp_hostname': 'mail.example', **theirs}) == Settings(
        smtp_hostname='mail.example'
    )


@pytest.mark.parametrize('key', ['mailqueue.smtp_prot', 'mailqueue.lifetme', 'mailqueue.', 'mailqueue.x.y'])
def test_a_key_with_the_prefix_that_does_not_exist_is_told_beside_those_of_an_app(key):
    given = OF_AN_APP | {'mailqueue.queue_dir': '/srv/mail', 'mailqueue.smtp_hostname': 'mail.example', key: '1'}

    for entry in (Settings.from_mapping, Settings.from_program, mailer_from_settings, make_mailer, init_smtp_mailer):
        with pytest.raises(ConfigurationError) as caught:
            entry(given)
        assert str(caught.value).startswith(f"{key} = '1': there is no such key. ")


@pytest.mark.parametrize(
    ('given', 'text'),
    [
        (
            {'smtp_hostname': 'mail.example', 'smtp_prot': 25},
            'smtp_prot = 25: there is no such key. Did you mean smtp',
        ),
        ({'mailqueue.smtp_port': 'x', 'smtp_hostname': 'mail.example'}, "mailqueue.smtp_port = 'x': must be a whole"),
        ({'smtp_port': 25}, 'smtp_hostname is missing: transports has smtp'),
    ],
)
def test_errors_name_the_keys_as_the_program_has_written_them(given, text):
    with pytest.raises(ConfigurationError) as caught:
        Settings.from_program(given)

    assert str(caught.value).startswith(text)


def test_who_brings_a_handler_needs_no_server():
    assert Settings.from_program({'plugins': 'one'}, needs_server=False) == Settings(plugins=('one',))
