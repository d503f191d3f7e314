"""Whether the model hub answers; asked once per process, because its client retries for half a minute."""

import os
from functools import cache

HUB_TIMEOUT_S = 5.0


@cache
def is_hub_reachable() -> bool:
    """Return whether the hub answers within a few seconds; False in offline mode (HF_HUB_OFFLINE)."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        return False
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_TIMEOUT_S)
    except Exception:  # which HTTP library raises, and so which classes, depends on huggingface_hub's version
        return False
    return True
