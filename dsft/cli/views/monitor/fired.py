"""Which alerts fire and which can't be judged, from sample to sample: what begins and what is over. No drawing."""

from collections import Counter
from collections.abc import Iterable

from dsft.monitor.sample import AlertSample

_Key = tuple[str, int | None, int | None]

_NUM_UNKNOWN = 2
"""After so many samples without a value that is told: the first look at a CPU never has one."""


def identify(alert: AlertSample) -> _Key:
    """Return what tells a limit on one device from all others."""
    return alert.alert, alert.gpu_index, alert.mig_index


class FiredAlerts:
    """Remembers which limits are passed, each on each device."""

    def __init__(self) -> None:
        self._fired: set[_Key] = set()

    def take(self, alerts: Iterable[AlertSample]) -> list[AlertSample]:
        """Look at the alerts of a sample, and return those that begin to fire or no longer do.

        What can't be told for a moment, or is not there because its GPU is not, has not ended.
        """
        changed = []
        for alert in alerts:
            key = identify(alert)
            if alert.is_fired is not None and alert.is_fired != (key in self._fired):
                self._fired ^= {key}
                changed.append(alert)
        return changed


class UnknownAlerts:
    """Remembers which limits can't be judged, because their values have not been told for more than a moment.

    Attributes:
        now: Those of the last sample.
        begun: Those of them that could be judged, or still might be, in the sample before.
    """

    def __init__(self) -> None:
        self.now: list[AlertSample] = []
        self.begun: list[AlertSample] = []
        self._num_unknown: Counter[_Key] = Counter()

    def take(self, alerts: Iterable[AlertSample]) -> None:
        """Look at the alerts of a sample."""
        self.now, self.begun = [], []
        for alert in alerts:
            key = identify(alert)
            self._num_unknown[key] = 0 if alert.is_fired is not None else self._num_unknown[key] + 1
            if self._num_unknown[key] >= _NUM_UNKNOWN:
                self.now.append(alert)
            if self._num_unknown[key] == _NUM_UNKNOWN:
                self.begun.append(alert)
