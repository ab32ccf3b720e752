"""A terminal for tests: what a person sees after some bytes were written to it. Refuses every code it does not know."""

import re

_CODES = re.compile(r"\x1b\[([\d;]*)([A-Za-z])|\x1b([78D])|([\r\n])|([^\x1b\r\n])|(.)", re.DOTALL)
# Still being written.
_UNFINISHED = re.compile(r"\x1b(\[[\d;]*)?$")


class Screen:
    """Rows of characters with a scrolling region, as DEC's VT100 has it and every terminal since.

    Args:
        columns: of the terminal.
        rows: of the terminal.
    """

    def __init__(self, columns: int, rows: int) -> None:
        self.columns, self.rows = columns, rows
        self.lines = [""] * rows
        # Rows that have scrolled off the top.
        self.gone: list[str] = []
        self.row = self.column = 0
        self.top, self.bottom = 0, rows - 1
        self._saved = (0, 0)

    def feed(self, text: str) -> None:
        """Take what was written."""
        for numbers, code, short, control, character, unknown in _CODES.findall(_UNFINISHED.sub("", text)):
            assert not unknown, f"a code nobody knows: {unknown!r}"
            if character:
                self._put(character)
            elif control:
                self._down() if control == "\n" else self._to(self.row, 0)
            elif short:
                self._short(short)
            else:
                first, second = ([int(number or 0) for number in numbers.split(";")] + [0])[:2]
                self._long(code, first, second)

    @property
    def text(self) -> list[str]:
        """All that can be scrolled back to and seen, trailing blanks left out."""
        return [line.rstrip() for line in [*self.gone, *self.lines]]

    def _to(self, row: int, column: int) -> None:
        self.row, self.column = row, column

    def _put(self, character: str) -> None:
        if self.column == self.columns:
            self._to(self.row, 0)
            self._down()
        line = self.lines[self.row].ljust(self.columns)
        self.lines[self.row] = line[: self.column] + character + line[self.column + 1 :]
        self.column += 1

    def _down(self) -> None:
        if self.row == self.bottom:
            line = self.lines.pop(self.top)
            self.lines.insert(self.bottom, "")
            if self.top == 0:
                self.gone.append(line)
        elif self.row < self.rows - 1:
            self.row += 1

    def _short(self, code: str) -> None:
        if code == "7":
            self._saved = (self.row, self.column)
        elif code == "8":
            self._to(*self._saved)
        else:
            self._down()

    def _long(self, code: str, first: int, second: int) -> None:
        if code == "A":
            self.row = max(0, self.row - max(1, first))
        elif code == "H":
            self._to(max(1, first) - 1, max(1, second) - 1)
        elif code == "r":
            self.top, self.bottom = max(1, first) - 1, (second or self.rows) - 1
            self._to(0, 0)
        elif code in "JK":
            assert first == 0
            self.lines[self.row] = self.lines[self.row][: self.column]
            if code == "J":
                self.lines[self.row + 1 :] = [""] * (self.rows - self.row - 1)
        else:
            assert code == "m", f"a code nobody knows: {code}"
