"""What frames the monitor's screen: alerts that fire at the top, keys and time at the bottom, help in between."""

from collections.abc import Sequence

from dsft.cli.views.monitor.line import Line, join_fitting, printable, wrap_words
from dsft.cli.views.monitor.plain_lines import describe_alert, format_clock, name_place
from dsft.cli.views.monitor.state import MonitorState
from dsft.monitor.sample import AlertSample, Sample

ALERT_RANK = 90
"""Of the rows that alerts stand in; one less for how many more there are."""

_FOOTER_RANK, _UNKNOWN_RANK = 100, 60
_ALERT_STYLE = "bold reverse red"
_MAX_ALERTS = 3

_KEYS = (
    ("q, Esc", "quit"),
    ("p", "pause: the figures stand still; history, alerts and a CSV file go on"),
    ("s", "sort the processes: by memory, PID, user, GPU, command, SM share"),
    ("↑ ↓", "scroll the processes by one; PgUp and PgDn by what the screen shows, Home and End to either end"),
    ("h, ?", "this help; any key leaves it"),
    ("Ctrl-Z", "stop; `fg` goes on"),
)
_KEY_WIDTH = 8

_FOOTER_KEYS = (("q", "quit", 4), ("p", "pause", 2), ("s", "sort", 1), ("↑↓", "scroll", 0), ("?", "keys", 3))
"""Keys, what they do in a word, and how much they are needed."""

_MOST_NEEDED = 4
_KEY_GAP = "  "


def draw_alerts(alerts: Sequence[AlertSample], width: int, most: int = _MAX_ALERTS) -> list[Line]:
    """Draw a banner for each alert that fires, and how many more there are."""
    fired = [alert for alert in alerts if alert.is_fired]
    shown = fired if len(fired) <= most else fired[: max(1, most - 1)]
    rows = [Line(f" ALERT  {describe_alert(alert)}", _ALERT_STYLE, ALERT_RANK) for alert in shown]
    if len(fired) > len(shown):
        more = f"and {len(fired) - len(shown)} more"
        if most > 1:
            rows.append(Line(f" {more}", _ALERT_STYLE, ALERT_RANK - 1))
        else:
            rows = [Line(f" ALERT ({more})  {describe_alert(fired[0])}", _ALERT_STYLE, ALERT_RANK)]
    for row in rows:
        row.clip(width)
        row.parts = [(text, _ALERT_STYLE) for text, _ in row.fill(width).parts]
    return rows


def draw_unknown_alerts(alerts: Sequence[AlertSample], width: int) -> list[Line]:
    """Draw a row for each limit that can't be judged, with those who do not tell its value."""
    places: dict[str, list[str]] = {}
    for alert in alerts:
        places.setdefault(alert.alert, []).append(name_place(alert))
    rows = []
    for limit, names in places.items():
        first, *others = names
        who = ", ".join([first, *(name.removeprefix("GPU ") for name in others)])
        row = Line(f" {limit}: {who} {'do' if others else 'does'} not tell it", "dim", _UNKNOWN_RANK)
        rows.append(row.clip(width))
    return rows


def draw_footer(state: MonitorState, width: int) -> Line:
    """Draw keys, interval and the time of what is shown."""
    clock = Line(_format_clock(state.sample), "bold")
    room = max(1, width - clock.width - 2)
    fields = [(_MOST_NEEDED, Line("Ctrl-C quits", "dim"))]
    if state.is_paused:
        fields.insert(0, (_MOST_NEEDED + 1, Line(" paused ", "bold reverse yellow")))
    if state.has_keys:
        fields[-1:] = _list_keys(room - (fields[0][1].width + len(_KEY_GAP) if state.is_paused else 0))
    row = join_fitting(fields, room, _KEY_GAP, rank=_FOOTER_RANK)
    interval = Line(f"every {state.interval_s:g} s · ", "dim")
    right = interval.join(clock) if row.width + interval.width + clock.width + 2 <= width else clock
    if state.host_name and state.sample is not None and state.sample.host is None:  # which has no row to be named in
        name = Line(printable(state.host_name), "bold").add(" · ", "dim")
        right = name.join(right) if row.width + name.width + right.width + 2 <= width else right
    return row.fill(width - right.width).join(right).clip(width)


def _list_keys(room: int) -> list[tuple[int, Line]]:
    """Return the keys with their need, each with a word as long as there is room for all; the least needed lose it."""
    for least_need in range(_MOST_NEEDED + 1):
        fields = []
        for key, word, need in _FOOTER_KEYS:
            line = Line(key, "bold")
            fields.append((need, line.add(f" {word}", "dim") if need >= least_need else line))
        if sum(line.width for _, line in fields) + len(_KEY_GAP) * (len(fields) - 1) <= room:
            break
    return fields


def draw_help(width: int) -> list[Line]:
    """Draw what each key does."""
    rows = [Line("Keys", "bold cyan", 60), Line()]
    for key, words in _KEYS:
        first = Line(f"{key:<{_KEY_WIDTH}}", "bold", 60)
        for position, row in enumerate(wrap_words(words, max(8, width - _KEY_WIDTH))):
            start = first if position == 0 else Line(" " * _KEY_WIDTH, rank=60)
            rows.append(start.join(row).clip(width))
    return rows


def _format_clock(sample: Sample | None) -> str:
    return "" if sample is None else format_clock(sample.time)
