"""What exceptions from outside dsft mean to the user."""

from huggingface_hub import get_session

from dsft.cli.errors import report
from dsft.core.errors import ExitCode


def test_an_error_of_the_hub_s_http_library_is_no_bug_of_dsft():
    """Which library that is depends on huggingface_hub's version."""
    error = type("ReadTimeout", (Exception,), {"__module__": type(get_session()).__module__.partition(".")[0]})
    found = report(error("the connection broke"))
    assert (found.kind, found.exit_code) == ("UnreachableHubError", ExitCode.WRONG_INPUT)
    assert found.found == "the model hub gave nothing: the connection broke"
    assert "--dataset FILE" in found.fix
