"""The transport to an SMTP server."""

from pyramid_mailqueue.transports.smtp.transport import SMTPTransport

__all__ = ['SMTPTransport']
