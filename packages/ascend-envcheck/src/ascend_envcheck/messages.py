"""What people read, in two languages; ids, commands, sources and JSON are the same in both."""

from __future__ import annotations

from typing import Iterable, Mapping

ENGLISH, CHINESE = "en", "zh"
LANGUAGES = (ENGLISH, CHINESE)


class Message(str):
    """English text, to the eye of every program, that knows how it is said in Chinese."""

    in_chinese: str

    def __new__(cls, english: str, chinese: str = "") -> Message:
        """A message of two finished texts; `say` fills in values."""
        made = super().__new__(cls, english)
        made.in_chinese = chinese or english
        return made

    def __getnewargs__(self) -> tuple[str, str]:  # type: ignore[override]
        return str(self), self.in_chinese


def say(english: str, chinese: str, **values: object) -> Message:
    """A message of two templates in the manner of `str.format`; a value that is a message is said in each language."""
    in_chinese = {name: told(value, CHINESE) if isinstance(value, str) else value for name, value in values.items()}
    return Message(english.format(**values), chinese.format(**in_chinese))


def told(text: str, language: str) -> str:
    """The text in a language; what is no `Message` is the same in all."""
    return text.in_chinese if language == CHINESE and isinstance(text, Message) else str(text)


def joined(messages: Iterable[str], separator: str = "; ", chinese_separator: str = "；") -> Message:
    """Several messages as one."""
    parts = list(messages)
    return Message(separator.join(parts), chinese_separator.join(told(part, CHINESE) for part in parts))


def language_of(environ: Mapping[str, str]) -> str:
    """The language that an environment asks for: Chinese for a zh locale, else English."""
    for name in ("LC_ALL", "LC_MESSAGES", "LANG"):
        if environ.get(name):
            return CHINESE if environ[name].lower().startswith("zh") else ENGLISH
    return ENGLISH
