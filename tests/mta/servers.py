"""
Real mail servers on loopback, each in a root directory of its own that has its settings, its users and its spool.

Mail for :data:`ADA` ends in a maildir in there; :data:`LATER` is greylisted, and :data:`NOBODY` is unknown.  Nothing is
sent anywhere.  Where the servers come from: see :mod:`tests.mta.unpack`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import smtplib
import socket
import subprocess
import tempfile
import textwrap
import time
from pathlib import Path

from tests.mta.unpack import UNPACKED

HOST = '127.0.0.1'
DEADLINE = 30

ADA, LATER, NOBODY = 'ada@x.example', 'later@x.example', 'nobody@x.example'

#: The users in there, each with a group of the same name and number.
USERS = {
    'root': 0,
    'postfix': 701,
    'postdrop': 702,
    'Debian-exim': 703,
    'opensmtpd': 704,
    'opensmtpq': 705,
    'keeper': 706,
    'nobody': 65534,
}


def why_not(name):
    """Return why the server of this name cannot be used here; None if it can."""
    if os.geteuid() != 0:
        return 'only root can start a mail server in a root directory of its own'
    if not Path(UNPACKED, name).exists():
        return f'{name} is not unpacked: "make system-packages" does that on Debian, as root'
    return None


class Server:
    """
    A mail server that runs until :meth:`stop`.

    :param certificate: from trustme, for STARTTLS
    :param settings: what :meth:`configure` of the subclass takes
    """

    name: str
    command: tuple[str, ...]

    #: The folders that it expects: where, whose, and the mode.
    folders: tuple[tuple[str, str, int], ...]

    #: Where it keeps what it has accepted and not delivered yet, in the order of the way through them.
    spool: tuple[str, ...]

    def __init__(self, certificate, **settings):
        # On the file system of what was unpacked, so that a root directory is made of links.
        self._folder = tempfile.TemporaryDirectory(dir=UNPACKED, prefix='run-')
        self.root = Path(self._folder.name, 'root')
        # Nobody else can take the port: what listens may share it with who only sits on it, and sets SO_REUSEADDR too.
        self._seat = socket.socket()
        self._seat.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._seat.bind((HOST, 0))
        self.port = self._seat.getsockname()[1]
        self._process = self._heir = None
        try:
            self._furnish(certificate)
            self.configure(**settings)
            self._start()
        except BaseException:
            self.stop()
            raise

    def configure(self):
        """Write the configuration."""
        raise NotImplementedError

    def take(self):
        """
        Return the messages that have come for ADA, each once, with what the server has put before it; line ends are LF.

        The server has delivered all that it had accepted by now.
        """
        self._wait_until(self._has_delivered, 'does not deliver')
        paths = list(self.root.glob('mail/ada/new/*'))
        messages = [path.read_bytes() for path in paths]
        for path in paths:
            path.unlink()
        return messages

    def log(self):
        """What the server has said of itself."""
        paths = (path for path in sorted(self.root.glob('var/log/**/*')) if path.is_file())
        return '\n'.join(path.read_text(errors='replace') for path in paths)

    def stop(self):
        """End the server, with all the processes that it has started, and leave nothing behind."""
        if self._process:
            while pids := _living_in(self._process.pid):
                for pid in pids:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            self._process.wait()
        if self._heir:
            with self._heir:
                self._heir.kill()
        self._seat.close()
        self._folder.cleanup()

    # --- the root directory ---

    def write(self, path, text, mode=0o644):
        path = Path(self.root, path)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Never into a file that may be a link to what was unpacked.
        path.unlink(missing_ok=True)
        path.write_text(textwrap.dedent(text).lstrip())
        path.chmod(mode)
        # Postfix waits until its configuration is a few seconds old.
        os.utime(path, (1, 1))

    def _furnish(self, certificate):
        shutil.copytree(UNPACKED / self.name, self.root, symlinks=True, copy_function=os.link)
        self.write('etc/passwd', ''.join(f'{user}:x:{number}:{number}::/:/bin/sh\n' for user, number in USERS.items()))
        self.write('etc/group', ''.join(f'{group}:x:{number}:\n' for group, number in USERS.items()))
        self.write('etc/hosts', f'{HOST} localhost\n')
        self.write('etc/certificate.pem', ''.join(blob.bytes().decode() for blob in certificate.cert_chain_pems))
        self.write('etc/key.pem', certificate.private_key_pem.bytes().decode(), 0o600)
        # No devices, which not every container may make.
        self.write('dev/null', '', 0o666)
        self.write('dev/urandom', os.urandom(2048).hex())
        self._make_folder('.', 'root', 0o755)
        self._make_folder('tmp', 'root', 0o1777)
        self._make_folder('mail', 'keeper', 0o777)
        for where, whose, mode in self.folders:
            self._make_folder(where, whose, mode)

    def _make_folder(self, where, whose, mode):
        path = Path(self.root, where)
        path.mkdir(parents=True, exist_ok=True)
        os.chown(path, USERS[whose], USERS[whose])
        path.chmod(mode)

    # --- the processes ---

    def _start(self):
        console = Path(self.root, 'var/log/console')
        console.parent.mkdir(exist_ok=True, parents=True)
        with console.open('wb') as output:
            self._process = subprocess.Popen(
                ['chroot', self.root, *self.command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={'PATH': '/usr/sbin:/usr/bin:/sbin:/bin'},
                start_new_session=True,
            )
        # If we are killed, nobody calls stop(); but then the pipe is closed.
        self._heir = subprocess.Popen(
            ['sh', '-c', 'read _; kill -s KILL -- "-$0"; rm -rf "$1"', str(self._process.pid), self._folder.name],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        self._wait_until(self._answers, 'does not start')

    def _answers(self):
        assert self._process.poll() is None, f'{self.name} does not start:\n{self.log()}'
        try:
            with smtplib.SMTP(HOST, self.port, timeout=DEADLINE):
                return True
        except ConnectionRefusedError:
            return False

    def _has_delivered(self):
        return not any(files for spool in self.spool for _, _, files in os.walk(self.root / spool))

    def _wait_until(self, condition, what):
        deadline = time.monotonic() + DEADLINE
        while not condition():
            assert time.monotonic() < deadline, f'{self.name} {what}:\n{self.log()}'
            time.sleep(0.01)


class Postfix(Server):
    name = 'postfix'
    command = ('/usr/lib/postfix/sbin/master',)
    folders = (
        ('var/lib/postfix', 'postfix', 0o700),
        ('var/spool/postfix', 'root', 0o755),
        ('var/spool/postfix/pid', 'root', 0o755),
        ('var/spool/postfix/public', 'postfix', 0o710),
        *(
            (f'var/spool/postfix/{folder}', 'postfix', 0o700)
            for folder in ('active', 'bounce', 'corrupt', 'defer', 'deferred', 'hold', 'incoming', 'private', 'trace')
        ),
    )
    spool = ('var/spool/postfix/incoming', 'var/spool/postfix/active')

    def configure(self, max_size=100_000, max_sessions=50, max_errors=20, wants_full_names=False):
        number = USERS['keeper']
        names = 'reject_non_fqdn_helo_hostname reject_non_fqdn_sender' if wants_full_names else ''
        self.write(
            'etc/postfix/main.cf',
            f"""
            compatibility_level = 3.6
            queue_directory = /var/spool/postfix
            daemon_directory = /usr/lib/postfix/sbin
            data_directory = /var/lib/postfix
            maillog_file = /var/log/mail.log
            mail_owner = postfix
            setgid_group = postdrop
            inet_interfaces = {HOST}
            inet_protocols = ipv4
            myhostname = postfix.example
            mydestination =
            mynetworks =
            alias_maps =
            in_flow_delay = 0
            local_transport = error:nothing is local
            default_transport = error:nothing leaves
            virtual_mailbox_domains = x.example
            virtual_mailbox_maps = inline:{{ {ADA}=ada/ {LATER}=later/ }}
            virtual_mailbox_base = /mail
            virtual_uid_maps = static:{number}
            virtual_gid_maps = static:{number}
            message_size_limit = {max_size}
            smtpd_peername_lookup = no
            smtpd_helo_restrictions = {names}
            smtpd_tls_security_level = may
            smtpd_tls_cert_file = /etc/certificate.pem
            smtpd_tls_key_file = /etc/key.pem
            smtpd_recipient_restrictions =
                check_recipient_access inline:{{ {{ {LATER} = 450 4.7.1 greylisted }} }}
                reject_unauth_destination
            smtpd_client_connection_count_limit = {max_sessions}
            smtpd_client_event_limit_exceptions =
            smtpd_hard_error_limit = {max_errors}
            smtpd_error_sleep_time = 0
            """,
        )
        self.write(
            'etc/postfix/master.cf',
            f"""
            {HOST}:{self.port} inet n - n - - smtpd
            anvil     unix       - - n - 1     anvil
            bounce    unix       - - n - 0     bounce
            cleanup   unix       n - n - 0     cleanup
            defer     unix       - - n - 0     bounce
            error     unix       - - n - -     error
            postlog   unix-dgram n - n - 1     postlogd
            proxymap  unix       - - n - -     proxymap
            qmgr      unix       n - n 300 1   qmgr
            rewrite   unix       - - n - -     trivial-rewrite
            tlsmgr    unix       - - n 1000? 1 tlsmgr
            trace     unix       - - n - 0     bounce
            virtual   unix       - n n - -     virtual
            """,
        )


class Exim(Server):
    name = 'exim'
    command = ('/usr/sbin/exim4', '-bdf')
    folders = (
        ('var/spool/exim4', 'Debian-exim', 0o750),
        ('var/log/exim4', 'Debian-exim', 0o750),
    )
    spool = ('var/spool/exim4/input',)

    def configure(self, max_size=100_000, max_sessions=50, max_messages=1000):
        Path(self.root, 'etc/key.pem').chmod(0o644)
        self.write(
            'etc/exim4/exim4.conf',
            f"""
            primary_hostname = exim.example
            local_interfaces = {HOST}
            daemon_smtp_ports = {self.port}
            log_file_path = /var/log/exim4/%slog
            keep_environment =
            deliver_drop_privilege = true
            tls_certificate = /etc/certificate.pem
            tls_privatekey = /etc/key.pem
            acl_smtp_rcpt = recipient
            message_size_limit = {max_size}
            smtp_accept_max = {max_sessions}
            smtp_accept_max_per_connection = {max_messages}
            smtp_accept_queue_per_connection = 0

            begin acl
            recipient:
                defer local_parts = later
                    message = 450 4.7.1 greylisted
                accept domains = x.example
                    verify = recipient
                deny message = 550 5.1.1 unknown

            begin routers
            keep:
                driver = accept
                domains = x.example
                local_parts = ada
                transport = keep

            begin transports
            keep:
                driver = appendfile
                maildir_format
                return_path_add
                directory = /mail/ada
            """,
        )


class OpenSMTPD(Server):
    """
    It does not offer PIPELINING, and hangs up on who does it all the same.

    It offers STARTTLS; but the one in Debian 12, 6.8 with OpenSSL 3, then ends the handshake with an internal error.
    """

    name = 'opensmtpd'
    command = ('/usr/sbin/smtpd', '-d')
    folders = (
        ('var/lib/opensmtpd/empty', 'root', 0o755),
        ('var/run', 'root', 0o755),
        ('var/spool/smtpd', 'root', 0o711),
    )
    spool = ('var/spool/smtpd/incoming', 'var/spool/smtpd/queue')

    def configure(self, max_size=100_000, max_messages=1000):
        self.write('etc/mailname', 'opensmtpd.example\n')
        self.write(
            'etc/smtpd.conf',
            f"""
            pki own cert "/etc/certificate.pem"
            pki own key "/etc/key.pem"
            smtp max-message-size {max_size}
            smtp limit max-mails {max_messages}
            table known {{ "{ADA}" = keeper, "{LATER}" = keeper }}
            table greylisted {{ "{LATER}" }}
            filter greylist phase rcpt-to match rcpt-to <greylisted> reject "450 4.7.1 greylisted"
            listen on {HOST} port {self.port} tls pki own filter greylist
            action keep maildir "/mail/%{{rcpt.user}}" virtual <known>
            match from any for domain x.example action keep
            """,
        )


def _living_in(session):
    """The processes of a session; not the dead that nobody has buried yet."""
    found = []
    for path in Path('/proc').glob('[0-9]*/stat'):
        # It may end at any moment.
        with contextlib.suppress(OSError):
            state, _parent, _group, its_session = path.read_text().rpartition(')')[2].split()[:4]
            if its_session == str(session) and state not in 'ZX':
                found.append(int(path.parent.name))
    return found
