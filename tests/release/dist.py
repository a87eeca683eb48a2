"""
Builds what is uploaded for a release: ``python -m tests.release.dist FOLDER``, or ``make dist``.

The same commit gives the same bytes, with the same setuptools: whoever wants to know that a release is made of the
source builds it again, and compares.  What would differ is left out or fixed: leftovers in the tree, the order, the
owners, the modes and the times of files.  All times are that of the commit, or SOURCE_DATE_EPOCH.
"""

from __future__ import annotations

import gzip
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

__all__ = ['build', 'epoch_of']

ROOT = Path(__file__).parent.parent.parent

#: What is in a tree that was worked in, and in no release.
LEFTOVERS = shutil.ignore_patterns(
    '.git',
    '.mta',
    '.venv*',
    '*.egg-info',
    '__pycache__',
    '.*_cache',
    '.coverage*',
    '.hypothesis',
    'build',
    'dist',
    'var',
    '_build',
)


# Python 3.10.11 and 3.11.3 have no filters.
_SAFELY = {'filter': 'data'} if hasattr(tarfile, 'data_filter') else {}


def epoch_of(tree):
    """Return the time of a release of *tree*, in seconds."""
    given = os.environ.get('SOURCE_DATE_EPOCH')
    if given:
        return int(given)
    done = subprocess.run(['git', 'log', '-1', '--format=%ct'], cwd=tree, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f'There is no commit in {tree} whose time the release could have: set SOURCE_DATE_EPOCH.')
    return int(done.stdout)


def build(tree, folder, epoch):
    """Build the source distribution of *tree*, and the wheel of that, into *folder*."""
    umask = os.umask(0o022)
    try:
        with tempfile.TemporaryDirectory() as place:
            clean = Path(place, 'tree')
            shutil.copytree(tree, clean, ignore=LEFTOVERS)
            _run('--sdist', clean, folder, epoch)
            (archive,) = Path(folder).glob('*.tar.gz')
            _normalise(archive, epoch)
            with tarfile.open(archive) as packed:
                packed.extractall(place, **_SAFELY)
            _run('--wheel', Path(place, archive.name.removesuffix('.tar.gz')), folder, epoch)
    finally:
        os.umask(umask)


def _run(kind, tree, folder, epoch):
    command = [sys.executable, '-m', 'build', '--no-isolation', kind, '--outdir', folder, tree]
    environ = {**os.environ, 'SOURCE_DATE_EPOCH': str(epoch)}
    done = subprocess.run(
        command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode:
        sys.exit(done.stdout)


def _normalise(archive, epoch):
    """Write an archive again, so that it has nothing of this machine, this user and this moment."""
    tar = io.BytesIO()
    with tarfile.open(archive) as old, tarfile.open(fileobj=tar, mode='w', format=tarfile.PAX_FORMAT) as new:
        for member in sorted(old.getmembers(), key=lambda member: member.name):
            is_program = member.isdir() or member.mode & 0o100
            kept = tarfile.TarInfo(member.name)
            kept.type, kept.size, kept.mtime, kept.mode = (
                member.type,
                member.size,
                epoch,
                0o755 if is_program else 0o644,
            )
            new.addfile(kept, old.extractfile(member) if member.isfile() else None)
    with archive.open('wb') as file, gzip.GzipFile('', 'wb', fileobj=file, mtime=epoch) as packed:
        packed.write(tar.getvalue())


if __name__ == '__main__':
    build(ROOT, Path(sys.argv[1]).resolve(), epoch_of(ROOT))
