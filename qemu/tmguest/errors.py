# SPDX-License-Identifier: MIT
"""The exit codes of ``qemu/guest`` and the exceptions that lead to them."""

from __future__ import annotations

EXIT_USAGE = 2
EXIT_SPLAT = 123
EXIT_TIMEOUT = 124
EXIT_GUEST = 125


class GuestError(Exception):
    """Something around the guest failed: a tool, a download, a build, a boot.

    The message is one a user can act on; it ends up on stderr with exit code 125.
    """


class DownloadError(GuestError):
    """A package that the remembered lists name could not be downloaded."""
