"""
A Debian in a folder, for the Pythons that this machine does not have: the newest ones are in Debian's "sid" first.

It is made by ``debootstrap``, as root on a Debian, in ``$XDG_CACHE_HOME/pyramid_mailqueue/debian``, and may be removed
at any time.  What runs in it sees the folder of the clone, ``/tmp`` and the network; those mounts are its own, and are
gone when it ends.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache', 'pyramid_mailqueue', 'debian')
SUITE = 'sid'

# What the tests need, with a PostgreSQL for the Pythons for which PyPI has none.
PACKAGES = ('ca-certificates', 'chromium', 'git', 'make', 'postgresql', 'strace')

# The certificates and the name server are those of this machine, by which pip gets at its packages.
_ENTER = """
root=$1 here=$2
shift 2
# Where the root is no mount of its own, tests can mount nothing.
mount --rbind "$root" "$root"
for path in /proc /dev /sys /tmp /etc/ssl "$here"; do
    mkdir -p "$root$path"
    mount --rbind "$path" "$root$path"
done
touch "$root/etc/resolv.conf"
mount --bind /etc/resolv.conf "$root/etc/resolv.conf"
exec chroot "$root" sh -c 'cd "$0" && exec "$@"' "$here" "$@"
"""


def inside(*command):
    """The command that runs another one in that Debian, in the folder of the clone."""
    return ['unshare', '--mount', 'sh', '-ec', _ENTER, 'sh', str(FOLDER), str(ROOT), *command]


def provide(version):
    """Return the path of a Python in that Debian, which is made if it has to be; None if it cannot be had."""
    python = f'/usr/bin/python{version}'
    if not Path(f'{FOLDER}{python}').exists():
        if os.geteuid() != 0 or not shutil.which('apt-get'):
            return None
        try:
            _make(version)
        except subprocess.CalledProcessError:
            return None
    return python


def _make(version):
    if not FOLDER.exists():
        if not shutil.which('debootstrap'):
            _apt('update')
            _apt('install', '--yes', '--no-install-recommends', 'debootstrap')
        FOLDER.parent.mkdir(parents=True, exist_ok=True)
        part = FOLDER.with_suffix('.part')
        shutil.rmtree(part, ignore_errors=True)
        subprocess.run(['debootstrap', '--variant=minbase', SUITE, part], check=True, stdout=subprocess.DEVNULL)
        # No service is to be started there.
        Path(part, 'usr/sbin/policy-rc.d').write_text('#!/bin/sh\nexit 101\n')
        Path(part, 'usr/sbin/policy-rc.d').chmod(0o755)
        part.rename(FOLDER)
    _apt('update', within=inside)
    _apt('install', '--yes', '--no-install-recommends', *PACKAGES, f'python{version}-venv', within=inside)


def _apt(*arguments, within=lambda *command: command):
    environment = {**os.environ, 'DEBIAN_FRONTEND': 'noninteractive'}
    subprocess.run(within('apt-get', '-qq', *arguments), check=True, stdout=subprocess.DEVNULL, env=environment)
