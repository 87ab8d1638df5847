"""The window. It reads the engine's queue a few times a second, so no reply is too fast for it, and never waits."""

from __future__ import annotations

import queue
from pathlib import Path

from PySide6.QtCore import Qt, QTimer, Signal
from PySide6.QtGui import (
    QCloseEvent,
    QColor,
    QFont,
    QKeyEvent,
    QKeySequence,
    QPalette,
    QShortcut,
    QTextBlockFormat,
    QTextCharFormat,
    QTextCursor,
)
from PySide6.QtWidgets import (
    QApplication,
    QFileDialog,
    QHBoxLayout,
    QMainWindow,
    QPlainTextEdit,
    QProgressBar,
    QPushButton,
    QTextEdit,
    QVBoxLayout,
    QWidget,
)

from engine import Engine, Failed, Loaded
from qwq_lite import Answer, Done, Event, Notice, Progress, Thinking

_LOOK_MS = 30
_INPUT_LINES = 3
_MARGIN = 12
_WHY = {
    "cancelled": "Stopped.",
    "length": "Cut at its longest length.",
    "context": "The context is full: the answer ends here.",
    "deadline": "The time was up.",
    "loop": "The answer repeated itself.",
}
_STAGES = {"load": "Loading", "prefill": "Reading the question", "thinking": "Thinking; Escape stops"}


def _block(*, above: int = 0, left: int = 0) -> QTextBlockFormat:
    block = QTextBlockFormat()
    block.setTopMargin(above)
    block.setLeftMargin(left)
    block.setLineHeight(118.0, QTextBlockFormat.LineHeightTypes.ProportionalHeight.value)
    return block


def _style(color: str, *, bold: bool = False, italic: bool = False) -> QTextCharFormat:
    style = QTextCharFormat()
    style.setForeground(QColor(color))
    style.setFontWeight(QFont.Weight.Bold if bold else QFont.Weight.Normal)
    style.setFontItalic(italic)
    return style


_TEXT = _style("#1b1f24")
_THOUGHT = _style("#6a737d", italic=True)
_HEADING = _style("#0b5fb0", bold=True)
_REMARK = _style("#8a5a00")
_ERROR = _style("#b3261e")


class Transcript(QTextEdit):
    """The conversation. Text is only ever added, as plain text: what a model writes is no markup."""

    def __init__(self) -> None:
        super().__init__()
        self.setReadOnly(True)
        self.setUndoRedoEnabled(False)
        self.setAccessibleName("Conversation")
        self.document().setDocumentMargin(_MARGIN)
        font = self.font()
        font.setPointSize(font.pointSize() + 1)
        self.setFont(font)
        colors = self.palette()  # the text's colours are for white paper, whatever the desktop's theme
        colors.setColor(QPalette.ColorRole.Base, QColor("#ffffff"))
        colors.setColor(QPalette.ColorRole.Text, _TEXT.foreground().color())
        self.setPalette(colors)
        self._last: QTextCharFormat | None = None

    def add(self, text: str, style: QTextCharFormat, heading: str = "") -> None:
        """Add text at the end; under a new heading where another kind of text came before."""
        bar = self.verticalScrollBar()
        at_end = bar.value() >= bar.maximum() - 4  # who has scrolled back to read is left there
        cursor = QTextCursor(self.document())
        cursor.movePosition(QTextCursor.MoveOperation.End)
        if style is not self._last:
            self._begin(cursor, heading, left=_MARGIN if style is _THOUGHT else 0)
            self._last = style
            text = text.lstrip("\n")
        cursor.insertText(text, style)
        if at_end:
            bar.setValue(bar.maximum())

    def end(self) -> None:
        """What comes next begins a paragraph of its own."""
        self._last = None

    def _begin(self, cursor: QTextCursor, heading: str, left: int) -> None:
        if self.document().isEmpty():
            cursor.setBlockFormat(_block())
        else:
            cursor.insertBlock(_block(above=_MARGIN))
        if heading:
            cursor.insertText(heading, _HEADING)
            cursor.insertBlock(_block(left=left))


class Question(QPlainTextEdit):
    """Enter sends, Shift+Enter begins a line."""

    sent = Signal()

    def __init__(self) -> None:
        super().__init__()
        self.setPlaceholderText("Ask something. Enter sends, Shift+Enter begins a line.")
        self.setAccessibleName("Question")
        self.setTabChangesFocus(True)
        self.document().setDocumentMargin(_MARGIN / 2)
        self.setFixedHeight(self.fontMetrics().lineSpacing() * _INPUT_LINES + 2 * _MARGIN)

    def keyPressEvent(self, event: QKeyEvent) -> None:  # noqa: N802 - Qt's name
        enter = event.key() in (Qt.Key.Key_Return, Qt.Key.Key_Enter)
        if enter and not event.modifiers() & Qt.KeyboardModifier.ShiftModifier:
            self.sent.emit()
        else:
            super().keyPressEvent(event)


class Window(QMainWindow):
    """One conversation with one model."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.setWindowTitle(f"{file.stem} - QwQ desktop")
        self.resize(820, 640)
        self._transcript, self._question = Transcript(), Question()
        self._send, self._stop = QPushButton("Send"), QPushButton("Stop")
        self._bar = QProgressBar()
        self._ready, self._loaded, self._answered = False, True, False
        self._lay_out()
        self._question.sent.connect(self._ask)
        self._send.clicked.connect(self._ask)
        self._stop.clicked.connect(self._stopped)
        QShortcut(QKeySequence(Qt.Key.Key_Escape), self, self._stopped)
        menu = self.menuBar().addMenu("Conversation")
        menu.addAction("Copy all of it", QKeySequence("Ctrl+Shift+C"), self._copy)
        menu.addAction("Quit", QKeySequence("Ctrl+Q"), self.close)
        self._engine = Engine(file)
        self._say("Loading")
        self._enable(ready=False)
        self._timer = QTimer(self)
        self._timer.timeout.connect(self._look)
        self._timer.start(_LOOK_MS)
        self._question.setFocus()

    def closeEvent(self, event: QCloseEvent) -> None:  # noqa: N802 - Qt's name
        self._timer.stop()
        self.hide()
        self._engine.close()
        super().closeEvent(event)

    def _lay_out(self) -> None:
        buttons = QVBoxLayout()
        buttons.addWidget(self._send)
        buttons.addWidget(self._stop)
        below = QHBoxLayout()
        below.addWidget(self._question, 1)
        below.addLayout(buttons)
        whole = QVBoxLayout()
        whole.addWidget(self._transcript, 1)
        whole.addLayout(below)
        frame = QWidget()
        frame.setLayout(whole)
        self.setCentralWidget(frame)
        self._bar.setRange(0, 100)
        self._bar.setFixedWidth(200)
        self._bar.hide()
        self.statusBar().addPermanentWidget(self._bar)

    def _ask(self) -> None:
        if not self._loaded:
            self._loaded = True
            self._say("Loading")
            self._enable(ready=False)
            self._engine.load_again()
            return
        text = self._question.toPlainText().strip()
        if not text or not self._ready:
            return
        self._question.clear()
        self._transcript.end()
        self._transcript.add(text, _TEXT, "You")
        self._transcript.end()
        self._say("Reading the question")
        self._enable(ready=False)
        self._stop.setEnabled(True)
        self._answered = False
        self._engine.ask(text)

    def _stopped(self) -> None:
        self._engine.stop()

    def _copy(self) -> None:
        QApplication.clipboard().setText(self._transcript.toPlainText())
        self._say("The conversation is copied")

    def _look(self) -> None:
        """Take all that has happened; neighbouring pieces of text are shown as one."""
        pending: Thinking | Answer | None = None
        while True:
            try:
                event = self._engine.happened.get_nowait()
            except queue.Empty:
                break
            if isinstance(event, Thinking | Answer) and type(event) is type(pending):
                pending = type(event)(pending.text + event.text)
                continue
            if pending is not None:
                self._show(pending)
            pending = event if isinstance(event, Thinking | Answer) else None
            if pending is None:
                self._show(event)
        if pending is not None:
            self._show(pending)

    def _show(self, event: Event | Loaded | Failed) -> None:
        add = self._transcript.add
        if isinstance(event, Progress):
            self._say(_STAGES[event.stage])
            self._bar.setValue(round(100 * event.done / event.total) if event.total else 100)
            self._bar.show()
        elif isinstance(event, Thinking):
            self._say("Thinking; Escape stops")
            add(event.text, _THOUGHT, "Thinking")
        elif isinstance(event, Answer):
            self._say("Answering; Escape stops")
            add(event.text, _TEXT, "Answer")
            self._answered = True
        elif isinstance(event, Notice):
            add(event.text, _REMARK)
        elif isinstance(event, Loaded):
            for notice in event.notices:
                add(notice + "\n", _REMARK)
            self._done(event.line)
        elif isinstance(event, Done):
            if event.reply.answer and event.reply.thinking and not self._answered:
                add(event.reply.answer, _TEXT, "Answer")  # only the whole text showed where it begins
            if event.reply.finish_reason in _WHY:
                add(_WHY[event.reply.finish_reason], _REMARK)
            elif not event.reply.answer:
                add("The model ended without an answer.", _REMARK)
            stats = event.reply.stats
            self._done(f"{stats.n_generated} tokens, {stats.decode_tok_s:.1f} a second")
        else:
            add(event.text, _ERROR)
            self._loaded = event.loaded
            self._done("Ask again" if event.loaded else "The model is not loaded")

    def _done(self, line: str) -> None:
        self._transcript.end()
        self._say(line)
        self._enable(ready=True)

    def _enable(self, *, ready: bool) -> None:
        """The question can be typed at any time, and sent when the engine is free."""
        self._ready = ready
        self._send.setText("Send" if self._loaded else "Load again")
        self._send.setEnabled(ready)
        self._stop.setEnabled(False)

    def _say(self, line: str) -> None:
        self._bar.hide()
        self.statusBar().showMessage(line)


def run(argv: list[str]) -> int:
    """Open the window for the file that is named, or chosen."""
    application = QApplication(argv)
    named = application.arguments()[1:]
    file = named[0] if named else QFileDialog.getOpenFileName(None, "A model", "", "GGUF models (*.gguf)")[0]
    if not file:
        return 0
    window = Window(Path(file))
    window.show()
    return application.exec()
