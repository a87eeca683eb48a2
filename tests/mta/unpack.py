"""
Fetch the mail servers of Debian, and install none of them: ``python -m tests.mta.unpack``, as root, with apt.

Postfix, Exim and OpenSMTPD cannot be installed side by side, and a developer may have one of them at work already.  So
their packages are only downloaded, with what they depend on and this machine lacks, and unpacked into ``.mta/NAME``: a
root directory for each, to which the shared libraries of this machine are copied.  There a server finds everything
where it expects it, its users included, when it is started in it with ``chroot`` (see :mod:`tests.mta.servers`).
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

UNPACKED = Path(__file__).resolve().parents[2] / '.mta'

#: The package of each server.
PACKAGES = {'postfix': 'postfix', 'exim': 'exim4-daemon-light', 'opensmtpd': 'opensmtpd'}

# Deliveries of OpenSMTPD are made by a shell.
PROGRAMS = ('usr/sbin', 'usr/lib/postfix/sbin', 'usr/libexec/opensmtpd', 'bin')
LIBRARIES = ('usr/lib/postfix', 'usr/lib/*-linux-*', 'lib/*-linux-*')


def unpack(name):
    """Make the root directory of one server."""
    with tempfile.TemporaryDirectory(dir=UNPACKED) as folder:
        root = Path(folder, 'root')
        for package in _download(PACKAGES[name], Path(folder)):
            subprocess.run(['dpkg', '-x', package, root], check=True)
        _disarm(root)
        Path(root, 'bin').mkdir(exist_ok=True)
        shutil.copy('/bin/sh', root / 'bin/sh')
        for library in _libraries_of(root):
            target = Path(root, library.relative_to('/'))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(library, target)
        root.rename(Path(UNPACKED, name))


def _download(package, folder):
    Path(folder, 'partial').mkdir()
    # --reinstall: even if it is installed.  Only root may read the folder, so the download cannot be left to "_apt".
    options = ['-o', f'Dir::Cache::Archives={folder}', '-o', 'APT::Sandbox::User=root', '--no-install-recommends']
    subprocess.run(['apt-get', '-qq', *options, '--reinstall', '--download-only', 'install', package], check=True)
    return sorted(folder.glob('*.deb'))


def _disarm(root):
    """Nobody is to become root with a program that lies about here and gets no updates."""
    for path in root.rglob('*'):
        if path.is_file() and not path.is_symlink():
            path.chmod(path.stat().st_mode & 0o777)


def _libraries_of(root):
    """The shared libraries that the programs in *root* would take from outside."""
    programs = [path for folder in PROGRAMS for path in Path(root, folder).glob('*') if not path.is_symlink()]
    own = [path for pattern in LIBRARIES for path in root.glob(pattern)]
    # The exit status is that of scripts, which have no libraries.
    told = subprocess.run(
        ['ldd', *programs],
        env={'LD_LIBRARY_PATH': ':'.join(map(str, own))},
        check=False,
        capture_output=True,
        text=True,
    ).stdout
    missing = sorted(set(re.findall(r'^\t(\S+) => not found', told, re.MULTILINE)))
    assert not missing, missing
    libraries = {Path(path) for path in re.findall(r'^\t(?:\S+ => )?(/\S+) \(0x', told, re.MULTILINE)}
    return sorted(path for path in libraries if not path.is_relative_to(root))


def main():
    UNPACKED.mkdir(exist_ok=True)
    for name in PACKAGES:
        if not Path(UNPACKED, name).exists():
            unpack(name)
    Path(UNPACKED, 'complete').touch()


if __name__ == '__main__':
    main()
