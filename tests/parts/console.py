"""The logging of an ini file that writes to the terminal, as the cookiecutters of Pyramid have it."""

from __future__ import annotations

CONSOLE = """
[loggers]
keys = root
[handlers]
keys = console
[formatters]
keys =
[logger_root]
level = INFO
handlers = console
[handler_console]
class = StreamHandler
args = (sys.{stream},)
"""
