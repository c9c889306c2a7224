"""Makes text that others wrote safe to show: one line without anything that controls a terminal.

Ids, messages and results come from every process that shares the Redis. Text for programs stays unchanged. Text for people
passes through here: the errors' own text, each logged line, and each line that the command line or the harness prints.
"""

from __future__ import annotations

import logging
import traceback


def escape(what: object) -> str:
    """`what` as text, with control characters, line breaks, bidi marks and lone surrogates escaped as in `repr`."""
    text = str(what)
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)


def one_line(what: object) -> str:
    """`what` as one line that is safe to show, or the name of its class when its text is empty."""
    return escape(" ".join(str(what).split())) or type(what).__name__


def escaped_traceback(error: BaseException | None) -> str:
    """The traceback of an error and of those that caused it, newest first; each line is safe to show."""
    lines: list[str] = []
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        lines += map(escape, "".join(traceback.format_tb(error.__traceback__)).rstrip("\n").split("\n"))
        lines.append(f"{type(error).__qualname__}: {escape(error)}")
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        if error is not None:
            lines.append("caused by:")
    return "\n".join(lines)


class OneLine(logging.Filter):
    """Makes log records safe to show, whichever handler prints them; for a logger, or for a program's own handler."""

    def filter(self, record: logging.LogRecord) -> bool:
        try:
            message = record.getMessage()
        except Exception:  # the arguments do not fit, which the handler reports
            return True
        if not message.isprintable():
            record.msg, record.args = escape(message), ()
        if record.exc_info and record.exc_info[1] is not None:
            record.exc_text = escaped_traceback(record.exc_info[1])  # a formatter prefers it to exc_info
        return True


logging.getLogger("beequeue").addFilter(OneLine())
