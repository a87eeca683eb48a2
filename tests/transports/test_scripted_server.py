"""The scripted SMTP server, with the client of the standard library on the other side."""

from __future__ import annotations

import smtplib
import threading

import pytest

from pyramid_mailqueue.testing import Close, Drip, ReceivedMessage, ScriptedSMTPServer, Silence, Wait

A, B = 'a@x.example', 'b@x.example'
SENDER = 'sender@site.example'
CONTENT = 'Subject: s\r\n\r\n.hello\r\n'


def client_of(server):
    return smtplib.SMTP(server.host, server.port, local_hostname='client.example', timeout=10)


def test_without_a_script_it_takes_any_message():
    with ScriptedSMTPServer() as server, client_of(server) as client:
        client.sendmail(SENDER, [A, B], CONTENT, mail_options=['BODY=8BITMIME'])

        assert server.messages == [ReceivedMessage(SENDER, (A, B), CONTENT.encode(), ('size=22', 'BODY=8BITMIME'))]
        (session,) = server.sessions
        assert session.commands[0] == 'ehlo client.example'
        assert session.received.endswith(b'\r\n..hello\r\n.\r\n')
        assert session.round_trips == len(['EHLO', 'MAIL', 'RCPT', 'RCPT', 'DATA', 'content'])


def test_a_whole_command_goes_before_its_verb_and_a_sequence_answers_time_after_time():
    script = {'RCPT TO:<b@x.example>': '550 not b', 'RCPT': ['450 first', None, '451 third']}
    with ScriptedSMTPServer(script) as server, client_of(server) as client:
        client.ehlo()
        client.docmd('MAIL FROM:<sender@site.example>')
        codes = [client.docmd(f'RCPT TO:<{name}@x.example>')[0] for name in 'abccdb']

    assert codes == [450, 550, 250, 451, 250, 550]


def test_a_session_may_have_a_script_of_its_own_which_goes_before_the_common_one():
    script = {'NOOP': ['250 first', '250 second', '250 third'], 'RSET': '250 common'}
    own = {'NOOP': ['250 own'], 'RSET x': '250 whole'}
    said = []
    with ScriptedSMTPServer(script, by_session={1: own}) as server:
        for _ in range(3):
            with client_of(server) as client:
                said.append([client.docmd(command)[1].decode() for command in ('NOOP', 'NOOP', 'RSET x', 'RSET')])

    assert said == [
        ['first', 'second', 'common', 'common'],
        ['own', '2.0.0 ok', 'whole', 'common'],
        ['third', '2.0.0 ok', 'common', 'common'],
    ]


def test_commands_have_to_come_in_order():
    with ScriptedSMTPServer() as server, client_of(server) as client:
        said = [
            'RCPT TO:<a@x>',
            'DATA',
            'MAIL FROM:<>',
            'MAIL FROM:<>',
            'DATA',
            'NOOP',
            'STARTTLS',
            'EXPN x',
            'RSET',
            'DATA',
        ]
        codes = [client.docmd(command)[0] for command in said]

    assert codes == [503, 503, 250, 503, 554, 250, 502, 500, 250, 503]


def test_a_callable_is_given_the_command():
    with ScriptedSMTPServer({'NOOP': lambda command: f'250 you said {command}'}) as server, client_of(server) as client:
        assert client.docmd('NOOP', 'x') == (250, b'you said NOOP x')


def test_an_answer_may_wait_for_the_test():
    event = threading.Event()
    with (
        ScriptedSMTPServer({'NOOP': Wait(event, '250 now'), 'RSET': Wait(event)}) as server,
        client_of(server) as client,
    ):
        client.putcmd('NOOP')
        server.wait_for(lambda: server.sessions[0].commands == ['NOOP'])
        event.set()
        assert client.getreply() == (250, b'now')
        assert client.docmd('RSET')[0] == 250


def test_an_answer_may_come_byte_by_byte():
    with ScriptedSMTPServer({'NOOP': Drip('250-a\n250 b', pause=0)}) as server, client_of(server) as client:
        assert client.docmd('NOOP') == (250, b'a\nb')


def test_several_replies_may_come_at_once():
    with ScriptedSMTPServer({'NOOP': '250 one\n421 two'}) as server, client_of(server) as client:
        assert client.docmd('NOOP') == (250, b'one')
        assert client.getreply() == (421, b'two')


@pytest.mark.parametrize('answer', [Close(), Close('421 bye')])
def test_it_may_close_the_connection(answer):
    with ScriptedSMTPServer({'NOOP': answer}) as server:
        client = client_of(server)
        client.putcmd('NOOP')
        if answer.reply:
            assert client.getreply() == (421, b'bye')
        with pytest.raises(smtplib.SMTPServerDisconnected):
            client.getreply()
        client.close()
        server.wait_for(lambda: server.sessions[0].is_over)


def test_closing_the_server_ends_every_silence():
    never = threading.Event()
    server = ScriptedSMTPServer({'NOOP': Silence(), 'RSET': Wait(never), 'HELP': Drip('214 ' + 'x' * 1000, pause=60)})
    clients = []
    with server:
        for command in ('NOOP', 'RSET', 'HELP'):
            clients.append(client_of(server))
            clients[-1].putcmd(command)
        server.wait_for(lambda: sum(len(session.commands) for session in server.sessions) == 3)
    server.close()

    assert all(session.is_over for session in server.sessions)
    for client in clients:
        client.close()


def test_a_message_that_is_refused_in_the_end_is_not_recorded():
    with ScriptedSMTPServer({'.': '554 no'}) as server, client_of(server) as client:
        with pytest.raises(smtplib.SMTPDataError):
            client.sendmail(SENDER, [A], CONTENT)

        assert server.messages == []


def test_waiting_in_vain_tells_what_there_was():
    with ScriptedSMTPServer() as server, client_of(server), pytest.raises(AssertionError, match='ServerSession'):
        server.wait_for(lambda: server.messages, timeout=0.01)


def test_hanging_up_ends_the_connections_and_not_the_server():
    with ScriptedSMTPServer() as server:
        client = client_of(server)
        server.hang_up()
        with pytest.raises(smtplib.SMTPServerDisconnected):
            client.noop()
        with client_of(server) as another:
            assert another.noop()[0] == 250
