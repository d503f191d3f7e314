"""Which alerts fire, from sample to sample: what begins and what is over. No drawing."""

from collections.abc import Iterable

from dsft.monitor.sample import AlertSample


class FiredAlerts:
    """Remembers which limits are passed, each on each GPU."""

    def __init__(self) -> None:
        self._fired: set[tuple[str, int | None]] = set()

    def take(self, alerts: Iterable[AlertSample]) -> list[AlertSample]:
        """Look at the alerts of a sample, and return those that begin to fire or no longer do.

        What can't be told for a moment, or is not there because its GPU is not, has not ended.
        """
        changed = []
        for alert in alerts:
            key = (alert.alert, alert.gpu_index)
            if alert.is_fired is not None and alert.is_fired != (key in self._fired):
                self._fired ^= {key}
                changed.append(alert)
        return changed
