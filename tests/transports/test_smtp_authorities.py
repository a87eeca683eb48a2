"""Authorities that certificates are checked against change while a process runs."""

from __future__ import annotations

import os
import shutil
import ssl
import subprocess

import pytest
import trustme

from pyramid_mailqueue.exceptions import ServerTrouble
from pyramid_mailqueue.testing import ScriptedSMTPServer
from tests.transports.stream_parts import M1, received, transport_to


class Authority:
    """One that has issued a certificate to the server.  All have the same name, as after a change of the key."""

    def __init__(self):
        ca = trustme.CA(organization_name='Example', organization_unit_name='Authority')
        self.pem = ca.cert_pem
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        ca.issue_cert('127.0.0.1').configure_cert(self.context)


@pytest.fixture(scope='module')
def former():
    return Authority()


@pytest.fixture(scope='module')
def later():
    return Authority()


@pytest.fixture(params=['starttls', 'implicit'])
def server(request, former):
    with ScriptedSMTPServer(tls=former.context, implicit_tls=request.param == 'implicit') as server:
        server.mode = request.param
        yield server


def in_place(pem, path):
    path.write_bytes(pem)


def by_renaming(pem, path):
    new = path.with_suffix('.new')
    new.write_bytes(pem)
    new.replace(path)


def as_by_certbot(pem, path):
    """A link to a file of another name each time."""
    new = path.with_name(f'{len(list(path.parent.iterdir()))}.pem')
    new.write_bytes(pem)
    link = path.with_suffix('.link')
    link.symlink_to(new)
    link.replace(path)


ROTATIONS = [in_place, by_renaming, as_by_certbot]


def rotated(server, transport, rotate, former, later, path):
    """Send a message, let server and authorities change, and send another one over a new connection."""
    rotate(former.pem.bytes(), path)
    assert transport.send(*M1[:3])
    transport.close()
    server.tls = later.context
    with pytest.raises(ServerTrouble, match='certificate'):
        transport.send(*M1[:3])
    rotate(later.pem.bytes(), path)
    assert transport.send(*M1[:3])
    assert received(server) == [M1, M1]


@pytest.mark.parametrize('rotate', ROTATIONS)
def test_a_file_of_authorities_is_read_again_when_it_has_changed(server, former, later, tmp_path, rotate):
    path = tmp_path / 'ca.pem'
    with transport_to(server, tls=server.mode, tls_ca_file=path) as transport:
        rotated(server, transport, rotate, former, later, path)


@pytest.mark.parametrize('rotate', ROTATIONS)
def test_so_is_the_file_of_the_system(server, former, later, tmp_path, rotate, monkeypatch):
    path = tmp_path / 'ca.pem'
    monkeypatch.setenv('SSL_CERT_FILE', str(path))
    monkeypatch.setenv('SSL_CERT_DIR', str(tmp_path / 'nothing'))
    with transport_to(server, tls=server.mode) as transport:
        rotated(server, transport, rotate, former, later, path)


@pytest.mark.skipif(shutil.which('openssl') is None, reason='openssl is not installed')
@pytest.mark.parametrize('rotate', ROTATIONS)
def test_so_is_the_folder_of_the_system(server, former, later, tmp_path, rotate, monkeypatch):
    folder = tmp_path / 'certs'
    folder.mkdir()
    monkeypatch.setenv('SSL_CERT_FILE', str(tmp_path / 'nothing'))
    monkeypatch.setenv('SSL_CERT_DIR', f'{tmp_path / "empty"}{os.pathsep}{folder}')

    # OpenSSL finds a certificate in a folder by the hash of its name.
    def rotate_by_hash(pem, _):
        command = ['openssl', 'x509', '-noout', '-subject_hash']
        found = subprocess.run(command, input=pem, check=True, capture_output=True).stdout.decode().strip()
        rotate(pem, folder / f'{found}.0')

    with transport_to(server, tls=server.mode) as transport:
        rotated(server, transport, rotate_by_hash, former, later, None)


def test_the_context_is_the_same_as_long_as_nothing_has_changed(server, former, tmp_path, monkeypatch):
    path = tmp_path / 'ca.pem'
    former.pem.write_to_path(path)
    made = []
    create = ssl.create_default_context
    monkeypatch.setattr(ssl, 'create_default_context', lambda **options: made.append(options) or create(**options))
    with transport_to(server, tls=server.mode, tls_ca_file=path) as transport:
        for _ in range(3):
            transport.send(*M1[:3])
            transport.close()

    assert (len(made), len(server.sessions)) == (1, 3)


def test_at_a_reload_the_file_is_read_again_even_if_it_looks_the_same(server, former, later, tmp_path):
    path = tmp_path / 'ca.pem'
    size = max(len(former.pem.bytes()), len(later.pem.bytes()))

    def write(authority):
        path.write_bytes(authority.pem.bytes().ljust(size, b'\n'))
        os.utime(path, (1, 1))

    write(former)
    with transport_to(server, tls=server.mode, tls_ca_file=path) as transport:
        assert transport.send(*M1[:3])
        transport.close()
        server.tls = later.context
        write(later)
        with pytest.raises(ServerTrouble, match='certificate'):
            transport.send(*M1[:3])
        transport.reload()
        assert transport.send(*M1[:3])


def test_at_a_reload_idle_sessions_are_closed(server, former, tmp_path):
    path = tmp_path / 'ca.pem'
    former.pem.write_to_path(path)
    with transport_to(server, tls=server.mode, tls_ca_file=path) as transport:
        transport.send(*M1[:3])
        transport.reload()
        server.wait_for(lambda: server.sessions[0].is_over)


def test_a_file_that_is_gone_is_named_until_it_is_back(server, former, tmp_path):
    path = tmp_path / 'ca.pem'
    former.pem.write_to_path(path)
    with transport_to(server, tls=server.mode, tls_ca_file=path) as transport:
        assert transport.send(*M1[:3])
        transport.close()
        aside = path.rename(tmp_path / 'aside.pem')
        with pytest.raises(ServerTrouble, match=r'smtp_tls_ca_file = .*ca\.pem cannot be used'):
            transport.send(*M1[:3])
        aside.rename(path)
        assert transport.send(*M1[:3])
