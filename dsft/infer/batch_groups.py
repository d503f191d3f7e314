"""Rows answered in groups, where a group that fails is cut until it is known which row it fails for."""

from collections.abc import Callable, Sequence

from dsft.core.errors import DoesNotFitError, DsftError, ModelError
from dsft.infer.batch_rows import AskedRow, RowProblem

AnswerGroup = Callable[[Sequence[AskedRow], Callable[[AskedRow], None]], None]
"""Answers a group, and tells each row that is answered."""


class GroupedAnswers:
    """Answers rows in groups.

    A group that needs more memory than there is is halved, and all later ones are no larger. One whose outputs are NaN
    is halved too, but only it. A row that fails alone has failed, and the others go on. Whether it is the row's fault
    or the model's that outputs are NaN shows with the first answer: rows that fail so before it are told then.

    Args:
        answer_group: Answers a group.
        on_failure: Receives a row that fails, and why.
        on_notice: Receives sentences the user should read.
        has_answered: Whether the model has answered other rows before.
    """

    def __init__(
        self,
        answer_group: AnswerGroup,
        on_failure: Callable[[AskedRow, RowProblem], None],
        on_notice: Callable[[str], None],
        *,
        has_answered: bool = False,
    ) -> None:
        self._answer_group = answer_group
        self._on_failure = on_failure
        self._on_notice = on_notice
        self._limit: int | None = None
        self._has_answered = has_answered
        self._put_aside: list[tuple[AskedRow, ModelError]] = []

    def answer(self, rows: Sequence[AskedRow], size: int) -> None:
        """Answer rows in their order.

        Args:
            rows: The rows.
            size: Most of them at once.
        """
        groups = self._cut(rows, size)
        while groups:
            group = groups.pop(0)
            left, error = self._try(group)
            if error is None:
                continue
            if len(group) == 1:
                self._fail(group[0], error)
            elif isinstance(error, DoesNotFitError):
                self._shrink(len(group))
                groups = self._cut([*left, *(row for other in groups for row in other)], size)
            else:
                middle = (len(left) + 1) // 2
                groups[:0] = [half for half in (left[:middle], left[middle:]) if half]

    def finish(self) -> None:
        """Settle what was put aside, after the last row.

        Raises:
            ModelError: The outputs were NaN and nothing was ever answered, so it is not the rows' fault.
        """
        if self._put_aside and not self._has_answered:
            raise self._put_aside[0][1]

    def _cut(self, rows: Sequence[AskedRow], size: int) -> list[Sequence[AskedRow]]:
        most = size if self._limit is None else min(size, self._limit)
        return [rows[start : start + most] for start in range(0, len(rows), most)]

    def _try(self, group: Sequence[AskedRow]) -> tuple[list[AskedRow], DsftError | None]:
        """Answer a group; return the rows that are not answered, and the error that this is for."""
        left = {row.line: row for row in group}

        def take(row: AskedRow) -> None:
            del left[row.line]
            self._has_answered = True
            while self._put_aside:
                failed, error = self._put_aside.pop(0)
                self._on_failure(failed, RowProblem.of(error))

        try:
            self._answer_group(group, take)
        except (DoesNotFitError, ModelError) as error:
            # Without its traceback, whose frames would keep the memory that the next attempt needs.
            return list(left.values()), type(error)(error.found, error.fix)
        return [], None

    def _shrink(self, num_rows: int) -> None:
        if self._limit is None:
            self._on_notice(f"{num_rows} rows at once need more memory than there is; going on with fewer.")
        self._limit = num_rows // 2

    def _fail(self, row: AskedRow, error: DsftError) -> None:
        if isinstance(error, ModelError) and not self._has_answered:
            self._put_aside.append((row, error))
        else:
            self._on_failure(row, RowProblem.of(error))
