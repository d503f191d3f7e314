"""Asks NVML about one device, and remembers what it does not tell."""

from typing import Any

from dsft.monitor.nvml.codes import DEVICE_LOST, NVML_LOST, UNANSWERABLE


class Questions:
    """Questions to one handle.

    Args:
        nvml: The pynvml module.
        handle: Of the device.

    Attributes:
        num_answers: How many questions were answered.
        failure: The last NVMLError that was neither "not supported" nor the end of the device.
    """

    def __init__(self, nvml: Any, handle: Any) -> None:
        self.nvml = nvml
        self.handle = handle
        self.num_answers = 0
        self.failure: Any = None
        self._unanswerable: set[tuple[Any, ...]] = set()

    def ask(self, function: str, *arguments: Any) -> Any:
        """Return what a function of NVML says, or None where it does not say it.

        Args:
            function: Its name; it takes the handle first.
            arguments: What it takes after that.

        Raises:
            NVMLError: The device or NVML as a whole is lost.
        """
        question = (function, *arguments)
        if question in self._unanswerable:
            return None
        call = getattr(self.nvml, function, None)
        if call is None:  # another version of nvidia-ml-py
            self._unanswerable.add(question)
            return None
        try:
            answer = call(self.handle, *arguments)
        except self.nvml.NVMLLibraryMismatchError:  # the driver is too old for what this function asks it
            self._unanswerable.add(question)
            return None
        except self.nvml.NVMLError as error:
            if error.value in DEVICE_LOST or error.value in NVML_LOST:
                raise
            if error.value in UNANSWERABLE:
                self._unanswerable.add(question)
            else:
                self.failure = error
            return None
        self.num_answers += 1
        return answer

    def is_unanswerable(self, function: str, *arguments: Any) -> bool:
        """Return whether the driver has said that it will not tell this."""
        return (function, *arguments) in self._unanswerable

    def ask_number(self, function: str, *arguments: Any) -> int | None:
        """Return what `ask` does, as an integer."""
        answer = self.ask(function, *arguments)
        return None if answer is None else int(answer)

    def ask_text(self, function: str, *arguments: Any) -> str | None:
        """Return what `ask` does, as text."""
        answer = self.ask(function, *arguments)
        return answer.decode(errors="replace") if isinstance(answer, bytes) else answer

    def ask_field(self, field_id: int, scope: int = 0) -> int | None:
        """Return a field that is told through nvmlDeviceGetFieldValues, or None.

        Raises:
            NVMLError: The device or NVML as a whole is lost.
        """
        question = ("field", field_id, scope)
        if question in self._unanswerable:
            return None
        values = self.ask("nvmlDeviceGetFieldValues", ((field_id, scope),))
        if values is None:
            return None
        code = int(values[0].nvmlReturn)
        if code != self.nvml.NVML_SUCCESS:
            if code in DEVICE_LOST or code in NVML_LOST:
                raise self.nvml.NVMLError(code)
            if code in UNANSWERABLE:
                self._unanswerable.add(question)
            return None
        return int(values[0].value.uiVal)
